"""Read untrusted files: sizes are checked before memory is allocated, and no code is run.

May import `core.arguments` and `errors`.
"""
