"""Items into packs: what the planner packs experts with, in three engines. Pure; knows no experts or ranks.

May import `core`.
"""
