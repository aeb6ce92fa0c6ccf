"""`--resume` through the command line: what goes on, what is refused, and what a run directory looks like after it.

The yardstick is a run that was never stopped: the resumed one must give the same numbers and files, bit for bit.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.kit.commands import Result, Workspace, run_command, run_here
from tests.kit.models import write_custom, write_llama, write_mixtral
from tests.kit.tokenizers import write_byte_tokenizer

STEPS = 12
ACCUMULATION = 2
STEPS_PER_EPOCH = 4
CURVE = ("step", "loss", "lr", "grad_norm", "tokens", "epoch")
STOP = "os.kill(os.getpid(), signal.SIGTERM)"
BREAK = "raise RuntimeError('the model broke on purpose')"

_HOOKS = """

_plain_forward, _plain_state_dict = KitModel.forward, KitModel.state_dict


def forward(self, input_ids):
    exec(os.environ.pop(f"AT_FORWARD_{self.forwards + 1}", ""))
    return _plain_forward(self, input_ids)


def state_dict(self, *args, **kwargs):
    exec(os.environ.pop(f"AT_SAVE_{self.forwards}", ""))
    return _plain_state_dict(self, *args, **kwargs)


KitModel.forward, KitModel.state_dict = forward, state_dict
"""
"""Makes the stateful model run what a test wants at a forward pass, or when a save collects the weights after it."""


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """One thread, as these models are too small for two; no waiting for disks; no handlers of stopped runs stay."""
    threads = torch.get_num_threads()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGALRM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    torch.set_num_threads(1)
    with mock.patch("os.fsync"):
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def quick_and_clean() -> Iterator[None]:
    """Every test of this file."""
    with quick():
        yield


def write_hooked(path: Path, **config: Any) -> Path:
    """The stateful model, which does what `train` tells it."""
    write_custom(path, "stateful", random_scale=True, **config)
    for name, end in (("configuration_kit.py", "\n# hooked\n"), ("modeling_kit.py", _HOOKS)):
        (path / name).write_text((path / name).read_text() + end)
    return path


def prepare(workspace: Workspace, model: Callable[[Path], Path] = write_hooked) -> None:
    """Tokenizer, model, and a corpus whose epochs are exactly STEPS_PER_EPOCH steps."""
    write_byte_tokenizer(workspace.path / "tokenizer")
    model(workspace.path / "model")
    rows = STEPS_PER_EPOCH * ACCUMULATION
    # A document of 31 bytes and its EOS fill two rows of 16.
    workspace.jsonl("data.jsonl", [f"{index:04d} " + chr(97 + index) * 26 for index in range(rows // 2)])


def values_of(**values: Any) -> dict[str, Any]:
    """What all presets here have in common, with changes."""
    common = {
        "tokenizer": "tokenizer",
        "trust_remote_code": True,
        "training__max_steps": STEPS,
        "training__batch_size": 1,
        "training__grad_accum_steps": ACCUMULATION,
        "training__warmup_steps": 3,
        "training__save_steps": 100,
    }
    return common | values


def train(
    workspace: Workspace,
    *arguments: str,
    stop_after: int | None = None,
    at_step: Mapping[int, str] | None = None,
    at_save: Mapping[int, str] | None = None,
    **values: Any,
) -> Result:
    """`eulerforge pretrain`; what is to happen during a step or save is Python. Steps are those of this call."""
    at = dict(at_step or {}) | ({} if stop_after is None else {stop_after: STOP})
    hooks = {f"AT_FORWARD_{step * ACCUMULATION}": code for step, code in at.items()}
    hooks |= {f"AT_SAVE_{step * ACCUMULATION}": code for step, code in (at_save or {}).items()}
    # In one process, generators that a resume forgot would go on by themselves from where the stopped run left them.
    random.seed()
    np.random.seed()
    torch.seed()
    with mock.patch.dict(os.environ, hooks):
        return workspace.pretrain(*arguments, **values_of(**values))


def stopped(workspace: Workspace, step: int, **values: Any) -> Result:
    """A run that a signal stopped after a step."""
    result = train(workspace, stop_after=step, **values)
    assert result.code == 75, result.err
    return result


def done(result: Result) -> str:
    """What a run printed that ended well."""
    assert result.code == 0, result.err
    assert result.err == ""
    return result.out


def refused(result: Result, *parts: str, code: int = 2) -> None:
    """One error of three lines that holds all parts, and no Python in it."""
    assert result.code == code, result.err
    assert [line.partition(" ")[0] for line in result.err.splitlines()] == ["Error:", "Fix:", "See:"], result.err
    for part in parts:
        assert part in result.err, result.err
    for word in ("Traceback", "None", "PosixPath"):
        assert word not in result.err, result.err


def files(*folders: Path) -> dict[str, str]:
    """Every file and directory below some folders, with its content's hash; not the lock, which says who looked."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        for folder in folders
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


def checkpoints(run: Path) -> list[int]:
    """Steps of the checkpoints there are."""
    names = (path.name.removeprefix("checkpoint-") for path in run.glob("checkpoint-*"))
    return sorted(int(name) for name in names if name.isdigit())


def curve(workspace: Workspace, run: str = "run") -> list[list[Any]]:
    """What metrics.jsonl says, but for times."""
    return [[record[key] for key in CURVE] for record in workspace.metrics(run)]


def steps_of(workspace: Workspace, run: str = "run") -> list[int]:
    """The steps in metrics.jsonl, as they come."""
    return [record["step"] for record in workspace.metrics(run)]


