"""Files -> texts: line ends, encodings, compression, bad lines, and which files a path means."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Literal

import pytest

from eulerforge.data.sources import DocumentCounts, iter_documents, resolve_files
from eulerforge.errors import DataError

BOM = b"\xef\xbb\xbf"
LINE = b'{"text": "ok"}\n'


def _read(
    *files: Path, column: str = "text", policy: Literal["error", "skip"] = "error"
) -> tuple[list[str], DocumentCounts]:
    counts = DocumentCounts()
    return list(iter_documents(files, column, policy, counts)), counts


def _file(tmp_path: Path, content: bytes, name: str = "data.jsonl") -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


@pytest.mark.parametrize("marked", [(True, False), (False, True), (True, True)])
def test_one_bom_at_the_start_of_any_file_is_dropped(tmp_path: Path, marked: tuple[bool, bool]) -> None:
    files = [
        _file(tmp_path, (BOM if bom else b"") + _lines(f"a{index}", f"b{index}"), f"{index}.jsonl")
        for index, bom in enumerate(marked)
    ]
    texts, counts = _read(*files)
    assert texts == ["a0", "b0", "a1", "b1"]
    assert counts == DocumentCounts(documents=4)


def test_a_bom_inside_a_gzip_file_is_dropped_and_one_inside_a_text_is_kept(tmp_path: Path) -> None:
    assert _read(_file(tmp_path, gzip.compress(BOM + _lines("\ufeffa"))))[0] == ["\ufeffa"]


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


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_gzip_is_told_by_content_not_by_name(tmp_path: Path, name: str) -> None:
    content = _lines("a", "b")
    members = gzip.compress(_lines("a")) + gzip.compress(b"") + gzip.compress(_lines("b"))
    for stored in (content, gzip.compress(content), members, members + b"\0" * 64):
        assert _read(_file(tmp_path, stored, name))[0] == ["a", "b"]


def test_a_line_may_span_two_gzip_members(tmp_path: Path) -> None:
    content = _lines("a", "b")
    assert _read(_file(tmp_path, gzip.compress(content[:5]) + gzip.compress(content[5:])))[0] == ["a", "b"]


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
    texts = ["null", "NaN", "1", "true", " ", "007", "[]"]
    assert _read(_file(tmp_path, _lines(*texts))) == (texts, DocumentCounts(documents=7))


def test_other_keys_are_never_inspected(tmp_path: Path) -> None:
    meta = ["null", '{"a": 1}', "[1]", '"x"', "1e999", "NaN", "1" * 5000]
    content = "".join(f'{{"meta": {value}, "text": "t{index}"}}\n' for index, value in enumerate(meta))
    assert _read(_file(tmp_path, content.encode()))[0] == [f"t{index}" for index in range(len(meta))]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "WRONG", "body": {"en": "RIGHT"}}, "RIGHT"),
        ({"body.en": "RIGHT", "body": {"en": "WRONG"}}, "RIGHT"),
        ({"body": {"en": "RIGHT", "fr": "WRONG"}}, "RIGHT"),
    ],
)
def test_nested_column_and_the_literal_key_that_wins(
    tmp_path: Path, record: dict[str, object], expected: str
) -> None:
    assert _read(_file(tmp_path, json.dumps(record).encode()), column="body.en")[0] == [expected]


def test_a_literal_key_wins_even_when_its_value_is_no_text(tmp_path: Path) -> None:
    """Falling through to the nested key would mix two columns in one corpus."""
    path = _file(tmp_path, b'{"a.b": null, "a": {"b": "x"}}')
    with pytest.raises(DataError, match=r"'a\.b' holds null, not text"):
        _read(path, column="a.b")


def test_empty_texts_are_counted_and_dropped(tmp_path: Path) -> None:
    assert _read(_file(tmp_path, _lines("", "a", "", "b"))) == (["a", "b"], DocumentCounts(documents=2, empty=2))


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
    assert caught.value.problems[0].fix


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
        "invalid UTF-8": 1,
        "nested too deeply": 1,
    }


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


def test_there_is_no_limit_on_the_length_of_a_line(tmp_path: Path) -> None:
    long = "0123456789" * 500_000
    assert _read(_file(tmp_path, _lines("a", long, "b")))[0] == ["a", long, "b"]


def test_a_directory_means_its_jsonl_files_at_any_depth_in_order(tmp_path: Path) -> None:
    wanted = ["B.JSONL", "a.jsonl", "b.json", "c.ndjson.gz", "sub/deep/a.jsonl.gz", "sub/z.ndjson"]
    for name in reversed(wanted):
        _file(tmp_path, LINE, name)
    for name in ("README.md", "notes.txt", "jsonl"):
        _file(tmp_path, b"x", name)
    assert resolve_files(str(tmp_path)) == tuple(tmp_path / name for name in wanted)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("[ab].jsonl", ["a.jsonl", "b.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "sub/c.jsonl"]),
        ("*", ["a.jsonl", "b.jsonl", "c.txt"]),
        ("c.txt", ["c.txt"]),
    ],
)
def test_a_glob_means_its_files_in_order(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt", "sub/c.jsonl"):
        _file(tmp_path, LINE, name)
    assert resolve_files(f"{tmp_path}/{pattern}") == tuple(tmp_path / name for name in expected)


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    path = _file(tmp_path, LINE, "data[1].jsonl")
    _file(tmp_path, LINE, "data1.jsonl")
    assert resolve_files(str(path)) == (path,)


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _file(tmp_path, LINE)
    monkeypatch.chdir(tmp_path)
    assert resolve_files("data.jsonl") == resolve_files("*.jsonl") == (path,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("none.jsonl", "{root}/none.jsonl does not exist"),
        ("none/*.jsonl", "the glob {root}/none/*.jsonl matches no file"),
        ("folder", "the directory {root}/folder holds no .jsonl, .ndjson, .json file (plain or .gz)"),
        ("empty.jsonl", "{root}/empty.jsonl is empty"),
        ("data.jsonl.zst", "{root}/data.jsonl.zst is a zstd file, which this version cannot read"),
        ("misnamed.jsonl", "{root}/misnamed.jsonl is a zstd file, which this version cannot read"),
        ("data.parquet", "{root}/data.parquet is a Parquet file, which this version cannot read"),
    ],
)
def test_paths_that_cannot_be_read(tmp_path: Path, given: str, message: str) -> None:
    _file(tmp_path, b"x", "folder/notes.txt")
    _file(tmp_path, b"", "empty.jsonl")
    _file(tmp_path, b"\x28\xb5\x2f\xfd....", "data.jsonl.zst")
    _file(tmp_path, b"\x28\xb5\x2f\xfd....", "misnamed.jsonl")
    _file(tmp_path, b"PAR1....", "data.parquet")
    with pytest.raises(DataError) as caught:
        resolve_files(f"{tmp_path}/{given}")
    assert str(caught.value) == "data.path: " + message.format(root=tmp_path)


@pytest.mark.parametrize(("name", "magic"), [("b.jsonl.zst", b"\x28\xb5\x2f\xfd"), ("b.parquet", b"PAR1")])
def test_unreadable_shards_of_a_directory_are_not_left_out_silently(tmp_path: Path, name: str, magic: bytes) -> None:
    """Training on the readable half of a corpus without a word is worse than an error."""
    _file(tmp_path, LINE, "a.jsonl")
    _file(tmp_path, magic + b"....", name)
    with pytest.raises(DataError, match=name):
        resolve_files(str(tmp_path))
