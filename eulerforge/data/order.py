"""The global order of rows: a pure function of (seed, epoch), with O(1) memory and random access.

`EpochOrder` is a format-preserving permutation of [0, n): a balanced Feistel network over the smallest even number of
bits that holds n, with cycle walking for values outside the range (Black and Rogaway, "Ciphers with arbitrary finite
domains", 2002). Round functions are SplitMix64 finalisers keyed by seed, epoch and round. Nothing is stored, so a
resumed run needs only its step number, and 10^9 rows cost as much as 10.

`MixtureOrder` gives each source its share of the positions, also by a formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

_ROUNDS = 6
_MASK64 = (1 << 64) - 1


class Order(Protocol):
    """Position in the endless stream of epochs -> row."""

    def row(self, position: int) -> int:
        """The row at a position (0-based) of the stream."""


class FileOrder:
    """Rows as they lie in the files, again and again."""

    def __init__(self, rows: int) -> None:
        assert rows > 0
        self.rows = rows

    def row(self, position: int) -> int:
        """The row at a position (0-based) of the stream."""
        return position % self.rows


class EpochOrder:
    """A permutation of the rows in each epoch.

    Every epoch visits each row once, in another order. Epochs follow each other without a gap: a step at the end of
    an epoch takes its remaining rows from the next one.

    Args:
        rows: number of rows, at least 1.
        seed: `training.seed`.
        source: number of the source in a mixture; sources of the same size are not visited in the same order.
    """

    def __init__(self, rows: int, seed: int, source: int = 0) -> None:
        assert rows > 0
        self.rows = rows
        self._seed = seed if source == 0 else seed ^ _mix(source)
        self._half_bits = max(1, ((rows - 1).bit_length() + 1) // 2)
        self._keys: tuple[int, tuple[int, ...]] = (-1, ())

    def row(self, position: int) -> int:
        """The row at a position (0-based) of the stream."""
        epoch, index = divmod(position, self.rows)
        keys = self._round_keys(epoch)
        value = self._permute(index, keys)
        while value >= self.rows:
            value = self._permute(value, keys)
        return value

    def _round_keys(self, epoch: int) -> tuple[int, ...]:
        if self._keys[0] != epoch:
            base = _mix(_mix(self._seed & _MASK64) ^ _mix(epoch + 0x9E3779B97F4A7C15))
            self._keys = (epoch, tuple(_mix(base + number) for number in range(_ROUNDS)))
        return self._keys[1]

    def _permute(self, value: int, keys: tuple[int, ...]) -> int:
        mask = (1 << self._half_bits) - 1
        left, right = value >> self._half_bits, value & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << self._half_bits) | right


class MixtureOrder:
    """Several sources in exact proportion, each in its own order and with its own epochs.

    The sources are split in halves, again and again. At each split, of the first p positions floor(p * w + 1/2) go
    left, w being the left half's share of the weight (a Beatty sequence), so that among any first p positions a
    source's number is off from its share by less than one for each split above it. With k sources that are log2 k
    splits, and a position is found in as many steps.

    Args:
        orders: of each source.
        rows: of each source; `row` counts through all of them.
        weights: of each source, greater than 0.
    """

    def __init__(self, orders: Sequence[Order], rows: Sequence[int], weights: Sequence[Fraction]) -> None:
        self._orders = tuple(orders)
        self._bases = tuple(sum(rows[:number]) for number in range(len(rows)))
        self._sums = tuple(sum(weights[:number], Fraction(0)) for number in range(len(weights) + 1))

    def row(self, position: int) -> int:
        """The row at a position (0-based), counted through all sources."""
        source, index = self.split(position)
        return self._bases[source] + self._orders[source].row(index)

    def split(self, position: int) -> tuple[int, int]:
        """(source, position in the source's own stream) of a position."""
        low, high = 0, len(self._orders)
        while high - low > 1:
            middle = (low + high) // 2
            share = (self._sums[middle] - self._sums[low]) / (self._sums[high] - self._sums[low])
            before = _part(position, share)
            if _part(position + 1, share) > before:
                position, high = before, middle
            else:
                position, low = position - before, middle
        return low, position


def _part(count: int, share: Fraction) -> int:
    """floor(count * share + 1/2), in whole numbers."""
    return (2 * count * share.numerator + share.denominator) // (2 * share.denominator)


def _mix(value: int) -> int:
    """SplitMix64's finaliser: a bijection of 64-bit integers with full avalanche (Steele, Lea and Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
