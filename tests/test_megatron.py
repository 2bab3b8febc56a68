"""Megatron-Core's own models, DDP and optimizers: what the adapter says of them, and that moves change nothing.

The processes are few and do much each, because Megatron-Core takes seconds to import.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn

import distplb

pytest.importorskip("megatron.core")

from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron_models import EXPERTS, Job, groups, on_cpu

from distplb.integrations import megatron

GPUS, ITERATIONS, EVERY, RANDOM_EVERY = 2, 30, 5, 4
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax before the choice": {"moe_router_pre_softmax": True},
    "sigmoid": {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5},
    "biased": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    "groups": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 3,
        "moe_router_group_topk": 1,
    },
}


def rebalancer_of(job: Job, **options: Any) -> distplb.Rebalancer:
    options = {"every": EVERY, "gpus_per_node": GPUS, "verify": "digest"} | options
    return megatron.rebalancer(job.chunks, job.optimizer, **options)


def drawn(layers: int, generator: torch.Generator, blocks: int = 1) -> distplb.Placement:
    """Any placement; or one in which whole blocks change places, and the experts within each."""
    size = EXPERTS // blocks
    tables = []
    for _ in range(layers):
        within = [torch.randperm(size, generator=generator) for _ in range(blocks)]
        order = torch.randperm(blocks, generator=generator).tolist()
        tables.append(torch.cat([within[block] + size * block for block in order]) if blocks > 1 else within[0])
    return distplb.Placement(torch.stack(tables), EXPERTS, GPUS)


def logical(job: Job, placement: distplb.Placement) -> dict[str, Tensor]:
    """What `Job.by_slot` tells, by expert."""
    slots = {moe.layer_number - 1: placement.inverse[i, :, 0] for i, moe in enumerate(job.moes)}
    return {key: value[slots[int(key.split()[1])]] for key, value in job.by_slot().items()}


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two runs, each tensor's relative to its largest element."""
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).abs().max() / one[k].abs().max().clamp(min=1e-30)) for k in one)


# --- a run with moves is the run without -------------------------------------------------------------------------


def trained(
    moves: bool, leave_behind: str | None = None, iterations: int = ITERATIONS, pipeline: int = 1, **options: Any
) -> dict[str, Tensor]:
    """Losses, norms and, at the end, all that experts have, by expert.

    Args:
        moves: rebalance, and move at random in between.
        leave_behind: "exp_avg" or "main": what is put back to where it was after each move at random.
        iterations: of the run.
        pipeline: stages.
        options: of Job.
    """
    told: list[distplb.RebalanceEvent] = []
    with on_cpu(options.get("precise", True)), groups(pipeline=pipeline):
        job = Job(**options)
        rebalancer = rebalancer_of(job, on_event=told.append)
        rebalancer.enabled = moves
        generator = torch.Generator().manual_seed(1)
        losses = []
        for iteration in range(iterations):
            losses.append(job.train(iteration))
            rebalancer.step()
            if moves and iteration % RANDOM_EVERY == 0 and job.moes:
                kept = stepped_on(job, leave_behind)
                rebalancer.apply(drawn(len(job.moes), generator, blocks=job.config.moe_router_num_groups or 1))
                for values, old in kept:
                    values.copy_(old)
        found = logical(job, rebalancer.placement) if job.moes else {}
    assert not moves or not job.moes or sum(event.slots_moved for event in told) > 0
    return {"losses": torch.tensor(losses), "norms": torch.tensor(job.norms)} | found


def stepped_on(job: Job, what: str | None) -> list[tuple[Tensor, Tensor]]:
    """Of all parameters, what the optimizers step on ("main") or keep for it, and copies of it."""
    inner = [one.optimizer for one in job.optimizer.chained_optimizers] if what else []
    tensors = [p for one in inner for group in one.param_groups for p in group["params"]]
    values = tensors if what == "main" else [one.state[p][what] for one in inner for p in one.state]
    return [(value.detach(), value.detach().clone()) for value in values]


# --- what the adapter says ---------------------------------------------------------------------------------------


