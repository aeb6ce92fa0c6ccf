"""Next-token cross entropy against torch's own, its gradient, and its corner cases."""

from __future__ import annotations

import math

import pytest
import torch

from eulerforge.data.rows import IGNORE_INDEX
from eulerforge.train import loss as loss_module
from eulerforge.train.loss import next_token_loss

ROWS, LENGTH, VOCAB = 3, 5, 7


def _case(seed: int = 0, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, LENGTH, VOCAB, generator=generator) * scale
    return logits, torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)


def _reference(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient by torch in float64, shifted by hand."""
    exact = logits.detach().double().requires_grad_()
    total = torch.nn.functional.cross_entropy(
        exact[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORE_INDEX
    )
    total.backward()
    assert exact.grad is not None
    return total.detach(), exact.grad


def _ours(logits: torch.Tensor, labels: torch.Tensor, upstream: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    total = next_token_loss(leaf, labels)
    (total * upstream).backward()
    assert leaf.grad is not None
    return total.detach(), leaf.grad


def _ignore(labels: torch.Tensor, where: str) -> torch.Tensor:
    masked = labels.clone()
    if where == "first":
        masked[:, 0] = IGNORE_INDEX
    elif where == "last":
        masked[:, -1] = IGNORE_INDEX
    elif where == "middle":
        masked[1, 2] = IGNORE_INDEX
    elif where == "padding":
        masked[0, 2:] = IGNORE_INDEX
    elif where == "row":
        masked[1] = IGNORE_INDEX
    elif where == "all but one":
        masked[:, :] = IGNORE_INDEX
        masked[2, 3] = labels[2, 3]
    return masked


@pytest.mark.parametrize("where", ["none", "first", "last", "middle", "padding", "row", "all but one"])
def test_loss_and_gradient_equal_torch(where: str) -> None:
    logits, labels = _case()
    labels = _ignore(labels, where)
    expected, gradient = _reference(logits, labels)
    total, ours = _ours(logits, labels)
    assert total.dtype == torch.float32
    assert total.shape == ()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(ours.double(), gradient, rtol=1e-5, atol=1e-6)


def test_the_last_position_and_ignored_targets_get_no_gradient() -> None:
    logits, labels = _case()
    labels = _ignore(labels, "padding")
    _, gradient = _ours(logits, labels)
    assert (gradient[:, -1] == 0).all()
    assert (gradient[0, 1:] == 0).all()
    assert (gradient[0, 0] != 0).all()
    assert (gradient[1:, :-1] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_lose_nothing_but_their_own_rounding(dtype: torch.dtype) -> None:
    """The loss of the rounded logits is exact in float32; only the gradient is rounded, once, to the logits' type."""
    logits, labels = _case()
    half = logits.to(dtype)
    expected, gradient = _reference(half, labels)
    total, ours = _ours(half, labels)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert ours.dtype == dtype
    step = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(ours.double(), gradient, rtol=1.1 * step, atol=1e-6)


def test_all_ignored_is_zero_with_zero_gradient_not_nan() -> None:
    logits, labels = _case()
    total, gradient = _ours(logits, torch.full_like(labels, IGNORE_INDEX))
    assert total.item() == 0.0
    assert (gradient == 0).all()


def test_a_row_of_one_token_has_no_target() -> None:
    total, gradient = _ours(torch.randn(2, 1, VOCAB), torch.zeros(2, 1, dtype=torch.int64))
    assert total.item() == 0.0
    assert (gradient == 0).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_non_finite_logits_of_ignored_positions_do_not_spread(value: float) -> None:
    logits, labels = _case()
    labels = _ignore(labels, "padding")
    expected, reference = _ours(logits, labels)
    poisoned = logits.clone()
    poisoned[0, 1:] = value  # predicts ignored labels
    poisoned[:, -1] = value  # predicts nothing
    total, gradient = _ours(poisoned, labels)
    assert torch.equal(total, expected)
    assert torch.equal(gradient, reference)


def test_a_non_finite_logit_of_a_target_is_not_hidden() -> None:
    logits, labels = _case()
    logits[1, 1, 3] = math.nan
    assert math.isnan(next_token_loss(logits, labels).item())


def test_masked_classes_may_be_minus_infinity() -> None:
    logits, labels = _case()
    labels[labels == 6] = 0
    logits[..., 6] = -math.inf
    total, gradient = _ours(logits, labels)
    expected, _ = _ours(logits[..., :6], labels)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (gradient[..., 6] == 0).all()


def test_very_large_logits_do_not_overflow() -> None:
    """At 3e4 a float32 has steps of 0.002."""
    logits = torch.zeros(1, 2, 3)
    logits[0, 0] = torch.tensor([3e4, 3e4 - 1, -3e4])
    total, gradient = _ours(logits, torch.tensor([[0, 1]]))
    assert total.item() == pytest.approx(1 + math.log1p(math.exp(-1)), abs=2e-3)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("elements", [1, VOCAB, 2 * VOCAB, 4 * VOCAB - 1, 15 * VOCAB, 10**6])
def test_chunks_have_no_seams(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """15 rows in chunks of 1, 2, 3, 15 and more."""
    logits, labels = _case()
    labels = _ignore(labels, "middle")
    expected, reference = _reference(logits, labels)
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", elements)
    total, gradient = _ours(logits, labels)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("upstream", [0.25, 3.0, 0.0, -1.0])
def test_the_gradient_is_scaled_by_what_comes_from_above(upstream: float) -> None:
    logits, labels = _case()
    _, plain = _ours(logits, labels)
    _, scaled = _ours(logits, labels, upstream)
    torch.testing.assert_close(scaled, plain * upstream)


def test_position_t_predicts_the_label_at_t_plus_1() -> None:
    """One-hot logits on the next label are nearly free, on the label itself or on the one before they are not."""
    labels = torch.arange(6).repeat(2, 1)
    totals = {}
    for shift in (1, 0, -1):
        ahead = torch.roll(labels, -shift, dims=1)
        totals[shift] = next_token_loss(30.0 * torch.nn.functional.one_hot(ahead, VOCAB).float(), labels).item()
    assert totals[1] < 1e-9
    assert totals[0] == pytest.approx(30.0 * 10, rel=1e-6)
    assert totals[-1] == pytest.approx(30.0 * 10, rel=1e-6)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary_per_target() -> None:
    total = next_token_loss(torch.full((2, 4, VOCAB), 1.5), torch.zeros(2, 4, dtype=torch.int64))
    assert total.item() == pytest.approx(6 * math.log(VOCAB), rel=1e-6)


def test_inputs_are_not_changed_and_may_be_strided() -> None:
    logits, labels = _case()
    labels = _ignore(labels, "first")
    strided = logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    kept, kept_labels = logits.clone(), labels.clone()
    expected, reference = _ours(logits, labels)
    total, gradient = _ours(strided, labels)
    assert torch.equal(total, expected)
    assert torch.equal(gradient, reference)
    assert torch.equal(logits, kept)
    assert torch.equal(labels, kept_labels)


def test_numeric_derivative() -> None:
    """The float32 inside limits a finite difference to about 1e-4."""
    logits, labels = _case(scale=1.0)
    assert torch.autograd.gradcheck(
        lambda values: next_token_loss(values, _ignore(labels, "middle")),
        (logits.double().requires_grad_(),),
        eps=1e-2,
        atol=2e-3,
    )
