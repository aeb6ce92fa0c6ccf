"""`eulerforge tokenizer`: train a byte-level BPE tokenizer on a corpus."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eulerforge.config.paths import expand_path, require_writable
from eulerforge.data.readers import DocumentCounts, iter_texts
from eulerforge.data.sources import SourceFile, resolve_corpus
from eulerforge.errors import DataError, OutputError, UsageError
from eulerforge.files import shown_path
from eulerforge.metrics.console import Console

_SMALLEST = 257


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "tokenizer",
        help="train a byte-level BPE tokenizer on a corpus",
        description="Train a byte-level BPE tokenizer with one special token (end and beginning of text, id 0) and "
        "save it as a Hugging Face tokenizer directory, for the preset key `tokenizer`.",
    )
    parser.add_argument(
        "--data", required=True, action="append", metavar="PATH", help="as data.path; may be given several times"
    )
    parser.add_argument("--vocab-size", required=True, type=int, metavar="N", help="entries, at least 257")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write, new or empty")
    parser.add_argument("--text-column", default="text", metavar="KEY", help="key of the text (default: text)")
    parser.add_argument("--on-bad-line", choices=("error", "skip"), default="error")
    parser.add_argument("--eos", default="<|endoftext|>", metavar="TEXT", help="name of the end-of-text token")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if arguments.vocab_size < _SMALLEST:
        raise UsageError(
            f"--vocab-size {arguments.vocab_size} is too small: the 256 bytes and {arguments.eos} take {_SMALLEST}",
            f"give {_SMALLEST} or more; 32000 is usual for one language",
        )
    if not arguments.eos.strip():
        raise UsageError("--eos is empty", "name the end-of-text token, for example <|endoftext|>")
    output = expand_path(arguments.output, "--output", OutputError)
    _require_new(output)
    (part,) = resolve_corpus(arguments.data, "--data")
    if any(file.holds_tokens for file in part.files):
        raise DataError("--data: token ids hold no text to learn from", "give text: JSON lines, .txt or Parquet")

    from eulerforge.data.bpe import train_tokenizer

    console = Console("Tokenizer")
    plural = "s" if len(part.files) > 1 else ""
    console.say(f"Learning {arguments.vocab_size} entries from {len(part.files)} file{plural}")
    counts = DocumentCounts()
    texts = _Texts(part.files, arguments.text_column, arguments.on_bad_line, counts)
    entries = train_tokenizer(texts, output, arguments.vocab_size, arguments.eos)
    console.say(f"Read {counts.documents:,} texts, {texts.characters:,} characters")
    for kind, number in counts.skipped.items():
        console.say(f"Skipped {number} lines: {kind}")
    if entries < arguments.vocab_size:
        console.warn(f"the text holds only {entries} entries; give more text for {arguments.vocab_size}")
    console.say(f"Tokenizer with {entries} entries written to {shown_path(output)}")
    return 0


class _Texts:
    """The texts of files; an error while they are read reaches the command, whatever library asks for them."""

    def __init__(self, files: Sequence[SourceFile], column: str, on_bad_line: Any, counts: DocumentCounts) -> None:
        self._files, self._column, self._on_bad_line, self._counts = files, column, on_bad_line, counts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for file in self._files:
            for text in iter_texts(file, self._column, self._on_bad_line, self._counts):
                self.characters += len(text)
                yield text
        if not self._counts.documents:
            raise DataError("--data: there is no text to learn from", "give files with non-empty texts")


def _require_new(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"--output: {output} exists and is not an empty directory", "give a new directory")
    require_writable(output, "--output", OutputError)
