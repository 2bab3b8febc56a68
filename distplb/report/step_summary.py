"""The numbers of the sampled steps: what replicas did to the imbalance, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass

from distplb.report.formatting import plural, printable, shortened
from distplb.report.run import Run
from distplb.report.sampled_steps import mean_of, worst_of

__all__ = ["Distance", "StepSummary", "distances", "products_apart"]

_NOTICED = 0.005  # of imbalance: a smaller difference is not called a gain
_EVEN = 1.02  # imbalance at home, below which a router is even


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How much longer a typical step of this run takes than one of another run.

    Args:
        name: name of the other run.
        seconds: of this run's step.
        seconds_there: of the other run's step.
        longer: seconds by group of parts, whose sum is the difference; negative where this run is faster.
        is_forward: whether only the forward is compared, because the backward of either was not measured.
        tokens: tokens of a step here / there, which should be 1; None if they were not recorded.
    """

    name: str
    seconds: float
    seconds_there: float
    longer: dict[str, float]
    is_forward: bool
    tokens: float | None


@dataclass(frozen=True, kw_only=True)
class StepSummary:
    """The numbers of the sampled steps; imbalances and replicas are of one layer in one step.

    Args:
        num_steps: number of sampled steps.
        imbalance_before, imbalance_after, imbalance_bound: means over layers and steps that have tokens: if every token
            were computed at home, with the replicas, and the bound; None if no step has tokens.
        worst_before, worst_after: the largest of them.
        replicas: the mean number of replicas.
        bytes_inside, bytes_between: bytes of weights and gradients in the mean step, over all layers and ranks.
        seconds: seconds of a typical step by part, see `StepTime`; empty if none was timed.
        share_waiting: the share of these seconds spent waiting for a busier GPU; None if none was timed.
        share_replicas: the share spent on counting, splitting, pushing replicas and bringing gradients home.
        beside: the distance to each run beside it.
    """

    num_steps: int
    imbalance_before: float | None
    imbalance_after: float | None
    imbalance_bound: float | None
    worst_before: float | None
    worst_after: float | None
    replicas: float
    bytes_inside: float
    bytes_between: float
    seconds: dict[str, float]
    share_waiting: float | None
    share_replicas: float | None
    beside: tuple[Distance, ...]

    @classmethod
    def of(cls, run: Run) -> StepSummary | None:
        """The summary of the sampled steps of a run; None if it has none."""
        steps, time = run.sampled, run.step_time
        if steps is None:
            return None
        groups = {} if time is None else {name: value / time.total for name, value in time.groups.items()}
        return cls(
            num_steps=len(steps.events),
            imbalance_before=mean_of(steps.before),
            imbalance_after=mean_of(steps.after),
            imbalance_bound=mean_of(steps.bound),
            worst_before=worst_of(steps.before),
            worst_after=worst_of(steps.after),
            replicas=float(steps.replicas.mean()) if len(steps.replicas) else 0.0,
            bytes_inside=sum(event.bytes_inside for event in steps.events) / len(steps.events),
            bytes_between=sum(event.bytes_between for event in steps.events) / len(steps.events),
            seconds={} if time is None else time.parts,
            share_waiting=groups.get("waiting"),
            share_replicas=groups["split"] + groups["push"] if groups else None,
            beside=distances(run),
        )

    @property
    def headline(self) -> str:
        """What replicas did, in one sentence."""
        where = f"In {plural(self.num_steps, 'sampled step')}"
        before, after = self.imbalance_before, self.imbalance_after
        if before is None or after is None:
            return f"{where} no layer had tokens."
        limit = "" if self.imbalance_bound is None else f"; no split could beat {self.imbalance_bound:.3f}"
        if not self.replicas:
            return f"{where} no replica was lent: the imbalance was {before:.3f} on average{limit}."
        if before - after < _NOTICED:
            return f"{where} replicas hardly changed the imbalance: {before:.3f} at home, {after:.3f} with them{limit}."
        return (
            f"{where} replicas lowered the imbalance from {before:.3f} to {after:.3f} on average, and the worst from "
            f"{self.worst_before:.2f} to {self.worst_after:.3f}{limit}."
        )


def distances(run: Run) -> tuple[Distance, ...]:
    """The distance of a run to each run beside it."""
    found = []
    for other in run.beside:
        assert run.step_time is not None, "`with_beside` checks that"
        assert other.step_time is not None, "`with_beside` checks that"
        here, there = run.step_time.comparable(other.step_time)
        is_forward = here.total < run.step_time.total or there.total < other.step_time.total
        tokens, tokens_there = _tokens(run), _tokens(other)
        found.append(
            Distance(
                name=other.name,
                seconds=here.total,
                seconds_there=there.total,
                longer=here.minus(there),
                is_forward=is_forward,
                tokens=tokens / tokens_there if tokens and tokens_there else None,
            )
        )
    return tuple(found)


def products_apart(run: Run) -> tuple[str, float, float] | None:
    """Why this run's products take longer than those of a run with an even router: `skewed experts, small products`.

    This needs two runs beside it: one whose router is even, and one without replicas whose router is not. From the
    first to the second, experts become skewed; from the second to this run, products become smaller.

    Returns:
        The names of both, seconds of skewed experts, and seconds of small products; None without such runs.
    """
    even = next((one for one in run.beside if not _has_replicas(one) and _before(one) < _EVEN), None)
    alone = next((one for one in run.beside if not _has_replicas(one) and _before(one) >= _EVEN), None)
    if even is None or alone is None or not _has_replicas(run):
        return None
    times = [one.step_time for one in (run, even, alone)]
    assert all(time is not None for time in times), "`with_beside` checks that"
    is_whole = all(time is not None and time.has_backward for time in times)
    here, of_even, of_alone = (
        (time if is_whole else time.without_backward()).groups["products"] for time in times if time is not None
    )
    names = f"{shortened(printable(alone.name))} and {shortened(printable(even.name))}"
    return names, of_alone - of_even, here - of_alone


def _before(run: Run) -> float:
    level = None if run.sampled is None else mean_of(run.sampled.before)
    return 1.0 if level is None else level


def _has_replicas(run: Run) -> bool:
    return run.sampled is not None and bool(run.sampled.replicas.any())


def _tokens(run: Run) -> float:
    """Tokens of the mean step, over all layers."""
    events = () if run.sampled is None else run.sampled.events
    return sum(sum(map(sum, event.tokens_of_gpu_before)) for event in events) / max(1, len(events))
