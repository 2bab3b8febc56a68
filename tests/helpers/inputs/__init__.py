"""Inputs that users give distplb, and its answers: a module for each kind of input, run by tests/cli/test_inputs.py.

`python -m inputs`, in the folder tests/helpers, prints all of them as docs/inputs.md.
"""
