"""dtype x amp x block families x on_conflict -> one plan, or one error."""

from __future__ import annotations

from typing import Literal

import pytest

from eulerforge.errors import PresetError
from eulerforge.models.blocks import Family, FoundBlock
from eulerforge.precision.plan import PrecisionPlan, plan_precision
from eulerforge.precision.rules import RULES

BF16, F32 = "bfloat16", "float32"
ATTENTION, MOE = FoundBlock("attention", "layer 0"), FoundBlock("moe", "layer 1")
MAMBA, HYENA = FoundBlock("mamba", "layer 2"), FoundBlock("hyena", "layer 3")
RETNET, FFT = FoundBlock("retnet", "layer 4"), FoundBlock("fft", "modeling.py calls torch.fft")

FREE: list[tuple[FoundBlock, ...]] = [(), (ATTENTION,), (ATTENTION, MOE)]
STRICT: list[tuple[FoundBlock, ...]] = [(HYENA,), (RETNET,), (FFT,), (ATTENTION, HYENA, MOE, RETNET)]

CHOICES: list[tuple[str | None, bool | None, tuple[str, str, str] | None, tuple[str, str, str] | None]] = [
    # dtype, amp, (stored, compute, saved) without FFT blocks, the same with FFT blocks (None: a conflict).
    # bfloat16 with amp false is refused by config/checks.py before a plan is made.
    (None, None, (F32, BF16, BF16), (F32, F32, F32)),
    (None, True, (F32, BF16, BF16), None),
    (BF16, None, (F32, BF16, BF16), None),
    (BF16, True, (F32, BF16, BF16), None),
    (F32, None, (F32, F32, F32), (F32, F32, F32)),
    (F32, False, (F32, F32, F32), (F32, F32, F32)),
    (F32, True, (F32, BF16, F32), None),
]
POLICIES: tuple[Literal["error", "warn"], ...] = ("error", "warn")


def _types(plan: PrecisionPlan) -> tuple[str, str, str]:
    return plan.stored, plan.compute, plan.saved


@pytest.mark.parametrize("on_conflict", POLICIES)
@pytest.mark.parametrize("blocks", FREE, ids=len)
@pytest.mark.parametrize(("dtype", "amp", "expected", "_"), CHOICES)
def test_without_fft_blocks(
    dtype: str | None,
    amp: bool | None,
    expected: tuple[str, str, str],
    _: object,
    blocks: tuple[FoundBlock, ...],
    on_conflict: Literal["error", "warn"],
) -> None:
    plan = plan_precision(dtype, amp, on_conflict, blocks)
    assert _types(plan) == expected
    assert plan.autocast is (expected[1] == BF16)
    assert plan.warnings == ()
    reason = "dtype unset and no block needs float32" if dtype is None else f"training.dtype: {dtype}"
    master = "; float32 master weights, bfloat16 autocast" if plan.autocast else ""
    assert plan.reason == reason + master


@pytest.mark.parametrize("on_conflict", POLICIES)
@pytest.mark.parametrize("blocks", STRICT, ids=lambda blocks: "+".join(block.family for block in blocks))
@pytest.mark.parametrize(("dtype", "amp", "_", "expected"), CHOICES)
def test_with_fft_blocks(
    dtype: str | None,
    amp: bool | None,
    _: object,
    expected: tuple[str, str, str] | None,
    blocks: tuple[FoundBlock, ...],
    on_conflict: Literal["error", "warn"],
) -> None:
    strict = [block for block in blocks if block.family in ("hyena", "retnet", "fft")]
    named = "; ".join(f"{block.family} ({block.evidence})" for block in strict)
    if expected is not None:
        plan = plan_precision(dtype, amp, on_conflict, blocks)
        assert _types(plan) == expected
        assert plan.warnings == ()
        unset = f"dtype unset and the model holds FFT blocks: {named}"
        assert plan.reason == (unset if dtype is None else f"training.dtype: {dtype}")
        return
    chosen = dtype or F32
    what = f"dtype {chosen} with amp true runs blocks below float32 that need it: {named}"
    if on_conflict == "warn":
        plan = plan_precision(dtype, amp, on_conflict, blocks)
        assert _types(plan) == (F32, BF16, chosen)
        assert plan.warnings == (f"{what} (precision_check: warn)",)
        return
    with pytest.raises(PresetError) as caught:
        plan_precision(dtype, amp, on_conflict, blocks)
    assert str(caught.value) == f"training.dtype: {what}"
    assert "training.dtype: float32 and training.amp: false" in caught.value.problems[0].fix


@pytest.mark.parametrize(("dtype", "amp", "expected", "_"), CHOICES)
def test_mamba_below_float32_is_a_warning_only(
    dtype: str | None, amp: bool | None, expected: tuple[str, str, str], _: object
) -> None:
    plan = plan_precision(dtype, amp, "error", (ATTENTION, MAMBA))
    assert _types(plan) == expected
    advice = "Mamba blocks are more stable in float32 (dtype: float32, amp: false) (layer 2)"
    assert plan.warnings == ((advice,) if plan.autocast else ())


def test_both_warnings_are_kept_under_warn() -> None:
    plan = plan_precision(BF16, True, "warn", (MAMBA, HYENA))
    assert len(plan.warnings) == 2
    assert "hyena (layer 3)" in plan.warnings[0]
    assert plan.warnings[1].startswith("Mamba blocks are more stable in float32")


@pytest.mark.parametrize("blocks", FREE, ids=len)
def test_amp_false_alone_never_gives_a_plan_that_computes_in_one_type_and_saves_another(
    blocks: tuple[FoundBlock, ...],
) -> None:
    """The default dtype is bfloat16, and `dtype: bfloat16, amp: false` is refused; leaving the dtype out must not
    turn the same request into a float32 run that calls itself bfloat16."""
    try:
        plan = plan_precision(None, False, "error", blocks)
    except PresetError as error:
        assert "training.amp" in str(error)
    else:
        assert _types(plan) == (F32, F32, F32)


@pytest.mark.parametrize("family", Family.__args__)  # type: ignore[attr-defined]
def test_every_family_has_a_rule(family: str) -> None:
    assert RULES[family].needs_float32 is (family in {"hyena", "retnet", "fft"})
    assert (RULES[family].advice is not None) is (family == "mamba")
