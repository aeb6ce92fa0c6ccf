"""Golden resume: stopping after any step and going on gives the numbers and weights of a run that was never stopped.

Bit for bit, with dropout, accumulation, buffers that training changes and parameters that get no gradient; stops lie
in the middle and at the end of epochs.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.kit.commands import Workspace, run_python
from tests.kit.models import write_custom
from tests.kit.tokenizers import write_byte_tokenizer

STEPS = 12
ACCUMULATION = 2
STEPS_PER_EPOCH = 4
CURVE = ("step", "loss", "lr", "grad_norm", "tokens", "epoch")


def _prepare(workspace: Workspace, world_size: int) -> str:
    """A preset whose epochs are exactly STEPS_PER_EPOCH steps."""
    write_byte_tokenizer(workspace.path / "tokenizer")
    write_custom(workspace.path / "model", "stateful", random_scale=True)
    rows = STEPS_PER_EPOCH * ACCUMULATION * world_size
    # A document of 31 bytes and its EOS fill two rows of 16.
    workspace.jsonl("data.jsonl", [f"{index:04d} " + chr(97 + index % 26) * 26 for index in range(rows // 2)])
    preset = workspace.preset(
        tokenizer=str(workspace.path / "tokenizer"),
        trust_remote_code=True,
        output_dir=...,
        training__max_steps=STEPS,
        training__batch_size=1,
        training__grad_accum_steps=ACCUMULATION,
        training__warmup_steps=3,
        training__save_steps=100,
    )
    return str(preset)


def weights_hash(run: Path) -> str:
    """Hash of the final weights."""
    return hashlib.sha256((run / "final" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(("nproc", "strategy"), [(2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")])
def test_stopped_after_any_step_is_never_stopped(workspace: Workspace, nproc: int, strategy: str) -> None:
    preset = _prepare(workspace, nproc)
    stops = range(1, STEPS) if nproc == 2 else (5,)
    done = run_python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc),
        "-m", "tests.kit.golden", preset, "runs", str(ACCUMULATION), ",".join(map(str, stops)), strategy,
        cwd=workspace.path,
        PYTHONPATH=str(Path(__file__).parents[2]),
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.code == 0, done.err[-6000:] + done.out[-2000:]
    straight = workspace.metrics("runs/straight")
    assert [record["step"] for record in straight] == list(range(1, STEPS + 1))
    assert straight[-1]["epoch"] == STEPS / STEPS_PER_EPOCH
    for step in stops:
        run = f"runs/stopped-{step}"
        curve = [[record[key] for key in CURVE] for record in workspace.metrics(run)]
        assert curve == [[record[key] for key in CURVE] for record in straight], f"stopped after step {step}"
        assert weights_hash(workspace.path / run) == weights_hash(workspace.path / "runs/straight"), step
        assert workspace.status(run)["status"] == "finished"
