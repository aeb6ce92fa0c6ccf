"""The optimisers of one process: arithmetic, rounding, 8-bit moments, determinism, and what each parameter gets."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from eulerforge.errors import ModelError
from eulerforge.optim import layout, muon
from eulerforge.optim.adamw import SMALLEST_IN_8_BITS, LeanAdamW
from eulerforge.optim.blockwise import BLOCK, blocks_per_row, dequantise, quantise, zero_code
from eulerforge.optim.layout import Layout, TileNoise
from eulerforge.optim.muon import MuonWithAdamW, orthogonalised
from eulerforge.optim.optimizer import Kind, build_optimizer, clip_gradients, global_norm, muon_matrices
from eulerforge.optim.rounding import mixed_seed

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
KINDS: list[tuple[Kind, torch.dtype]] = [
    (kind, dtype) for kind in ("adamw", "adamw8bit", "muon") for dtype in (torch.float32, torch.bfloat16)
]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(70, 300)
        self.down = Conv1D(70, 300)  # like GPT-2's: its weight is (in, out)
        self.conv = nn.Conv1d(70, 70, 3, groups=70)
        self.norm = nn.LayerNorm(70)
        self.a_log = nn.Parameter(torch.randn(70, 16))
        self.a_log._no_weight_decay = True  # type: ignore[attr-defined]
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)


class _Model(nn.Module):
    """Two blocks between an embedding and a tied head; `mixer.a_log` stays float32, as state space models need it."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(90, 70)
        self.layers = nn.ModuleList([_Block(), _Block()])
        self.project = nn.Linear(70, 70, bias=False)
        self.head = nn.Linear(70, 90, bias=False)
        self.head.weight = self.embed.weight
        self.to(dtype)
        for block in self.layers:
            assert isinstance(block, _Block)
            block.a_log.data = block.a_log.data.float()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def _build(model: nn.Module, kind: Kind, seed: int = 0, **changes: Any) -> torch.optim.Optimizer:
    return build_optimizer(model, kind=kind, seed=seed, **(SETTINGS | changes))


