"""The report of a run: figures, and one page that needs nothing else. May import `study` and what lies below."""
