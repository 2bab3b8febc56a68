"""The stages of a step: timed, named in errors, and told to ranks that wait for one that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

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

    @contextmanager
    def stage(self, name: str, sample: Sample | None = None) -> Iterator[None]:
        """Time the block, also as a part of a sampled step. Its errors are distplb's.

        Other ranks hear of those that they do not raise themselves, at once and not at their deadline. What distplb
        refuses, it refuses on all ranks alike: nobody waits, and the ranks may go on, so a report would only end a
        later wait.

        Selective recomputation does not see its operations, which differ between a forward and its recomputation.
        """
        try:
            with self._stages.stage(name), unseen_by_modes(), sample.part(name) if sample else _NOT_SAMPLED:
                yield
        except DistplbError:
            raise
        except Exception as error:
            ours = in_stage(name, error)
            self._comm.tell(ours)
            raise ours from error
