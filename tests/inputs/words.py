"""Commands, options and their words."""

from __future__ import annotations

from inputs.case import Case

__all__ = ["CASES"]

CASES: list[Case] = []
