"""dtype x amp x master weights x block families -> one plan, or one error: the table of docs/precision.md."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from eulerforge.errors import PresetError
from eulerforge.models.blocks import Family, FoundBlock
from eulerforge.precision.plan import PrecisionPlan, PrecisionRequest, plan_precision
from eulerforge.precision.rules import RULES

BF16, F16, F32 = "bfloat16", "float16", "float32"
ATTENTION, MOE = FoundBlock("attention", "layer 0"), FoundBlock("moe", "layer 1")
MAMBA, HYENA = FoundBlock("mamba", "layer 2"), FoundBlock("hyena", "layer 3")
RETNET, FFT = FoundBlock("retnet", "layer 4"), FoundBlock("fft", "modeling.py calls torch.fft")

FREE: list[tuple[FoundBlock, ...]] = [(), (ATTENTION,), (ATTENTION, MOE)]
STRICT: list[tuple[FoundBlock, ...]] = [(HYENA,), (RETNET,), (FFT,), (ATTENTION, HYENA, MOE, RETNET)]

Expected = tuple[str, str, str, bool] | None
"""stored, compute, saved, autocast; None for a conflict."""

TABLE: list[tuple[str | None, bool | str | None, bool | str, Expected, Expected]] = [
    # dtype, amp, master_weights, then the plan without FFT blocks and the plan with them
    (None, None, True, (F32, BF16, BF16, True), (F32, F32, F32, False)),
    (None, None, False, (BF16, BF16, BF16, True), None),
    (None, True, True, (F32, BF16, BF16, True), None),
    (None, False, "auto", (F32, F32, F32, False), (F32, F32, F32, False)),
    (None, "selective", "auto", (F32, BF16, F32, True), (F32, BF16, F32, True)),
    (BF16, None, True, (F32, BF16, BF16, True), None),
    (BF16, True, True, (F32, BF16, BF16, True), None),
    (BF16, True, False, (BF16, BF16, BF16, True), None),
    (BF16, False, "auto", (BF16, BF16, BF16, False), None),
    (BF16, False, False, (BF16, BF16, BF16, False), None),
    (F16, None, "auto", (F32, F16, F16, True), None),
    (F16, True, "auto", (F32, F16, F16, True), None),
    (F32, None, "auto", (F32, F32, F32, False), (F32, F32, F32, False)),
    (F32, False, "auto", (F32, F32, F32, False), (F32, F32, F32, False)),
    (F32, True, "auto", (F32, BF16, F32, True), None),
    (F32, "selective", "auto", (F32, BF16, F32, True), (F32, BF16, F32, True)),
]


def _request(
    dtype: Any, amp: Any, masters: Any = "auto", on_conflict: Literal["error", "warn"] = "error"
) -> PrecisionRequest:
    return PrecisionRequest(dtype, amp, masters, on_conflict)


def _types(plan: PrecisionPlan) -> tuple[str, str, str, bool]:
    return plan.stored, plan.compute, plan.saved, plan.autocast


@pytest.mark.parametrize("blocks", FREE, ids=len)
@pytest.mark.parametrize(("dtype", "amp", "masters", "expected", "_"), TABLE)
def test_without_fft_blocks(
    dtype: Any, amp: Any, masters: Any, expected: Expected, _: object, blocks: tuple[FoundBlock, ...]
) -> None:
    plan = plan_precision(_request(dtype, amp, masters), blocks)
    assert _types(plan) == expected
    assert (plan.reduce, plan.loss) == (F32, F32)
    assert plan.selective is False  # there is nothing to keep out
    assert plan.scales_loss is (dtype == F16)
    assert plan.warnings == ()


@pytest.mark.parametrize("blocks", STRICT, ids=lambda blocks: "+".join(block.family for block in blocks))
@pytest.mark.parametrize(("dtype", "amp", "masters", "_", "expected"), TABLE)
def test_with_fft_blocks(
    dtype: Any, amp: Any, masters: Any, _: object, expected: Expected, blocks: tuple[FoundBlock, ...]
) -> None:
    if expected is not None:
        plan = plan_precision(_request(dtype, amp, masters), blocks)
        assert _types(plan) == expected
        assert plan.selective is (amp == "selective")
        return
    with pytest.raises(PresetError) as caught:
        plan_precision(_request(dtype, amp, masters), blocks)
    what, fix = str(caught.value), caught.value.problems[0].fix
    if masters is False and dtype is None:
        assert what.startswith("training.master_weights: false stores weights in bfloat16, but dtype is float32")
        return
    for block in blocks:
        assert (f"{block.family} ({block.evidence})" in what) is RULES[block.family].needs_float32
    assert "training.dtype: float32 and training.amp: false, or amp: selective" in fix
    assert "training.precision_check: warn" in fix


@pytest.mark.parametrize(("dtype", "amp", "compute"), [(BF16, True, BF16), (F16, None, F16), (F32, True, BF16)])
def test_under_warn_the_conflict_is_the_first_warning(dtype: str, amp: bool | None, compute: str) -> None:
    plan = plan_precision(_request(dtype, amp, "auto", "warn"), (MAMBA, HYENA))
    assert plan.compute == compute
    assert plan.warnings[0] == (
        f"dtype {dtype} with amp true runs blocks below float32 that need it: hyena (layer 3) (precision_check: warn)"
    )
    assert plan.warnings[1].startswith("Mamba blocks are more stable in float32")


@pytest.mark.parametrize(("dtype", "amp", "masters", "expected", "_"), TABLE)
def test_mamba_below_float32_is_a_warning_only(
    dtype: Any, amp: Any, masters: Any, expected: Expected, _: object
) -> None:
    plan = plan_precision(_request(dtype, amp, masters), (ATTENTION, MAMBA))
    assert _types(plan) == expected
    advice = "Mamba blocks are more stable in float32 (dtype: float32, amp: false) (layer 2)"
    assert plan.warnings == ((advice,) if plan.compute != F32 else ())


@pytest.mark.parametrize(("fits", "stored"), [(True, F32), (False, BF16)])
def test_master_weights_wait_for_the_memory(fits: bool, stored: str) -> None:
    plan = plan_precision(_request(BF16, None), (ATTENTION,))
    assert plan.masters is None
    settled = plan.with_masters(fits, "1 GiB of 2 GiB")
    assert (settled.stored, settled.masters, settled.compute) == (stored, fits, BF16)
    assert "1 GiB of 2 GiB" in settled.stored_reason
    assert settled.with_masters(not fits, "again") is settled


def test_the_table_shows_each_part_and_the_exempt_blocks() -> None:
    plan = plan_precision(_request(None, "selective"), (ATTENTION, HYENA, RETNET))
    lines = [line.split(None, 2) for line in list(plan.lines())[1:]]
    assert [line[:2] for line in lines] == [
        ["stored", F32],
        ["compute", BF16],
        ["blocks", F32],
        ["blocks", F32],
        ["reduce", F32],
        ["loss", F32],
        ["saved", F32],
    ]
    assert [line[2] for line in lines if line[0] == "blocks"] == ["hyena (layer 3)", "retnet (layer 4)"]


def test_without_selective_no_block_is_shown_as_exempt() -> None:
    plan = plan_precision(_request(None, None), (HYENA,))
    assert not any("blocks" in line.split() and "layer 3" in line for line in list(plan.lines())[1:])
    assert "dtype unset and the model holds FFT blocks: hyena (layer 3)" in next(plan.lines())


@pytest.mark.parametrize("family", Family.__args__)  # type: ignore[attr-defined]
def test_every_family_has_a_rule(family: str) -> None:
    assert RULES[family].needs_float32 is (family in {"hyena", "retnet", "fft"})
    assert (RULES[family].advice is not None) is (family == "mamba")
