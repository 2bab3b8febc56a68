"""Quiet layers: those whose last splits needed no replica are looked at every few steps only.

The rule depends on splits alone, which all ranks know, so all ranks look at the same steps.
"""

from __future__ import annotations

__all__ = ["Quiet"]

_TRIVIAL_LOOKS = 4  # in a row, before steps are left out
_MOST_STEPS = 8  # from one look to the next


class Quiet:
    """Which steps of one layer are looked at.

    >>> quiet = Quiet()
    >>> looks = []
    >>> for step in range(24):
    ...     if quiet.looks:
    ...         looks.append(step)
    ...         quiet.note(is_trivial=True)
    ...     else:
    ...         quiet.skip()
    >>> looks
    [0, 1, 2, 3, 5, 9, 17]
    """

    def __init__(self) -> None:
        self._trivial = 0  # looks in a row that found nothing to do
        self._to_skip = 0

    @property
    def looks(self) -> bool:
        """Whether the next step is looked at. A step that the ranks refuse changes nothing, so they stay alike."""
        return not self._to_skip

    def skip(self) -> None:
        """Tell that all ranks have left a step out."""
        self._to_skip -= 1

    def note(self, *, is_trivial: bool) -> None:
        """Tell what a look has found."""
        self._trivial = self._trivial + 1 if is_trivial else 0
        steps = 1 << max(0, self._trivial - _TRIVIAL_LOOKS + 1)
        self._to_skip = min(steps, _MOST_STEPS) - 1
