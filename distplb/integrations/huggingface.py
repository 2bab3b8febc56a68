"""Hugging Face Transformers 5: Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3, gpt-oss, with its own expert parallelism.

Shapes: N tokens, E experts, P slots, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from distplb.comm.torchdist import TorchComm
from distplb.core.layer import MoELayer
from distplb.core.ties import RouterTies
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.integrations.common import (
    Tell,
    check_mode,
    counts_of,
    gpus_of_a_node,
    named_parts,
    not_found,
    refuse_moved,
    table_of,
    tokens_of_experts,
    within_groups,
)
from distplb.integrations.huggingface_replicas import lend, refuse_what_cannot_lend, stop_lending
from distplb.integrations.lending import step_balancer
from distplb.train.rebalancer import Rebalancer

__all__ = ["moe_layers", "rebalancer"]

_EP_AXIS = "ep"  # its name in transformers' mesh of the experts


# --- known models ------------------------------------------------------------------------------------------------


def _softmax(router: nn.Module, logits: Tensor) -> Tensor:
    return logits.float().softmax(-1)


def _logits(router: nn.Module, logits: Tensor) -> Tensor:
    return logits


def _within_groups(router: Any, logits: Tensor) -> Tensor:
    """Scores of groups that were not chosen are masked out, so that no expert ties with theirs."""
    return within_groups(logits.sigmoid() + router.e_score_correction_bias, router.num_group, 2, router.topk_group)


class _Block(NamedTuple):
    """The name of the router in a class of MoE blocks, and how its logits give the scores `[N, E]` that it chooses by.

    The experts are called `experts`; they take (hidden states, chosen experts `[N, K]`, weights). A router returns
    (logits `[N, E]`, weights, chosen experts `[N, K]`). Every tensor of router and experts has a row for each expert.
    """

    router: str
    scores: Callable[[Any, Tensor], Tensor]


_BLOCKS: dict[type[nn.Module], _Block] = {
    MixtralSparseMoeBlock: _Block("gate", _softmax),
    Qwen3MoeSparseMoeBlock: _Block("gate", _softmax),
    OlmoeSparseMoeBlock: _Block("gate", _softmax),
    DeepseekV3MoE: _Block("gate", _within_groups),
    GptOssMLP: _Block("router", _logits),
}


# --- public functions --------------------------------------------------------------------------------------------


def moe_layers(
    model: nn.Module | Sequence[nn.Module], *, mode: Literal["permute", "remap"] = "permute"
) -> list[MoELayer]:
    """Return every MoE layer of a model, in the order of its modules; for a `Rebalancer` that you build yourself.

    The model is not changed, except that under "remap" every expert module gets a table, which it keeps. When a
    `Rebalancer` subscribes to the layers' `counts`, they add hooks that count tokens and ties, and that refuse the
    auxiliary loss in each forward; its `close` removes them.

    Args:
        model: any module that contains blocks of a known class, or the parts of one.
        mode: "permute": router rows move with the experts, and the model's `router_logits` are by slot. "remap": the
            router keeps its rows, and the experts that it chose are looked up in a table on the way to the expert
            module; any placement is then legal, also for DeepSeek-V3, and so is the auxiliary loss of
            `output_router_logits`.

    Raises:
        DistplbError: if there is no such layer, or one differs from what is known of its class.
    """
    check_mode(mode)
    parts = named_parts(model)
    layers = [layer for part in parts for layer in _layers_of(part, mode)]
    if not layers:
        looked_for = [f"{block.__name__} with .{known.router} and .experts" for block, known in _BLOCKS.items()]
        raise not_found("Hugging Face Transformers", looked_for, parts)
    return layers


def rebalancer(
    model: nn.Module | Sequence[nn.Module],
    optimizers: Optimizer | Sequence[Optimizer],
    *,
    every: int | None,
    replica_slots: int = 0,
    group: Any = None,
    gpus_per_node: int | None = None,
    mode: Literal["permute", "remap"] = "permute",
    deadline: float = 300.0,
    replicas: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Rebalancer:
    """Build a `Rebalancer` for a model that transformers has made expert-parallel, or for a single process.

    With `replica_slots`, GPUs also lend replicas of hot experts in every step; see `distplb.StepBalancer`. Closing the
    rebalancer ends that, so all ranks close theirs between the same two steps.

    `DistributedConfig(ep_size=...)` makes a model expert-parallel; the experts' mesh then gives the EP group, this
    rank's GPU in it, and the ranks that hold copies or shards of the same experts. In the loop::

        rebalancer = huggingface.rebalancer(model, optimizer, every=100)
        ...
        optimizer.step()
        optimizer.zero_grad()
        rebalancer.step()
        ...
        with rebalancer.in_logical_order():  # other programs expect the original order of experts
            model.save_pretrained(folder)

    Args:
        model: the model, or its parts.
        optimizers: the optimizers that step on it; accelerate may have wrapped them.
        every: iterations between rebalances; None never moves homes.
        replica_slots: replicas that a GPU may hold in one step; 0 lends none.
        group: process group of all ranks that hold the experts; the default group where None.
        gpus_per_node: the job's GPUs on each node; where None, the value from `torchrun`, or one node if it gives none.
        mode: see `moe_layers`.
        deadline: seconds that a rank waits for the others; see `TorchComm`.
        replicas: other options of `StepBalancer`, such as `{"max_tokens_per_gpu": 40_000}`. With `Record(folder)`, one
            of 100 steps is recorded there.
        **options: options of `Rebalancer`. With `Moves(dry_run=True)` steps are split, but no replica is lent.

    Raises:
        DistplbError: as `moe_layers` and `Rebalancer`; if each of several ranks holds all experts, because then
            there is nothing to balance; and with `replica_slots`, for a layer that cannot have replicas.
    """
    layers = moe_layers(model, mode=mode)
    name, mesh, comm = layers[0].name, _mesh(layers[0].experts), _comm(group, deadline)
    if mesh is None or _EP_AXIS not in (mesh.mesh_dim_names or ()):
        if comm is not None and comm.size > 1:
            held = "whole" if mesh is None else f"sharded over mesh axes {mesh.mesh_dim_names}"
            raise DistplbError(
                f"{name}: each of {comm.size} ranks computes all experts (held {held}), so there is nothing to "
                "balance; make the model expert-parallel with transformers.distributed.DistributedConfig(ep_size=...)"
            )
        # There is nothing to lend.
        return Rebalancer(layers, _unwrapped(optimizers), topology=Topology(1, 1), every=every, **options)
    if comm is None or comm.size != mesh.size():
        raise DistplbError(
            f"{name}: the experts are on {mesh.size()} rank{'s' * (mesh.size() != 1)}, but the group has "
            f"{1 if comm is None else comm.size}; pass group=, the process group of exactly the experts' ranks"
        )
    ranks = mesh[_EP_AXIS].mesh.tolist()
    topology = Topology.of_ranks(ranks, gpus_of_a_node(gpus_per_node, otherwise=max(ranks) + 1))
    found = list(_experts_of(named_parts(model)))
    if replica_slots:
        for name, _, experts, around in found:
            refuse_what_cannot_lend(name, experts, around)
    balancer = step_balancer(
        mesh[_EP_AXIS],
        topology,
        {name: num_experts for name, num_experts, *_ in found},
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
        gpu=mesh.get_local_rank(_EP_AXIS),
        step_balancer=balancer,
        **options,
    )
    for name, _, experts, _ in found:
        if balancer is None:
            stop_lending(experts)
        else:
            built.on_close(lend(name, experts, balancer))
    return built


def _unwrapped(optimizers: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """List torch's own optimizers. Accelerate's wrapper is an `Optimizer` without the hooks and state of one."""
    if not isinstance(optimizers, Optimizer):
        return [one for each in optimizers for one in _unwrapped(each)]
    inside = getattr(optimizers, "optimizer", None)
    return _unwrapped(inside) if isinstance(inside, Optimizer) else [optimizers]


# --- finding -----------------------------------------------------------------------------------------------------


def _experts_of(parts: Sequence[nn.Module]) -> Iterator[tuple[str, int, nn.Module, list[nn.Module]]]:
    """Yield the name of each MoE layer, E, its experts, and the modules that contain them."""
    for part in parts:
        for name, module in part.named_modules():
            known = next((kind for kind in type(module).__mro__ if kind in _BLOCKS), None)
            if known is not None:
                experts = module.get_submodule("experts")
                around = [one for one in part.modules() if experts in one.modules()]
                router: Any = module.get_submodule(_BLOCKS[known].router)
                yield _plain(name) or known.__name__, int(router.weight.shape[0]), experts, around


def _layers_of(part: nn.Module, mode: str) -> Iterator[MoELayer]:
    sharers = _ranks_of_a_batch(part)
    guarded = _with_loss_over_layers(part) if mode == "permute" else []
    for name, module in part.named_modules():
        known = next((kind for kind in type(module).__mro__ if kind in _BLOCKS), None)
        if known is None:
            continue
        block = _BLOCKS[known]
        router, experts = module.get_submodule(block.router), module.get_submodule("experts")
        # Expert parallelism gives the experts a forward of its own, with the same arguments and results.
        written = {
            module: _forward_of(module),
            router: _forward_of(router),
            experts: _forward_of(experts, of_class=True),
        }
        for each, where in written.items():
            if where != known.__module__:
                raise DistplbError(
                    f"{name} is a {known.__name__}, but the forward of its {type(each).__qualname__} is defined in "
                    f"{where}, and how it uses the experts is not known; describe the layer yourself with "
                    "distplb.MoELayer"
                )
        yield _described(_plain(name) or known.__name__, module, block, router, experts, sharers, mode, guarded)


def _with_loss_over_layers(part: nn.Module) -> list[nn.Module]:
    """Find the models that can compute the auxiliary loss of transformers.

    The loss sums each expert's tokens, and its probabilities, over all layers and multiplies the sums. This ties expert
    3 of one layer to expert 3 of the others, so the loss changes when experts of one layer change places.

    Raises:
        DistplbError: if a model computes it in every forward.
    """
    models: list[Any] = [module for module in part.modules() if getattr(module, "router_aux_loss_coef", 0)]
    for model in models:
        _refuse_loss_over_layers(model.config.output_router_logits, model)
    return models


def _guard_against_loss_over_layers(model: nn.Module) -> RemovableHandle:
    """Also refuse the auxiliary loss in each later forward that requests it."""

    def look(watched: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        asked = options.get("output_router_logits")
        asked = watched.config.output_router_logits if asked is None else asked
        # A copy of the model has this hook too, but its experts are not permuted.
        _refuse_loss_over_layers(watched is model and watched.training and asked, watched)

    return model.register_forward_pre_hook(look, with_kwargs=True)


def _refuse_loss_over_layers(asked: bool, model: Any) -> None:
    if asked:
        raise DistplbError(
            f"{type(model).__name__} is trained with output_router_logits and router_aux_loss_coef "
            f"{model.router_aux_loss_coef}, a loss that ties the experts of all layers to each other by their ids, "
            "which permuting changes; pass mode='remap', or set router_aux_loss_coef to 0"
        )


def _plain(name: str) -> str:
    """Remove what torch.compile adds to a name, so that checkpoints fit the compiled and the plain model."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _forward_of(module: nn.Module, *, of_class: bool = False) -> str:
    """Where the forward that runs is defined: a Python module, or "this object" if it is an attribute of the instance.

    Wrappers such as FSDP2 derive a class without a forward; kernels from the hub set one on the instance.
    """
    if not of_class and "forward" in vars(module):
        return "this object"
    return next(kind.__module__ for kind in type(module).__mro__ if "forward" in vars(kind))


