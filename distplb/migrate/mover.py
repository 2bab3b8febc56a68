"""`Mover`: moves the experts of some layers, with all that travels with them, from one placement to another.

Shapes: L layers, E experts, P slots, M GPUs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

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
from distplb.migrate.claims import Claim, ExpertsBySlot
from distplb.migrate.layout_agreement import AgreedTensor, agreed_tensors
from distplb.migrate.optimizer_settings import agree_on_settings, check_settings, optimizers_by_id, settings_by_id
from distplb.migrate.optimizer_state import LayerStates, RowTensorState, layer_state
from distplb.migrate.row_tensors import RowTensor, declared_tensors
from distplb.migrate.staging import StagingMemory
from distplb.migrate.state_agreement import AgreedState, agreed_state
from distplb.migrate.training_watch import TrainingWatch
from distplb.migrate.transfer import Limits, MoveTotals, Transfer

__all__ = ["Mover"]


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

    Attributes:
        gpu: which GPU of its EP group this rank is.
        watch: of the gradients and steps between two moves.
        broken: why the experts may not be whole any more; None while they are.

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
        num_groups: int | None,
    ) -> None:
        self._comm, self._optimizers, self._num_slots, self._num_groups = comm, optimizers, num_slots, num_groups
        self.gpu, self._slots_per_gpu = _checked_gpu(gpu, comm, topology), topology.slots_per_gpu(num_slots)
        self._names = [layer.name for layer in layers]
        self._tensors = [declared_tensors(layer, self.gpu, self._slots_per_gpu, topology.num_gpus) for layer in layers]
        settings = settings_by_id(optimizers)
        for tensors in self._tensors:
            _refuse_gathered(tensors)
            check_settings(tensors, settings)
        self._agreed: list[list[AgreedTensor]] = []
        self._claim = Claim(self._tensors)
        self.watch = TrainingWatch(self._tensors, optimizers)
        self._memory = StagingMemory()
        self.broken: str | None = None

    def digest(self) -> int:
        """What must be equal on all ranks: names and rows of all declared tensors, as one number."""
        return digest([(tensor.name, tensor.row) for tensors in self._tensors for tensor in tensors])

    def agree_on_layouts(self) -> None:
        """Learn which rank holds what, and that all train it alike; once, before anything moves."""
        self._agreed = agreed_tensors(self._tensors, self._num_slots, self._comm)
        agree_on_settings(self._tensors, settings_by_id(self._optimizers), self._comm)

    def inherited_rows(self) -> list[ExpertsBySlot | None]:
        """By layer, where a rebalancer before this one has left the rows of its tensors, as of `Claim`."""
        return self._claim.inherited_rows()

    def note(self, placement: Placement) -> None:
        """Remember, for whoever moves the rows after this one, that they lie as this says."""
        self._claim.note(placement)

    def close(self) -> None:
        """Leave the tensors to others, and take the hooks away."""
        self._claim.release()
        self.watch.close()

    def collect_state(self) -> list[list[RowTensorState]]:
        """All that goes with the experts on this rank now; what FSDP2 has derived from it is dropped.

        Raises:
            DistplbError: if the tensors are none of the model's any more, a backward pass has begun, or state of the
                optimizers, or of others that were not passed, could not travel.
        """
        self.watch.refuse_replaced()
        self.watch.refuse_if_begun()
        self.watch.refuse_other_optimizers()
        reshard(param_groups(tensor for layer in self._tensors for row in layer for tensor in row.tensors))
        settings, by_id = settings_by_id(self._optimizers), optimizers_by_id(self._optimizers)
        return [layer_state(tensors, self._optimizers, settings, by_id) for tensors in self._tensors]

    def bytes_per_slot(self, states: LayerStates) -> int:
        """Of one expert's weights with all that travels with them on this rank, in the largest layer; 0 for none.

        Router rows travel too; they are on every rank and cross no link.
        """
        experts = [
            sum(state.nbytes for state, row_tensor in zip(of_layer, tensors, strict=True) if row_tensor.of_experts)
            for tensors, of_layer in zip(self._tensors, states, strict=False)
        ]
        return max(experts, default=0) // self._slots_per_gpu

    def prepare(self, states: LayerStates, error: Exception | None) -> AgreedState:
        """Agree on what travels, and which layers have to stay. Collective, also where this rank cannot move.

        Args:
            states: what goes with the experts on this rank.
            error: why this rank cannot; all ranks then raise it.

        Raises:
            DisagreementError: on all ranks, where experts are trained by other settings on some rank.
            DistplbError: on all ranks, if any refuses.
        """
        try:
            by_id = optimizers_by_id(self._optimizers)
            return agreed_state(self._agreed, states, self._num_slots, by_id, self._comm, error)
        except DisagreementError as difference:
            raise DisagreementError(self._in_words(difference), difference.field) from difference

    def move(
        self,
        old: Placement,
        new: Placement,
        agreed: AgreedState,
        *,
        node_of_rank: Sequence[int],
        on_commit: Callable[[Placement], None],
        verify: bool,
        stages: Stages,
        error: Exception | None,
        limits: Limits | None,
        untrained: Sequence[bool],
        may_move: bool,
    ) -> MoveTotals | None:
        """Move from one placement to another, or make the beginning of it.

        Args:
            old: the placement in force.
            new: the placement to reach, in which the layers that are left out are as they were.
            agreed: what travels, as agreed since the last step.
            node_of_rank: of the communicator.
            on_commit: called with the placement in force after each commit.
            verify: compare every expert's checksum before and after.
            stages: receives the seconds.
            error: why this rank cannot; all ranks then raise it.
            limits: of what is done at once; all is where None.
            untrained: by layer, whether `watch` has seen no gradients of it while its tokens were counted.
            may_move: whether nothing on this rank speaks against moving now.

        Returns:
            What was moved; None where some rank may not move now.

        Raises:
            DisagreementError: on all ranks, where their new placements differ.
            DistplbError: on all ranks, if any refuses, before anything of the commit at hand is written; or if a layer
                is untrained on all of them.
            HalfMovedError: if the experts are not whole any more; `broken` then says why.
        """
        with stages.stage("move"):
            flags = [may_move, *untrained]
            transfer = self._agreed_transfer(old, new, agreed, node_of_rank, error, limits, flags)
        if transfer is None:
            return None
        if not transfer.layers:
            return MoveTotals()
        before = self._checksums(transfer, agreed, stages) if verify else None
        with stages.stage("move"):
            totals = self._run(transfer, agreed, on_commit)
        if before is not None:
            self._compare(before, transfer, agreed, stages)
        return totals

    def _run(self, transfer: Transfer, agreed: AgreedState, on_commit: Callable[[Placement], None]) -> MoveTotals:
        """Run the transfer, let the histories of experts follow it, and set `broken` where it breaks off."""
        self.broken = "a move was interrupted"
        in_force = transfer.placement

        def committed(placement: Placement) -> None:
            nonlocal in_force
            for history in agreed.histories:
                history.follow(_sources(in_force, placement, history.layer))
            in_force = placement
            on_commit(placement)

        try:
            totals = transfer.run(committed)
        except HalfMovedError as why:
            self.broken = str(why)
            raise
        except DistplbError:
            self.broken = None  # refused before anything of that commit was written
            raise
        self.broken = None
        return totals

    def _agreed_transfer(
        self,
        old: Placement,
        new: Placement,
        agreed: AgreedState,
        node_of_rank: Sequence[int],
        error: Exception | None,
        limits: Limits | None,
        flags: Sequence[bool],
    ) -> Transfer | None:
        fields = {"the placement (digest)": 0}
        try:
            if error is not None:
                raise error
            layouts = [[tensor.layout for tensor in tensors] for tensors in self._agreed]
            layers = list(zip(layouts, agreed.travellers, strict=True))
            transfer = Transfer(old, new, layers, self._comm, node_of_rank, self._memory, limits, self._num_groups)
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
        return transfer if all_may_move else None

    def _in_words(self, difference: DisagreementError) -> str:
        """With the name and the settings of the tensor, where it is in these that ranks differ."""
        try:
            agree_on_settings(self._tensors, settings_by_id(self._optimizers), self._comm)
        except LostRanksError:
            raise
        except DistplbError as named:
            return str(named)
        return str(difference)

    def _checksums(self, transfer: Transfer, agreed: AgreedState, stages: Stages) -> Tensor:
        """`[L, E]`: of every expert of the layers that change, where the placement in force has it; else 0."""
        with stages.stage("verify"):
            changing = [
                of_layer if layer in transfer.layers else [] for layer, of_layer in enumerate(agreed.travellers)
            ]
            return expert_checksums(list(zip(self._tensors, changing, strict=True)), transfer.placement, self._comm)

    def _compare(self, before: Tensor, transfer: Transfer, agreed: AgreedState, stages: Stages) -> None:
        """Check that every expert is what it was; where a rank has no memory for that, only warn."""
        try:
            after = self._checksums(transfer, agreed, stages)
        except LostRanksError:
            raise
        except DistplbError as error:
            warnings.warn(f"distplb has moved experts and could not verify them: {error}", RuntimeWarning, stacklevel=6)
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
