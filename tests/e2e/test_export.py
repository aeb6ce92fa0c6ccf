"""`eulerforge export`: a Hugging Face directory from any checkpoint, right to the last bit or not there at all.

The verification in a new process takes seconds each time; most tests let it run in this process.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eulerforge.train import convert, reload
from tests.e2e.test_checkpoint_faults import SHARD, flip, mount, truncate, unmount
from tests.e2e.test_output import reload_in_new_process
from tests.e2e.test_resume import done, files, model_files, quick, refused, shards_of, write_hooked
from tests.kit.commands import Result, Workspace, run_command, run_here
from tests.kit.models import write_custom, write_llama, write_mixtral
from tests.kit.tokenizers import write_byte_tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@pytest.fixture(autouse=True)
def quick_and_clean() -> Iterator[None]:
    """Every test of this file."""
    with quick():
        yield


@pytest.fixture
def verified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verification runs in this process."""

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "eulerforge.train.reload"]
        try:
            reload.main(*json.loads(command[3]))
        except Exception as error:
            return subprocess.CompletedProcess(command, 1, "", f"{type(error).__name__}: {error}\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(convert.subprocess, "run", run)


def _train(workspace: Workspace, extra: int = 8, **values: object) -> Path:
    """A run of four steps with checkpoints at 2 and 4; with 8 extra tokens more ids than the models have rows."""
    write_byte_tokenizer(workspace.path / "tokenizer", extra=extra)
    workspace.jsonl("data.jsonl", [f"document {index} " + "xyz" * 9 for index in range(12)])
    defaults: dict[str, object] = {
        "tokenizer": "tokenizer",
        "trust_remote_code": True,
        "training__max_steps": 4,
        "training__save_steps": 2,
    }
    done(workspace.pretrain(**(defaults | values)))
    return workspace.path / "run"


@pytest.fixture
def trained(workspace: Workspace) -> Workspace:
    """A run in float32 of a Llama with tied embeddings."""
    write_llama(workspace.path / "model", tie_word_embeddings=True)
    _train(workspace)
    return workspace


def _export(source: str, *arguments: str, output: str = "out") -> Result:
    return run_here("export", source, "--output", output, *arguments)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# --- What is exported -------------------------------------------------------------------------------------------


def test_an_export_as_a_user_makes_it(trained: Workspace) -> None:
    """Relative paths, parents that are not there yet, a new process."""
    before = files(trained.path / "run")
    result = run_command("export", "run", "--output", "deep/down/out", cwd=trained.path)
    line = "[Export] Exported run/checkpoint-4 to deep/down/out (torch.float32); it loads as written."
    assert done(result).splitlines() == [line]
    assert files(trained.path / "run") == before
    out = trained.path / "deep" / "down" / "out"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert model_files(out) == model_files(trained.path / "run" / "final")


@pytest.mark.parametrize("source", ["run/checkpoint-4", "run/final", "run", "run/"])
@pytest.mark.usefixtures("verified_here")
def test_the_last_checkpoint_the_run_and_final_are_one(trained: Workspace, source: str) -> None:
    before = files(trained.path / "run")
    assert "it loads as written" in done(_export(source))
    assert model_files(trained.path / "out") == model_files(trained.path / "run" / "final")
    assert files(trained.path / "run") == before


@pytest.mark.usefixtures("verified_here")
def test_an_earlier_checkpoint_is_that_checkpoint(trained: Workspace) -> None:
    done(_export("run/checkpoint-2"))
    seen, expected = _weights(trained.path / "out"), _weights(trained.path / "run" / "checkpoint-2")
    final = _weights(trained.path / "run" / "final")
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], expected[name]) for name in expected)
    assert not all(torch.equal(seen[name], final[name]) for name in expected)


