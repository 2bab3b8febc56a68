"""The one exception family that distplb raises on purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = [
    "DisagreementError",
    "DistplbError",
    "HalfMovedError",
    "LostRanksError",
    "Naming",
    "OptionError",
    "UnforeseenError",
    "UntrainedError",
    "in_python",
    "in_stage",
]

Naming = Callable[[str, str], str]  # of an option's name and a value of it, "" for none: how the reader passes it


class DistplbError(RuntimeError):
    """Something that distplb refuses or could not do; the text names the value found and the remedy.

    Raised on every rank of a collective call, with the same text, even where only one rank saw the cause.
    """


def in_python(name: str, value: str) -> str:
    """As an argument: `num_slots`, and `num_slots=8` with a value."""
    return f"{name}={value}" if value else name


class OptionError(DistplbError):
    """Options that do not fit, which each reader knows by another name: an argument, or an option of a command.

    >>> error = OptionError("{num_slots} is {found}; pass {num_slots:8}", found=6)
    >>> str(error)
    'num_slots is 6; pass num_slots=8'
    >>> error.told(lambda name, value: f"--slots {value}".strip())
    '--slots is 6; pass --slots 8'

    Args:
        template: as of `str.format`. A name that has no value here is an option's, by its name in Python; what follows
            its colon is a value to pass, None for leaving it out.
        values: of the other names.
    """

    def __init__(self, template: str, **values: object) -> None:
        super().__init__(template)
        self._values = values

    def told(self, naming: Naming) -> str:
        """The text with options named so."""
        return str(self.args[0]).format_map(_Values(self._values, naming))

    def __str__(self) -> str:
        return self.told(in_python)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[Callable[..., OptionError], tuple[str, dict[str, object]]]:
        return _option_error, (str(self.args[0]), self._values)


def _option_error(template: str, values: Mapping[str, Any]) -> OptionError:
    return OptionError(template, **values)


class _Values(dict[str, Any]):
    def __init__(self, values: Mapping[str, object], naming: Naming) -> None:
        super().__init__(values)
        self._naming = naming

    def __missing__(self, name: str) -> _Option:
        return _Option(name, self._naming)


class _Option(NamedTuple):
    name: str
    naming: Naming

    def __format__(self, value: str) -> str:
        return self.naming(self.name, value)


class UnforeseenError(DistplbError):
    """A stage met an exception that is none of distplb's, its `__cause__`: want of memory, or a fault to report."""


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
    if isinstance(error, DistplbError):
        return error
    unforeseen = UnforeseenError(f"in stage {name}: {error!r}")
    unforeseen.__cause__ = error
    return unforeseen
