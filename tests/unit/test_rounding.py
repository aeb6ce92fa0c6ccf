"""Stochastic rounding: right in the mean, exact where bfloat16 is, and safe at the ends of the range."""

from __future__ import annotations

import math

import pytest
import torch

from eulerforge.optim.rounding import mixed_seed, random_bits, stochastic_round

DRAWS = 1_000_000
LARGEST = torch.finfo(torch.bfloat16).max


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _all_of_bfloat16() -> torch.Tensor:
    """Every bit pattern: (65536,)."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("value", [1.0003, -1.0003, 1 / 3, -7.777e-5, 3.1e-39, 12345.678, 1.99999, -0.9999, 2e38])
def test_the_mean_is_the_value_and_only_its_neighbours_are_drawn(value: float) -> None:
    """Within four standard errors of a million draws. 3.1e-39 is subnormal; 1.99999 may be carried to 2."""
    exact = torch.tensor(value)
    rounded = stochastic_round(exact.expand(DRAWS), _generator())
    assert rounded.dtype == torch.bfloat16
    towards_zero = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32).double().item()
    away = ((exact.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32).double().item()
    drawn = rounded.double()
    assert set(drawn.unique().tolist()) == {towards_zero, away}
    share = (exact.double().item() - towards_zero) / (away - towards_zero)
    error = abs(away - towards_zero) * math.sqrt(share * (1 - share) / DRAWS)
    assert abs(drawn.mean().item() - exact.double().item()) < 4 * error


def test_values_of_bfloat16_stay_as_they_are_whatever_is_drawn() -> None:
    """All of them, to the bit: both zeros, subnormals, infinities; NaN stays NaN."""
    values = _all_of_bfloat16()
    numbers = ~values.isnan()
    for seed in range(20):
        rounded = stochastic_round(values.float(), _generator(seed))
        assert torch.equal(rounded[numbers].view(torch.int16), values[numbers].view(torch.int16))
        assert rounded[~numbers].isnan().all()


def test_every_nan_of_float32_stays_nan() -> None:
    """The highest bit patterns overflow into the sign and beyond when anything is added to them."""
    patterns = torch.tensor([0x7F800001, 0x7F80FFFF, 0x7FC00000, 0x7FFFFFFF, -1, -(2**23) + 1], dtype=torch.int32)
    values = patterns.view(torch.float32).repeat_interleave(10_000)
    assert values.isnan().all()
    assert stochastic_round(values, _generator()).isnan().all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_values_keep_their_sign(sign: float) -> None:
    values = torch.full((100_000,), sign * torch.finfo(torch.float32).max)
    assert set(stochastic_round(values, _generator()).tolist()) == {sign * LARGEST, sign * math.inf}


def test_values_are_not_changed_and_any_shape_and_stride_will_do() -> None:
    values = torch.randn(4, 6)
    before = values.clone()
    rounded = stochastic_round(values.T, _generator())
    assert rounded.shape == (6, 4)
    assert torch.equal(values, before)
    assert ((rounded.float() - values.T).abs() <= values.T.abs() * 2**-7).all()
    assert stochastic_round(torch.empty(0, 3), _generator()).shape == (0, 3)


def test_the_same_generator_draws_the_same() -> None:
    values = torch.randn(10_000)
    first, second, other = (stochastic_round(values, _generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_all_sixteen_bits_are_random() -> None:
    """Each is set in half of the draws, and no two go together."""
    bits = random_bits((200_000,), _generator()).unsqueeze(1) >> torch.arange(16) & 1
    correlation = torch.corrcoef(bits.T.double())
    assert ((bits.double().mean(0) - 0.5).abs() < 5 * 0.5 / math.sqrt(200_000)).all()
    assert ((correlation - torch.eye(16)).abs() < 5 / math.sqrt(200_000)).all()


def test_seeds_differ_in_half_of_their_bits_when_one_number_differs_by_one() -> None:
    """In the low 32 bits too, which are all that a generator on a CPU uses."""
    flips = []
    for step in range(50):
        for place in range(20):
            seed = mixed_seed(7, step, place)
            assert 0 <= seed < 2**64
            flips += [
                (seed ^ other) & 0xFFFFFFFF for other in (mixed_seed(7, step + 1, place), mixed_seed(8, step, place))
            ]
            flips.append((seed ^ mixed_seed(7, step, place + 1)) & 0xFFFFFFFF)
    mean = sum(flip.bit_count() for flip in flips) / len(flips)
    assert abs(mean - 16) < 0.3
    assert min(flip.bit_count() for flip in flips) >= 3


def test_the_order_of_a_seeds_numbers_counts() -> None:
    assert len({mixed_seed(*numbers) for numbers in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (0, 1), (0, 1, 2, 0))}) == 5
