"""The corpus of oddities: whatever a data file may look like, and exactly which token ids the model is then given.

One row each. A row of `READ` has the ids that the model must be called with, in order, all of them, and the exact
counts; a row of `REFUSED` has the error, with file and line, and nothing may be left behind. The model writes down
what it is called with; the tokenizer's id of a byte is that byte, and `E` ends a document.
"""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from tokenizers import Tokenizer, processors

from tests.kit.commands import Workspace
from tests.kit.models import VOCAB, write_custom
from tests.kit.tokenizers import EOS as E
from tests.kit.tokenizers import byte_ids, write_byte_tokenizer

BOM = b"\xef\xbb\xbf"
B = 257
"""BOS of the tokenizers that have one."""

Files = Mapping[str, bytes]
Keys = Mapping[str, Any]

SKIP: Keys = {"data__on_bad_line": "skip"}


# --- Writing files ----------------------------------------------------------------------------------------------


def _json(*texts: Any, key: str = "text") -> bytes:
    """One object a line, in ASCII."""
    return b"".join(json.dumps({key: text}).encode() + b"\n" for text in texts)


def _lines(*lines: bytes | str) -> bytes:
    """Lines as they are; `str` is encoded as UTF-8."""
    return b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)


def _parquet(columns: Mapping[str, Any], **options: Any) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), sink, **options)
    return sink.getvalue()


def _npy(ids: Sequence[float], dtype: str = "<u2", shape: tuple[int, ...] = (-1,)) -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.array(ids, dtype=dtype).reshape(shape))
    return sink.getvalue()


def _flat(ids: Sequence[int], dtype: str = "<u2") -> bytes:
    return np.array(ids, dtype=dtype).tobytes()


def _table(*lengths: int) -> bytes:
    """The documents of a file of `dolma tokens`: start, end, id, source, line."""
    ends = list(accumulate(lengths))
    rows = zip([0, *ends], ends, strict=False)
    return gzip.compress(
        "".join(f"{start},{end},{number},a.jsonl.gz,{number}\n" for number, (start, end) in enumerate(rows)).encode()
    )


def _zstd(content: bytes) -> bytes:
    return zstandard.compress(content)


SKIPPABLE = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"
"""A zstd frame without content."""

LONG = _json(*(f"document {number} {number * 7919 % 10007}" for number in range(200)))
"""Too long to survive being cut when compressed."""


def _stream(*texts: str) -> tuple[int, ...]:
    """The ids of these documents, each with its end."""
    return tuple(token for text in texts for token in (*byte_ids(text), E))


# --- The tables -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """A project with one odd thing.

    Attributes:
        name: the test's id.
        files: names below the working directory, and contents.
        path: `data.path`; the first file's name if None.
        keys: further keys of the preset, as `Workspace.preset` takes them.
        tokenizer: options of `write_byte_tokenizer`, and `eos_by_itself`.
        model: further keys of the model's config.json.
    """

    name: str
    files: Files
    path: Any = None
    keys: Keys = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Read(Corpus):
    """A corpus that can be read.

    Attributes:
        stream: all ids of the corpus.
        documents, empty, repaired, skipped: the counts.
        notes: what follows `Data notes: ` in the log; None if there must be no such line.
        max_length: of a row; None for one that divides the stream, so that every id is seen.
        batch: rows a step.
        steps: of the run; None for one pass.
        said: further lines of the log.
        final: what final/config.json must hold.
    """

    stream: tuple[int, ...] = ()
    documents: int = 0
    empty: int = 0
    repaired: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    notes: str | None = None
    max_length: int | None = None
    batch: int = 1
    steps: int | None = None
    said: tuple[str, ...] = ()
    final: Mapping[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of a row."""
        total = len(self.stream)
        if self.max_length is not None:
            return self.max_length
        return next((length for length in range(16, 1, -1) if total % length == 0), total)


@dataclass(frozen=True)
class Refused(Corpus):
    """A corpus that must be refused.

    Attributes:
        error: what the `Error:` line must hold.
        fix: what the `Fix:` line must hold.
        code: the model, a key of `tests.kit.models.CODE`.
    """

    error: tuple[str, ...] = ()
    fix: str = ""
    code: str = "probe"


def _read(name: str, content: bytes | Files, *texts: str, stream: Sequence[int] | None = None, **more: Any) -> Read:
    """A corpus of these documents; `stream` where their ids are not what `_stream` says."""
    files = content if isinstance(content, Mapping) else {"data.jsonl": content}
    ids = _stream(*texts) if stream is None else tuple(stream)
    return Read(name, files, stream=ids, **{"documents": len(texts), **more})


def _refused(name: str, content: bytes | Files, *error: str, fix: str = "", **more: Any) -> Refused:
    files = content if isinstance(content, Mapping) else {"data.jsonl": content}
    return Refused(name, files, error=error, fix=fix, **more)


# --- Lines ------------------------------------------------------------------------------------------------------

