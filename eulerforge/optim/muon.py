"""Muon for the matrices of a model's blocks, AdamW for everything else, in one optimiser.

Not `torch.optim.Muon`, although that exists from torch 2.9 on, for three reasons: it rounds bfloat16 weights to the
nearest; on sharded matrices each of its 15 products would be a collective of its own, where one gather is enough; and
torch.distributed.checkpoint wants one optimiser object, which it cannot be together with AdamW. On float32 parameters
of one process on a GPU the arithmetic is torch's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from eulerforge.models.shards import full_tensor
from eulerforge.optim.adamw import LeanAdamW, write, zeros_like_parameter
from eulerforge.optim.layout import Layout, gradient_of, sharded_like, weights_of

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Keller Jordan 2024, https://kellerjordan.github.io/posts/muon/: steepest at zero, so that singular values come to
0.7 ... 1.2 in five iterations, which is as good as 1."""
_MOMENTUM_NOISE = 1
"""Tells the random numbers of a tile's momentum from those of its weights."""
RMS = 0.2
"""Root mean square of an AdamW update per lr (Liu et al. 2025, "Muon is Scalable for LLM Training"). Updates are
scaled to it, so that AdamW's learning rate and decay serve for both."""


class MuonWithAdamW(LeanAdamW):
    """Groups with `"algorithm": "muon"` hold matrices for Muon, those with `"adamw"` anything for `LeanAdamW`.

    Muon's state is `step` and `momentum_buffer`, in the parameter's dtype: 6 bytes a bfloat16 parameter with its
    gradient, written with stochastic rounding, and 12 a float32 one.

    Every process of a sharded run gathers each update (in the dtype in which it is orthogonalised) and computes the
    whole of it, to keep its own rows. All processes must therefore have gradients for the same parameters.
    """

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], place: int) -> None:
        if group["algorithm"] == "adamw":
            super()._update(parameter, group, place)
            return
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["momentum_buffer"] = zeros_like_parameter(parameter)
        state["step"] += 1
        layout = Layout.of(parameter)
        update = orthogonalised(self._direction(parameter, layout, place))
        own = update[layout.first_row : layout.first_row + layout.local_rows]
        size = group["lr"] * RMS * math.sqrt(max(parameter.shape))
        with weights_of(parameter, layout) as weights:
            for tile in layout.tiles():
                weight = tile.of(weights).float()
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(tile.of(own), alpha=-size)
                write(tile.of(weights), weight, self._noise(parameter, tile, place))

    def _direction(self, parameter: nn.Parameter, layout: Layout, place: int) -> torch.Tensor:
        """Move the momentum on; Nesterov's look ahead as a whole matrix, gathered from all shards."""
        gradient = layout.matrix(gradient_of(parameter))
        buffer = layout.matrix(self.state[parameter]["momentum_buffer"])
        ahead = torch.empty_like(gradient, dtype=working_dtype(gradient.device))
        for tile in layout.tiles():
            momentum, own = tile.of(buffer).float(), tile.of(gradient).float()
            momentum.lerp_(own, 1 - MOMENTUM)
            tile.of(ahead).copy_(own.lerp(momentum, MOMENTUM))
            write(tile.of(buffer), momentum, self._noise(parameter, tile, place, _MOMENTUM_NOISE))
        return full_tensor(sharded_like(parameter, ahead, parameter.shape))


def working_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the iterations: bfloat16, which is enough for a direction, where it is faster.

    The iterations magnify small singular values by up to 3.4445^5 = 490, and with them what rounding leaves where a
    gradient has nothing: two runs whose gradients differ in the last bit of float32 differ in such directions by as
    much as the update (0.003 of 0.011 in three steps), and by 1e-6 of it in float32. Neither trains worse.
    """
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular vectors as they are, singular values near 1.

    Newton-Schulz iterations of fifth order, in the dtype of the matrix.

    Args:
        matrix: (rows, columns).
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    result = matrix.T if tall else matrix
    result = result / result.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = result @ result.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        result = torch.addmm(result, polynomial, result, beta=a)
    return result.T if tall else result
