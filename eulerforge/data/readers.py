"""A source file -> its records, one text at a time, whatever the format.

JSON lines are UTF-8; records end at the byte `\\n` only, so U+2028 inside a string is text; one BOM at the start of
a file, CRLF and blank lines are fine. A `.txt` file is one record. A row of Parquet is one record. A text is taken as
it is, except that a lone surrogate, which JSON allows and UTF-8 does not, becomes U+FFFD.

A reader can begin in the middle: at a byte of an uncompressed file, or after a number of records of any file.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, cast

from eulerforge.data.sources import SourceFile
from eulerforge.errors import DataError

_BOM = b"\xef\xbb\xbf"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SHOWN_KEYS = 12
_SHOWN_LENGTH = 60
_BLOCK = 2**20
_PARQUET_ROWS = 1024


@dataclass
class DocumentCounts:
    """What was met while reading.

    Attributes:
        documents: texts handed out.
        empty: empty texts, dropped.
        repaired: texts in which lone surrogates were replaced.
        skipped: bad records by kind.
    """

    documents: int = 0
    empty: int = 0
    repaired: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def add(self, other: DocumentCounts) -> None:
        """Add another's numbers to these."""
        self.documents += other.documents
        self.empty += other.empty
        self.repaired += other.repaired
        for kind, number in other.skipped.items():
            self.skipped[kind] = self.skipped.get(kind, 0) + number


@dataclass(frozen=True)
class BadRecord:
    """Why a record is not usable.

    Attributes:
        kind: what counters call it.
    """

    kind: str
    what: str
    fix: str

    def error(self, place: str) -> DataError:
        """The error that stops a run, with the place (`file:line`)."""
        return DataError(f"{place}: {self.what}", self.fix)


@dataclass(frozen=True)
class Record:
    """A record of a source file.

    Attributes:
        number: 1-based line or row, counted from the start of the file or from `RecordReader.start`.
        size: bytes that it takes, uncompressed.
        text: with lone surrogates repaired (`repaired`), or why there is none.
    """

    number: int
    size: int
    text: str | BadRecord
    repaired: bool = False


class RecordReader:
    """Iterates over the records of a file; blank lines count in numbers and are no records.

    Args:
        text_column: key of the text; a literal key wins over the nested reading of `a.b`.
        start, end: JSON lines, uncompressed: only lines that begin at a byte in [start, end).
        skip: records (lines, rows) to leave out at the beginning; numbers count them.

    Raises (while iterating):
        DataError: the file cannot be read, or is damaged; whatever the policy on bad records.
    """

    def __init__(
        self, file: SourceFile, text_column: str, start: int = 0, end: int | None = None, skip: int = 0
    ) -> None:
        self._file = file
        self._column = text_column
        self._start = start
        self._end = end
        self._skip = skip
        self._raw: IO[bytes] | None = None
        self._share = 0.0
        self._read = 0
        self.lines = 0
        """Lines or rows met so far, blank and skipped ones too."""

    def __iter__(self) -> Iterator[Record]:
        path, compression = self._file.path, self._file.compression
        try:
            if self._file.format == "parquet":
                yield from self._rows()
            elif self._file.format == "text":
                yield from self._whole()
            else:
                yield from self._lines()
        except (EOFError, zlib.error, gzip.BadGzipFile, _ZstdError) as error:
            raise DataError(
                f"data.path: {path} is a damaged or cut-off {compression} file: {error}",
                "copy or download the file again",
            ) from None
        except OSError as error:
            raise DataError(
                f"data.path: {path} cannot be read: {error.strerror or error}", "check the disk and the file"
            ) from None

    @property
    def position(self) -> int:
        """Bytes of the file on disk (or of the range) that have been read."""
        if self._raw is not None and not self._raw.closed:
            return self._raw.tell() - self._start
        return self._read or int(self._share * self._file.size)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        with self._file.path.open("rb") as raw:
            self._raw = raw
            try:
                if self._file.compression == "gzip":
                    with gzip.GzipFile(fileobj=raw, mode="rb") as unpacked:
                        yield cast(IO[bytes], unpacked)
                elif self._file.compression == "zstd":
                    yield io.BufferedReader(_ZstdStream(raw), _BLOCK)
                else:
                    yield raw
            finally:
                self._read = raw.tell() - self._start
                self._raw = None

    def _lines(self) -> Iterator[Record]:
        with self._opened() as handle:
            begin = self._begin_of_line(handle)
            for number, raw in enumerate(handle, 1):
                if self._end is not None and begin >= self._end:
                    break
                line = raw.removeprefix(_BOM) if begin == 0 else raw
                begin += len(raw)
                self.lines = number
                if number > self._skip and line.strip():
                    yield _record(number, len(raw), _text_of_line(line, self._column))

    def _begin_of_line(self, handle: IO[bytes]) -> int:
        """Go to the first line that begins at `start` or later; where it begins."""
        if not self._start:
            return 0
        handle.seek(self._start - 1)
        return self._start - 1 + len(handle.readline())

    def _whole(self) -> Iterator[Record]:
        with self._opened() as handle:
            content = handle.read()
        self.lines, self._share = 1, 1.0
        if self._skip == 0:
            try:
                yield _record(1, len(content), content.removeprefix(_BOM).decode("utf-8"))
            except UnicodeDecodeError as error:
                what = f"invalid UTF-8 at byte {error.start} of the file"
                yield Record(1, len(content), BadRecord("invalid UTF-8", what, _SAVE_AS_UTF8))

    def _rows(self) -> Iterator[Record]:
        from eulerforge.data.parquet import iter_values

        for number, total, value in iter_values(self._file.path, self._column, self._skip, _PARQUET_ROWS):
            self.lines, self._share = number, number / total
            size = len(value) if isinstance(value, str) else 0
            yield _record(number, size, value if isinstance(value, BadRecord) else _string(value, self._column))


