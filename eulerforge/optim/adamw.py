"""AdamW that needs little memory: bfloat16 parameters without float32 copies, and moments in bfloat16 or 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

from eulerforge.optim.blockwise import blocks_per_row, dequantise, quantise, zero_code
from eulerforge.optim.layout import Layout, Tile, TileNoise, gradient_of, local_part, sharded_like, weights_of
from eulerforge.optim.rounding import round_with

Groups = Iterable[dict[str, Any]] | Iterable[nn.Parameter]

SMALLEST_IN_8_BITS = 4096
"""Elements of the smallest parameter whose moments are written in 8 bits, as in Dettmers et al. 2022."""


class LeanAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019), computed in float32 whatever is stored.

    | parameter | moments             | bytes a parameter, with its gradient | written with            |
    |-----------|---------------------|--------------------------------------|-------------------------|
    | bfloat16  | bfloat16            | 8                                    | stochastic rounding     |
    | bfloat16  | 8 bits (`bits=8`)   | 6                                    | parameter: stochastic   |
    | float32   | float32             | 16                                   | exact, torch's numbers  |
    | float32   | 8 bits (`bits=8`)   | 10                                   | parameter: exact        |

    A model may have parameters of both kinds. With `bits=8`, parameters with fewer than `SMALLEST_IN_8_BITS` elements
    or 2 dimensions keep their moments unquantised: they are few, and norms and biases are sensitive.

    Parameters may be plain, or DTensors that are sharded in dimension 0 (FSDP2, HSDP); state is then sharded in the
    same way. Parameters are worked on in tiles (`layout.Tile`), which bound the scratch memory to some 64 MB and have
    random numbers of their own: those are a function of `seed`, the step, the parameter's place among all, and the
    tile. A resumed run rounds as an uninterrupted one, on whatever number of processes; replicas stay the same.

    Args:
        params: parameters, or groups with settings of their own.
        bits: 8 for moments in 8 bits, None for moments in the parameter's dtype.
        seed: of the random numbers.
    """

    def __init__(
        self,
        params: Groups,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        seed: int,
        bits: Literal[8] | None = None,
    ) -> None:
        self._seed, self._bits = seed, bits
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dtype not in (torch.float32, torch.bfloat16):
                    raise ValueError(f"a parameter is {parameter.dtype}: only float32 and bfloat16 can be trained")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, place)
                place += 1
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over state. torch's own would cast all of it to the parameter's dtype, codes and scales too."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                self.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device)
                    for key, value in state_dict["state"][number].items()
                }

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], place: int) -> None:
        """One step of one parameter. `place` is its number among all, the same on every process."""
        state = self.state[parameter]
        if not state:
            state.update(self._new_state(parameter, group))
        state["step"] += 1
        layout = Layout.of(parameter)
        moments = _Moment(state, "exp_avg", layout), _Moment(state, "exp_avg_sq", layout)
        gradient = layout.matrix(gradient_of(parameter))
        rule = _Rule(group, state["step"].item())
        with weights_of(parameter, layout) as weights:
            for tile in layout.tiles():
                _update_tile(tile, weights, gradient, moments, rule, self._noise(parameter, tile, place))

    def _noise(self, parameter: nn.Parameter, tile: Tile, *numbers: int) -> TileNoise:
        """Random numbers of this step. `numbers` tell one use of a tile from another."""
        step = int(self.state[parameter]["step"].item())
        return TileNoise(tile, parameter.device, self._seed, step, *numbers)

    def _new_state(self, parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32)}
        small = parameter.ndim < 2 or parameter.numel() < SMALLEST_IN_8_BITS
        for name in ("exp_avg", "exp_avg_sq"):
            if self._bits is None or small:
                state[name] = zeros_like_parameter(parameter)
            else:
                state |= _zero_codes(parameter, name)
        return state