@pytest.mark.parametrize("source", ["run/checkpoint-4", "run/final"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("verified_here")
def test_weights_and_config_have_the_dtype(trained: Workspace, dtype: str, source: str) -> None:
    assert f"({DTYPES[dtype]})" in done(_export(source, "--dtype", dtype))
    out = trained.path / "out"
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    seen, final = _weights(out), _weights(trained.path / "run" / "final")
    assert seen.keys() == final.keys()
    for name, tensor in final.items():
        assert torch.equal(seen[name], tensor.to(DTYPES[dtype])), name
        assert seen[name].dtype == DTYPES[dtype]


@pytest.mark.usefixtures("verified_here")
def test_float32_comes_from_the_weights_that_bfloat16_training_keeps(workspace: Workspace) -> None:
    write_llama(workspace.path / "model")
    run = _train(workspace, training__dtype="bfloat16", training__amp=True)
    for dtype in ("float32", "float16", "bfloat16"):
        out = done(_export("run/checkpoint-4", "--dtype", dtype, output=dtype))
        assert "[Export] Using the float32 weights in trainer_state" in out.splitlines()
    exact = _weights(workspace.path / "float32")
    masters = shards_of(run / "checkpoint-4")
    for name, tensor in exact.items():
        assert torch.equal(tensor, masters[f"model.{name}"]), name
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in exact.values())
    half = _weights(workspace.path / "float16")
    assert all(torch.equal(half[name], tensor.half()) for name, tensor in exact.items())
    assert model_files(workspace.path / "bfloat16") == model_files(run / "final")
    # Without a wish it is the checkpoint's own, and final/ has nothing better.
    done(_export("run", output="own"))
    assert model_files(workspace.path / "own") == model_files(run / "final")
    assert "Using" not in done(_export("run/final", "--dtype", "float32", output="widened"))
    widened, saved = _weights(workspace.path / "widened"), _weights(run / "final")
    assert all(torch.equal(widened[name], tensor.float()) for name, tensor in saved.items())


def _tied(path: Path) -> Path:
    return write_custom(path, "buffers", tie_word_embeddings=True)


MODELS = {"tied-llama": write_llama, "mixtral": write_mixtral, "tied-custom": _tied, "changing-buffers": write_hooked}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.usefixtures("verified_here")
def test_models_of_all_kinds(workspace: Workspace, kind: str, dtype: str | None) -> None:
    """Under the names that transformers stores, with the grown vocabulary, tied weights once, buffers as they are."""
    MODELS[kind](workspace.path / "model")
    grows = kind != "changing-buffers"
    run = _train(workspace, extra=8 if grows else 0)
    chosen = [] if dtype is None else ["--dtype", dtype]
    done(_export("run/checkpoint-4", "--trust-remote-code", *chosen))
    out = workspace.path / "out"
    seen, final = _weights(out), _weights(run / "final")
    assert seen.keys() == final.keys()
    for name, tensor in final.items():
        cast = dtype is not None and tensor.is_floating_point() and not name.endswith(".mean")
        assert torch.equal(seen[name], tensor.to(DTYPES[dtype]) if cast else tensor), name  # type: ignore[index]
    assert json.loads((out / "config.json").read_text())["vocab_size"] == (265 if grows else 260)
    if dtype is None:
        assert model_files(out) == model_files(run / "final")


def test_custom_code_loads_with_everything_else_gone(workspace: Workspace) -> None:
    """In float32: this model adds a float32 attribute that is no buffer, so its forward pass needs float32."""
    _tied(workspace.path / "model")
    _train(workspace)
    weights = _weights(workspace.path / "run" / "final")
    done(_export("run/checkpoint-4", "--trust-remote-code"))
    for name in ("run", "model", "tokenizer"):
        shutil.rmtree(workspace.path / name)
    seen = reload_in_new_process(workspace, workspace.path / "out")
    assert seen["dtype"] == "torch.float32"
    table, offsets = torch.exp(-torch.arange(16) / 8.0), torch.arange(16) / 16
    embedding = weights["embed.weight"].float()
    expected = (embedding[seen["ids"]] * table + offsets) @ embedding.T
    assert torch.allclose(seen["logits"], expected, atol=1e-6)


@pytest.mark.usefixtures("verified_here")
def test_an_export_can_be_trained_on(trained: Workspace) -> None:
    done(_export("run"))
    values: dict[str, Any] = {"model_dir": "out", "tokenizer": ..., "output_dir": "again", "training__lr": 0.0}
    path = trained.preset(**{key: value for key, value in values.items() if value is not ...})
    done(run_here("pretrain", "--preset", str(path)))
    assert model_files(trained.path / "again" / "final") == model_files(trained.path / "run" / "final")


# --- What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["run", "run/checkpoint-4", "run/final"])
def test_custom_code_needs_leave(workspace: Workspace, source: str) -> None:
    """Without it none of it runs."""
    _tied(workspace.path / "model")
    run = _train(workspace)
    for code in run.rglob("*_kit.py"):
        code.write_text(code.read_text() + "\nraise SystemExit('ran')\n")
    for manifest in run.rglob("manifest.json"):  # the checkpoints count as complete
        notes = json.loads(manifest.read_text())
        notes["files"] = {name: note for name, note in notes["files"].items() if not name.endswith("_kit.py")}
        manifest.write_text(json.dumps(notes))
    refused(_export(source), "has its own Python code", "--trust-remote-code")
    assert not (workspace.path / "out").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing", "nothing is not a directory"),
        ("run/checkpoint-3", "checkpoint-3 is not a directory"),
        ("data.jsonl", "data.jsonl is not a directory"),
        ("tokenizer", "tokenizer holds no checkpoint"),
        ("run/checkpoint-4/trainer_state", "holds no checkpoint"),
        ("empty", "empty holds no checkpoint"),
        ("begun", "begun holds no checkpoint"),
        ("model", "model holds no weights"),
        ("cut", "cut"),
    ],
)
def test_what_is_no_checkpoint_is_refused(trained: Workspace, source: str, message: str) -> None:
    """`model` has no weights: random numbers would be written."""
    (trained.path / "empty").mkdir()
    shutil.copytree(trained.path / "tokenizer", trained.path / "model", dirs_exist_ok=True)
    shutil.copytree(
        trained.path / "run", trained.path / "begun", ignore=shutil.ignore_patterns("checkpoint-*", "final")
    )
    shutil.copytree(trained.path / "run" / "final", trained.path / "cut")
    truncate(trained.path / "cut" / "model.safetensors")
    refused(_export(source), message)
    assert not (trained.path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "the content of model.safetensors differs"),
        (SHARD, f"the content of {SHARD} differs"),
        ("config.json", "the content of config.json differs"),
        ("trainer_state/manifest.json", "its completeness marker trainer_state/manifest.json is missing"),
    ],
)
@pytest.mark.usefixtures("verified_here")
def test_a_damaged_checkpoint_is_refused_and_a_runs_older_one_taken(
    trained: Workspace, name: str, message: str
) -> None:
    path = trained.path / "run" / "checkpoint-4" / name
    if name.endswith("manifest.json"):
        path.unlink()
    else:
        flip(path)
    before = files(trained.path / "run")
    refused(_export("run/checkpoint-4"), f"run/checkpoint-4 is not complete: {message}")
    assert not (trained.path / "out").exists()
    lines = done(_export("run")).splitlines()
    assert any(line.startswith(f"[Export] Skipped run/checkpoint-4: {message}") for line in lines)
    assert "Exported run/checkpoint-2 to out" in lines[-1]
    assert files(trained.path / "run") == before


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(trained: Workspace) -> None:
    for step in (2, 4):
        flip(trained.path / "run" / f"checkpoint-{step}" / "model.safetensors")
    result = _export("run")
    assert result.code == 2
    assert "Error: 2 problems" in result.err
    for step in (2, 4):
        assert f"run/checkpoint-{step} cannot be used: the content of model.safetensors differs" in result.err
    # What a user of export reads must not speak of another command.
    assert "--resume" not in result.err
    assert not (trained.path / "out").exists()