READ_LINES = [
    _read("three plain lines", _json("one", "two", "three"), "one", "two", "three"),
    _read("BOM", BOM + _json("one", "two"), "one", "two"),
    _read(
        "BOM in the first of two files",
        {"a.jsonl": BOM + _json("one"), "b.jsonl": _json("two")},
        "one",
        "two",
        path=["a.jsonl", "b.jsonl"],
    ),
    _read(
        "BOM in the second of two files",
        {"a.jsonl": _json("one"), "b.jsonl": BOM + _json("two")},
        "one",
        "two",
        path=["a.jsonl", "b.jsonl"],
    ),
    _read("BOM inside gzip", gzip.compress(BOM + _json("one", "two")), "one", "two"),
    _read("BOM before a blank line", BOM + b"\n" + _json("one"), "one"),
    _read("BOM inside a text is text", _lines('{"text": "\ufeffone"}'), "\ufeffone"),
    _read(
        "line separators inside a text, raw",
        _lines('{"text": "a\u2028b\u2029c\u0085d"}', '{"text": "two"}'),
        "a\u2028b\u2029c\u0085d",
        "two",
    ),
    _read(
        "line separators and control characters, escaped",
        _lines(r'{"text": "a\u2028b\u2029c\u0085d\u000be\u000cf\u001cg\u0000h\ni\rj"}'),
        "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x00h\ni\rj",
    ),
    _read("CRLF", b'{"text": "one"}\r\n{"text": "two"}\r\n', "one", "two"),
    _read("blank lines", _lines("", '{"text": "one"}', " \t", "\r", '{"text": "two"}', ""), "one", "two"),
    _read("no line end at the end", b'{"text": "one"}\n{"text": "two"}', "one", "two"),
    _read("spaces around objects", _lines('  {"text" : "one"}\t', ' { "text":"two" } '), "one", "two"),
    _read("spaces of a text are kept", _json("  one \n\n", "\n", " "), "  one \n\n", "\n", " "),
    _read("same key twice, the last one counts", _lines('{"text": "WRONG", "text": "right"}'), "right"),
    _read("characters of one to four bytes", _lines('{"text": "aé€😀"}'), "aé€😀"),
    _read(
        "last line cut off, skipped",
        _json("one", "two", "three")[:-5],
        "one",
        "two",
        keys=SKIP,
        skipped={"malformed JSON": 1},
        notes="1 skipped, malformed JSON",
    ),
    _read(
        "lines that are no objects, skipped",
        _lines('"abc"', '{"text": "one"}', "[1]", "5", "null", "true", '{"text": "two"}'),
        "one",
        "two",
        keys=SKIP,
        skipped={"not an object": 5},
        notes="5 skipped, not an object",
    ),
    _read(
        "objects without the text, skipped",
        _lines("{}", '{"content": "x"}', '{"text": "one"}', '{"Text": "x"}'),
        "one",
        keys=SKIP,
        skipped={"no text column": 3},
        notes="3 skipped, no text column",
    ),
    _read(
        "texts that are no strings, skipped",
        _json("one", None, 5, 0.5, ["a"], {"a": "b"}, True, "", "two"),
        "one",
        "two",
        keys=SKIP,
        empty=1,
        skipped={"text not a string": 6},
        notes="6 skipped, text not a string, 1 empty texts dropped",
    ),
    _read("empty texts are no error", _json("", "one", "", ""), "one", empty=3, notes="3 empty texts dropped"),
    _read(
        "invalid UTF-8, skipped",
        _lines(b'{"text": "a\xff"}', b'{"text": "one"}', b'{"text": "\xed\xa0\x80"}', b'{"text": "\xc3"}'),
        "one",
        keys=SKIP,
        skipped={"invalid UTF-8": 3},
        notes="3 skipped, invalid UTF-8",
    ),
    _read(
        "nested too deeply, skipped",
        _lines(b"[" * 200_000, b'{"text": "one"}'),
        "one",
        keys=SKIP,
        skipped={"nested too deeply": 1},
        notes="1 skipped, nested too deeply",
    ),
    _read(
        "everything at once, in three files",
        {
            "a.jsonl": BOM + _lines('{"text": "one"}', "", '{"text": "', '{"text": ""}', r'{"text": "\ud800"}'),
            "b.jsonl.gz": gzip.compress(
                BOM + _lines("5", '{"text": 5}', b"\xff", '{"text": "two"}', "{}", '{"text": "')
            ),
            "c.jsonl.zst": _zstd(_lines("null", '{"text": "three"}', '{"text": ""}', '{"text": "fo')),
        },
        "one",
        "\ufffd",
        "two",
        "three",
        path=["a.jsonl", "b.jsonl.gz", "c.jsonl.zst"],
        keys=SKIP,
        empty=2,
        repaired=1,
        skipped={
            "malformed JSON": 3,
            "not an object": 2,
            "text not a string": 1,
            "invalid UTF-8": 1,
            "no text column": 1,
        },
        notes="3 skipped, malformed JSON, 2 skipped, not an object, 1 skipped, text not a string, "
        "1 skipped, invalid UTF-8, 1 skipped, no text column, 2 empty texts dropped, "
        "1 texts with lone surrogates repaired",
    ),
    _read(
        "texts that look like values",
        _json("null", "NaN", "1", "true", "None", "[]", "{}", "1e5"),
        *("null", "NaN", "1", "true", "None", "[]", "{}", "1e5"),
    ),
    _read(
        "other keys that change type",
        _lines(
            '{"meta": null, "text": "one"}',
            '{"meta": {"a": 1}, "text": "two"}',
            '{"meta": [1, "b"], "text": "three"}',
            '{"meta": "x", "text": "four", "more": false}',
            '{"text": "five", "meta": -Infinity}',
        ),
        *("one", "two", "three", "four", "five"),
    ),
    _read("a number of 5000 digits beside the text", _lines(f'{{"id": {"7" * 5000}, "text": "one"}}'), "one"),
    _read(
        "lone surrogates",
        _lines(r'{"text": "ok\ud800bad"}', r'{"text": "\ud83d\ude00"}', r'{"text": "\ude00\ud83d"}'),
        "ok\ufffdbad",
        "😀",
        "\ufffd\ufffd",
        repaired=2,
        notes="2 texts with lone surrogates repaired",
    ),
    _read(
        "nested text column",
        _lines('{"text": "WRONG", "body": {"en": "RIGHT"}}', '{"body": {"de": "WRONG", "en": "right"}}'),
        "RIGHT",
        "right",
        keys={"data__text_column": "body.en"},
    ),
    _read(
        "literal key wins over the nested one",
        _lines('{"body": {"en": "WRONG"}, "body.en": "RIGHT"}', '{"body.en": "right", "body": 5}'),
        "RIGHT",
        "right",
        keys={"data__text_column": "body.en"},
    ),
    _read(
        "something else on the way to a nested text, skipped",
        _lines('{"body": null}', '{"body": "en"}', '{"body": [{"en": "x"}]}', '{"body": {"en": "one"}}'),
        "one",
        keys={**SKIP, "data__text_column": "body.en"},
        skipped={"no text column": 3},
        notes="3 skipped, no text column",
    ),
]