class _Rule:
    """AdamW's arithmetic of one step, in the order of torch's, so that float32 gives torch's numbers."""

    def __init__(self, group: dict[str, Any], step: float) -> None:
        self._beta1, self._beta2 = group["betas"]
        self._shrink, self._eps = 1 - group["lr"] * group["weight_decay"], group["eps"]
        self._size = group["lr"] / (1 - self._beta1**step)
        self._root = math.sqrt(1 - self._beta2**step)

    def apply(self, weight: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, gradient: torch.Tensor) -> None:
        """Change the first three in place. All float32 and of one shape."""
        weight.mul_(self._shrink)
        mean.lerp_(gradient, 1 - self._beta1)
        square.mul_(self._beta2).addcmul_(gradient, gradient, value=1 - self._beta2)
        weight.addcdiv_(mean, square.sqrt().div_(self._root).add_(self._eps), value=-self._size)


class _Moment:
    """A moment of one parameter, read and written tile by tile, in whatever form its state has."""

    def __init__(self, state: dict[str, Any], name: str, layout: Layout) -> None:
        self._signed = name == "exp_avg"
        self._plain = layout.matrix(state[name]) if name in state else None
        if self._plain is None:
            self._codes = layout.matrix(state[f"{name}_codes"])
            self._scales = local_part(state[f"{name}_scales"])

    def read(self, tile: Tile) -> torch.Tensor:
        """float32. Of a float32 moment this is the moment's own memory."""
        if self._plain is not None:
            return tile.of(self._plain).float()
        values = dequantise(tile.of(self._codes), self._scales[tile.rows, _blocks(tile)], self._signed)
        return values if self._signed else values.square_()

    def write(self, tile: Tile, values: torch.Tensor, noise: TileNoise) -> None:
        """Store what was read and changed."""
        if self._plain is not None:
            write(tile.of(self._plain), values, noise)
            return
        codes, scales = quantise(values if self._signed else values.sqrt(), self._signed)
        tile.of(self._codes).copy_(codes)
        self._scales[tile.rows, _blocks(tile)] = scales


def _update_tile(
    tile: Tile,
    weights: torch.Tensor,
    gradient: torch.Tensor,
    moments: tuple[_Moment, _Moment],
    rule: _Rule,
    noise: TileNoise,
) -> None:
    """A function of its own, so that the scratch memory of a tile is free when the next one begins."""
    weight, mean, square = tile.of(weights).float(), *(moment.read(tile) for moment in moments)
    rule.apply(weight, mean, square, tile.of(gradient).float())
    write(tile.of(weights), weight, noise)
    for moment, values in zip(moments, (mean, square), strict=True):
        moment.write(tile, values, noise)


def write(target: torch.Tensor, values: torch.Tensor, noise: TileNoise) -> None:
    """Store float32 values, rounded at random where the target is bfloat16.

    Args:
        target: bfloat16, or the same memory as `values`, which is what `.float()` of a float32 tensor gives.
    """
    if target.dtype == torch.bfloat16:
        target.copy_(round_with(values, noise.draw()))


def zeros_like_parameter(parameter: nn.Parameter) -> torch.Tensor:
    """State of the parameter's shape and dtype, sharded as it is."""
    local = torch.zeros_like(local_part(parameter), memory_format=torch.contiguous_format)
    return sharded_like(parameter, local, parameter.shape)


def _zero_codes(parameter: nn.Parameter, name: str) -> dict[str, torch.Tensor]:
    """State of a moment in 8 bits: uint8 codes of the parameter's shape, float32 scales (rows, blocks of a row)."""
    layout, local = Layout.of(parameter), local_part(parameter)
    code, blocks = zero_code(signed=name == "exp_avg"), blocks_per_row(layout.columns)
    codes = torch.full_like(local, code, dtype=torch.uint8, memory_format=torch.contiguous_format)
    scales = torch.zeros(layout.local_rows, blocks, device=local.device)
    return {
        f"{name}_codes": sharded_like(parameter, codes, parameter.shape),
        f"{name}_scales": sharded_like(parameter, scales, torch.Size((layout.rows, blocks))),
    }


def _blocks(tile: Tile) -> slice:
    """The scales of a tile's columns. Tiles begin at multiples of a block."""
    start = blocks_per_row(tile.columns.start)
    return slice(start, start + blocks_per_row(tile.columns.stop - tile.columns.start))
