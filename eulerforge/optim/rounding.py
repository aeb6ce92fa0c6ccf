"""Stochastic rounding to bfloat16, with random numbers that nobody has to save.

A bfloat16 weight has 8 significant bits, so neighbours near 1.0 are 2^-8 to 2^-7 apart, and AdamW's usual update of
some 3e-4 rounds away to nothing. Rounded up or down at random, with the probability of each proportional to the
nearness, the updates are right in the mean (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision";
Zamirai et al. 2020, "Revisiting BFloat16 Training").
"""

from __future__ import annotations

import torch

_LOW_BITS = 0xFFFF
"""What float32 has below the last bit of bfloat16."""
_WORD = 2**64 - 1


def stochastic_round(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Round to one of the two neighbours in bfloat16, so that the mean over many draws is the value itself.

    Args:
        values: float32, on the generator's device. Unchanged.

    Returns:
        bfloat16, same shape. Values that bfloat16 can hold are returned as they are, infinities and NaN included.
        Finite values above the largest of bfloat16 may become the infinity of their sign.
    """
    return round_with(values, random_bits(tuple(values.shape), generator))


def random_bits(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Integers of which the low 16 bits are random: int32, on the generator's device."""
    return torch.empty(shape, dtype=torch.int32, device=generator.device).random_(generator=generator)


def round_with(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """`stochastic_round` with given random numbers.

    The bit patterns of floats of one sign are ordered like their values. Adding 16 random bits and cutting off as
    many rounds the magnitude up with probability (low bits / 2^16), and the exponent takes the carry.

    Args:
        values: float32. Unchanged.
        noise: int32, same shape, see `random_bits`. Overwritten: it is the scratch memory.
    """
    noise.bitwise_and_(_LOW_BITS).add_(values.view(torch.int32)).bitwise_and_(~_LOW_BITS)
    # The bits of a NaN can carry over into the sign and become a zero.
    return torch.where(torch.isfinite(values), noise.view(torch.float32), values).to(torch.bfloat16)


def mixed_seed(*numbers: int) -> int:
    """A seed of 64 bits that looks random in all of them, also for small and consecutive numbers.

    The finaliser of splitmix64 (Steele et al. 2014) after each number. Generators on a CPU use only the low 32 bits.
    """
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state
