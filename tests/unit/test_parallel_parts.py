"""The parts that several processes need, each by itself and without any: units, skeletons, gradients, strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from eulerforge.distributed.context import start_processes
from eulerforge.distributed.gradients import anchor_parameters, fill_missing_gradients
from eulerforge.distributed.parallelize import STRATEGIES, choose_strategy
from eulerforge.errors import ModelError
from eulerforge.models.build import build_model, is_tied
from eulerforge.models.directory import ModelDirectory
from eulerforge.models.lean import parameter_marks, parameters_on_meta, restore_marks
from eulerforge.models.units import find_wrap_units
from eulerforge.optim.optimizer import global_norm
from tests.kit.models import write_custom, write_llama, write_mixtral

TINY_HYBRID = Path(__file__).parents[2] / "presets" / "models" / "tiny_hybrid"


class _Block(nn.Module):
    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(experts)])


class _Other(_Block):
    pass


def _model(**parts: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, part in parts.items():
        model.add_module(name, part)
    return model


def _names(model: nn.Module, units: list[nn.Module]) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(unit)] for unit in units]


def test_units_are_the_blocks_of_the_outermost_lists() -> None:
    blocks = nn.ModuleList([_Block(experts=3), _Other(), _Block()])
    model = _model(embed=nn.Embedding(9, 4), body=_model(layers=blocks, norm=nn.LayerNorm(4)))
    assert _names(model, find_wrap_units(model)) == ["body.layers.0", "body.layers.1", "body.layers.2"]


def test_named_classes_win_wherever_they_are() -> None:
    model = _model(a=_Block(), b=_model(layers=nn.ModuleList([_Other(), _Block()])))
    model._no_split_modules = {"_Block"}  # type: ignore[assignment]
    assert _names(model, find_wrap_units(model)) == ["a", "b.layers.1"]


def test_a_small_list_beside_the_blocks_is_no_unit() -> None:
    model = _model(layers=nn.ModuleList([_Block(9), _Block(9)]), heads=nn.ModuleList([nn.Linear(2, 2)]))
    assert _names(model, find_wrap_units(model)) == ["layers.0", "layers.1"]


@pytest.mark.parametrize(
    "model",
    [
        _model(linear=nn.Linear(4, 4)),
        _model(experts=nn.ModuleList([nn.Linear(4, 4)] * 4)),
        _model(layers=nn.ModuleList()),
        _model(layers=nn.ModuleList([nn.Identity()])),
    ],
    ids=["no list", "experts only", "empty list", "no parameters"],
)
def test_no_units_is_an_error_that_names_the_way_out(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="no repeated blocks") as caught:
        find_wrap_units(model)
    assert "_no_split_modules" in caught.value.problems[0].fix
    assert "ddp" in caught.value.problems[0].fix


def _build(path: Path) -> Any:
    return build_model(ModelDirectory.read(path), trust_remote_code=True, seed=1).model


@pytest.mark.parametrize("kind", ["llama", "mixtral", "tiny_hybrid"])
def test_units_of_real_models(tmp_path: Path, kind: str) -> None:
    writers = {"llama": write_llama, "mixtral": write_mixtral}
    model = _build(TINY_HYBRID if kind == "tiny_hybrid" else writers[kind](tmp_path / "model"))
    count = 4 if kind == "tiny_hybrid" else 2
    assert _names(model, find_wrap_units(model)) == [f"model.layers.{index}" for index in range(count)]


@pytest.mark.parametrize("kind", ["llama", "buffers", "tiny_hybrid"])
def test_a_skeleton_has_real_buffers_and_no_parameter_memory(tmp_path: Path, kind: str) -> None:
    path = {
        "llama": lambda: write_llama(tmp_path / "model", tie_word_embeddings=True),
        "buffers": lambda: write_custom(tmp_path / "model", "buffers", tie_word_embeddings=True),
        "tiny_hybrid": lambda: TINY_HYBRID,
    }[kind]()
    whole = _build(path)
    with parameters_on_meta():
        skeleton = _build(path)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert not nn.Linear(2, 2).weight.is_meta  # the patch is gone
    shapes = {name: parameter.shape for name, parameter in whole.named_parameters()}
    assert {name: parameter.shape for name, parameter in skeleton.named_parameters()} == shapes
    assert is_tied(skeleton)
    buffers = dict(skeleton.named_buffers())
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    assert parameter_marks(skeleton).keys() == parameter_marks(whole).keys()


def test_marks_set_before_and_after_assignment_survive() -> None:
    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            early = nn.Parameter(torch.ones(2, 2))
            early._no_weight_decay = True  # type: ignore[attr-defined]
            self.early = early
            self.late = nn.Parameter(torch.ones(2, 2), requires_grad=False)
            self.late._no_weight_decay = True  # type: ignore[attr-defined]

    with parameters_on_meta():
        skeleton = Marked()
    marks = parameter_marks(skeleton)
    assert marks == {"early": {"_no_weight_decay": True}, "late": {"_no_weight_decay": True}}
    assert not skeleton.late.requires_grad
    fresh = Marked()
    del fresh.early._no_weight_decay
    restore_marks(fresh, marks)
    assert fresh.early._no_weight_decay


class _Returns(nn.Module):
    """Uses `used` only; returns its result in one of the shapes that models use."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)
        self.shape = shape

    def forward(self, x: torch.Tensor) -> Any:
        y = self.used(x)
        extra = torch.zeros(())
        return {
            "tensor": y,
            "tuple": (y, None),
            "list": [torch.zeros(2, dtype=torch.long), y],
            "dict": {"aux": extra, "logits": y},
            "output": CausalLMOutput(loss=extra, logits=y),
        }[self.shape]


