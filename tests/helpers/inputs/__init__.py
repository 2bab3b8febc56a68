"""What people give distplb, and what it answers: a module for each kind of input, run by tests/cli/test_inputs.py.

`python -m inputs`, in the folder tests/helpers, prints all of it as the tables of docs/inputs.md.
"""
