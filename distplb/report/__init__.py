"""The report of a run: `run` reads it, `figures` lists the figures, `drawings` has a file for each, and `page` writes
one page that needs nothing else. May import `study` and what lies below.
"""
