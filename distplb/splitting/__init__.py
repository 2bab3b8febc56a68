"""Split one step's tokens: which GPU gets a replica of which expert, and computes how many of its tokens. Pure.

May import `core`.
"""
