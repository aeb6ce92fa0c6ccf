"""Kills and signals at random moments: nothing is lost, nobody is left, and the end is that of an undisturbed run.

    python -m tests.chaos kills --count 40 --seed 0
    python -m tests.chaos signals --count 20

One line for each event and a verdict at the end; the exit code is 1 if anything was not as it should be. The folder
of a run that went wrong is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open

from eulerforge.train.manifest import find_damage
from launch.processes import ready_for_signals
from tests.kit.commands import Workspace
from tests.kit.models import write_llama
from tests.kit.processes import PATIENCE, Command, marked, pretrain, until
from tests.kit.tokenizers import write_byte_tokenizer

KEEP = 3
CURVE = ("step", "loss", "lr", "grad_norm", "tokens", "epoch")
SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    # 12.6 million parameters: 50 MB of weights and 100 MB of optimiser state in a checkpoint.
    "large": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4},
}
DELAY = {"small": 0.06, "large": 0.3}
"""Random seconds from the moment that was waited for to the event, at most."""

GONE_SECONDS = 30.0
"""How long the rest of a killed run may take to go."""

TEXTS = [f"document {index} " + chr(97 + index % 26) * 40 for index in range(40)]


@dataclass
class Arena:
    """Where the runs of one invocation lie, and what they have in common."""

    folder: Path
    size: str
    steps: int
    strategy: str
    chance: random.Random
    start_seconds: float = 5.0
    runs: int = 0
    violations: list[str] = field(default_factory=list)
    preset: Path = field(init=False)

    def __post_init__(self) -> None:
        workspace = Workspace(self.folder)
        workspace.jsonl("data.jsonl", TEXTS)
        # Dropout, so that random numbers have to go on too.
        write_llama(self.folder / "model", **SIZES[self.size], attention_dropout=0.1)
        write_byte_tokenizer(self.folder / "model")
        self.preset = workspace.preset(
            training__max_steps=self.steps,
            training__save_steps=2,
            training__keep_checkpoints=KEEP,
            distributed__strategy=self.strategy,
            output_dir=...,
        )

    def new_run(self) -> Path:
        """A run directory that does not exist yet."""
        self.runs += 1
        return self.folder / f"run-{self.runs}"

    def start(self, run: Path, nproc: int, *arguments: str) -> contextlib.AbstractContextManager[Command]:
        """`eulerforge pretrain --resume` on a run directory."""
        return pretrain(
            self.preset, "--output-dir", str(run), "--nproc", str(nproc), "--resume", *arguments,
            cwd=self.folder,
            XDG_CACHE_HOME=str(self.folder / "caches"),
            HF_HUB_OFFLINE="1",
        )  # fmt: skip

    def undisturbed(self, nproc: int) -> Path:
        """The run that all others must equal in the end."""
        run = self.folder / f"undisturbed-{nproc}"
        began = time.monotonic()
        with self.start(run, nproc) as command:
            command.until(lambda: bool(command.steps()), "the first step")
            self.start_seconds = time.monotonic() - began
            code = command.end(60.0 * PATIENCE)
            assert code == 0, command.err
        say(
            f"undisturbed, {nproc} process(es): {self.steps} steps in {time.monotonic() - began:.0f} s, "
            f"the first after {self.start_seconds:.1f} s"
        )
        return run

    def finish(self, run: Path, nproc: int) -> None:
        """Let a run come to its end, and compare it with the undisturbed one."""
        if not is_finished(run):
            before = newest(run)
            with self.start(run, nproc) as command:
                code = command.end(60.0 * PATIENCE)
                assert code == 0, f"exit code {code} of the last start: {command.err}"
                check_beginning(command, before)
                assert command.left() == [], command.left()
        reference = self.folder / f"undisturbed-{nproc}"
        assert is_finished(run), f"status {read_status(run)}"
        complete = complete_steps(run)
        assert complete[-1] == self.steps, f"checkpoints {complete}"
        assert len(complete) <= KEEP + 1, f"checkpoints {complete}"
        assert [path.name for path in run.glob(".*")] == [".lock"], [path.name for path in run.glob(".*")]
        curves = [[[record[key] for key in CURVE] for record in read_metrics(each)] for each in (run, reference)]
        assert [values[0] for values in curves[0]] == list(range(1, self.steps + 1)), "steps of metrics.jsonl"
        differing = [left[0] for left, right in zip(*curves, strict=True) if left != right]
        assert not differing, f"metrics differ from those of the undisturbed run at steps {differing}"
        for place in ("final", f"checkpoint-{self.steps}/trainer_state/shards"):
            tensors, expected = tensors_in(run / place), tensors_in(reference / place)
            assert tensors, f"no tensors in {place}"
            assert tensors == expected, f"{place} differs from that of the undisturbed run"
        say(f"{run.name}: finished, equal to the undisturbed run of {nproc} process(es)")
        shutil.rmtree(run)

    @contextlib.contextmanager
    def watching(self, what: str) -> Any:
        """Note what goes wrong inside, and go on."""
        try:
            yield
        except (AssertionError, subprocess.TimeoutExpired) as error:
            self.violations.append(f"{what}: {error}")
            say(f"VIOLATION at {what}: {error}")

    def verdict(self, events: int, kind: str) -> int:
        """Say it; the exit code."""
        if self.violations:
            say(f"{kind}: {events} events, {len(self.violations)} VIOLATIONS; see {self.folder}")
            return 1
        shutil.rmtree(self.folder)
        say(f"{kind}: {events} events, no violation")
        return 0


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def tensors_in(folder: Path) -> dict[str, str]:
    """Name -> hash of each tensor. Not of the files: safetensors writes its header's entries in any order."""
    sums = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                content = file.get_tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy()
                sums[f"{path.name} {name}"] = hashlib.sha256(memoryview(content)).hexdigest()
    return sums


