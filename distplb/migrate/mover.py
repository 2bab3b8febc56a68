"""`Mover`: the experts of some layers as one thing that goes from one placement to another.

Shapes: L layers, E experts, P slots, M GPUs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from distplb.comm.agreement import agree, digest
from distplb.comm.base import Comm
from distplb.comm.fsdp2 import gathered_ids, param_groups, reshard
from distplb.core.layer import MoELayer
from distplb.core.placement import Placement
from distplb.core.stages import Stages
from distplb.core.topology import Topology
from distplb.errors import DisagreementError, DistplbError, HalfMovedError, LostRanksError, UntrainedError, in_stage
from distplb.migrate.checksum import expert_checksums
from distplb.migrate.claims import Claim, Row
from distplb.migrate.histories import History, Own, agreed_histories, own_slots
from distplb.migrate.kinds import agreed_kinds, travellers
from distplb.migrate.pieces import Layout
from distplb.migrate.rows import RowTensor, row_tensors
from distplb.migrate.settings import agree_on_settings, steppers, trainers
from distplb.migrate.state import Holdings, Traveller, check_known, holdings
from distplb.migrate.transfer import Limits, Move, Moved, Staging, agreed_layouts
from distplb.migrate.unlike import Unlike, why_unlike
from distplb.migrate.watch import TrainingWatch

__all__ = ["Held", "Mover", "Ready"]

Held = Sequence[Sequence[Holdings]]  # by layer and declared tensor, what goes with it on this rank


class Ready(NamedTuple):
    """What the ranks have agreed on before a move.

    Args:
        travelling: by layer, all that travels; nothing of a layer that stays.
        left_out: by layer that stays, why.
        histories: of experts that differ in theirs.
    """

    travelling: list[list[Traveller]]
    left_out: dict[int, str]
    histories: list[History]


class Mover:
    """Knows what travels with the experts of each layer and who holds it; moves it, whole or not at all.

    Making one is local to the rank, and refuses what cannot be moved; `agree_on_layouts` and `move` are collective. It
    holds the tensors, and hooks on them, until it is closed.

    Args:
        layers: the MoE layers.
        optimizers: that step on their parameters.
        comm: the ranks that hold the layers.
        topology: of one EP group.
        num_slots: P.
        gpu: which GPU of its EP group this rank is; None where the communicator is the EP group.
        num_groups: of a router whose rows move, so that its groups stay in blocks; None where there are none.

    Raises:
        DistplbError: if a tensor, the slots or `gpu` do not fit, the optimizers do not know a parameter or train
            experts of one layer differently, or another rebalancer of this process moves one of the tensors.
    """

    def __init__(
        self,
        layers: Sequence[MoELayer],
        optimizers: Sequence[Optimizer],
        comm: Comm,
        topology: Topology,
        num_slots: int,
        gpu: int | None,
        num_groups: int | None = None,
    ) -> None:
        self._comm, self._optimizers, self._num_slots, self._num_groups = comm, optimizers, num_slots, num_groups
        self.gpu, self._slots_per_gpu = _checked_gpu(gpu, comm, topology), topology.slots_per_gpu(num_slots)
        self._names = [layer.name for layer in layers]
        self._tensors: list[list[RowTensor]] = [
            row_tensors(layer, self.gpu, self._slots_per_gpu, topology.num_gpus) for layer in layers
        ]
        trained = trainers(optimizers)
        for tensors in self._tensors:
            _refuse_gathered(tensors)
            check_known(tensors, trained)
        self._layouts: list[list[Layout]] = []
        self._is_own: list[list[bool]] = []  # whether each expert is in a tensor of its own, on all ranks
        self._claim = Claim(self._tensors)
        self.watch = TrainingWatch(self._tensors, optimizers)
        self._staging = Staging()
        self.broken: str | None = None  # why the experts may not be whole any more

    def digest(self) -> int:
        """What must be equal on all ranks: names and rows of all declared tensors, as one number."""
        return digest([(t.name, t.row) for tensors in self._tensors for t in tensors])

    def agree_on_layouts(self) -> None:
        """Learn which rank holds what, and that all train it alike; once, before anything moves."""
        self._layouts = agreed_layouts(self._tensors, self._num_slots, self._comm)
        agree_on_settings(self._tensors, trainers(self._optimizers), self._comm)
        own = [int(own_slots(row_tensor) is not None) for tensors in self._tensors for row_tensor in tensors]
        following = iter(agree(self._comm, {}, minimum=own))
        self._is_own = [[bool(next(following)) for _ in tensors] for tensors in self._tensors]

    def left(self) -> list[Row | None]:
        """By layer, where a rebalancer before this one has left the rows of its tensors, as of `Claim`."""
        return self._claim.left()

    def note(self, placement: Placement) -> None:
        """The rows lie as this says, for whoever moves them after this one."""
        self._claim.note(placement)

    def close(self) -> None:
        """Leave the tensors to others, and take the hooks away."""
        self._claim.release()
        self.watch.close()

    def held(self) -> list[list[Holdings]]:
        """All that goes with the experts on this rank now; what FSDP2 has derived from it is dropped.

        Raises:
            DistplbError: if the tensors are none of the model's any more, a backward pass has begun, or state of the
                optimizers, or of others that were not given, could not travel.
        """
        self.watch.refuse_replaced()
        self.watch.refuse_if_begun()
        self.watch.refuse_other_optimizers()
        reshard(param_groups(tensor for layer in self._tensors for row in layer for tensor in row.tensors))
        trained = trainers(self._optimizers)
        stepping = steppers(self._optimizers)
        return [holdings(tensors, self._optimizers, trained, stepping) for tensors in self._tensors]

    def bytes_per_slot(self, held: Held) -> int:
        """Of one expert's weights with all that travels with them on this rank, in the largest layer; 0 for none.

        Router rows travel too; they are on every rank and cross no link.
        """
        experts = [
            sum(one.nbytes for one, row_tensor in zip(of_layer, tensors, strict=True) if row_tensor.of_experts)
            for tensors, of_layer in zip(self._tensors, held, strict=False)
        ]
        return max(experts, default=0) // self._slots_per_gpu

    def prepare(self, held: Held, error: Exception | None = None) -> Ready:
        """Agree on what travels. Collective, also where this rank cannot move.

        A layer stays where experts that may change places have had other histories, and these cannot travel.

        Args:
            held: what goes with the experts on this rank.
            error: why this rank cannot; all ranks then raise it.

        Raises:
            DisagreementError: on all ranks, where experts are trained by other settings on some rank.
            DistplbError: on all ranks, if any refuses.
        """
        try:
            agreed = agreed_kinds(self._tensors, held, self._comm, error)
        except DisagreementError as differing:
            raise DisagreementError(self._why_it_differs(differing), differing.field) from differing
        stays: dict[int, Unlike] = {}
        own: list[Own] = []
        for layer, tensors in enumerate(self._tensors):
            for index, row_tensor in enumerate(tensors):
                if agreed[layer][index] is not None:
                    continue
                if self._is_own[layer][index] and not self._layouts[layer][index].is_nowhere_on_some:
                    own.append(Own(layer, index, row_tensor, held[layer][index]))
                else:
                    stays.setdefault(layer, Unlike(row_tensor, held[layer][index], self._is_own[layer][index], None))
        own = [one for one in own if one.layer not in stays]
        every = (one for of_layer in held for one in of_layer)
        found = agreed_histories(own, every, self._num_slots, steppers(self._optimizers), self._comm)
        for one, history in zip(own, found, strict=True):
            if not isinstance(history, History):
                stays.setdefault(one.layer, Unlike(one.row_tensor, one.held, True, history))
        left_out = dict(zip(stays, why_unlike(list(stays.values()), self._comm), strict=True))
        of_tensor = {
            (one.layer, one.index): history
            for one, history in zip(own, found, strict=True)
            if isinstance(history, History) and one.layer not in left_out
        }
        travelling: list[list[Traveller]] = [[] for _ in self._tensors]
        for layer, tensors in enumerate(self._tensors):
            for index, row_tensor in enumerate(tensors if layer not in left_out else ()):
                codes = agreed[layer][index]
                if codes is None:
                    travelling[layer] += of_tensor[layer, index].travellers(index, row_tensor.name)
                else:
                    travelling[layer] += travellers(index, row_tensor, held[layer][index], codes)
        return Ready(travelling, left_out, list(of_tensor.values()))

    def move(
        self,
        old: Placement,
        new: Placement,
        ready: Ready,
        *,
        node_of_rank: Sequence[int],
        on_commit: Callable[[Placement], None],
        verify: bool,
        stages: Stages,
        error: Exception | None = None,
        limits: Limits | None = None,
        untrained: Sequence[bool] = (),
        may_move: bool = True,
    ) -> Moved | None:
        """Move from one placement to another, or make the beginning of it.

        Args:
            old: the placement in force.
            new: the placement wanted, in which the layers that are left out are as they were.
            ready: what travels, as agreed since the last step.
            node_of_rank: of the communicator.
            on_commit: told the placement in force after each commit.
            verify: compare every expert's checksum before and after.
            stages: receives the seconds.
            error: why this rank cannot; all ranks then raise it.
            limits: of what is done at once; all is where None.
            untrained: by layer, whether `watch` has seen no gradients of it while its tokens were counted.
            may_move: whether nothing on this rank speaks against moving now.

        Returns:
            What was done; None where some rank may not move now.

        Raises:
            DisagreementError: on all ranks, where they want different placements.
            DistplbError: on all ranks, if any refuses, before anything of the commit at hand is written; or if a layer
                is untrained on all of them.
            HalfMovedError: if the experts are not whole any more; `broken` then says why.
        """
        with stages.stage("move"):
            move = self._agreed_move(old, new, ready, node_of_rank, error, limits, [may_move, *untrained])
        if move is None:
            return None
        if not move.layers:
            return Moved()
        before = self._checksums(move, ready, stages) if verify else None
        self.broken = "a move was interrupted"
        in_force = old

        def committed(placement: Placement) -> None:
            nonlocal in_force
            for history in ready.histories:
                history.follow(_sources(in_force, placement, history.layer))
            in_force = placement
            on_commit(placement)

        try:
            with stages.stage("move"):
                moved = move.run(committed)
        except HalfMovedError as why:
            self.broken = str(why)
            raise
        except DistplbError:
            self.broken = None  # refused before anything of that commit was written
            raise
        self.broken = None
        if before is not None:
            self._compare(before, move, ready, stages)
        return moved

    def _agreed_move(
        self,
        old: Placement,
        new: Placement,
        ready: Ready,
        node_of_rank: Sequence[int],
        error: Exception | None,
        limits: Limits | None,
        flags: Sequence[bool],
    ) -> Move | None:
        fields = {"the placement (digest)": 0}
        try:
            if error is not None:
                raise error
            layers = list(zip(self._tensors, self._layouts, ready.travelling, strict=True))
            move = Move(old, new, layers, self._comm, node_of_rank, limits, self._staging, self._num_groups)
            fields = {"the placement (digest)": new.digest()}
        except Exception as caught:
            error = in_stage("move", caught)
        all_may_move, *nowhere_trained = agree(self._comm, fields, error, minimum=[int(flag) for flag in flags])
        for name, is_nowhere in zip(self._names, nowhere_trained, strict=False):
            if is_nowhere:
                raise UntrainedError(
                    f"no gradient comes any more to experts or router of {name} as they were declared, while tokens "
                    "are counted and optimizers step. Where the model has other tensors now, as after "
                    "load_state_dict(assign=True), close() this Rebalancer and make one of the model as it is; where "
                    "it is not trained for a while, set enabled = False meanwhile"
                )
        return move if all_may_move else None

    def _why_it_differs(self, differing: DisagreementError) -> str:
        """By name, where it is the settings that experts are trained by."""
        try:
            agree_on_settings(self._tensors, trainers(self._optimizers), self._comm)
        except LostRanksError:
            raise
        except DistplbError as named:
            return str(named)
        return str(differing)

    def _checksums(self, move: Move, ready: Ready, stages: Stages) -> Tensor:
        """`[L, E]`: of every expert of the layers that change, where the placement in force has it; else 0."""
        with stages.stage("verify"):
            changing = [some if layer in move.layers else [] for layer, some in enumerate(ready.travelling)]
            return expert_checksums(list(zip(self._tensors, changing, strict=True)), move.placement, self._comm)

    def _compare(self, before: Tensor, move: Move, ready: Ready, stages: Stages) -> None:
        """Look whether every expert is what it was, which a rank without memory for it does not speak against."""
        try:
            after = self._checksums(move, ready, stages)
        except LostRanksError:
            raise
        except DistplbError as failed:
            warnings.warn(
                f"distplb has moved experts and could not verify them: {failed}", RuntimeWarning, stacklevel=6
            )
            return
        wrong = before.ne(after).nonzero()
        if len(wrong):
            layer, expert = wrong[0].tolist()
            self.broken = (
                f"after the move, expert {expert} of {self._names[layer]} is not what it was ({len(wrong)} such); "
                "resume from the last checkpoint with the rebalancer disabled, and report this"
            )
            raise HalfMovedError(self.broken)


def _sources(old: Placement, new: Placement, layer: int) -> list[int]:
    """`[P]`: the slot in which the expert of each slot was before."""
    slot_of = {expert: slot for slot, expert in enumerate(old.expert_of_slot[layer].tolist())}
    return [slot_of[expert] for expert in new.expert_of_slot[layer].tolist()]


def _refuse_gathered(tensors: Sequence[RowTensor]) -> None:
    for row_tensor in tensors:
        if gathered_ids(row_tensor.tensors):
            raise DistplbError(
                f"{row_tensor.name} is the whole weight that FSDP2 has gathered for a forward, which it drops at the "
                "next reshard; call reshard() of the module that was passed to fully_shard, and declare the parameter "
                "that the module then has"
            )


def _checked_gpu(gpu: int | None, comm: Comm, topology: Topology) -> int:
    num_gpus, size = topology.num_gpus, comm.size
    if size % num_gpus:
        raise DistplbError(
            f"the topology has {num_gpus} GPUs, the communicator {size} ranks; pass a topology whose GPUs are "
            "the ranks of one EP group, and a communicator of one or more whole EP groups"
        )
    if gpu is None and size != num_gpus:
        raise DistplbError(
            f"{size} ranks hold {size // num_gpus} copies of the experts of {num_gpus} GPUs; pass gpu=, "
            "this rank's number in its EP group"
        )
    gpu = comm.rank if gpu is None else gpu
    if not 0 <= gpu < num_gpus:
        raise DistplbError(f"gpu is {gpu}; pass this rank's number in its EP group, 0 to {num_gpus - 1}")
    return gpu
