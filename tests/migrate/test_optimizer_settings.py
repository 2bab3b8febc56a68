"""Experts that differ in more than their state do not change places: they are refused by name at construction.

Training experts with other settings after a move gives another model, and losses do not show it at once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import errors_on_ranks, on_ranks
from torch import Tensor, nn

from distplb import DistplbError, LoadWindow, MoELayer, Moves, Placement, Rebalancer, Topology
from distplb.comm.torchdist import TorchComm

EXPERTS, DIM = 4, 3


class Experts:
    """One layer of experts in tensors of their own, on one GPU."""

    def __init__(self, count: int = EXPERTS) -> None:
        torch.manual_seed(3)
        self.weights = [nn.Parameter(torch.randn(DIM, DIM)) for _ in range(count)]
        self.router = nn.Parameter(torch.randn(EXPERTS, DIM))

    def rebalancer(self, *optimizers: torch.optim.Optimizer, **options: Any) -> Rebalancer:
        layer = MoELayer(name="moe", experts={"w": self.weights}, router={"weight": self.router})
        options = {"topology": Topology(1, 1), "every": 1, "window": LoadWindow(1, EXPERTS, 4)} | options
        return Rebalancer([layer], list(optimizers), **options)

    def optimizers(self, case: str) -> list[torch.optim.Optimizer]:
        first, last = self.weights[:2], self.weights[2:]
        if case == "alike":
            return [torch.optim.AdamW([*self.weights, self.router])]
        if case == "alike in two groups":
            return [torch.optim.AdamW([{"params": first, "name": "a"}, {"params": last}, {"params": [self.router]}])]
        if case == "alike in two optimizers":
            return [torch.optim.AdamW(first), torch.optim.AdamW([*last, self.router])]
        if case == "lr":
            return [torch.optim.SGD([{"params": [*first, self.router]}, {"params": last, "lr": 0.02}], lr=0.01)]
        if case == "lr as a tensor":
            groups = [
                {"params": [*first, self.router], "lr": torch.tensor(0.5)},
                {"params": last, "lr": torch.tensor(0.25)},
            ]
            return [torch.optim.AdamW(groups)]
        if case == "weight decay":
            groups = [{"params": [*first, self.router]}, {"params": last, "weight_decay": 0.0}]
            return [torch.optim.AdamW(groups, weight_decay=0.1)]
        if case == "betas":
            groups = [{"params": [*first, self.router]}, {"params": last, "betas": (0.8, 0.95)}]
            return [torch.optim.AdamW(groups)]
        if case == "Adam beside AdamW":
            return [torch.optim.Adam([*first, self.router]), torch.optim.AdamW(last)]
        if case == "frozen":
            last[0].requires_grad_(False)
            return [torch.optim.AdamW([*self.weights, self.router])]
        raise AssertionError(case)


UNLIKE = {
    "lr": r"moe.experts.w: lr is 0.01 for one expert and 0.02 for another",
    "lr as a tensor": r"moe.experts.w: lr is 0.5 for one expert and 0.25 for another",
    "weight decay": r"moe.experts.w: weight_decay is 0.1 for one expert and 0.0 for another",
    "betas": r"moe.experts.w: betas is \(0.9, 0.999\) for one expert and \(0.8, 0.95\) for another",
    "Adam beside AdamW": r"moe.experts.w: the optimizer is Adam for one expert and AdamW for another",
    "frozen": r"moe.experts.w: requires_grad is True for one expert and False for another",
}


@pytest.mark.parametrize("case", UNLIKE)
def test_experts_trained_by_other_settings_are_refused_when_built(case: str) -> None:
    experts = Experts()
    with pytest.raises(DistplbError, match=UNLIKE[case]) as refused:
        experts.rebalancer(*experts.optimizers(case))
    assert "train all experts of a layer alike, for example in one param group of one optimizer" in str(refused.value)


@pytest.mark.parametrize("case", ["alike", "alike in two groups", "alike in two optimizers"])
def test_experts_trained_alike_change_places(case: str) -> None:
    """Whatever the names and the number of param groups."""
    experts = Experts()
    rebalancer = experts.rebalancer(*experts.optimizers(case))
    before = [weight.detach().clone() for weight in experts.weights]
    rebalancer.apply(Placement(torch.tensor([[3, 2, 1, 0]]), EXPERTS, 1))
    assert all(torch.equal(a, b) for a, b in zip(before[::-1], experts.weights, strict=True))


def test_settings_that_part_later_are_refused_at_the_next_move() -> None:
    """As with a scheduler that has a schedule for each group, with the same first value."""
    experts = Experts()
    (optimizer,) = experts.optimizers("alike in two groups")
    rebalancer = experts.rebalancer(optimizer)
    optimizer.param_groups[1]["lr"] /= 2
    with pytest.raises(DistplbError, match=r"lr is 0.001 for one expert and 0.0005 for another"):
        rebalancer.apply(Placement(torch.tensor([[3, 2, 1, 0]]), EXPERTS, 1))
    experts.weights[0].requires_grad_(False)
    optimizer.param_groups[1]["lr"] *= 2
    with pytest.raises(DistplbError, match=r"requires_grad is False for one expert and True for another"):
        rebalancer.apply(Placement(torch.tensor([[3, 2, 1, 0]]), EXPERTS, 1))


def unlike_over_ranks(case: str) -> str:
    """Each rank trains its own experts alike, but not as the other rank does."""
    odd = dist.get_rank() == 1
    weight, router = nn.Parameter(torch.randn(2, DIM, DIM)), nn.Parameter(torch.zeros(EXPERTS, DIM))
    options: dict[str, Any] = {"lr": 0.1 if odd and case == "lr" else 0.2}
    kind = torch.optim.Adam if odd and case == "kind" else torch.optim.AdamW
    if odd and case == "frozen":
        weight.requires_grad_(False)
    optimizers = [kind([weight], **options), torch.optim.AdamW([router])]
    layer = MoELayer(name="moe", experts={"w": weight}, router={"weight": router})
    try:
        Rebalancer(
            [layer], optimizers, topology=Topology(1, 2), every=1, window=LoadWindow(1, EXPERTS, 1), comm=TorchComm()
        )
    except DistplbError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("case", ["lr", "kind", "frozen"])
def test_experts_trained_otherwise_on_another_rank_are_refused_on_all(case: str) -> None:
    texts = errors_on_ranks(2, unlike_over_ranks, case, deadline=60)
    assert "ranks differ in how they train moe.experts.w" in texts[0]
    assert texts[0] == texts[1], "each rank named its own settings"
    assert errors_on_ranks(2, unlike_over_ranks, "alike", deadline=60) == ["no error"] * 2


def parted_over_ranks() -> str:
    """The warning of a rebalance after one rank's schedule has diverged."""
    weight, router = nn.Parameter(torch.randn(2, DIM, DIM)), nn.Parameter(torch.zeros(EXPERTS, DIM))
    optimizer, window = torch.optim.SGD([weight, router], lr=0.1), LoadWindow(1, EXPERTS, 1)
    layer = MoELayer(name="moe", experts={"w": weight}, router={"weight": router})
    rebalancer = Rebalancer(
        [layer], optimizer, topology=Topology(1, 2), every=1, window=window, comm=TorchComm(), moves=Moves(stop_loss=0)
    )
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["lr"] = 0.05
    window.add(0, torch.tensor([9, 9, 1, 1]), training=True)
    with pytest.warns(RuntimeWarning, match="distplb has skipped a rebalance") as caught:
        rebalancer.step()
    return str(caught[0].message)