def model_files(folder: Path) -> dict[str, str]:
    """All files of a checkpoint or final/ that do not hold times or names of runs, with their content's hash."""
    return {
        str(path.relative_to(folder)): _content(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("state.json", "manifest.json")
    }


def _content(path: Path) -> str:
    if path.parent.name != "shards":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    # Shards carry notes about themselves in an order that changes from one write to the next.
    content = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def require_same_run(workspace: Workspace, one: str, other: str, step: int = STEPS) -> None:
    """Same curve, same last checkpoint (weights, optimiser, generators, buffers), same final/, bit for bit."""
    assert curve(workspace, one) == curve(workspace, other)
    require_last_files_equal(workspace, one, other, step)


def require_last_files_equal(workspace: Workspace, one: str, other: str, step: int = STEPS) -> None:
    """Same last checkpoint and final/."""
    for name in (f"checkpoint-{step}", "final"):
        first, second = model_files(workspace.path / one / name), model_files(workspace.path / other / name)
        assert first
        assert first == second, name


# --- The same as never stopped ----------------------------------------------------------------------------------


def test_stopped_after_any_step_is_never_stopped(workspace: Workspace) -> None:
    prepare(workspace)
    done(train(workspace, output_dir="straight"))
    assert steps_of(workspace, "straight") == list(range(1, STEPS + 1))
    assert workspace.metrics("straight")[-1]["epoch"] == STEPS / STEPS_PER_EPOCH
    for step in range(1, STEPS):
        name = f"stopped-{step}"
        run = workspace.path / name
        result = stopped(workspace, step, output_dir=name)
        assert result.err == ""
        said = f"[Pretrain] Stopped by SIGTERM after step {step}; {name}/checkpoint-{step} is complete. "
        assert f"{said}Go on with --resume." in result.out.splitlines()
        assert workspace.status(name) == {"status": "preempted", "step": step, "reason": "stopped by SIGTERM"}
        assert checkpoints(run) == [step]
        assert not (run / "final").exists()
        out = done(train(workspace, "--resume", output_dir=name))
        assert f"[Pretrain] Resuming from {name}/checkpoint-{step} (step {step} of {STEPS})" in out.splitlines()
        require_same_run(workspace, name, "straight")
        assert workspace.status(name) == {"status": "finished", "step": STEPS, "reason": ""}
        assert checkpoints(run) == [step, STEPS]


def test_a_run_that_is_stopped_again_and_again_is_never_stopped(workspace: Workspace) -> None:
    prepare(workspace)
    done(train(workspace, output_dir="straight"))
    stopped(workspace, 2)
    run_id = json.loads((workspace.path / "run" / "pretrain_config.json").read_text())["run_id"]
    for more in (1, 4, 3):
        assert train(workspace, "--resume", stop_after=more).code == 75
    done(train(workspace, "--resume"))
    require_same_run(workspace, "run", "straight")
    assert checkpoints(workspace.path / "run") == [2, 3, 7, 10, 12]
    config = json.loads((workspace.path / "run" / "pretrain_config.json").read_text())
    assert config["run_id"] == run_id
    assert config["resumed_from"] == {"checkpoint": str(workspace.path / "run" / "checkpoint-10"), "step": 10}
    elapsed = [record["elapsed_sec"] for record in workspace.metrics()]
    assert elapsed == sorted(elapsed)


def _llama(path: Path) -> Path:
    return write_llama(path, attention_dropout=0.1)


def _mixtral(path: Path) -> Path:
    return write_mixtral(path, attention_dropout=0.1)


def _tied(path: Path) -> Path:
    return write_custom(path, "buffers", tie_word_embeddings=True, vocab_size=258)


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (write_hooked, {"training__async_checkpoint": True}),
        (write_hooked, {"training__dtype": "bfloat16", "training__amp": True}),
        (_llama, {}),
        (_llama, {"data__packing": False, "data__max_length": 24, "training__max_grad_norm": None}),
        (_mixtral, {}),
        (_tied, {}),
    ],
    ids=["async", "bfloat16", "llama", "documents", "mixtral", "tied-and-grown"],
)
def test_every_checkpoint_holds_all_that_the_run_needs(
    workspace: Workspace, model: Callable[[Path], Path], values: dict[str, Any]
) -> None:
    """Going on from the checkpoints of a finished run repeats what it did, bit for bit."""
    prepare(workspace, model)
    if model is _tied:
        shutil.rmtree(workspace.path / "tokenizer")
        write_byte_tokenizer(workspace.path / "tokenizer", extra=5)
    out = done(train(workspace, output_dir="straight", training__save_steps=3, **values))
    assert checkpoints(workspace.path / "straight") == [3, 6, 9, 12]
    grows = "Tokenizer vocab (262) > model vocab (258). Resizing model embeddings to 262."
    assert (grows in out) is (model is _tied)
    for step in (3, 9):
        shutil.copytree(workspace.path / "straight", workspace.path / f"again-{step}")
        again = {"output_dir": f"again-{step}", "training__save_steps": 3, **values}
        out = done(train(workspace, "--resume", f"again-{step}/checkpoint-{step}", **again))
        assert f"(weights of checkpoint-{step})" in out
        require_same_run(workspace, f"again-{step}", "straight")
    weights = load_file(workspace.path / "straight" / "checkpoint-3" / "model.safetensors")
    if model is _mixtral:
        assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in weights
    if model is _tied:
        assert "head.weight" not in weights
        assert weights["embed.weight"].shape == (262, 16)


