"""torchtitan 0.3: the MoE layers of its decoders, and a `Rebalancer` for the ranks of its meshes.

The layers are built from `torchtitan.models.common.moe`, like those of its DeepSeek-V3, Qwen3 and gpt-oss. Their expert
weights are DTensors over the mesh axis "ep", with FSDP2 along dim 0 or dim 1; FSDP2 shards the router's gate. Nothing
in torchtitan is replaced: forward hooks provide counts, ties and the table of `mode="remap"`.

Shapes: B sequences, S tokens per sequence, K experts per token, E experts, P slots.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

from distplb.comm.private_names import flattened
from distplb.comm.torchdist import TorchComm
from distplb.core.count_errors import exact_limit
from distplb.core.layer import MoELayer
from distplb.core.ties import RouterTies
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.integrations.common import (
    Tell,
    check_mode,
    gpus_of_a_node,
    named_parts,
    not_found,
    refuse_moved,
    table_of,
    tokens_of_experts,
)
from distplb.integrations.lending import step_balancer
from distplb.integrations.torchtitan_replicas import lend, refuse_schedule, refuse_what_cannot_lend, stop_lending
from distplb.train.rebalancer import Rebalancer
from distplb.train.training_forwards import is_recomputation

__all__ = ["moe_layers", "rebalancer"]

Mode = Literal["permute", "remap"]

# Axes of torchtitan's mesh of experts: these ranks together hold each layer of a pipeline stage.
_AXES = ["dp_replicate", "efsdp", "ep"]
_LOOKED_FOR = (
    "torchtitan.models.common.moe.MoE with a TokenChoiceTopKRouter",
    "its routed_experts.inner_experts with one row for each expert in every parameter",
)


def moe_layers(model_parts: nn.Module | Sequence[nn.Module], *, mode: Mode = "permute") -> list[MoELayer]:
    """Return the MoE layers of a parallelised model, or of the parts that this pipeline stage holds, in order.

    Call it once the weights exist: after `parallelize_fn` or `pipelining_fn`, and `init_weights`. Names are those of
    the whole model ("layers.3.moe"), so no two stages share one.

    Args:
        model_parts: the model, or `Trainer.model_parts`.
        mode: "permute" moves router rows and `expert_bias_E` along with the experts. "remap" leaves them in place and
            puts a table between the router's choice and the dispatcher; `tokens_per_expert_E` and `expert_bias_E` then
            remain by expert.

    Raises:
        DistplbError: if there is no MoE layer, or one is of a kind that cannot be moved; with its name and the reason.
    """
    check_mode(mode)
    parts = named_parts(model_parts)
    layers = [_layer(name, moe, part, around, mode) for name, moe, part, around in _found(parts)]
    if not layers:
        raise not_found("torchtitan", _LOOKED_FOR, parts)
    return layers


def rebalancer(
    model_parts: nn.Module | Sequence[nn.Module],
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    every: int | None,
    replica_slots: int = 0,
    parallel_dims: ParallelDims | None = None,
    pp_schedule: Any = None,
    gpus_per_node: int | None = None,
    mode: Mode = "permute",
    deadline: float = 300.0,
    replicas: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Rebalancer:
    """Build a `Rebalancer` for a torchtitan job. Collective: all ranks of all pipeline stages call it.

    With `replica_slots`, GPUs also lend replicas of hot experts in every step; see `distplb.StepBalancer`. Closing the
    rebalancer ends that, so all ranks close theirs between the same two steps.

    In a Trainer, once its optimizers are built::

        self.rebalancer = rebalancer(
            self.model_parts, self.optimizers, every=500, parallel_dims=self.parallel_dims
        )

    and in `train_step`, after `self.lr_schedulers.step()`::

        self.optimizers.zero_grad()  # gradients that are still held would travel too
        self.rebalancer.step()

    Args:
        model_parts: the model, or `Trainer.model_parts`.
        optimizers: torchtitan's `OptimizersContainer`, or torch optimizers.
        every: iterations between rebalances; None never moves homes.
        replica_slots: replicas that a GPU may hold in one step; 0 lends none.
        parallel_dims: torchtitan's `ParallelDims`. Where None, the mesh is that of the experts' weights, which a
            pipeline stage without MoE layers does not have.
        pp_schedule: the Trainer's pipeline schedule, which is refused if replicas cannot follow it.
        gpus_per_node: ranks on each node; the value from `torchrun` where None.
        mode: see `moe_layers`.
        deadline: seconds that a rank waits for the others; see `TorchComm`.
        replicas: other options of `StepBalancer`, such as `{"max_tokens_per_gpu": 40_000}`. With `Record(folder)`, one
            of 100 steps is recorded there.
        options: options of `Rebalancer`. With `Moves(dry_run=True)` steps are split, but no replica is lent.

    Returns:
        The rebalancer, which does nothing on a pipeline stage without MoE layers.

    Raises:
        DistplbError: as `moe_layers` and `Rebalancer`; and if experts are not sharded over an EP group.
    """
    parts = named_parts(model_parts)
    layers: list[MoELayer] = []
    # A stage may lack MoE layers; a whole model without them is a mistake.
    if parallel_dims is None or not parallel_dims.pp_enabled or any(_alike(part) for part in parts):
        layers = moe_layers(parts, mode=mode)
    mesh = _mesh(layers, parallel_dims)
    ep = mesh["ep"]
    topology = Topology.of_ranks(ep.mesh.flatten().tolist(), gpus_of_a_node(gpus_per_node))
    comm = TorchComm(mesh if mesh.ndim == 1 else flattened(mesh, "distplb"), deadline=deadline)
    found = list(_found(parts)) if layers else []
    if replica_slots:
        refuse_schedule(pp_schedule)
        for name, moe, part, _ in found:
            refuse_what_cannot_lend(name, moe, [one for one in part.modules() if moe in one.modules()])
    balancer = step_balancer(
        ep,
        topology,
        {name: moe.router.num_experts for name, moe, *_ in found},
        replica_slots=replica_slots,
        replicas=replicas,
        of_rebalancer=options,
        is_writer=comm.rank == 0,
        deadline=deadline,
    )
    built = Rebalancer(
        layers,
        _unwrapped(optimizers),
        topology=topology,
        every=every,
        comm=comm,
        gpu=ep.get_local_rank(),
        step_balancer=balancer,
        **options,
    )
    for name, moe, *_ in found:
        if balancer is None:
            stop_lending(moe)
        else:
            built.on_close(lend(name, moe, balancer))
    return built


# --- where the layers are ---------------------------------------------------------------------------------------


def _found(parts: Sequence[nn.Module]) -> Iterator[tuple[str, MoE, nn.Module, list[Any]]]:
    """Yield the name of each MoE layer in the whole model, the layer, its part, and the FSDP2 modules around it."""
    for part in parts:
        modules = dict(part.named_modules())
        for name, module in modules.items():
            if isinstance(module, MoE):
                words = name.split(".")
                outer = [modules[".".join(words[:length])] for length in range(len(words) + 1)]
                # `fully_shard` gives a module these methods.
                around = [one for one in outer if hasattr(one, "reshard") and hasattr(one, "unshard")]
                yield canonical_fqn(name), module, part, around


def _alike(part: nn.Module) -> bool:
    """Whether some module's class name suggests experts."""
    return any(
        word in type(module).__qualname__.lower() for module in part.modules() for word in ("moe", "expert", "router")
    )


