"""The stages of a step: timed, named in errors, and told to ranks that wait for one that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType

from distplb.comm.steps import StepComm
from distplb.core.private_names import fast_range, unseen_by_modes
from distplb.core.stages import Stages
from distplb.errors import DistplbError, in_stage
from distplb.replicas.sampling import Sample

__all__ = ["StepStages"]

_NOT_SAMPLED = nullcontext()


class StepStages:
    """Stages count, split, push, push again and bring home; sample, if steps are sampled.

    Args:
        comm: the ranks of the group.
    """

    def __init__(self, comm: StepComm) -> None:
        self._comm, self._stages = comm, Stages(fast_range)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the host so far, by stage."""
        return dict(self._stages.seconds)

    def stage(self, name: str, sample: Sample | None = None) -> AbstractContextManager[None]:
        """Time the block, also as a part of a sampled step. Its errors are distplb's.

        Other ranks hear of those that they do not raise themselves, at once and not at their deadline. What distplb
        refuses, it refuses on all ranks alike: nobody waits, and the ranks may go on, so a report would only end a
        later wait.

        Selective recomputation does not see its operations, which differ between a forward and its recomputation.
        """
        timed, unseen = self._stages.stage(name), unseen_by_modes()
        if sample is None and isinstance(unseen, nullcontext):
            return _Stage(self._comm, name, timed)
        return self._observed(name, timed, unseen, sample)

    @contextmanager
    def _observed(
        self,
        name: str,
        timed: AbstractContextManager[None],
        unseen: AbstractContextManager[None],
        sample: Sample | None,
    ) -> Iterator[None]:
        """The same beside modes, or as a part of a sampled step."""
        try:
            with timed, unseen, sample.part(name) if sample else _NOT_SAMPLED:
                yield
        except Exception as error:
            _tell(self._comm, name, error)
            raise


class _Stage(AbstractContextManager[None]):
    """A timed block whose errors are distplb's. A class, because a generator takes 4 µs longer in every stage.

    Args:
        comm: the ranks that hear of an error.
        name: the stage.
        timed: times the block, and lets its errors pass.
    """

    __slots__ = ("_comm", "_name", "_timed")

    def __init__(self, comm: StepComm, name: str, timed: AbstractContextManager[None]) -> None:
        self._comm, self._name, self._timed = comm, name, timed

    def __enter__(self) -> None:
        self._timed.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._timed.__exit__(kind, error, where)
        if isinstance(error, Exception):
            _tell(self._comm, self._name, error)


def _tell(comm: StepComm, name: str, error: Exception) -> None:
    """Tell others of an error that is not distplb's, and raise distplb's in its place."""
    if not isinstance(error, DistplbError):
        ours = in_stage(name, error)
        comm.tell(ours)
        raise ours from error