def _described(
    name: str,
    module: nn.Module,
    block: _Block,
    router: Any,
    experts: nn.Module,
    sharers: int,
    mode: str,
    guarded: Sequence[nn.Module],
) -> MoELayer:
    num_experts, ties = int(router.weight.shape[0]), RouterTies(int(router.top_k))
    _rows(name, module, num_experts)
    for key, part in ((block.router, router), ("experts", experts)):
        _refuse_inside(f"{name}.{key}", part)
    expert_rows = _rows(f"{name}.experts", experts, num_experts)
    router_rows = _rows(f"{name}.{block.router}", router, num_experts)
    share, remaps = _share_of_tokens(expert_rows, sharers), mode == "remap"

    def read(arguments: tuple[Any, ...], choice: tuple[Tensor, ...]) -> Tensor:
        if ties.is_due:
            ties.add(block.scores(router, choice[0].detach()))
        return tokens_of_experts(choice[2][share], num_experts)

    def subscribe(tell: Tell) -> list[RemovableHandle]:
        if not remaps:
            refuse_moved(name, experts)
        return [counts_of(router, read)(tell), *(_guard_against_loss_over_layers(model) for model in guarded)]

    return MoELayer(
        name=name,
        experts=expert_rows,
        router={} if remaps else router_rows,
        num_groups=None if remaps else _num_groups(router),
        slot_of_expert=table_of(experts, num_experts, router.weight.device, _arguments_by_slot) if remaps else None,
        counts=subscribe,
        ties=ties,
    )