REFUSED_LINES = [
    _refused("BOM in the second line", _json("one") + BOM + _json("two"), "data.jsonl:2: malformed JSON"),
    _refused("two BOMs", BOM * 2 + _json("one"), "data.jsonl:1: malformed JSON"),
    _refused("UTF-16", _json("one").decode().encode("utf-16"), "data.jsonl:1: invalid UTF-8 at byte 0 of the line"),
    _refused(
        "last line cut off",
        _json("one", "two", "three")[:-5],
        "data.jsonl:3: malformed JSON: Unterminated string",
        "at column 10",
        fix="data.on_bad_line: skip",
    ),
    _refused(
        "last line of the second file cut off",
        {"a.jsonl": _json("one"), "b.jsonl": _json("two", "three")[:-5]},
        "b.jsonl:2: malformed JSON",
        path=["a.jsonl", "b.jsonl"],
    ),
    _refused(
        "last line inside gzip cut off", gzip.compress(_json("one", "two")[:-5]), "data.jsonl:2: malformed JSON"
    ),
    _refused("blank lines count", b"\n\n" + _json("one") + b"\r\nx\n", "data.jsonl:5: malformed JSON"),
    _refused(
        "raw control character", b'{"text": "a\x0bb"}\n', "data.jsonl:1: malformed JSON: Invalid control character"
    ),
    _refused("two objects on a line", b'{"text": "a"}{"text": "b"}\n', "data.jsonl:1: malformed JSON: Extra data"),
    *(
        _refused(
            f"line 2 is {what}",
            _json("one") + line + b"\n",
            f"data.jsonl:2: the line holds {what}, not a JSON object",
            fix='{"text": "..."}',
        )
        for line, what in (
            (b'"abc"', "a string"),
            (b"[1]", "a list"),
            (b"5", "a number"),
            (b"null", "null"),
            (b"true", "a boolean"),
        )
    ),
    _refused(
        "line 2 is an empty object",
        _json("one") + b"{}\n",
        "data.jsonl:2: no key 'text'; keys found: none",
        fix="data.text_column",
    ),
    _refused(
        "line 2 has another key",
        _json("one") + b'{"content": "x", "id": 1}\n',
        "data.jsonl:2: no key 'text'; keys found: 'content', 'id'",
        fix="data.text_column",
    ),
    *(
        _refused(
            f"text of line 2 is {what}: {value}",
            _json("one", value),
            f"data.jsonl:2: 'text' holds {what}, not text",
            fix="data.on_bad_line: skip",
        )
        for value, what in (
            (None, "null"),
            (5, "a number"),
            (float("nan"), "a number"),
            (["a"], "a list"),
            ({"a": "b"}, "an object"),
            (False, "a boolean"),
        )
    ),
    _refused(
        "invalid UTF-8",
        _json("one") + b'{"text": "ab\xff"}\n',
        "data.jsonl:2: invalid UTF-8 at byte 12 of the line",
        fix="UTF-8",
    ),
    _refused("raw surrogate", b'{"text": "\xed\xa0\x80"}\n', "data.jsonl:1: invalid UTF-8 at byte 10 of the line"),
    _refused("nested too deeply", b"[" * 200_000 + b"\n", "data.jsonl:1: JSON is nested too deeply"),
    _refused(
        "null on the way to a nested text",
        b'{"body": {"en": "one"}}\n{"body": null}\n',
        "data.jsonl:2: no key 'body.en'; keys found: 'body'",
        keys={"data__text_column": "body.en"},
    ),
    _refused(
        "literal key wins even if it holds no text",
        b'{"body": {"en": "one"}, "body.en": null}\n',
        "data.jsonl:1: 'body.en' holds null, not text",
        keys={"data__text_column": "body.en"},
    ),
    _refused("no byte at all", b"", "data.jsonl is empty", fix="JSON line"),
    _refused("nothing but a BOM", BOM, "no usable document in", "data.jsonl"),
    _refused("nothing but empty texts", _json("", ""), "no usable document in", "data.jsonl (2 empty texts"),
    _refused("nothing but skipped lines", b"5\n{}\n", "no usable document", "1 not an object, 1 no text", keys=SKIP),
]

