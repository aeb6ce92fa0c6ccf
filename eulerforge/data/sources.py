"""Files on disk -> raw documents, one text at a time.

A source file is JSONL: one JSON object per line, UTF-8, plain or gzip (told by magic bytes, not by name). Records end
at the byte `\\n` only, so U+2028 inside a string is text; one BOM at the start of a file, CRLF and blank lines are
fine. A text is taken as it is, except that a lone surrogate, which JSON allows and UTF-8 does not, becomes U+FFFD.
"""

from __future__ import annotations

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, cast

from eulerforge.config.paths import expand_path
from eulerforge.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
"""Names that count when `data.path` is a directory."""

_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_BOM = b"\xef\xbb\xbf"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SHOWN_KEYS = 12


@dataclass
class DocumentCounts:
    """What was met while reading.

    Attributes:
        documents: texts handed out.
        empty: empty texts, dropped.
        repaired: texts in which lone surrogates were replaced.
        skipped: bad lines by kind (only under `on_bad_line: skip`).
    """

    documents: int = 0
    empty: int = 0
    repaired: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


class _BadLine(Exception):
    """A line that is not a usable record. `kind` is what counters call it."""

    def __init__(self, kind: str, what: str, fix: str) -> None:
        super().__init__(what)
        self.kind, self.fix = kind, fix


def resolve_files(path: str, key: str = "data.path") -> tuple[Path, ...]:
    """The files that a path of the preset means, absolute and in a fixed order.

    Args:
        path: a file, a directory (searched recursively for `SUFFIXES`) or a glob.
        key: what the preset calls it, for messages.

    Raises:
        DataError: nothing there, an empty file, or a format that cannot be read.
    """
    given = expand_path(path, key, DataError)
    if given.is_dir():
        # Formats that cannot be read yet are listed too, so that they are refused and not left out without a word.
        names = (*SUFFIXES, ".zst", ".parquet")
        files = sorted(file for file in given.rglob("*") if file.is_file() and file.name.lower().endswith(names))
        if not files:
            raise DataError(
                f"{key}: the directory {given} holds no {', '.join(SUFFIXES[:3])} file (plain or .gz)",
                f"point {key} at a JSONL file or a directory that holds some",
            )
    elif given.exists() or not glob.has_magic(path):
        files = [given]
    else:
        files = sorted(Path(name) for name in glob.glob(str(given), recursive=True))  # noqa: PTH207
        files = [file for file in files if file.is_file()]
        if not files:
            raise DataError(f"{key}: the glob {path} matches no file", "correct the pattern or the directory")
    for file in files:
        _check_readable(file, key)
    return tuple(file.absolute() for file in files)


def _check_readable(path: Path, key: str) -> None:
    if path.exists() and not path.is_file():
        # A pipe can be read once only, and opening one may wait for ever.
        raise DataError(f"{key}: {path} is not a regular file (a pipe or device)", "give a JSONL file on disk")
    try:
        with path.open("rb") as handle:
            head = handle.read(4)
    except FileNotFoundError:
        raise DataError(f"{key}: {path} does not exist", f"set {key} to an existing JSONL file") from None
    except OSError as error:
        raise DataError(f"{key}: {path} cannot be read: {error.strerror}", "check the file's permissions") from None
    if not head:
        raise DataError(f"{key}: {path} is empty", "give a file with at least one JSON line")
    for magic, name in ((_ZSTD, "zstd"), (_PARQUET, "Parquet")):
        if head.startswith(magic):
            raise DataError(
                f"{key}: {path} is a {name} file, which this version cannot read",
                "convert it to JSONL (plain or gzip)",
            )


def iter_documents(
    files: Sequence[Path], text_column: str, on_bad_line: Literal["error", "skip"], counts: DocumentCounts
) -> Iterator[str]:
    """Yield every non-empty text, file by file, line by line.

    Args:
        files: as given by `resolve_files`.
        text_column: key of the text; a literal key wins over the nested reading of `a.b`.
        on_bad_line: stop at a bad line, or count it in `counts.skipped`.
        counts: filled while iterating.

    Raises:
        DataError: a bad line under `error` (with file and line), or a damaged gzip file (always).
    """
    for path in files:
        for number, line in _iter_lines(path):
            try:
                text = _text_of(line, text_column)
            except _BadLine as bad:
                if on_bad_line == "error":
                    raise DataError(f"{path}:{number}: {bad}", bad.fix) from None
                counts.skipped[bad.kind] = counts.skipped.get(bad.kind, 0) + 1
                continue
            if not text:
                counts.empty += 1
                continue
            repaired = _LONE_SURROGATE.sub("\ufffd", text)
            counts.repaired += repaired != text
            counts.documents += 1
            yield repaired


def _iter_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(1-based number, content) of every line that is not blank."""
    try:
        with _open(path) as handle:
            for number, raw in enumerate(handle, 1):
                line = raw.removeprefix(_BOM) if number == 1 else raw
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"data.path: {path} is a damaged or cut-off gzip file: {error}", "copy or download the file again"
        ) from None
    except OSError as error:
        raise DataError(
            f"data.path: {path} cannot be read: {error.strerror}", "check the disk and the file"
        ) from None


def _open(path: Path) -> IO[bytes]:
    handle = path.open("rb")
    if handle.peek(2)[:2] == _GZIP:
        handle.close()
        return cast(IO[bytes], gzip.open(path, "rb"))
    return handle


def _text_of(line: bytes, text_column: str) -> str:
    try:
        # Numbers are never looked at; as floats they cannot hit Python's limit on the digits of an integer.
        record = json.loads(line.rstrip(b"\r\n").decode("utf-8"), parse_int=float)
    except UnicodeDecodeError as error:
        raise _BadLine(
            "invalid UTF-8", f"invalid UTF-8 at byte {error.start} of the line", "save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise _BadLine(
            "malformed JSON",
            f"malformed JSON: {error.msg} at column {error.colno}",
            "correct the line, or set data.on_bad_line: skip",
        ) from None
    except RecursionError:
        raise _BadLine(
            "nested too deeply", "JSON is nested too deeply", "remove the line, or set data.on_bad_line: skip"
        ) from None
    if not isinstance(record, dict):
        raise _BadLine(
            "not an object",
            f"the line holds {_json_type(record)}, not a JSON object",
            f'each line must look like {{"{text_column}": "..."}}; or set data.on_bad_line: skip',
        )
    text = _column(record, text_column)
    if not isinstance(text, str):
        raise _BadLine(
            "text not a string",
            f"{text_column!r} holds {_json_type(text)}, not text",
            "correct the line, set data.text_column, or set data.on_bad_line: skip",
        )
    return text


def _column(record: dict[str, Any], text_column: str) -> Any:
    if text_column in record:
        return record[text_column]
    value: Any = record
    for part in text_column.split("."):
        if not isinstance(value, dict) or part not in value:
            keys = ", ".join(map(repr, list(record)[:_SHOWN_KEYS])) or "none"
            more = ", ..." if len(record) > _SHOWN_KEYS else ""
            raise _BadLine(
                "no text column",
                f"no key {text_column!r}; keys found: {keys}{more}",
                "set data.text_column to the key that holds the text",
            )
        value = value[part]
    return value


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
