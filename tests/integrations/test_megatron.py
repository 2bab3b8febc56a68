"""Megatron-Core's own models, DDP and optimizers: how the adapter describes them, and that moves change nothing.

A few processes do all the work, because importing Megatron-Core takes seconds.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import FREE, in_values
from ranks import on_ranks
from torch import Tensor, nn

import distplb

pytest.importorskip("megatron.core")

from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron_models import EXPERTS, Job, groups

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
        "num_moe_experts": 8,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
    },
}


def rebalancer_of(job: Job, **options: Any) -> distplb.Rebalancer:
    options = {"every": EVERY, "gpus_per_node": GPUS, "verify": "digest", "engine": "reference"} | options
    options = {"model": FREE, "stop_loss": 0} | options
    return megatron.rebalancer(job.chunks, job.optimizer, **in_values(options))


def drawn(job: Job, generator: torch.Generator) -> distplb.Placement:
    """A random legal placement: with groups, whole groups change places, and so do experts within each."""
    experts, groups_of = job.config.num_moe_experts, job.config.moe_router_num_groups or 1
    size, tables = experts // groups_of, []
    for _ in job.moes:
        order = torch.randperm(groups_of, generator=generator).tolist()
        tables.append(torch.cat([torch.randperm(size, generator=generator) + size * group for group in order]))
    return distplb.Placement(torch.stack(tables), experts, GPUS)


def logical(job: Job, placement: distplb.Placement) -> dict[str, Tensor]:
    """The values of `Job.by_slot`, by expert."""
    slots = {moe.layer_number - 1: placement.inverse[i, :, 0] for i, moe in enumerate(job.moes)}
    return {key: value[slots[int(key.split()[1])]] for key, value in job.by_slot().items()}


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference between two runs, relative to the largest element of its tensor."""
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).abs().max() / one[k].abs().max().clamp(min=1e-30)) for k in one)


# --- a run with moves is the run without -------------------------------------------------------------------------


def trained(
    moves: bool,
    leave_behind: str | None = None,
    iterations: int = ITERATIONS,
    micro_batches: int = 1,
    pipeline: int = 1,
    **options: Any,
) -> dict[str, Tensor]:
    """Losses, norms and everything that experts have at the end, by expert.

    Args:
        moves: whether to rebalance, with random moves in between.
        leave_behind: what is put back in its old place after each random move: "exp_avg" or "main".
        iterations: number of iterations.
        micro_batches: micro-batches per iteration.
        pipeline: number of pipeline stages.
        options: options of `Job`.
    """
    told: list[distplb.RebalanceEvent] = []
    with groups(pipeline=pipeline):
        job = Job(**options)
        rebalancer = rebalancer_of(job, on_event=told.append)
        rebalancer.enabled = moves
        generator = torch.Generator().manual_seed(1)
        losses = []
        for iteration in range(iterations):
            losses.append(job.train(iteration, micro_batches))
            rebalancer.step()
            if moves and iteration % RANDOM_EVERY == 0 and job.moes:
                kept = stepped_on(job, leave_behind)
                rebalancer.apply(drawn(job, generator))
                for values, old in kept:
                    values.copy_(old)
        found = logical(job, rebalancer.placement) if job.moes else {}
    assert not moves or not job.moes or sum(event.slots_moved for event in told) > 0
    return {"losses": torch.tensor(losses), "norms": torch.tensor(job.norms)} | found


def stepped_on(job: Job, what: str | None) -> list[tuple[Tensor, Tensor]]:
    """The tensors that the optimizers step on ("main"), or one kind of their state; each with a copy."""
    inner = [one.optimizer for one in job.optimizer.chained_optimizers] if what else []
    tensors = [p for one in inner for group in one.param_groups for p in group["params"]]
    values = tensors if what == "main" else [one.state[p][what] for one in inner for p in one.state]
    return [(value.detach(), value.detach().clone()) for value in values]


def two_ranks() -> dict[str, Any]:
    found: dict[str, Any] = {name: logits_moved(options) for name, options in ROUTERS.items()}
    found["all-gather dispatcher"] = logits_moved({"moe_token_dispatcher_type": "allgather"})
    found["GroupedMLP"] = logits_moved({"grouped": True})
    found["illegal"] = illegal_groups()
    for name, options in (
        ("one for all", {"distributed": False}),
        ("groups", ROUTERS["groups"]),
        ("grouped", {"grouped": True}),
    ):
        few = ITERATIONS if name == "one for all" else 10
        quiet = trained(moves=False, iterations=few, num_layers=2, **options)
        found[f"run, {name}"] = furthest(quiet, trained(moves=True, iterations=few, num_layers=2, **options))
        found[f"learned, {name}"] = quiet["losses"]
    return found


