"""The global order of rows: a pure function of (seed, epoch), with O(1) memory and random access.

A format-preserving permutation of [0, n): a balanced Feistel network over the smallest even number of bits that holds
n, with cycle walking for values outside the range (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
Round functions are SplitMix64 finalisers keyed by seed, epoch and round. Nothing is stored, so a resumed run needs
only its step number, and 10^9 rows cost as much as 10.
"""

from __future__ import annotations

_ROUNDS = 6
_MASK64 = (1 << 64) - 1


class EpochOrder:
    """Position in the endless stream of epochs -> row.

    Every epoch visits each row once, in another order. Epochs follow each other without a gap: a step at the end of
    an epoch takes its remaining rows from the next one.

    Args:
        rows: number of rows, at least 1.
        seed: `training.seed`.
    """

    def __init__(self, rows: int, seed: int) -> None:
        assert rows > 0
        self.rows = rows
        self._seed = seed
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


def _mix(value: int) -> int:
    """SplitMix64's finaliser: a bijection of 64-bit integers with full avalanche (Steele, Lea and Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
