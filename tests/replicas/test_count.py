"""Bad input on one rank is refused on all, in one text, and the balancer goes on or says that it does not.

Shapes: N tokens of a rank, K experts of each token, P slots, M ranks, G own slots.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor

from distplb import Topology
from distplb.errors import DistplbError, LostRanksError
from distplb.replicas.step_balancer import StepBalancer

EVEN, UNEVEN = torch.arange(6)[:, None], torch.tensor([0] * 9 + [1, 2, 3, 4, 5])[:, None]
BAD_IDS: dict[str, Any] = {
    "too large": EVEN + 3,
    "negative": EVEN.sub(2).to(torch.int32),
    "floats": EVEN.float(),
    "bools": EVEN.bool(),
    "one dim": EVEN.flatten(),
    "a list": EVEN.tolist(),
    "nothing": None,
}


def new_balancer(**options: Any) -> StepBalancer:
    size = dist.get_world_size()
    return StepBalancer(topology=Topology(1, size), num_experts=6, **({"deadline": 20} | options))


def text_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except LostRanksError as error:
        return f"lost: {error}"
    except DistplbError as error:
        return str(error)
    return "no error"


def weights(*shape: int, dtype: Any = torch.float64) -> Tensor:
    return torch.ones(shape, dtype=dtype, requires_grad=True)


def train(balancer: StepBalancer, layer: str, *home_rows: Any) -> str:
    """Dispatch and compute without an exchange of tokens; the text of the error."""
    found = balancer.dispatch(layer, UNEVEN)
    assert not found.is_trivial
    rows = torch.ones(3, 2, dtype=torch.float64)

    def experts(rows: Tensor, own: Any, away: Any) -> Tensor:
        return rows * sum(one.double().sum() for one in (*own, *away[:0])) + sum(one[:0].sum() for one in away)

    return text_of(lambda: balancer.compute(found, experts, rows, *home_rows).sum().backward())


def refusals() -> list[str]:
    balancer, is_wrong = new_balancer(), dist.get_rank() == 1
    assert balancer.dispatch("a", EVEN).is_trivial
    texts = []
    for bad in BAD_IDS.values():
        texts.append(text_of(lambda bad=bad: balancer.dispatch("a", bad if is_wrong else EVEN)))
        assert balancer.dispatch("b", UNEVEN).split.num_replicas  # type: ignore[union-attr]
    assert balancer.dispatch("a", EVEN).is_trivial
    return texts


def test_bad_ids_of_one_rank_are_refused_on_all_in_one_text() -> None:
    found = on_ranks(3, refusals)
    assert found[0] == found[1] == found[2]
    large, negative, floats, bools, flat, a_list, nothing = found[0]
    assert large == "rank 1 has 3 ids such as 8 in expert_of_token; pass ids in [0, 6)"
    assert negative == "rank 1 has 2 ids such as -2 in expert_of_token; pass ids in [0, 6)"
    pass_ids = "as expert_of_token; pass the [N, K] ids of its tokens' experts, on the device of the group"
    assert floats == bools == f"rank 1 passed no integers {pass_ids}"
    assert flat == f"rank 1 passed no [N, K] tensor {pass_ids}"
    assert a_list == nothing == f"rank 1 passed no tensor {pass_ids}"


def other_layers() -> list[str]:
    """Rank 1 is in another layer: in the first step, and later."""
    balancer, is_wrong = new_balancer(), dist.get_rank() == 1
    texts = [text_of(lambda: balancer.dispatch("b" if is_wrong else "a", EVEN))]
    for _ in range(6):
        for layer in "ab":
            balancer.dispatch(layer, EVEN)
    texts.append(text_of(lambda: balancer.dispatch("ab"[is_wrong], EVEN)))
    for layer in "ab":
        balancer.dispatch(layer, EVEN)
    return texts


def test_another_layer_is_refused_and_ranks_go_on_alike() -> None:
    first, second = on_ranks(2, other_layers)
    assert first == second
    ends = "call dispatch and compute for the same layers in the same order, with the same options, on all ranks"
    for call, text in zip((1, 14), first, strict=True):
        assert text.startswith(
            f"rank 1 and rank 0 differ in the layer: rank 0 is in dispatch of layer 'a', dispatch {call}, rank 1 is in "
            f"dispatch of layer 'b', dispatch {call}; {ends}"
        )


def lone_evaluation() -> list[str]:
    """Ranks 1 and 2 evaluate one batch more than rank 0, which trains."""
    balancer = new_balancer()
    with torch.set_grad_enabled(dist.get_rank() == 0):
        texts = [text_of(lambda: balancer.dispatch("a", EVEN))]
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            texts.append(text_of(lambda: balancer.dispatch("a", EVEN)))
    return texts


def test_an_evaluation_of_some_ranks_is_refused() -> None:
    """The ranks met in the count of a training and an evaluation, and went on to wait for each other's next step."""
    first, second, third = on_ranks(3, lone_evaluation)
    assert first == second == third
    assert first == [
        "ranks 1, 2 would compute this step without gradients, as in an evaluation, and other ranks with them; "
        "evaluate on all ranks of the group, with the same number of batches",
        "no error",
        "no error",
    ]