def told_of_layers() -> dict[str, Any]:
    found: dict[str, Any] = {"ranges": [], "errors": {}}
    with on_cpu(True), groups(pipeline=2):
        for name, frequency in (("names", 1), ("names of a dense stage", [0, 1])):
            job = Job(num_layers=2, moe_layer_freq=frequency)
            found[name] = [layer.name for layer in megatron.moe_layers(job.chunks, job.optimizer)]
    with on_cpu(True), groups():
        job = Job(moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid")
        layers = megatron.moe_layers(job.chunks, job.optimizer)
        found["router"], found["num_groups"] = list(layers[0].router), layers[0].num_groups
        found["counts"] = counts_are_what_experts_get(job, layers)
        found["ties"] = [shares_of_ties(job) for _ in range(2)]
        found["ranges"] += [how_shards_lie(job, layers)]
    with on_cpu(False), groups():
        for distributed in (True, False):
            job = Job(precise=False, distributed=distributed)
            job.train(0)
            found["ranges"] += [how_shards_lie(job, megatron.moe_layers(job.chunks, job.optimizer))]
        found["errors"] = refusals(job)
        found["te"] = names_of_te(job)
    return found


def counts_are_what_experts_get(job: Job, layers: list[distplb.MoELayer]) -> bool:
    """Over the ranks of an EP group, against the tokens that the dispatcher brings to each expert."""
    counted: list[Tensor] = []
    received: list[Tensor] = []
    assert layers[0].counts is not None
    layers[0].counts(lambda counts, *, training: counted.append(counts) if training else None)
    moe = job.moes[0]
    moe.experts.register_forward_hook(lambda _, arguments, __: received.append(arguments[1].clone()))
    job.train(0, micro_batches=2)
    job.evaluate(1)
    assert (len(counted), len(received)) == (2, 3)
    for counts in counted:
        dist.all_reduce(counts, group=moe.ep_group)
    return all(torch.equal(c[moe.local_expert_indices], r) for c, r in zip(counted, received, strict=False))


def shares_of_ties(job: Job) -> float | None:
    layer = megatron.moe_layers(job.chunks, job.optimizer)[0]
    assert layer.counts is not None
    assert layer.ties is not None
    layer.counts(lambda counts, *, training: None)
    job.evaluate(0)
    share = layer.ties.take()
    with torch.no_grad():  # for the next call: all experts but one are alike
        job.moes[0].router.weight[1:] = job.moes[0].router.weight[1].clone()
    return share


def how_shards_lie(job: Job, layers: list[distplb.MoELayer]) -> list[tuple[str, int, int, bool]]:
    """Of each shard: its parameter, its range there, and whether its values are the parameter's in that range."""
    found = []
    for layer in layers:
        for key, shards in layer.shards.items():
            declared: Any = layer.experts[key] if key in layer.experts else [layer.router[key]]
            for number, (shard, parameter) in enumerate(zip(shards, declared, strict=True)):  # type: ignore[arg-type]
                if shard is None:
                    continue
                stop = shard.start + shard.values.numel()
                values = parameter.detach().flatten()[shard.start : stop]
                same = torch.equal(shard.values.detach().flatten().to(values.dtype), values)
                found.append(
                    (
                        f"{layer.name} {key} {number}",
                        shard.start,
                        stop,
                        same and as_megatron_says(job, parameter, shard),
                    )
                )
    return found


def as_megatron_says(job: Job, parameter: Any, shard: distplb.FlatShard) -> bool:
    for optimizer in job.optimizer.chained_optimizers:
        ranges = getattr(optimizer, "model_param_gbuf_map", {})
        if parameter in ranges:
            held = optimizer._get_model_param_range_map(parameter)["param"]
            return (held.start, held.end) == (shard.start, shard.start + shard.values.numel())
    return shard.start == 0 and shard.values is parameter.main_param


def refusals(job: Job) -> dict[str, str]:
    """What is said of each kind of layer and optimizer that is not moved."""
    found: dict[str, str] = {}

    def told(what: str, *arguments: Any) -> None:
        with pytest.raises(distplb.DistplbError) as caught:
            megatron.moe_layers(*(arguments or (job.chunks, job.optimizer)))
        found[what] = str(caught.value)

    for option, value in (
        ("fp8", "e4m3"),
        ("fp4", "e2m1"),
        ("cuda_graph_impl", "local"),
        ("moe_latent_size", 8),
        ("moe_shared_expert_overlap", True),
        ("moe_enable_routing_replay", True),
    ):
        kept = getattr(job.config, option)
        setattr(job.config, option, value)
        told(option)
        setattr(job.config, option, kept)
    moe = job.moes[0]
    kept, moe.experts.tp_group = moe.experts.tp_group, SimpleNamespace(size=lambda: 2)
    told("expert tensor parallelism")
    moe.experts.tp_group = kept
    moe.experts.register_buffer("average", torch.zeros(3))
    told("unknown tensor of the experts")
    del moe.experts.average
    moe.router.register_buffer("hits", torch.zeros(EXPERTS))
    told("unknown tensor of the router")
    del moe.router.hits
    inner = job.optimizer.chained_optimizers[0]
    inner.config.use_precision_aware_optimizer = True
    told("precision-aware")
    inner.config.use_precision_aware_optimizer = False
    told("layer-wise", job.chunks, LayerWiseDistributedOptimizer.__new__(LayerWiseDistributedOptimizer))
    kept, inner.optimizer = inner.optimizer, HybridDeviceOptimizer.__new__(HybridDeviceOptimizer)
    told("offloaded")
    inner.optimizer = kept
    told("no optimizer", job.chunks, object())
    told("twice", [job.model, job.model], job.optimizer)
    told("no MoE model", nn.Sequential(nn.Linear(2, 2)), None)
    sharded = type("FullyShardedDataParallel", (nn.Module,), {})()
    sharded.module = job.model.module
    told("fully sharded", [sharded], job.optimizer)
    return found


def names_of_te(job: Job) -> bool:
    """Transformer Engine is not there: an empty TEGroupedMLP with parameters of its names, more than ten."""
    moe, count = job.moes[0], 11
    experts = TEGroupedMLP.__new__(TEGroupedMLP)
    nn.Module.__init__(experts)
    experts.tp_group = moe.experts.tp_group
    for linear in ("linear_fc1", "linear_fc2"):
        experts.add_module(linear, nn.Module())
        for number in range(count):
            getattr(experts, linear).register_parameter(
                f"weight{number}", nn.Parameter(torch.full((2,), float(number)))
            )
    moe.experts, moe.num_local_experts = experts, count
    found = megatron.moe_layers(job.chunks)[0].experts
    assert list(found) == ["linear_fc1.weight", "linear_fc2.weight"]
    return all([int(one[0]) for one in weights] == list(range(count)) for weights in found.values())  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    return on_ranks(4, told_of_layers)


def test_layers_have_the_names_of_the_whole_model(told: list[dict[str, Any]]) -> None:
    first, second = ["decoder.layers.0.mlp"], ["decoder.layers.1.mlp"]
    assert [one["names"] for one in told] == [first, first, second, second]
    assert [one["names of a dense stage"] for one in told] == [[], [], second, second]


def test_layers_of_multi_token_prediction_keep_their_own_numbers() -> None:
    assert megatron._global_name("decoder.layers.1.mlp", 4) == "decoder.layers.3.mlp"
    assert megatron._global_name("mtp.layers.0.transformer_layer.mlp", 4) == "mtp.layers.0.transformer_layer.mlp"


def test_a_layer_has_all_that_the_router_keeps_by_expert(told: list[dict[str, Any]]) -> None:
    for one in told:
        assert one["router"] == ["weight", "expert_bias", "local_tokens_per_expert"]
        assert one["num_groups"] is None


def test_counts_are_the_tokens_that_the_experts_get(told: list[dict[str, Any]]) -> None:
    assert all(one["counts"] for one in told)


def test_ties_are_seen(told: list[dict[str, Any]]) -> None:
    assert all(one["ties"][0] == 0 and one["ties"][1] > 0.5 for one in told)


def test_shards_are_where_the_optimizers_have_them(told: list[dict[str, Any]]) -> None:
    for kind in range(3):
        lying = [one["ranges"][kind] for one in told]
        assert all(same for shards in lying for *_, same in shards)
        # Ranks 0 and 2 hold the same experts, and so do 1 and 3; all four hold the router.
        for pair in ((0, 2), (1, 3)):
            for key in {name for rank in pair for name, *_ in lying[rank] if "linear" in name}:
                ranges = sorted((start, stop) for rank in pair for name, start, stop, _ in lying[rank] if name == key)
                whole = 384 if "fc1" in key else 192
                assert [whole, whole] == [stop for _, stop in ranges] if kind == 2 else covers(ranges, whole)
    cut = {name for name, start, _, _ in told[0]["ranges"][0] + told[2]["ranges"][0] if start}
    assert any("linear" in name for name in cut), "no shard begins within an expert, so that nothing is shown of it"


def covers(ranges: list[tuple[int, int]], whole: int) -> bool:
    stops = [0, *(stop for _, stop in ranges)]
    return [start for start, _ in ranges] == stops[:-1] and stops[-1] == whole


def test_tensors_of_transformer_engine_are_in_the_order_of_their_numbers(told: list[dict[str, Any]]) -> None:
    assert all(one["te"] for one in told)


@pytest.mark.parametrize(
    ("what", "wording"),
    [
        ("fp8", "decoder.layers.0.mlp has fp8"),
        ("fp4", "decoder.layers.0.mlp has fp4"),
        ("cuda_graph_impl", "nothing is counted"),
        ("moe_latent_size", "never run"),
        ("moe_shared_expert_overlap", "never run"),
        ("moe_enable_routing_replay", "recorded choices"),
        ("expert tensor parallelism", "a part of every row"),
        ("unknown tensor of the experts", "['average'] is not understood"),
        ("unknown tensor of the router", "router.hits is not known"),
        ("precision-aware", "forms of its own"),
        ("layer-wise", "deals whole parameters"),
        ("offloaded", "do not offload it"),
        ("no optimizer", "object is not understood"),
        ("twice", "two MoE layers are called 'decoder.layers.0.mlp'"),
        ("no MoE model", "no MoE layer of Megatron-Core was understood"),
        ("fully sharded", "whose shards of experts are not understood"),
    ],
)
def test_what_cannot_be_moved_is_refused(told: list[dict[str, Any]], what: str, wording: str) -> None:
    assert all(wording in one["errors"][what] for one in told)
