"""The exceptions that distplb raises on purpose, all of one family."""

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

Naming = Callable[[str, str], str]  # an option's name and a value for it ("" for no value), as the reader passes them


class DistplbError(RuntimeError):
    """distplb refuses an input or could not complete a task; the text gives the value found and the remedy.

    A collective call raises it on every rank with the same text, even if only one rank saw the cause.
    """


def in_python(name: str, value: str) -> str:
    """Name an option as a Python argument: `num_slots`, or `num_slots=8` with a value."""
    return f"{name}={value}" if value else name


class OptionError(DistplbError):
    """Options are refused; the text names them as the reader passes them, as arguments or on the command line.

    >>> error = OptionError("{num_slots} is {found}; pass {num_slots:8}", found=6)
    >>> str(error)
    'num_slots is 6; pass num_slots=8'
    >>> error.told(lambda name, value: f"--slots {value}".strip())
    '--slots is 6; pass --slots 8'

    Args:
        template: a template of `str.format`. A name without a value here is the Python name of an option; the text
            after its colon is a value to pass, None to leave the option out.
        values: the values of all other names.
    """

    def __init__(self, template: str, **values: object) -> None:
        super().__init__(template)
        self._values = values

    def told(self, naming: Naming) -> str:
        """The text, with options named by `naming`."""
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
    """A stage raised an exception that is not distplb's (its `__cause__`): out of memory, or a bug to report."""


class DisagreementError(DistplbError):
    """Ranks differ in a value that must be the same on all of them.

    Attributes:
        field: the name of that value.
    """

    def __init__(self, text: str, field: str) -> None:
        super().__init__(text)
        self.field = field

    def __reduce__(self) -> tuple[type[DisagreementError], tuple[str, str]]:
        return type(self), (str(self), self.field)


class UntrainedError(DistplbError):
    """Declared tensors receive no gradient; they may no longer belong to the model."""


class HalfMovedError(DistplbError):
    """Experts may have been written on some ranks and not on others, so the model in memory is inconsistent.

    Resume from the last checkpoint. A `Rebalancer` that raised this refuses to write one.
    """


class LostRanksError(DistplbError):
    """Ranks missed the deadline of a collective, or the connection to them broke.

    The communicator accepts no further calls, because after a timeout a late rank's collective would be paired with a
    different one. Stop the process; its launcher resumes the job from the last checkpoint.

    Attributes:
        missing: the ranks of the communicator that did not answer; empty if all answered or could not be asked.
        stage: the stage in which this rank waited; None outside a rebalance.
        why: how long this rank waited, and the library's message.
    """

    def __init__(self, missing: Sequence[int], why: str, stage: str | None = None) -> None:
        super().__init__(tuple(missing), why, stage)
        self.missing, self.stage, self.why = tuple(missing), stage, why

    def __str__(self) -> str:
        who = f"rank{'s' * (len(self.missing) > 1)} {', '.join(map(str, self.missing))} did not answer"
        where = f"in stage {self.stage}: " if self.stage else ""
        return (
            f"{where}{who if self.missing else 'a collective failed'} ({self.why}); stop this process and "
            "resume the job from its last checkpoint"
        )


def in_stage(name: str, error: Exception) -> DistplbError:
    """The error that all ranks raise for a failed stage: distplb's own, or an `UnforeseenError` that names it."""
    if isinstance(error, DistplbError):
        return error
    unforeseen = UnforeseenError(f"in stage {name}: {error!r}")
    unforeseen.__cause__ = error
    return unforeseen