def late_after_a_refusal() -> str:
    balancer, rank = new_balancer(), dist.get_rank()
    balancer.dispatch("a", EVEN)
    text_of(lambda: balancer.dispatch("a", EVEN + 3 * rank))
    time.sleep(2.5 * rank)  # longer than a rank waits before it asks whether another one has failed
    return text_of(lambda: balancer.dispatch("a", EVEN))


def test_a_refusal_does_not_end_a_later_wait() -> None:
    """A rank that refused reported that it had failed; the next rank that waited for a second read this and gave up."""
    assert on_ranks(2, late_after_a_refusal) == ["no error"] * 2


def other_sizes() -> str:
    rank = dist.get_rank()
    return text_of(lambda: StepBalancer(topology=Topology(1, 2), num_experts=6 + 2 * rank, deadline=20))


def test_another_number_of_experts_is_refused_before_anything_is_counted() -> None:
    """Rows of other lengths ended the process in gloo, without a word about experts."""
    text = "num_experts is 8 on rank 1 and 6 on rank 0; pass the same on all ranks of the group"
    assert on_ranks(2, other_sizes) == [text] * 2


def options_and_calls() -> list[str]:
    """Other options on rank 1; a compute that rank 1 leaves out."""
    is_wrong = dist.get_rank() == 1
    other = new_balancer(replica_slots=1 + is_wrong)
    texts = [text_of(lambda: other.dispatch("a", EVEN))]
    balancer, weight = new_balancer(), weights(3, 2)
    found = balancer.dispatch("a", UNEVEN)
    if is_wrong:
        texts.append(text_of(lambda: balancer.dispatch("a", UNEVEN)))
    else:
        texts.append(text_of(lambda: balancer.push(found, weight)))
    texts.append(text_of(lambda: balancer.dispatch("a", UNEVEN)))
    return texts


def test_other_options_and_calls_are_refused_in_one_text() -> None:
    """The weights of a layer were compared in rows of another length: a process that counted meanwhile died of it."""
    first, second = on_ranks(2, options_and_calls)
    assert first == second
    options, calls, later = first
    assert options.startswith("rank 1 and rank 0 differ in the options of the StepBalancer: rank 0 has digest ")
    assert calls.startswith(
        "rank 1 and rank 0 differ in what they call: rank 0 is in compute of layer 'a', dispatch 1, rank 1 is in "
        "dispatch of layer 'a', dispatch 2; "
    )
    assert later.startswith("rank 1 and rank 0 differ in the step: ")  # it says so, in each step from now on


def weights_that_do_not_fit() -> list[str]:
    balancer, is_wrong = new_balancer(), dist.get_rank() == 1
    good = weights(3, 2)
    bad: dict[str, Any] = {
        "rows": weights(4, 2),
        "shape": weights(3, 4),
        "dtype": weights(3, 2, dtype=torch.float32),
        "strides": weights(2, 3).t(),
        "list": [[1.0]] * 3,
        "scalar": torch.ones(()),
    }
    texts = [train(balancer, "a", one if is_wrong else good) for one in bad.values()]
    texts.append(train(balancer, "a", good, *([good] * is_wrong)))
    texts.append(train(balancer, "a", *([good] * (not is_wrong))))
    texts.append(train(balancer, "a", good))
    assert good.grad is not None
    return texts


def test_weights_that_do_not_fit_are_refused_on_all_ranks() -> None:
    """Rows and strides were refused on one rank alone, and the others lost it."""
    first, second = on_ranks(2, weights_that_do_not_fit)
    assert first == second
    rows, shape, dtype, strides, a_list, scalar, more, none, fine = first
    own = "as weights of layer 'a'; pass contiguous local tensors with a row for each of 3 own slots"
    assert rows == f"rank 1 passed a tensor with 4 rows {own}, such as DTensor.to_local()"
    assert strides == f"rank 1 passed a tensor that is not contiguous {own}, such as DTensor.to_local()"
    assert a_list == scalar == none == f"rank 1 passed no tensors with rows {own}, such as DTensor.to_local()"
    differ = "rank 1 has weights of other shapes or dtypes in layer 'a' than rank 0; pass the same weights on all ranks"
    assert shape == dtype == more == differ
    assert fine == "no error"


def bytes_of(num_layers: int) -> int:
    balancer = new_balancer()
    for number in range(num_layers):
        assert train(balancer, f"layer {number}", weights(3, 50), weights(3, 7)) == "no error"
    return balancer.num_bytes


def every_number() -> list[int]:
    return [bytes_of(1), bytes_of(2), bytes_of(8)]


def test_memory_does_not_grow_with_the_layers() -> None:
    # Weights and gradients of two replicas: 100 and 14 values of 8 bytes, each at a multiple of 256 bytes.
    assert on_ranks(2, every_number) == [[2 * (1024 + 256)] * 3] * 2