def _layer(name: str, moe: MoE, part: nn.Module, around: list[Any], mode: Mode) -> MoELayer:
    for module in around:
        module.reshard()  # else the gathered weights of a forward would be treated as this rank's own
    _refuse_what_routes_otherwise(name, moe, mode)
    experts, router = _expert_tensors(name, moe), _router_tensors(name, moe)
    ties = RouterTies(top_k=moe.router.top_k)
    count = _Counts(part, moe, ties)
    table = None
    if mode == "remap":
        device = next(iter(experts.values())).device
        table = table_of(moe.routed_experts, moe.router.num_experts, device, _arguments_by_slot)

    def invalidate() -> None:
        for module in around:
            module.reshard()
        if table is None:
            # Counts by slot, for the balancing bias; they are 0 anyway between its update and the next forward.
            _local(moe.tokens_per_expert_E).zero_()

    def subscribe(tell: Tell) -> Sequence[RemovableHandle]:
        if table is None:
            refuse_moved(name, moe.routed_experts)
        return count(tell)

    return MoELayer(
        name=name,
        experts=experts,
        router=router if table is None else {},
        num_groups=moe.router.num_expert_groups,
        slot_of_expert=table,
        counts=subscribe,
        ties=ties,
        invalidate=invalidate,
    )


def _expert_tensors(name: str, moe: MoE) -> dict[str, Tensor]:
    """Everything that has a row for each expert, as this rank holds it."""
    inner, num_experts = moe.routed_experts.inner_experts, moe.router.num_experts
    if type(inner).__module__.startswith("torchtitan.components.quantization"):
        raise DistplbError(
            f"{name}: experts are a {type(inner).__qualname__} with quantised grouped products, which distplb never "
            "moved; train without that converter, or describe the layer yourself with distplb.MoELayer"
        )
    tensors: dict[str, Any] = {**dict(inner.named_parameters()), **dict(inner.named_buffers())}
    for key, tensor in tensors.items():
        where = f"{name}.routed_experts.inner_experts.{key}"
        if not tensor.dim() or tensor.shape[0] != num_experts:
            raise DistplbError(
                f"{where} has shape {tuple(tensor.shape)}, not a row for each of {num_experts} experts; "
                "describe the layer yourself with distplb.MoELayer"
            )
    for key, tensor in tensors.items():
        where = f"{name}.routed_experts.inner_experts.{key}"
        axes = getattr(getattr(tensor, "device_mesh", None), "mesh_dim_names", None) or ()
        if "ep" not in axes:
            raise DistplbError(
                f"{where} is not sharded over expert-parallel ranks (its mesh has the axes {list(axes)}), so every "
                "rank computes all experts and there is nothing to balance; set expert_parallel_degree above 1"
            )
        for axis, placement in zip(axes, tensor.placements, strict=True):
            dim = getattr(placement, "dim", None)
            if (axis == "ep" and dim != 0) or axis not in _AXES or dim not in (None, 0, 1):
                raise DistplbError(
                    f"{where} has placement {placement} on the mesh axis {axis!r}; use dim 0 on 'ep', and dim 0, dim 1 "
                    "or a copy on 'efsdp' and 'dp_replicate'"
                )
    return tensors