def read_status(run: Path) -> dict[str, Any]:
    """status.json; empty where there is none."""
    path = run / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def is_finished(run: Path) -> bool:
    """Whether the run says so."""
    return read_status(run).get("status") == "finished"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Complete lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def complete_steps(run: Path) -> list[int]:
    """Steps with a checkpoint. What has the name of one is complete, and none is set aside."""
    paths = list(run.glob("checkpoint-*"))
    for path in paths:
        damage = find_damage(path, contents=True)
        assert damage is None, f"{path.name} is not complete: {damage}"
        assert path.name.removeprefix("checkpoint-").isdigit(), path.name
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in paths)


def newest(run: Path) -> int:
    """Step of the newest complete checkpoint, 0 for none."""
    return max(complete_steps(run), default=0)


def check_beginning(command: Command, before: int) -> None:
    """A start, as far as it came, has gone on from the newest checkpoint that was there."""
    resumed = [line for line in command.out.splitlines() if "Resuming from" in line]
    assert all(f"/checkpoint-{before} (step {before} of" in line for line in resumed), f"not {before}: {resumed}"
    assert not (before and "starting from the beginning" in command.out), f"checkpoint-{before} was not used"
    steps = command.steps()
    assert not steps or steps[0] == before + 1, f"first step {steps[0]} after checkpoint-{before}"
    assert steps == list(range(before + 1, before + 1 + len(steps))), f"steps {steps}"


def check_state(run: Path, before: int) -> list[int]:
    """A run directory after its processes are gone: nothing that was complete is lost, no step is logged twice."""
    complete = complete_steps(run) if run.exists() else []
    assert max(complete, default=0) >= before, f"checkpoint-{before} was lost, there are {complete}"
    assert len(complete) <= KEEP + 2, f"{len(complete)} checkpoints: {complete}"
    logged = [record["step"] for record in read_metrics(run)]
    assert logged == list(range(1, len(logged) + 1)), f"logged steps {logged}"
    assert len(logged) >= max(complete, default=0), f"{len(logged)} logged steps, checkpoints {complete}"
    return complete


