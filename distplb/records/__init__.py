"""What a job leaves behind: events and their log, traces and their files; and loads from other programs.

May import `core`.
"""
