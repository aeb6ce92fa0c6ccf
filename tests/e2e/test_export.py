"""`eulerforge export`: a Hugging Face directory from any checkpoint, right to the last bit or not there at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from eulerforge.train import convert
from tests.e2e.test_output import reload_in_new_process
from tests.kit.commands import Result, Workspace, run_here
from tests.kit.models import write_custom, write_llama, write_mixtral
from tests.kit.tokenizers import write_byte_tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@pytest.fixture
def trained(workspace: Workspace) -> Workspace:
    """A run of four steps in float32 with checkpoints at 2 and 4."""
    write_llama(workspace.path / "model", tie_word_embeddings=True)
    return _train(workspace)


def _train(workspace: Workspace, **values: object) -> Workspace:
    write_byte_tokenizer(workspace.path / "tokenizer", extra=8)  # more ids than the model has rows
    workspace.jsonl("data.jsonl", [f"document {index} " + "xyz" * 9 for index in range(12)])
    defaults: dict[str, object] = {
        "tokenizer": str(workspace.path / "tokenizer"),
        "trust_remote_code": True,
        "training__max_steps": 4,
        "training__save_steps": 2,
    }
    result = workspace.pretrain(**(defaults | values))
    assert result.code == 0, result.err
    return workspace


def _export(workspace: Workspace, source: str, *arguments: str, output: str = "out") -> Result:
    return run_here("export", str(workspace.path / source), "--output", str(workspace.path / output), *arguments)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("source", ["run/checkpoint-4", "run/final", "run"])
def test_the_last_checkpoint_the_run_and_final_are_one(trained: Workspace, source: str) -> None:
    result = _export(trained, source)
    assert result.code == 0, result.err
    assert result.err == ""
    assert "it loads as written" in result.out
    out, final = trained.path / "out", trained.path / "run" / "final"
    assert _names(out) == _names(final)
    for name in _names(final):
        assert (out / name).read_bytes() == (final / name).read_bytes(), name


def test_an_earlier_checkpoint_is_that_checkpoint(trained: Workspace) -> None:
    assert _export(trained, "run/checkpoint-2").code == 0
    seen = load_file(trained.path / "out" / "model.safetensors")
    expected = load_file(trained.path / "run" / "checkpoint-2" / "model.safetensors")
    final = load_file(trained.path / "run" / "final" / "model.safetensors")
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], expected[name]) for name in expected)
    assert not all(torch.equal(seen[name], final[name]) for name in expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_config_have_the_dtype(trained: Workspace, dtype: str) -> None:
    assert _export(trained, "run/checkpoint-4", "--dtype", dtype).code == 0
    out = trained.path / "out"
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    seen, final = (load_file(path / "model.safetensors") for path in (out, trained.path / "run" / "final"))
    for name, tensor in final.items():
        assert torch.equal(seen[name], tensor.to(DTYPES[dtype])), name


def test_float32_comes_from_the_weights_that_bfloat16_training_keeps(workspace: Workspace) -> None:
    write_llama(workspace.path / "model")
    run = _train(workspace, training__dtype="bfloat16", training__amp=True).path / "run"
    for dtype in ("float32", "bfloat16"):
        assert _export(workspace, "run/checkpoint-4", "--dtype", dtype, output=dtype).code == 0
    exact = load_file(workspace.path / "float32" / "model.safetensors")
    (shard,) = (run / "checkpoint-4" / "trainer_state" / "shards").iterdir()
    with safe_open(shard, framework="pt") as file:
        for name, tensor in exact.items():
            assert torch.equal(tensor, file.get_tensor(f"model.{name}")), name
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in exact.values())
    rounded, saved = (
        load_file(workspace.path / "bfloat16" / "model.safetensors"),
        load_file(run / "final/model.safetensors"),
    )
    assert all(torch.equal(rounded[name], saved[name]) for name in saved)


@pytest.mark.parametrize("kind", ["mixtral", "custom"])
def test_converted_names_and_custom_code_load_with_everything_else_gone(workspace: Workspace, kind: str) -> None:
    if kind == "mixtral":
        write_mixtral(workspace.path / "model")
    else:
        write_custom(workspace.path / "model", "buffers", tie_word_embeddings=True)
    _train(workspace)
    final = reload_in_new_process(workspace, workspace.path / "run" / "final")
    result = _export(workspace, "run/checkpoint-4", "--trust-remote-code")
    assert result.code == 0, result.err
    shutil.rmtree(workspace.path / "run")
    shutil.rmtree(workspace.path / "model")
    seen = reload_in_new_process(workspace, workspace.path / "out")
    assert torch.equal(seen["logits"], final["logits"])


def test_custom_code_needs_leave(workspace: Workspace) -> None:
    write_custom(workspace.path / "model", "buffers", tie_word_embeddings=True)
    _train(workspace)
    result = _export(workspace, "run/checkpoint-4")
    assert result.code == 2
    assert "has its own Python code" in result.err
    assert "--trust-remote-code" in result.err
    assert not (workspace.path / "out").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing", "is not a directory"),
        ("data.jsonl", "is not a directory"),
        ("tokenizer", "holds no checkpoint"),
        ("run/checkpoint-4/trainer_state", "holds no checkpoint"),
        ("empty", "holds no checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused(trained: Workspace, source: str, message: str) -> None:
    (trained.path / "empty").mkdir()
    result = _export(trained, source)
    assert result.code == 2
    assert message in result.err
    assert [line.partition(" ")[0] for line in result.err.splitlines()] == ["Error:", "Fix:", "See:"]
    assert not (trained.path / "out").exists()


def test_a_damaged_checkpoint_is_refused_and_a_run_s_older_one_taken(trained: Workspace) -> None:
    weights = trained.path / "run" / "checkpoint-4" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = _export(trained, "run/checkpoint-4")
    assert result.code == 2
    assert "run/checkpoint-4 is not complete: the content of model.safetensors differs" in result.err
    assert not (trained.path / "out").exists()
    result = _export(trained, "run")
    assert result.code == 0
    assert "Skipped run/checkpoint-4: the content of model.safetensors differs" in result.out
    assert "Exported run/checkpoint-2 to out" in result.out


def test_an_existing_directory_is_not_overwritten(trained: Workspace) -> None:
    (trained.path / "out").mkdir()
    assert _export(trained, "run").code == 0  # an empty one is fine
    before = {name: (trained.path / "out" / name).read_bytes() for name in _names(trained.path / "out")}
    result = _export(trained, "run", "--dtype", "bfloat16")
    assert result.code == 2
    assert "exists already" in result.err
    assert {name: (trained.path / "out" / name).read_bytes() for name in _names(trained.path / "out")} == before


def test_what_does_not_load_as_written_is_not_published(trained: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    write = convert.write_model_directory

    def write_wrongly(target: Path, *arguments: object) -> None:
        write(target, *arguments)
        path = target / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))

    monkeypatch.setattr(convert, "write_model_directory", write_wrongly)
    result = _export(trained, "run")
    assert result.code == 1
    assert "does not load as it should" in result.err
    assert "missing_keys" in result.err
    assert not (trained.path / "out").exists()
    assert not list(trained.path.glob(".out*"))