class Moments:
    """Waiting for a random moment in the life of a started command."""

    def __init__(self, arena: Arena, command: Command, run: Path) -> None:
        self._arena, self._command, self._run = arena, command, run
        self.shown = ""

    def wait(self) -> bool:
        """False if the command ended before."""
        chance, arena = self._arena.chance, self._arena
        kind = chance.choices(("start", "steps", "save"), (1, 2, 3))[0]
        delay = chance.uniform(0, DELAY[arena.size])
        if kind == "start":
            delay = chance.uniform(0, 1.2 * arena.start_seconds)
            self.shown = f"{1000 * delay:.0f} ms after the start"
        elif kind == "steps":
            number = chance.randint(1, 3)
            self.shown = f"step {number} of this start + {1000 * delay:.0f} ms"
            if not self._reached(lambda: len(self._command.steps()) >= number):
                return False
        else:
            number = chance.randint(1, 2)
            self.shown = f"save {number} of this start + {1000 * delay:.0f} ms"
            seen: set[str] = set()

            def saving() -> bool:
                # What an earlier kill has left is not looked at: it is removed before training starts.
                if "Starting training" in self._command.out:
                    seen.update(path.name for path in self._run.glob(".checkpoint-*.tmp"))
                return len(seen) >= number

            if not self._reached(saving):
                return False
        return not self._reached(lambda: False, delay)

    def _reached(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait for a condition, or for a time, or for the end of the command.

        Returns:
            whether the condition was met; with a time, whether the command ended within it.
        """
        deadline = time.monotonic() + (PATIENCE if seconds is None else seconds)
        while time.monotonic() < deadline:
            if condition():
                return True
            if self._command.process.poll() is not None:
                return seconds is not None
            time.sleep(0.002)
        assert seconds is not None, f"waited {PATIENCE:g} s for {self.shown}"
        return False


def kill_something(arena: Arena, command: Command) -> tuple[str, str]:
    """Kill a random part of a running command; what it was, and what the parent must say about it."""
    victim = arena.chance.choice(("rank 0", "rank 1", "agent", "parent", "job", "job"))
    process: psutil.Process | None = None
    if victim.startswith("rank"):
        process = command.rank(int(victim[-1]))
    elif victim == "agent":
        process = command.agent()
    if process is not None:
        process.kill()
        name = victim if victim != "agent" else "torchrun"
        return victim, f"{name} (pid {process.pid}) was killed by SIGKILL"
    if victim == "parent":
        command.process.kill()
        return victim, ""
    for each in marked(command.marker):  # also where the one to be killed is not there yet
        with contextlib.suppress(psutil.Error):
            each.kill()
    command.process.kill()
    return "job", ""


def kills(arena: Arena, count: int) -> int:
    """SIGKILL again and again; each start goes on from the newest complete checkpoint."""
    arena.undisturbed(2)
    run, number = arena.new_run(), 0
    while number < count:
        before = newest(run)
        what = f"kill {number + 1}"
        arguments = ("--set", f"training.async_checkpoint={arena.chance.choice(('true', 'false'))}")
        failed = len(arena.violations)
        with arena.watching(what), arena.start(run, 2, *arguments) as command:
            moment = Moments(arena, command, run)
            if moment.wait():
                number += 1
                victim, message = kill_something(arena, command)
                began = time.monotonic()
                code = command.end(GONE_SECONDS)
                until(lambda: not marked(command.marker), f"the end of all processes, {victim} killed", GONE_SECONDS)
                took = time.monotonic() - began
                check_beginning(command, before)
                complete = check_state(run, before)
                say(
                    f"{what}: {victim}, {moment.shown}: exit {code}, gone after {took:.1f} s, "
                    f"checkpoints {before} -> {complete}{', a save half done' if list(run.glob('.*.tmp')) else ''}"
                )
                expected = 1 if message else -signal.SIGKILL
                assert code == expected, f"exit code {code} instead of {expected}: {command.err}"
                assert message in command.err, f"{message!r} is missing: {command.err}"
            else:
                assert command.end() == 0, f"ended by itself: {command.err}"
                say(f"{run.name} has come to its end before the kill ({moment.shown})")
                arena.finish(run, 2)
                run = arena.new_run()
        if len(arena.violations) > failed:
            run = arena.new_run()
    with arena.watching("a kill while final/ is written"):
        _kill_at_final(arena, run)
    with arena.watching("the end"):
        arena.finish(run, 2)
    return arena.verdict(count + 1, "kills")


def _kill_at_final(arena: Arena, run: Path) -> None:
    """The whole job goes while it writes final/ (if that is not too quick to be seen)."""
    before, final = newest(run), run / ".final.tmp"
    with arena.start(run, 2) as command:
        command.until(lambda: arena.steps - 1 in command.steps(), "the last step but one", 60.0 * PATIENCE)
        doomed = [command.process.pid, *(process.pid for process in marked(command.marker))]
        while not final.exists() and command.process.poll() is None:
            time.sleep(0.001)
        for pid in doomed:
            with contextlib.suppress(psutil.Error):
                psutil.Process(pid).kill()
        code = command.end()
        until(lambda: not marked(command.marker), "the end of all processes", GONE_SECONDS)
        complete = check_state(run, before)
        state = "not begun" if not (run / "final").exists() and not final.exists() else "there"
        state = "half written" if final.exists() else state
        say(f"killed at the end: exit {code}, checkpoints {before} -> {complete}, final {state}")
        check_beginning(command, before)
        assert complete[-1] == arena.steps, f"checkpoints {complete}"


@dataclass(frozen=True)
class Listing:
    """Names, sizes and times of all files in a run directory."""

    files: frozenset[tuple[str, int, int]]

    @classmethod
    def of(cls, run: Path) -> Listing:
        """As it is now; without the lock, which every start opens."""
        paths = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
        return cls(frozenset((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths))


EARLY = ("while the run was being set up", "before the processes had started")


def signals(arena: Arena, count: int) -> int:
    """Stop signals; each start goes on from where the last one was stopped."""
    runs = {}
    for nproc in (1, 2):
        arena.undisturbed(nproc)
        runs[nproc] = arena.new_run()
    number = 0
    while number < count:
        nproc = arena.chance.choice((1, 2, 2))
        what, failed = f"signal {number + 1}", len(arena.violations)
        with arena.watching(what):
            number += _signal_once(arena, runs[nproc], nproc, what)
            if is_finished(runs[nproc]):
                arena.finish(runs[nproc], nproc)
                runs[nproc] = arena.new_run()
        if len(arena.violations) > failed:
            number += 1
            runs[nproc] = arena.new_run()
    for nproc, run in runs.items():
        with arena.watching(f"the end of {run.name}"):
            arena.finish(run, nproc)
    return arena.verdict(count, "signals")


def _signal_once(arena: Arena, run: Path, nproc: int, what: str) -> int:
    """One start and its stop; 0 if the run came to its end before the signal, else 1."""
    chance = arena.chance
    before, files = newest(run), Listing.of(run)
    names = [chance.choice(("SIGTERM", "SIGINT", "SIGUSR1"))]
    names += [chance.choice(("SIGTERM", "SIGINT", "SIGUSR1"))] if chance.random() < 0.3 else []
    rank = chance.choice((None, 0, 1)) if nproc == 2 else None
    with arena.start(run, nproc) as command:
        moment = Moments(arena, command, run)
        if not moment.wait() or not (listening := _is_listening(command, rank)):
            if command.process.poll() is not None:
                assert command.end() == 0, f"ended by itself: {command.err}"
                say(f"{run.name} has come to its end before the signal ({moment.shown})")
                return 0
            listening = False
        for position, name in enumerate(names):
            if position:
                time.sleep(chance.uniform(0, DELAY[arena.size]))
            with contextlib.suppress(psutil.Error):
                target = psutil.Process(command.process.pid) if rank is None else command.rank(rank)
                if target is not None:
                    target.send_signal(signal.Signals[name])
        began = time.monotonic()
        code = command.end()
        target_shown = f"of {nproc} to " + ("the parent" if rank is None else f"rank {rank}")
        complete = check_state(run, before)
        say(
            f"{what}: {'+'.join(names)} {target_shown}, {moment.shown}: exit {code} after "
            f"{time.monotonic() - began:.1f} s, checkpoints {before} -> {complete}"
        )
        assert command.left() == [], f"left: {command.left()}"
        check_beginning(command, before)
        if not listening and code not in (0, 75):
            # Python had not come so far as to hear it: the run was not begun.
            assert Listing.of(run) == files, "the run directory has changed"
        elif code == 75 and any(text in command.err for text in EARLY):
            assert Listing.of(run) == files, "the run directory has changed"
        elif code == 75:
            step, status = max(complete, default=0), read_status(run)
            assert step > before, f"no step was made after checkpoint-{before}"
            assert (status["status"], status["step"]) == ("preempted", step), f"{status}, checkpoints {complete}"
            assert status["reason"].startswith("stopped by "), status
            assert read_metrics(run)[-1]["step"] == step, "metrics.jsonl does not end with the checkpoint's step"
            assert not list(run.glob(".*.tmp")), "an unfinished save is left"
        else:
            assert code == 0, f"exit code {code}: {command.err}"
            assert is_finished(run), f"exit code 0, {read_status(run)}"
    return 1


def _is_listening(command: Command, rank: int | None) -> bool:
    """Whether the one that gets the signal can hear it. A rank is waited for: nobody signals what is not there."""
    if rank is None:
        return command.ready()

    def heard_or_over() -> bool:
        process = command.rank(rank)
        return command.process.poll() is not None or (process is not None and ready_for_signals(process.pid))

    until(heard_or_over, f"rank {rank} listens")
    return command.process.poll() is None


def main() -> int:
    """Parse the command line and go."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("kind", choices=("kills", "signals"))
    parser.add_argument("--count", type=int, default=20, help="number of events")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of moments; times are the machine's")
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp", help="of two processes")
    parser.add_argument("--size", choices=tuple(SIZES), default="large", help="of the model")
    arguments = parser.parse_args()
    # An exception, so that what was started is ended too: it has a session of its own.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    kind, count = arguments.kind, arguments.count
    steps = (3 if kind == "kills" else 2) * count + 8
    folder = Path(tempfile.mkdtemp(prefix=f"eulerforge-chaos-{kind}-"))
    say(f"{kind}: count {count}, seed {arguments.seed}, {arguments.strategy}, {arguments.size} model, in {folder}")
    arena = Arena(folder, arguments.size, steps, arguments.strategy, random.Random(arguments.seed))
    return kills(arena, count) if kind == "kills" else signals(arena, count)


if __name__ == "__main__":
    sys.exit(main())
