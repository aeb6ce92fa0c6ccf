"""Running the command line from tests: in this process where speed matters, in a new one where isolation does."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Result:
    """Outcome of a command."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Workspace:
    """A working directory with helpers. Presets start from `preset()`'s minimum and change what the test is about."""

    path: Path

    def jsonl(self, name: str, texts: list[Any], key: str = "text") -> Path:
        """Write one object per text."""
        return self.raw(name, "".join(json.dumps({key: text}) + "\n" for text in texts).encode())

    def raw(self, name: str, content: bytes) -> Path:
        """Write bytes."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def preset(self, **values: Any) -> Path:
        """Write a preset. Dotted keys reach into sections (`training__lr=...` is written `training.lr`)."""
        tree: dict[str, Any] = {
            "device": "cpu",
            "model_dir": str(self.path / "model"),
            "data": {"path": str(self.path / "data.jsonl"), "max_length": 16},
            "training": {"max_steps": 3, "log_steps": 1, "dtype": "float32", "amp": False, "lr": 1e-2},
            "output_dir": str(self.path / "run"),
        }
        for key, value in values.items():
            node = tree
            *sections, leaf = key.split("__")
            for section in sections:
                node = node.setdefault(section, {})
            if value is ...:
                node.pop(leaf)
            else:
                node[leaf] = value
        path = self.path / "preset.yml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def pretrain(self, *arguments: str, **values: Any) -> Result:
        """Write a preset from `values` and run `eulerforge pretrain` on it in this process."""
        return run_here("pretrain", "--preset", str(self.preset(**values)), *arguments)

    def metrics(self, run: str = "run") -> list[dict[str, Any]]:
        """The records of metrics.jsonl, read as strict JSON."""

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        lines = (self.path / run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line, parse_constant=refuse) for line in lines]

    def status(self, run: str = "run") -> dict[str, Any]:
        """status.json."""
        return json.loads((self.path / run / "status.json").read_text())


def run_here(*arguments: str) -> Result:
    """`eulerforge ARGUMENTS` in this process."""
    from eulerforge.cli import main

    out, err = io.StringIO(), io.StringIO()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGALRM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as stop:  # --help, --version
            code = int(stop.code or 0)
        finally:  # the command leaves its own in place, because it ends
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Result(code, out.getvalue(), err.getvalue())


def run_command(*arguments: str, cwd: Path, timeout: float = 300, **environment: str) -> Result:
    """`eulerforge ARGUMENTS` as a user starts it: a new process, no input."""
    return run_python("-m", "eulerforge", *arguments, cwd=cwd, timeout=timeout, **environment)


def run_python(*arguments: str, cwd: Path, timeout: float = 300, **environment: str) -> Result:
    """`python ARGUMENTS` in a new process."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)