# --- Compression ------------------------------------------------------------------------------------------------

READ_COMPRESSED = [
    _read("gzip", {"data.jsonl.gz": gzip.compress(_json("one", "two"))}, "one", "two"),
    _read("gzip of .json", {"data.json.gz": gzip.compress(_json("one", "two"))}, "one", "two"),
    _read(
        "gzip of three members, one empty",
        gzip.compress(_json("one")) + gzip.compress(b"") + gzip.compress(_json("two")),
        "one",
        "two",
    ),
    _read(
        "gzip members that share a line",
        gzip.compress(b'{"text": "one"}\n{"text": "tw') + gzip.compress(b'o"}\n{"text": "three"}'),
        *("one", "two", "three"),
    ),
    _read("gzip padded with zero bytes", gzip.compress(_json("one")) + bytes(512), "one"),
    _read("zstd", {"data.jsonl.zst": _zstd(_json("one", "two"))}, "one", "two"),
    _read("zstd of three frames, one empty", _zstd(_json("one")) + _zstd(b"") + _zstd(_json("two")), "one", "two"),
    _read("zstd frames that share a line", _zstd(b'{"text": "on') + _zstd(b'e"}\n{"text": "two"}\n'), "one", "two"),
    _read(
        "zstd with frames to skip", SKIPPABLE + _zstd(_json("one")) + SKIPPABLE + _zstd(_json("two")), "one", "two"
    ),
]

REFUSED_COMPRESSED = [
    *(
        _refused(
            f"{kind} cut by {cut} bytes{policy}",
            {f"data.jsonl.{suffix}": content[:-cut]},
            f"data.jsonl.{suffix} is a damaged or cut-off {kind} file",
            fix="copy or download the file again",
            keys=keys,
        )
        for kind, suffix, content in (("gzip", "gz", gzip.compress(LONG)), ("zstd", "zst", _zstd(LONG)))
        for cut in (1, 5, 30, 300)
        for policy, keys in (("", {}), (", bad lines skipped", SKIP))
    ),
    _refused(
        "second gzip member cut off",
        gzip.compress(LONG) + gzip.compress(LONG)[:-30],
        "data.jsonl is a damaged or cut-off gzip file",
    ),
    _refused("second zstd frame cut off", _zstd(LONG) + _zstd(LONG)[:-30], "data.jsonl is a damaged or cut-off zstd"),
    _refused("gzip with a foreign end", gzip.compress(LONG) + b"the end", "data.jsonl is a damaged or cut-off gzip"),
    _refused("zstd with a foreign end", _zstd(LONG) + b"the end", "data.jsonl is a damaged or cut-off zstd"),
    _refused("gzip inside gzip", gzip.compress(gzip.compress(_json("one"))), "data.jsonl:1: invalid UTF-8 at byte 1"),
    _refused("gzip of nothing", gzip.compress(b""), "no usable document in", "data.jsonl"),
    _refused("zstd of nothing", _zstd(b""), "no usable document in", "data.jsonl"),
    _refused(
        "one file of a list is cut off",
        {"a.jsonl": _json("one"), "b.jsonl.gz": gzip.compress(LONG)[:-30]},
        "b.jsonl.gz is a damaged or cut-off gzip file",
        path=["a.jsonl", "b.jsonl.gz"],
    ),
]

# --- Formats, names and places ----------------------------------------------------------------------------------

PARTS: Files = {
    "corpus/b.jsonl": _json("b"),
    "corpus/a.ndjson": _json("a"),
    "corpus/c/d.jsonl.gz": gzip.compress(_json("d")),
    "corpus/c/e.json.zst": _zstd(_json("e")),
    "corpus/f.parquet": _parquet({"text": ["f", "g"]}),
}
NOTES: Files = {
    "corpus/.hidden.jsonl": _json("HIDDEN"),
    "corpus/.cache/x.jsonl": _json("HIDDEN"),
    "corpus/LICENSE": b"not a corpus\n",
    "corpus/README.md": b"not a corpus\n",
}

