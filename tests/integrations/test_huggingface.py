"""Tiny models of Hugging Face Transformers compute and train the same wherever their experts are.

Shapes: L layers, E experts, P slots, M GPUs.
"""

from __future__ import annotations

import copy
import functools
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import FREE
from ranks import on_ranks
from torch import Tensor, nn

import distplb
from distplb import DistplbError, MoELayer, Moves, Placement, Record

pytest.importorskip("transformers")

import transformers
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from distplb.integrations import huggingface

VOCABULARY, LAYERS, ITERATIONS, EVERY, RANDOM_EVERY = 64, 2, 30, 5, 7
EXPERTS = 12  # the first dim of no other tensor
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
DEEPSEEK = {
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 0,
    "n_shared_experts": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 6,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": EXPERTS}),
    "qwen3_moe": (transformers.Qwen3MoeConfig, {"num_experts": EXPERTS, "moe_intermediate_size": 24, "head_dim": 8}),
    "olmoe": (transformers.OlmoeConfig, {"num_experts": EXPERTS}),
    "deepseek_v3": (transformers.DeepseekV3Config, DEEPSEEK | {"n_routed_experts": EXPERTS, "num_experts_per_tok": 3}),
    "gpt_oss": (transformers.GptOssConfig, {"num_local_experts": EXPERTS, "head_dim": 8}),
}
MODELS = list(CONFIGS)
MODES = ["permute", "remap"]
# Routers choose and weigh in float32 even in a float64 model, so sums over experts are rounded in another order; only
# the router of gpt-oss keeps the model's precision.
CLOSE = dict.fromkeys(MODELS, 1e-6) | {"gpt_oss": 1e-12}


def made(name: str, *, implementation: str | None = None, **options: Any) -> Any:
    """A model whose every weight, router bias included, is random and large enough to tell experts apart."""
    kind, sizes = CONFIGS[name]
    torch.manual_seed(0)
    config = kind(**(SIZES | sizes | options))
    model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" not in key and "inv_freq" not in key:
                tensor.normal_(std=0.2)
    return model


def batch(iteration: int, rows: slice = slice(None)) -> Tensor:
    """Tokens `[4, 12]`, or some rows of them; some tokens are far more frequent than others, so that loads differ."""
    generator = torch.Generator().manual_seed(iteration)
    return (VOCABULARY * torch.rand(4, 12, generator=generator) ** 3).long()[rows]


def random_placement(like: Placement, generator: torch.Generator, groups: int = 1) -> Placement:
    """Shuffles whole groups over blocks, and the experts within each block."""
    size, tables = EXPERTS // groups, []
    for _ in range(like.num_layers):
        blocks = torch.randperm(groups, generator=generator).tolist()
        tables.append(torch.cat([size * block + torch.randperm(size, generator=generator) for block in blocks]))
    return Placement(torch.stack(tables), EXPERTS, like.num_gpus)


def groups_of(name: str, mode: str) -> int:
    """The number of groups that placements must keep whole."""
    return DEEPSEEK["n_group"] if (name, mode) == ("deepseek_v3", "permute") else 1


def rebalanced(model: nn.Module, mode: str = "permute") -> distplb.Rebalancer:
    optimizer = torch.optim.SGD(model.parameters())
    return huggingface.rebalancer(
        model,
        optimizer,
        every=EVERY,
        mode=mode,
        moves=Moves(model=FREE),
    )  # type: ignore[arg-type]  # one of MODES


@torch.no_grad()
def permuted_by_hand(layer: MoELayer, order: Tensor, router: bool = True) -> None:
    for tensor in [*layer.experts.values(), *(layer.router.values() if router else ())]:
        tensor.copy_(tensor[order].clone())  # type: ignore[union-attr]  # of this adapter: tensors


# --- one forward --------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(batch(0)).logits
    return found


