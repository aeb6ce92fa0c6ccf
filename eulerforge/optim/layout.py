"""A parameter as a matrix of which this process holds some rows, cut into tiles that are the same on every process.

Tiles bound the float32 scratch memory of an optimiser, and they are where its random numbers come from: each tile of
the *whole* parameter has a number, and a process that holds only some of its rows draws the numbers of all and takes
those of its own. So a result depends neither on the number of processes nor on where shards begin.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from eulerforge.models.shards import local_rows
from eulerforge.optim.rounding import mixed_seed, random_bits

TILE = 2**21
"""Elements of a tile: 8 MiB in float32, and an optimiser has up to seven such tensors at a time. Half as many double
the number of kernels, whose start then takes longer than their work on a GPU. A change of it is a change of the
random numbers."""


@dataclass(frozen=True)
class Tile:
    """A part of this process's rows.

    Attributes:
        rows: within this process's rows.
        columns: all of them, unless a single row is longer than a tile.
        number: of the tile in the whole parameter.
        shape: of the tile in the whole parameter, of which `rows` may be only a part.
        first: the first of `rows` in the whole tile.
    """

    rows: slice
    columns: slice
    number: int
    shape: tuple[int, int]
    first: int

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        """The tile's elements, not a copy. `matrix`: (this process's rows, columns)."""
        return matrix[self.rows, self.columns]


class TileNoise:
    """Random numbers of a tile, a pure function of the numbers that it is made from.

    A run that resumes makes the same without a saved generator, and so do replicas of a parameter.
    """

    def __init__(self, tile: Tile, device: torch.device, *numbers: int) -> None:
        self._tile = tile
        self._generator = torch.Generator(device).manual_seed(mixed_seed(*numbers, tile.number))

    def draw(self) -> torch.Tensor:
        """The next ones: int32 `random_bits`, shape of the part of the tile that this process holds."""
        first, count = self._tile.first, self._tile.rows.stop - self._tile.rows.start
        return random_bits(self._tile.shape, self._generator)[first : first + count]


@dataclass(frozen=True)
class Layout:
    """Rows are dimension 0, which is what FSDP2 cuts; all other dimensions together are columns.

    Attributes:
        rows: of the whole parameter.
        first_row: the first that this process holds.
        local_rows: how many it holds. May be 0.
    """

    rows: int
    columns: int
    first_row: int
    local_rows: int

    @classmethod
    def of(cls, parameter: torch.Tensor) -> Layout:
        """The layout of a plain parameter, or of one that is sharded in dimension 0 as `torch.chunk` cuts."""
        rows = parameter.shape[0] if parameter.ndim else 1
        start, stop = local_rows(parameter)
        return cls(rows, math.prod(parameter.shape[1:]), start, stop - start)

    def matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """This process's elements as (local_rows, columns); a copy where they are not contiguous."""
        return local_part(tensor).reshape(self.local_rows, -1 if self.local_rows else self.columns)

    def tiles(self) -> Iterator[Tile]:
        """The tiles that this process holds a part of."""
        height, width = max(1, TILE // max(1, self.columns)), min(self.columns, TILE)
        end = self.first_row + self.local_rows
        for band in range(self.first_row // height, -(-end // height) if self.local_rows else 0):
            top, bottom = band * height, min((band + 1) * height, self.rows)
            start, stop = max(top, self.first_row), min(bottom, end)
            for across, left in enumerate(range(0, self.columns, max(1, width))):
                right = min(left + width, self.columns)
                yield Tile(
                    rows=slice(start - self.first_row, stop - self.first_row),
                    columns=slice(left, right),
                    number=band * -(-self.columns // width) + across,
                    shape=(bottom - top, right - left),
                    first=start - top,
                )


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, not a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient of a parameter that has one."""
    assert parameter.grad is not None
    return parameter.grad


@contextlib.contextmanager
def weights_of(parameter: torch.Tensor, layout: Layout) -> Iterator[torch.Tensor]:
    """The parameter's elements as (local_rows, columns), to be changed in place in the context."""
    local = local_part(parameter.detach())
    matrix = layout.matrix(local)
    yield matrix
    if not local.is_contiguous():  # the matrix is a copy
        local.copy_(matrix.view(local.shape))


def sharded_like(parameter: torch.Tensor, local: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A tensor of state as torch.distributed.checkpoint needs it, to store it and to read it into other shards.

    Args:
        local: this process's rows.
        shape: of the whole tensor; dimension 0 is the parameter's.

    Returns:
        `local` itself for a plain parameter, else a DTensor of it on the parameter's mesh, with its placements.
    """
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
