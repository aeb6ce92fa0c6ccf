"""AdamW's groups and arithmetic, clipping, and the learning rate of every step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from eulerforge.optim.optimizer import build_optimizer, clip_gradients, set_learning_rate
from eulerforge.optim.schedules import SCHEDULES, learning_rate


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 2)
        self.conv = nn.Parameter(torch.ones(2, 1, 3))
        self.norm = nn.LayerNorm(2)
        self.gate = nn.Parameter(torch.tensor(1.0))
        self.a_log = nn.Parameter(torch.ones(2, 2))
        self.a_log._no_weight_decay = True  # type: ignore[attr-defined]
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.head = nn.Linear(2, 4)
        self.head.weight = self.embed.weight


def _adamw(model: nn.Module, **changes: float) -> torch.optim.AdamW:
    values = {"lr": 0.1, "weight_decay": 0.1, "eps": 1e-8} | changes
    return build_optimizer(model, kind="adamw", betas=(0.9, 0.95), seed=0, **values)


def test_decay_only_where_it_belongs() -> None:
    """Matrices decay; vectors, scalars and marked matrices do not; frozen ones are left out; tied ones count once."""
    model = _Model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        group["weight_decay"]: [names[id(parameter)] for parameter in group["params"]]
        for group in _adamw(model).param_groups
    }
    assert {decay: sorted(members) for decay, members in groups.items()} == {
        0.1: ["conv", "embed.weight"],
        0.0: ["a_log", "gate", "head.bias", "norm.bias", "norm.weight"],
    }
    assert all(len(members) == len(set(members)) for members in groups.values())


def test_a_mark_that_says_false_does_not_exempt() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight._no_weight_decay = False  # type: ignore[attr-defined]
    assert [group["weight_decay"] for group in _adamw(model).param_groups] == [0.1]


def test_every_setting_reaches_the_optimiser() -> None:
    optimizer = build_optimizer(_Model(), kind="adamw", lr=0.3, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6, seed=0)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.8, 0.9), 1e-6)


def test_two_steps_equal_the_formula() -> None:
    """Loshchilov and Hutter, decoupled decay; a matrix with decay and a bias without, another rate in each step."""
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0]]))
        model.bias.fill_(0.5)
    optimizer = _adamw(model, eps=1e-3)
    gradients = [([0.5, -0.25], 2.0), ([-1.0, 0.125], 0.0)]
    expected = {"w0": 1.0, "w1": -2.0, "b": 0.5}
    first = dict.fromkeys(expected, 0.0)
    second = dict.fromkeys(expected, 0.0)
    for step, ((weights, bias), lr) in enumerate(zip(gradients, (0.1, 0.01), strict=True), 1):
        model.weight.grad = torch.tensor([weights])
        model.bias.grad = torch.tensor([bias])
        set_learning_rate(optimizer, lr)
        optimizer.step()
        for name, gradient in {"w0": weights[0], "w1": weights[1], "b": bias}.items():
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            if name != "b":
                expected[name] *= 1 - lr * 0.1
            corrected = second[name] / (1 - 0.95**step)
            expected[name] -= lr * first[name] / (1 - 0.9**step) / (math.sqrt(corrected) + 1e-3)
    assert model.weight.tolist()[0] == pytest.approx([expected["w0"], expected["w1"]], rel=1e-6)
    assert model.bias.item() == pytest.approx(expected["b"], rel=1e-6)


def test_the_learning_rate_is_set_in_all_groups() -> None:
    optimizer = _adamw(_Model())
    set_learning_rate(optimizer, 0.007)
    assert [group["lr"] for group in optimizer.param_groups] == [0.007, 0.007]


def _with_gradients(*gradients: list[float] | None) -> list[nn.Parameter]:
    parameters = []
    for values in gradients:
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = None if values is None else torch.tensor(values)
        parameters.append(parameter)
    return parameters


@pytest.mark.parametrize(("limit", "factor"), [(None, 1.0), (26.0, 1.0), (1.3, 0.1), (1e-3, 1e-3 / 13)])
def test_the_norm_is_that_before_clipping(limit: float | None, factor: float) -> None:
    """3, 4 and 12 over two parameters: one global norm of 13. A parameter without a gradient does no harm."""
    parameters = _with_gradients([3.0, 4.0], None, [0.0, 12.0])
    norm = clip_gradients(iter(parameters), limit)
    assert norm.dtype == torch.float32
    assert norm.item() == 13.0
    assert parameters[0].grad is not None
    assert parameters[0].grad.tolist() == pytest.approx([3 * factor, 4 * factor], rel=1e-5)
    assert parameters[1].grad is None
    assert parameters[2].grad is not None
    assert parameters[2].grad.tolist() == pytest.approx([0.0, 12 * factor], rel=1e-5)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_non_finite_norm_is_reported(value: float) -> None:
    assert not math.isfinite(clip_gradients(_with_gradients([1.0, value]), 1.0).item())


COSINE_QUARTER = (1 + math.cos(math.pi / 4)) / 2
TABLE: list[tuple[str, int, int, float, list[float]]] = [
    # schedule, warm-up, max_steps, min_lr_ratio, factor of every step
    ("cosine", 0, 4, 0.0, [COSINE_QUARTER, 0.5, 1 - COSINE_QUARTER, 0.0]),
    ("cosine", 2, 6, 0.0, [0.5, 1.0, COSINE_QUARTER, 0.5, 1 - COSINE_QUARTER, 0.0]),
    ("cosine", 0, 2, 0.1, [0.55, 0.1]),
    ("cosine", 0, 1, 0.0, [0.0]),
    ("cosine", 4, 4, 0.0, [0.25, 0.5, 0.75, 1.0]),
    ("cosine", 1, 2, 0.0, [1.0, 0.0]),
    ("linear", 0, 4, 0.0, [0.75, 0.5, 0.25, 0.0]),
    ("linear", 1, 5, 0.2, [1.0, 0.8, 0.6, 0.4, 0.2]),
    ("constant", 0, 3, 0.5, [1.0, 1.0, 1.0]),
    ("constant", 2, 3, 0.0, [0.5, 1.0, 1.0]),
    ("wsd", 0, 10, 0.0, [1.0] * 8 + [0.5, 0.0]),
    ("wsd", 5, 15, 0.2, [0.2, 0.4, 0.6, 0.8] + [1.0] * 9 + [0.6, 0.2]),
    ("wsd", 3, 3, 0.0, [1 / 3, 2 / 3, 1.0]),
]


@pytest.mark.parametrize(("schedule", "warmup", "steps", "floor", "factors"), TABLE)
def test_schedule_table(schedule: str, warmup: int, steps: int, floor: float, factors: list[float]) -> None:
    rates = [
        learning_rate(step, peak=3e-3, schedule=schedule, warmup_steps=warmup, max_steps=steps, min_lr_ratio=floor)
        for step in range(1, steps + 1)
    ]
    assert rates == pytest.approx([3e-3 * factor for factor in factors], rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_rates_never_rise_after_the_warm_up_and_stay_in_bounds(schedule: str) -> None:
    rates = [
        learning_rate(step, peak=1.0, schedule=schedule, warmup_steps=7, max_steps=100, min_lr_ratio=0.1)
        for step in range(1, 101)
    ]
    assert rates[6] == max(rates) == 1.0
    assert all(left >= right - 1e-15 for left, right in pairwise(rates[6:]))
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1, rel=1e-12)


def test_the_last_step_of_a_cosine_prints_as_zero() -> None:
    rate = learning_rate(500, peak=3e-4, schedule="cosine", warmup_steps=50, max_steps=500, min_lr_ratio=0.0)
    assert f"{rate:.2e}" == "0.00e+00"
