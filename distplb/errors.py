"""The one exception family that distplb raises on purpose."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["DisagreementError", "DistplbError", "HalfMovedError", "LostRanksError", "UntrainedError", "in_stage"]


class DistplbError(RuntimeError):
    """Something that distplb refuses or could not do; the text names the value found and the remedy.

    Raised on every rank of a collective call, with the same text, even where only one rank saw the cause.
    """


class DisagreementError(DistplbError):
    """Ranks differ in something that they must share.

    Attributes:
        field: its name.
    """

    def __init__(self, text: str, field: str) -> None:
        super().__init__(text)
        self.field = field

    def __reduce__(self) -> tuple[type[DisagreementError], tuple[str, str]]:
        return type(self), (str(self), self.field)


class UntrainedError(DistplbError):
    """No gradient comes to what was declared: it may be none of the model's tensors any more."""


class HalfMovedError(DistplbError):
    """Experts may be written on some ranks and not on others: the model in memory is no longer whole.

    Resume from the last checkpoint. A `Rebalancer` that met this refuses to write one.
    """


class LostRanksError(DistplbError):
    """Ranks did not come to a collective before its deadline, or the connection to them broke.

    The communicator takes no further call: where some ranks have given a collective up, the next one of those that
    come late would be paired with another. Stop the process; its launcher resumes the job from the last checkpoint.

    Attributes:
        missing: the ranks of the communicator that did not answer; empty where all did, or nobody could be asked.
        stage: in which this rank waited; None outside a rebalance.
        why: for how long it waited, and what the library said.
    """

    def __init__(self, missing: Sequence[int], why: str, stage: str | None = None) -> None:
        super().__init__(tuple(missing), why, stage)
        self.missing, self.stage, self.why = tuple(missing), stage, why

    def __str__(self) -> str:
        who = f"rank{'s' * (len(self.missing) > 1)} {', '.join(map(str, self.missing))} did not answer"
        where = f"in stage {self.stage}: " if self.stage else ""
        return (
            f"{where}{who if self.missing else 'the ranks lost each other'} ({self.why}); stop this process and "
            "resume the job from its last checkpoint"
        )


def in_stage(name: str, error: Exception) -> DistplbError:
    """What went wrong in a stage, for all ranks to raise: what nobody foresaw is told with the stage's name."""
    return error if isinstance(error, DistplbError) else DistplbError(f"in stage {name}: {error!r}")
