"""`eulerforge prepare`: build the token cache of a preset ahead of time, without a GPU and without the model."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from eulerforge.config.load import load_preset
from eulerforge.errors import StoppedError
from eulerforge.metrics.console import Console
from eulerforge.preflight import inspect_corpus
from eulerforge.train.signals import StopWatch


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "prepare",
        help="build the token cache of a preset ahead of time",
        description="Tokenise the corpus of a preset into the token cache, so that pretrain starts at once. Needs "
        "the data and the tokenizer, no GPU and no model (unless the preset takes the tokenizer from model_dir). "
        "Killed half-way, it goes on where it stopped.",
    )
    parser.add_argument("--preset", required=True, type=Path, metavar="PATH", help="YAML preset of pretrain")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="override a key"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    with StopWatch().listening():
        try:
            return _prepare(arguments)
        except StoppedError as stop:
            cause = str(stop).removesuffix(" while the run was being set up")
            print(f"[Prepare] {cause}. Finished parts are kept: run it again to go on.", file=sys.stderr)
            return stop.exit_code


def _prepare(arguments: argparse.Namespace) -> int:
    loaded = load_preset(arguments.preset, arguments.overrides)
    files = inspect_corpus(loaded)
    preset = loaded.preset

    from eulerforge.corpus import make_corpus, open_caches, say_mixture
    from eulerforge.data.cache import Voice
    from eulerforge.metrics.progress import tokenizing
    from eulerforge.models.tokenizer import load_tokenizer

    console = Console("Prepare")
    tokenizer = load_tokenizer(files.tokenizer, preset.trust_remote_code, preset.data.add_bos, preset.data.add_eos)
    console.say(f"Tokenizer: {tokenizer.name} (vocab={tokenizer.vocab_size})")
    caches = open_caches(files, preset, tokenizer, Voice(console.say, partial(tokenizing, console)))
    corpus = make_corpus(preset, files.parts, caches, console.say)
    if len(caches.parts) > 1 and preset.training.global_batch_size is not None:
        say_mixture(corpus, files.parts, preset.training.global_batch_size * preset.training.max_steps, console.say)
    console.say("Ready: pretrain reads this cache.")
    return 0
