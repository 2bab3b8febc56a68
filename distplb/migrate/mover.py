"""`Mover`: moves the experts of some layers, with everything that travels with them, to a new placement.

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
    """Moves experts and everything that travels with them, commit by commit, once all ranks have agreed.

    The constructor is local to the rank and refuses tensors that cannot be moved; `agree_on_layouts`, `prepare` and
    `move` are collective. A mover keeps references to the tensors, and hooks on them, until it is closed.

    Args:
        layers: the MoE layers.
        optimizers: the optimizers that step on their parameters.
        comm: the ranks that hold the layers.
        topology: topology of one EP group.
        num_slots: P.
        gpu: index of this rank's GPU in its EP group; None if the communicator is the EP group.
        num_groups: number of routing groups of routers whose rows move, so that groups stay in blocks; None if there
            are none.

    Attributes:
        gpu: index of this rank's GPU in its EP group.
        watch: watches gradients and optimizer steps between two moves.
        broken: why the experts may no longer be whole; None while they are.

    Raises:
        DistplbError: if a tensor, the slots or `gpu` do not fit, a parameter is in none of the optimizers, experts of
            one layer are trained differently, or another rebalancer of this process moves one of the tensors.
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
        """Return one number for the names and row sizes of all declared tensors, which must be equal on all ranks."""
        return digest([(tensor.name, tensor.row) for tensors in self._tensors for tensor in tensors])

    def agree_on_layouts(self) -> None:
        """Agree on which rank holds what, and check that all train it alike; once, before anything moves."""
        self._agreed = agreed_tensors(self._tensors, self._num_slots, self._comm)
        agree_on_settings(self._tensors, settings_by_id(self._optimizers), self._comm)

    def inherited_rows(self) -> list[ExpertsBySlot | None]:
        """Return, by layer, where an earlier rebalancer left the rows of its tensors; see `Claim`."""
        return self._claim.inherited_rows()

    def note(self, placement: Placement) -> None:
        """Record for the next rebalancer of these tensors that their rows are where `placement` has them."""
        self._claim.note(placement)

    def close(self) -> None:
        """Release the tensors and remove the hooks."""
        self._claim.release()
        self.watch.close()

    def collect_state(self) -> list[list[RowTensorState]]:
        """Collect everything that goes with the experts on this rank now; drop what FSDP2 derived from it.

        Raises:
            DistplbError: if a tensor is no longer the model's, a backward pass has begun, or some state of these
                optimizers, or of others that were not passed, could not travel.
        """
        self.watch.refuse_replaced()
        self.watch.refuse_if_begun()
        self.watch.refuse_other_optimizers()
        reshard(param_groups(tensor for layer in self._tensors for row in layer for tensor in row.tensors))
        settings, by_id = settings_by_id(self._optimizers), optimizers_by_id(self._optimizers)
        return [layer_state(tensors, self._optimizers, settings, by_id) for tensors in self._tensors]

    def bytes_per_slot(self, states: LayerStates) -> int:
        """Return the bytes of one expert, with everything that travels with it on this rank, in the largest layer.

        0 without layers. Router rows travel too but are not counted: unless they are sharded, every rank has them, and
        they cross no link.
        """
        experts = [
            sum(state.nbytes for state, row_tensor in zip(of_layer, tensors, strict=True) if row_tensor.of_experts)
            for tensors, of_layer in zip(self._tensors, states, strict=False)
        ]
        return max(experts, default=0) // self._slots_per_gpu

    def prepare(self, states: LayerStates, error: Exception | None) -> AgreedState:
        """Agree on what travels and which layers have to stay. Collective, even if this rank cannot move.

        Args:
            states: the state that goes with the experts on this rank.
            error: why this rank cannot move; all ranks then raise it.

        Raises:
            DisagreementError: on all ranks, if some rank trains experts with other settings.
            DistplbError: on all ranks, if any rank refuses.
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
        """Move from one placement to another, or as far towards it as `limits` allow.

        Args:
            old: the placement in force.
            new: the placement to reach, in which layers that are left out are unchanged.
            agreed: what travels, as agreed since the last step.
            node_of_rank: node of each rank of the communicator.
            on_commit: called with the placement in force after each commit.
            verify: whether to compare every expert's checksum before and after.
            stages: receives the seconds of each stage.
            error: why this rank cannot move; all ranks then raise it.
            limits: how much to move at once; everything where None.
            untrained: by layer, whether `watch` saw no gradients of it while its tokens were counted.
            may_move: whether this rank allows a move now.

        Returns:
            What was moved; None if some rank does not allow a move now.

        Raises:
            DisagreementError: on all ranks, if their new placements differ.
            DistplbError: on all ranks, if any rank refuses before the current commit is written; or if a layer is
                untrained on all of them.
            HalfMovedError: if the experts are no longer whole; `broken` then gives the reason.
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
        """Run the transfer, let the histories of experts follow it, and set `broken` if it is cut short."""
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
                    f"the declared experts or router of {name} no longer get gradients, although tokens are counted "
                    "and optimizers step. If the model has other tensors now, as after load_state_dict(assign=True), "
                    "close() this Rebalancer and build a new one; if the layer is not trained for a while, set "
                    "enabled = False meanwhile"
                )
        return transfer if all_may_move else None

    def _in_words(self, difference: DisagreementError) -> str:
        """Describe a disagreement, with the tensor's name and settings if ranks differ in these."""
        try:
            agree_on_settings(self._tensors, settings_by_id(self._optimizers), self._comm)
        except LostRanksError:
            raise
        except DistplbError as named:
            return str(named)
        return str(difference)

    def _checksums(self, transfer: Transfer, agreed: AgreedState, stages: Stages) -> Tensor:
        """Checksums `[L, E]` of all experts in layers that change, by the placement in force; 0 in other layers."""
        with stages.stage("verify"):
            changing = [
                of_layer if layer in transfer.layers else [] for layer, of_layer in enumerate(agreed.travellers)
            ]
            return expert_checksums(list(zip(self._tensors, changing, strict=True)), transfer.placement, self._comm)

    def _compare(self, before: Tensor, transfer: Transfer, agreed: AgreedState, stages: Stages) -> None:
        """Check that no expert has changed; only warn if a rank lacks the memory for that."""
        try:
            after = self._checksums(transfer, agreed, stages)
        except LostRanksError:
            raise
        except DistplbError as error:
            warnings.warn(f"distplb moved experts but could not verify them: {error}", RuntimeWarning, stacklevel=6)
            return
        wrong = before.ne(after).nonzero()
        if len(wrong):
            layer, expert = wrong[0].tolist()
            self.broken = (
                f"expert {expert} of {self._names[layer]} has another checksum after the move (experts affected: "
                f"{len(wrong)}); resume from the last checkpoint with the rebalancer disabled, and report this"
            )
            raise HalfMovedError(self.broken)