READ_FORMATS = [
    _read(".ndjson", {"data.ndjson": _json("one", "two")}, "one", "two"),
    _read(".json, one object a line", {"data.json": _json("one", "two")}, "one", "two"),
    _read("an unknown suffix is JSON lines", {"data.dat": _json("one", "two")}, "one", "two"),
    _read("no suffix is JSON lines", {"data": _json("one", "two")}, "one", "two"),
    _read(
        ".txt is one document, kept as it is",
        {"book.txt": ' line one\r\n\r\n{"text": "two"}\u2028\n'.encode()},
        ' line one\r\n\r\n{"text": "two"}\u2028\n',
    ),
    _read(".txt with a BOM", {"book.txt": BOM + b"one"}, "one"),
    _read(".txt in gzip", {"book.txt.gz": gzip.compress(b"one\n") + gzip.compress(b"two\n")}, "one\ntwo\n"),
    _read(
        "a directory of .txt, one empty",
        {"books/b.txt": b"two", "books/a.TXT": b"one", "books/c.txt": b"", "books/d.txt.zst": _zstd(b"four")},
        *("one", "two", "four"),
        path="books",
        empty=1,
        notes="1 empty texts dropped",
    ),
    _read(
        "invalid .txt, skipped",
        {"books/a.txt": b"on\xff", "books/b.txt": b"two"},
        "two",
        path="books",
        keys=SKIP,
        skipped={"invalid UTF-8": 1},
        notes="1 skipped, invalid UTF-8",
    ),
    _read("Parquet", {"data.parquet": _parquet({"id": [1, 2], "text": ["one", "two"]})}, "one", "two"),
    _read(
        "Parquet in row groups, some rows unusable",
        {"data.parquet": _parquet({"text": ["one", None, "", "two\u2028", None]}, row_group_size=2)},
        "one",
        "two\u2028",
        keys=SKIP,
        empty=1,
        skipped={"text not a string": 2},
        notes="2 skipped, text not a string, 1 empty texts dropped",
    ),
    _read(
        "Parquet with dictionary-encoded, large texts",
        {
            "data.parquet": _parquet(
                {"text": pyarrow.array(["a", "b", "a"], pyarrow.large_string()).dictionary_encode()}
            )
        },
        *("a", "b", "a"),
    ),
    _read(
        "Parquet with a nested column",
        {"data.parquet": _parquet({"text": ["WRONG"] * 2, "body": [{"en": "one"}, {"en": "two"}]})},
        "one",
        "two",
        keys={"data__text_column": "body.en"},
    ),
    _read(
        "Parquet where the literal column wins",
        {"data.parquet": _parquet({"body": [{"en": "WRONG"}], "body.en": ["right"]})},
        "right",
        keys={"data__text_column": "body.en"},
    ),
    _read("directory", {**PARTS, **NOTES}, *"abdefg", path="corpus"),
    _read(
        "directory with an empty file",
        {"corpus/a.jsonl": b"", "corpus/b.jsonl": _json("one")},
        "one",
        path="corpus",
    ),
    _read("glob", {**PARTS, **NOTES}, *"bd", path="corpus/**/*.jsonl*"),
    _read("glob without depth", {**PARTS, **NOTES}, *"ab", path="corpus/[ab].*json*"),
    _read(
        "list in its own order",
        {**PARTS, "z.txt": b"zz", "y.dat": _json("y")},
        *["zz", *"fg", *"de", "y", "b"],
        path=["z.txt", "corpus/*.parquet", "corpus/c", "y.dat", "corpus/b.jsonl"],
    ),
    _read("a name that looks like a glob", {"a[1].jsonl": _json("one"), "a1.jsonl": _json("WRONG")}, "one"),
    _read("gzip under a plain name", gzip.compress(_json("one")), "one"),
    _read("plain under the name of gzip", {"data.jsonl.gz": _json("one")}, "one"),
    _read("zstd under the name of gzip", {"data.jsonl.gz": _zstd(_json("one"))}, "one"),
    _read("gzip under the name of zstd", {"data.jsonl.zst": gzip.compress(_json("one"))}, "one"),
    _read("Parquet under the name of JSON lines", _parquet({"text": ["one"]}), "one"),
    _read("JSON lines under the name of Parquet", {"data.parquet": _json("one")}, "one"),
    _read(".npy with a header under another name", _npy([*b"one", E]), stream=[*b"one", E], documents=1),
]