def _rows(name: str, module: nn.Module, num_experts: int) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module itself, each of which must have a row for each expert.

    Raises:
        DistplbError: if one does not.
    """
    found = dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])
    for key, tensor in found.items():
        if tensor.dim() == 0 or tensor.shape[0] != num_experts:
            raise DistplbError(
                f"{name}.{key} has shape {tuple(tensor.shape)}, not a row for each of {num_experts} experts, so it is "
                "not known how it belongs to them; describe the layer yourself with distplb.MoELayer"
            )
    return found


def _refuse_inside(name: str, module: nn.Module) -> None:
    """Refuse experts or a router that contain modules with parameters or buffers of their own.

    An adapter adds such modules; torch's parametrizations put the parameter there that they replace. Rows for experts
    in them would stay where they are when experts move.
    """
    own = {*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))}
    inside = [key for key, _ in (*module.named_parameters(), *module.named_buffers()) if key not in own]
    if inside:
        raise DistplbError(
            f"{name}.{inside[0]} belongs to a module inside {name}, as adapters and parametrizations add it, and it is "
            "not known how it belongs to the experts; attach adapters elsewhere, such as to the attention or beside "
            "the MoE block, or describe the layer yourself with distplb.MoELayer"
        )


def _num_groups(router: Any) -> int | None:
    """The number of groups, if the router limits its choice to some of them; else None."""
    groups = int(getattr(router, "num_group", 1))
    return groups if groups > 1 and int(router.topk_group) < groups else None


def _arguments_by_slot(table: Tensor, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Replace experts by slots in the arguments of the expert-parallel forward, which takes slots of all ranks."""
    hidden_states, chosen, *others = arguments
    return hidden_states, table[chosen], *others