def furthest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_stay_wherever_the_experts_lie(name: str, mode: str) -> None:
    model = made(name)
    rebalancer, layer = rebalanced(model, mode), huggingface.moe_layers(model)[0]
    before, generator = logits(model), torch.Generator().manual_seed(1)
    for _ in range(4):
        weights = copy.deepcopy(model.state_dict())
        rebalancer.apply(random_placement(rebalancer.placement, generator, groups_of(name, mode)))
        changed = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, weights[key])]
        assert sum(".experts." in key for key in changed) == LAYERS * len(layer.experts)
        assert sum(".experts." not in key for key in changed) == (
            LAYERS * len(layer.router) if mode == "permute" else 0
        )
        assert furthest(logits(model), before) <= 1e-5
    rebalancer.restore()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", MODELS)
def test_a_router_row_left_behind_shows_in_the_logits(name: str) -> None:
    model = made(name)
    before, layer = logits(model), huggingface.moe_layers(model)[0]
    permuted_by_hand(layer, torch.arange(EXPERTS).roll(1), router=False)
    assert furthest(logits(model), before) > 1e-3


def test_groups_are_not_torn_apart_and_would_show_in_the_logits() -> None:
    model = made("deepseek_v3")
    rebalancer, layer = rebalanced(model), huggingface.moe_layers(model)[0]
    assert layer.num_groups == 4
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    swapped = torch.arange(EXPERTS)
    swapped[[2, 3]] = swapped[[3, 2]]  # of groups 0 and 1
    with pytest.raises(DistplbError, match="group"):
        rebalancer.apply(Placement(swapped.repeat(LAYERS, 1), EXPERTS, 1))
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    assert rebalancer.placement == Placement.contiguous(LAYERS, EXPERTS, 1)
    permuted_by_hand(layer, swapped)
    assert furthest(logits(model), before) > 1e-3


def test_a_table_allows_groups_to_be_torn_apart() -> None:
    model = made("deepseek_v3")
    rebalancer = rebalanced(model, "remap")
    before = logits(model)
    rebalancer.apply(Placement(torch.arange(EXPERTS).roll(3).repeat(LAYERS, 1), EXPERTS, 1))
    assert furthest(logits(model), before) <= 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_in_logical_order_is_the_model_for_those_who_know_nothing_of_moves(
    mode: str, tmp_path: Path
) -> None:
    model = made("deepseek_v3")
    rebalancer, before = rebalanced(model, mode), logits(model)
    rebalancer.apply(
        random_placement(rebalancer.placement, torch.Generator().manual_seed(1), groups_of("deepseek_v3", mode))
    )
    model.save_pretrained(tmp_path / "as it lies")
    with rebalancer.in_logical_order():
        model.save_pretrained(tmp_path / "logical")
    assert furthest(logits(model), before) <= 1e-5
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "logical")), before)
    if mode == "remap":
        assert furthest(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "as it lies")), before) > 1e-3


# --- what is found, and what is refused ---------------------------------------------------------------------------