REFUSED_FORMATS = [
    _refused(
        ".json that is a list",
        {"data.json": b'[\n{"text": "one"},\n{"text": "two"}\n]\n'},
        "data.json:1: malformed JSON",
        fix="one object a line: jq -c '.[]'",
    ),
    _refused(
        ".json that is one object over lines",
        {"data.json": b'{\n  "text": "one"\n}\n'},
        "data.json:1: malformed JSON",
        fix="one object a line",
    ),
    _refused("invalid .txt", {"book.txt": b"one\n\xff"}, "book.txt:1: invalid UTF-8 at byte 4 of the file"),
    _refused(
        "null in Parquet",
        {"data.parquet": _parquet({"text": ["one", None]})},
        "data.parquet:2: 'text' holds null, not text",
    ),
    _refused(
        "null in the second row group of Parquet",
        {"data.parquet": _parquet({"text": ["one", "two", "three", None]}, row_group_size=2)},
        "data.parquet:4: 'text' holds null, not text",
    ),
    _refused(
        "numbers in Parquet",
        {"data.parquet": _parquet({"text": [1, 2]})},
        "data.parquet: the column 'text' holds int64, not text",
        keys=SKIP,
    ),
    _refused(
        "Parquet without the column",
        {"data.parquet": _parquet({"content": ["one"], "id": [1]})},
        "data.parquet: no column 'text'; columns found: 'content', 'id'",
        fix="data.text_column",
        keys=SKIP,
    ),
    _refused(
        "Parquet cut off",
        {"data.parquet": _parquet({"text": ["one"] * 50})[:-30]},
        "data.parquet is a damaged Parquet",
    ),
    _refused(
        "directory of several kinds",
        {"corpus/a.jsonl": _json("one"), "corpus/README.txt": b"about"},
        "corpus holds files of several kinds: 1 records (a.jsonl), 1 text (README.txt)",
        fix="/corpus/**/*.jsonl*",
        path="corpus",
    ),
    _refused("directory without a corpus", {"corpus/README.md": b"about"}, "corpus holds no .jsonl", path="corpus"),
    _refused("directory of hidden files", {"corpus/.a.jsonl": _json("x")}, "corpus holds no .jsonl", path="corpus"),
    _refused("glob without a file", {"a.jsonl": _json("x")}, "the glob b*.jsonl matches no file", path="b*.jsonl"),
    _refused("no such file", {"a.jsonl": _json("x")}, "b.jsonl does not exist", path=["a.jsonl", "b.jsonl"]),
    _refused(
        "a file named twice",
        {"a.jsonl": _json("one")},
        "a.jsonl is named twice",
        fix="weight",
        path=["a.jsonl", "*.jsonl"],
    ),
    _refused(
        "an empty file in a list",
        {"a.jsonl": _json("one"), "b.jsonl": b""},
        "b.jsonl is empty",
        path=["a.jsonl", "b.jsonl"],
    ),
    _refused(
        "shorter than a row",
        _json("one"),
        "4 tokens",
        "data.max_length 16",
        fix="at most 4",
        keys={"data__max_length": 16},
    ),
]

# --- Token ids --------------------------------------------------------------------------------------------------

IDS = (*b"one", E, *b"two", E, *b"three", E)
NO_END = (*b"one", E, *b"three!!")
UINT16: Keys = {"data__token_dtype": "uint16"}
UINT32: Keys = {"data__token_dtype": "uint32"}


def _ids(name: str, files: Files, ids: Sequence[int] = IDS, documents: int = 3, **more: Any) -> Read:
    return _read(name, files, stream=ids, documents=documents, **more)


READ_TOKENS = [
    _ids(".bin of uint16", {"data.bin": _flat(IDS)}, keys=UINT16),
    _ids(".bin of uint32", {"data.bin": _flat(IDS, "<u4")}, keys=UINT32),
    _ids(".bin that ends inside a document", {"data.bin": _flat(NO_END)}, NO_END, 2, keys=UINT16),
    _ids(".bin with two ends in a row", {"data.bin": _flat((*b"ab", E, E))}, (*b"ab", E, E), 2, keys=UINT16),
    _ids("raw .npy", {"data.npy": _flat(IDS)}, keys=UINT16),
    _ids("raw .npy with its table, uint16", {"data.npy": _flat(IDS), "data.csv.gz": _table(4, 4, 6)}),
    _ids("raw .npy with its table, uint32", {"data.npy": _flat(IDS, "<u4"), "data.csv.gz": _table(4, 4, 6)}),
    _ids(
        "the table says where documents end, not the ids",
        {"data.npy": _flat(IDS), "data.csv.gz": _table(8, 6)},
        documents=2,
    ),
    *(_ids(f".npy with a header, {dtype}", {"data.npy": _npy(IDS, dtype)}) for dtype in ("<u2", "<u4", "<i8", ">u4")),
    _ids(
        "directory of .npy and their tables",
        {
            "maps/b.npy": _flat(IDS[8:]),
            "maps/b.csv.gz": _table(6),
            "maps/a.npy": _flat(IDS[:8]),
            "maps/a.csv.gz": _table(4, 4),
        },
        path="maps",
    ),
    _ids(
        "glob over .npy and their tables",
        {"part-1.npy": _flat(IDS), "part-1.csv.gz": _table(4, 4, 6)},
        path="part-*",
    ),
    _ids(
        "text after token ids",
        {"a.bin": _flat(IDS[:8]), "b.jsonl": _json("three")},
        path=["a.bin", "b.jsonl"],
        keys=UINT16,
    ),
    _ids(
        "BOS and EOS are not added",
        {"data.bin": _flat(NO_END)},
        NO_END,
        2,
        keys={**UINT16, "data__add_bos": True},
        tokenizer={"bos": True},
    ),
]