# --- ranks and tokens --------------------------------------------------------------------------------------------


def _ranks_of_a_batch(part: nn.Module) -> int:
    """The number of ranks that route the same tokens: those that are tensor-parallel outside the experts."""
    configs = (getattr(module, "config", None) for module in part.modules())
    distributed = (getattr(config, "distributed_config", None) for config in configs)
    return next((int(config.tp_size or 1) for config in distributed if config is not None), 1)


def _share_of_tokens(experts: Mapping[str, Tensor], sharers: int) -> slice:
    """The tokens that this rank counts, so that none is counted twice."""
    mesh = _mesh(experts)
    if mesh is None or _EP_AXIS not in (mesh.mesh_dim_names or ()):
        return slice(None)
    # Ranks that route the same tokens are consecutive within an EP group.
    return slice(mesh.get_local_rank(_EP_AXIS) % sharers, None, sharers)


def _mesh(experts: Mapping[str, Any]) -> Any:
    """The device mesh of the experts; None if each rank holds plain tensors."""
    return getattr(next(iter(experts.values())), "device_mesh", None)


def _comm(group: Any, deadline: float) -> TorchComm | None:
    """The communicator of a group; None if this is the only process."""
    try:
        return TorchComm(group, deadline=deadline)
    except DistplbError:
        if group is not None:
            raise
        return None