def logits_moved(options: dict[str, Any]) -> tuple[float, float]:
    """How far logits change after experts have moved, and after their router alone has been put back."""
    with groups():
        job = Job(num_layers=2, **options)
        job.train(0)
        rebalancer = rebalancer_of(job)
        before, generator = job.logits(), torch.Generator().manual_seed(5)
        furthest_off = 0.0
        for _ in range(3):
            rebalancer.apply(drawn(job, generator))
            furthest_off = max(furthest_off, float((job.logits() - before).abs().max()))
        with torch.no_grad():  # the router alone is put back
            job.moes[0].router.weight.copy_(job.moes[0].router.weight[rebalancer.placement.inverse[0, :, 0]])
        return furthest_off, float((job.logits() - before).abs().max())


def illegal_groups() -> tuple[str, bool]:
    with groups():
        job = Job(num_layers=2, **ROUTERS["groups"])
        job.train(0)
        rebalancer, before = rebalancer_of(job), job.by_slot()
        with pytest.raises(distplb.DistplbError, match=r"after Megatron's optimizer.step"):
            rebalancer.attach()
        table = torch.arange(8).repeat(2, 1)
        table[1, 1], table[1, 2] = 2, 1  # of two groups
        with pytest.raises(distplb.DistplbError) as caught:
            rebalancer.apply(distplb.Placement(table, 8, GPUS))
        after = job.by_slot()
        return str(caught.value), all(torch.equal(before[key], after[key]) for key in before)


@pytest.fixture(scope="module")
def at_two() -> list[dict[str, Any]]:
    return on_ranks(2, two_ranks, deadline=200)


@pytest.mark.parametrize("router", [*ROUTERS, "all-gather dispatcher", "GroupedMLP"])
def test_logits_are_what_they_were_after_moves_and_not_if_the_router_stays(
    at_two: list[dict[str, Any]], router: str
) -> None:
    for same, stayed in (one[router] for one in at_two):
        assert same <= 1e-10
        assert stayed > 1e-3


def test_experts_do_not_leave_their_groups(at_two: list[dict[str, Any]]) -> None:
    for wording, untouched in (one["illegal"] for one in at_two):
        assert "group" in wording
        assert untouched


@pytest.mark.parametrize("run", ["one for all", "groups", "grouped"])
def test_a_run_on_two_ranks_with_moves_is_the_run_without(at_two: list[dict[str, Any]], run: str) -> None:
    for one in at_two:
        assert one[f"learned, {run}"][-1] < 0.98 * one[f"learned, {run}"][0]
        assert one[f"run, {run}"] <= 1e-8


def four_ranks() -> dict[str, Any]:
    found = told_of_layers()
    quiet = trained(moves=False)
    found["same"], found["losses of the run"] = furthest(quiet, trained(moves=True)), quiet["losses"]
    found["moments left behind"] = furthest_loss(quiet, trained(moves=True, leave_behind="exp_avg", iterations=12))
    for name, options in {
        "overlapped": {"overlap": True},
        "pipeline": {"pipeline": 2, "num_layers": 2},
        "a dense stage": {"pipeline": 2, "num_layers": 2, "moe_layer_freq": [0, 1]},
    }.items():
        few: dict[str, Any] = {"iterations": 6, "micro_batches": 2, **options}
        found[name] = furthest(trained(moves=False, **few), trained(moves=True, **few))
    few = {"precision": "mixed", "num_layers": 1, "iterations": 10}
    quiet = trained(moves=False, **few)
    found["mixed"] = furthest_loss(quiet, trained(moves=True, **few))
    found["main parameters left behind"] = furthest_loss(quiet, trained(moves=True, leave_behind="main", **few))
    found["aligned"] = aligned()
    return found