def shards_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What the shards hold."""
    tensors: dict[str, torch.Tensor] = {}
    for path in (checkpoint / "trainer_state" / "shards").iterdir():
        tensors |= load_file(path)
    return tensors


def test_bfloat16_checkpoints_hold_float32_masters_that_differ(workspace: Workspace) -> None:
    """Without the masters a resume would begin at rounded weights."""
    prepare(workspace)
    stopped(workspace, 3, training__dtype="bfloat16", training__amp=True)
    checkpoint = workspace.path / "run" / "checkpoint-3"
    weights, shards = load_file(checkpoint / "model.safetensors"), shards_of(checkpoint)
    masters = {name.removeprefix("model."): value for name, value in shards.items() if name.startswith("model.")}
    trained = {name for name in weights if not name.endswith("mean")}  # a buffer stays as the model made it
    assert masters.keys() == trained
    for name, master in masters.items():
        assert master.dtype == torch.float32
        assert weights[name].dtype == torch.bfloat16
        assert torch.equal(master.bfloat16(), weights[name])
    assert any(not torch.equal(master, weights[name].float()) for name, master in masters.items())


def test_float32_checkpoints_hold_the_weights_once(workspace: Workspace) -> None:
    prepare(workspace)
    stopped(workspace, 1)
    assert not [name for name in shards_of(workspace.path / "run" / "checkpoint-1") if name.startswith("model.")]


@pytest.mark.parametrize(("before", "after"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_precision_may_change_and_is_said(workspace: Workspace, before: str, after: str) -> None:
    prepare(workspace)
    stopped(workspace, 3, training__dtype=before, training__amp=before == "bfloat16")
    out = done(train(workspace, "--resume", training__dtype=after, training__amp=after == "bfloat16"))
    assert f"training.dtype {before} -> {after}" in out
    assert steps_of(workspace) == list(range(1, STEPS + 1))
    final = load_file(workspace.path / "run" / "final" / "model.safetensors")
    assert final["head.weight"].dtype == getattr(torch, after)


# --- After a crash ----------------------------------------------------------------------------------------------


def test_a_crash_costs_the_steps_since_the_checkpoint_and_nothing_else(workspace: Workspace) -> None:
    """Metrics and TensorBoard hold each step once. The resume is a new process, as a user would start it."""
    prepare(workspace)
    done(train(workspace, output_dir="straight", training__max_steps=9, training__save_steps=3))
    with pytest.raises(RuntimeError, match="broke on purpose"):
        train(workspace, at_step={6: BREAK}, training__max_steps=9, training__save_steps=3)
    assert workspace.status() == {
        "status": "failed",
        "step": 5,
        "reason": "RuntimeError: the model broke on purpose",
    }
    assert steps_of(workspace) == [1, 2, 3, 4, 5]
    assert checkpoints(workspace.path / "run") == [3]
    with (workspace.path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    preset = workspace.preset(**values_of(training__max_steps=9, training__save_steps=3))
    out = done(run_command("pretrain", "--preset", str(preset), "--resume", cwd=workspace.path, OMP_NUM_THREADS="1"))
    assert "[Pretrain] Cut metrics.jsonl back to step 3 (3 lines removed)" in out.splitlines()
    require_same_run(workspace, "run", "straight", step=9)
    assert checkpoints(workspace.path / "run") == [3, 6, 9]
    events = EventAccumulator(str(workspace.path / "run" / "tensorboard"))
    events.Reload()
    for tag, key in (("train/loss", "loss"), ("train/lr", "lr"), ("train/grad_norm", "grad_norm")):
        points = events.Scalars(tag)
        assert [point.step for point in points] == list(range(1, 10)), tag
        told = [record[key] for record in workspace.metrics()]
        assert [point.value for point in points] == pytest.approx(told, rel=1e-6), tag


@pytest.mark.parametrize(
    "tail", [b'{"step": 3, "loss"', b"\n", b"not json\n", b'{"loss": 1.0}\n', b"\xff\xfe\n", b"[3]\n", b"\0\0\0\0"]
)
def test_lines_that_are_no_records_are_removed(workspace: Workspace, tail: bytes) -> None:
    prepare(workspace)
    stopped(workspace, 2)
    metrics = workspace.path / "run" / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole + tail)
    out = done(train(workspace, "--resume", training__max_steps=3))
    assert "Cut metrics.jsonl back to step 2 (1 lines removed)" in out
    assert metrics.read_bytes().startswith(whole)
    assert steps_of(workspace) == [1, 2, 3]


def test_metrics_that_are_gone_are_begun_anew(workspace: Workspace) -> None:
    prepare(workspace)
    stopped(workspace, 2)
    (workspace.path / "run" / "metrics.jsonl").unlink()
    done(train(workspace, "--resume", training__max_steps=4))
    assert steps_of(workspace) == [3, 4]


def test_status_and_config_that_are_broken_do_not_hinder(workspace: Workspace) -> None:
    """They are for people; the checkpoint has all that a resume needs."""
    prepare(workspace)
    stopped(workspace, 2)
    for name in ("status.json", "pretrain_config.json"):
        (workspace.path / "run" / name).write_text("{")
    done(train(workspace, "--resume", training__max_steps=3))
    assert steps_of(workspace) == [1, 2, 3]
    assert workspace.status()["status"] == "finished"


def test_a_run_whose_last_checkpoint_is_there_only_gets_its_final(workspace: Workspace) -> None:
    """Killed between the last checkpoint and the end of final/."""
    prepare(workspace)
    done(train(workspace, training__max_steps=4))
    run = workspace.path / "run"
    whole, before = model_files(run / "final"), files(run / "checkpoint-4")
    (run / "final").rename(run / ".final.tmp")
    (run / ".final.tmp" / "model.safetensors").unlink()
    (run / "status.json").write_text('{"status": "running", "step": 4, "reason": ""}')
    out = done(train(workspace, "--resume", training__max_steps=4))
    assert "[Pretrain] Removed .final.tmp, left by a save that was not completed" in out.splitlines()
    assert model_files(run / "final") == whole
    assert files(run / "checkpoint-4") == before
    assert checkpoints(run) == [4]
    assert steps_of(workspace) == [1, 2, 3, 4]
    assert workspace.status() == {"status": "finished", "step": 4, "reason": ""}


# --- Which directory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["missing", "empty", "missing parents"])
def test_resume_of_a_run_that_has_not_begun_begins_it(workspace: Workspace, kind: str) -> None:
    """So that a batch script can always say --resume."""
    prepare(workspace)
    name = "deep/down/run" if kind == "missing parents" else "run"
    if kind == "empty":
        (workspace.path / name).mkdir()
    out = done(train(workspace, "--resume", training__max_steps=3, output_dir=name))
    assert f"[Pretrain] No checkpoint in {name} yet: starting from the beginning." in out.splitlines()
    assert steps_of(workspace, name) == [1, 2, 3]
    done(train(workspace, training__max_steps=3, output_dir="plain"))
    require_same_run(workspace, name, "plain", step=3)


def test_resume_without_output_dir_does_not_guess(workspace: Workspace) -> None:
    prepare(workspace)
    before = files(workspace.path)
    result = train(workspace, "--resume", output_dir=...)
    refused(result, "--resume: which run?", "output_dir is not set", "--output-dir", "--resume RUN_DIRECTORY")
    (workspace.path / "preset.yml").unlink()
    assert files(workspace.path) == before


def test_a_run_without_any_checkpoint_starts_over(workspace: Workspace) -> None:
    prepare(workspace)
    with pytest.raises(RuntimeError, match="broke on purpose"):
        train(workspace, at_step={3: BREAK})
    assert steps_of(workspace) == [1, 2]
    out = done(train(workspace, "--resume", training__max_steps=4))
    assert "[Pretrain] No checkpoint in run yet: starting from the beginning." in out.splitlines()
    assert "[Pretrain] Cut metrics.jsonl back to step 0 (2 lines removed)" in out.splitlines()
    assert steps_of(workspace) == [1, 2, 3, 4]
    done(train(workspace, training__max_steps=4, output_dir="plain"))
    require_same_run(workspace, "run", "plain", step=4)


def test_a_finished_run_is_left_as_it_is(workspace: Workspace) -> None:
    prepare(workspace)
    done(train(workspace, training__max_steps=4))
    before = files(workspace.path)
    out = done(train(workspace, "--resume", training__max_steps=4))
    assert "has finished: step 4 of 4. Nothing to do." in out
    out = done(train(workspace, "--resume", "run", training__max_steps=4, output_dir=...))
    assert "has finished: step 4 of 4. Nothing to do." in out
    (workspace.path / "preset.yml").unlink()
    del before[str(workspace.path / "preset.yml")]
    assert files(workspace.path) == before


def test_a_finished_run_goes_on_when_there_is_more_to_do(workspace: Workspace) -> None:
    """Under the schedule of the new length, and final/ is the new end."""
    prepare(workspace)
    done(train(workspace, training__max_steps=4))
    done(train(workspace, training__max_steps=8, output_dir="longer"))
    run = workspace.path / "run"
    old = model_files(run / "final")
    out = done(train(workspace, "--resume", training__max_steps=8))
    assert "Warning: changed since checkpoint-4: training.max_steps 4 -> 8; training goes on under the new " in out
    assert steps_of(workspace) == list(range(1, 9))
    rates = {name: [record["lr"] for record in workspace.metrics(name)] for name in ("run", "longer")}
    assert rates["run"][3] == 0.0
    assert rates["run"][4:] == rates["longer"][4:]
    assert rates["run"][4] > 0.0
    new = model_files(run / "final")
    assert new["model.safetensors"] != old["model.safetensors"]
    assert new["model.safetensors"] == model_files(run / "checkpoint-8")["model.safetensors"]
    assert not [path.name for path in run.iterdir() if path.name.endswith(".tmp")]
    assert workspace.status() == {"status": "finished", "step": 8, "reason": ""}


@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_without_resume_a_used_directory_is_refused(workspace: Workspace, state: str) -> None:
    prepare(workspace)
    result = train(workspace, stop_after=2 if state == "stopped" else None)
    assert result.code == (75 if state == "stopped" else 0)
    before = files(workspace.path)
    refused(train(workspace), "output_dir", "is not empty", "add --resume to go on")
    assert files(workspace.path) == before


def test_a_directory_with_other_things_in_it_is_no_run(workspace: Workspace) -> None:
    prepare(workspace)
    (workspace.path / "run").mkdir()
    workspace.raw("run/notes.txt", b"mine")
    before = files(workspace.path / "run")
    refused(train(workspace, "--resume"), "run is not empty and not a run directory", "output_dir")
    refused(train(workspace, "--resume", "run"), "--resume", "neither pretrain_config.json nor a checkpoint")
    refused(train(workspace, "--resume", "run", output_dir=...), "neither pretrain_config.json nor a checkpoint")
    assert files(workspace.path / "run") == before


def test_max_steps_below_the_checkpoint_is_refused(workspace: Workspace) -> None:
    prepare(workspace)
    stopped(workspace, 5)
    before = files(workspace.path / "run")
    result = train(workspace, "--resume", training__max_steps=4)
    refused(result, "run/checkpoint-5 is beyond training.max_steps 4", "raise training.max_steps to 5 or more")
    assert files(workspace.path / "run") == before
    done(train(workspace, "--resume", training__max_steps=5))
    assert steps_of(workspace) == [1, 2, 3, 4, 5]


def test_dry_run_and_validate_only_of_a_resume_write_nothing(workspace: Workspace) -> None:
    prepare(workspace)
    stopped(workspace, 2)
    before = files(workspace.path / "run")
    out = done(train(workspace, "--resume", "--dry-run"))
    assert "--resume" in out.splitlines()[-1]
    out = done(train(workspace, "--resume", "run/checkpoint-2", "--dry-run"))
    assert "--resume run/checkpoint-2" in out.splitlines()[-1]
    done(train(workspace, "--resume", "--validate-only"))
    refused(train(workspace, "--resume", "absent", "--validate-only"), "absent is not a directory")
    assert files(workspace.path / "run") == before


@pytest.mark.parametrize("spelling", ["absolute", "relative", "trailing slash", "other preset"])
def test_the_run_may_be_named_on_the_command_line(workspace: Workspace, spelling: str) -> None:
    prepare(workspace)
    stopped(workspace, 2)
    given = {"absolute": str(workspace.path / "run"), "trailing slash": "run/"}.get(spelling, "run")
    values = {"output_dir": ...} if spelling == "other preset" else {}
    done(train(workspace, "--resume", given, training__max_steps=3, **values))
    assert steps_of(workspace) == [1, 2, 3]


@pytest.mark.parametrize("spelling", ["link", "dots"])
def test_one_directory_under_two_names_is_one_run(workspace: Workspace, spelling: str) -> None:
    """Not a branch of a run into itself."""
    prepare(workspace)
    stopped(workspace, 2)
    (workspace.path / "link").symlink_to("run", target_is_directory=True)
    given = {"link": "link", "dots": "model/../run"}[spelling]
    done(train(workspace, "--resume", given, training__max_steps=3))
    assert steps_of(workspace) == [1, 2, 3]


# --- Which checkpoint -------------------------------------------------------------------------------------------


def test_a_named_checkpoint_is_gone_back_to_and_later_ones_are_set_aside(workspace: Workspace) -> None:
    prepare(workspace)
    done(train(workspace, training__save_steps=3, output_dir="straight"))
    run = workspace.path / "run"
    shutil.copytree(workspace.path / "straight", run)
    later = {step: model_files(run / f"checkpoint-{step}") for step in (6, 9, 12)}
    for again in ("", "-2"):
        out = done(train(workspace, "--resume", "run/checkpoint-3", training__save_steps=3)).splitlines()
        for step in (6, 9, 12):
            aside = f"checkpoint-{step}.set-aside{again}"
            assert f"[Pretrain] Set aside checkpoint-{step} as {aside}: it is beyond step 3" in out
            assert model_files(run / aside) == later[step]
        assert "[Pretrain] Cut metrics.jsonl back to step 3 (9 lines removed)" in out
        require_same_run(workspace, "run", "straight")
        assert checkpoints(run) == [3, 6, 9, 12]


def test_a_branch_reads_the_old_run_only(workspace: Workspace) -> None:
    prepare(workspace)
    done(train(workspace, training__save_steps=3, output_dir="old"))
    before = files(workspace.path / "old")
    out = done(train(workspace, "--resume", "old/checkpoint-6", "--output-dir", "new", training__save_steps=3))
    assert "[Pretrain] Resuming from old/checkpoint-6 (step 6 of 12)" in out.splitlines()
    assert "[Pretrain] Run directory: new" in out.splitlines()
    assert files(workspace.path / "old") == before
    assert curve(workspace, "new") == curve(workspace, "old")[6:]
    require_last_files_equal(workspace, "new", "old")
    assert checkpoints(workspace.path / "new") == [9, 12]
    old, new = (json.loads((workspace.path / name / "pretrain_config.json").read_text()) for name in ("old", "new"))
    assert new["resumed_from"] == {"checkpoint": str(workspace.path / "old" / "checkpoint-6"), "step": 6}
    assert old["run_id"] != new["run_id"]
    for name, config in (("old", old), ("new", new)):
        state = workspace.path / name / "checkpoint-12" / "trainer_state" / "state.json"
        assert json.loads(state.read_text())["run"] == config["run_id"]
    events = EventAccumulator(str(workspace.path / "new" / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("train/loss")] == list(range(7, 13))


def test_a_branch_takes_the_newest_checkpoint_and_can_be_resumed_itself(workspace: Workspace) -> None:
    prepare(workspace)
    done(train(workspace, output_dir="straight"))
    stopped(workspace, 4, output_dir="old")
    before = files(workspace.path / "old")
    assert train(workspace, "--resume", "old", "--output-dir", "new", stop_after=2).code == 75
    assert checkpoints(workspace.path / "new") == [6]
    done(train(workspace, "--resume", output_dir="new"))
    assert curve(workspace, "new") == curve(workspace, "straight")[4:]
    require_last_files_equal(workspace, "new", "straight")
    assert files(workspace.path / "old") == before


def test_a_branch_does_not_go_into_a_used_directory(workspace: Workspace) -> None:
    """The advice must lead on: --resume is there already."""
    prepare(workspace)
    stopped(workspace, 2, output_dir="old")
    stopped(workspace, 1, output_dir="new")
    before = files(workspace.path)
    result = train(workspace, "--resume", "old", output_dir="new")
    refused(result, "new is not empty, and --resume names another run", "give --resume new to go on with the run")
    assert files(workspace.path) == before


def test_a_branch_that_broke_before_it_saved_does_not_become_another_run(workspace: Workspace) -> None:
    """Starting from step 1 would be a run that nobody has asked for."""
    prepare(workspace)
    done(train(workspace, output_dir="straight"))
    stopped(workspace, 4, output_dir="old")
    with pytest.raises(RuntimeError, match="broke on purpose"):
        train(workspace, "--resume", "old/checkpoint-4", "--output-dir", "new", at_step={3: BREAK})
    assert steps_of(workspace, "new") == [5, 6]
    result = train(workspace, "--resume", output_dir="new")
    if result.code == 0:
        assert curve(workspace, "new") == curve(workspace, "straight")[4:]
        require_last_files_equal(workspace, "new", "straight")
    else:
        refused(result, "old/checkpoint-4")


@pytest.mark.parametrize("name", ["run/final", "model"])
def test_a_model_is_not_resumed_from(workspace: Workspace, name: str) -> None:
    prepare(workspace)
    done(train(workspace, training__max_steps=3))
    before = files(workspace.path / "run")
    for values in ({"output_dir": ...}, {}, {"output_dir": "new"}):
        result = train(workspace, "--resume", name, **values)
        path = workspace.path / name
        refused(result, f"--resume: {path} is a model, not a checkpoint", "trainer_state", f"model_dir: {path}")
    assert files(workspace.path / "run") == before
    assert not (workspace.path / "new").exists()


@pytest.mark.parametrize(
    "name", ["absent", "run/checkpoint-7", "data.jsonl", "run/checkpoint-2/config.json", "~no/x"]
)
def test_what_is_not_there_is_not_resumed_from(workspace: Workspace, name: str) -> None:
    prepare(workspace)
    stopped(workspace, 2)
    before = files(workspace.path / "run")
    for values in ({}, {"output_dir": ...}, {"output_dir": "new"}):
        refused(train(workspace, "--resume", name, **values), "--resume: ", name)
    assert files(workspace.path / "run") == before
    assert not (workspace.path / "new").exists()


@pytest.mark.parametrize("name", ["backup/checkpoint-4", "backup/under-another-name"])
def test_a_checkpoint_copied_elsewhere_needs_a_new_run(workspace: Workspace, name: str) -> None:
    prepare(workspace)
    done(train(workspace, output_dir="straight"))
    stopped(workspace, 4)
    (workspace.path / "backup").mkdir()
    (workspace.path / "run" / "checkpoint-4").rename(workspace.path / name)
    shutil.rmtree(workspace.path / "run")
    before = files(workspace.path / "backup")
    result = train(workspace, "--resume", name, output_dir=...)
    refused(result, "backup is not a run directory", "pretrain_config.json", "--output-dir NEW")
    done(train(workspace, "--resume", name, "--output-dir", "new"))
    assert files(workspace.path / "backup") == before
    assert curve(workspace, "new") == curve(workspace, "straight")[4:]
    require_last_files_equal(workspace, "new", "straight")


# --- What must not change, and what may -------------------------------------------------------------------------


def _configure(workspace: Workspace, **changes: Any) -> None:
    path = workspace.path / "model" / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def _other_tokenizer(workspace: Workspace) -> None:
    """Same size, two bytes exchanged."""
    path = workspace.path / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content))


def _larger_tokenizer(workspace: Workspace) -> None:
    shutil.rmtree(workspace.path / "tokenizer")
    write_byte_tokenizer(workspace.path / "tokenizer", extra=2)


def _one_byte(workspace: Workspace) -> None:
    path = workspace.path / "data.jsonl"
    path.write_bytes(path.read_bytes().replace(b"aa", b"ab", 1))


def _one_document_less(workspace: Workspace) -> None:
    path = workspace.path / "data.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize(
    ("change", "values", "parts"),
    [
        (
            _other_tokenizer,
            {},
            ("tokenizer is 257 ids, content ", "but 257 ids, content ", "give the tokenizer that"),
        ),
        (_larger_tokenizer, {}, ("tokenizer is 259 ids", "but 257 ids")),
        (_one_byte, {}, ("data is 128 tokens in 4 documents, content ", "but 128 tokens in 4 documents, content ")),
        (_one_document_less, {}, ("data is 96 tokens in 3 documents", "but 128 tokens in 4 documents")),
        (None, {"data__max_length": 8}, ("data.max_length is 8, but 16", "set data.max_length back to 16")),
        (None, {"training__seed": 1}, ("training.seed is 1, but 42", "set training.seed back to 42")),
        (None, {"data__packing": False}, ("data.packing is false, but true", "set data.packing back to true")),
        (None, {"data__add_eos": False}, ("data is 124 tokens",)),
        (lambda w: _configure(w, hidden_size=32), {}, ("model config.hidden_size is 32, but 24", "give the model")),
        (lambda w: _configure(w, hidden_size=...), {}, ("model config.hidden_size is not set, but 24",)),
        (lambda w: _configure(w, shift=2), {}, ("model config.shift is 2, but not set",)),
        (lambda w: _configure(w, random_scale=False), {}, ("model config.random_scale is false, but true",)),
        (
            None,
            {"training__batch_size": 3, "training__grad_accum_steps": 1},
            ("rows per step is 3, but 2", "keep batch_size x grad_accum_steps x processes = 2"),
        ),
        (
            None,
            {"training__global_batch_size": 4},
            ("rows per step is 4, but 2", "training.global_batch_size: 2"),
        ),
    ],
    ids=[
        "tokenizer",
        "tokenizer-larger",
        "corpus-byte",
        "corpus-shorter",
        "max_length",
        "seed",
        "packing",
        "add_eos",
        "hidden_size",
        "key-removed",
        "key-added",
        "key-bool",
        "rows",
        "global-batch",
    ],
)
def test_another_run_is_refused_with_the_difference_named(
    workspace: Workspace,
    change: Callable[[Workspace], None] | None,
    values: dict[str, Any],
    parts: tuple[str, ...],
) -> None:
    prepare(workspace, lambda path: write_hooked(path, hidden_size=24))
    stopped(workspace, 3)
    before = files(workspace.path / "run")
    if change is not None:
        change(workspace)
    result = train(workspace, "--resume", **values)
    refused(result, "--resume: ", "in checkpoint-3", *parts)
    assert "docs/checkpoints.md" in result.err
    assert files(workspace.path / "run") == before
    result = train(workspace, "--resume", "run/checkpoint-3", "--output-dir", "new", **values)
    refused(result, *parts)
    assert not (workspace.path / "new").exists()


def test_all_differences_are_told_at_once(workspace: Workspace) -> None:
    prepare(workspace)
    stopped(workspace, 3)
    before = files(workspace.path / "run")
    _configure(workspace, hidden_size=24)
    result = train(workspace, "--resume", training__seed=7, data__max_length=8, training__batch_size=2)
    assert result.code == 2
    lines = result.err.splitlines()
    assert lines[0] == "Error: 4 problems"
    told = [line.partition(". --resume: ")[2].partition(" is ")[0] for line in lines[1:-1:2]]
    assert told == ["data.max_length", "model config.hidden_size", "rows per step", "training.seed"]
    assert files(workspace.path / "run") == before


def test_places_may_change(workspace: Workspace) -> None:
    """Corpus, tokenizer, model and run lie elsewhere now, and the token cache is gone: nothing to mention."""
    prepare(workspace)
    done(train(workspace, output_dir="straight"))
    stopped(workspace, 5)
    other = workspace.path / "other"
    other.mkdir()
    for name in ("data.jsonl", "tokenizer", "model", "run"):
        (workspace.path / name).rename(other / f"my-{name}")
    shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]) / "eulerforge")
    out = done(
        train(
            workspace,
            "--resume",
            model_dir="other/my-model",
            tokenizer="other/my-tokenizer",
            data__path="other/my-data.jsonl",
            output_dir="other/my-run",
        )
    )
    assert "hanged since" not in out
    assert "Warning" not in out
    require_same_run(workspace, "other/my-run", "straight")


def test_the_batch_may_be_split_in_another_way(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step still sees the rows that it would have seen."""
    prepare(workspace)
    seen = {}
    for name, stop, values in (
        ("straight", None, {}),
        ("run", 3, {}),
        ("resumed", None, {"training__batch_size": 2, "training__grad_accum_steps": 1}),
    ):
        folder = workspace.path / f"probe-{name}"
        folder.mkdir()
        monkeypatch.setenv("PROBE_DIR", str(folder))
        resume = ("--resume", "run") if name == "resumed" else ()
        result = train(workspace, *resume, stop_after=stop, output_dir="run" if resume else name, **values)
        assert result.code == (0 if stop is None else 75), result.err
        seen[name] = [row for line in (folder / "rank0.jsonl").read_text().splitlines() for row in json.loads(line)]
    assert "Changed since checkpoint-3: training.batch_size 1 -> 2, training.grad_accum_steps 2 -> 1" in result.out
    assert seen["run"] + seen["resumed"] == seen["straight"]
    assert len(seen["straight"]) == STEPS * ACCUMULATION
    assert steps_of(workspace) == list(range(1, STEPS + 1))