def _give_gradients(parameters: Iterable[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        _give_gradients(model.parameters(), step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _require_equal(first: nn.Module, second: nn.Module) -> None:
    for (name, left), (_, right) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(left, right), name


def _parameter(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def _lean(*parameters: nn.Parameter, seed: int = 0, **changes: Any) -> LeanAdamW:
    return LeanAdamW(parameters, seed=seed, **(SETTINGS | changes))


# --- arithmetic ---------------------------------------------------------------------------------------------------


def test_float32_is_torchs_adamw() -> None:
    """20 steps, decay and none, another rate each step; a matrix, a vector, a scalar and a convolution's kernel."""
    shapes = ((300, 70), (70,), (), (6, 1, 4))
    own, theirs = ([_parameter(shape) for shape in shapes] for _ in range(2))
    groups = [({"params": p[:2]}, {"params": p[2:], "weight_decay": 0.0}) for p in (own, theirs)]
    optimizers = (LeanAdamW(groups[0], seed=0, **SETTINGS), torch.optim.AdamW(groups[1], **SETTINGS))
    for step in range(20):
        for optimizer, parameters in zip(optimizers, (own, theirs), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            _give_gradients(parameters, step)
            optimizer.step()
    for left, right in zip(own, theirs, strict=True):
        assert torch.allclose(left, right, rtol=1e-6, atol=1e-6)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.allclose(optimizers[0].state[left][key], optimizers[1].state[right][key], rtol=1e-6), key


def test_small_updates_of_bfloat16_are_not_lost() -> None:
    """At 1.0 bfloat16 knows nothing between 0.996 and 1.008; 200 updates of 3e-4 come to 0.06."""
    settings = SETTINGS | {"lr": 3e-4, "weight_decay": 0.0}
    lost, kept, exact = (
        nn.Parameter(torch.ones(4096, dtype=dtype)) for dtype in (torch.bfloat16,) * 2 + (torch.float32,)
    )
    optimizers = (
        torch.optim.AdamW([lost], **settings),
        LeanAdamW([kept], seed=0, **settings),
        torch.optim.AdamW([exact], **settings),
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        gradient = 1 + 0.5 * torch.randn(4096, generator=generator)
        for parameter, optimizer in zip((lost, kept, exact), optimizers, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
    assert torch.equal(lost, torch.ones_like(lost))
    moved = 1 - exact.mean().item()
    assert 0.05 < moved < 0.07
    # A weight has a standard deviation of sqrt(200 * 3e-4 * 2^-8) = 0.015, the mean of 4096 one of 2.4e-4.
    assert kept.float().mean().item() == pytest.approx(exact.mean().item(), abs=1e-3)
    assert kept.float().std().item() < 0.03
    # Moments too: the second one's change, 5 % a step, is mostly below what bfloat16 can hold of it when it settles.
    square = optimizers[1].state[kept]["exp_avg_sq"].float().mean().item()
    assert square == pytest.approx(optimizers[2].state[exact]["exp_avg_sq"].mean().item(), rel=5e-3)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_a_step_of_rate_zero_without_gradients_changes_no_bit(kind: Kind, dtype: torch.dtype, decay: float) -> None:
    """That is how torch makes the state of an optimiser that has not stepped yet."""
    model = _Model(dtype)
    with torch.no_grad():
        every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
        every = every[every.isfinite()][: model.layers[0].up.weight.numel()]  # type: ignore[union-attr, index]
        model.layers[0].up.weight.view(-1)[: len(every)].copy_(every)  # type: ignore[union-attr, operator]
    before = copy.deepcopy(model)
    get_optimizer_state_dict(model, _build(model, kind, weight_decay=decay))
    for (name, left), (_, right) in zip(before.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(
            left.view(torch.uint8) if left.ndim else left, right.view(torch.uint8) if right.ndim else right
        ), name


def test_a_parameter_that_is_not_contiguous_is_trained_like_any_other() -> None:
    plain = _parameter((40, 30), torch.bfloat16)
    turned = nn.Parameter(plain.detach().T.contiguous().T)
    assert not turned.is_contiguous()
    for parameter in (plain, turned):
        optimizer = _lean(parameter)
        for step in range(3):
            _give_gradients([parameter], step)
            optimizer.step()
    assert not turned.is_contiguous()
    assert torch.equal(plain, turned)


def test_a_closure_is_called_with_gradients() -> None:
    parameter = _parameter((3,))

    def closure() -> float:
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    before = parameter.square().sum().item()
    assert _lean(parameter).step(closure) == pytest.approx(before)
    assert parameter.square().sum().item() < before


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="float16"):
        _lean(_parameter((3,), torch.float16))


# --- random numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_a_run_that_stops_and_resumes_is_the_run_that_does_not(kind: Kind, dtype: torch.dtype) -> None:
    """Through state_dict, and through torch.distributed.checkpoint's view of it; nothing else is saved."""
    whole = _Model(dtype)
    _train(whole, _build(whole, kind), range(6))
    first = _Model(dtype)
    optimizer = _build(first, kind)
    _train(first, optimizer, range(3))
    for way in ("own", "checkpoint"):
        second = _Model(dtype)
        second.load_state_dict(first.state_dict())
        resumed = _build(second, kind)
        if way == "own":
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        else:
            saved = copy.deepcopy(get_optimizer_state_dict(first, optimizer))
            set_optimizer_state_dict(second, resumed, saved)
        for (_, left), (_, right) in zip(first.named_parameters(), second.named_parameters(), strict=True):
            for key, value in optimizer.state.get(left, {}).items():
                assert value.dtype == resumed.state[right][key].dtype, key
        torch.manual_seed(len(way))  # of no concern
        _train(second, resumed, range(3, 6))
        _require_equal(whole, second)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "muon"])
def test_replicas_stay_the_same_and_another_seed_does_not(kind: Kind) -> None:
    models = [_Model(torch.bfloat16) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        _train(model, _build(model, kind, seed=seed), range(3))
    _require_equal(models[0], models[1])
    for (name, left), (_, right) in zip(models[0].named_parameters(), models[2].named_parameters(), strict=True):
        if left.requires_grad and left.dtype == torch.bfloat16:
            assert not torch.equal(left, right), name


def test_parameters_steps_and_weights_and_moments_have_random_numbers_of_their_own() -> None:
    """All four are rounded from the same values here, so that the same numbers would give the same result."""
    parameters = [nn.Parameter(torch.zeros(5000, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = _lean(*parameters, betas=(0.0, 0.0), weight_decay=0.0)
    seen = []
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1.0, dtype=torch.bfloat16)
        for group in optimizer.param_groups:
            group["lr"] = 1.001  # moves each weight by 1.001
        with torch.no_grad():
            for parameter in parameters:
                parameter.zero_()
        optimizer.step()
        seen += [parameter.detach().clone() for parameter in parameters]
    rounded = [weights == weights.unique()[0] for weights in seen]
    assert all(0.05 < up.float().mean() < 0.95 for up in rounded)
    for first in range(4):
        for second in range(first):
            assert not torch.equal(rounded[first], rounded[second])


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_no_seed_is_used_twice(kind: Kind, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By any two tiles, parameters or steps, or by a matrix of Muon and its momentum."""
    used: list[int] = []

    def recorded(*numbers: int) -> int:
        used.append(mixed_seed(*numbers))
        return used[-1]

    monkeypatch.setattr(layout, "TILE", 1024)
    monkeypatch.setattr(layout, "mixed_seed", recorded)
    model = _Model(dtype)
    _train(model, _build(model, kind), range(3))
    assert len(set(used)) == len(used)
    assert used or (kind, dtype) == ("adamw", torch.float32)  # that one is torch's


# --- tiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(10, 100), (7, 3000), (5000, 1), (1, 1), (3, 0), (0, 3)])
@pytest.mark.parametrize("cuts", [1, 2, 3, 8])
def test_shards_of_a_parameter_draw_what_the_whole_draws(
    shape: tuple[int, int], cuts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every element is in one tile, and its random number does not depend on who holds it. Some shards are empty."""
    monkeypatch.setattr(layout, "TILE", 1024)

    def drawn(own: Layout) -> torch.Tensor:
        result = torch.full((own.local_rows, own.columns), -1, dtype=torch.int64)
        for tile in own.tiles():
            assert tile.of(result).numel() <= 1024
            assert (tile.of(result) == -1).all()
            assert tile.columns.start % BLOCK == 0
            tile.of(result).copy_(TileNoise(tile, torch.device("cpu"), 1, 2).draw())
        assert (result >= 0).all()
        return result

    rows, columns = shape
    whole = drawn(Layout(rows, columns, 0, rows))
    assert len(whole.unique()) >= 0.99 * whole.numel()
    chunk = max(1, -(-rows // cuts))
    for start in range(0, chunk * cuts, chunk):
        first, last = min(start, rows), min(start + chunk, rows)
        part = drawn(Layout(rows, columns, first, last - first))
        assert torch.equal(part, whole[first:last])


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("shape", [(33, 300), (3, 2000), (5, 40, 50)])
def test_results_without_rounding_do_not_depend_on_the_size_of_tiles(
    shape: tuple[int, ...], bits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows longer than a tile, too: blocks of 8-bit moments are not cut."""
    results = []
    for size in (2**21, 1024):
        monkeypatch.setattr(layout, "TILE", size)
        parameter = _parameter(shape)
        optimizer = _lean(parameter, bits=bits)
        for step in range(3):
            _give_gradients([parameter], step)
            optimizer.step()
        results.append([parameter.detach(), *optimizer.state[parameter].values()])
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


class _LargestScratch(TorchDispatchMode):
    """The largest float32 or int32 tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype in (torch.float32, torch.int32):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("shape", [(100, 200), (2, 50_000)])
def test_scratch_memory_is_that_of_a_tile(shape: tuple[int, ...], bits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "TILE", 1024)
    parameter = _parameter(shape, torch.bfloat16)
    optimizer = _lean(parameter, bits=bits)
    _give_gradients([parameter], 0)
    with _LargestScratch() as scratch:
        optimizer.step()
    assert 0 < scratch.largest <= 1024 + BLOCK * 1024 // 200  # rows are filled up to whole blocks


# --- 8 bits -------------------------------------------------------------------------------------------------------


def _spread(rows: int, columns: int) -> torch.Tensor:
    """Values over twelve decades of both signs, and some zeros."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, columns, generator=generator) * 10 ** (
        12 * torch.rand(rows, columns, generator=generator) - 9
    )
    values[torch.rand(rows, columns, generator=generator) < 0.05] = 0
    return values


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(7, 1000), (3, 256), (5, 4), (2, 257), (0, 30)])
def test_what_was_written_in_8_bits_is_written_the_same_again(shape: tuple[int, int], signed: bool) -> None:
    values = _spread(*shape) if signed else _spread(*shape).abs()
    codes, scales = quantise(values, signed)
    assert (codes.dtype, codes.shape) == (torch.uint8, shape)
    assert (scales.dtype, scales.shape) == (torch.float32, (shape[0], blocks_per_row(shape[1])))
    read = dequantise(codes, scales, signed)
    assert read.dtype == torch.float32
    again = quantise(read, signed)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)


def test_the_largest_of_a_block_is_exact_and_the_upper_decade_nearly() -> None:
    """The table has 64 values in a signed upper decade and 128 in an unsigned one; each block is by itself."""
    for signed, steps in ((True, 64), (False, 128)):
        values = torch.rand(20, 600) * 0.9 + 0.1
        values *= 10.0 ** torch.arange(20).unsqueeze(1)
        if signed:
            values *= torch.randn(20, 600).sign()
        values[:, 300:] *= 1e-6
        read = dequantise(*quantise(values, signed), signed)
        for start in range(0, 600, BLOCK):
            block, seen = values[:, start : start + BLOCK], read[:, start : start + BLOCK]
            top = block.abs().amax(1, keepdim=True)
            assert torch.equal(seen.abs().amax(1, keepdim=True), top)
            upper = block.abs() > top * 0.1
            assert ((seen - block).abs()[upper] <= (top * 0.9 / steps * 0.51 / 0.99).expand_as(block)[upper]).all()


def test_the_second_moment_is_zero_only_where_it_was() -> None:
    """A zero under a first moment that is not would make a step of exp_avg / eps."""
    values = torch.tensor([[1.0, 1e-4, 1e-8, 1e-20, 0.0]])
    read = dequantise(*quantise(values, False), False)
    assert (read[0, :4] > 0).all()
    assert read[0, 4] == 0


def test_zeros_are_zeros() -> None:
    for signed in (True, False):
        codes, scales = quantise(torch.zeros(2, 300), signed)
        assert (codes == zero_code(signed)).all()
        assert torch.equal(dequantise(codes, scales, signed), torch.zeros(2, 300))


def test_only_large_matrices_have_moments_in_8_bits() -> None:
    parameters = [
        _parameter(shape, torch.bfloat16) for shape in ((16, 300), (3, 40, 50), (15, 273), (5000,), (4096, 1))
    ]
    optimizer = _lean(*parameters, bits=8)
    _give_gradients(parameters, 0)
    optimizer.step()
    forms = []
    for parameter in parameters:
        state = optimizer.state[parameter]
        forms.append({key: (value.dtype, tuple(value.shape)) for key, value in state.items() if key != "step"})
    for shape, scales, form in zip(((16, 300), (3, 40, 50)), ((16, 2), (3, 8)), forms, strict=False):
        assert form == {
            "exp_avg_codes": (torch.uint8, shape),
            "exp_avg_scales": (torch.float32, scales),
            "exp_avg_sq_codes": (torch.uint8, shape),
            "exp_avg_sq_scales": (torch.float32, scales),
        }
    assert SMALLEST_IN_8_BITS == 15 * 273 + 1
    assert forms[2] == dict.fromkeys(("exp_avg", "exp_avg_sq"), (torch.bfloat16, (15, 273)))
    assert forms[3] == dict.fromkeys(("exp_avg", "exp_avg_sq"), (torch.bfloat16, (5000,)))
    assert forms[4]["exp_avg_scales"] == (torch.float32, (4096, 1))


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_8_bits_find_the_minimum_that_float32_finds(beta2: float) -> None:
    """A noisy quadratic whose gradients, within a block, are up to 10^4 times as large as others."""
    generator = torch.Generator().manual_seed(0)
    scale = 10 ** (-4 * torch.rand(32, 512, generator=generator))
    target = torch.randn(32, 512, generator=generator)
    errors, middles = [], []
    for bits in (None, 8):
        parameter = nn.Parameter(torch.zeros(32, 512))
        optimizer = _lean(parameter, bits=bits, lr=2e-2, weight_decay=0.0, betas=(0.9, beta2))
        noise = torch.Generator().manual_seed(1)
        for step in range(300):
            for group in optimizer.param_groups:
                group["lr"] = 2e-2 * (1 - step / 300)
            random = 1 + 0.3 * torch.randn(32, 512, generator=noise)
            parameter.grad = scale * (parameter.detach() - target) * random
            optimizer.step()
            if step == 100:
                middles.append(parameter.detach().clone())
        errors.append((parameter.detach() - target).square().mean().sqrt().item())
    # 0.033 and 0.036 for beta2 = 0.95, 0.093 and 0.098 for 0.999. Moments as in the paper end at 7 and 12.
    assert errors[0] < 0.1
    assert errors[1] < errors[0] + 0.01
    assert (middles[1] - middles[0]).square().mean().sqrt() < 0.15


# --- Muon ---------------------------------------------------------------------------------------------------------


def _muon(*parameters: nn.Parameter) -> MuonWithAdamW:
    return MuonWithAdamW([{"params": parameters, "algorithm": "muon"}], seed=0, **SETTINGS)


def test_float32_is_torchs_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it works in bfloat16 as torch's always does; in float32 it comes near, where rounding does not decide."""
    _compare_with_torchs_muon(0.02)
    monkeypatch.setattr(muon, "working_dtype", lambda device: torch.bfloat16)
    _compare_with_torchs_muon(1e-6)


def _compare_with_torchs_muon(tolerance: float) -> None:
    own, theirs = ([_parameter(shape) for shape in ((70, 300), (300, 70), (32, 64), (1, 9))] for _ in range(2))
    before = [parameter.detach().clone() for parameter in own]
    optimizers = (_muon(*own), torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    for step in range(5):
        for optimizer, parameters in zip(optimizers, (own, theirs), strict=True):
            _give_gradients(parameters, step)
            optimizer.step()
    for start, left, right in zip(before, own, theirs, strict=True):
        moved = (right - start).square().mean().sqrt()
        assert (left - right).square().mean().sqrt() <= tolerance * moved
        assert (left - right).abs().max() <= 3 * tolerance * moved


@pytest.mark.parametrize("shape", [(40, 120), (120, 40), (32, 64)])
def test_updates_are_nearly_orthogonal_and_as_large_as_adamws(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float32):
        direction = orthogonalised(matrix.to(dtype))
        assert (direction.dtype, direction.shape) == (dtype, shape)
        singular = torch.linalg.svdvals(direction.float())
        assert 0.3 < singular.min() < singular.max() < 1.3
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = matrix
    _muon(parameter).step()
    root_mean_square = parameter.detach().square().mean().sqrt().item()
    assert root_mean_square == pytest.approx(0.2 * SETTINGS["lr"], rel=0.2)


def test_bfloat16_under_muon_follows_float32_in_the_mean() -> None:
    """Updates of 2e-4 to weights of 1.0 are lost by torch's Muon and not by this one."""
    direction = torch.linalg.qr(torch.randn(96, 64, generator=torch.Generator().manual_seed(0)))[0]
    settings = SETTINGS | {"lr": 1e-3, "weight_decay": 0.0}
    kept, exact, lost = (
        nn.Parameter(torch.ones(96, 64, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32, torch.bfloat16)
    )
    optimizers = (
        *(MuonWithAdamW([{"params": [each], "algorithm": "muon"}], seed=0, **settings) for each in (kept, exact)),
        torch.optim.Muon([lost], lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(50):
        for parameter, optimizer in zip((kept, exact, lost), optimizers, strict=True):
            parameter.grad = direction.to(parameter.dtype)
            optimizer.step()
    assert torch.equal(lost, torch.ones_like(lost))
    moved = exact.detach() - 1
    assert moved.square().mean().sqrt() > 5e-3
    # Least squares of what one moved over what the other did, over 6144 weights.
    share = ((kept.detach().float() - 1) * moved).sum() / moved.square().sum()
    assert share.item() == pytest.approx(1, abs=0.05)


def test_muon_is_for_matrices_inside_blocks() -> None:
    model = _Model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = _build(model, "muon")
    found = {
        (group["algorithm"], group["weight_decay"]): sorted(names[id(parameter)] for parameter in group["params"])
        for group in optimizer.param_groups
    }
    assert found.pop(("muon", 0.1)) == [
        f"layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("down", "up")
    ]
    assert found.pop(("adamw", 0.1)) == [
        "embed.weight", "layers.0.conv.weight", "layers.1.conv.weight", "project.weight"
    ]  # fmt: skip
    assert found.pop(("adamw", 0.0)) == sorted(
        f"layers.{layer}.{name}"
        for layer in (0, 1)
        for name in ("a_log", "conv.bias", "down.bias", "norm.bias", "norm.weight", "up.bias")
    )
    assert not found


def test_an_embedding_or_head_is_no_matrix_for_muon_even_inside_a_block() -> None:
    model = _Model()
    model.head = model.layers[0].up  # type: ignore[union-attr, assignment]
    model.layers[1].up.weight._no_weight_decay = True  # type: ignore[union-attr]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(matrix)] for matrix in muon_matrices(model)] == ["layers.0.down.weight", "layers.1.down.weight"]


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.ModuleDict({"layers": nn.ModuleList([nn.LayerNorm(3)])})])
def test_muon_without_matrices_is_refused(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="muon found no"):
        _build(model, "muon")


def test_muon_trains_everything() -> None:
    model = _Model(torch.bfloat16)
    before = copy.deepcopy(model)
    optimizer = _build(model, "muon")
    _train(model, optimizer, range(3))
    for (name, left), (_, right) in zip(before.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(left, right) == (not left.requires_grad), name
    first = model.layers[0]
    assert isinstance(first, _Block)
    momentum = optimizer.state[first.up.weight]["momentum_buffer"]
    assert (momentum.dtype, momentum.shape) == (torch.bfloat16, (300, 70))
    assert optimizer.state[first.a_log]["exp_avg"].dtype == torch.float32


# --- building, clipping -------------------------------------------------------------------------------------------


def test_each_kind_is_the_optimiser_it_says() -> None:
    fused = _build(_Model(), "adamw")
    assert type(fused) is torch.optim.AdamW
    assert all(group["fused"] for group in fused.param_groups)
    assert type(_build(_Model(torch.bfloat16), "adamw")) is LeanAdamW
    eight = _build(_Model(), "adamw8bit")
    assert type(eight) is LeanAdamW
    model = _Model()
    eight = _build(model, "adamw8bit")
    _train(model, eight, range(1))
    assert "exp_avg_codes" in eight.state[model.embed.weight]
    assert type(_build(_Model(), "muon")) is MuonWithAdamW


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_settings_and_decay_reach_every_kind(kind: Kind, dtype: torch.dtype) -> None:
    model = _Model(dtype)
    optimizer = _build(model, kind, lr=0.3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    decays = {}
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.8, 0.9), 1e-6)
        decays |= {id(parameter): group["weight_decay"] for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim < 2 or "a_log" in name
            assert decays.pop(id(parameter)) == (0.0 if free else 0.2), name
    assert not decays


def test_gradients_of_both_dtypes_are_clipped_by_one_norm() -> None:
    """3 in bfloat16 and 4 in float32: 5. A sum of squares in bfloat16 would be far off for many elements."""
    half = nn.Parameter(torch.zeros(90_000, dtype=torch.bfloat16))
    full = nn.Parameter(torch.zeros(4))
    half.grad, full.grad = torch.full_like(half, 0.01, dtype=torch.bfloat16), torch.full_like(full, 2.0)
    element = half.grad[0].double().item()
    exact = (90_000 * element**2 + 16) ** 0.5
    assert global_norm([half.grad, full.grad]).item() == pytest.approx(exact, rel=1e-6)
    assert clip_gradients([half, full], 1.0).item() == pytest.approx(exact, rel=1e-6)
    assert full.grad.tolist() == pytest.approx([2 / exact] * 4, rel=1e-5)
    assert half.grad[0].item() == pytest.approx(element / exact, rel=2**-8)
