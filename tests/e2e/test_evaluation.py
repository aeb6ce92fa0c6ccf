"""`data.validation`: the loss on held-out text is the right number, and training does not notice it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from eulerforge.train.evaluate import Evaluator
from eulerforge.train.manifest import find_damage
from tests.kit.commands import Workspace, run_command
from tests.kit.models import write_llama
from tests.kit.tokenizers import byte_ids, write_byte_tokenizer

EOS = 256
TRAINING = [f"training text {index} " + "ab" * index for index in range(12)]
HELD_OUT = [f"held out {index} " + "xyz" * (3 + index) for index in range(4)]
CURVE = ("step", "loss", "lr", "grad_norm", "tokens")


@pytest.fixture
def ready(workspace: Workspace) -> Workspace:
    """A tiny Llama with dropout, a corpus, held-out text."""
    write_llama(workspace.path / "model", attention_dropout=0.2)
    write_byte_tokenizer(workspace.path / "model")
    workspace.jsonl("data.jsonl", TRAINING)
    workspace.jsonl("held_out.jsonl", HELD_OUT)
    workspace.jsonl("all.jsonl", TRAINING + HELD_OUT)
    return workspace


def _chunks(texts: list[str], length: int) -> Iterator[torch.Tensor]:
    stream = [token for text in texts for token in (*byte_ids(text), EOS)]
    for start in range(0, len(stream) - length + 1, length):
        yield torch.tensor([stream[start : start + length]])


def _loss(run: Path, chunks: Iterator[torch.Tensor]) -> float:
    """Mean cross entropy over targets, by transformers' own loss, one chunk at a time."""
    model = AutoModelForCausalLM.from_pretrained(run / "final").eval()
    with torch.no_grad():
        losses = [float(model(input_ids=chunk, labels=chunk).loss) for chunk in chunks]
    return sum(losses) / len(losses)


def test_the_loss_is_that_of_the_saved_model_on_the_held_out_text(ready: Workspace) -> None:
    result = ready.pretrain(
        data__validation={"path": "held_out.jsonl"}, training__eval_steps=2, training__log_steps=100
    )
    assert result.code == 0, result.err
    assert [record["step"] for record in ready.metrics()] == [2, 3]
    assert ready.metrics()[-1]["eval_loss"] == pytest.approx(_loss(ready.path / "run", _chunks(HELD_OUT, 16)), 1e-6)
    assert f"eval_loss={ready.metrics()[-1]['eval_loss']:.4f}" in result.out
    rows = len(list(_chunks(HELD_OUT, 16)))
    assert f"Held out: 4 texts, {rows} rows of 16 tokens" in result.out


def test_a_fraction_is_the_last_documents_and_those_are_not_trained_on(ready: Workspace) -> None:
    values = {"training__max_steps": 4, "training__eval_steps": 2}
    apart = ready.pretrain(data__validation={"path": "held_out.jsonl"}, output_dir="apart", **values)
    # A quarter of 16 documents, rounded up to 4.
    share = ready.pretrain(data__path="all.jsonl", data__validation={"fraction": 0.22}, output_dir="share", **values)
    assert apart.code == share.code == 0, apart.err + share.err
    keys = (*CURVE, "eval_loss")
    expected = [[record.get(key) for key in keys] for record in ready.metrics("apart")]
    assert [[record.get(key) for key in keys] for record in ready.metrics("share")] == expected


