"""The placement in force, and the only way to change it: prepare, agree, and move commit by commit.

Shapes: L layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from distplb.comm.agreement import agree
from distplb.comm.base import Comm
from distplb.comm.roster import Roster
from distplb.core.placement import Placement
from distplb.core.stages import Stages
from distplb.errors import DistplbError, HalfMovedError, in_stage
from distplb.migrate.optimizer_state import LayerStates
from distplb.migrate.state_agreement import AgreedState
from distplb.migrate.transfer import Limits, MoveTotals
from distplb.train.agreed_options import Agreed
from distplb.train.async_saves import AsyncSaves
from distplb.train.decision import why_layers_stay
from distplb.train.observer import Observer

__all__ = ["InForce", "is_so_on_all"]

_SAVE_SECONDS = 1800.0  # how long `apply` waits for an asynchronous save
_SAVE_PAUSE_SECONDS = 0.2  # between two agreements on whether it has ended; far below any deadline


class InForce:
    """The placement in force on this rank. A placement that breaks a rule is never put into force.

    Args:
        agreed: the rebalancer's options.
        observer: reads the window, whose counts follow the experts.
        roster: the communicators of the job that hold these layers.
        knows_rows: whether the rows are where `agreed.start` says, on all ranks.

    Attributes:
        placement: the placement in force.
        first: the placement that the job started from.
        knows_rows: whether the rows are where `placement` says; if not, a state has to be loaded first.
        saves: asynchronous saves; nothing may move before they end.
    """

    def __init__(self, agreed: Agreed, observer: Observer, roster: Roster, knows_rows: bool) -> None:
        self._agreed, self._observer, self._roster = agreed, observer, roster
        self._mover, self._routing = agreed.mover, agreed.routing
        self.placement = self.first = agreed.start
        self.knows_rows = knows_rows
        self.saves = AsyncSaves()
        if knows_rows:
            self._mover.note(self.placement)
        self._routing.follow(None, self.placement)

    def load(self, placement: Placement, first: Placement) -> None:
        """Continue where another rebalancer stopped, with the rows as it left them. Not collective.

        Raises:
            DistplbError: if either placement breaks a rule, because it could not be put into force again.
        """
        for loaded in (placement, first):
            self._agreed.check_rules(loaded)
        self.placement, self.first = placement, first
        self._routing.follow(None, placement)
        self._mover.note(placement)
        self.knows_rows = True

    # --- moving ----------------------------------------------------------------------------------------------

    def collect_state(self) -> tuple[LayerStates, Exception | None]:
        """Return all state that would travel with this rank's experts now, or why it cannot. Not collective."""
        try:
            return self._mover.collect_state(), None
        except Exception as refused:
            return [], refused

    def prepared(self, stages: Stages) -> AgreedState:
        """Agree with all ranks on the state that travels. Collective."""
        with stages.stage("move"):
            error: Exception | None = None
            states: LayerStates = []
            try:
                if self._agreed.moves.before is not None:
                    self._agreed.moves.before()
                states = self._mover.collect_state()
            except Exception as refused:
                error = in_stage("move", refused)
            return self._mover.prepare(states, error)

    def move(
        self,
        placement: Placement,
        ready: AgreedState,
        *,
        verify: bool,
        untrained: Sequence[bool],
        stages: Stages,
        limits: Limits | None = None,
        error: Exception | None = None,
    ) -> MoveTotals | None:
        """Put another placement into force, or make the first commits towards it.

        Args:
            placement: the placement to reach.
            ready: the state that travels, as just agreed.
            verify: compare every expert's checksum before and after.
            untrained: by layer, whether this rank's tensors of it received no gradient while its tokens were counted.
            stages: receives the seconds.
            limits: how much to move at once.
            error: why this rank cannot continue; all ranks then raise it.

        Returns:
            What was moved; None if nothing was, because the save of some rank has not ended.
        """
        may_move = True
        try:
            self._agreed.check_placement(placement)
            self._routing.check_tables(self.placement)
            self._roster.refuse_others()
            may_move = self.saves.have_ended()
        except Exception as refused:
            error = error or in_stage("move", refused)
        return self._mover.move(
            self.placement,
            placement,
            ready,
            node_of_rank=self._observer.node_of_rank,
            on_commit=self.take_up,
            verify=verify,
            stages=stages,
            error=error,
            limits=limits,
            untrained=untrained,
            may_move=may_move,
        )

    def apply(self, placement: Placement, *, verify: bool) -> None:
        """Put another placement fully into force now. Waits for asynchronous saves.

        Raises:
            DistplbError: on every rank, if it is refused. Nothing has moved then.
        """
        num_layers = self.placement.num_layers
        untrained = self._mover.watch.untrained() if self._observer.seen else [False] * num_layers
        moved: MoveTotals | None = None
        while moved is None:
            self._wait_for_saves(placement)
            ready, error = self.prepared(Stages()), None
            staying = {
                layer: why for layer, why in ready.left_out.items() if _differs(self.placement, placement, layer)
            }
            if staying:
                error = DistplbError(why_layers_stay(self._agreed.layer_names, staying))
            moved = self.move(
                placement, ready, verify=verify, untrained=untrained, stages=Stages(), limits=None, error=error
            )

    def take_up(self, placement: Placement) -> None:
        """Record the placement after each commit, so that `placement` is correct even if the move breaks off."""
        self._routing.follow(self.placement, placement)
        if self._routing.mode == "permute":
            self._observer.follow(self.placement, placement)
        self.placement = placement
        self._mover.note(placement)

    def may_move(self) -> bool:
        """Whether, on all ranks, all saves have ended and no optimizer step may have been skipped. Collective."""
        return is_so_on_all(
            self._agreed.comm, lambda: self.saves.have_ended() and not self._mover.watch.may_have_skipped()
        )

    def _wait_for_saves(self, placement: Placement) -> None:
        """Wait until the saves of all ranks have ended, unless the placement is refused.

        While a save is being written, all ranks check again together, so that no rank blocks in a collective because of
        another rank's save. All time out when the first rank does.
        """
        until = time.monotonic() + _SAVE_SECONDS
        error: Exception | None = None
        have_ended = False
        while not have_ended:
            try:
                self._agreed.check_placement(placement)
                own_ended = self.saves.have_ended(_SAVE_PAUSE_SECONDS)
                if not own_ended and time.monotonic() > until:
                    error = DistplbError(
                        f"an asynchronous save has not ended in {_SAVE_SECONDS:.0f} s, and nothing may move before it "
                        "ends; check what blocks it"
                    )
            except Exception as refused:
                own_ended, error = False, in_stage("move", refused)
            have_ended = bool(agree(self._agreed.comm, {}, error, minimum=[int(own_ended)])[0])

    # --- what is refused -------------------------------------------------------------------------------------

    def refuse_if_half_moved(self) -> None:
        """Refuse to save or move anything after a move has broken off in the middle.

        Raises:
            HalfMovedError: if one has.
        """
        if self._mover.broken is not None:
            raise HalfMovedError(
                f"experts may be half moved ({self._mover.broken}), so no checkpoint is written from here; resume from "
                "the last checkpoint"
            )

    def refuse_unknown_rows(self) -> None:
        """Refuse to move anything while it is unknown where the rows are.

        Raises:
            DistplbError: if another rebalancer has moved them.
        """
        if not self.knows_rows:
            raise DistplbError(
                f"the rows of {self._agreed.layer_names[0]} were moved by another Rebalancer of this process and may "
                "have changed since; call load_state_dict() with the state that belongs to them: the other "
                "Rebalancer's state_dict(), or the state that was saved with the weights. Or call the other one's "
                "restore() and close() before making this one"
            )

    def rows_as_known(self) -> Placement:
        """The placement in force; until a state is loaded, the rows as the previous rebalancer left them."""
        if self.knows_rows:
            return self.placement
        start = self._agreed.start
        rows = [
            left or own for left, own in zip(self._mover.inherited_rows(), start.expert_of_slot.tolist(), strict=True)
        ]
        return Placement(torch.tensor(rows, device="cpu"), start.num_experts, start.num_gpus)


def is_so_on_all(comm: Comm, question: Callable[[], bool]) -> bool:
    """Whether the answer to a question is yes on all ranks. Collective.

    Raises:
        DistplbError: on every rank, if the question raises on any.
    """
    is_so, error = False, None
    try:
        is_so = question()
    except Exception as caught:  # for example from a user's own future
        error = in_stage("move", caught)
    return bool(agree(comm, {}, error, minimum=[int(is_so)])[0])


def _differs(old: Placement, new: Placement, layer: int) -> bool:
    """Whether a layer differs between two placements; the new one may belong to another model."""
    return layer >= new.num_layers or not torch.equal(old.expert_of_slot[layer], new.expert_of_slot[layer])