def _router_tensors(name: str, moe: MoE) -> dict[str, Tensor]:
    """The router's rows and its balancing bias."""
    tensors = {f"router.{key}": tensor for key, tensor in moe.router.named_parameters()}
    tensors |= dict(moe.router.named_buffers(prefix="router"))
    # The layer's own tensors; the running counts among them are dropped instead of moved.
    own = {**dict(moe.named_parameters(recurse=False)), **dict(moe.named_buffers(recurse=False))}
    tensors |= {key: tensor for key, tensor in own.items() if key != "tokens_per_expert_E"}
    for key in tensors.keys() - {"router.gate.weight", "router.gate.bias", "expert_bias_E"}:
        raise DistplbError(
            f"{name}.{key} belongs to a router that distplb does not know, so it is not known which part belongs to "
            "which expert; describe the layer yourself with distplb.MoELayer"
        )
    return tensors


def _refuse_what_routes_otherwise(name: str, moe: MoE, mode: Mode) -> None:
    router, dispatcher = moe.router, moe.routed_experts.token_dispatcher
    if type(router).forward is not TokenChoiceTopKRouter.forward:
        raise DistplbError(
            f"{name}.router is a {type(router).__qualname__} with a forward of its own; describe the layer yourself "
            "with distplb.MoELayer"
        )
    if router._debug_force_load_balance:
        raise DistplbError(
            f"{name}.router forces a balanced load by expert id, so moving experts would change the model; unset "
            "debug.moe_force_load_balance"
        )
    capacity = getattr(dispatcher, "non_blocking_capacity_factor", None)
    if capacity is not None and capacity < 1:
        raise DistplbError(
            f"{name} drops tokens above the capacity of a rank (non_blocking_capacity_factor {capacity}), so which "
            "tokens are dropped depends on where experts are; set it to 1.0 or None"
        )
    if mode == "remap" and not isinstance(dispatcher, AllToAllTokenDispatcher):
        raise DistplbError(
            f"{name} dispatches with {type(dispatcher).__qualname__}, which was never run with mode='remap'; "
            "pass mode='permute', or use the dispatcher of moe_comm_backend='standard'"
        )


# --- hooks ------------------------------------------------------------------------------------------------------


