"""Pack items into packs of equal count, as the planner places experts; three engines. Pure; no process group.

May import `core`.
"""