def test_settings_may_change_and_each_change_is_said(workspace: Workspace) -> None:
    prepare(workspace)
    stopped(workspace, 3, training__log_steps=1)
    out = done(
        train(
            workspace,
            "--resume",
            training__lr=5e-3,
            training__max_steps=10,
            training__max_grad_norm=None,
            training__save_steps=4,
            training__log_steps=2,
            training__keep_checkpoints=5,
            training__async_checkpoint=True,
        )
    )
    (plain,) = [line for line in out.splitlines() if "Changed since checkpoint-3: " in line]
    (shaping,) = [line for line in out.splitlines() if "Warning: changed since checkpoint-3: " in line]
    for text in (
        "training.save_steps 100 -> 4",
        "training.log_steps 1 -> 2",
        "training.keep_checkpoints all -> 5",
        "training.async_checkpoint false -> true",
    ):
        assert text in plain
    for text in ("training.lr 0.01 -> 0.005", "training.max_steps 12 -> 10", "training.max_grad_norm 1.0 -> null"):
        assert text in shaping
    assert "training goes on under the new values from step 4 on" in shaping
    assert steps_of(workspace) == [1, 2, 3, 4, 6, 8, 10]
    assert checkpoints(workspace.path / "run") == [3, 4, 8, 10]
    rates = {record["step"]: record["lr"] for record in workspace.metrics()}
    for step in (4, 6, 8, 10):  # warm-up of 3 steps, then a cosine to 0 at step 10
        assert rates[step] == pytest.approx(5e-3 * 0.5 * (1 + math.cos(math.pi * (step - 3) / 7)), abs=1e-12)


