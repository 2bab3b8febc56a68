"""Stale references: the rebalancer's tensors or optimizers are no longer those trained, or another one moves them.

In each case the model silently became a different one.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from jobs import DIM, EXPERTS, LAYERS, Job, in_values, skewed
from ranks import on_ranks
from torch import Tensor, nn

from distplb import DistplbError, LoadWindow, MoELayer, Placement, Rebalancer, Topology

REVERSED = Placement(torch.arange(EXPERTS).flip(0).expand(LAYERS, -1), EXPERTS, 1)


def iterated(job: Job, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Run one iteration, with another optimizer than the job's if one is given."""
    for layer in range(LAYERS):
        job.window.add(layer, skewed((0, 1))[layer], training=True)
    job.backward()
    (optimizer or job.optimizer).step()
    (optimizer or job.optimizer).zero_grad()


# --- optimizers --------------------------------------------------------------------------------------------------


def test_a_new_optimizer_that_the_rebalancer_does_not_know_is_refused() -> None:
    """Its moments stayed in their slots, while the unused moments of the former optimizer travelled."""
    job = Job(ranks=1)
    rebalancer = job.rebalancer(every=1)
    iterated(job)
    rebalancer.apply(REVERSED)
    newer = torch.optim.AdamW([*job.weights, *job.routers], lr=1e-4)
    rebalancer.restore()  # the new optimizer has no state yet that could stay behind
    iterated(job, newer)
    text = (
        r"moe.0.experts.w is stepped on by an optimizer \(AdamW\) that was not passed to the Rebalancer, .* build a new"
    )
    with pytest.raises(DistplbError, match=text):
        rebalancer.apply(REVERSED)
    assert rebalancer.placement == Placement.contiguous(LAYERS, EXPERTS, 1)
    rebalancer.close()
    again = Rebalancer(job.layers(), newer, topology=Topology(1, 1), window=job.window, every=1)
    moment = newer.state[job.weights[0]]["exp_avg"].clone()
    again.apply(REVERSED)
    assert torch.equal(newer.state[job.weights[0]]["exp_avg"], moment.flip(0))


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another one, as in trainers: it has the parameters but no state of its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})

    def step(self, closure: None = None) -> None:
        self.inner.step()


@pytest.mark.parametrize("other", ["of another model", "without state", "around the known one"])
def test_optimizers_that_hold_nothing_of_the_experts_are_no_concern(other: str) -> None:
    job = Job(ranks=1)
    rebalancer = job.rebalancer(every=1)
    if other == "of another model":
        elsewhere = nn.Parameter(torch.zeros(2))
        elsewhere.grad = torch.ones(2)
        torch.optim.AdamW([elsewhere]).step()
        iterated(job)
    if other == "without state":
        iterated(job, torch.optim.SGD([*job.weights, *job.routers], lr=0.1))
    if other == "around the known one":
        iterated(job, Wrapper(job.optimizer))
        assert job.optimizer.state
    rebalancer.apply(REVERSED)


# --- tensors -----------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """One layer, all of whose experts compute all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.gate = nn.Parameter(torch.randn(EXPERTS, DIM)), nn.Parameter(torch.randn(EXPERTS, DIM))
        self.window = LoadWindow(1, EXPERTS, 4)

    def forward(self, x: Tensor) -> Tensor:  # [N, D] -> [N]
        score = (x @ self.gate.T).softmax(-1)
        self.window.add(0, torch.arange(EXPERTS) ** 2, training=True)
        return (score * (x @ self.w.T)).sum(1)

    def rebalancer(self, optimizer: torch.optim.Optimizer, **options: Any) -> Rebalancer:
        layer = MoELayer(name="moe", experts={"w": self.w}, router={"gate": self.gate})
        options = {"topology": Topology(1, 1), "window": self.window, "every": 3} | options
        return Rebalancer([layer], optimizer, **in_values(options))


REPLACED = r"the declared experts or router of moe no longer get gradients, .* load_state_dict\(assign"


