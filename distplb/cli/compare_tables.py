"""Output of `distplb compare`: the table, what replicas for single steps would leave in words, and fields of JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table

from distplb.cli.compare_splits import Imbalance, Splits, StepsToSplit
from distplb.cli.output import table

__all__ = ["Row", "comparison_table", "row_as_json", "sentences_of_splits"]

_MIN_WIDTH = 52  # columns; a narrower terminal has no room for moves and seconds
_IN_SAMPLE, _WORST, _MOVED, _SECONDS = "in sample", "worst layer", "slots moved", "time (s)"
_WORST_SPLIT, _REPLICAS = "worst layer, with replicas", "replicas per\u00a0step and layer"
_LEFT_OUT_FIRST = (_SECONDS, _MOVED, _IN_SAMPLE, _WORST, _WORST_SPLIT)  # where a terminal is too narrow


class Row(NamedTuple):
    """A planner, or the bound.

    Args:
        planner: its name.
        in_sample: imbalance on the steps that were planned on.
        unseen: imbalance on unseen steps; None if there are none.
        moved: slots that it moves; None for the bound.
        seconds: how long it planned; None for the bound.
        splits: what replicas for single steps leave; None for the bound, and without replica slots.
        bound_of_splits: in the row of the bound, that of the splits.
    """

    planner: str
    in_sample: Imbalance
    unseen: Imbalance | None
    moved: int | None
    seconds: float | None
    splits: Splits | None = None
    bound_of_splits: Imbalance | None = None

    def cells(self) -> dict[str, str]:
        """The text in each column, by heading."""
        judged = self.unseen or self.in_sample
        left = self.splits.imbalance if self.splits else self.bound_of_splits
        cells = {_IN_SAMPLE: f"{self.in_sample.mean:.4f}"}
        if self.unseen:
            cells["unseen"] = f"{self.unseen.mean:.4f}"
        cells[_WORST] = f"{judged.worst:.4f}"
        if left is not None:
            cells["unseen, with replicas" if self.unseen else "with replicas"] = f"{left.mean:.4f}"
            cells[_WORST_SPLIT] = f"{left.worst:.4f}"
            cells[_REPLICAS] = f"{self.splits.replicas:.1f}" if self.splits else ""
        cells[_MOVED] = "" if self.moved is None else str(self.moved)
        cells[_SECONDS] = "" if self.seconds is None else f"{self.seconds:.3f}"
        return cells


def comparison_table(rows: Sequence[Row], description: str, to_split: StepsToSplit | None, width: int) -> Table:
    """One line for each planner, and one for the bound.

    Args:
        rows: the lines.
        description: the steps that were planned on and judged.
        to_split: the steps that were split; None without replica slots.
        width: columns of the terminal.
    """
    every = [row.cells() for row in rows]
    if to_split is None:
        left_out = {_MOVED, _SECONDS} if width < _MIN_WIDTH else set[str]()
        title = f"Imbalance, busiest GPU / mean GPU; {description}. "
        title += "Wider terminals show moves and seconds." * bool(left_out)
    else:
        left_out = _too_wide(rows, every, width)
        title = (
            f"Imbalance, busiest GPU / mean GPU, of homes alone, and with {_slots(to_split)} on each GPU; "
            f"{description}. {'Wider terminals show more columns.' * bool(left_out)}"
        )
    shown = [name for name in every[0] if name not in left_out]
    lines = table("planner", *shown, title=title)
    for row, cells in zip(rows, every, strict=True):
        if row.seconds is None:
            lines.add_section()
        lines.add_row(row.planner, *(cells[name] for name in shown))
    return lines


def _too_wide(rows: Sequence[Row], every: Sequence[dict[str, str]], width: int) -> set[str]:
    """The columns that do not fit beside the names and the columns that matter more."""
    needed = max(len(row.planner) for row in rows)
    of_column = {
        name: 2 + max(*(len(word) for word in name.split(" ")), *(len(cells[name]) for cells in every))
        for name in every[0]
    }
    left_out = set[str]()
    for name in _LEFT_OUT_FIRST:
        if needed + sum(of_column.values()) <= width:
            break
        if name != _IN_SAMPLE or "unseen" in of_column:  # else it is the only imbalance of the homes
            left_out.add(name)
            del of_column[name]
    return left_out


def sentences_of_splits(rows: Sequence[Row], to_split: StepsToSplit, *, is_sum: bool) -> list[str]:
    """What replicas leave and how many are sent, which steps were split, and what the figures do not tell.

    Args:
        rows: the planners, that of the placement in force first.
        to_split: the steps that were split.
        is_sum: whether the judged load has no steps.
    """
    in_force = rows[0]
    planned = next(row for row in rows if row.planner in ("plan", "plan on the steps"))
    assert in_force.splits is not None
    assert planned.splits is not None
    number, num_judged = len(to_split.steps), to_split.num_judged
    sentences = []
    if number < num_judged:
        which = f"one drawn from each of {number} equal parts" if number > 1 else f"number {to_split.steps[0]}"
        sentences.append(f"Split: {number} of {num_judged} steps, {which}; the next sentence is about these.")
    sentences.append(
        f"Replicas for single steps: with the homes in force ({in_force.planner}), {_lowered(in_force.splits)}; with "
        f"those of {planned.planner}, {_lowered(planned.splits)}. A split stops half a percent above the mean, or at "
        "the next whole token; replicas stay inside a node. The bound with replicas holds for the homes in this table "
        "only."
    )
    if is_sum:
        sentences.append(
            "The judged load has no steps. If it is a sum over several, each of them is less even, and takes more "
            "replicas."
        )
    return sentences


def _slots(to_split: StepsToSplit) -> str:
    return f"{to_split.replica_slots} replica slot{'s' * (to_split.replica_slots != 1)}"


def _lowered(splits: Splits) -> str:
    return (
        f"{splits.homes_alone.mean:.4f} becomes {splits.imbalance.mean:.4f} by sending {splits.replicas:.1f} replicas "
        "per step and layer"
    )


def row_as_json(row: Row) -> dict[str, Any]:
    """A row's fields; those of splits only where there are replica slots."""
    fields: dict[str, Any] = {
        "planner": row.planner,
        "in_sample": row.in_sample._asdict(),
        "unseen": row.unseen and row.unseen._asdict(),
        "moved": row.moved,
        "seconds": row.seconds,
    }
    if row.splits is not None:
        splits = row.splits
        fields["with_replicas"] = {
            "imbalance": splits.imbalance._asdict(),
            "homes_alone": splits.homes_alone._asdict(),
            "bound": splits.bound._asdict(),
            "replicas": splits.replicas,
        }
    elif row.bound_of_splits is not None:
        fields["with_replicas"] = {"imbalance": row.bound_of_splits._asdict()}
    return fields