REFUSED_TOKENS = [
    _refused(
        "size of ids not said", {"data.bin": _flat(IDS)}, "data.bin holds raw token ids", fix="data.token_dtype"
    ),
    _refused("half an id", {"data.bin": _flat(IDS)[:-1]}, "data.bin has 27 bytes", "uint16", keys=UINT16),
    _refused(
        "an id that the tokenizer does not have",
        {"data.bin": _flat((*IDS, 257))},
        "data.bin holds the id 257 in document 4, and the tokenizer's largest is 256",
        fix="set tokenizer",
        keys=UINT16,
    ),
    _refused("a negative id", {"data.npy": _npy([1, -1, 2], "<i4")}, "data.npy holds the id -1 in document 1"),
    _refused("real numbers", {"data.npy": _npy([1.0, 2.0], "<f4")}, "data.npy holds float32 of shape (2,)"),
    _refused("two dimensions", {"data.npy": _npy(range(4), shape=(2, 2))}, "data.npy holds uint16 of shape (2, 2)"),
    _refused(".npy cut off", {"data.npy": _npy(IDS)[:-4]}, "data.npy is a damaged .npy file"),
    _refused("compressed ids", {"data.bin.gz": gzip.compress(_flat(IDS))}, "compressed token ids", fix="unpack it"),
    _refused(
        "a table of another file",
        {"data.npy": _flat(IDS), "data.csv.gz": _table(4, 4, 5)},
        "data.csv.gz names 13 tokens",
        "data.npy",
    ),
]

# --- Tokenizers and ends of documents ---------------------------------------------------------------------------

BOS: Keys = {"data__add_bos": True}
TRAP = {"bos": True, "bos_by_itself": True}

READ_TOKENIZERS = [
    _read("EOS once after each document", _json("aa", "bb"), stream=[*b"aa", E, *b"bb", E], documents=2),
    _read(
        "no EOS if not wanted",
        _json("aa", "bb"),
        stream=b"aabb",
        documents=2,
        keys={"data__add_eos": False},
    ),
    _read(
        "a tokenizer without EOS, none wanted",
        _json("aa", "bb"),
        stream=b"aabb",
        documents=2,
        keys={"data__add_eos": False},
        tokenizer={"eos": False},
    ),
    _read("a tokenizer that appends EOS itself", _json("aa", "bb"), "aa", "bb", tokenizer={"eos_by_itself": True}),
    _read("a tokenizer that puts BOS itself, none wanted", _json("aa", "bb"), "aa", "bb", tokenizer=TRAP),
    _read(
        "a tokenizer that puts BOS itself, one wanted",
        _json("aa", "bb"),
        stream=[B, *b"aa", E, B, *b"bb", E],
        documents=2,
        keys=BOS,
        tokenizer=TRAP,
    ),
    _read(
        "a tokenizer with BOS, one wanted",
        _json("aa", "", "bb"),
        stream=[B, *b"aa", E, B, *b"bb", E],
        documents=2,
        empty=1,
        notes="1 empty texts dropped",
        keys=BOS,
        tokenizer={"bos": True},
    ),
    _read(
        "special tokens in a text are text",
        _json("a <eos> b", "<eos>", "<bos>x<eos>"),
        *("a <eos> b", "<eos>", "<bos>x<eos>"),
        tokenizer={"bos": True},
    ),
    _read(
        "config.json has another EOS",
        _json("aa", "bb"),
        "aa",
        "bb",
        model={"eos_token_id": 5},
        said=("config.json says eos_token_id 5, the tokenizer says 256: using the tokenizer's.",),
        final={"eos_token_id": E},
    ),
    _read(
        "ids above the model's embedding",
        _json("plain", "x<extra0>y<extra9>"),
        stream=[*b"plain", E, ord("x"), 257, ord("y"), 266, E],
        documents=2,
        tokenizer={"extra": 10},
        said=(f"Tokenizer vocab (267) > model vocab ({VOCAB}). Resizing model embeddings to 267.",),
        final={"vocab_size": 267},
    ),
]

REFUSED_TOKENIZERS = [
    _refused(
        "a tokenizer without EOS",
        _json("aa", "bb"),
        "has no EOS token",
        fix="data.add_eos: false",
        tokenizer={"eos": False},
    ),
    _refused(
        "a tokenizer without BOS, one wanted", _json("aa"), "has no BOS token", fix="data.add_bos: false", keys=BOS
    ),
    _refused(
        "ids above an embedding that cannot grow",
        _json("a document without any of them"),
        "the tokenizer needs 267 embedding rows",
        fix="get_input_embeddings",
        tokenizer={"extra": 10},
        code="oracle",
    ),
]

# --- Rows -------------------------------------------------------------------------------------------------------

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

# Numbered, so that nothing can be lost, repeated or moved unseen; 46 rows in all.
_WIDTH = 65_536
_HUGE = "".join(f"{number:06d}é" for number in range(380_000))
_HUGE += "!" * (46 * _WIDTH - len(_stream("first", _HUGE, "last")))

READ_ROWS = [
    *(
        _read(f"{size} tokens in rows of 8", _json(ALPHABET[: size - 1]), ALPHABET[: size - 1], max_length=8)
        for size in (31, 32, 33)
    ),
    _read("documents of one character", _json(*ALPHABET), *ALPHABET, max_length=8),
    _read("a document over many rows", _json("x", ALPHABET[:29], "y"), "x", ALPHABET[:29], "y", max_length=2),
    _read("shorter than the run", _json(ALPHABET[:23]), ALPHABET[:23], max_length=8, steps=20),
    _read("shorter than a step", _json(ALPHABET[:23]), ALPHABET[:23], max_length=8, batch=5, steps=4),
    _read(
        "a huge document between two short ones",
        _json("first", _HUGE, "last"),
        "first",
        _HUGE,
        "last",
        max_length=_WIDTH,
    ),
    _read(
        "a huge document, by several processes",
        _json("first", _HUGE, "last"),
        *("first", _HUGE, "last"),
        max_length=_WIDTH,
        steps=1,
        batch=46,
        keys={"data__num_workers": 2, "training__batch_size": 1, "training__grad_accum_steps": 46},
    ),
]