def test_a_setting_that_is_as_before_is_not_mentioned(workspace: Workspace) -> None:
    prepare(workspace)
    stopped(workspace, 3)
    assert "hanged since" not in done(train(workspace, "--resume"))


@pytest.mark.parametrize("change", ["edited", "added"])
def test_other_code_of_the_model_is_a_warning_only(workspace: Workspace, change: str) -> None:
    prepare(workspace)
    stopped(workspace, 3)
    code = workspace.path / "model" / "modeling_kit.py"
    if change == "added":
        code.write_text(code.read_text() + "\nfrom .helper_kit import decay_table\n")
        expected = ["constants_kit.py", "helper_kit.py", "modeling_kit.py"]
    else:
        code.write_text(code.read_text() + "\n# a comment\n")
        expected = ["modeling_kit.py"]
    lines = done(train(workspace, "--resume")).splitlines()
    warnings = [line for line in lines if "model's code is" in line or "model's code was" in line]
    end = "of the model's code is not as it was at checkpoint-3"
    assert [f"[Pretrain] Warning: {name} {end}" for name in expected] == warnings
    assert steps_of(workspace) == list(range(1, STEPS + 1))


# --- The clock --------------------------------------------------------------------------------------------------


def test_time_that_is_up_while_the_run_is_set_up_leaves_nothing(workspace: Workspace) -> None:
    prepare(workspace)
    result = train(workspace, training__max_minutes=1e-6)
    assert result.code == 75
    assert "stopped by training.max_minutes while the run was being set up" in result.err
    assert len(result.err.splitlines()) == 1
    assert not (workspace.path / "run").exists()
    stopped(workspace, 2)
    before = files(workspace.path / "run")
    assert train(workspace, "--resume", training__max_minutes=1e-6).code == 75
    assert files(workspace.path / "run") == before


