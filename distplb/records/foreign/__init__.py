"""Finds the counts in files of other programs and interprets them. May import `core`."""
