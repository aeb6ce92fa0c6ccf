"""A finished or running run -> the rows of one of its steps, with the documents they come from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from eulerforge.config.schema import PretrainPreset
from eulerforge.corpus import Corpus, CorpusCaches, make_corpus
from eulerforge.data.manifest import DAMAGE, TokenCache, open_manifest
from eulerforge.data.rows import JoinedRows, StepPlan, hash_sums, row_hash, step_hash
from eulerforge.data.sources import CorpusPart
from eulerforge.data.token_files import table_in_use, table_rows
from eulerforge.data.tokens import TokenStream
from eulerforge.errors import DataError, UsageError
from eulerforge.models.tokenizer import Tokenizer, load_tokenizer

_TABLE_COLUMNS = 5
"""Of a table of documents: start, end, id, source, line."""


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
class RunPart:
    """A part of a run's corpus, as pretrain_config.json has it.

    Attributes:
        files: of the part, as they were.
        manifest: of its token cache.
    """

    part: CorpusPart
    files: tuple[Path, ...]
    manifest: Path
    digest: str


@dataclass(frozen=True)
class RunRecord:
    """What pretrain_config.json says of a run's data."""

    preset: PretrainPreset
    parts: tuple[RunPart, ...]
    rows_per_step: int
    tokenizer: str

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Read it from a run directory.

        Raises:
            UsageError: there is none, or another version wrote it.
        """
        path = folder / "pretrain_config.json"
        try:
            config = json.loads(path.read_bytes())
            data = config["data"]
            return cls(
                PretrainPreset.model_validate(config["preset"]),
                tuple(map(_read_part, data["parts"])),
                int(data["rows_per_step"]),
                str(config["tokenizer"]["name"]),
            )
        except FileNotFoundError:
            raise UsageError(f"--run: {folder} holds no {path.name}", "give the directory of a run") from None
        except (OSError, ValueError, LookupError, TypeError):
            raise UsageError(
                f"--run: {path} cannot be read, or was written by another version", "give the directory of a run"
            ) from None


def _read_part(values: dict[str, Any]) -> RunPart:
    part = CorpusPart(values["path"], Fraction(str(values["weight"])), ())
    return RunPart(part, tuple(map(Path, values["files"])), Path(values["cache"]), values["digest"])


@dataclass(frozen=True)
class OpenedRun:
    """A run whose data can be looked at."""

    record: RunRecord
    corpus: Corpus
    tokenizer: Tokenizer

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self.record.preset.training.max_steps

    def step(self, number: int) -> ShownStep:
        """What a step (1-based) has trained on."""
        numbers = StepPlan(self.corpus.order, self.record.rows_per_step, 1, 1).rows(number - 1)
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
        return ShownRow(place, inside, self.record.parts[source].part.name, len(ids), tuple(documents))

    def _location(self, source: int, stream: TokenStream, document: int) -> str:
        try:
            file, line = stream.location(document)
        except DAMAGE as error:
            advice = "remove it with `eulerforge cache rm` and make it again with `eulerforge prepare`"
            raise DataError(f"the token cache of this run is damaged: {error}", advice) from None
        path = self.record.parts[source].files[file]
        table = table_in_use(path)
        row = [] if table is None else next(islice(table_rows(table), line - 1, line), [])
        if len(row) < _TABLE_COLUMNS:
            return f"{path}:{line}"
        name, origin, origin_line = row[2:_TABLE_COLUMNS]
        return f"{path}:{line} ({origin}:{origin_line} {name})"


def open_run(folder: Path) -> OpenedRun:
    """Open the data of a run.

    Args:
        folder: the run directory.

    Raises:
        UsageError: it is no run directory, or another version's.
        DataError: the token cache is gone, or is not the one that the run used.
    """
    record = RunRecord.read(folder)
    caches = tuple(map(_open_cache, record.parts))
    parts = [part.part for part in record.parts]
    corpus = make_corpus(record.preset, parts, CorpusCaches(caches, None), say=lambda line: None)
    name = _saved_tokenizer(folder) or record.tokenizer
    return OpenedRun(record, corpus, load_tokenizer(name, record.preset.trust_remote_code, False, False))


def _open_cache(part: RunPart) -> TokenCache:
    cache = open_manifest(part.manifest, part.files)
    if cache is None:
        raise DataError(
            f"the token cache {part.manifest} of this run is gone or damaged",
            "make it again with `eulerforge prepare` and the preset of the run (the files must be as they were)",
        )
    if cache.digest != part.digest:
        raise DataError(
            f"the token cache {part.manifest} is not as it was when the run used it", "restore the corpus"
        )
    return cache


def _saved_tokenizer(folder: Path) -> str | None:
    """The tokenizer that a run has saved."""
    for directory in (folder / "final", *sorted(folder.glob("checkpoint-*"))):
        if (directory / "tokenizer_config.json").is_file():
            return str(directory)
    return None