@pytest.mark.parametrize("packing", [True, False])
def test_training_is_the_same_with_and_without(ready: Workspace, packing: bool) -> None:
    values = {"data__packing": packing, "training__max_steps": 5}
    assert ready.pretrain(output_dir="without", **values).code == 0
    held_out = {"data__validation": {"path": "held_out.jsonl"}, "training__eval_steps": 1}
    assert ready.pretrain(output_dir="with", **values, **held_out).code == 0
    curves = [[[record[key] for key in CURVE] for record in ready.metrics(run)] for run in ("with", "without")]
    assert curves[0] == curves[1]
    weights = [(ready.path / run / "final" / "model.safetensors").read_bytes() for run in ("with", "without")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_three_ranks_see_the_loss_of_one(ready: Workspace, strategy: str) -> None:
    """Four rows in batches of two: the third rank gets none."""
    held_out = HELD_OUT[:3]
    ready.jsonl("held_out.jsonl", held_out)
    preset = ready.preset(
        output_dir=...,
        data__validation={"path": "held_out.jsonl"},
        training__eval_steps=1,
        training__batch_size=2,
        training__lr=0.0,
    )
    arguments = ("--nproc", "3", "--set", f"distributed.strategy={strategy}", "--output-dir", "run")
    result = run_command("pretrain", "--preset", str(preset), *arguments, cwd=ready.path)
    assert result.code == 0, result.err
    expected = _loss(ready.path / "run", _chunks(held_out, 16))
    assert len(list(_chunks(held_out, 16))) == 4
    # The learning rate is 0: each evaluation sees the same weights, also after sharded parameters were put back.
    assert [record["eval_loss"] for record in ready.metrics()] == [pytest.approx(expected, 1e-6)] * 3


def test_a_signal_breaks_an_evaluation_off(ready: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, seen = Evaluator._evaluate, []

    def interrupted(self: Evaluator, device: torch.device) -> object:
        signal.raise_signal(signal.SIGUSR1)
        seen.append(evaluate(self, device))
        return seen[-1]

    values = {
        "data__validation": {"path": "held_out.jsonl"},
        "training__eval_steps": 2,
        "training__max_steps": 6,
        "training__save_steps": 100,
    }
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "_evaluate", interrupted)
        stopped = ready.pretrain(**values)
    assert stopped.code == 75, stopped.err
    assert [(evaluation.loss, evaluation.stop) for evaluation in seen] == [(None, True)]
    assert ready.status()["status"] == "preempted"
    assert find_damage(ready.path / "run" / "checkpoint-2", contents=True) is None
    assert ready.pretrain("--resume", **values).code == 0
    assert ready.pretrain(**values, output_dir="straight").code == 0
    weights = [(ready.path / run / "final" / "model.safetensors").read_bytes() for run in ("run", "straight")]
    assert weights[0] == weights[1]


def test_tensorboard_has_the_curve(ready: Workspace) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert ready.pretrain(data__validation={"path": "held_out.jsonl"}, training__eval_steps=1).code == 0
    events = EventAccumulator(str(ready.path / "run" / "tensorboard"))
    events.Reload()
    seen = [(event.step, event.value) for event in events.Scalars("eval/loss")]
    assert seen == [(record["step"], pytest.approx(record["eval_loss"])) for record in ready.metrics()]


@pytest.mark.parametrize(
    ("values", "message", "fix"),
    [
        ({"data__validation": {}}, "data.validation: needs either path or fraction", "data.validation.path"),
        (
            {"data__validation": {"path": "held_out.jsonl", "fraction": 0.1}},
            "data.validation: needs either path or fraction",
            "data.validation.path",
        ),
        ({"data__validation": {"fraction": 1.0}}, "must be less than 1", "data.validation.fraction"),
        ({"data__validation": {"share": 0.1}}, "data.validation.share: unknown key", ""),
        ({"data__validation": 0.1}, "data.validation: must be a mapping of keys", "data.validation"),
        ({"data__validation": {"path": "gone.jsonl"}}, "data.validation.path: ", "existing JSONL file"),
        ({"data__validation": {"path": "broken.jsonl"}}, "broken.jsonl:1", ""),
        ({"data__validation": {"path": "short.jsonl"}}, "data.validation.path: the corpus has 3 tokens", "more text"),
        ({"data__validation": {"fraction": 0.001}, "data__max_length": 100}, "the held-out part has", "more text"),
        ({"data__validation": {"fraction": 0.99}}, "what is left to train on has", "more text"),
        ({"training__eval_steps": 5}, "training.eval_steps: there is nothing to evaluate on", "data.validation"),
    ],
)
def test_bad_settings_are_refused(ready: Workspace, values: dict[str, object], message: str, fix: str) -> None:
    ready.raw("broken.jsonl", b"{\n")
    ready.jsonl("short.jsonl", ["ab"])
    ready.jsonl("data.jsonl", ["ab" if values.get("data__validation") == {"fraction": 0.99} else "a" * 90] * 12)
    result = ready.pretrain(**values)
    assert result.code == 2
    assert message in result.err
    assert fix in result.err
    assert "Traceback" not in result.err
    assert not (ready.path / "run").exists()


def test_another_share_is_refused_on_resume(ready: Workspace) -> None:
    values = {"data__path": "all.jsonl", "training__eval_steps": 1}
    assert ready.pretrain(data__validation={"fraction": 0.22}, **values).code == 0
    before = json.loads((ready.path / "run" / "status.json").read_text())
    more = {"training__max_steps": 5, "data__validation": {"fraction": 0.5}}
    result = ready.pretrain("--resume", **values, **more)
    assert result.code == 2
    assert "held-out documents of the data is 8, but 4 in checkpoint-3" in result.err
    assert ready.status() == before
