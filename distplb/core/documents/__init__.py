"""Reads files that may come from anywhere: sizes are checked before memory is taken, nothing is run.

May import `core.arguments` and `errors`.
"""
