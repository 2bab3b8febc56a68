"""Items into packs of equal count, which is how the planner places experts; in three engines. Pure; knows no ranks.

May import `core`.
"""