@pytest.mark.usefixtures("verified_here")
def test_nothing_that_exists_is_overwritten(trained: Workspace) -> None:
    (trained.path / "out").mkdir()
    done(_export("run"))  # an empty one is fine
    trained.raw("file", b"mine")
    before = files(trained.path / "out", trained.path / "run")
    for output in ("out", "file", "run", "run/final", "run/checkpoint-2"):
        refused(_export("run", "--dtype", "bfloat16", output=output), "--output: ", "exists already")
    assert files(trained.path / "out", trained.path / "run") == before
    assert (trained.path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("run",), ("--output",)),
        (("--output", "out"), ("CHECKPOINT",)),
        (("run", "--output", "out", "--dtype", "int8"), ("--dtype", "bfloat16")),
    ],
)
def test_wrong_arguments(trained: Workspace, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    refused(run_here("export", *arguments), *parts)
    assert not (trained.path / "out").exists()


@pytest.mark.usefixtures("verified_here")
def test_a_weight_that_the_dtype_cannot_hold_is_not_turned_into_infinity(trained: Workspace) -> None:
    """float16 ends at 65504."""
    path = trained.path / "run" / "final" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, path, metadata={"format": "pt"})
    result = _export("run/final", "--dtype", "float16")
    refused(result, "model.norm.weight", "float16", code=result.code)
    assert result.code in (1, 2)
    assert not (trained.path / "out").exists()
    done(_export("run/final", "--dtype", "bfloat16"))
    assert _weights(trained.path / "out")["model.norm.weight"][3] == torch.tensor(1e5).bfloat16()