def test_settings_that_part_on_one_rank_are_named_in_the_warning() -> None:
    texts = on_ranks(2, parted_over_ranks, deadline=60)
    assert "ranks differ in how they train moe.experts.w (" in texts[0]
    assert "lr 0.1" in texts[0] or "lr 0.05" in texts[0]
    assert texts[0] == texts[1]


def test_state_that_two_optimizers_hold_for_one_tensor_travels_whole() -> None:
    """The moments of one optimizer stayed behind, because both name them exp_avg."""
    experts = Experts()
    one, other = (torch.optim.AdamW([*experts.weights, experts.router]) for _ in range(2))
    for optimizer, scale in ((one, 1.0), (other, 2.0)):
        for number, weight in enumerate(experts.weights):
            weight.grad = torch.full_like(weight, scale * (number + 1))
        experts.router.grad = torch.zeros_like(experts.router)
        optimizer.step()
        optimizer.zero_grad()
    expected = [[o.state[w]["exp_avg"].clone() for w in experts.weights][::-1] for o in (one, other)]
    experts.rebalancer(one, other).apply(Placement(torch.tensor([[3, 2, 1, 0]]), EXPERTS, 1))
    for optimizer, moments in zip((one, other), expected, strict=True):
        assert all(torch.equal(optimizer.state[w]["exp_avg"], m) for w, m in zip(experts.weights, moments, strict=True))