def _sources(old: Placement, new: Placement, layer: int) -> list[int]:
    """The previous slot `[P]` of the expert in each slot."""
    slot_of = {expert: slot for slot, expert in enumerate(old.expert_of_slot[layer].tolist())}
    return [slot_of[expert] for expert in new.expert_of_slot[layer].tolist()]


def _refuse_gathered(tensors: Sequence[RowTensor]) -> None:
    for row_tensor in tensors:
        if gathered_ids(row_tensor.tensors):
            raise DistplbError(
                f"{row_tensor.name} is the whole weight that FSDP2 gathered for a forward and drops at the next "
                "reshard; call reshard() on the module that was passed to fully_shard, and declare the parameter that "
                "the module then has"
            )


def _checked_gpu(gpu: int | None, comm: Comm, topology: Topology) -> int:
    num_gpus, size = topology.num_gpus, comm.size
    if size % num_gpus:
        raise DistplbError(
            f"the topology has {num_gpus} GPUs, but the communicator has {size} rank{'s' * (size != 1)}; pass a "
            "topology whose GPUs are the ranks of one EP group, and a communicator of one or more whole EP groups"
        )
    if gpu is None and size != num_gpus:
        raise DistplbError(
            f"{size} ranks hold {size // num_gpus} copies of the experts of {num_gpus} GPU{'s' * (num_gpus != 1)}; "
            "pass gpu=, this rank's index in its EP group"
        )
    gpu = comm.rank if gpu is None else gpu
    if not 0 <= gpu < num_gpus:
        raise DistplbError(f"gpu is {gpu}; pass this rank's index in its EP group, 0 to {num_gpus - 1}")
    return gpu
