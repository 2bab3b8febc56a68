"""The report of a run: figures, and one page that needs nothing else."""
