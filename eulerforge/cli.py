"""The `eulerforge` command. The only file that knows both packages; imports no torch and no transformers itself.

argv -> preset -> preflight -> launch plan -> worker
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import yaml

from eulerforge import __version__, quickstart
from eulerforge.commands import cache, prepare, show, tokenizer
from eulerforge.config.checks import check_replicas, grad_accum_steps
from eulerforge.config.load import load_preset
from eulerforge.config.schema import json_schema
from eulerforge.errors import EulerForgeError, PeerFailedError, StoppedError, TrainingError, UsageError
from eulerforge.files import shown_path
from eulerforge.metrics.console import Console
from eulerforge.preflight import Preflight, corpus_name, inspect
from eulerforge.train.signals import STOP_SIGNALS, StopWatch
from launch import torchrun
from launch.devices import LaunchError, visible_gpus
from launch.outcome import worker_status, write_outcome
from launch.plan import TORCHRUN_VARIABLES, LaunchPlan, LaunchRequest, resolve_plan


class _Parser(argparse.ArgumentParser):
    """argparse whose errors look like all other errors."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"see `{self.prog} --help`", see=f"{self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code (0 done, 1 failed, 2 wrong input, 75 stopped in order)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A log in an ASCII locale must not end a run because of an arrow in a line.
            stream.reconfigure(errors="replace")
    try:
        arguments = _parser().parse_args(argv)
        code: int = arguments.run(arguments)
    except EulerForgeError as error:
        return _fail(error.exit_code, error.render(), secondary=isinstance(error, PeerFailedError))
    except StoppedError as stop:
        return _stop(stop)
    except KeyboardInterrupt:
        return _fail(1, "Interrupted.", secondary=True)
    except Exception as error:
        if not _is_worker():
            raise
        return _fail(1, traceback.format_exc(), secondary=bool(_COMMUNICATION.search(repr(error))))
    if _is_worker():
        write_outcome(code, "", secondary=False)
        _leave(code)
    return code


def command() -> NoReturn:
    """The command: `main`, then the end of the process."""
    code = main()
    # Python puts the default back in place of handlers, and then takes some 100 ms to clear up: a signal in that time
    # would turn the end of a finished or saved run into a death by signal. What is ignored stays ignored.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


_COMMUNICATION = re.compile(r"Dist\w*Error|gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|timed out", re.I)
"""Errors that a rank meets because another one is gone; the launcher shows them only if nothing better is known."""


def _fail(code: int, message: str, *, secondary: bool) -> int:
    """Report an error once: to the launcher if it started this process, else on stderr."""
    if _is_worker():
        if not write_outcome(code, message, secondary=secondary):
            rank = os.environ["RANK"]
            print(message if rank == "0" else f"[rank {rank}] {message}", file=sys.stderr)
        _leave(code)
    print(message, file=sys.stderr)
    return code


def _stop(stop: StoppedError) -> int:
    """End in order on a signal."""
    message = "" if stop.agreed else f"[Pretrain] {stop}. Nothing is lost: run it again, with --resume or without."
    if not _is_worker():
        if message:
            print(message, file=sys.stderr)
        return stop.exit_code
    if not write_outcome(stop.exit_code, message, secondary=False) and message and _is_main():
        print(message, file=sys.stderr)
    # Where the processes have not agreed, torchrun must take this for a failure and end the others.
    return _leave(stop.exit_code, agreed=stop.agreed)


def _leave(code: int, *, agreed: bool = True) -> NoReturn:
    """End a worker without handlers and destructors: those of a process group could wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(worker_status(code) if agreed else code)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="eulerforge", description="Pretrain freshly assembled Hugging Face causal language models from scratch."
    )
    parser.add_argument("--version", action="version", version=f"eulerforge {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    _add_pretrain(commands)
    prepare.add(commands)
    cache.add(commands)
    tokenizer.add(commands)
    show.add(commands)
    _add_export(commands)
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


def _add_pretrain(commands: argparse._SubParsersAction[_Parser]) -> None:
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
        "--resume",
        nargs="?",
        const="",
        metavar="DIR",
        help="go on from the newest complete checkpoint of the run directory, or from DIR (a run or a checkpoint-N)",
    )
    pretrain.add_argument(
        "--validate-only", action="store_true", help="check preset, model directory, tokenizer and data, then stop"
    )
    pretrain.add_argument(
        "--dry-run", action="store_true", help="print launch plan, resolved preset and torchrun line, then stop"
    )
    processes = pretrain.add_argument_group("processes")
    processes.add_argument(
        "--nproc", type=int, metavar="N", help="processes on this machine (default: as the device)"
    )
    processes.add_argument("--nnodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    processes.add_argument("--node-rank", type=int, metavar="R", help="number of this machine, from 0")
    processes.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where machines meet: on the one with rank 0")
    pretrain.set_defaults(run=_pretrain)


def _add_export(commands: argparse._SubParsersAction[_Parser]) -> None:
    export = commands.add_parser(
        "export",
        help="write a Hugging Face directory from a checkpoint",
        description="Write a Hugging Face directory from a checkpoint-N, a final/ or the newest complete checkpoint "
        "of a run directory, and verify it by loading it with plain transformers in a new process.",
    )
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint-N, final/ or a run directory")
    export.add_argument("--output", required=True, type=Path, metavar="DIR", help="directory to write, new or empty")
    export.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: as in the checkpoint")
    export.add_argument(
        "--trust-remote-code", action="store_true", help="allow the checkpoint's own Python code to run"
    )
    export.set_defaults(run=_export)


def _pretrain(arguments: argparse.Namespace) -> int:
    with StopWatch().listening() as watch:
        return _pretrain_until(arguments, watch)


def _pretrain_until(arguments: argparse.Namespace, watch: StopWatch) -> int:
    console = _console()
    loaded = load_preset(arguments.preset, _overrides(arguments))
    # On other nodes the run directory may have been begun by rank 0 when they come to look at it.
    flight = inspect(loaded, arguments.resume, owns_output=_is_main() and not arguments.node_rank)
    if arguments.validate_only:
        _announce(flight, console)
        _rehearse(flight, arguments, console)
        return 0
    plan = _plan(flight, arguments)
    if arguments.dry_run:
        _describe(plan, flight, arguments)
        return 0
    done, steps = flight.run_plan.finished_step(), flight.preset.training.max_steps
    if done is not None and done >= steps:
        console.say(f"The run in {flight.run_plan.output_dir} has finished: step {done} of {steps}. Nothing to do.")
        return 0
    if plan.mode == "torchrun":
        for line in (*map("Warning: {}".format, plan.warnings), *plan.reasons):
            console.say(line)
        with _launch_errors():
            return torchrun.run(plan, _worker_arguments(arguments))
    _train(flight, plan, console, watch)
    return 0


def _is_worker() -> bool:
    """Whether torchrun started this process."""
    return all(name in os.environ for name in TORCHRUN_VARIABLES)


def _is_main() -> bool:
    return not _is_worker() or os.environ["RANK"] == "0"


def _console() -> Console:
    return Console("Pretrain", enabled=_is_main())


def _plan(flight: Preflight, arguments: argparse.Namespace) -> LaunchPlan:
    """Where and with how many processes; the batch must divide by them."""
    preset = flight.preset
    nproc = preset.distributed.nproc_per_node
    request = LaunchRequest(
        preset.device,
        nproc=arguments.nproc if arguments.nproc is not None else None if nproc == "auto" else nproc,
        nnodes=arguments.nnodes,
        node_rank=arguments.node_rank,
        rdzv_endpoint=arguments.rdzv_endpoint,
    )
    with _launch_errors():
        plan = resolve_plan(request, () if preset.device == "cpu" else visible_gpus(), os.environ)
    grad_accum_steps(preset, plan.world_size)
    check_replicas(preset, plan.world_size)
    return plan


@contextlib.contextmanager
def _launch_errors() -> Iterator[None]:
    try:
        yield
    except LaunchError as error:
        raise UsageError(str(error), error.fix, see="docs/distributed.md") from None


def _worker_arguments(arguments: argparse.Namespace) -> list[str]:
    """The command line of a worker: this one, without what only the launcher needs."""
    overrides = [part for override in _overrides(arguments) for part in ("--set", override)]
    resume = [] if arguments.resume is None else ["--resume", *filter(None, [arguments.resume])]
    return ["pretrain", "--preset", str(arguments.preset), *overrides, *resume]


def _describe(plan: LaunchPlan, flight: Preflight, arguments: argparse.Namespace) -> None:
    """What --dry-run prints."""
    for line in (*map("Warning: {}".format, plan.warnings), *plan.reasons, f"precision: {flight.precision.reason}"):
        print(line)
    print("\nResolved preset:")
    print(yaml.safe_dump(flight.preset.model_dump(mode="json"), sort_keys=False), end="")
    print("\nCommand:")
    worker = _worker_arguments(arguments)
    print(torchrun.shown_command(plan, worker) if plan.mode == "torchrun" else shlex.join(["eulerforge", *worker]))


def _overrides(arguments: argparse.Namespace) -> list[str]:
    extra = [] if arguments.output_dir is None else [f"output_dir={json.dumps(arguments.output_dir)}"]
    return [*arguments.overrides, *extra]


def _announce(flight: Preflight, console: Console) -> None:
    console.say("Config validation passed.")
    console.say(f"model_dir: {flight.directory.path}")
    console.say(f"data.path: {corpus_name(flight.preset)}")
    console.say(f"training.max_steps: {flight.preset.training.max_steps}")
    for hint in flight.hints:
        console.say(hint.line())


def _rehearse(flight: Preflight, arguments: argparse.Namespace, console: Console) -> None:
    """Precision, strategy and memory of the training, from the model without weights."""
    wanted = flight.preset.device
    try:
        plan = _plan(flight, arguments)
        device, world_size, nproc = plan.device, plan.world_size, plan.nproc
        # A login node without GPUs is not where it will run.
        if plan.device == "cpu" and wanted != "cpu":
            device = "cuda"
    except UsageError as error:
        console.warn(f"not on this machine: {error}; what follows is for one process")
        device, world_size, nproc = wanted, 1, 1
    console.say(f"Device: {wanted}")

    from eulerforge.rehearsal import rehearse

    rehearse(flight, device, world_size, nproc, console)


def _train(flight: Preflight, plan: LaunchPlan, console: Console, watch: StopWatch) -> Path:
    if flight.preset.training.max_minutes is not None:
        watch.set_timer(flight.preset.training.max_minutes)
    _announce(flight, console)
    for warning in plan.warnings:
        console.warn(warning)
    console.say(f"Device: {plan.shown}")

    from eulerforge.loading import LaunchDecisions
    from eulerforge.worker import pretrain

    return pretrain(flight, LaunchDecisions(plan.device, plan.world_size, plan.reasons), console, watch)


def _export(arguments: argparse.Namespace) -> int:
    from eulerforge.train.convert import ExportRequest, export_checkpoint

    request = ExportRequest(
        arguments.checkpoint.expanduser().absolute(),
        arguments.output.expanduser().absolute(),
        arguments.dtype,
        arguments.trust_remote_code,
    )
    export_checkpoint(request, Console("Export").say)
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    print(json.dumps(json_schema(), indent=2))
    return 0


def _quickstart(arguments: argparse.Namespace) -> int:
    console = Console("Quickstart")
    presets = quickstart.shipped_presets()
    overrides = [f"model_dir={json.dumps(str(presets / 'models' / 'tiny_hybrid'))}", *_overrides(arguments)]
    loaded = load_preset(presets / "pretrain" / "quickstart.yml", overrides)
    quickstart.prepare(Path(str(loaded.preset.data.path)), Path(str(loaded.preset.tokenizer)), console.say)
    flight = inspect(loaded)
    device = flight.preset.device
    with _launch_errors():
        plan = resolve_plan(LaunchRequest(device, nproc=1), () if device == "cpu" else visible_gpus(), os.environ)
    with StopWatch().listening() as watch:
        run = _train(flight, plan, _console(), watch)
    # A new process shows that final/ needs nothing of this one.
    sample = subprocess.run(
        [sys.executable, "-m", "eulerforge.quickstart", str(run / "final")],
        check=False,
        capture_output=True,
        text=True,
    )
    if sample.returncode:
        print(sample.stderr, file=sys.stderr, end="")
        raise TrainingError(f"{run / 'final'} could not be loaded in a new process", "see the traceback above")
    console.say("Sample from final/, loaded by plain transformers in a new process:")
    for line in sample.stdout.splitlines():
        console.say(f"  {line}")
    console.say(f"Curves: {shown_path(Path(sys.executable).parent / 'tensorboard')} --logdir {shown_path(run)}")
    return 0


if __name__ == "__main__":
    command()