def test_time_that_is_up_during_training_stops_in_order(workspace: Workspace) -> None:
    prepare(workspace)
    done(train(workspace, output_dir="straight"))
    wait = "while signal.getitimer(signal.ITIMER_REAL)[0]: pass"  # until the clock has rung
    result = train(workspace, at_step={3: wait}, training__max_minutes=0.02)
    assert result.code == 75
    lines = result.out.splitlines()
    assert "[Pretrain] Stopping in order after 0.02 minutes (training.max_minutes)" in lines
    said = (
        "[Pretrain] Stopped by training.max_minutes after step 3; run/checkpoint-3 is complete. Go on with --resume."
    )
    assert said in lines
    assert workspace.status() == {"status": "preempted", "step": 3, "reason": "stopped by training.max_minutes"}
    out = done(train(workspace, "--resume", training__max_minutes=60))
    assert "Changed since checkpoint-3: training.max_minutes 0.02 -> 60" in out
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    require_same_run(workspace, "run", "straight")


# --- Which checkpoints are kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "save", "expected"), [(7, 3, [3, 6, 7]), (6, 3, [3, 6]), (2, 100, [2]), (3, 1, [1, 2, 3])]
)
def test_every_nth_step_is_saved_and_the_last_once(
    workspace: Workspace, steps: int, save: int, expected: list[int]
) -> None:
    prepare(workspace)
    out = done(train(workspace, training__max_steps=steps, training__save_steps=save, training__warmup_steps=0))
    run = workspace.path / "run"
    assert checkpoints(run) == expected
    assert out.count("Checkpoint saved: ") == len(expected)
    assert (
        model_files(run / "final")["model.safetensors"]
        == (model_files(run / f"checkpoint-{steps}")["model.safetensors"])
    )