def furthest_loss(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest relative difference of the losses, up to the end of the shorter run."""
    return max(float((a - b).abs() / a) for a, b in zip(one["losses"], other["losses"], strict=False))


def many_moves(moves: int) -> bool:
    """Whether experts in bfloat16, with float32 main parameters and moments, are unchanged to the bit."""
    with groups():
        biased = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
        job = Job(precision="bfloat16", num_layers=1, **biased)
        for iteration in range(2):
            job.train(iteration)
        rebalancer, generator = rebalancer_of(job, verify="off"), torch.Generator().manual_seed(3)
        before, same = logical(job, rebalancer.placement), True
        for number in range(moves):
            rebalancer.apply(drawn(job, generator))
            if number % 20 == 19:
                after = logical(job, rebalancer.placement)
                same = same and all(torch.equal(before[key], after[key]) for key in before)
        with rebalancer.in_logical_order():  # as for a checkpoint: no table is needed to read it
            after = job.by_slot()
        return same and all(torch.equal(before[key], after[key]) for key in before)


def aligned() -> tuple[list[list[int]], int]:
    told: list[distplb.RebalanceEvent] = []
    with groups():
        job = Job(num_layers=1)
        rebalancer = rebalancer_of(job, keep_shards_aligned=True, on_event=told.append, every=2)
        for iteration in range(4):
            job.train(iteration, micro_batches=1)
            rebalancer.step()
        return rebalancer.placement.expert_of_slot.tolist(), sum(event.slots_moved for event in told)


@pytest.fixture(scope="module")
def at_four() -> list[dict[str, Any]]:
    return on_ranks(4, four_ranks, deadline=300)


def test_a_run_with_sharded_state_and_moves_is_the_run_without(at_four: list[dict[str, Any]]) -> None:
    for one in at_four:
        assert one["losses of the run"][-1] < 0.9 * one["losses of the run"][0]
        assert one["same"] <= 1e-8
        assert one["moments left behind"] > 1e-2


def test_parameters_that_are_gathered_late_are_whole_when_they_move(at_four: list[dict[str, Any]]) -> None:
    assert all(one["overlapped"] <= 1e-8 for one in at_four)


def test_main_parameters_move_with_the_parameters(at_four: list[dict[str, Any]]) -> None:
    for one in at_four:
        assert one["mixed"] <= 1e-3
        assert one["main parameters left behind"] > 1e-2


def test_each_stage_of_a_pipeline_rebalances_its_layers(at_four: list[dict[str, Any]]) -> None:
    assert all(one["pipeline"] <= 1e-8 for one in at_four)
    assert all(one["a dense stage"] <= 1e-8 for one in at_four)


@pytest.mark.parametrize("moves", [40, pytest.param(200, marks=pytest.mark.long)])
def test_many_moves_leave_every_expert_as_it_was(moves: int) -> None:
    assert all(on_ranks(4, many_moves, moves, deadline=200))


def test_aligned_experts_keep_their_number_within_the_gpu(at_four: list[dict[str, Any]]) -> None:
    slots_per_gpu = EXPERTS // GPUS
    for table, moved in (one["aligned"] for one in at_four):
        assert moved
        for experts in table:
            assert [expert % slots_per_gpu for expert in experts] == [slot % slots_per_gpu for slot in range(EXPERTS)]


# --- what the adapter describes ----------------------------------------------------------------------------------


def told_of_layers() -> dict[str, Any]:
    found: dict[str, Any] = {"ranges": [], "errors": {}}
    with groups(pipeline=2):
        for name, frequency in (("names", 1), ("names of a dense stage", [0, 1])):
            job = Job(num_layers=2, moe_layer_freq=frequency)
            found[name] = [layer.name for layer in megatron.moe_layers(job.chunks, job.optimizer)]
    with groups():
        job = Job(moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid")
        layers = megatron.moe_layers(job.chunks, job.optimizer)
        found["router"], found["num_groups"] = list(layers[0].router), layers[0].num_groups
        found["counts"] = counts_are_what_experts_get(job, layers)
        found["ties"] = [shares_of_ties(job) for _ in range(2)]
        found["ranges"] += [how_shards_lie(job, layers)]
    with groups():
        for distributed in (True, False):
            job = Job(precision="bfloat16", distributed=distributed)
            job.train(0)
            found["ranges"] += [how_shards_lie(job, megatron.moe_layers(job.chunks, job.optimizer))]
        found["errors"] = refusals(job)
        found["te"] = names_of_te(job)
    return found


def counts_are_what_experts_get(job: Job, layers: list[distplb.MoELayer]) -> bool:
    """Compare counts, summed over an EP group, with the tokens that the dispatcher brings to each expert."""
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
    """For each shard: its parameter, its range in it, and whether its values are the parameter's in that range."""
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
    """The error for each kind of layer and optimizer that is refused."""
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
    """Without Transformer Engine: an empty TEGroupedMLP with more than ten parameters of the names that it uses."""
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


def test_layers_have_the_names_of_the_whole_model(at_four: list[dict[str, Any]]) -> None:
    first, second = ["decoder.layers.0.mlp"], ["decoder.layers.1.mlp"]
    assert [one["names"] for one in at_four] == [first, first, second, second]
    assert [one["names of a dense stage"] for one in at_four] == [[], [], second, second]


def test_layers_of_multi_token_prediction_keep_their_own_numbers() -> None:
    assert megatron._global_name("decoder.layers.1.mlp", 4) == "decoder.layers.3.mlp"
    assert megatron._global_name("mtp.layers.0.transformer_layer.mlp", 4) == "mtp.layers.0.transformer_layer.mlp"


def test_a_layer_has_all_that_the_router_keeps_by_expert(at_four: list[dict[str, Any]]) -> None:
    for one in at_four:
        assert one["router"] == ["weight", "expert_bias", "local_tokens_per_expert"]
        assert one["num_groups"] is None


def test_counts_are_the_tokens_that_the_experts_get(at_four: list[dict[str, Any]]) -> None:
    assert all(one["counts"] for one in at_four)


def test_ties_are_seen(at_four: list[dict[str, Any]]) -> None:
    assert all(one["ties"][0] == 0 and one["ties"][1] > 0.5 for one in at_four)


def test_shards_are_where_the_optimizers_have_them(at_four: list[dict[str, Any]]) -> None:
    for kind in range(3):
        lying = [one["ranges"][kind] for one in at_four]
        assert all(same for shards in lying for *_, same in shards)
        # Ranks 0 and 2 hold the same experts, and so do 1 and 3; all four hold the router.
        for pair in ((0, 2), (1, 3)):
            for key in {name for rank in pair for name, *_ in lying[rank] if "linear" in name}:
                ranges = sorted((start, stop) for rank in pair for name, start, stop, _ in lying[rank] if name == key)
                whole = 384 if "fc1" in key else 192
                assert [whole, whole] == [stop for _, stop in ranges] if kind == 2 else covers(ranges, whole)
    cut = {name for name, start, _, _ in at_four[0]["ranges"][0] + at_four[2]["ranges"][0] if start}
    assert any("linear" in name for name in cut), "no shard begins within an expert, so that case is not tested"


def covers(ranges: list[tuple[int, int]], whole: int) -> bool:
    stops = [0, *(stop for _, stop in ranges)]
    return [start for start, _ in ranges] == stops[:-1] and stops[-1] == whole


def test_tensors_of_transformer_engine_are_in_the_order_of_their_numbers(at_four: list[dict[str, Any]]) -> None:
    assert all(one["te"] for one in at_four)


@pytest.mark.parametrize(
    ("what", "wording"),
    [
        ("fp8", "decoder.layers.0.mlp uses fp8"),
        ("fp4", "decoder.layers.0.mlp uses fp4"),
        ("cuda_graph_impl", "nothing is counted"),
        ("moe_latent_size", "never run"),
        ("moe_shared_expert_overlap", "never run"),
        ("moe_enable_routing_replay", "recorded choices"),
        ("expert tensor parallelism", "a part of every row"),
        ("unknown tensor of the experts", "with ['average'], which is not understood"),
        ("unknown tensor of the router", "router.hits is not known"),
        ("precision-aware", "formats of its own"),
        ("layer-wise", "distributes whole parameters"),
        ("offloaded", "do not offload it"),
        ("no optimizer", "object is not understood"),
        ("twice", "two MoE layers are named 'decoder.layers.0.mlp'"),
        ("no MoE model", "no MoE layer of Megatron-Core was recognised"),
        ("fully sharded", "whose shards of experts are not understood"),
    ],
)
def test_what_cannot_be_moved_is_refused(at_four: list[dict[str, Any]], what: str, wording: str) -> None:
    assert all(wording in one["errors"][what] for one in at_four)
