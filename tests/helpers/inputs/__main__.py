"""Print docs/inputs.md."""

from inputs.page import page

print(page(), end="")