READ = [*READ_LINES, *READ_COMPRESSED, *READ_FORMATS, *READ_TOKENS, *READ_TOKENIZERS, *READ_ROWS]
REFUSED = [*REFUSED_LINES, *REFUSED_COMPRESSED, *REFUSED_FORMATS, *REFUSED_TOKENS, *REFUSED_TOKENIZERS]


# --- The tests --------------------------------------------------------------------------------------------------


def _write(case: Corpus, workspace: Workspace, byte_tokenizer: Path, code: str) -> dict[str, Any]:
    """Write the project; the values of its preset."""
    write_custom(workspace.path / "model", code, **case.model)
    for name, content in case.files.items():
        workspace.raw(name, content)
    tokenizer = byte_tokenizer
    if case.tokenizer:
        options = dict(case.tokenizer)
        eos_by_itself = options.pop("eos_by_itself", False)
        tokenizer = write_byte_tokenizer(workspace.path / "tokenizer", **options)
        if eos_by_itself:
            core = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
            core.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", E)])
            core.save(str(tokenizer / "tokenizer.json"))
    return {
        "trust_remote_code": True,
        "tokenizer": str(tokenizer),
        "data__path": next(iter(case.files)) if case.path is None else case.path,
        "data__shuffle": False,
        "data__max_length": 2,
        **case.keys,
    }


def _require_same(seen: Sequence[int], expected: Sequence[int]) -> None:
    """Compare streams; a short message for those of millions of ids."""
    if list(seen) == list(expected):
        return
    pairs = enumerate(zip(seen, expected, strict=False))
    at = next((place for place, (left, right) in pairs if left != right), min(len(seen), len(expected)))
    near = slice(max(at - 8, 0), at + 24)
    assert (at, len(seen), list(seen[near])) == (at, len(expected), list(expected[near]))


def _tree(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*") if path.name != "preset.yml"}


def test_every_row_has_its_own_name() -> None:
    for names in ([case.name for case in READ], [case.name for case in REFUSED]):
        assert len(names) == len(set(names))


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_the_model_is_given_exactly_these_ids(
    workspace: Workspace, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, case: Read
) -> None:
    monkeypatch.setenv("PROBE_DIR", str(workspace.path))
    values = _write(case, workspace, byte_tokenizer, "probe")
    length = case.length
    chunks = len(case.stream) // length
    steps = chunks if case.steps is None else case.steps
    rows = steps * case.batch

    result = workspace.pretrain(
        **{
            "training__batch_size": case.batch,
            **values,
            "data__max_length": length,
            "training__max_steps": steps,
        }
    )
    assert result.code == 0, result.err
    assert "Traceback" not in result.out + result.err

    seen: list[int] = []
    for line in (workspace.path / "rank0.jsonl").read_text().splitlines():
        for row in json.loads(line)["input_ids"]:
            assert len(row) == length
            seen += row
    expected = case.stream[: chunks * length]
    _require_same(seen, [expected[place % len(expected)] for place in range(rows * length)])

    data = json.loads((workspace.path / "run" / "pretrain_config.json").read_text())["data"]
    assert data["tokens"] == len(case.stream)
    assert data["counts"] == {
        "documents": case.documents,
        "empty": case.empty,
        "repaired": case.repaired,
        "skipped": case.skipped,
    }
    lines = result.out.splitlines()
    notes = [line.partition("Data notes: ")[2] for line in lines if "Data notes: " in line]
    assert notes == ([] if case.notes is None else [case.notes])
    assert f"Packed: {len(case.stream):,} tokens → {chunks:,} chunks (max_length={length})" in result.out
    for text in case.said:
        assert text in result.out + result.err
    assert [record["step"] for record in workspace.metrics()] == list(range(1, steps + 1))
    config = json.loads((workspace.path / "run" / "final" / "config.json").read_text())
    assert {key: config.get(key) for key in case.final} == case.final


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_the_corpus_is_refused_with_its_place(
    workspace: Workspace, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, case: Refused
) -> None:
    monkeypatch.setenv("PROBE_DIR", str(workspace.path))
    values = _write(case, workspace, byte_tokenizer, case.code)
    folders = (workspace.path, Path(os.environ["XDG_CACHE_HOME"]))
    before = _tree(*folders)
    result = workspace.pretrain(**values)
    assert result.code == 2, result.err
    assert "Traceback" not in result.out + result.err
    problem, fix, page = result.err.splitlines()
    assert (problem[:7], fix.split()[0], page.split()[0]) == ("Error: ", "Fix:", "See:"), result.err
    for fragment in case.error:
        assert fragment in problem
    assert case.fix in fix
    assert not (workspace.path / "run").exists()
    assert _tree(*folders) == before
