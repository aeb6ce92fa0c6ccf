"""A run that is asked to stop ends in order, whoever is asked and when, and goes on as if nothing had happened.

The moments are certain and not timed: the model and its tokenizer wait at gates (tests/kit/models.py) until the
signal has arrived.
"""

from __future__ import annotations

import hashlib
import re
import signal
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import psutil
import pytest

from eulerforge.train.manifest import find_damage
from eulerforge.train.state import Progress
from tests.kit.commands import Workspace, run_command, run_python
from tests.kit.models import write_gated
from tests.kit.processes import Command, marked, pretrain, until

STEPS = 8
CURVE = ("step", "loss", "lr", "grad_norm", "tokens", "epoch")
TEXTS = [f"document {index} " + chr(97 + index % 26) * 40 for index in range(40)]
REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="checks signals and processes in /proc")


@pytest.fixture
def ready(workspace: Workspace) -> Workspace:
    """A workspace with the gated model (with dropout) and a corpus."""
    return _fill(workspace)


def _fill(workspace: Workspace) -> Workspace:
    write_gated(workspace.path / "model", dropout=0.1)
    workspace.jsonl("data.jsonl", TEXTS)
    return workspace


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run that nobody disturbs, by number of processes; each is made once."""
    workspace = _fill(Workspace(tmp_path_factory.mktemp("undisturbed")))

    @cache
    def make(nproc: int) -> Path:
        preset, name = str(_preset(workspace)), f"straight-{nproc}"
        command = ("pretrain", "--preset", preset, "--nproc", str(nproc), "--output-dir", name)
        done = run_command(*command, cwd=workspace.path)
        assert done.code == 0, done.err
        return workspace.path / name

    return make


def _preset(workspace: Workspace, **values: object) -> Path:
    defaults = {"trust_remote_code": True, "training__max_steps": STEPS, "training__save_steps": 5}
    return workspace.preset(**(defaults | values))


def _gates(workspace: Workspace, *places: str) -> dict[str, str]:
    """The environment of a run with these gates, all shut."""
    for path in (*workspace.path.glob("at-*"), *workspace.path.glob("go-*")):
        path.unlink()
    return {"GATES": " ".join(places), "GATE_DIR": str(workspace.path)}


def _wait_at(run: Command, workspace: Workspace, place: str, ranks: Sequence[int]) -> None:
    paths = [workspace.path / f"at-{place}-{rank}" for rank in ranks]
    run.until(lambda: all(path.exists() for path in paths), f"ranks {ranks} at {place}")


def _signals(workspace: Workspace, rank: int) -> list[str]:
    """What a rank has received, by name."""
    path = workspace.path / f"signals-{rank}"
    return [signal.Signals(number).name for number in path.read_bytes()] if path.exists() else []


def _stop_at(
    run: Command, workspace: Workspace, place: str, ranks: Sequence[int], stops: Sequence[tuple[str, int | None]]
) -> None:
    """Send signals while `ranks` are held at a gate, and open it when they have arrived.

    Args:
        stops: name of a signal and the rank that gets it; None for the parent, which passes it on to all.
    """
    _wait_at(run, workspace, place, ranks)
    for name, rank in stops:
        run.signal(signal.Signals[name], rank)
    # The kernel keeps one signal of a kind: what is sent twice may arrive once.
    expected = {(name, each) for name, rank in stops for each in (ranks if rank is None else [rank])}
    run.until(lambda: all(name in _signals(workspace, each) for name, each in expected), f"{stops} at {ranks}")
    (workspace.path / f"go-{place}").touch()


def _assert_preempted(workspace: Workspace, run: Command, step: int, reason: str) -> None:
    """Code 75, one complete checkpoint of `step` as the newest, and nothing left."""
    code = run.end()
    assert code == 75, run.out + run.err
    assert run.left() == []
    assert "Traceback" not in run.err
    assert f"after step {step}" in run.out
    assert f"checkpoint-{step} is complete. Go on with --resume." in run.out
    assert _steps_saved(workspace.path / "run")[-1] == step
    status = workspace.status()
    assert (status["status"], status["step"]) == ("preempted", step)
    assert reason in status["reason"]
    assert not (workspace.path / "run" / "final").exists()
    assert [record["step"] for record in workspace.metrics()] == list(range(1, step + 1))


def _steps_saved(run: Path) -> list[int]:
    """Steps with a checkpoint, each of them complete; no half of another is left."""
    paths = list(run.glob("checkpoint-*"))
    assert {path.name: find_damage(path, contents=True) for path in paths} == {path.name: None for path in paths}
    assert list(run.glob(".*.tmp")) == []
    steps = sorted(int(path.name.partition("-")[2]) for path in paths)
    assert [Progress.read(run / f"checkpoint-{step}").step for step in steps] == steps
    return steps


def _weights(run: Path) -> str:
    return hashlib.sha256((run / "final" / "model.safetensors").read_bytes()).hexdigest()


def _assert_same_run(workspace: Workspace, reference: Path) -> None:
    """Curve and weights, bit for bit."""
    assert workspace.status()["status"] == "finished"
    curves = [
        [[record[key] for key in CURVE] for record in workspace.metrics(str(run))] for run in ("run", reference)
    ]
    assert curves[0] == curves[1]
    assert _weights(workspace.path / "run") == _weights(reference)


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_run_that_is_stopped_again_and_again_is_never_stopped(
    ready: Workspace, undisturbed: Callable[[int], Path], nproc: int
) -> None:
    preset, ranks, last = _preset(ready), list(range(nproc)), nproc - 1
    processes = ("--nproc", str(nproc))

    # In the first step, by one rank only.
    with pretrain(preset, *processes, cwd=ready.path, **_gates(ready, "forward-1")) as run:
        _stop_at(run, ready, "forward-1", ranks, [("SIGINT", last if nproc > 1 else None)])
        _assert_preempted(ready, run, 1, "stopped by " + ("SIGINT" if nproc == 1 else "a signal to another process"))
        assert run.err == "" or nproc > 1, run.err

    # In step 3, and everybody gets several signals: the parent passes its own on, and SLURM signals every process.
    with pretrain(preset, *processes, "--resume", cwd=ready.path, **_gates(ready, "forward-2")) as run:
        _wait_at(run, ready, "forward-2", ranks)
        for process in marked(run.marker):
            process.send_signal(signal.SIGTERM)
        _stop_at(run, ready, "forward-2", ranks, [("SIGUSR1", None), ("SIGTERM", None)])
        _assert_preempted(ready, run, 3, "stopped by SIGTERM")

    # While rank 0 writes checkpoint-5, by the last rank only: that checkpoint is the stop, no step comes after it.
    with pretrain(preset, *processes, "--resume", cwd=ready.path, **_gates(ready, "save-1")) as run:
        _wait_at(run, ready, "save-1", [0])
        assert (ready.path / "run" / ".checkpoint-5.tmp").is_dir()
        run.signal(signal.SIGUSR1, last if nproc > 1 else None)
        run.until(lambda: _signals(ready, last) == ["SIGUSR1"], "the signal")
        (ready.path / "go-save-1").touch()
        _assert_preempted(ready, run, 5, "stopped by")

    # After the last checkpoint, while final/ is written: the run is finished.
    with pretrain(preset, *processes, "--resume", cwd=ready.path, **_gates(ready, "save-2")) as run:
        _wait_at(run, ready, "save-2", [0])
        assert _complete(ready.path / "run" / f"checkpoint-{STEPS}")
        run.signal(signal.SIGTERM)
        run.until(lambda: all(_signals(ready, rank) == ["SIGTERM"] for rank in ranks), "the signal")
        (ready.path / "go-save-2").touch()
        assert run.end() == 0, run.out + run.err
        assert run.left() == []
    assert _steps_saved(ready.path / "run") == [1, 3, 5, STEPS]
    _assert_same_run(ready, undisturbed(nproc))


def _complete(checkpoint: Path) -> bool:
    return find_damage(checkpoint, contents=True) is None


def test_a_stop_while_a_checkpoint_is_written_in_the_background(
    ready: Workspace, undisturbed: Callable[[int], Path]
) -> None:
    """Both are complete then: the one that was being written, and the one of the stop."""
    preset = _preset(ready, training__async_checkpoint=True)
    with pretrain(preset, cwd=ready.path, **_gates(ready, "save-1", "forward-7")) as run:
        _wait_at(run, ready, "save-1", [0])
        _stop_at(run, ready, "forward-7", [0], [("SIGTERM", None)])
        run.until(lambda: "step=7" in run.out, "the end of step 7")
        assert not (ready.path / "run" / "checkpoint-5").exists()
        (ready.path / "go-save-1").touch()
        _assert_preempted(ready, run, 7, "stopped by SIGTERM")
    assert _steps_saved(ready.path / "run") == [5, 7]
    again = run_command("pretrain", "--preset", str(preset), "--resume", cwd=ready.path)
    assert again.code == 0, again.err
    _assert_same_run(ready, undisturbed(1))


def test_a_stop_while_two_processes_evaluate(ready: Workspace, undisturbed: Callable[[int], Path]) -> None:
    """The fourth forward pass is the first of the evaluation after step 3."""
    ready.jsonl("held_out.jsonl", TEXTS[:8])
    preset = _preset(ready, data__validation={"path": "held_out.jsonl"}, training__eval_steps=3)
    with pretrain(preset, "--nproc", "2", cwd=ready.path, **_gates(ready, "forward-4")) as run:
        _stop_at(run, ready, "forward-4", [0, 1], [("SIGUSR1", 1)])
        _assert_preempted(ready, run, 3, "stopped by a signal to another process")
    assert "eval_loss" not in ready.metrics()[-1]
    again = run_command("pretrain", "--preset", str(preset), "--nproc", "2", "--resume", cwd=ready.path)
    assert again.code == 0, again.err
    assert [record["step"] for record in ready.metrics() if "eval_loss" in record] == [6, STEPS]
    _assert_same_run(ready, undisturbed(2))


def _assert_nothing_written(workspace: Workspace, run: Command) -> None:
    """Code 75, and the run has never been."""
    code = run.end()
    assert code == 75, run.out + run.err
    assert run.left() == []
    assert "Traceback" not in run.err
    assert re.search(
        r"(stopped|Stopped) by .*(while the run was being set up|before the processes had started)", run.err
    )
    assert not (workspace.path / "run").exists()
    assert not list((workspace.path / "cache").rglob("*.tmp"))


@pytest.mark.parametrize("place", ["build-1", "tokenize-1"])
def test_a_single_process_that_is_stopped_while_it_is_set_up_has_written_nothing(
    ready: Workspace, place: str
) -> None:
    preset = _preset(ready, data__cache_dir=str(ready.path / "cache"))
    with pretrain(preset, cwd=ready.path, **_gates(ready, place)) as run:
        _wait_at(run, ready, place, [0])
        run.signal(signal.SIGINT)
        _assert_nothing_written(ready, run)
        assert len(run.err.splitlines()) == 1, run.err


def test_a_stop_before_the_processes_are_started(ready: Workspace) -> None:
    preset = _preset(ready, data__cache_dir=str(ready.path / "cache"))
    with pretrain(preset, "--nproc", "2", cwd=ready.path) as run:
        run.until(run.ready, "the parent listens")
        run.signal(signal.SIGTERM)
        _assert_nothing_written(ready, run)


def test_a_stop_while_the_processes_import_torch(ready: Workspace) -> None:
    preset = _preset(ready, data__cache_dir=str(ready.path / "cache"))
    with pretrain(preset, "--nproc", "2", cwd=ready.path) as run:
        run.until(lambda: run.rank(1) is not None, "rank 1")
        run.signal(signal.SIGUSR1)
        _assert_nothing_written(ready, run)


def test_one_rank_is_stopped_while_another_prepares_the_data(ready: Workspace) -> None:
    preset = _preset(ready, data__cache_dir=str(ready.path / "cache"))
    with pretrain(preset, "--nproc", "2", cwd=ready.path, **_gates(ready, "tokenize-1")) as run:
        _wait_at(run, ready, "tokenize-1", [0])
        run.signal(signal.SIGTERM, rank=1)
        _assert_nothing_written(ready, run)


def test_a_stop_while_a_helper_builds_the_starting_weights(ready: Workspace) -> None:
    """The process that builds them for sharded ranks goes too, and so does the file."""
    preset = _preset(ready, data__cache_dir=str(ready.path / "cache"), distributed__strategy="fsdp")
    with pretrain(preset, "--nproc", "2", cwd=ready.path, **_gates(ready, "helper_build-1")) as run:
        _wait_at(run, ready, "helper_build-1", [0])
        run.signal(signal.SIGINT)
        _assert_nothing_written(ready, run)


@pytest.mark.parametrize("place", ["exit-1", "teardown-1"])
def test_a_signal_at_the_very_end_does_not_spoil_a_finished_run(ready: Workspace, place: str) -> None:
    """All is done, Python clears up (if it does): the exit code is that of a finished run."""
    gates = _gates(ready, place)
    with pretrain(_preset(ready), cwd=ready.path, **gates) as run:
        until(
            lambda: (ready.path / f"at-{place}-0").exists() or run.process.poll() is not None,
            "the end of the program",
        )
        run.signal(signal.SIGTERM)
        (ready.path / f"go-{place}").touch()
        assert run.end() == 0, run.err
    assert ready.status()["status"] == "finished"


def test_max_minutes_stops_two_processes_at_one_step(ready: Workspace) -> None:
    """However slow the machine is: where the time was over before training began, it is tried with more of it."""
    minutes = 0.15
    while True:
        preset = _preset(
            ready, training__max_steps=1_000_000, training__save_steps=1_000_000, training__max_minutes=minutes
        )
        with pretrain(preset, "--nproc", "2", cwd=ready.path) as run:
            assert run.end() == 75, run.out + run.err
            assert run.left() == []
            out, err = run.out, run.err
        if (ready.path / "run").exists():
            break
        assert "stopped by training.max_minutes while the run was being set up" in err
        assert minutes < 2
        minutes *= 2
    step = ready.status()["step"]
    assert step > 0
    assert ready.status() == {"status": "preempted", "step": step, "reason": "stopped by training.max_minutes"}
    assert f"Stopped by training.max_minutes after step {step}" in out
    assert _steps_saved(ready.path / "run") == [step]


def test_torchrun_by_hand_and_a_signal_to_one_worker(ready: Workspace, undisturbed: Callable[[int], Path]) -> None:
    preset = str(_preset(ready))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = (*torchrun, "-m", "eulerforge", "pretrain", "--preset", preset)
    gates = _gates(ready, "forward-3")
    with Command.start(*command, cwd=ready.path, OMP_NUM_THREADS="1", **gates) as run:
        _stop_at(run, ready, "forward-3", [0, 1], [("SIGTERM", 1)])
        assert run.end() in (0, 1)  # torchrun's own; it passes no code on
        until(lambda: not [each for each in marked(run.marker) if _is_worker(each)], "the end of the workers")
    assert _steps_saved(ready.path / "run") == [3]
    assert ready.status()["status"] == "preempted"
    again = run_command("pretrain", "--preset", preset, "--nproc", "2", "--resume", cwd=ready.path)
    assert again.code == 0, again.err
    _assert_same_run(ready, undisturbed(2))


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "RANK" in process.environ()
    except psutil.Error:
        return False


@pytest.mark.parametrize(("kind", "count"), [("kills", 4), ("signals", 3)])
def test_random_moments(workspace: Workspace, kind: str, count: int) -> None:
    """A little of `make chaos`."""
    arguments = ("-m", "tests.chaos", kind, "--count", str(count), "--size", "small", "--seed", "1")
    done = run_python(*arguments, cwd=workspace.path, timeout=900, PYTHONPATH=str(REPOSITORY))
    assert done.code == 0, done.out + done.err
    assert done.out.splitlines()[-1].endswith("no violation")
