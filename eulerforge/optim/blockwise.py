"""Moments of an optimiser in 8 bits: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization".

Each block of 256 elements of a row is divided by its largest magnitude (the scale, float32) and written as the number
of the nearest value in a table of 256 ("dynamic tree quantisation"): seven decades, with more values in the upper
ones. Blocks never reach over the end of a row, so that they are the same however rows are sharded.

Two changes to the paper:

* The signed table is symmetric and its largest magnitude is exactly 1. The paper's has no -1: a block whose largest
  element is negative would shrink a little each time it is written.
* For the second moment it is the square root that is written, and what is not zero is never written as zero. The
  root needs half the decades, as many as the first moment has. Otherwise elements whose gradients are 1e-4 of the
  block's largest keep their first moment and lose their second, and move by exp_avg / eps. A noisy quadratic with
  gradients of four decades in a block, where float32 ends 0.033 from the minimum (root mean square): 7.7 as in the
  paper, 0.108 never written as zero, 0.036 with the root.
"""

from __future__ import annotations

from functools import cache

import torch

BLOCK = 256
"""Elements of a row that share a scale."""

_DECADES = 7
_TINY = torch.finfo(torch.float32).tiny


def blocks_per_row(columns: int) -> int:
    """Number of scales of a row."""
    return -(-columns // BLOCK)


def zero_code(signed: bool) -> int:
    """The code of 0.0."""
    return 127 if signed else 0


def quantise(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Write values as codes and scales.

    Args:
        values: float32 (rows, columns), not negative unless `signed`.

    Returns:
        codes uint8 (rows, columns) and scales float32 (rows, blocks_per_row).
    """
    blocks = _in_blocks(values)
    scales = blocks.abs().amax(dim=2)
    normalised = blocks / scales.clamp_min(_TINY).unsqueeze(2)
    _, limits = _tables(signed, values.device)
    codes = torch.bucketize(normalised, limits, out_int32=True).to(torch.uint8)
    return codes.flatten(1)[:, : values.shape[1]], scales


def dequantise(codes: torch.Tensor, scales: torch.Tensor, signed: bool) -> torch.Tensor:
    """Values of codes and scales: float32 (rows, columns). Writing them again gives the same codes and scales.

    Args:
        codes: uint8 (rows, columns).
        scales: float32 (rows, blocks_per_row).
    """
    table, _ = _tables(signed, codes.device)
    blocks = _in_blocks(table[codes.int()])
    return (blocks * scales.unsqueeze(2)).flatten(1)[:, : codes.shape[1]]


def _in_blocks(values: torch.Tensor) -> torch.Tensor:
    """(rows, columns) -> (rows, blocks, BLOCK), the last block filled up with zeros. A short row is a short block."""
    rows, columns = values.shape
    size = min(BLOCK, columns)
    values = torch.nn.functional.pad(values, (0, -columns % size))
    return values.view(rows, blocks_per_row(columns), size)


@cache
def _tables(signed: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending values of the codes, and the limits between them: float32 (codes,) and (codes - 1,)."""
    magnitudes: list[torch.Tensor] = []
    for decade in range(_DECADES):
        count = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        magnitudes.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade + 1 - _DECADES))
    positive = torch.cat(magnitudes)
    zero = torch.zeros(1, dtype=torch.float64)
    if signed:
        positive = positive / positive[-1]
        table = torch.cat([-positive.flip(0), zero, positive])
    else:
        table = torch.cat([zero, positive, zero + 1])
    limits = (table[:-1] + table[1:]) / 2
    if not signed:
        limits[0] = 0.0  # not zero is never written as zero
    return table.float().to(device), limits.float().to(device)
