"""Steps and layers without tokens, shares of replicas, even loads."""

from __future__ import annotations

from inputs.case import Case

__all__ = ["CASES"]

CASES: list[Case] = []
