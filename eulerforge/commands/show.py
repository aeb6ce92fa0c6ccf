"""`eulerforge data show`: the documents and the text that a step of a run has trained on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eulerforge.config.paths import expand_path
from eulerforge.errors import DataError, UsageError

if TYPE_CHECKING:
    from eulerforge.inspection import ShownStep

_SHOWN_CHARACTERS = 200


def add(commands: Any) -> None:
    """Add the command's parsers."""
    parser = commands.add_parser("data", help="look at the data of a run")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    show = actions.add_parser(
        "show",
        help="the documents and the text that a step trained on",
        description="For each row of a step: its documents (file and line) and its decoded text. Needs the token "
        "cache that the run used.",
    )
    show.add_argument("--run", required=True, metavar="DIR", dest="folder", help="run directory")
    show.add_argument("--step", required=True, type=int, metavar="N", help="1 to max_steps")
    show.add_argument("--full", action="store_true", help=f"all text, not {_SHOWN_CHARACTERS} characters a document")
    show.add_argument("--json", action="store_true", help="one JSON object a row")
    show.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    folder = expand_path(arguments.folder, "--run", UsageError)

    from eulerforge.inspection import open_run

    opened = open_run(folder)
    if not 1 <= arguments.step <= opened.steps:
        raise UsageError(
            f"--step {arguments.step} is not a step of this run", f"give a step from 1 to {opened.steps}"
        )
    step = opened.step(arguments.step)
    if arguments.json:
        for row in step.rows:
            print(json.dumps(row.record(), ensure_ascii=False))
    else:
        for line in _lines(step, arguments.full):
            print(line)
    recorded = _recorded_hash(folder, arguments.step)
    if recorded is not None and recorded != step.data_hash:
        raise DataError(
            f"step {arguments.step}: these tokens have the hash {step.data_hash}, metrics.jsonl says {recorded}",
            "the run directory holds parts of different runs; do not trust it",
        )
    if not arguments.json:
        told = "as in metrics.jsonl" if recorded else "not logged in metrics.jsonl"
        print(f"data_hash {step.data_hash} ({told})")
    return 0


def _recorded_hash(folder: Path, step: int) -> str | None:
    path = folder / "metrics.jsonl"
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:  # a line that a killed run has not finished
            continue
        if record.get("step") == step:
            return record.get("data_hash")
    return None


def _lines(step: ShownStep, full: bool) -> Iterator[str]:
    for row in step.rows:
        yield f"row {row.place}: chunk {row.row} of {row.source}, {row.tokens} tokens"
        for document in row.documents:
            note = "" if document.from_start else " (goes on)"
            text = document.text
            if not full and len(text) > _SHOWN_CHARACTERS:
                text = f"{text[:_SHOWN_CHARACTERS]}..."
            shown = json.dumps(text, ensure_ascii=False)
            yield f"  {document.location}{note}, tokens {document.first} to {document.last}: {shown}"