@pytest.mark.parametrize("what", ["all", "experts alone", "all, in the middle of a window"])
@pytest.mark.parametrize("to_none", [True, False])
def test_a_model_whose_parameters_were_replaced_is_noticed_before_anything_moves(what: str, to_none: bool) -> None:
    """After load_state_dict(assign=True), the rows that moved no longer belonged to the model."""
    model = Model()
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(model.parameters())]
    events: list[Any] = []
    rebalancer = model.rebalancer(optimizers[0], every=6, on_event=events.append)

    def iterate() -> None:
        model(torch.randn(5, DIM)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        rebalancer.step()

    if what != "all":
        iterate()
    if what == "experts alone":
        model.w = nn.Parameter(model.w.detach().clone())
    else:
        model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    optimizers.append(
        torch.optim.AdamW([p for p in model.parameters() if p is not optimizers[0].param_groups[0]["params"][1]])
    )
    for _ in range(3):
        iterate()
    with pytest.raises(DistplbError, match=REPLACED), rebalancer.in_logical_order():  # it would save other rows
        raise AssertionError("in logical order")
    iterate()
    iterate() if what == "all" else None
    with pytest.warns(RuntimeWarning, match="distplb has skipped a rebalance: " + REPLACED):
        iterate()
    assert [event.decision for event in events] == ["skipped"]
    assert rebalancer.placement == Placement.contiguous(1, EXPERTS, 1)


def test_zeros_that_a_skipped_step_leaves_are_no_gradients() -> None:
    """As with a gradient scaler, if zero_grad() keeps the tensors."""
    job = Job(ranks=1)
    rebalancer = job.rebalancer(every=1)
    iterated(job)
    job.backward()
    job.optimizer.zero_grad(set_to_none=False)
    rebalancer.apply(REVERSED)
    job.backward()
    with pytest.raises(DistplbError, match="a backward pass has begun"):
        rebalancer.restore()


def test_gradients_that_add_up_beside_grad_are_a_backward_pass_that_has_begun() -> None:
    """As in Megatron-Core without a distributed optimizer: they stayed in their slots, so other experts got them."""
    job = Job(ranks=1)
    rebalancer = job.rebalancer(every=1)
    iterated(job)
    job.backward()
    for parameter in (*job.weights, *job.routers):
        parameter.main_grad, parameter.grad = parameter.grad, None  # type: ignore[attr-defined]  # as its DDP does
    with pytest.raises(DistplbError, match="a backward pass has begun since the optimizer's last step"):
        rebalancer.apply(REVERSED)


def test_experts_without_a_gradient_of_their_own_are_not_taken_for_replaced_ones() -> None:
    """Frozen experts, gradients set manually, and a window in which no optimizer has stepped."""
    for case in ("frozen", "by hand", "not stepped"):
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rebalancer = model.rebalancer(optimizer)
        if case == "frozen":
            model.w.requires_grad_(False)
            model.gate.requires_grad_(False)
        for _ in range(6):
            y = model(torch.randn(5, DIM)).sum()
            if case == "by hand":
                model.w.grad, model.gate.grad = torch.autograd.grad(y, [model.w, model.gate])
            if case != "not stepped":
                optimizer.step()
                optimizer.zero_grad()
            rebalancer.step()
        assert rebalancer.last_applied == 6


# --- two rebalancers, one after the other, or at once -----------------------------------------------------------


def test_two_rebalancers_of_one_model_are_refused() -> None:
    job = Job(ranks=1)
    first = job.rebalancer(every=1)
    with pytest.raises(DistplbError, match=r"moe.0.experts.w is moved by another Rebalancer .* close\(\) the other"):
        job.rebalancer(every=1)
    with pytest.raises(DistplbError, match="is moved by another Rebalancer"):  # also of some of its tensors
        job.rebalancer(job.layers()[1:], every=1, window=LoadWindow(1, EXPERTS, 4))
    first.close()
    second = job.rebalancer(every=1)
    with pytest.raises(DistplbError, match="this Rebalancer has been closed; make a new one"):
        first.apply(REVERSED)
    del second  # not closed
    gc.collect()
    job.rebalancer(every=1).apply(REVERSED)


def test_rows_that_another_rebalancer_has_moved_are_not_taken_for_logical_ones() -> None:
    """A second rebalancer began with expert e in slot e, whatever the first had done."""
    job = Job(ranks=1)
    logical = job.values()
    first = job.rebalancer(every=1)
    first.apply(REVERSED)
    state = first.state_dict()
    first.close()
    second = job.rebalancer(every=1)
    for refused in (second.step, second.restore, lambda: second.apply(REVERSED)):
        with pytest.raises(DistplbError, match=r"rows of moe.0 were moved by another Rebalancer .* load_state_dict"):
            refused()
    # Checkpoints request a state before they load one; it describes the rows as the first rebalancer left them.
    assert Placement(second.state_dict()["layers"]["moe.0"]["expert_of_slot"][None], EXPERTS, 1) == Placement(
        REVERSED.expert_of_slot[:1], EXPERTS, 1
    )
    second.load_state_dict(state)
    assert second.placement == REVERSED
    second.restore()
    assert all(torch.equal(a, b) for a, b in zip(logical, job.values(), strict=True))
    second.close()
    assert job.rebalancer(every=1).placement == Placement.contiguous(LAYERS, EXPERTS, 1)  # moved back, so no error


def test_a_layer_of_which_only_some_tensors_were_moved_is_refused() -> None:
    one, other = (nn.Parameter(torch.randn(EXPERTS, DIM)) for _ in range(2))
    router = nn.Parameter(torch.randn(EXPERTS, DIM))
    optimizer = torch.optim.AdamW([one, other, router])
    options: dict[str, Any] = {"topology": Topology(1, 1), "every": 1, "window": LoadWindow(1, EXPERTS, 4)}
    first = Rebalancer([MoELayer(name="moe", experts={"w": one}, router={"r": router})], optimizer, **options)
    first.apply(Placement(torch.arange(EXPERTS).flip(0)[None], EXPERTS, 1))
    first.close()
    both = MoELayer(name="moe", experts={"w": one, "v": other}, router={"r": router})
    with pytest.raises(DistplbError, match="an earlier Rebalancer moved the rows of only some tensors; declare every"):
        Rebalancer([both], optimizer, **options)


def test_tensors_that_were_put_back_lie_like_those_that_nobody_has_moved() -> None:
    """First with a table, then with rows: the first rebalancer did not move the router's rows."""
    w, router = nn.Parameter(torch.randn(EXPERTS, DIM)), nn.Parameter(torch.randn(EXPERTS, DIM))
    optimizer = torch.optim.AdamW([w, router])
    options: dict[str, Any] = {"topology": Topology(1, 1), "every": 1, "window": LoadWindow(1, EXPERTS, 4)}
    table = MoELayer(name="moe", experts={"w": w}, slot_of_expert=torch.arange(EXPERTS))
    first = Rebalancer([table], optimizer, **options)
    first.apply(Placement(torch.arange(EXPERTS).flip(0)[None], EXPERTS, 1))
    first.restore()
    first.close()
    Rebalancer([MoELayer(name="moe", experts={"w": w}, router={"r": router})], optimizer, **options).restore()


def on_every_rank() -> tuple[str, str]:
    """The errors of a second rebalancer, refused on all ranks, and of a third, whose rows have moved."""
    job = Job()
    first = job.rebalancer(every=1)
    first.apply(Placement(torch.arange(EXPERTS).flip(0).expand(LAYERS, -1), EXPERTS, 2))
    texts = []
    for _ in range(2):
        try:
            job.rebalancer(every=1).step()
        except DistplbError as error:
            texts.append(str(error))
        first.close()
    return texts[0], texts[1]


def test_ranks_refuse_together() -> None:
    for second, third in on_ranks(2, on_every_rank, deadline=60):
        assert "rank 0: moe.0.experts.w is moved by another Rebalancer" in second
        assert "rows of moe.0 were moved by another Rebalancer" in third


@pytest.mark.parametrize("where", ["in two layers", "under two names", "as a view"])
def test_tensors_that_share_memory_are_refused(where: str) -> None:
    """Moving one would move the other: tied layers, or a tensor declared twice."""
    weight, router = nn.Parameter(torch.randn(EXPERTS, DIM)), nn.Parameter(torch.randn(EXPERTS, DIM))
    other = nn.Parameter(torch.randn(EXPERTS, DIM))
    layers = [MoELayer(name="a", experts={"w": weight}, router={"r": router})]
    if where == "in two layers":
        layers.append(MoELayer(name="b", experts={"w": weight}, router={"r": other}))
    if where == "under two names":
        layers = [MoELayer(name="a", experts={"w": weight, "also": weight}, router={"r": router})]
    if where == "as a view":
        layers.append(MoELayer(name="b", experts={"w": weight.detach()[:, None]}, router={"r": other}))
    window = LoadWindow(len(layers), EXPERTS, 4)
    with pytest.raises(DistplbError, match=r"share memory, so moving one would also move the other"):
        Rebalancer(layers, torch.optim.AdamW([weight, router, other]), topology=Topology(1, 1), every=1, window=window)


# --- tables ------------------------------------------------------------------------------------------------------


class Tabled:
    """One layer whose dispatcher looks up experts in a table."""

    def __init__(self) -> None:
        self.w, self.table = nn.Parameter(torch.randn(EXPERTS, DIM)), torch.arange(EXPERTS)
        self.optimizer = torch.optim.AdamW([self.w])

    def rebalancer(self) -> Rebalancer:
        layer = MoELayer(name="moe", experts={"w": self.w}, slot_of_expert=self.table)
        window = LoadWindow(1, EXPERTS, 4)
        return Rebalancer([layer], self.optimizer, topology=Topology(1, 1), every=1, window=window)

    def of_experts(self) -> Tensor:
        return self.w.detach()[self.table].clone()


TURNED = Placement(torch.tensor([[2, 3, 4, 5, 6, 7, 0, 1]]), EXPERTS, 1)


def test_a_table_that_tells_where_the_experts_are_is_gone_on_from() -> None:
    """It was overwritten with 0, 1, 2, ... while the rows stayed."""
    job = Tabled()
    first = job.of_experts()
    one = job.rebalancer()
    one.apply(TURNED)
    one.close()
    two = job.rebalancer()
    assert two.placement == TURNED
    assert torch.equal(job.of_experts(), first)
    two.apply(Placement.contiguous(1, EXPERTS, 1))
    assert torch.equal(job.of_experts(), first)
    two.restore()  # to where the second one began
    assert two.placement == TURNED
    two.close()
    job.table = torch.arange(EXPERTS)  # a table that does not show the moves
    with pytest.raises(DistplbError, match="rows of moe were moved by another Rebalancer"):
        job.rebalancer().step()


def test_a_table_that_somebody_else_has_written_is_refused_before_anything_moves() -> None:
    """As by loading only the model's state, if the table is one of its buffers."""
    job = Tabled()
    rebalancer = job.rebalancer()
    rebalancer.apply(TURNED)
    job.table.copy_(torch.arange(EXPERTS))
    rows = job.w.detach().clone()
    text = r"slot_of_expert has expert 0 in slot 0, but the rebalancer put it into slot 6; other code has written the"
    with pytest.raises(DistplbError, match=text):
        rebalancer.restore()
    assert torch.equal(job.w.detach(), rows)


def test_a_table_that_is_none_is_refused() -> None:
    job = Tabled()
    job.table[0] = 5
    with pytest.raises(DistplbError, match=r"slot_of_expert is \[5, 1, 2, 3, 4, 5, 6, 7\]; it must contain each of 8"):
        job.rebalancer()
    job.table.zero_()  # not filled yet
    job.rebalancer()
    assert job.table.tolist() == list(range(EXPERTS))


# --- hooks -------------------------------------------------------------------------------------------------------


def test_a_rebalancer_that_is_collected_during_a_step_does_not_break_it() -> None:
    """Its hook was removed while torch iterated over all hooks, which made the step fail."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    job, others = Job(ranks=1), [Job(ranks=1) for _ in range(2)]
    rebalancers = [other.rebalancer(every=1) for other in others]

    def collect(*_: Any) -> None:
        rebalancers.clear()
        gc.collect()

    handles = [register_optimizer_step_post_hook(collect), register_optimizer_step_post_hook(lambda *_: None)]
    handles[0].hooks_dict_ref().move_to_end(handles[0].id, last=False)
    iterated(job)
    for handle in handles:
        handle.remove()


def hooks_of(job: Job) -> int:
    from torch.optim.optimizer import _global_optimizer_post_hooks

    gc.collect()  # hooks of other tests, whose owners are unreachable
    on_tensors = sum(len(p._post_accumulate_grad_hooks or ()) for p in (*job.weights, *job.routers))
    own = job.optimizer._optimizer_step_post_hooks, job.optimizer._optimizer_step_pre_hooks
    return on_tensors + sum(map(len, own)) + len(_global_optimizer_post_hooks)


def test_a_rebalancer_that_is_refused_leaves_no_hook_behind() -> None:
    """Whatever the reason, its own hooks and its layers' subscriptions are removed."""
    job, removed = Job(ranks=1), []

    class Handle:
        def remove(self) -> None:
            removed.append(self)

    subscribed: list[Handle] = []

    def counts(tell: Any) -> Handle:
        subscribed.append(Handle())
        return subscribed[-1]

    before = hooks_of(job)
    holder = job.rebalancer(every=1)
    held = hooks_of(job)
    for options in ({}, {"window": 8}, {"window": 8, "slot_class": torch.zeros(3)}):
        with pytest.raises(DistplbError):
            job.rebalancer(job.layers(counts=counts), **({"every": 1} | options))
        assert hooks_of(job) == held
    assert len(subscribed) == 3 * LAYERS
    assert set(removed) == set(subscribed)
    holder.close()
    assert hooks_of(job) == before


@pytest.mark.parametrize("closed", [True, False])
def test_a_rebalancer_keeps_no_model_alive(closed: bool) -> None:
    """Hooks that refer from a tensor back to its owner would: Python's collector cannot follow all of them."""
    job = Job(ranks=1)
    rebalancer = job.rebalancer(every=1)
    iterated(job)
    rebalancer.apply(REVERSED)
    if closed:
        rebalancer.close()
    gone = [weakref.ref(tensor) for tensor in (*job.weights, *job.routers)]
    del job, rebalancer
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)


def test_closing_leaves_no_hook_behind() -> None:
    """Each Rebalancer left hooks on tensors and optimizers, and `attach` still called a closed one."""
    job = Job(ranks=1)
    before = hooks_of(job)
    for _ in range(3):
        rebalancer = job.rebalancer(every=1)
        rebalancer.attach()
        assert hooks_of(job) > before
        rebalancer.close()
        assert hooks_of(job) == before
    iterated(job)
    assert rebalancer.iteration == 0
