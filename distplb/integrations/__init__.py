"""Adapters: each finds a framework's routers, expert tensors and counts, and says which layout they have. May import
`train` and what lies below.
"""
