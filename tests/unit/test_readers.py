"""A file -> its texts: line ends, encodings, compression, bad records, formats, and reading from any place on."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from eulerforge.data.readers import BadRecord, DocumentCounts, Record, RecordReader, iter_texts, line_of_byte
from eulerforge.data.sources import SourceFile, resolve_files
from eulerforge.errors import DataError

BOM = b"\xef\xbb\xbf"
LINE = b'{"text": "ok"}\n'


def _source(path: Path) -> SourceFile:
    return resolve_files(str(path))[0]


def _read(
    *paths: Path, column: str = "text", policy: Literal["error", "skip"] = "error"
) -> tuple[list[str], DocumentCounts]:
    counts = DocumentCounts()
    return [text for path in paths for text in iter_texts(_source(path), column, policy, counts)], counts


def _file(tmp_path: Path, content: bytes, name: str = "data.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def _lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def _zstd(content: bytes, checksum: bool = False) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=checksum).compress(content)


# --- Lines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marked", [(True, False), (False, True), (True, True)])
def test_one_bom_at_the_start_of_any_file_is_dropped(tmp_path: Path, marked: tuple[bool, bool]) -> None:
    files = [
        _file(tmp_path, (BOM if bom else b"") + _lines(f"a{index}", f"b{index}"), f"{index}.jsonl")
        for index, bom in enumerate(marked)
    ]
    texts, counts = _read(*files)
    assert texts == ["a0", "b0", "a1", "b1"]
    assert counts == DocumentCounts(documents=4)


@pytest.mark.parametrize("pack", [gzip.compress, _zstd], ids=["gzip", "zstd"])
def test_a_bom_inside_a_compressed_file_is_dropped_and_one_inside_a_text_is_kept(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    assert _read(_file(tmp_path, pack(BOM + _lines("\ufeffa"))))[0] == ["\ufeffa"]


def test_only_one_bom_is_dropped(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:1: malformed JSON"):
        _read(_file(tmp_path, BOM + BOM + LINE))


def test_a_bom_at_the_start_of_a_later_line_is_not_dropped(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:2: malformed JSON"):
        _read(_file(tmp_path, LINE + BOM + LINE))


def test_records_end_at_newline_only(tmp_path: Path) -> None:
    raw = "a\u2028b\u2029c\u0085d"
    escaped = r"\u000b\u000c\u001c\u001d\u001e\r\n\u0000\t"
    content = f'{{"text": "{raw}{escaped}"}}\n'.encode()
    texts, counts = _read(_file(tmp_path, content))
    assert texts == [raw + "\x0b\x0c\x1c\x1d\x1e\r\n\0\t"]
    assert counts == DocumentCounts(documents=1)


@pytest.mark.parametrize(
    "content",
    [
        _lines("a", "b", "c"),
        _lines("a", "b", "c").replace(b"\n", b"\r\n"),
        b"\n\r\n" + _lines("a", "b").replace(b"\n", b"\n \t\n") + _lines("c") + b"\n\n",
        _lines("a", "b", "c").removesuffix(b"\n"),
        BOM + b"\n" + _lines("a", "b", "c"),
    ],
    ids=["plain", "crlf", "blank lines", "no last newline", "bom on a blank line"],
)
def test_line_ends_and_blank_lines_change_nothing(tmp_path: Path, content: bytes) -> None:
    assert _read(_file(tmp_path, content)) == (["a", "b", "c"], DocumentCounts(documents=3))


def test_blank_lines_count_in_line_numbers(tmp_path: Path) -> None:
    path = _file(tmp_path, b"\n\n" + LINE + b"\n" + b"oops\n")
    with pytest.raises(DataError) as caught:
        _read(path)
    assert str(caught.value).startswith(f"{path}:5: malformed JSON: ")


def test_there_is_no_limit_on_the_length_of_a_line(tmp_path: Path) -> None:
    long = "0123456789" * 500_000
    for pack in (bytes, gzip.compress, _zstd):
        assert _read(_file(tmp_path, pack(_lines("a", long, "b"))))[0] == ["a", long, "b"]


# --- Compression ------------------------------------------------------------------------------------------------

SKIPPABLE = b"\x5a\x2a\x4d\x18" + (7).to_bytes(4, "little") + b"a table"


def _raw_frame(content: bytes, window_log: int) -> bytes:
    """A zstd frame of one stored block that asks for a window of 2^window_log bytes."""
    block = (len(content) << 3 | 1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(window_log - 10) << 3]) + block + content


PACKED: dict[str, Callable[[bytes, bytes], bytes]] = {
    # of the two halves of a file
    "plain": lambda left, right: left + right,
    "gzip": lambda left, right: gzip.compress(left + right),
    "gzip, two members": lambda left, right: gzip.compress(left) + gzip.compress(right),
    "gzip, empty member": lambda left, right: gzip.compress(left) + gzip.compress(b"") + gzip.compress(right),
    "gzip, padded": lambda left, right: gzip.compress(left + right) + bytes(64),
    "zstd": lambda left, right: _zstd(left + right),
    "zstd, two frames": lambda left, right: _zstd(left) + _zstd(right),
    "zstd, empty frame": lambda left, right: _zstd(left) + _zstd(b"") + _zstd(right),
    "zstd, checksum": lambda left, right: _zstd(left + right, checksum=True),
    "zstd, skippable first": lambda left, right: SKIPPABLE + _zstd(left + right),
    "zstd, skippable inside": lambda left, right: _zstd(left) + SKIPPABLE + _zstd(right),
    "zstd, skippable last": lambda left, right: _zstd(left + right) + SKIPPABLE,
    "zstd, no size": lambda left, right: (
        zstandard.ZstdCompressor(write_content_size=False).compress(left) + _raw_frame(right, 20)
    ),
    "zstd --long=28": lambda left, right: _raw_frame(left + right, 28),
    "zstd --long=31": lambda left, right: _raw_frame(left + right, 31),
}


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.jsonl.zst"])
def test_compression_is_told_by_content_and_changes_no_text(tmp_path: Path, form: str, name: str) -> None:
    """The halves are cut in the middle of a line, and of a character."""
    content = _lines("aé", "b", "c")
    for cut in (13, 18):
        path = _file(tmp_path, PACKED[form](content[:cut], content[cut:]), name)
        assert _read(path) == (["aé", "b", "c"], DocumentCounts(documents=3))


@pytest.mark.parametrize("policy", ["error", "skip"])
@pytest.mark.parametrize("damage", ["cut", "header only", "crc", "garbage after", "bits flipped"])
def test_damaged_gzip_is_an_error_under_any_policy(
    tmp_path: Path, damage: str, policy: Literal["error", "skip"]
) -> None:
    whole = gzip.compress(_lines(*(f"document {index}" for index in range(200))), mtime=0)
    stored = {
        "cut": whole[:-30],
        "header only": whole[:5],
        "crc": whole[:-8] + bytes(4) + whole[-4:],
        "garbage after": whole + b"garbage",
        "bits flipped": whole[:20] + bytes(byte ^ 255 for byte in whole[20:60]) + whole[60:],
    }[damage]
    path = _file(tmp_path, stored, "cut.jsonl.gz")
    with pytest.raises(DataError) as caught:
        _read(path, policy=policy)
    assert str(caught.value).startswith(f"data.path: {path} is a damaged or cut-off gzip file: ")


@pytest.mark.parametrize("checksum", [False, True])
def test_a_zstd_file_cut_off_anywhere_is_an_error(tmp_path: Path, checksum: bool) -> None:
    """The last of two frames loses its last bytes, one by one, down to its first byte."""
    first, last = _zstd(_lines("a"), checksum), _zstd(_lines("b", "c", "d"), checksum)
    for cut in range(1, len(last)):
        path = _file(tmp_path, first + last[:-cut], "cut.jsonl.zst")
        with pytest.raises(DataError) as caught:
            _read(path, policy="skip")
        assert str(caught.value) == (
            f"data.path: {path} is a damaged or cut-off zstd file: the last frame is not complete"
        ), cut
    assert _read(_file(tmp_path, first, "cut.jsonl.zst"))[0] == ["a"]


@pytest.mark.parametrize("damage", ["garbage after", "checksum", "bits flipped", "skippable cut"])
def test_a_damaged_zstd_file_is_an_error(tmp_path: Path, damage: str) -> None:
    whole = _zstd(_lines(*(f"document {index}" for index in range(200))), checksum=True)
    stored = {
        "garbage after": whole + b"garbage",
        "checksum": whole[:-1] + bytes([whole[-1] ^ 1]),
        "bits flipped": whole[:20] + bytes(byte ^ 255 for byte in whole[20:60]) + whole[60:],
        "skippable cut": whole + SKIPPABLE[:-1],
    }[damage]
    path = _file(tmp_path, stored, "bad.jsonl.zst")
    with pytest.raises(DataError) as caught:
        _read(path, policy="skip")
    assert str(caught.value).startswith(f"data.path: {path} is a damaged or cut-off zstd file: ")
    assert caught.value.problems[0].fix == "copy or download the file again"


def test_what_precedes_the_damage_has_been_handed_out(tmp_path: Path) -> None:
    counts = DocumentCounts()
    texts = iter_texts(_source(_file(tmp_path, _zstd(_lines("a", "b")) + b"oops")), "text", "skip", counts)
    assert [next(texts), next(texts)] == ["a", "b"]
    with pytest.raises(DataError):
        next(texts)


def test_a_file_that_has_gone_is_named(tmp_path: Path) -> None:
    source = _source(_file(tmp_path, LINE))
    source.path.unlink()
    with pytest.raises(DataError) as caught:
        list(RecordReader(source, "text"))
    assert str(caught.value) == f"data.path: {source.path} cannot be read: No such file or directory"


# --- Texts ------------------------------------------------------------------------------------------------------


def test_lone_surrogates_become_replacement_characters_and_pairs_stay(tmp_path: Path) -> None:
    content = (
        rb'{"text": "ok\ud800bad"}' + b"\n" + rb'{"text": "\ud83d\ude00"}' + b"\n" + rb'{"text": "\ude00\ud83d"}'
    )
    texts, counts = _read(_file(tmp_path, content))
    assert texts == ["ok\ufffdbad", "\U0001f600", "\ufffd\ufffd"]
    assert counts == DocumentCounts(documents=3, repaired=2)
    for text in texts:
        text.encode("utf-8")


def test_texts_are_never_interpreted(tmp_path: Path) -> None:
    texts = ["null", "NaN", "1", "true", " ", "007", "[]", "<eos>", " a "]
    assert _read(_file(tmp_path, _lines(*texts))) == (texts, DocumentCounts(documents=len(texts)))


def test_other_keys_are_never_inspected(tmp_path: Path) -> None:
    meta = ["null", '{"a": 1}', "[1]", '"x"', "1e999", "NaN", "1" * 5000, r'"\ud800"']
    content = "".join(f'{{"meta": {value}, "text": "t{index}"}}\n' for index, value in enumerate(meta))
    texts, counts = _read(_file(tmp_path, content.encode()))
    assert texts == [f"t{index}" for index in range(len(meta))]
    assert counts.repaired == 0


@pytest.mark.parametrize(
    ("record", "column", "expected"),
    [
        ({"text": "WRONG", "body": {"en": "RIGHT"}}, "body.en", "RIGHT"),
        ({"body.en": "RIGHT", "body": {"en": "WRONG"}}, "body.en", "RIGHT"),
        ({"body": {"en": "RIGHT", "fr": "WRONG"}}, "body.en", "RIGHT"),
        ({"a": {"b": {"c": "RIGHT"}}, "a.b": {"c": "WRONG"}}, "a.b.c", "RIGHT"),
        ({"": {"a": "RIGHT"}}, ".a", "RIGHT"),
        ({"text": "WRONG", "text": "RIGHT"}, "text", "RIGHT"),  # noqa: F601
    ],
)
def test_nested_column_and_the_literal_key_that_wins(
    tmp_path: Path, record: dict[str, object], column: str, expected: str
) -> None:
    assert _read(_file(tmp_path, json.dumps(record).encode()), column=column)[0] == [expected]


def test_a_literal_key_wins_even_when_its_value_is_no_text(tmp_path: Path) -> None:
    """Falling through to the nested key would mix two columns in one corpus."""
    path = _file(tmp_path, b'{"a.b": null, "a": {"b": "x"}}')
    with pytest.raises(DataError, match=r"'a\.b' holds null, not text"):
        _read(path, column="a.b")


@pytest.mark.parametrize("record", [b'{"a": "b"}', b'{"a": {"c": "x"}}', b'{"a": null}', b'{"a": [{"b": "x"}]}'])
def test_a_nested_column_that_is_not_there(tmp_path: Path, record: bytes) -> None:
    with pytest.raises(DataError, match=r":1: no key 'a\.b'; keys found: 'a'$"):
        _read(_file(tmp_path, record), column="a.b")


def test_empty_texts_are_counted_and_dropped(tmp_path: Path) -> None:
    assert _read(_file(tmp_path, _lines("", "a", "", "b"))) == (["a", "b"], DocumentCounts(documents=2, empty=2))


# --- Bad lines --------------------------------------------------------------------------------------------------

BAD: list[tuple[bytes, str, str]] = [
    (b'"abc"', "not an object", "the line holds a string, not a JSON object"),
    (b"[1]", "not an object", "the line holds a list, not a JSON object"),
    (b"5", "not an object", "the line holds a number, not a JSON object"),
    (b"null", "not an object", "the line holds null, not a JSON object"),
    (b"true", "not an object", "the line holds a boolean, not a JSON object"),
    (b"{}", "no text column", "no key 'text'; keys found: none"),
    (b'{"content": "x", "id": 1}', "no text column", "no key 'text'; keys found: 'content', 'id'"),
    (b'{"text": null}', "text not a string", "'text' holds null, not text"),
    (b'{"text": 1}', "text not a string", "'text' holds a number, not text"),
    (b'{"text": 1.5}', "text not a string", "'text' holds a number, not text"),
    (b'{"text": false}', "text not a string", "'text' holds a boolean, not text"),
    (b'{"text": ["a"]}', "text not a string", "'text' holds a list, not text"),
    (b'{"text": {}}', "text not a string", "'text' holds an object, not text"),
    (b'{"text": "a"', "malformed JSON", "malformed JSON: "),
    (b'{"text": "a"}{"text": "b"}', "malformed JSON", "malformed JSON: "),
    (b'{"text": "a\x01"}', "malformed JSON", "malformed JSON: "),
    (b'{"text": "\xff"}', "invalid UTF-8", "invalid UTF-8 at byte 10 of the line"),
    (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8", "invalid UTF-8 at byte 10 of the line"),
    (b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply", "JSON is nested too"),
]
KINDS = [f"{kind}: {line[:16].decode('latin-1')}" for line, kind, _ in BAD]


@pytest.mark.parametrize(("line", "kind", "message"), BAD, ids=KINDS)
def test_a_bad_line_stops_with_file_and_line(tmp_path: Path, line: bytes, kind: str, message: str) -> None:
    first, second = _file(tmp_path, LINE, "a.jsonl"), _file(tmp_path, LINE + line + b"\n" + LINE, "b.jsonl")
    with pytest.raises(DataError) as caught:
        _read(first, second)
    assert str(caught.value).startswith(f"{second}:2: {message}")
    assert caught.value.exit_code == 2
    assert "set data." in caught.value.problems[0].fix


def test_skipped_lines_are_counted_by_kind(tmp_path: Path) -> None:
    content = b"".join(line + b"\n" + LINE for line, _, _ in BAD)
    texts, counts = _read(_file(tmp_path, content), policy="skip")
    assert texts == ["ok"] * len(BAD)
    assert counts == DocumentCounts(documents=len(BAD), skipped=counts.skipped)
    assert counts.skipped == {
        "not an object": 5,
        "no text column": 2,
        "text not a string": 6,
        "malformed JSON": 3,
        "invalid UTF-8": 2,
        "nested too deeply": 1,
    }


@pytest.mark.parametrize("content", [b'[\n {"text": "a"},\n {"text": "b"}\n]\n', b'{\n "text": "a"\n}\n'])
def test_a_json_document_over_several_lines_gets_the_command_that_converts_it(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:1: malformed JSON") as caught:
        _read(_file(tmp_path, content))
    assert caught.value.problems[0].fix.startswith("write one object a line: jq -c '.[]' in.json > out.jsonl")


def test_a_cut_off_last_line_follows_the_policy(tmp_path: Path) -> None:
    path = _file(tmp_path, _lines("a", "b", "c")[:-5])
    with pytest.raises(DataError, match=r"data\.jsonl:3: malformed JSON"):
        _read(path)
    texts, counts = _read(path, policy="skip")
    assert texts == ["a", "b"]
    assert counts.skipped == {"malformed JSON": 1}


def test_many_keys_are_shown_in_part(tmp_path: Path) -> None:
    path = _file(tmp_path, json.dumps({f"k{index}": 0 for index in range(20)}).encode())
    with pytest.raises(DataError) as caught:
        _read(path)
    shown = ", ".join(f"'k{index}'" for index in range(12))
    assert str(caught.value) == f"{path}:1: no key 'text'; keys found: {shown}, ..."


def test_long_keys_are_shown_in_part(tmp_path: Path) -> None:
    path = _file(tmp_path, json.dumps({"k" * 3000: 0}).encode())
    with pytest.raises(DataError) as caught:
        _read(path)
    assert str(caught.value) == f"{path}:1: no key 'text'; keys found: '{'k' * 60}'"


def test_counts_add_up() -> None:
    counts = DocumentCounts(1, 2, 3, {"a": 4})
    counts.add(DocumentCounts(10, 20, 30, {"a": 40, "b": 50}))
    assert counts == DocumentCounts(11, 22, 33, {"a": 44, "b": 50})


# --- Plain text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [bytes, gzip.compress, _zstd], ids=["plain", "gzip", "zstd"])
def test_a_text_file_is_one_document_as_it_is(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    text = '  first\r\n\n{"text": "no record"}\u2028\t\nlast \n\n'
    for content in (text.encode(), BOM + text.encode()):
        assert _read(_file(tmp_path, pack(content), "a.txt")) == ([text], DocumentCounts(documents=1))


def test_only_one_bom_of_a_text_file_is_dropped(tmp_path: Path) -> None:
    assert _read(_file(tmp_path, BOM + BOM + b"a", "a.txt"))[0] == ["\ufeffa"]


def test_a_text_file_that_is_not_utf8_is_a_bad_record(tmp_path: Path) -> None:
    bad, good = _file(tmp_path, b"ab\xffc", "bad.txt"), _file(tmp_path, b"fine", "good.txt")
    with pytest.raises(DataError) as caught:
        _read(bad)
    assert str(caught.value) == f"{bad}:1: invalid UTF-8 at byte 2 of the file"
    counted = DocumentCounts(documents=1, skipped={"invalid UTF-8": 1})
    assert _read(bad, good, policy="skip") == (["fine"], counted)


@pytest.mark.parametrize("content", [BOM, gzip.compress(b""), _zstd(b"")], ids=["bom only", "gzip", "zstd"])
def test_an_empty_text_file_is_an_empty_text(tmp_path: Path, content: bytes) -> None:
    assert _read(_file(tmp_path, content, "a.txt")) == ([], DocumentCounts(empty=1))


def test_a_cut_off_text_file_is_an_error_under_any_policy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="damaged or cut-off gzip file"):
        _read(_file(tmp_path, gzip.compress(b"text")[:-3], "a.txt.gz"), policy="skip")


# --- Parquet ----------------------------------------------------------------------------------------------------


def _parquet(
    tmp_path: Path, columns: dict[str, Any], row_group_size: int | None = None, name: str = "data.parquet"
) -> Path:
    path = tmp_path / name
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


TEXTS = ["a", "é\u2028\n", "", "\U0001f600", " a "]
COUNTED = DocumentCounts(documents=4, empty=1)
COLUMNS: dict[str, Callable[[], Any]] = {
    "string": lambda: pyarrow.array(TEXTS),
    "large_string": lambda: pyarrow.array(TEXTS, pyarrow.large_string()),
    "dictionary": lambda: pyarrow.array(TEXTS).dictionary_encode(),
    "dictionary of large_string": lambda: pyarrow.array(TEXTS, pyarrow.large_string()).dictionary_encode(),
}


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("name", ["data.parquet", "data.jsonl"])
def test_parquet_is_told_by_content_and_its_texts_are_those_of_json_lines(
    tmp_path: Path, kind: str, name: str
) -> None:
    path = _parquet(tmp_path, {"id": [1, 2, 3, 4, 5], "text": COLUMNS[kind]()}, name=name)
    assert _source(path).format == "parquet"
    assert _read(path) == _read(_file(tmp_path, _lines(*TEXTS), "same.jsonl")) == ([t for t in TEXTS if t], COUNTED)


def test_a_struct_column_is_reached_by_its_path(tmp_path: Path) -> None:
    path = _parquet(
        tmp_path,
        {
            "text": ["WRONG", "WRONG", "WRONG"],
            "a": pyarrow.array([{"b": {"c": "x", "d": 1}}, {"b": {"c": "y", "d": 2}}, {"b": {"c": "z", "d": 3}}]),
        },
    )
    assert _read(path, column="a.b.c")[0] == ["x", "y", "z"]


def test_a_literal_column_name_wins_over_the_path(tmp_path: Path) -> None:
    path = _parquet(tmp_path, {"a": pyarrow.array([{"b": "WRONG"}]), "a.b": ["RIGHT"]})
    assert _read(path, column="a.b")[0] == ["RIGHT"]


@pytest.mark.parametrize(
    ("columns", "column"),
    [
        ({"text": pyarrow.array(["x", None, "y", None])}, "text"),
        ({"text": pyarrow.array(["x", None, "y", None]).dictionary_encode()}, "text"),
        ({"a": pyarrow.array([{"b": "x"}, None, {"b": "y"}, {"b": None}])}, "a.b"),
    ],
    ids=["string", "dictionary", "struct"],
)
def test_nulls_of_parquet_are_bad_records(tmp_path: Path, columns: dict[str, Any], column: str) -> None:
    path = _parquet(tmp_path, columns)
    with pytest.raises(DataError) as caught:
        _read(path, column=column)
    assert str(caught.value) == f"{path}:2: {column!r} holds null, not text"
    counted = DocumentCounts(documents=2, skipped={"text not a string": 2})
    assert _read(path, column=column, policy="skip") == (["x", "y"], counted)


@pytest.mark.parametrize("column", ["text", "a.c", "a.b.c", "id.b", "none.b"])
def test_a_column_that_is_not_there_is_an_error_under_any_policy(tmp_path: Path, column: str) -> None:
    path = _parquet(tmp_path, {"id": [1], "a": pyarrow.array([{"b": "x"}])})
    with pytest.raises(DataError) as caught:
        _read(path, column=column, policy="skip")
    assert str(caught.value) == f"{path}: no column {column!r}; columns found: 'id', 'a'"
    assert caught.value.problems[0].fix == "set data.text_column to the column that holds the text"


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (pyarrow.array([1]), "int64"),
        (pyarrow.array([b"x"]), "binary"),
        (pyarrow.array([["x"]]), "list<element: string>"),
        (pyarrow.array([1]).dictionary_encode(), "int64"),
        (pyarrow.array([{"b": "x"}]), "struct<b: string>"),
        (pyarrow.nulls(1), "null"),
    ],
    ids=["int", "binary", "list", "dictionary", "struct", "null"],
)
def test_a_column_that_is_no_text_is_an_error_under_any_policy(tmp_path: Path, values: Any, shown: str) -> None:
    path = _parquet(tmp_path, {"text": values})
    with pytest.raises(DataError) as caught:
        _read(path, policy="skip")
    assert str(caught.value) == f"{path}: the column 'text' holds {shown}, not text"


def _invalid_strings(*values: bytes) -> Any:
    """A string column of any bytes: pyarrow does not look at them."""
    ends = [0]
    for value in values:
        ends.append(ends[-1] + len(value))
    offsets = b"".join(end.to_bytes(4, "little") for end in ends)
    buffers = pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"".join(values))
    return pyarrow.StringArray.from_buffers(len(values), *buffers)


def test_invalid_utf8_of_parquet_is_a_bad_record(tmp_path: Path) -> None:
    path = _parquet(tmp_path, {"text": _invalid_strings(b"a", b"b\xff", b"c", b"\xed\xa0\x80", b"d")})
    with pytest.raises(DataError) as caught:
        _read(path)
    assert str(caught.value) == f"{path}:2: invalid UTF-8 at byte 1 of the text"
    assert _read(path, policy="skip") == (
        ["a", "c", "d"],
        DocumentCounts(documents=3, skipped={"invalid UTF-8": 2}),
    )


@pytest.mark.parametrize("left", [4, 50, 300, -1])
def test_a_damaged_parquet_file_is_an_error_under_any_policy(tmp_path: Path, left: int) -> None:
    whole = _parquet(tmp_path, {"text": [f"text {index}" for index in range(1000)]}).read_bytes()
    path = _file(tmp_path, whole[:left], "cut.parquet")
    with pytest.raises(DataError) as caught:
        _read(path, policy="skip")
    assert str(caught.value).startswith(f"data.path: {path} is a damaged Parquet file: ")


def test_whole_row_groups_that_are_skipped_are_not_read(tmp_path: Path) -> None:
    """The first row group's pages are destroyed, so that reading it fails."""
    path = _parquet(tmp_path, {"text": [f"t{index}" for index in range(30)]}, row_group_size=10)
    chunk = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0)
    content = bytearray(path.read_bytes())
    first = chunk.dictionary_page_offset or chunk.data_page_offset
    content[first : first + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
    source = _source(path)
    assert [record.text for record in RecordReader(source, "text", skip=10)] == [f"t{n}" for n in range(10, 30)]
    assert [record.number for record in RecordReader(source, "text", skip=25)] == [26, 27, 28, 29, 30]
    with pytest.raises(DataError, match="damaged Parquet file"):
        list(RecordReader(source, "text", skip=9))


def test_a_parquet_file_without_rows_has_no_records(tmp_path: Path) -> None:
    path = _parquet(tmp_path, {"text": pyarrow.array([], pyarrow.string())})
    assert list(RecordReader(_source(path), "text")) == []


# --- From any place on ------------------------------------------------------------------------------------------


def _random_lines(seed: int) -> bytes:
    """12 lines: blank and bad ones, CRLF, a BOM or none, characters of 1 to 4 bytes, a last newline or none."""
    source = random.Random(seed)
    kinds = ["", " ", "{", '{"t":"a"}', '{"t":"é"}', '{"t":"\u2028"}', '{"t":"\U0001f600"}', '{"t":""}', "5"]
    ends = [source.choice(["\n", "\n", "\r\n"]) for _ in range(12)]
    ends[-1] = source.choice(["", "\n"])
    content = "".join(source.choice(kinds) + end for end in ends).encode()
    return (BOM if seed % 2 else b"") + content


def _expected(content: bytes) -> list[tuple[int, int, int, Any]]:
    """(byte at which it begins, line, size, text) of each record of a file of `_random_lines`."""
    found, begin = [], 0
    for number, line in enumerate(content.split(b"\n"), 1):
        size = min(len(line) + 1, len(content) - begin)
        bare = line.removeprefix(BOM) if begin == 0 else line
        if size and bare.strip():
            try:
                value = json.loads(bare)
                text = value["t"] if isinstance(value, dict) else "not an object"
            except ValueError:
                text = "malformed JSON"
            found.append((begin, number, size, text))
        begin += size
    return found


def _shown(records: Iterable[Record], before: int = 0) -> list[tuple[int, int, Any]]:
    return [
        (before + record.number, record.size, record.text.kind if isinstance(record.text, BadRecord) else record.text)
        for record in records
    ]


@pytest.mark.parametrize("seed", range(4))
def test_any_range_of_a_file_has_the_lines_that_begin_in_it(tmp_path: Path, seed: int) -> None:
    """So that every way to cut a file in ranges gives each record once, under its line number in the file."""
    content = _random_lines(seed)
    path = _file(tmp_path, content)
    source, expected = _source(path), _expected(content)
    begins = [0, *(place + 1 for place, byte in enumerate(content[:-1]) if byte == ord("\n"))]
    assert len(begins) == 12
    assert len(expected) > 4
    for start in range(len(content)):
        before = line_of_byte(path, start)
        assert before == sum(begin < start for begin in begins)
        for end in (*range(start + 1, len(content) + 2), None):
            last = len(content) if end is None else end
            reader = RecordReader(source, "t", start, end)
            wanted = [tuple(record[1:]) for record in expected if start <= record[0] < last]
            assert _shown(reader, before) == wanted, (start, end)
            assert reader.lines == sum(start <= begin < last for begin in begins), (start, end)


def test_a_range_can_be_entered_after_any_number_of_its_lines(tmp_path: Path) -> None:
    content = _random_lines(1)
    source = _source(_file(tmp_path, content))
    for start in range(0, len(content), 7):
        for end in range(start + 1, len(content) + 1, 5):
            whole = _shown(RecordReader(source, "t", start, end))
            lines = RecordReader(source, "t", start, end)
            list(lines)
            for skip in range(14):
                reader = RecordReader(source, "t", start, end, skip)
                assert _shown(reader) == [record for record in whole if record[0] > skip], (start, end, skip)
                assert reader.lines == lines.lines


def test_the_lines_before_a_byte_are_counted_over_many_blocks(tmp_path: Path) -> None:
    line = b"x" * 999 + b"\n"
    path = _file(tmp_path, line * 3000)
    places = [0, 1, 999, 1000, 1001, 2**20, 2**20 + 1, 2**20 + 2, 2 * 2**20 + 1, 2_999_000, 2_999_001, 2_999_999]
    assert [line_of_byte(path, place) for place in places] == [-(-place // 1000) for place in places]


def _as_files(tmp_path: Path) -> list[SourceFile]:
    lines = b"\n" + _lines("a", "", "b") + b"[1]\n\r\n" + _lines("c", "d").removesuffix(b"\n")
    rows = ["a", "", "b", None, "c", "d", "e"]
    files = [
        _file(tmp_path, lines, "plain.jsonl"),
        _file(tmp_path, gzip.compress(lines[:20]) + gzip.compress(lines[20:]), "a.jsonl.gz"),
        _file(tmp_path, _zstd(lines[:20]) + SKIPPABLE + _zstd(lines[20:]), "a.jsonl.zst"),
        _file(tmp_path, b"a text", "a.txt"),
        _parquet(tmp_path, {"text": rows}, row_group_size=3),
        _parquet(tmp_path, {"text": rows}, row_group_size=1, name="rows.parquet"),
        _parquet(tmp_path, {"text": [f"row {number}" for number in range(2500)]}, name="large.parquet"),
    ]
    return [_source(path) for path in files]


def test_reading_goes_on_exactly_after_any_number_of_records(tmp_path: Path) -> None:
    for file in _as_files(tmp_path):
        reader = RecordReader(file, "text")
        whole = list(reader)
        lines = reader.lines
        assert whole
        skips = range(lines + 2) if lines < 100 else (0, 1, 1023, 1024, 1025, 2047, 2499, 2500, 2501)
        for skip in skips:
            later = RecordReader(file, "text", skip=skip)
            assert list(later) == [record for record in whole if record.number > skip], (file.path.name, skip)
            assert skip >= lines or later.lines == lines


def test_the_position_grows_up_to_the_size_of_the_file(tmp_path: Path) -> None:
    """What progress is computed from; at the end it must not fall back to 0."""
    for file in _as_files(tmp_path):
        reader = RecordReader(file, "text")
        positions = [reader.position]
        for _ in reader:
            positions.append(reader.position)
        positions.append(reader.position)
        assert positions[0] == 0
        assert positions == sorted(positions), file.path.name
        assert positions[-1] == file.size, file.path.name


def test_the_position_in_a_range_grows_up_to_the_size_of_the_range(tmp_path: Path) -> None:
    """Reading is ahead by a buffer, so nothing is said about the way there."""
    content = _lines(*(f"text {number}" for number in range(100)))
    reader = RecordReader(_source(_file(tmp_path, content)), "text", 500, 1500)
    texts = [record.text for record in reader]
    assert len(texts) > 30
    assert 1000 <= reader.position <= 1000 + 2 * len(_lines("text 10"))  # the last line, and one to see that it was
