"""Prints the table of docs/inputs.md."""

from inputs.every import page

print(page(), end="")
