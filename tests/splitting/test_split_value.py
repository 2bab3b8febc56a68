"""`Split` checks itself: what cannot be carried out, or pushes a replica for nothing, is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from splits import random_split

from distplb import DistplbError
from distplb.splitting.rules import EMPTY
from distplb.splitting.split_value import Split

GOOD = {
    "counts": torch.tensor([[6, 1, 0], [4, 1, 0]]),
    "home": torch.tensor([0, 1, 1]),
    "quota": torch.tensor([[6, 4], [0, 2], [0, 0]]),
    "replica": torch.tensor([[EMPTY, EMPTY], [EMPTY, 0]]),
}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a list": ({"home": [0, 1, 1]}, "Split: home is a list; pass a tensor of int64"),
    "int32": (
        {"home": torch.tensor([0, 1, 1], dtype=torch.int32)},
        "home is torch.int32 of shape [3] on cpu; pass int64 of",
    ),
    "transposed": (
        {"quota": torch.zeros(2, 3).long()},
        "quota is torch.int64 of shape [2, 3] on cpu; pass int64 of shape [3, 2] on the",
    ),
    "no slots dim": ({"replica": torch.tensor([EMPTY, 0])}, "shape [2] on cpu; pass int64 of shape [2, R]"),
    "no experts": (
        {"counts": torch.zeros(2, 0).long(), "home": torch.zeros(0).long(), "quota": torch.zeros(0, 2).long()},
        "counts has shape [2, 0]; pass at least one GPU and one expert",
    ),
    "home": ({"home": torch.tensor([0, 1, 2])}, "home is [0, 1, 2]; pass a GPU in [0, 2) for each expert"),
    "negative": ({"quota": torch.tensor([[11, -1], [0, 2], [0, 0]])}, "quota has -1 tokens; pass 0 or more"),
    "a token lost": (
        {"quota": torch.tensor([[6, 3], [0, 2], [0, 0]])},
        "quotas of expert 0 add up to 9, its counts to 10; pass quotas of all its tokens",
    ),
    "not held": (
        {"replica": torch.full((2, 2), EMPTY)},
        "GPU 1 computes 4 tokens of expert 0, which it does not hold; pass a replica",
    ),
    "twice": ({"replica": torch.tensor([[EMPTY, EMPTY], [0, 0]])}, "GPU 1 holds expert 0 twice; leave out one of the"),
    "at home": ({"replica": torch.tensor([[0, EMPTY], [EMPTY, 0]])}, "GPU 0 holds expert 0 twice"),
    "useless": (
        {"replica": torch.tensor([[1, EMPTY], [EMPTY, 0]])},
        "the replica of expert 1 on GPU 0 has no quota; leave it out",
    ),
    "unknown expert": (
        {"replica": torch.tensor([[3, EMPTY], [EMPTY, 0]])},
        "replica has 3; pass an expert in [0, 3), or -1 for none",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_split_that_cannot_be_carried_out_is_refused(name: str) -> None:
    changed, text = WRONG[name]
    with pytest.raises(DistplbError) as refused:
        Split(**GOOD | changed)
    assert text in str(refused.value)


def test_it_knows_loads_replicas_and_pushes() -> None:
    split = Split(**GOOD)
    assert split.load.tolist() == [6, 6]
    assert split.imbalance == 1.0
    assert (split.num_replicas, split.is_trivial) == (1, False)
    assert split.pushes.tolist() == [[0, 1], [0, 0]]


def test_without_replica_slots_or_tokens_it_is_trivial() -> None:
    split = Split(
        counts=torch.zeros(2, 2).long(),
        home=torch.tensor([0, 1]),
        quota=torch.zeros(2, 2).long(),
        replica=torch.zeros(2, 0).long(),
    )
    assert split.is_trivial
    assert split.imbalance == 1.0
    assert split.pushes.tolist() == [[0, 0], [0, 0]]


def test_random_splits_are_accepted_and_count_their_pushes() -> None:
    for seed in range(50):
        split = random_split(4, seed)
        assert split.pushes.sum() == split.num_replicas
        assert not split.pushes.diagonal().any()


def test_what_is_not_legal_is_refused_in_words_and_nothing_else_is() -> None:
    """The fast check and the one that explains agree, on splits with one value changed."""
    outcomes = set()
    for seed in range(400):
        split = random_split(3, seed)
        generator = torch.Generator().manual_seed(seed)
        values = {name: getattr(split, name).clone() for name in ("counts", "home", "quota", "replica")}
        changed = values[("counts", "home", "quota", "replica")[seed % 4]].view(-1)
        place = int(torch.randint(len(changed), (), generator=generator))
        changed[place] += int(torch.randint(-2, 3, (), generator=generator))
        try:
            Split(**values)
        except DistplbError:
            outcomes.add("refused")
        else:
            outcomes.add("legal")
            held = values["replica"].ne(EMPTY)
            assert values["quota"].gt(0).sum() <= len(values["home"]) + held.sum()
    assert outcomes == {"refused", "legal"}
