"""The result of a run: one sentence, and the numbers behind it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from distplb.core.cost import mean_of_known, mean_of_layers
from distplb.report.formatting import amount, from_to, percent, plural, printable, seconds, shortened
from distplb.report.run import Run
from distplb.report.step_summary import StepSummary

__all__ = ["Fact", "Summary"]

_MAX_NAMES = 4  # of layers without tokens
_NOTICED = 0.005  # of imbalance: a smaller difference disappears in two decimals


class Fact(NamedTuple):
    """One number at the top of the page."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The numbers of a run.

    With a trace in which experts moved, both imbalances cover the same steps, those from the first move on. With events
    only, `before` is the first window and `after` the windows that followed rebalances. With only a trace, in which
    nothing moved, both cover its second half, and `after` is under a plan made from the first half.

    Args:
        imbalance_before: mean over layers and steps that have tokens, with the experts where they began; None if it
            was not recorded.
        imbalance_after: the same under the plans, on steps that they had not seen; None if there are none.
        imbalance_bound: a lower bound that no placement could beat; None if it was not recorded.
        rebalances: number of rebalances by decision.
        repaid: for each rebalance that moved something and was timed, False if it certainly did not pay off.
        slots_moved, bytes_moved: totals over all rebalances.
        rebalance_seconds: total over all rebalances, on rank 0.
        iteration_seconds_before: the median iteration before the first rebalance; None if none was timed.
        iteration_seconds_after: the median iteration after the last rebalance for which it was timed; None if none was.
        is_replayed: whether `after` never ran in the job, but was replayed from the trace.
        steps_without_tokens: number of steps of the trace that are left out because they have no tokens.
        layers_without_tokens: names of the layers that means leave out because they have no tokens.
        sampled: the numbers of the sampled steps; None if there are none.
    """

    imbalance_before: float | None
    imbalance_after: float | None
    imbalance_bound: float | None
    rebalances: dict[str, int]
    repaid: tuple[bool, ...]
    slots_moved: int
    bytes_moved: int
    rebalance_seconds: float
    iteration_seconds_before: float | None
    iteration_seconds_after: float | None
    is_replayed: bool
    steps_without_tokens: int
    layers_without_tokens: tuple[str, ...]
    sampled: StepSummary | None = None

    @classmethod
    def of(cls, run: Run) -> Summary:
        """The summary of a run."""
        timed = [event.iteration_seconds for event in run.events if event.iteration_seconds]
        timed_next = [event.iteration_seconds_next for event in run.events if event.iteration_seconds_next]
        before, after = _imbalances(run)
        return cls(
            imbalance_before=before,
            imbalance_after=after,
            imbalance_bound=_bound(run),
            rebalances=dict(Counter(event.decision for event in run.events)),
            repaid=tuple(bool(event.repaid) for event in run.events if event.repaid is not None),
            slots_moved=sum(event.slots_moved for event in run.events),
            bytes_moved=sum(event.bytes_moved for event in run.events),
            rebalance_seconds=sum(sum(event.seconds.values()) for event in run.events),
            iteration_seconds_before=timed[0] if timed else None,
            iteration_seconds_after=timed_next[-1] if timed_next else None,
            is_replayed=not run.events_with_load and run.evaluation is not None and not run.evaluation.has_moved,
            steps_without_tokens=run.empty_steps,
            layers_without_tokens=run.empty_layers,
            sampled=StepSummary.of(run),
        )

    def as_json(self) -> dict[str, Any]:
        """All numbers by name, and the headline."""
        return {"headline": self.headline} | asdict(self)

    @property
    def headline(self) -> str:
        """The result in one to four sentences."""
        if self.sampled is not None and self.imbalance_before is None and not self.rebalances:
            return self.sampled.headline
        text = self._result()
        if False in self.repaid:
            text += f" By measured iteration times, {self.repaid.count(False):,} of "
            text += f"{plural(len(self.repaid), 'rebalance')} certainly did not pay off."
        elif self.repaid:
            text += " By measured iteration times, no rebalance was a certain loss."
        if "stopped" in self.rebalances:
            text += " Rebalancing turned itself off."
        return text if self.sampled is None else f"{text} {self.sampled.headline}"

    def _result(self) -> str:
        before, after, bound = self.imbalance_before, self.imbalance_after, self.imbalance_bound
        if before is None:
            return "No load was recorded, so the imbalance is unknown."
        limit = "" if bound is None else f"; no placement could beat {bound:.2f}"
        if after is None:
            return f"The imbalance is {before:.2f}{limit}. What a plan achieves is not known yet."
        if self.is_replayed:
            return (
                "Under a plan made from the first half of the trace, the second half would have an imbalance of "
                f"{after:.2f} instead of {before:.2f}{limit}."
            )
        if set(self.rebalances) <= {"dry run", "skipped"}:
            return (
                f"{'Nothing was moved (dry run). ' if 'dry run' in self.rebalances else ''}The plans give an imbalance "
                f"of {after:.2f} instead of {before:.2f}{limit}."
            )
        if before - after < _NOTICED:
            return f"Rebalancing did not lower the imbalance: {before:.2f} without it, {after:.2f} with it{limit}."
        return f"Rebalancing lowered the imbalance from {before:.2f} to {after:.2f}{limit}."

    def facts(self, run: Run) -> list[Fact]:
        """The facts at the top of the page, as far as they are known."""
        has_homes = bool(run.events) or run.trace is not None or self.sampled is None
        facts = [_imbalance_fact(self)] if has_homes else []
        facts += [*_step_facts(self.sampled), _size_fact(run), *_empty_facts(run)]
        if run.events:
            how = ", ".join(f"{number} {printable(decision)}" for decision, number in self.rebalances.items())
            facts.append(Fact("Rebalances", f"{len(run.events):,}", how))
            facts.append(Fact("Moved", plural(self.slots_moved, "slot"), amount(self.bytes_moved, "B")))
            facts.append(Fact("Time spent on rebalances", seconds(self.rebalance_seconds), _share_of_run(run)))
        if self.iteration_seconds_before and self.iteration_seconds_after:
            pair = from_to(seconds(self.iteration_seconds_before), seconds(self.iteration_seconds_after))
            facts.append(Fact("Median iteration", pair, "before the first rebalance, after the last"))
        return facts + _window_facts(run)


def _imbalances(run: Run) -> tuple[float | None, float | None]:
    evaluation = run.evaluation
    if evaluation is not None and evaluation.has_moved:
        return _mean(evaluation.imbalance_unmoved[evaluation.since_move]), _mean(
            evaluation.imbalance_in_force[evaluation.since_move]
        )
    if run.events_with_load:
        following = mean_of_layers(
            mean_of_layers(event.imbalance_next) for event in run.events_with_load if event.imbalance_next
        )
        return mean_of_layers(run.events_with_load[0].imbalance_before), following
    if evaluation is None:
        return None, None
    unseen = evaluation.unseen
    return (
        (_mean(evaluation.imbalance_in_force), None)
        if unseen is None
        else (unseen.imbalance_before, unseen.imbalance_after)
    )


def _bound(run: Run) -> float | None:
    """The mean bound of the windows after the first move, or of the replayed steps; of all, if there are none."""
    if run.events_with_load:
        began = min((event.iteration for event in run.events if event.slots_moved), default=0)
        later = [event for event in run.events_with_load if event.iteration > began] or run.events_with_load
        return mean_of_layers(mean_of_layers(event.imbalance_bound) for event in later)
    evaluation = run.evaluation
    if evaluation is None:
        return None
    steps, bound = evaluation.bound
    counted = evaluation.since_move[steps] if evaluation.has_moved else steps >= evaluation.middle_step
    return _mean(bound[counted] if bool(counted.any()) else bound)


def _mean(levels: Tensor) -> float:
    """The mean over steps, each of which has tokens in some layer."""
    return float(mean_of_known(levels))


def _imbalance_fact(summary: Summary) -> Fact:
    before, after = (
        "unknown" if value is None else f"{value:.2f}" for value in (summary.imbalance_before, summary.imbalance_after)
    )
    bound = "" if summary.imbalance_bound is None else f"bound {summary.imbalance_bound:.2f}"
    if summary.imbalance_after is None:
        return Fact("Imbalance", before, bound)
    return Fact("Imbalance", f"{before} → {after}", f"without → with rebalancing; {bound}")


def _step_facts(steps: StepSummary | None) -> list[Fact]:
    """The facts of the sampled steps, as far as they are known."""
    if steps is None:
        return []
    facts = []
    if steps.imbalance_before is not None and steps.imbalance_after is not None:
        pair = f"{steps.imbalance_before:.2f} → {steps.imbalance_after:.3f}"
        bound = "" if steps.imbalance_bound is None else f"; bound {steps.imbalance_bound:.3f}"
        facts.append(Fact("Imbalance of a step", pair, f"mean, at home → with replicas{bound}"))
        worst = f"{steps.worst_before:.2f} → {steps.worst_after:.3f}"
        facts.append(Fact("Worst step", worst, f"of {plural(steps.num_steps, 'sampled step')}, in any layer"))
    facts.append(Fact("Replicas", f"{steps.replicas:.2f}", "in a layer and step, on average"))
    sizes = f"{amount(steps.bytes_inside, 'B')} inside nodes"
    facts.append(Fact("Bytes of a step", sizes, f"{amount(steps.bytes_between, 'B')} between; weights and gradients"))
    if steps.share_replicas is not None and steps.share_waiting is not None:
        note = f"count, split, push; {percent(steps.share_waiting)} waiting"
        facts.append(Fact("Time for replicas", percent(steps.share_replicas), note))
    return facts


def _size_fact(run: Run) -> Fact:
    experts = run.events[-1].num_experts if run.events else 0
    experts = experts or (run.trace.num_experts if run.trace is not None else 0)
    layers = run.layers
    if run.sampled is not None and not layers:
        layers, experts = run.sampled.layers, run.sampled.events[-1].num_slots  # each slot is the home of one expert
    where = "" if run.topology is None else f"on {plural(run.topology.num_gpus, 'GPU')}"
    where += "" if run.topology is None else f" in {plural(run.topology.num_nodes, 'node')}"
    return Fact("Model", plural(len(layers), "MoE layer"), f"{plural(experts, 'expert')} {where}".strip())


def _empty_facts(run: Run) -> list[Fact]:
    facts = []
    if run.empty_steps and run.trace is not None:
        value = f"{run.empty_steps:,} of {plural(run.trace.num_steps, 'step')}"
        facts.append(Fact("Left out", value, "they have no tokens"))
    if run.empty_layers:
        names = ", ".join(shortened(printable(name)) for name in run.empty_layers[:_MAX_NAMES])
        more = len(run.empty_layers) - _MAX_NAMES
        value = f"{len(run.empty_layers):,} of {plural(len(run.layers), 'layer')}"
        facts.append(
            Fact("Without tokens", value, f"{names}{f' and {more:,} more' * (more > 0)}; means leave them out")
        )
    return facts


def _share_of_run(run: Run) -> str:
    """The rebalances' share of the time until the last one, if iterations were timed."""
    begins = [0, *(event.iteration for event in run.events)]
    gaps = [event.iteration - begin for event, begin in zip(run.events, begins, strict=False)]
    trained = sum(gap * event.iteration_seconds for gap, event in zip(gaps, run.events, strict=True))
    spent = sum(sum(event.seconds.values()) for event in run.events)
    return f"{percent(spent / (trained + spent))} of the time until the last one" if trained else ""


def _window_facts(run: Run) -> list[Fact]:
    """Measures that other projects use, in the first and the last window, as they ran."""
    if not run.events_with_load:
        return []
    first, last = run.events_with_load[0], run.events_with_load[-1]
    vllm = f"{first.balancedness_vllm_before:.2f} → {last.balancedness_vllm_before:.2f}"
    sglang = f"{first.balancedness_sglang_before:.2f} → {last.balancedness_sglang_before:.2f}"
    peak = f"{first.tokens_peak_before:,} → {last.tokens_peak_before:,}"
    return [
        Fact("Peak tokens of a GPU", peak, "in one step, all layers; first → last window"),
        Fact("Balancedness, vLLM's", vllm, "first → last window"),
        Fact("Balancedness, SGLang's", sglang, "first → last window"),
        Fact(
            "MaxVio",
            f"{first.max_violation:.2f} → {last.max_violation:.2f}",
            "measures the router; no placement changes it",
        ),
    ]
