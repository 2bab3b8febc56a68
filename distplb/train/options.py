"""The options of a `Rebalancer`, in three values: how plans are searched, which moves are made, what is recorded.

They are checked when the rebalancer is built: if one rank refuses an option, all ranks raise.
Shapes: P slots.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from distplb.core.arguments import plain, refuse_wrong_types, whole_number
from distplb.core.price import MoveModel, TimeCurve
from distplb.errors import DistplbError
from distplb.records.event_log import SummaryWriter
from distplb.records.events import RebalanceEvent

__all__ = ["Moves", "Record", "Search", "Spread"]

_VERIFY = ("first", "digest", "off")
_ON_REFUSAL = ("raise", "skip")


@dataclass(frozen=True, kw_only=True, eq=False)
class Search:
    """How plans are searched.

    >>> Search(num_candidates=64, engine="cpu").seed
    0

    Args:
        num_candidates: randomised starts of each layer's search, distributed over the ranks.
        seed: seed of the search and of the choice of steps that the window keeps.
        engine: the packing engine; may differ between ranks. None picks the fastest one available. `cuda`, even if
            requested explicitly, is tried when the rebalancer is built: it compiles its kernels and plans a few rows
            of the job's own shapes. If that fails or gives another plan, this rank logs it and searches with `cpu`,
            which gives the same plans.
        slot_class: `[P]` integers; experts then stay in slots of their class, as in `plan`.
        time_curve: an expert's time by its tokens, such as the result of `measured_curve`. The search then balances
            time instead of tokens.
    """

    num_candidates: int = 16
    seed: int = 0
    engine: str | None = None
    slot_class: Tensor | None = None
    time_curve: TimeCurve | None = None

    def checked(self) -> Search:
        """Convert the seed to a Python integer. `PlanOptions.check` checks the other fields, once the model is known.

        Raises:
            DistplbError: if the seed is not an integer.
        """
        return replace(self, seed=whole_number("seed", self.seed))


@dataclass(frozen=True)
class Spread:
    """Spreads a rebalance over several iterations; search and polishing run in the background.

    At iteration k the counts are summed, and the search begins in the background, while training continues. At
    k + `choose_after` the ranks choose the best candidates, and the root polishes them in the background. At
    k + `share_after` the root shares the placement, and from then on experts move, a few at a time. The offsets are
    counted in iterations, not timed, so that all ranks meet at the same iterations; if a rank's search takes longer,
    the others wait for it.

    >>> Spread(choose_after=2, share_after=4)
    Spread(choose_after=2, share_after=4, move_seconds=0.1)

    Args:
        choose_after: iterations for the search.
        share_after: iterations for search and polishing together; less than `Rebalancer`'s `every`.
        move_seconds: how long moves may take per iteration; each iteration makes at least one commit.

    Raises:
        DistplbError: if a value is negative or `share_after` is less than `choose_after`.
    """

    choose_after: int
    share_after: int
    move_seconds: float = 0.1

    def __post_init__(self) -> None:
        for name in ("choose_after", "share_after"):
            object.__setattr__(self, name, whole_number(f"Spread: {name}", getattr(self, name)))
        object.__setattr__(self, "move_seconds", plain(self.move_seconds))
        refuse_wrong_types({"Spread: move_seconds": (self.move_seconds, (int, float), "seconds")})
        if not 0 <= self.choose_after <= self.share_after or not self.move_seconds >= 0:
            raise DistplbError(
                f"{self}: a value is negative or share_after is less than choose_after; pass values such as "
                "Spread(choose_after=2, share_after=4)"
            )


@dataclass(frozen=True, kw_only=True)
class Moves:
    """Which moves of a plan are made, and how.

    >>> Moves(max_bytes=8 << 30, spread=Spread(2, 4)).stop_loss
    3

    Args:
        model: the cost of tokens and moves, so that only moves that pay off are made. If None and there is a time
            curve, it is measured: seconds from the curve, bytes from the tensors that travel, bandwidths by a short
            transfer before the first rebalance. With neither, a moved slot has to save 2^-13 of the mean GPU's
            tokens, so that experts do not move for a negligible gain, and a layer stays as it is if its GPUs differ
            no more than by chance.
        max_bytes: how many bytes of experts and their state one rebalance may move, over all ranks; the moves that
            save most come first. None for no limit.
        spread: how a rebalance is spread over iterations, so that none of them takes long. None runs it within one
            iteration. Between iterations the placement in force is valid and may be saved. The next rebalance begins
            only after the last one has ended.
        stop_loss: rebalancing turns itself off (`enabled` becomes False) with a warning after this many rebalances in
            a row that clearly cost more time than they saved. 0 never turns it off.
        dry_run: plan and report, but move nothing. If state and gradients could not travel, the event's reason says
            so. Moves are free without a `model`, and `max_bytes` has no effect.
        verify: "digest" compares a checksum of every expert before and after each move; "first" does so for the first
            three rebalances of the job; "off" never does.
        on_refusal: what `step` does if a rebalance is refused, for example because of optimizer state that cannot
            travel: "raise" the error, or "skip" the rebalance with a warning and an event and continue training.
            Lost ranks, half-moved experts and ranks at different iterations are errors either way.
        before: called on every rank before experts move, for frameworks that must gather their parameters first.
    """

    model: MoveModel | None = None
    max_bytes: int | None = None
    spread: Spread | None = None
    stop_loss: int = 3
    dry_run: bool = False
    verify: Literal["first", "digest", "off"] = "first"
    on_refusal: Literal["raise", "skip"] = "raise"
    before: Callable[[], object] | None = None

    def checked(self, every: int) -> Moves:
        """Check all fields, and convert numbers to Python's own.

        Args:
            every: iterations between rebalances; 0 if there are none.

        Raises:
            DistplbError: if a value is not one of those above, with what to pass instead.
        """
        dry_run = plain(self.dry_run)
        refuse_wrong_types(
            {
                "Moves: model": (self.model, (MoveModel, None), "a MoveModel"),
                "Moves: spread": (self.spread, (Spread, None), "a Spread"),
                "Moves: dry_run": (dry_run, (bool,), "True or False"),
                "Moves: before": (self.before, (Callable, None), "a function"),
            }
        )
        max_bytes = None if self.max_bytes is None else whole_number("Moves: max_bytes", self.max_bytes, 0)
        stop_loss = whole_number("Moves: stop_loss", self.stop_loss, 0)
        if self.verify not in _VERIFY:
            raise DistplbError(f"Moves: verify is {self.verify!r}; pass 'first', 'digest' or 'off'")
        if self.on_refusal not in _ON_REFUSAL:
            raise DistplbError(f"Moves: on_refusal is {self.on_refusal!r}; pass 'raise' or 'skip'")
        if self.spread is not None and every and self.spread.share_after >= every:
            raise DistplbError(
                f"Moves: spread has share_after {self.spread.share_after}, but every is {every}; pass a share_after "
                f"below {every}, or a larger every"
            )
        return replace(self, max_bytes=max_bytes, stop_loss=stop_loss, dry_run=dry_run)

    def fields(self) -> dict[str, int]:
        """The fields that must be equal on all ranks, as integers by name, except model and spread."""
        return {
            "verify": _VERIFY.index(self.verify),
            "on_refusal (skip is 1)": _ON_REFUSAL.index(self.on_refusal),
            "dry_run": int(self.dry_run),
            "max_bytes": -1 if self.max_bytes is None else self.max_bytes,
            "stop_loss": self.stop_loss,
        }


@dataclass(frozen=True)
class Record:
    """What a job records, and where.

    >>> Record("runs/7", on_event=print).summary_writer is None
    True

    Args:
        folder: where rank 0 writes a trace of all windows and a log of all events, in the background; `Trace.read` and
            `distplb report` read them. A resumed job continues in its folder. A folder with files of a job that has
            other layers, experts or GPUs is refused. In a pipeline each stage needs its own folder. None writes
            nothing.
        summary_writer: receives imbalance, bytes, seconds and other scalars after each rebalance, for example a
            `torch.utils.tensorboard.SummaryWriter`. Only that of rank 0 is used.
        on_event: called on each rank with a `RebalanceEvent` after each rebalance, and again with the completed event
            once the next window shows how well the plan worked. Exceptions that it raises are logged and do not reach
            the loop.
    """

    folder: str | os.PathLike[str] | None = None
    summary_writer: SummaryWriter | None = None
    on_event: Callable[[RebalanceEvent], None] | None = None

    @property
    def events_file(self) -> Path | None:
        """The event log in the folder; None without a folder."""
        return None if self.folder is None else Path(self.folder) / "events.jsonl"

    def check(self) -> None:
        """Check the types of the fields.

        Raises:
            DistplbError: with what to pass instead.
        """
        refuse_wrong_types(
            {
                "Record: folder": (self.folder, (str, os.PathLike, None), "the path of a folder"),
                "Record: on_event": (self.on_event, (Callable, None), "a function"),
            }
        )
