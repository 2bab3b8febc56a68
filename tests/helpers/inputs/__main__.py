"""Prints the table of docs/inputs.md."""

from inputs.page import page

print(page(), end="")