class Bigger(nn.Module):
    """A user's own module around two of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.text = made("olmoe").model
        self.experts = nn.ModuleList([made("mixtral")])


def test_layers_are_found_inside_of_other_modules_by_their_full_names() -> None:
    layers = huggingface.moe_layers(Bigger())
    inside = [f"text.layers.{i}.mlp" for i in range(LAYERS)] + [
        f"experts.0.model.layers.{i}.mlp" for i in range(LAYERS)
    ]
    assert [layer.name for layer in layers] == inside
    parts = [made("gpt_oss").model.layers[i] for i in range(LAYERS)]
    assert [set(layer.router) for layer in huggingface.moe_layers(parts)] == [{"weight", "bias"}] * LAYERS


@pytest.mark.parametrize("name", MODELS)
def test_everything_with_a_row_for_each_expert_is_declared(name: str) -> None:
    model = made(name)
    layers = huggingface.moe_layers(model)
    declared = {id(tensor) for layer in layers for tensor in [*layer.experts.values(), *layer.router.values()]}
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    with_rows = {key for key, tensor in tensors.items() if tensor.shape[:1] == (EXPERTS,)}
    assert {key for key, tensor in tensors.items() if id(tensor) in declared} == with_rows
    assert len(with_rows) >= 3 * LAYERS


def test_a_model_without_known_layers_tells_what_was_looked_for_and_found() -> None:
    class OwnRouter(nn.Linear):
        pass

    with pytest.raises(DistplbError) as error:
        huggingface.moe_layers(nn.Sequential(nn.Linear(2, 2), OwnRouter(2, 2)))
    assert "Looked for: MixtralSparseMoeBlock with .gate and .experts; " in str(error.value)
    assert "OwnRouter × 1 (among 3 modules)" in str(error.value)


def test_a_block_that_differs_from_what_is_known_of_its_class_is_refused() -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    class Scaled(MixtralSparseMoeBlock):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 2 * super().forward(hidden_states)

    class Named(MixtralSparseMoeBlock):
        pass

    model = made("mixtral")
    config, layer = model.config, model.model.layers[0]
    layer.mlp = Named(config)
    assert len(huggingface.moe_layers(model)) == LAYERS
    layer.mlp = Scaled(config)
    with pytest.raises(
        DistplbError, match=r"layers\.0\.mlp is a MixtralSparseMoeBlock, but the forward of its .*Scaled is"
    ):
        huggingface.moe_layers(model)
    layer.mlp = Named(config)
    layer.mlp.gate.forward = lambda hidden_states: hidden_states
    with pytest.raises(DistplbError, match="the forward of its MixtralTopKRouter is defined in this object"):
        huggingface.moe_layers(model)
    layer.mlp = Named(config)
    layer.mlp.gate.temperature = nn.Parameter(torch.ones(1))
    with pytest.raises(DistplbError, match=r"layers\.0\.mlp\.gate\.temperature has shape \(1,\), not a row for each"):
        huggingface.moe_layers(model)
    with pytest.raises(DistplbError, match="mode is 'both'; pass 'permute' or 'remap'"):
        huggingface.moe_layers(model, mode="both")


def test_a_loss_that_ties_experts_of_all_layers_by_their_numbers_is_refused_but_for_a_table() -> None:
    """Permuted experts changed the auxiliary loss, because transformers multiplies sums over all layers."""
    model = made("mixtral", output_router_logits=True)
    with pytest.raises(DistplbError, match=r"MixtralForCausalLM is trained with .*pass mode='remap'"):
        huggingface.moe_layers(model)
    rebalancer = rebalanced(model, "remap")
    before = model(batch(0))
    rebalancer.apply(random_placement(rebalancer.placement, torch.Generator().manual_seed(1)))
    assert model(batch(0)).aux_loss == before.aux_loss

    model = made("mixtral")
    rebalancer = rebalanced(model.eval())
    permuted_by_hand(huggingface.moe_layers(model)[0], torch.arange(EXPERTS).flip(0))
    after = model(batch(0), output_router_logits=True)
    assert abs(after.aux_loss - before.aux_loss) > 1e-3
    with pytest.raises(DistplbError, match=r"router_aux_loss_coef 0\.001"):
        model.train()(batch(0), output_router_logits=True)
    model(batch(0))
    rebalancer.close()
    model(batch(0), output_router_logits=True)  # experts are no longer permuted


# --- hooks --------------------------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> Counter[tuple[str, str]]:
    """The number of hooks of each kind in each module."""
    kinds = [kind for kind in vars(model) if kind.endswith("_hooks")]
    found = {(name, kind): len(getattr(module, kind)) for name, module in model.named_modules() for kind in kinds}
    return Counter({place: count for place, count in found.items() if count})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_describing_a_model_hooks_nothing_but_its_table_and_closing_ends_the_rest(name: str, mode: str) -> None:
    """Each description added its own hooks for ties, lookup and guard, which nothing removed."""
    model = made(name)
    before = hooks(model)
    described = before.copy()
    if mode == "remap":
        described += Counter({(f"model.layers.{i}.mlp.experts", "_forward_pre_hooks"): 1 for i in range(LAYERS)})
    for _ in range(2):
        huggingface.moe_layers(model, mode=mode)  # type: ignore[arg-type]  # one of MODES
        assert hooks(model) == described
    counting = []
    for _ in range(2):
        rebalancer = rebalanced(model, mode)
        counting.append(hooks(model))
        assert counting[-1] > described
        rebalancer.close()
        assert hooks(model) == described
    assert counting[0] == counting[1]
    router = f"model.layers.0.mlp.{'router' if name == 'gpt_oss' else 'gate'}"
    assert counting[0][router, "_forward_hooks"] == 1
    has_guard = counting[0]["", "_forward_pre_hooks"] > 0
    assert has_guard == (mode == "permute" and hasattr(model, "router_aux_loss_coef"))


def test_a_model_that_was_only_described_may_ask_for_the_loss_over_layers() -> None:
    model = made("mixtral")
    huggingface.moe_layers(model)
    model.train()(batch(0), output_router_logits=True)


def test_of_two_rebalancers_each_guards_the_loss_as_long_as_it_counts() -> None:
    model = made("mixtral")
    parts = [huggingface.moe_layers(model)[i : i + 1] for i in range(LAYERS)]
    optimizer = torch.optim.SGD(model.parameters())
    one, other = (distplb.Rebalancer(part, optimizer, topology=distplb.Topology(1, 1), every=9) for part in parts)
    model.train()
    for rebalancer in (one, other):
        with pytest.raises(DistplbError, match="router_aux_loss_coef"):
            model(batch(0), output_router_logits=True)
        rebalancer.close()
    model(batch(0), output_router_logits=True)


def test_tokens_are_looked_up_once_however_often_a_model_is_described() -> None:
    """A second description put a second table behind the first: tokens went to the slot of the slot of their expert."""
    model = made("deepseek_v3")
    before = logits(model)
    first = huggingface.moe_layers(model, mode="remap")
    rebalancer = rebalanced(model, "remap")
    again = huggingface.moe_layers(model, mode="remap")
    rebalancer.apply(Placement(torch.arange(EXPERTS).roll(3).repeat(LAYERS, 1), EXPERTS, 1))
    for layers in (first, again):
        for layer in layers:
            assert layer.slot_of_expert is not None
            assert layer.slot_of_expert.tolist() == torch.arange(EXPERTS).roll(-3).tolist()
    for one, other in zip(first, again, strict=True):
        assert one.slot_of_expert is other.slot_of_expert
    assert furthest(logits(model), before) <= 1e-5
    rebalancer.close()  # experts stay where they are, and tokens find them
    assert furthest(logits(model), before) <= 1e-5


def test_a_second_rebalancer_goes_on_from_the_table_of_the_first() -> None:
    """Both share one table: if the second reset it, tokens would go to slots that their experts had left."""
    model = made("mixtral")
    before, generator = logits(model), torch.Generator().manual_seed(1)
    for _ in range(2):
        rebalancer = rebalanced(model, "remap")
        assert furthest(logits(model), before) <= 1e-5
        rebalancer.apply(random_placement(rebalancer.placement, generator))
        assert furthest(logits(model), before) <= 1e-5
        rebalancer.close()


def test_a_copy_of_a_model_has_tables_of_its_own() -> None:
    """The copy's tokens followed the moves of the model that it was copied from."""
    model = made("mixtral")
    rebalancer = rebalanced(model, "remap")
    before, other = logits(model), copy.deepcopy(model)
    rebalancer.apply(random_placement(rebalancer.placement, torch.Generator().manual_seed(1)))
    assert torch.equal(logits(other), before)