def _result(output: Any) -> torch.Tensor:
    if isinstance(output, tuple):
        return output[0]
    if isinstance(output, list):
        return output[1]
    return output["logits"] if isinstance(output, dict) else output


@pytest.mark.parametrize("shape", ["tensor", "tuple", "list", "dict", "output"])
def test_anchors_reach_every_parameter_and_change_no_number(shape: str) -> None:
    torch.manual_seed(0)
    plain, anchored = _Returns(shape), _Returns(shape)
    anchored.load_state_dict(plain.state_dict())
    anchor_parameters(anchored, within=anchored, without=())
    x = torch.randn(5, 3)
    results = [_result(module(x)) for module in (plain, anchored)]
    assert torch.equal(*results)
    for result in results:
        result.square().sum().backward()
    assert torch.equal(plain.used.weight.grad, anchored.used.weight.grad)  # type: ignore[arg-type]
    assert plain.unused.weight.grad is None
    assert torch.equal(anchored.unused.weight.grad, torch.zeros(3, 3))  # type: ignore[arg-type]


def test_anchors_leave_out_what_they_are_told_and_rest_without_gradients() -> None:
    module = _Returns("tensor")
    anchor_parameters(module, within=module, without=[module.unused])
    module(torch.randn(2, 3)).sum().backward()
    assert module.unused.weight.grad is None
    with torch.no_grad():
        assert not module(torch.randn(2, 3)).requires_grad


def test_an_output_that_cannot_carry_an_anchor_is_an_error() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self) -> str:
            return "text"

    module = Odd()
    anchor_parameters(module, within=module, without=())
    with pytest.raises(TypeError, match="str"):
        module()


def test_missing_gradients_are_zeros_for_trained_parameters_only() -> None:
    used, unused, frozen = (nn.Parameter(torch.ones(2)) for _ in range(3))
    frozen.requires_grad_(False)
    used.grad = torch.full((2,), 3.0)
    fill_missing_gradients([used, unused, frozen])
    assert torch.equal(used.grad, torch.full((2,), 3.0))
    assert torch.equal(unused.grad, torch.zeros(2))  # type: ignore[arg-type]
    assert frozen.grad is None


def test_the_norm_does_not_depend_on_how_it_is_cut() -> None:
    torch.manual_seed(0)
    whole = torch.randn(1_000_003) * 1e-3
    expected = whole.double().norm().float()
    assert torch.equal(global_norm([whole]), expected)
    assert torch.equal(global_norm(list(whole.chunk(7))), expected)


GIB = 2**30


@pytest.mark.parametrize(
    ("requested", "world_size", "state", "free", "strategy", "reason"),
    [
        ("auto", 1, 9 * GIB, GIB, "single", "one process needs no strategy"),
        ("fsdp", 1, 9 * GIB, GIB, "single", "one process needs no strategy"),
        ("ddp", 2, 9 * GIB, GIB, "ddp", "distributed.strategy: ddp"),
        (
            "auto",
            2,
            6 * GIB,
            10 * GIB,
            "ddp",
            "need 6 GiB, 60% of the 10 GiB free per process is 6 GiB: it fits",
        ),
        (
            "auto",
            2,
            7 * GIB,
            10 * GIB,
            "fsdp",
            "need 7 GiB, 60% of the 10 GiB free per process is 6 GiB: it does not",
        ),
    ],
)
def test_strategy_and_its_arithmetic(
    requested: str, world_size: int, state: int, free: int, strategy: str, reason: str
) -> None:
    name, why = choose_strategy(requested, world_size, state, free)
    assert name == strategy
    assert name in STRATEGIES
    assert reason in why


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # some other program's: the launcher's decision counts
    context = start_processes("cpu", 1, 1.0)
    assert (context.rank, context.world_size, context.is_main, context.store) == (0, 1, True, None)
    assert context.sum([1.5, 2.0]) == [1.5, 2.0]
    assert context.from_main("x", lambda: "value") == "value"
    assert context.gather("x", "own") == ["own"]
    assert context.meet_unless("here", lambda: False) is True
    assert context.meet_unless("here", lambda: True) is False
    context.meet("here")
    with context.main_first("a"), context.local_main_first("b"):
        pass