def iter_texts(
    file: SourceFile, text_column: str, on_bad_line: Literal["error", "skip"], counts: DocumentCounts
) -> Iterator[str]:
    """Every non-empty text of a file.

    Args:
        counts: filled while iterating.

    Raises:
        DataError: a bad record under `error` (with file and line), or a file that cannot be read (always).
    """
    for record in RecordReader(file, text_column):
        if isinstance(record.text, BadRecord) and on_bad_line == "error":
            raise record.text.error(f"{file.path}:{record.number}")
        if isinstance(text := count_record(record, counts), str):
            yield text


def count_record(record: Record, counts: DocumentCounts) -> str | None:
    """Count a record; its text if it has one."""
    if isinstance(record.text, BadRecord):
        counts.skipped[record.text.kind] = counts.skipped.get(record.text.kind, 0) + 1
        return None
    if not record.text:
        counts.empty += 1
        return None
    counts.documents += 1
    counts.repaired += record.repaired
    return record.text


def line_of_byte(path: Path, offset: int) -> int:
    """Number of lines that begin before a byte of an uncompressed file."""
    if not offset:
        return 0
    newlines = 0
    with path.open("rb") as handle:
        left = offset - 1
        while left and (block := handle.read(min(_BLOCK, left))):
            newlines += block.count(b"\n")
            left -= len(block)
    return newlines + 1


_SAVE_AS_UTF8 = "save the file as UTF-8, or set data.on_bad_line: skip"


def _record(number: int, size: int, text: str | BadRecord) -> Record:
    if isinstance(text, BadRecord):
        return Record(number, size, text)
    repaired = _LONE_SURROGATE.sub("\ufffd", text)
    return Record(number, size, repaired, repaired != text)


def _text_of_line(line: bytes, text_column: str) -> str | BadRecord:
    try:
        # Numbers are never looked at; as floats they cannot hit Python's limit on the digits of an integer.
        record = json.loads(line.rstrip(b"\r\n").decode("utf-8"), parse_int=float)
    except UnicodeDecodeError as error:
        return BadRecord("invalid UTF-8", f"invalid UTF-8 at byte {error.start} of the line", _SAVE_AS_UTF8)
    except json.JSONDecodeError as error:
        advice = "correct the line, or set data.on_bad_line: skip"
        if line.lstrip()[:1] in (b"[", b"{") and line.rstrip()[-1:] in (b"[", b"{", b",", b":"):
            advice = "write one object a line: jq -c '.[]' in.json > out.jsonl (without .[] for a single object)"
        return BadRecord("malformed JSON", f"malformed JSON: {error.msg} at column {error.colno}", advice)
    except RecursionError:
        advice = "remove the line, or set data.on_bad_line: skip"
        return BadRecord("nested too deeply", "JSON is nested too deeply", advice)
    if not isinstance(record, dict):
        return BadRecord(
            "not an object",
            f"the line holds {_json_type(record)}, not a JSON object",
            f'each line must look like {{"{text_column}": "..."}}; or set data.on_bad_line: skip',
        )
    value = _column(record, text_column)
    return value if isinstance(value, BadRecord) else _string(value, text_column)


def _string(value: Any, text_column: str) -> str | BadRecord:
    if isinstance(value, str):
        return value
    return BadRecord(
        "text not a string",
        f"{text_column!r} holds {_json_type(value)}, not text",
        "correct the line, set data.text_column, or set data.on_bad_line: skip",
    )


def _column(record: dict[str, Any], text_column: str) -> Any:
    if text_column in record:
        return record[text_column]
    value: Any = record
    for part in text_column.split("."):
        if not isinstance(value, dict) or part not in value:
            keys = ", ".join(repr(key[:_SHOWN_LENGTH]) for key in list(record)[:_SHOWN_KEYS]) or "none"
            more = ", ..." if len(record) > _SHOWN_KEYS else ""
            return BadRecord(
                "no text column",
                f"no key {text_column!r}; keys found: {keys}{more}",
                "set data.text_column to the key that holds the text",
            )
        value = value[part]
    return value


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


class _ZstdError(Exception):
    """A zstd file that is cut off or damaged."""


class _ZstdStream(io.RawIOBase):
    """Reads a zstd file of any number of frames. The package's own reader takes a cut-off frame for the end."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._raw = raw
        # Files written with `zstd --long=31` need a window of 2 GiB.
        self._context = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._failure = zstandard.ZstdError
        self._frame: Any = None
        self._ready = b""
        self._packed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and self._advance():
            pass
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _advance(self) -> bool:
        """Unpack some more; False at the end of the file."""
        self._packed = self._packed or self._raw.read(_BLOCK // 8)
        if not self._packed:
            if self._frame is not None:
                raise _ZstdError("the last frame is not complete")
            return False
        self._frame = self._frame or self._context.decompressobj()
        try:
            self._ready = self._frame.decompress(self._packed)
        except self._failure as error:
            raise _ZstdError(str(error)) from None
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return True
