"""A finished or running run -> the rows of one of its steps, with the documents they come from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from eulerforge.config.schema import PretrainPreset
from eulerforge.corpus import Corpus, CorpusCaches, make_corpus
from eulerforge.data.manifest import TokenCache, open_manifest
from eulerforge.data.rows import JoinedRows, StepPlan, hash_sums, row_hash, step_hash
from eulerforge.data.sources import CorpusPart
from eulerforge.data.token_files import index_of, table
from eulerforge.data.tokens import TokenStream
from eulerforge.errors import DataError, UsageError
from eulerforge.models.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class DocumentPart:
    """The part of a document that lies in a row.

    Attributes:
        location: `file:line`; for token files with a table, also the source that the table names.
        from_start: whether the row has the document's first token.
        first, last: its tokens in the row, 0-based, `last` included.
    """

    location: str
    from_start: bool
    first: int
    last: int
    text: str


@dataclass(frozen=True)
class ShownRow:
    """A row of a step.

    Attributes:
        place: in the step, 0-based, counted over all processes and micro-batches.
        row: number of the row among those of its source.
        source: the part of the corpus, as the preset names it.
        tokens: their number.
    """

    place: int
    row: int
    source: str
    tokens: int
    documents: tuple[DocumentPart, ...]

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class ShownStep:
    """The rows of a step and the hash of their ids."""

    rows: tuple[ShownRow, ...]
    data_hash: str


@dataclass(frozen=True)
class OpenedRun:
    """A run whose data can be looked at."""

    preset: PretrainPreset
    parts: tuple[CorpusPart, ...]
    files: tuple[tuple[Path, ...], ...]
    corpus: Corpus
    tokenizer: Tokenizer
    rows_per_step: int

    def step(self, number: int) -> ShownStep:
        """What a step (1-based) has trained on."""
        numbers = StepPlan(self.corpus.order, self.rows_per_step, 1, 1).rows(number - 1)
        hashes = [row_hash(place, self.corpus.rows[row]) for place, row in enumerate(numbers)]
        rows = tuple(self._row(place, row) for place, row in enumerate(numbers))
        return ShownStep(rows, step_hash(*hash_sums(hashes)))

    def _row(self, place: int, row: int) -> ShownRow:
        rows = self.corpus.rows
        source, inside = rows.place(row) if isinstance(rows, JoinedRows) else (0, row)
        start, ids = rows.position(row), rows[row]
        borders = [0, *sorted(set(rows.borders(row))), len(ids)]
        stream = self.corpus.caches[source].stream
        documents = []
        for first, end in pairwise(borders):
            document = stream.document_at(start + first)
            documents.append(
                DocumentPart(
                    self._location(source, stream, document),
                    stream.document_start(document) == start + first,
                    first,
                    end - 1,
                    self.tokenizer.decode(ids[first:end].tolist()),
                )
            )
        return ShownRow(place, inside, self.parts[source].name, len(ids), tuple(documents))

    def _location(self, source: int, stream: TokenStream, document: int) -> str:
        try:
            file, line = stream.location(document)
        except (OSError, ValueError, LookupError, TypeError) as error:
            advice = "remove it with `eulerforge cache rm` and make it again with `eulerforge prepare`"
            raise DataError(f"the token cache of this run is damaged: {error}", advice) from None
        path = self.files[source][file]
        index = index_of(path)
        if index is None or not index.is_file():
            return f"{path}:{line}"
        _, _, name, origin, row = next(islice(table(index), line - 1, line))
        return f"{path}:{line} ({origin}:{row} {name})".rstrip()


def open_run(folder: Path, config: dict[str, Any]) -> OpenedRun:
    """Open the data of a run.

    Args:
        folder: the run directory.
        config: its pretrain_config.json.

    Raises:
        UsageError: the config is another version's.
        DataError: the token cache is gone, or is not the one that the run used.
    """
    try:
        preset = PretrainPreset.model_validate(config["preset"])
    except ValidationError as error:
        raise UsageError(
            f"--run: the preset in {folder / 'pretrain_config.json'} was written by another version "
            f"({error.error_count()} keys differ)",
            "use the version that trained the run",
        ) from None
    data = config["data"]
    caches = tuple(_open_cache(part) for part in data["parts"])
    parts = tuple(CorpusPart(part["path"], _weight(part), ()) for part in data["parts"])
    files = tuple(tuple(Path(file) for file in part["files"]) for part in data["parts"])
    corpus = make_corpus(preset, parts, CorpusCaches(caches, None), say=lambda line: None)
    tokenizer = load_tokenizer(_tokenizer_of(folder, config), preset.trust_remote_code, False, False)
    return OpenedRun(preset, parts, files, corpus, tokenizer, data["rows_per_step"])


def _weight(part: dict[str, Any]) -> Fraction:
    return Fraction(str(part["weight"]))


def _open_cache(part: dict[str, Any]) -> TokenCache:
    manifest = Path(part["cache"])
    cache = open_manifest(manifest, [Path(file) for file in part["files"]])
    if cache is None:
        raise DataError(
            f"the token cache {manifest} of this run is gone or damaged",
            "make it again with `eulerforge prepare` and the preset of the run (the files must be as they were)",
        )
    if cache.digest != part["digest"]:
        raise DataError(f"the token cache {manifest} is not as it was when the run used it", "restore the corpus")
    return cache


def _tokenizer_of(folder: Path, config: dict[str, Any]) -> str:
    """The tokenizer that the run has saved, else the one that it was given."""
    saved = [folder / "final", *sorted(folder.glob("checkpoint-*"))]
    for directory in saved:
        if (directory / "tokenizer_config.json").is_file():
            return str(directory)
    return str(config["tokenizer"]["name"])