def test_forwards_of_a_copy_are_not_the_models_steps() -> None:
    """A copy has the hooks too: when it was trained, its tokens were counted in the model's window."""
    model = made("mixtral").train()
    told, other = counted(model, "permute"), copy.deepcopy(model)
    other(batch(0), output_router_logits=True)
    assert told == []
    model(batch(0))
    assert len(told) == 1


def test_experts_that_a_table_has_moved_are_not_to_be_permuted() -> None:
    """Tokens were then looked up in a table that was no longer updated."""
    model = made("mixtral")
    first = rebalanced(model, "remap")
    subscribed(model)  # nothing has moved yet
    first.apply(random_placement(first.placement, torch.Generator().manual_seed(1)))
    first.close()
    before = hooks(model)
    with pytest.raises(
        DistplbError, match=r"model\.layers\.0\.mlp: experts were moved under mode='remap'.*pass mode='remap'"
    ):
        rebalanced(model)
    assert hooks(model) == before
    rebalanced(model, "remap")


# --- counts and ties ----------------------------------------------------------------------------------------------


def subscribed(model: nn.Module) -> list[MoELayer]:
    """The layers, with their counts subscribed to as by a `Rebalancer`."""
    layers = huggingface.moe_layers(model)
    for layer in layers:
        assert layer.counts is not None
        layer.counts(lambda counts, training: None)
    return layers