class _Counts:
    """`MoELayer.counts`: reports this rank's tokens of each slot (or expert) after each forward of the model.

    Tokens are counted right after the router's choice, in the thread of the forward. Recomputations in a backward pass,
    which another thread may run at the same time for another micro-batch, are left out. If the router's hook does not
    run, because the block is compiled or replayed from a CUDA graph, the growth of the layer's own running counts
    during the forward is reported instead; it includes recomputations in other threads. Running counts that torchtitan
    uses are only read, before its optimizer hook reduces and zeroes them.

    A hook on the whole model passes the counts on, because blocks may be checkpointed, compiled or captured one by one.
    """

    def __init__(self, part: nn.Module, moe: MoE, ties: RouterTies) -> None:
        self._part, self._moe, self._ties = part, moe, ties

    def __call__(self, tell: Tell) -> Sequence[RemovableHandle]:
        """Report every forward from now on, and record tied scores for the event."""
        thread = _Forward()

        # A copy of the model has these hooks too, so they check whose forward it is.
        def begin(part: nn.Module, *_: Any) -> None:
            if part is not self._part:
                return
            running = _local(self._moe.tokens_per_expert_E)  # [P]
            if self._moe.load_balance_coeff is None:
                # torchtitan neither reads nor zeroes them then; in float32 they would lose tokens beyond 2^24.
                running.zero_()
            thread.running, thread.routed = running.clone(), None

        def route(router: Any, arguments: tuple[Any, ...], output: Any) -> None:
            if torch.compiler.is_compiling() or router is not self._moe.router or is_recomputation():
                return
            counts = tokens_of_experts(_local(output[1]), router.num_experts)
            thread.routed = counts if thread.routed is None else thread.routed + counts
            self._look_for_ties(router, arguments, output)

        def end(part: nn.Module, *_: Any) -> None:
            if part is not self._part or thread.running is None:
                return
            counts = thread.routed
            if counts is None:
                running = _local(self._moe.tokens_per_expert_E)
                # From 2^24 on float32 may have lost tokens: the growth is then no count, which the window reports.
                inexact = running >= exact_limit(running.dtype)
                counts = (running - thread.running).masked_fill_(inexact, math.nan)
            thread.running = thread.routed = None
            tell(counts, training=self._moe.training)

        return (
            # These two are not compiled when the whole model is: compiled, they lost the state of the thread.
            self._part.register_forward_pre_hook(torch.compiler.disable(begin)),
            self._part.register_forward_hook(torch.compiler.disable(end)),
            self._moe.router.register_forward_hook(route),
        )

    def _look_for_ties(self, router: Any, arguments: tuple[Any, ...], output: Any) -> None:
        if not router.training or not self._ties.is_due:
            return
        with torch.no_grad():
            scores = _local(output[2])  # [B, S, E]
            bias = arguments[1] if len(arguments) > 1 else None  # [E]
            if bias is not None:
                scores = scores + _local(bias)
            if router.num_expert_groups is not None:
                scores = router._get_node_limited_routing_scores(scores)
            self._ties.add(scores)


class _Forward(threading.local):
    """The forward that a thread is running."""

    running: Tensor | None = None  # [P], the layer's running counts when it began
    routed: Tensor | None = None  # [P], the tokens that it has routed so far


def _arguments_by_slot(table: Tensor, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Replace experts by slots in the arguments of `RoutedExperts`."""
    tokens, scores, experts, counts = arguments  # [B, S, K] experts, [E] counts
    by_slot = torch.empty_like(_local(counts)).scatter(0, table, _local(counts))  # [P]
    return tokens, scores, _like(experts, table[_local(experts)]), _like(counts, by_slot)


def _local(tensor: Any) -> Tensor:
    """This rank's part of a DTensor, or the tensor."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


def _like(tensor: Any, local: Tensor) -> Any:
    """Return `local` as a DTensor with the layout of `tensor`, if that is one."""
    if not hasattr(tensor, "to_local"):
        return local
    return tensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


# --- meshes and optimizers --------------------------------------------------------------------------------------


def _mesh(layers: Sequence[MoELayer], parallel_dims: ParallelDims | None) -> Any:
    """The mesh over all ranks that hold these layers; its axis "ep" is the EP group."""
    if parallel_dims is None:
        tensors: list[Any] = [next(iter(layer.experts.values())) for layer in layers]
        return tensors[0].device_mesh
    if not parallel_dims.ep_enabled:
        raise DistplbError(
            "expert_parallel_degree is 1, so every rank computes all experts and there is nothing to balance; "
            "set it above 1"
        )
    return parallel_dims.get_activated_mesh(_AXES)


def _unwrapped(optimizers: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """List torch's own optimizers."""
    if isinstance(optimizers, OptimizersContainer):
        return list(optimizers.optimizers)
    return [optimizers] if isinstance(optimizers, Optimizer) else [one for o in optimizers for one in _unwrapped(o)]
