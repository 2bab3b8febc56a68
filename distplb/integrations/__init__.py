"""Adapters: each finds a framework's routers, expert tensors and counts, and describes their layout.

May import `train` and what lies below.
"""