# --- experts looked up by id ------------------------------------------------------------------------------------


class HashRouted(nn.Module):
    """Chooses two experts for each token from a table of ids, and weights them by a gate with a row for each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.gate = nn.Parameter(torch.randn(EXPERTS, DIM))
        self.weights = nn.Parameter(torch.randn(EXPERTS, DIM, DIM))
        self.register_buffer("experts_of_token", torch.tensor([[0, 1], [2, 3], [1, 3], [0, 2]]))
        self.register_buffer("slot_of_expert", torch.arange(EXPERTS))

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:  # [N], [N, DIM] -> [N, DIM]
        chosen = self.experts_of_token[tokens]  # [N, 2]
        score = (x @ self.gate.T).softmax(-1).gather(1, chosen)
        outputs = torch.einsum("nd,nkde->nke", x, self.weights[self.slot_of_expert[chosen]])
        return (score[..., None] * outputs).sum(1)


def test_a_router_that_looks_experts_up_by_number_needs_a_table_and_says_so() -> None:
    model, tokens, x = HashRouted(), torch.tensor([0, 1, 2, 3, 1]), torch.randn(5, DIM)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"topology": Topology(1, 1), "every": 1, "window": LoadWindow(1, EXPERTS, 4)}
    experts, rows = {"w": model.weights}, {"gate": model.gate, "experts_of_token": model.experts_of_token}
    with pytest.raises(DistplbError, match=r"moe.router.experts_of_token holds integers from 0 to 3, which .* pass"):
        Rebalancer([MoELayer(name="moe", experts=experts, router=rows)], optimizer, **options)
    before = model(tokens, x)
    layer = MoELayer(name="moe", experts=experts, slot_of_expert=model.slot_of_expert)
    Rebalancer([layer], optimizer, **options).apply(Placement(torch.tensor([[3, 2, 0, 1]]), EXPERTS, 1))
    assert torch.allclose(model(tokens, x), before)


def test_counts_that_a_router_keeps_by_expert_still_travel() -> None:
    model = HashRouted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counts = torch.tensor([70, 10, 3, 0])
    rows = {"gate": model.gate, "seen": counts, "zeros": torch.zeros(EXPERTS, dtype=torch.int64)}
    layer = MoELayer(name="moe", experts={"w": model.weights}, router=rows)
    window = LoadWindow(1, EXPERTS, 4)
    rebalancer = Rebalancer([layer], optimizer, topology=Topology(1, 1), every=1, window=window)
    rebalancer.apply(Placement(torch.tensor([[3, 2, 0, 1]]), EXPERTS, 1))
    assert counts.tolist() == [0, 3, 70, 10]
