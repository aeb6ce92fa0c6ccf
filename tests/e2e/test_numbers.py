"""The numbers of training, seen through the command line: loss, gradient norm, learning rate, token ids, weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eulerforge.data.order import EpochOrder
from tests.kit.commands import Workspace
from tests.kit.models import write_custom, write_llama, write_mixtral
from tests.kit.tokenizers import EOS, byte_ids

CUSTOM = {"trust_remote_code": True}


def _texts(count: int, length: int = 40) -> list[str]:
    return [f"document {index} " + chr(97 + index % 26) * length for index in range(count)]


@pytest.mark.parametrize(("shift", "low", "high"), [(1, 0.0, 1e-3), (2, 5.0, 40.0)])
def test_oracle_tells_whether_labels_are_shifted_once(
    workspace: Workspace, byte_tokenizer: Path, shift: int, low: float, high: float
) -> None:
    write_custom(workspace.path / "model", "oracle", shift=shift)
    # No two neighbouring bytes are equal, so that the twin's guesses are all wrong.
    workspace.jsonl("data.jsonl", ["abcdefghijklmnopqrstuvwxyz0123456789" * 4])
    result = workspace.pretrain(**CUSTOM, tokenizer=str(byte_tokenizer), training__max_steps=2)
    assert result.code == 0, result.err
    for record in workspace.metrics():
        assert low <= record["loss"] < high


def test_micro_batches_of_any_shape_give_one_loss_and_gradient(workspace: Workspace, byte_tokenizer: Path) -> None:
    write_llama(workspace.path / "model")
    # One row of 4 is almost all padding: a mean of means would show.
    workspace.jsonl("data.jsonl", [*_texts(3), "a"])
    seen = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        name = f"run{batch}"
        result = workspace.pretrain(
            tokenizer=str(byte_tokenizer),
            output_dir=str(workspace.path / name),
            data__packing=False,
            data__max_length=64,
            training__batch_size=batch,
            training__grad_accum_steps=accumulation,
        )
        assert result.code == 0, result.err
        seen.append([(record["loss"], record["grad_norm"], record["tokens"]) for record in workspace.metrics(name)])
    for other in seen[1:]:
        for (loss, norm, tokens), (loss2, norm2, tokens2) in zip(seen[0], other, strict=True):
            assert loss2 == pytest.approx(loss, rel=1e-5)
            assert norm2 == pytest.approx(norm, rel=1e-5)
            assert tokens2 == tokens


def test_loss_and_gradient_norm_equal_a_plain_computation(workspace: Workspace, byte_tokenizer: Path) -> None:
    """One step against torch's own cross entropy on the same rows, padding included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    write_llama(workspace.path / "model")
    texts = [*_texts(3), "ab"]
    workspace.jsonl("data.jsonl", texts)
    result = workspace.pretrain(
        tokenizer=str(byte_tokenizer),
        data__packing=False,
        data__max_length=64,
        training__batch_size=4,
        training__max_steps=1,
        training__seed=7,
    )
    assert result.code == 0, result.err
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(workspace.path / "model"))
    total, count = torch.zeros(()), 0
    for text in texts:
        ids = torch.tensor([*byte_ids(text), EOS][:64])
        logits = model(ids[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
        count += len(ids) - 1
    (total / count).backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    (record,) = workspace.metrics()
    assert record["loss"] == pytest.approx((total / count).item(), rel=1e-6)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_auxiliary_loss_counts_once_however_many_micro_batches(workspace: Workspace, byte_tokenizer: Path) -> None:
    write_custom(workspace.path / "model", "routed", factor=0.25)
    workspace.jsonl("data.jsonl", _texts(8))
    for batch, accumulation in ((4, 1), (1, 4)):
        name = f"run{batch}"
        result = workspace.pretrain(
            **CUSTOM,
            tokenizer=str(byte_tokenizer),
            output_dir=str(workspace.path / name),
            training__batch_size=batch,
            training__grad_accum_steps=accumulation,
            training__max_grad_norm=100.0,
            training__max_steps=1,
        )
        assert result.code == 0, result.err
        (record,) = workspace.metrics(name)
        assert record["loss"] == pytest.approx(math.log(260), rel=1e-6)
        assert record["grad_norm"] == pytest.approx(0.25, rel=1e-6)
        assert record["aux_loss"] == pytest.approx(0.25, rel=1e-6)


def test_router_loss_of_a_hugging_face_model_is_scaled_by_its_coefficient(
    workspace: Workspace, byte_tokenizer: Path
) -> None:
    workspace.jsonl("data.jsonl", _texts(8))
    records = {}
    for coefficient in (0.0, 0.02, 2.0):
        write_mixtral(workspace.path / f"model{coefficient}", router_aux_loss_coef=coefficient)
        result = workspace.pretrain(
            model_dir=str(workspace.path / f"model{coefficient}"),
            tokenizer=str(byte_tokenizer),
            output_dir=str(workspace.path / f"run{coefficient}"),
            training__max_steps=1,
        )
        assert result.code == 0, result.err
        (records[coefficient],) = workspace.metrics(f"run{coefficient}")
    assert "aux_loss" not in records[0.0]
    assert records[0.02]["loss"] == records[2.0]["loss"] == records[0.0]["loss"]
    # top-2 of 4 experts, near-uniform at initialisation: Mixtral's unscaled loss is about 2.
    assert records[0.02]["aux_loss"] == pytest.approx(0.04, rel=0.1)
    assert records[2.0]["aux_loss"] == pytest.approx(100 * records[0.02]["aux_loss"], rel=1e-5)
    assert records[2.0]["grad_norm"] > records[0.0]["grad_norm"]


@pytest.mark.parametrize(("surplus", "chunks"), [(0, 3), (-1, 2), (1, 3)])
def test_every_token_is_where_the_stream_says(
    workspace: Workspace, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, surplus: int, chunks: int
) -> None:
    """Exactly N * max_length tokens give N chunks, one less gives N - 1; the ids are those that the model saw."""
    length = 16
    write_custom(workspace.path / "model", "probe")
    monkeypatch.setenv("PROBE_DIR", str(workspace.path))
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    first, second = alphabet[:20], alphabet[20 : 20 + 3 * length - 22 + surplus]
    stream = [*byte_ids(first), EOS, *byte_ids(second), EOS]
    assert len(stream) == 3 * length + surplus
    workspace.jsonl("data.jsonl", [first, second])
    result = workspace.pretrain(
        **CUSTOM,
        tokenizer=str(byte_tokenizer),
        data__max_length=length,
        training__batch_size=1,
        training__max_steps=2 * chunks,
        training__seed=5,
    )
    assert result.code == 0, result.err
    assert f"Packed: {len(stream)} tokens → {chunks} chunks (max_length={length})" in result.out
    calls = [json.loads(line) for line in (workspace.path / "rank0.jsonl").read_text().splitlines()]
    order = EpochOrder(chunks, seed=5)
    for position, call in enumerate(calls):
        row = order.row(position)
        assert call["input_ids"] == [stream[row * length : (row + 1) * length]]
        assert call["position_ids"] == [list(range(length))]
        assert call["attention_mask"] is None
        assert call["labels"] is None
        assert call["use_cache"] is False
        assert call["training"] is True
    assert len(calls) == 2 * chunks
    for epoch in (calls[:chunks], calls[chunks:]):
        assert sorted(call["input_ids"][0] for call in epoch) == sorted(
            stream[row * length : (row + 1) * length] for row in range(chunks)
        )


def test_padded_rows_are_masked_and_never_targets(
    workspace: Workspace, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_custom(workspace.path / "model", "probe")
    monkeypatch.setenv("PROBE_DIR", str(workspace.path))
    workspace.jsonl("data.jsonl", ["abc"])
    result = workspace.pretrain(
        **CUSTOM,
        tokenizer=str(byte_tokenizer),
        data__packing=False,
        data__max_length=8,
        training__batch_size=1,
        training__max_steps=1,
    )
    assert result.code == 0, result.err
    call = json.loads((workspace.path / "rank0.jsonl").read_text())
    assert call["input_ids"] == [[*b"abc", EOS, EOS, EOS, EOS, EOS]]
    assert call["attention_mask"] == [[1, 1, 1, 1, 0, 0, 0, 0]]
    assert workspace.metrics()[0]["tokens"] == 4
    assert "Rows: 1 texts → 1 rows (max_length=8, 0 cut, 0 of one token left out, 50.0% padding)" in result.out


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_learning_rate_column_is_the_formula(workspace: Workspace, byte_tokenizer: Path, schedule: str) -> None:
    write_llama(workspace.path / "model")
    workspace.jsonl("data.jsonl", _texts(4))
    steps, warmup, peak, floor = 20, 4, 3e-3, 0.1
    result = workspace.pretrain(
        tokenizer=str(byte_tokenizer),
        training__max_steps=steps,
        training__warmup_steps=warmup,
        training__lr=peak,
        training__min_lr_ratio=floor,
        training__scheduler=schedule,
        training__grad_accum_steps=2,
    )
    assert result.code == 0, result.err
    records = workspace.metrics()
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    for record in records:
        k = record["step"]
        p = (k - warmup) / (steps - warmup)
        factor = {
            "cosine": floor + (1 - floor) * (1 + math.cos(math.pi * p)) / 2,
            "linear": 1 - (1 - floor) * p,
            "constant": 1.0,
            "wsd": 1.0 if p <= 0.8 else 1 - (1 - floor) * (p - 0.8) / 0.2,
        }[schedule]
        expected = peak * (k / warmup if k <= warmup else factor)
        assert record["lr"] == pytest.approx(expected, rel=1e-12)


def test_cosine_ends_at_zero(workspace: Workspace, byte_tokenizer: Path) -> None:
    write_llama(workspace.path / "model")
    workspace.jsonl("data.jsonl", _texts(4))
    result = workspace.pretrain(tokenizer=str(byte_tokenizer), training__max_steps=5)
    assert result.code == 0, result.err
    assert workspace.metrics()[-1]["lr"] == 0.0
    assert "step=5/5 | loss=" in result.out
    assert "| lr=0.00e+00 |" in result.out


def test_same_seed_gives_the_same_weights_bit_for_bit(workspace: Workspace, byte_tokenizer: Path) -> None:
    write_llama(workspace.path / "model", attention_dropout=0.1)
    workspace.jsonl("data.jsonl", _texts(8))
    states = {}
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        result = workspace.pretrain(
            tokenizer=str(byte_tokenizer),
            output_dir=str(workspace.path / name),
            training__max_steps=10,
            training__seed=seed,
        )
        assert result.code == 0, result.err
        states[name] = load_file(workspace.path / name / "final" / "model.safetensors")
    assert states["first"].keys() == states["second"].keys()
    assert all(torch.equal(states["first"][key], states["second"][key]) for key in states["first"])
    assert any(not torch.equal(states["first"][key], states["other"][key]) for key in states["first"])


def test_clipping_scales_what_the_optimiser_sees(workspace: Workspace, byte_tokenizer: Path) -> None:
    """AdamW hides a constant gradient scale, unless eps is large: then the step is linear in the gradient."""
    from transformers import AutoConfig, AutoModelForCausalLM

    write_llama(workspace.path / "model")
    workspace.jsonl("data.jsonl", _texts(4))
    torch.manual_seed(42)
    start = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(workspace.path / "model")).state_dict()
    moved = {}
    for name, limit in (("free", None), ("clipped", 1e-3)):
        result = workspace.pretrain(
            tokenizer=str(byte_tokenizer),
            output_dir=str(workspace.path / name),
            training__max_steps=1,
            training__scheduler="constant",
            training__weight_decay=0.0,
            training__eps=1e3,
            training__lr=1e3,
            training__max_grad_norm=limit,
        )
        assert result.code == 0, result.err
        final = load_file(workspace.path / name / "final" / "model.safetensors")
        moved[name] = math.sqrt(sum((final[key] - start[key]).double().pow(2).sum().item() for key in final))
    norms = [workspace.metrics(name)[0]["grad_norm"] for name in ("free", "clipped")]
    assert norms[0] == norms[1]
    assert moved["free"] == pytest.approx(norms[0], rel=1e-2)
    assert moved["clipped"] == pytest.approx(1e-3, rel=1e-2)


def test_corpus_shorter_than_the_run_starts_new_epochs(workspace: Workspace, byte_tokenizer: Path) -> None:
    write_llama(workspace.path / "model")
    workspace.jsonl("data.jsonl", ["x" * 47])
    result = workspace.pretrain(
        tokenizer=str(byte_tokenizer), training__batch_size=2, training__max_steps=7, training__save_steps=3
    )
    assert result.code == 0, result.err
    assert "Packed: 48 tokens → 3 chunks" in result.out
    records = workspace.metrics()
    assert len(records) == 7
    assert records[-1]["epoch"] == pytest.approx(14 / 3, abs=1e-6)
    names = sorted(path.name for path in (workspace.path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-3", "checkpoint-6", "checkpoint-7"]
    assert (workspace.path / "run" / "final" / "model.safetensors").is_file()
