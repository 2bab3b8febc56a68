"""The options of a `Rebalancer`, in three values: how plans are searched, which moves are made, what is recorded.

They are checked when the rebalancer is built, so that all ranks raise what one of them refuses.
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
        num_candidates: randomised starts of each layer's search, dealt to the ranks.
        seed: of the search, and of the choice of steps that the window keeps.
        engine: which may differ between ranks; the fastest that is there where None. `cuda`, also where it is asked
            for, compiles its kernels when the rebalancer is built, and plans a few rows of the job's own shapes. If
            that fails or differs, which is logged, this rank searches with `cpu`, and the plans are the same.
        slot_class: `[P]` integers; experts then stay in slots of their class, as of `plan`.
        time_curve: from an expert's tokens to its time, as from `measured_curve`; what is balanced then is time.
    """

    num_candidates: int = 16
    seed: int = 0
    engine: str | None = None
    slot_class: Tensor | None = None
    time_curve: TimeCurve | None = None

    def checked(self) -> Search:
        """With Python's own numbers; what else a search takes is looked at with the model (`PlanOptions.check`).

        Raises:
            DistplbError: for a seed that is no whole number.
        """
        return replace(self, seed=whole_number("seed", self.seed))


@dataclass(frozen=True)
class Spread:
    """A rebalance that begins at iteration k shares its best candidates and its placement some iterations later.

    At k the counts are added up, and the search begins beside the training; at k + `choose_after` the ranks choose the
    best candidates, and the root polishes them beside the training; from k + `share_after` on, when all have the
    placement, experts move, a few at a time. The offsets are counted, not timed, so that all ranks meet at the same
    iterations; a rank whose search takes longer is waited for.

    >>> Spread(choose_after=2, share_after=4)
    Spread(choose_after=2, share_after=4, move_seconds=0.1)

    Args:
        choose_after: iterations that the search has.
        share_after: iterations that search and polishing have together; less than `Rebalancer`'s `every`.
        move_seconds: of an iteration, that moving may take; at least one commit is made in each.

    Raises:
        DistplbError: for negative or falling numbers.
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
                f"{self}: pass offsets that do not fall, and seconds, none of them negative, such as "
                "Spread(choose_after=2, share_after=4)"
            )


@dataclass(frozen=True, kw_only=True)
class Moves:
    """Which moves of a plan are made, and how.

    >>> Moves(max_bytes=8 << 30, spread=Spread(2, 4)).stop_loss
    3

    Args:
        model: what tokens and moves cost, so that only what repays itself is moved. Where None and a time curve
            is there, it is measured: seconds from the curve, bytes from what travels, bandwidths by a short transfer
            before the first rebalance. Without either a moved slot has to save 2^-13 of the mean GPU's tokens, so that
            experts do not move for next to nothing, and a layer whose GPUs are as even as chance leaves them is left
            alone.
        max_bytes: that the experts moved by one rebalance may have, with their state, over all ranks; the moves that
            save most come first. No limit where None.
        spread: over which iterations a rebalance is spread, so that none of them takes long; all in one where None.
            Between them the placement in force is a valid one, and may be saved. Another rebalance begins when the last
            has ended.
        stop_loss: after so many rebalances in a row whose iterations did not become faster by what they took,
            rebalancing turns itself off (`enabled` is then False) and says so; 0 for never.
        dry_run: plan and report, but move nothing; also where state and gradients could not travel, which the event's
            reason tells. Moves are free without a `model`, and `max_bytes` is of no account.
        verify: "digest" compares a checksum of every expert before and after each move; "off" does not; "first"
            does so for the first three rebalances of the job.
        on_refusal: what `step` does where a rebalance is refused, as for optimizer state that cannot travel: "raise"
            the error, or "skip" the rebalance with a warning and an event, so that training goes on as it is. Lost
            ranks, half moved experts and ranks that are not at the same iteration are errors either way.
        before: called on every rank before experts move, for a framework whose parameters have to be made whole first.
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
        """With Python's own numbers.

        Args:
            every: iterations between rebalances.

        Raises:
            DistplbError: for a value that is none of those above, with what to pass instead.
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
        if self.spread is not None and self.spread.share_after >= every:
            raise DistplbError(
                f"a rebalance is spread over {self.spread.share_after} iterations and more, and one begins every "
                f"{every}; pass a smaller share_after or rebalance less often"
            )
        return replace(self, max_bytes=max_bytes, stop_loss=stop_loss, dry_run=dry_run)

    def fields(self) -> dict[str, int]:
        """What all ranks must share, as integers by name, but for model and spread."""
        return {
            "verify": _VERIFY.index(self.verify),
            "on_refusal (skip is 1)": _ON_REFUSAL.index(self.on_refusal),
            "dry_run": int(self.dry_run),
            "max_bytes": -1 if self.max_bytes is None else self.max_bytes,
            "stop_loss": self.stop_loss,
        }


@dataclass(frozen=True)
class Record:
    """What is recorded of a job.

    >>> Record("runs/7", on_event=print).summary_writer is None
    True

    Args:
        folder: for a trace of all windows and a log of all events, written by rank 0 beside the training;
            `Trace.read` and `distplb report` read it. A resumed job goes on in its folder; one that holds files of a
            job of other layers, experts or GPUs is refused. In a pipeline each stage needs a folder of its own.
            Nothing is written where None.
        summary_writer: gets imbalance, bytes, seconds and so on as scalars after each rebalance, such as
            `torch.utils.tensorboard.SummaryWriter`; that of rank 0.
        on_event: called on each rank with a `RebalanceEvent` after each rebalance, and once more with the same record
            when the next window has told how the plan fared. What it raises is logged, and does not reach the loop.
    """

    folder: str | os.PathLike[str] | None = None
    summary_writer: SummaryWriter | None = None
    on_event: Callable[[RebalanceEvent], None] | None = None

    @property
    def events_file(self) -> Path | None:
        """Of the folder."""
        return None if self.folder is None else Path(self.folder) / "events.jsonl"

    def check(self) -> None:
        """Refuse what is none of those above.

        Raises:
            DistplbError: with what to pass instead.
        """
        refuse_wrong_types(
            {
                "Record: folder": (self.folder, (str, os.PathLike, None), "the path of a folder"),
                "Record: on_event": (self.on_event, (Callable, None), "a function"),
            }
        )
