"""The one exception family that distplb raises on purpose."""

from __future__ import annotations

__all__ = ["DistplbError", "HalfMovedError"]


class DistplbError(RuntimeError):
    """Something that distplb refuses or could not do; the text names the value found and the remedy.

    Raised on every rank of a collective call, with the same text, even where only one rank saw the cause.
    """


class HalfMovedError(DistplbError):
    """Experts may be written on some ranks and not on others: the model in memory is no longer whole.

    Resume from the last checkpoint. A `Rebalancer` that met this refuses to write one.
    """