def counted(model: Any, mode: str) -> list[tuple[Tensor, bool]]:
    """What the first layer reports of its forwards, as `LoadWindow.add` would receive it."""
    told: list[tuple[Tensor, bool]] = []
    subscribe = huggingface.moe_layers(model, mode=mode)[0].counts  # type: ignore[arg-type]  # one of MODES
    assert subscribe is not None
    subscribe(lambda counts, training: told.append((counts, training)))
    return told


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_counts_are_the_tokens_that_each_expert_gets(name: str, mode: str) -> None:
    model = made(name, implementation="eager")
    told, got = counted(model, mode), []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, arguments: got.append(arguments[1].flatten().bincount()))
    model.train()(batch(0))
    model.eval()(batch(0))
    assert [training for _, training in told] == [True, False]
    assert int(told[0][0].sum()) == 48 * model.config.num_experts_per_tok
    assert torch.equal(told[0][0][: len(got[0])], got[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_window_takes_one_step_of_a_forward_that_is_recomputed_in_the_backward_pass(use_reentrant: bool) -> None:
    model = made("mixtral").train()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    window = distplb.LoadWindow(1, EXPERTS, 4)
    subscribe = huggingface.moe_layers(model)[0].counts
    assert subscribe is not None
    subscribe(lambda counts, training: window.add(0, counts, training=training))
    calls: list[bool] = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda *_: calls.append(True))
    model(batch(0)).logits.sum().backward()
    with torch.no_grad():
        model(batch(0))  # an evaluation that forgot `model.eval()`
    assert (len(calls), window.seen) == (3, 1)


@pytest.mark.parametrize("name", MODELS)
def test_ties_are_looked_for_in_the_scores_that_the_router_chooses_by(name: str) -> None:
    model = made(name)
    chosen: list[Tensor] = []
    router = getattr(model.model.layers[0].mlp, "router" if name == "gpt_oss" else "gate")
    router.register_forward_hook(lambda _, arguments, choice: chosen.append(choice[2]))
    layer, scores = subscribed(model)[0], []
    ties = layer.ties
    assert ties is not None
    ties.add = scores.append  # type: ignore[method-assign]  # to look at them
    model(batch(0))
    best = scores[0].topk(model.config.num_experts_per_tok).indices
    assert torch.equal(best.sort().values, chosen[0].sort().values)


@pytest.mark.parametrize("name", MODELS)
def test_of_many_tokens_in_bfloat16_some_tie_but_for_a_router_in_float32(name: str) -> None:
    model = made(name).to(torch.bfloat16)
    ties = subscribed(model)[1].ties
    assert ties is not None
    with torch.no_grad():
        model(torch.randint(VOCABULARY, (32, 64), generator=torch.Generator().manual_seed(0)))
    share = ties.take()
    assert share is not None
    print(f"{name}: {share:.2%} of tokens tie")
    assert (share > 0) == (name != "deepseek_v3")
    assert share < 0.05


# --- training -----------------------------------------------------------------------------------------------------


def distributed(model: Any, **sizes: int) -> Any:
    """Distribute a model as `from_pretrained(distributed_config=...)` does, which needs a checkpoint."""
    config, _, meshes = model.prepare_distribute_model(DistributedConfig(**sizes))
    return model.maybe_distribute_model(model, config, meshes)


def by_mesh(model: nn.Module) -> list[list[nn.Parameter]]:
    """Group parameters by mesh: experts are on a mesh of their own, and a kernel or norm takes tensors of one mesh."""
    found = defaultdict(list)
    for parameter in model.parameters():
        found[getattr(parameter, "device_mesh", None)].append(parameter)
    return list(found.values())


def clip(groups: list[list[nn.Parameter]], most: float) -> None:
    gradients = [[parameter.grad for parameter in group if parameter.grad is not None] for group in groups]
    norms = [whole(nn.utils.get_total_norm(some)) for some in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, most, norm)


def whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach().clone()


def local(tensor: Any) -> Tensor:
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found.detach()


def trained(
    name: str, moves: bool, *, mode: str = "permute", left: str = "", layers: int = LAYERS, **sizes: int
) -> tuple[dict[str, Tensor], int]:
    """Losses of this rank, all parameters and moments in logical order, and how many slots `step` moved."""
    model = made(name, implementation="eager", num_hidden_layers=layers).double().train()
    if sizes:
        model = distributed(model, **sizes)
    batches = sizes.get("fsdp_size", 1)
    own = 4 // batches
    rows = slice(own * dist.get_rank(), own * (dist.get_rank() + 1)) if batches > 1 else slice(None)
    groups = by_mesh(model)
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iteration: min(1.0, (iteration + 1) / 10))
    events: list[distplb.RebalanceEvent] = []
    rebalancer = huggingface.rebalancer(
        model,
        optimizer,
        every=EVERY,
        mode=mode,
        moves=Moves(model=FREE, stop_loss=0),
        record=Record(on_event=events.append),
    )
    rebalancer.enabled = moves
    layer, generator, losses = model.model.layers[0].mlp, torch.Generator().manual_seed(1), []
    for iteration in range(ITERATIONS):
        tokens = batch(iteration, rows)
        output = model(tokens)
        # Not by `labels=`, which computes in float32.
        loss = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten())
        loss.backward()
        clip(groups, 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        rebalancer.step()
        if moves and iteration % RANDOM_EVERY == 3:
            down, router = (
                layer.experts.down_proj,
                next((layer.router if name == "gpt_oss" else layer.gate).parameters()),
            )
            behind = {"moment": optimizer.state[down]["exp_avg"], "router row": router}.get(left)
            kept = None if behind is None else local(behind)[:1].clone()
            rebalancer.apply(random_placement(rebalancer.placement, generator, groups_of(name, mode)))
            if kept is not None:
                local(behind)[:1] = kept
        losses.append(loss.detach())
    rebalancer.restore()
    found = {"loss": torch.stack(losses)} | {key: whole(tensor) for key, tensor in model.named_parameters()}
    for key, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        found |= {f"{key}:{kind}": whole(state[kind]) for kind in ("exp_avg", "exp_avg_sq")}
    return found, sum(event.slots_moved for event in events)


@functools.cache
def quiet_run(name: str, sizes: frozenset[tuple[str, int]]) -> dict[str, Tensor]:
    return trained(name, moves=False, **dict(sizes))[0]


def compared(name: str, mode: str = "permute", left: str = "", **sizes: int) -> dict[str, Any]:
    """Compare a run with moves to one without: how far apart they are, and evidence that the test tests something."""
    quiet = quiet_run(name, frozenset(sizes.items()))
    moved, slots = trained(name, moves=True, mode=mode, left=left, **sizes)
    apart = {key: furthest(tensor, moved[key]) / float(tensor.abs().max()) for key, tensor in quiet.items()}
    loss = apart.pop("loss")
    return {
        "loss": loss,
        "state": max(apart.values()),
        "furthest": max(apart, key=apart.__getitem__),
        "learned": 1 - float(quiet["loss"][-8:].mean() / quiet["loss"][:8].mean()),
        "slots": slots,
    }


# The routers of the other models choose as Mixtral's does; these models are compared on two ranks.
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_run_with_moves_is_the_run_without(name: str, mode: str) -> None:
    found = compared(name, mode)
    print(found)
    assert found["learned"] > 0.02
    assert found["loss"] <= CLOSE[name]


@pytest.mark.parametrize("left", ["moment", "router row"])
def test_a_row_left_behind_shows_in_the_losses(left: str) -> None:
    found = compared("gpt_oss", left=left)
    print(found)
    assert found["loss"] > 1e-4


# --- several ranks ------------------------------------------------------------------------------------------------

OWN_BATCHES, ONE_BATCH = {"fsdp_size": 2, "ep_size": 2}, {"tp_size": 2, "ep_size": 2}
FOUR_RANKS = {"fsdp_size": 4, "ep_size": 2}
Case = tuple[str, str, str]  # model, mode, what is left behind
CASES: list[Case] = [*((name, "permute", "") for name in MODELS), ("deepseek_v3", "remap", "")]
CASES += [("gpt_oss", "permute", "moment")]
LIKE_MIXTRAL = [case for case in CASES if case[0] in ("qwen3_moe", "olmoe")]  # whose routers choose as Mixtral's does
UNLIKE = [case for case in CASES if case not in LIKE_MIXTRAL]
CASES_OF_ONE_BATCH: list[Case] = [("mixtral", "permute", ""), ("deepseek_v3", "remap", "")]


def all_compared(cases: list[Case], sizes: dict[str, int]) -> list[dict[str, Any]]:
    return [compared(*case, layers=1, **sizes) for case in cases]


def tokens_of_a_step(sizes: dict[str, int]) -> int:
    """The tokens that this rank counts in a batch of 48, or in its half of the batch."""
    model = distributed(made("mixtral"), **sizes).train()
    told, rank = counted(model, "permute"), dist.get_rank()
    model(batch(0, slice(2 * rank, 2 * rank + 2) if "fsdp_size" in sizes else slice(None)))
    return int(told[0][0].sum())


def refused(group: Any = None, **sizes: int) -> str:
    model = distributed(made("mixtral"), **sizes) if sizes else made("mixtral")
    with pytest.raises(DistplbError) as error:
        huggingface.rebalancer(model, torch.optim.SGD(model.parameters()), every=1, group=group)
    return str(error.value)


def all_of_two_ranks(cases: list[Case] = CASES) -> dict[str, Any]:
    """Run all cases in one pair of processes, because importing transformers takes longer than most of them."""
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    return {
        "tokens": [tokens_of_a_step(OWN_BATCHES), tokens_of_a_step(ONE_BATCH)],
        "refused": [refused(), refused(fsdp_size=2), refused(tp_size=2), refused(alone, **OWN_BATCHES)],
        "own batches": all_compared(cases, OWN_BATCHES),
        "one batch": all_compared(CASES_OF_ONE_BATCH, ONE_BATCH),
    }


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return on_ranks(2, all_of_two_ranks, UNLIKE)


def check(found: list[list[dict[str, Any]]], cases: list[Case]) -> None:
    for (name, mode, left), ranks in zip(cases, zip(*found, strict=True), strict=True):
        print(name, mode, left, *ranks)
        assert sum(rank["learned"] for rank in ranks) / len(ranks) > 0.02, name
        for rank in ranks:
            assert rank["slots"] > 0, name
            assert (rank["loss"] > 1e-4) if left else (rank["loss"] <= CLOSE[name]), (name, mode, left)


def test_a_run_on_two_ranks_with_moves_is_the_run_without(two_ranks: list[dict[str, Any]]) -> None:
    check([rank["own batches"] for rank in two_ranks], UNLIKE)


@pytest.mark.long
def test_a_run_on_two_ranks_of_models_that_are_like_mixtral_is_the_run_without() -> None:
    check(on_ranks(2, all_compared, LIKE_MIXTRAL, OWN_BATCHES), LIKE_MIXTRAL)


def test_a_run_on_two_ranks_that_share_each_batch_is_the_run_without(two_ranks: list[dict[str, Any]]) -> None:
    check([rank["one batch"] for rank in two_ranks], CASES_OF_ONE_BATCH)


def test_each_token_is_counted_once(two_ranks: list[dict[str, Any]]) -> None:
    assert [rank["tokens"] for rank in two_ranks] == [[48, 48]] * 2  # of 48 tokens × 2 experts, on two ranks


def test_experts_that_all_ranks_compute_are_refused(two_ranks: list[dict[str, Any]]) -> None:
    for replicated, sharded, tensor_parallel, alone in (rank["refused"] for rank in two_ranks):
        assert "each of 2 ranks computes all experts (held whole), so there is nothing to balance" in replicated
        assert "(held sharded over mesh axes ('fsdp',))" in sharded
        assert "(held sharded over mesh axes ('tp',))" in tensor_parallel
        assert "the experts are on 2 ranks, but the group has 1" in alone


def test_a_run_with_two_shards_of_each_expert_and_moves_is_the_run_without() -> None:
    cases: list[Case] = [("mixtral", "permute", "")]
    check(on_ranks(4, all_compared, cases, FOUR_RANKS), cases)


# --- the example --------------------------------------------------------------------------------------------------

EXAMPLE = Path(__file__).parents[2] / "examples" / "huggingface_moe.py"


def example(*options: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [*launcher, str(EXAMPLE), *options], env=environment, capture_output=True, text=True, timeout=400, check=False
    )


@pytest.mark.long
def test_the_example_runs_and_lowers_the_imbalance_of_every_layer() -> None:
    run = example()
    assert run.returncode == 0, run.stderr
    found = re.findall(r"(model\.layers\.\d\.mlp): imbalance (\S+) -> (\S+)", run.stdout)
    assert [name for name, _, _ in found] == [f"model.layers.{layer}.mlp" for layer in range(2)] * 3
    assert all(1 <= float(after) <= float(before) for _, before, after in found)
    assert any(float(after) < float(before) - 0.01 for _, before, after in found)
    assert re.search(r"[1-9]\d* slots moved", run.stdout)


@pytest.mark.long
def test_the_example_lends_replicas_and_refuses_options_that_it_does_not_know() -> None:
    run = example("--replica-slots", "2")
    assert run.returncode == 0, run.stderr
    steps = re.findall(r"step (\d+), model\.layers\.\d\.mlp: imbalance (\S+) -> (\S+), replicas: (\d+)", run.stdout)
    assert {int(step) for step, *_ in steps} >= {1, 16}
    assert all(float(after) <= 1.01 for _, _, after, _ in steps)
    assert any(int(replicas) for *_, replicas in steps)
    for options, message in {
        ("--replica-slots", "-1"): "replica_slots is -1; pass an integer of at least 0",
        ("--replicas", "2"): "unrecognized arguments: --replicas 2",
    }.items():
        run = example(*options)
        assert run.returncode != 0
        assert message in run.stderr
