"""The placement in force, and the one way to another: made ready, agreed on, moved, commit by commit.

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

_SAVE_SECONDS = 1800.0  # that `apply` waits for an asynchronous save
_SAVE_PAUSE_SECONDS = 0.2  # of that, between two agreements on whether it has ended: far below any deadline


class InForce:
    """The placement in force on this rank, so that none is ever in force that breaks a rule.

    Args:
        agreed: what the rebalancer was built from.
        observer: of the window, whose counts follow the experts.
        roster: of the communicators that hold these layers.
        knows_rows: whether the rows are where `agreed.start` says, on all ranks.

    Attributes:
        placement: in force.
        first: that the job started from.
        knows_rows: whether the rows are as `placement` says; if not, a state has to be loaded first.
        saves: asynchronous ones, which nothing may move before the end of.
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
        """Take up where another rebalancer was: the rows are as it left them. Not collective.

        Raises:
            DistplbError: if either breaks a rule, and could not be gone back to.
        """
        for loaded in (placement, first):
            self._agreed.check_rules(loaded)
        self.placement, self.first = placement, first
        self._routing.follow(None, placement)
        self._mover.note(placement)
        self.knows_rows = True

    # --- moving ----------------------------------------------------------------------------------------------

    def collect_state(self) -> tuple[LayerStates, Exception | None]:
        """All that goes with the experts of this rank now; or why it may not travel. Not collective."""
        try:
            return self._mover.collect_state(), None
        except Exception as refused:
            return [], refused

    def prepared(self, stages: Stages) -> AgreedState:
        """What travels, agreed on by all ranks."""
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
        """Put another placement into force, or begin with it.

        Args:
            placement: to be in force.
            ready: what travels, as agreed now.
            verify: compare every expert's checksum before and after.
            untrained: by layer, whether no gradient came to what this rank holds of it while its tokens were counted.
            stages: receives the seconds.
            limits: of what is done at once.
            error: why this rank does not go on; all ranks then raise it.

        Returns:
            None where nothing was done, because the save of some rank has not ended.
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
        """Put another placement into force now, whole; waits for asynchronous saves.

        Raises:
            DistplbError: on every rank, if it is refused: nothing has moved then.
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
        """After each commit, so that a move that breaks off leaves the placement that is in force."""
        self._routing.follow(self.placement, placement)
        if self._routing.mode == "permute":
            self._observer.follow(self.placement, placement)
        self.placement = placement
        self._mover.note(placement)

    def may_move(self) -> bool:
        """Whether all saves have ended, and no step may have been skipped, on any rank; all wait for it together."""
        return is_so_on_all(
            self._agreed.comm, lambda: self.saves.have_ended() and not self._mover.watch.may_have_skipped()
        )

    def _wait_for_saves(self, placement: Placement) -> None:
        """Until those of all ranks have ended, unless the placement is refused.

        All look again at once while a save is being written, so that nobody waits for another's at a collective, and
        all give up when the first of them does.
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
                        "has; look for what holds it up"
                    )
            except Exception as refused:
                own_ended, error = False, in_stage("move", refused)
            have_ended = bool(agree(self._agreed.comm, {}, error, minimum=[int(own_ended)])[0])

    # --- what is refused -------------------------------------------------------------------------------------

    def refuse_if_half_moved(self) -> None:
        """Nothing is saved or moved once a move has broken off in the middle.

        Raises:
            HalfMovedError: in that case.
        """
        if self._mover.broken is not None:
            raise HalfMovedError(
                f"experts may be half moved ({self._mover.broken}); resume from the last checkpoint: "
                "none is written from here"
            )

    def refuse_unknown_rows(self) -> None:
        """Nothing moves before it is known where the rows are.

        Raises:
            DistplbError: if another rebalancer has moved them.
        """
        if not self.knows_rows:
            raise DistplbError(
                f"the rows of {self._agreed.layer_names[0]} were moved by another Rebalancer of this process, and may "
                "have been put elsewhere since; pass the state that belongs to them to load_state_dict(): that one's "
                "state_dict(), or what was saved with the weights. Its restore() and close(), before this one is made, "
                "also do"
            )

    def rows_as_known(self) -> Placement:
        """The placement in force; while it has not been loaded, as the rebalancer before this one has left the rows."""
        if self.knows_rows:
            return self.placement
        start = self._agreed.start
        rows = [
            left or own for left, own in zip(self._mover.inherited_rows(), start.expert_of_slot.tolist(), strict=True)
        ]
        return Placement(torch.tensor(rows, device="cpu"), start.num_experts, start.num_gpus)


def is_so_on_all(comm: Comm, question: Callable[[], bool]) -> bool:
    """Whether the answer is yes on all ranks. Collective.

    Raises:
        DistplbError: on every rank, if the question raises on any.
    """
    is_so, error = False, None
    try:
        is_so = question()
    except Exception as caught:  # such as of a future of the user's own
        error = in_stage("move", caught)
    return bool(agree(comm, {}, error, minimum=[int(is_so)])[0])


def _differs(old: Placement, new: Placement, layer: int) -> bool:
    """Whether the layer is another one in a placement that may be of another model."""
    return layer >= new.num_layers or not torch.equal(old.expert_of_slot[layer], new.expert_of_slot[layer])
