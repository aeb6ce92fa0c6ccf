"""Block families of built models: by class, by parameter, by the code that a class reaches, by running it."""

from __future__ import annotations

import functools
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fft as transforms
from torch import nn

from eulerforge.models.build import build_model
from eulerforge.models.directory import ModelDirectory
from eulerforge.models.families import families_of, find_block_modules, float32_modules, float32_parameters
from eulerforge.models.fft_code import calls_fft
from eulerforge.models.lean import parameters_on_meta
from tests.kit.models import write_blocks, write_llama, write_mixtral

TINY_HYBRID = Path(__file__).parents[2] / "presets" / "models" / "tiny_hybrid"


def _skeleton(path: Path) -> Any:
    with parameters_on_meta():
        return build_model(ModelDirectory.read(path), True, 1, with_weights=False).model


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["attention"], {"attention": "layers.0.mixer"}),
        (["attention", "moe"], {"attention": "layers.0.mixer", "moe": "layers.1.mixer"}),
        (["ssm", "attention"], {"mamba": "layers.0.mixer", "attention": "layers.1.mixer"}),
        (["hyena", "hyena"], {"hyena": "layers.0.mixer"}),
        (["retention"], {"retnet": "layers.0.mixer"}),
        (["attention", "helper"], {"attention": "layers.0.mixer", "fft": "layers.1.mixer"}),
        (
            ["moe", "helper", "retention"],
            {"moe": "layers.0.mixer", "fft": "layers.1.mixer", "retnet": "layers.2.mixer"},
        ),
    ],
)
@pytest.mark.parametrize("lean", [False, True])
def test_families_and_their_first_modules(
    tmp_path: Path, kinds: list[str], expected: dict[str, str], lean: bool
) -> None:
    path = write_blocks(tmp_path / "model", kinds)
    model = _skeleton(path) if lean else build_model(ModelDirectory.read(path), True, 1).model
    blocks = find_block_modules(model)
    found = {block.family: block.evidence.split()[0] for block in families_of(blocks)}
    assert found == expected
    assert next(model.parameters()).is_meta is lean  # nothing was given memory


def test_transformers_own_models(tmp_path: Path) -> None:
    assert [block.family for block in families_of(find_block_modules(_skeleton(write_llama(tmp_path / "l"))))] == [
        "attention"
    ]
    families = [block.family for block in families_of(find_block_modules(_skeleton(write_mixtral(tmp_path / "m"))))]
    assert families == ["attention", "moe"]


def test_the_module_that_computes_is_named_not_its_layer() -> None:
    blocks = find_block_modules(_skeleton(TINY_HYBRID))
    strict = float32_modules(blocks, ["hyena", "retnet", "fft"])
    assert {name: type(module).__name__ for name, module in strict.items()} == {
        "model.layers.0.mixer": "HyenaMixer",
        "model.layers.2.mixer": "MultiScaleRetention",
    }


def test_the_probe_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    """Counters, random numbers and hooks."""
    path = write_blocks(tmp_path / "model", ["moe", "hyena"])
    model = build_model(ModelDirectory.read(path), True, 1).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    find_block_modules(model)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.training is build_model(ModelDirectory.read(path), True, 1).model.training


def test_parameters_that_stay_in_float32() -> None:
    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("A_log", "D", "dt_bias", "other"):
                self.register_parameter(name, nn.Parameter(torch.ones(2)))

    class Model(nn.Module):
        _keep_in_fp32_modules_strict = ("gate",)

        def __init__(self) -> None:
            super().__init__()
            self.scan = Scan()
            self.D = nn.Parameter(torch.ones(1))  # no state-space model: there is no A_log beside it
            self.gate = nn.Linear(2, 2)
            self.gateway = nn.Linear(2, 2)
            self.marked = nn.Parameter(torch.ones(1))
            self.marked._keep_float32 = True  # type: ignore[attr-defined]

    assert float32_parameters(Model()) == {
        "scan.A_log",
        "scan.D",
        "scan.dt_bias",
        "gate.weight",
        "gate.bias",
        "marked",
    }


# --- what a class can reach -------------------------------------------------------------------------------------


def _direct(x: torch.Tensor) -> torch.Tensor:
    return torch.fft.rfft(x).real


def _aliased(x: torch.Tensor) -> torch.Tensor:
    return transforms.rfft(x).real


def _twice_removed(x: torch.Tensor) -> torch.Tensor:
    return _aliased(x)


def _first_of_a_circle(x: torch.Tensor) -> torch.Tensor:
    return _second_of_a_circle(x)


def _second_of_a_circle(x: torch.Tensor) -> torch.Tensor:
    return x if x.ndim else _first_of_a_circle(x)


_partial = functools.partial(_direct)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.fft(x)


class _Direct(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _direct(x)


class _TwiceRemoved(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.helper(x)

    def helper(self, x: torch.Tensor) -> torch.Tensor:
        return _twice_removed(x)


class _ByPartial(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _partial(x)


class _ByFunction(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Function.apply(x)


class _ImportedInside(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torch.fft import rfft

        return rfft(x)


class _InLambda(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (lambda value: torch.fft.rfft(value))(x)


class _ShortTime(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stft(x, 8, return_complex=True)


class _Inherited(_Direct):
    pass


class _Circle(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _first_of_a_circle(x)


class _HoldsOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = _Direct()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.child(x)


class _NamedFft(nn.Module):
    def fft(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fft(x)


@pytest.mark.parametrize(
    "owner",
    [_Direct, _TwiceRemoved, _ByPartial, _ByFunction, _ImportedInside, _InLambda, _ShortTime, _Inherited],
    ids=lambda owner: owner.__name__,
)
def test_classes_that_reach_an_fft(owner: type[nn.Module]) -> None:
    assert calls_fft(owner)


@pytest.mark.parametrize("owner", [_Circle, _HoldsOne, nn.Linear], ids=lambda owner: owner.__name__)
def test_classes_that_do_not(owner: type[nn.Module]) -> None:
    assert not calls_fft(owner)


def test_a_method_named_fft_is_counted_only_beside_torch() -> None:
    """`self.fft` of a class that does not mention torch by name is its own."""
    module = types.ModuleType("kit_plain")
    sys.modules["kit_plain"] = module
    try:
        exec(
            "from torch import nn\nclass Plain(nn.Module):\n    def forward(self, x):\n        return self.fft(x)\n"
            "    def fft(self, x):\n        return x * 2\n",
            vars(module),
        )
        assert not calls_fft(module.Plain)
    finally:
        del sys.modules["kit_plain"]
    assert not calls_fft(_NamedFft)
