"""The `eulerforge` command. The only file that knows both packages; imports no torch and no transformers itself.

argv -> preset -> preflight -> launch plan -> worker
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from eulerforge import __version__, quickstart
from eulerforge.config.load import load_preset
from eulerforge.config.schema import json_schema
from eulerforge.errors import EulerForgeError, UsageError
from eulerforge.files import shown_path
from eulerforge.metrics.console import Console
from eulerforge.preflight import Preflight, inspect


class _Parser(argparse.ArgumentParser):
    """argparse whose errors look like all other errors."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"see `{self.prog} --help`", see=f"{self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code (0 done, 1 failed, 2 wrong input)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A log in an ASCII locale must not end a run because of an arrow in a line.
            stream.reconfigure(errors="replace")
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
    except EulerForgeError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="eulerforge", description="Pretrain freshly assembled Hugging Face causal language models from scratch."
    )
    parser.add_argument("--version", action="version", version=f"eulerforge {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    pretrain = commands.add_parser(
        "pretrain",
        help="train all parameters of a model on raw text",
        description="Train all parameters of a Hugging Face causal LM on raw text, as one YAML preset says.",
    )
    pretrain.add_argument("--preset", required=True, type=Path, metavar="PATH", help="YAML preset")
    pretrain.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a preset value, for example --set training.lr=1e-4 (may be repeated)",
    )
    pretrain.add_argument("--output-dir", metavar="DIR", help="run directory (same as --set output_dir=DIR)")
    pretrain.add_argument(
        "--validate-only", action="store_true", help="check preset, model directory, tokenizer and data, then stop"
    )
    pretrain.set_defaults(run=_pretrain)

    schema = commands.add_parser("schema", help="print the JSON Schema of a pretrain preset")
    schema.set_defaults(run=_schema)

    demo = commands.add_parser(
        "quickstart",
        help="train the shipped tiny hybrid on this Python's own documentation, then let it write",
        description="Make a corpus from the standard library's documentation and a tokenizer from that corpus, "
        "pretrain presets/models/tiny_hybrid on them, and generate a sample from final/.",
    )
    demo.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    demo.add_argument("--output-dir", metavar="DIR", help="run directory (default: outputs/pretrain_<time>)")
    demo.set_defaults(run=_quickstart)
    return parser


def _pretrain(arguments: argparse.Namespace) -> None:
    console = Console("Pretrain")
    flight = inspect(load_preset(arguments.preset, _overrides(arguments)))
    if arguments.validate_only:
        _announce(flight, console)
        console.say(f"Device: {flight.preset.device}")
    else:
        _train(flight, console)


def _overrides(arguments: argparse.Namespace) -> list[str]:
    extra = [] if arguments.output_dir is None else [f"output_dir={json.dumps(arguments.output_dir)}"]
    return [*arguments.overrides, *extra]


def _announce(flight: Preflight, console: Console) -> None:
    console.say("Config validation passed.")
    console.say(f"model_dir: {flight.directory.path}")
    console.say(f"data.path: {flight.preset.data.path}")
    console.say(f"training.max_steps: {flight.preset.training.max_steps}")
    for hint in flight.hints:
        console.say(hint.line())
    plan = flight.precision
    console.say(f"Precision: stored {plan.stored}, compute {plan.compute}, saved {plan.saved} ({plan.reason})")
    for warning in plan.warnings:
        console.warn(warning)


def _train(flight: Preflight, console: Console) -> Path:
    _announce(flight, console)
    from launch.devices import LaunchError, visible_gpus
    from launch.plan import resolve_plan

    device = flight.preset.device
    try:
        plan = resolve_plan(device, () if device == "cpu" else visible_gpus(), os.environ)
    except LaunchError as error:
        raise UsageError(str(error), error.fix, see="docs/preset.md") from None
    for warning in plan.device.warnings:
        console.warn(warning)
    console.say(f"Device: {plan.device.shown}")

    from eulerforge.worker import LaunchDecisions, pretrain

    return pretrain(flight, LaunchDecisions(plan.device.device, plan.reasons), console)


def _schema(arguments: argparse.Namespace) -> None:
    print(json.dumps(json_schema(), indent=2))


def _quickstart(arguments: argparse.Namespace) -> None:
    console = Console("Quickstart")
    presets = quickstart.shipped_presets()
    overrides = [f"model_dir={json.dumps(str(presets / 'models' / 'tiny_hybrid'))}", *_overrides(arguments)]
    loaded = load_preset(presets / "pretrain" / "quickstart.yml", overrides)
    quickstart.prepare(Path(str(loaded.preset.data.path)), Path(str(loaded.preset.tokenizer)), console.say)
    run = _train(inspect(loaded), Console("Pretrain"))
    # A new process shows that final/ needs nothing of this one.
    sample = subprocess.run(
        [sys.executable, "-m", "eulerforge.quickstart", str(run / "final")],
        check=True,
        capture_output=True,
        text=True,
    )
    console.say("Sample from final/, loaded by plain transformers in a new process:")
    for line in sample.stdout.splitlines():
        console.say(f"  {line}")
    console.say(f"Curves: {shown_path(Path(sys.executable).parent / 'tensorboard')} --logdir {shown_path(run)}")


if __name__ == "__main__":
    sys.exit(main())
