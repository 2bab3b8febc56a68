"""Step 1: noise from integers, the same on every machine.

Shapes: X rows, n items.
"""

from __future__ import annotations

import torch
from packing_cases import skewed
from torch import Tensor

from distplb.packing.noise import noisy_keys


def noise(items: int, *, layer: int = 0, candidate: int = 1, seed: int = 0) -> Tensor:
    """`[n]`: the noise of each item in 2^-16, measured on equal weights of 2^16."""
    weight = torch.full((1, items), 1 << 16)
    keys = noisy_keys(weight, layer=torch.tensor([layer]), candidate=torch.tensor([candidate]), seed=seed)
    return (keys - weight)[0]


def test_candidate_0_is_noiseless() -> None:
    weight = skewed(13, rows=3, n=50)
    keys = noisy_keys(weight, layer=torch.arange(3), candidate=torch.tensor([0, 5, 0]), seed=9)
    assert torch.equal(keys[::2], weight[::2])
    assert not torch.equal(keys[1], weight[1])


def test_noise_is_at_least_zero_and_below_15_percent() -> None:
    many = noise(1 << 20)
    assert many.min() == 0
    assert many.max() == 9830  # the largest below 0.15 × 2^16 = 9830.4
    heavy = torch.full((1, 1000), 2**40)
    keys = noisy_keys(heavy, layer=torch.tensor([0]), candidate=torch.tensor([1]), seed=0)
    assert ((keys >= heavy) & (keys < heavy * 1.15)).all()


def test_noise_is_spread_evenly() -> None:
    """Chi-square of 64 equal bins: mean 63, standard deviation 11; the bound is six standard deviations away."""
    for candidate, layer, seed in [(1, 0, 0), (2, 0, 0), (2**22 - 1, 57, 2**40)]:
        counts = (noise(64 * 1000, candidate=candidate, layer=layer, seed=seed) * 64 // 9831).bincount(minlength=64)
        assert len(counts) == 64
        assert float(((counts - 1000.0) ** 2 / 1000).sum()) < 130


def test_noise_differs_by_item_candidate_layer_and_both_halves_of_the_seed() -> None:
    plain = noise(1000)
    others = [
        noise(1001)[1:],  # of the next item
        noise(1000, candidate=2),
        noise(1000, layer=1),
        noise(1000, seed=1),
        noise(1000, seed=1 << 32),
        noise(1000, candidate=1, layer=2),
        noise(1000, candidate=2, layer=1),
    ]
    for number, one in enumerate([plain, *others]):
        for other in others[number:]:
            assert (one == other).sum() < 10
            together = torch.stack([one, other]).double()
            assert abs(float(torch.corrcoef(together)[0, 1])) < 0.15  # five standard deviations of 1000 samples


def test_the_noise_is_what_it_was_when_it_was_first_pinned() -> None:
    """Plans are replayed from a seed and a candidate: a changed hash would change every plan."""
    assert noise(8, layer=3, candidate=5, seed=7).tolist() == [892, 8458, 7126, 4091, 6952, 3594, 1894, 154]
    weight = torch.tensor([[100_000, 2**40 - 10**7, 3, 0]])
    keys = noisy_keys(weight, layer=torch.tensor([3]), candidate=torch.tensor([5]), seed=7)
    assert keys.tolist() == [[101361, 1241402030115, 3, 0]]
