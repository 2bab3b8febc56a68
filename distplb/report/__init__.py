"""The report of a run: `run` reads it, `figures` lists the figures, `drawings` has one file for each, and `page` writes
a self-contained page. May import `study` and what lies below.
"""