@pytest.mark.parametrize("asynchronous", [False, True])
def test_as_many_checkpoints_are_kept_as_asked_for(workspace: Workspace, asynchronous: bool) -> None:
    """The one that a session began with stays as long as it runs; the next one may remove it."""
    prepare(workspace)
    values = {
        "training__save_steps": 1,
        "training__keep_checkpoints": 2,
        "training__async_checkpoint": asynchronous,
    }
    run = workspace.path / "run"
    seen = "(pathlib.Path('seen')).write_text(' '.join(sorted(p.name for p in pathlib.Path('run').glob('check*'))))"
    result = train(workspace, stop_after=6, at_step={4: seen}, **values)
    assert result.code == 75
    assert checkpoints(run) == [5, 6]
    if not asynchronous:
        assert (workspace.path / "seen").read_text() == "checkpoint-2 checkpoint-3"
    assert result.out.splitlines().count("[Pretrain] Checkpoint removed: run/checkpoint-4 (keep_checkpoints: 2)") == 1
    assert train(workspace, "--resume", stop_after=4, **values).code == 75
    assert checkpoints(run) == [6, 9, 10]
    done(train(workspace, "--resume", **values))
    assert checkpoints(run) == [10, 11, 12]


def test_one_kept_checkpoint_is_the_newest(workspace: Workspace) -> None:
    prepare(workspace)
    done(train(workspace, training__max_steps=3, training__save_steps=1, training__keep_checkpoints=1))
    assert checkpoints(workspace.path / "run") == [3]