# --- Complete or not there --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("layers", "missing_keys"),
        ("weight", "unexpected_keys"),
        ("dtype", "is not as it was written"),
        ("tokenizer", ""),
        ("buffer", "table is not as it was written"),
    ],
)
def test_what_does_not_load_as_written_is_not_published(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, change: str, reason: str
) -> None:
    if change == "buffer":
        _tied(workspace.path / "model")  # in this process transformers would take the class that it knows
    else:
        write_llama(workspace.path / "model")
        request.getfixturevalue("verified_here")
    _train(workspace)
    write = convert.write_model_directory

    def write_wrongly(target: Path, *arguments: Any) -> None:
        write(target, *arguments)
        config = json.loads((target / "config.json").read_text())
        if change == "layers":
            config["num_hidden_layers"] = 3
        elif change == "dtype":
            config["dtype"] = "bfloat16"  # in which the float32 weights would be loaded
        elif change == "buffer":
            config["auto_map"]["AutoModelForCausalLM"] = "modeling_kit.KitModel"  # not the one that mends buffers
        elif change == "weight":
            tensors = _weights(target) | {"unknown": torch.zeros(1)}
            save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        else:
            (target / "tokenizer.json").write_text("{")
        (target / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(convert, "write_model_directory", write_wrongly)
    before = {path.name for path in workspace.path.iterdir()}
    result = _export("run", "--trust-remote-code")
    refused(result, "what was written does not load as it should: ", reason, "nothing was exported", code=1)
    assert {path.name for path in workspace.path.iterdir()} == before


def test_a_full_disk_leaves_nothing(trained: Workspace) -> None:
    disk = trained.path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=24k", "tmpfs", str(disk))
    try:
        refused(
            _export("run", output="disk/out"),
            "disk/out could not be written: No space left on device",
            "run/checkpoint-4 is untouched",
            code=1,
        )
        assert not list(disk.iterdir())
    finally:
        unmount(disk)


def test_a_read_only_place_is_refused(trained: Workspace) -> None:
    disk = trained.path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(disk))
    try:
        refused(_export("run", output="disk/out"), "--output: ", "is not writable (Read-only file system)")
    finally:
        unmount(disk)


@pytest.mark.usefixtures("verified_here")
def test_what_a_killed_export_left_is_replaced(trained: Workspace) -> None:
    trained.raw(".out.tmp/model.safetensors", b"half")
    done(_export("run"))
    assert model_files(trained.path / "out") == model_files(trained.path / "run" / "final")
    assert not list(trained.path.glob(".out*"))
