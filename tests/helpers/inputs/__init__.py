"""What people give distplb, and what it answers: one module for each kind, run by tests/cli/test_inputs.py.

`python -m inputs`, in the folder tests, prints all of it as the table that docs/inputs.md has.
"""