def test_keep_checkpoints_removes_nothing_that_is_not_the_runs_own(workspace: Workspace) -> None:
    """Neither copies and other names, nor another run's checkpoint, nor a damaged one that someone may mend."""
    prepare(workspace)
    done(train(workspace, training__max_steps=3, training__save_steps=1, output_dir="other"))
    run = workspace.path / "run"
    assert train(workspace, stop_after=4, training__save_steps=1).code == 75
    shutil.rmtree(run / "checkpoint-1")
    shutil.copytree(workspace.path / "other" / "checkpoint-1", run / "checkpoint-1")
    (run / "checkpoint-2" / "model.safetensors").unlink()
    shutil.copytree(run / "checkpoint-3", run / "checkpoint-3.bak")
    shutil.copytree(run / "checkpoint-3", run / "checkpoint-x")
    (run / "checkpoint-0").mkdir()
    (run / "checkpoint-00").write_text("a file")
    foreign = [run / f"checkpoint-{name}" for name in ("0", "1", "2", "3.bak", "x")]
    before = files(*foreign)
    values = {"training__save_steps": 1, "training__keep_checkpoints": 1, "training__max_steps": 8}
    done(train(workspace, "--resume", **values))
    assert files(*foreign) == before
    assert (run / "checkpoint-00").read_text() == "a file"
    names = {path.name for path in run.glob("checkpoint-*")}
    assert names - {path.name for path in foreign} == {"checkpoint-00", "checkpoint-4", "checkpoint-8"}


# --- What a checkpoint is made of -------------------------------------------------------------------------------


def test_nothing_is_unpickled(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(workspace, _llama)
    done(train(workspace, output_dir="straight"))
    values = {"training__dtype": "bfloat16", "training__amp": True}
    for name, dtype in (("half", values), ("run", {})):
        done(train(workspace, training__save_steps=3, output_dir=name, **dtype))
        paths = [path for path in (workspace.path / name / "checkpoint-3").rglob("*") if path.is_file()]
        assert {path.suffix for path in paths} == {".json", ".safetensors"}

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("something is unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    done(train(workspace, "--resume", "run/checkpoint-3"))
    require_same_run(workspace, "run", "straight")
    done(train(workspace, "--resume", "half/checkpoint-3", output_dir="half", **values))


def test_the_marker_names_every_file_with_size_and_sum(workspace: Workspace) -> None:
    prepare(workspace)
    stopped(workspace, 2)
    checkpoint = workspace.path / "run" / "checkpoint-2"
    manifest = json.loads((checkpoint / "trainer_state" / "manifest.json").read_text())
    told = {str(path.relative_to(checkpoint)): path for path in checkpoint.rglob("*") if path.is_file()}
    del told["trainer_state/manifest.json"]
    assert manifest["files"] == {
        name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for name, path in told.items()
    }


# --- One run, one process ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    with (run / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def test_a_run_that_another_process_is_at_work_on_is_left_alone(workspace: Workspace) -> None:
    prepare(workspace)
    stopped(workspace, 2)
    run = workspace.path / "run"
    with _locked(run):
        before = files(run)
        for arguments in (("--resume",), ("--resume", "run"), ("--resume", "run/checkpoint-2")):
            refused(train(workspace, *arguments), f"another process is writing to {run}", "wait for that run to end")
        assert files(run) == before
        # Reading it is no harm.
        done(train(workspace, "--resume", "run", "--output-dir", "branch", training__max_steps=3))
    done(train(workspace, "--resume", training__max_steps=3))
    assert steps_of(workspace) == [1, 2, 3]


def test_a_run_keeps_its_directory_locked_while_it_trains(workspace: Workspace) -> None:
    prepare(workspace)
    attempt = (
        "import fcntl\n"
        "file = open('run/.lock', 'a')\n"
        "try:\n"
        "    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError:\n"
        "    open('locked', 'a').write('x')\n"
    )
    assert train(workspace, at_step={1: attempt}, stop_after=2).code == 75
    done(train(workspace, "--resume", at_step={1: attempt}))
    assert (workspace.path / "locked").read_text() == "xx"
    with _locked(workspace.path / "run"):
        pass


def test_help_tells_how_to_resume() -> None:
    result = run_here("pretrain", "--help")
    assert "--resume [DIR]" in result.out
