"""Token ids that other tools have written: where documents end, how wide ids are, and what is refused."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from eulerforge.data import token_files
from eulerforge.data.build import Report
from eulerforge.data.cache import CacheSpec, Voice, open_or_build
from eulerforge.data.manifest import TokenCache, open_manifest
from eulerforge.data.readers import DocumentCounts
from eulerforge.data.sources import SourceFile, resolve_files
from eulerforge.data.token_files import TokenFile, describe, index_of
from eulerforge.data.tokens import TokenStream
from eulerforge.errors import DataError

EOS = 256
LARGEST = 60_000


class _Bytes:
    """One id per byte."""

    fingerprint = "bytes"
    serialized = None
    largest_id = LARGEST

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def encode_long(self, text: str) -> npt.NDArray[np.uint32]:
        raise AssertionError("no long texts here")


def _write(path: Path, documents: Sequence[Sequence[int]], dtype: str = "<u2") -> Path:
    """The ids of all documents and nothing else."""
    path.write_bytes(np.array([token for ids in documents for token in ids], dtype=dtype).tobytes())
    return path


def _write_table(path: Path, rows: Sequence[object]) -> Path:
    """Beside a token file, as `dolma tokens` does; a row that is no text is (start, end)."""
    lines = [
        row if isinstance(row, str) else "{0},{1},doc-{2},s3://bucket/a.jsonl.gz,{2}".format(*row, number)  # type: ignore[misc]
        for number, row in enumerate(rows, 1)
    ]
    table = path.with_name(path.name.removesuffix(".npy") + ".csv.gz")
    table.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))
    return table


def _with_table(path: Path, documents: Sequence[Sequence[int]], dtype: str = "<u2") -> Path:
    rows, end = [], 0
    for ids in documents:
        rows.append((end, end + len(ids)))
        end += len(ids)
    _write_table(path, rows)
    return _write(path, documents, dtype)


def _open(
    tmp_path: Path,
    *paths: Path,
    separator: int | None = EOS,
    token_dtype: str | None = None,
    folder: str = "cache",
    report: Report = lambda size, documents, tokens: None,
    **changes: Any,
) -> TokenCache:
    @contextlib.contextmanager
    def progress(total: int) -> Iterator[Report]:
        yield report

    # Among others an empty file is fine; alone it is refused when it is looked for.
    files = [resolve_files(str(path))[0] if path.stat().st_size else _empty(path) for path in paths]
    spec = CacheSpec(
        tuple(files),
        "text",
        "error",
        bos_id=None,
        eos_id=EOS,
        separator=separator,
        token_dtype=token_dtype,
        **changes,
    )
    voice = Voice(lambda line: None, progress)
    return open_or_build(spec, _Bytes(), tmp_path / folder, lambda stream: None, voice)


def _empty(path: Path) -> SourceFile:
    return SourceFile(path, "npy" if path.suffix == ".npy" else "bin", "none", 0, path.stat().st_mtime_ns)


def _documents(stream: TokenStream) -> list[list[int]]:
    starts = [stream.document_start(document) for document in range(stream.documents + 1)]
    return [stream.read(starts[number], starts[number + 1]).tolist() for number in range(stream.documents)]


def _locations(stream: TokenStream) -> list[tuple[int, int]]:
    return [stream.location(document) for document in range(stream.documents)]


DOCUMENTS = [[*b"ab", EOS], [EOS], [*b"c", EOS], [1000, EOS, 7, EOS], [LARGEST], [0, 0]]
"""As a table may have them: an EOS inside a document, some without one at the end."""

SPLIT = [[*b"ab", EOS], [EOS], [*b"c", EOS], [1000, EOS], [7, EOS], [LARGEST, 0, 0]]
"""The same ids where each EOS ends a document."""


# --- What is read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("given", [False, True])
def test_a_raw_map_with_its_table_has_the_documents_of_the_table(tmp_path: Path, dtype: str, given: bool) -> None:
    path = _with_table(tmp_path / "part-0-00000.npy", DOCUMENTS, dtype)
    opened = _open(tmp_path, path, token_dtype=dtype if given else None)
    assert _documents(opened.stream) == DOCUMENTS
    assert _locations(opened.stream) == [(0, number) for number in range(1, 7)]
    assert opened.counts == DocumentCounts(documents=6)


def test_documents_without_tokens_keep_their_place(tmp_path: Path) -> None:
    documents: list[list[int]] = [[], [1, 2], [], [], [3], []]
    opened = _open(tmp_path, _with_table(tmp_path / "a.npy", documents))
    assert _documents(opened.stream) == documents


@pytest.mark.parametrize(
    ("name", "dtype"), [("a.npy", "uint16"), ("a.npy", "uint32"), ("a.bin", "uint16"), ("a.bin", "uint32")]
)
def test_raw_ids_without_a_table_are_split_at_each_eos(tmp_path: Path, name: str, dtype: str) -> None:
    path = _write(tmp_path / name, DOCUMENTS, dtype)
    opened = _open(tmp_path, path, token_dtype=dtype)
    assert _documents(opened.stream) == SPLIT
    assert _locations(opened.stream) == [(0, number) for number in range(1, 7)]


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<u4", "<i4", "<u8", ">i8"])
def test_numpy_files_say_how_wide_their_ids_are(tmp_path: Path, dtype: str) -> None:
    ids = np.array([token for document in DOCUMENTS for token in document], dtype=dtype)
    np.save(tmp_path / "a.npy", ids)
    (tmp_path / "ids.jsonl").write_bytes((tmp_path / "a.npy").read_bytes())
    for name in ("a.npy", "ids.jsonl"):
        opened = _open(tmp_path, tmp_path / name, token_dtype="uint32")
        assert _documents(opened.stream) == SPLIT
        assert [np.dtype(shard.dtype) for shard in opened.stream.shards] == [np.dtype(dtype)]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("ids", "documents"),
    [
        ([1, 2, EOS, 3, EOS], [[1, 2, EOS], [3, EOS]]),
        ([EOS, EOS, 5], [[EOS], [EOS], [5]]),
        ([1, 2, 3, 4], [[1, 2, 3, 4]]),
        ([1, 2, 3, 4, 5, EOS], [[1, 2, 3, 4, 5, EOS]]),
    ],
)
def test_documents_end_at_eos_wherever_a_block_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, ids: list[int], documents: list[list[int]]
) -> None:
    monkeypatch.setattr(token_files, "_BLOCK", block)
    opened = _open(tmp_path, _write(tmp_path / "a.bin", [ids]), token_dtype="uint16")
    assert _documents(opened.stream) == documents


def test_without_an_eos_a_file_is_one_document(tmp_path: Path) -> None:
    ids = [1, EOS, 0, 3]
    opened = _open(tmp_path, _write(tmp_path / "a.bin", [ids]), token_dtype="uint16", separator=None)
    assert _documents(opened.stream) == [ids]


@pytest.mark.parametrize("changes", [{}, {"bos_id": 5}, {"eos_id": None}])
def test_the_policy_on_bos_and_eos_adds_nothing(tmp_path: Path, changes: dict[str, int | None]) -> None:
    path = _with_table(tmp_path / "a.npy", DOCUMENTS)
    file = resolve_files(str(path))
    policy = {"bos_id": None, "eos_id": EOS} | changes
    spec = CacheSpec(file, "text", "error", separator=EOS, **policy)  # type: ignore[arg-type]
    voice = Voice(lambda line: None, lambda total: contextlib.nullcontext(lambda size, documents, tokens: None))
    opened = open_or_build(spec, _Bytes(), tmp_path / "cache", lambda stream: None, voice)
    assert _documents(opened.stream) == DOCUMENTS


def test_ids_are_used_in_place(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([1, EOS], dtype=np.uint16))
    paths = [tmp_path / "a.npy", _write(tmp_path / "b.npy", [[2, 3, EOS]])]
    _write_table(paths[1], [(0, 3)])
    before = [path.read_bytes() for path in paths]
    opened = _open(tmp_path, *paths)
    assert [(shard.tokens_file, shard.header) for shard in opened.stream.shards] == [(paths[0], 128), (paths[1], 0)]
    names = sorted(path.name for path in (tmp_path / "cache" / "shards").glob("*/*"))
    assert names == ["ends.bin", "ends.bin", "lines.bin", "lines.bin", "shard.json", "shard.json"]
    assert [path.read_bytes() for path in paths] == before


def test_token_files_and_texts_make_one_corpus(tmp_path: Path) -> None:
    text = tmp_path / "b.jsonl"
    text.write_text('{"text": "ab"}\n{"text": "c"}\n')
    path = _with_table(tmp_path / "a.npy", [[7, EOS], [8]], "uint32")
    told: list[tuple[int, int, int]] = []
    opened = _open(tmp_path, path, text, report=lambda *values: told.append(values))
    assert _documents(opened.stream) == [[7, EOS], [8], [*b"ab", EOS], [*b"c", EOS]]
    assert _locations(opened.stream) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [shard.dtype for shard in opened.stream.shards] == ["<u4", "<u2"]
    assert [sum(values) for values in zip(*told, strict=True)] == [12 + text.stat().st_size, 4, 8]


def test_the_digest_is_that_of_the_same_documents_as_texts(tmp_path: Path) -> None:
    """With `add_eos`, since the tool that wrote the ids has put an EOS after each document."""
    texts = ["ab", "c", "é"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ids = [[*text.encode(), EOS] for text in texts]
    digests = {
        _open(tmp_path, path).digest,
        _open(tmp_path, _with_table(tmp_path / "b.npy", ids)).digest,
        _open(tmp_path, _with_table(tmp_path / "c.npy", ids, "uint32")).digest,
        _open(tmp_path, _write(tmp_path / "d.bin", ids), token_dtype="uint16").digest,
    }
    assert len(digests) == 1


# --- The table --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["mtime", "content"])
def test_another_table_makes_another_cache(tmp_path: Path, verify: Any) -> None:
    path = _with_table(tmp_path / "a.npy", [[1, 2], [3, 4]])
    first = _open(tmp_path, path, verify=verify)
    assert _open(tmp_path, path, verify=verify).reused is True
    _write_table(path, [(0, 1), (1, 4)])
    second = _open(tmp_path, path, verify=verify)
    index_of(path).unlink()  # type: ignore[union-attr]
    third = _open(tmp_path, path, verify=verify, token_dtype="uint16")
    assert [opened.reused for opened in (first, second, third)] == [False] * 3
    assert [_documents(opened.stream) for opened in (first, second, third)] == [
        [[1, 2], [3, 4]],
        [[1], [2, 3, 4]],
        [[1, 2, 3, 4]],
    ]


@pytest.mark.parametrize(("verify", "reused"), [("mtime", False), ("content", True)])
def test_a_token_file_is_known_by_time_or_content(tmp_path: Path, verify: Any, reused: bool) -> None:
    path = _with_table(tmp_path / "a.npy", [[1, 2], [3, 4]])
    _open(tmp_path, path, verify=verify)
    os.utime(path, (0, 0))
    assert _open(tmp_path, path, verify=verify).reused is reused


def test_where_the_table_of_a_file_is(tmp_path: Path) -> None:
    table = _write_table(tmp_path / "a.npy", [])
    assert index_of(tmp_path / "a.npy") == table
    assert index_of(tmp_path / "a.bin") is None
    assert index_of(tmp_path / "b.npy") is None


def test_the_rows_of_a_table(tmp_path: Path) -> None:
    table = _write_table(tmp_path / "a.npy", [(0, 3), '3,5,"id, quoted",s3://b,9'])
    assert list(token_files.table_rows(table)) == [
        ["0", "3", "doc-1", "s3://bucket/a.jsonl.gz", "1"],
        ["3", "5", "id, quoted", "s3://b", "9"],
    ]


ODD = "a document begins at token {0}, and the one before ends at {1}"
TOGETHER = "copy both files again; they belong together"
TABLES: dict[str, tuple[list[object], str, str]] = {
    # rows for 6 tokens, message, advice
    "begins late": (
        [(1, 6)],
        "{table}: " + ODD.format(1, 0),
        "remove a.csv.gz to take each EOS token for the end of",
    ),
    "gap": ([(0, 2), (3, 6)], "{table}: " + ODD.format(3, 2), "remove a.csv.gz"),
    "overlap": ([(0, 3), (2, 6)], "{table}: " + ODD.format(2, 3), "remove a.csv.gz"),
    "backwards": ([(0, 3), (3, 2), (2, 6)], "{table}: a document begins at token 3", "remove a.csv.gz"),
    "too short": ([(0, 2), (2, 5)], "{table} names 5 tokens, and {path} has 6", TOGETHER),
    "too long": ([(0, 2), (2, 7)], "{table} names 7 tokens, and {path} has 6", TOGETHER),
    "empty": ([], "{table} names 0 tokens, and {path} has 6", TOGETHER),
    "header": (["start,end,id,src,loc", (0, 6)], "{table} is not a table of documents: invalid literal", "remove it"),
    "one column": (["0"], "{table} is not a table of documents: list index out of range", "remove it"),
    "fractions": (["0,6.0,a,b,1"], "{table} is not a table of documents: invalid literal", "remove it"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    rows, message, advice = TABLES[case]
    path = _write(tmp_path / "a.npy", [[1, 2, 3, 4, 5, 6]])
    table = _write_table(path, rows)
    with pytest.raises(DataError) as caught:
        _open(tmp_path, path, token_dtype="uint16")
    assert str(caught.value).startswith("data.path: " + message.format(table=table, path=path))
    assert caught.value.problems[0].fix.startswith(advice)
    assert not (tmp_path / "cache").exists()


DAMAGES = ["no gzip", "cut", "checksum", "bits flipped", "latin-1"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("token_dtype", [None, "uint16"])
def test_a_damaged_table_is_refused(tmp_path: Path, damage: str, token_dtype: str | None) -> None:
    path = _with_table(tmp_path / "a.npy", [[number] for number in range(500)])
    table = tmp_path / "a.csv.gz"
    whole = table.read_bytes()
    table.write_bytes(
        {
            "no gzip": b"0,500,a,b,1\n",
            "cut": whole[:-20],
            "checksum": whole[:-8] + bytes(8),
            "bits flipped": whole[:20] + bytes(byte ^ 255 for byte in whole[20:60]) + whole[60:],
            "latin-1": gzip.compress(b"0,500,\xe9,b,1\n"),
        }[damage]
    )
    with pytest.raises(DataError) as caught:
        _open(tmp_path, path, token_dtype=token_dtype)
    assert str(caught.value).startswith(f"data.path: {table} is not a table of documents: ")
    assert caught.value.problems[0].fix == "remove it"


@pytest.mark.parametrize(("size", "rows"), [(5, [(0, 3)]), (9, [(0, 3)]), (24, [(0, 3)]), (6, [])])
def test_a_size_that_no_width_explains_is_refused(tmp_path: Path, size: int, rows: list[object]) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(bytes(size))
    table = _write_table(path, rows)
    with pytest.raises(DataError) as caught:
        _open(tmp_path, path)
    assert str(caught.value) == (f"data.path: {table} names {3 * len(rows)} tokens, and {path} has {size} bytes")
    assert caught.value.problems[0].fix == TOGETHER


# --- What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.npy", "a.bin"])
def test_raw_ids_of_unknown_width_are_refused(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path / name, DOCUMENTS)
    with pytest.raises(DataError) as caught:
        _open(tmp_path, path)
    assert str(caught.value) == f"data.path: {path} holds raw token ids, and their size is not known"
    assert caught.value.problems[0].fix == "set data.token_dtype: uint16 or uint32, as they were written"


@pytest.mark.parametrize(
    ("size", "dtype", "shown"),
    [(3, "uint16", "3"), (1001, "uint16", "1,001"), (6, "uint32", "6"), (2, "uint32", "2")],
)
def test_a_cut_off_file_is_refused(tmp_path: Path, size: int, dtype: str, shown: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"\1" * size)
    with pytest.raises(DataError) as caught:
        _open(tmp_path, path, token_dtype=dtype)
    assert str(caught.value) == f"data.path: {path} has {shown} bytes, which is no whole number of {dtype}"
    assert caught.value.problems[0].fix == "correct data.token_dtype, or copy the file again"


@pytest.mark.parametrize(
    ("array", "shown"),
    [
        (np.zeros(3), "float64 of shape (3,)"),
        (np.zeros((2, 3), dtype=np.uint16), "uint16 of shape (2, 3)"),
        (np.zeros((), dtype=np.uint16), "uint16 of shape ()"),
        (np.zeros(3, dtype=np.uint8), "uint8 of shape (3,)"),
        (np.zeros(3, dtype=bool), "bool of shape (3,)"),
    ],
)
def test_arrays_that_are_no_row_of_ids_are_refused(tmp_path: Path, array: npt.NDArray[Any], shown: str) -> None:
    path = tmp_path / "a.npy"
    np.save(path, array)
    with pytest.raises(DataError) as caught:
        _open(tmp_path, path)
    assert str(caught.value) == f"data.path: {path} holds {shown}, not one row of token ids"
    assert caught.value.problems[0].fix == "write ids as one dimension of uint16 or uint32"


@pytest.mark.parametrize("damage", ["header", "magic only", "data", "objects"])
def test_a_damaged_numpy_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(10, dtype=np.uint16))
    whole = path.read_bytes()
    if damage == "objects":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    else:
        path.write_bytes({"header": whole[:40], "magic only": whole[:6], "data": whole[:-2]}[damage])
    with pytest.raises(DataError) as caught:
        _open(tmp_path, path)
    assert str(caught.value).startswith(f"data.path: {path} is a damaged .npy file: ")
    assert caught.value.problems[0].fix == "write it again"


@pytest.mark.parametrize(
    ("documents", "dtype", "shown", "number"),
    [
        ([[LARGEST], [1, LARGEST + 1, 0]], "<u2", LARGEST + 1, 2),
        ([[2**32 - 1]], "<u4", 2**32 - 1, 1),
        ([[1], [2], [-1]], "<i4", -1, 3),
        ([[-5, LARGEST + 9]], "<i8", -5, 1),
    ],
)
def test_ids_that_the_tokenizer_does_not_have_are_refused(
    tmp_path: Path, documents: list[list[int]], dtype: str, shown: int, number: int
) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([token for ids in documents for token in [*ids, EOS]], dtype=dtype))
    with pytest.raises(DataError) as caught:
        _open(tmp_path, path)
    assert str(caught.value) == (
        f"data.path: {path} holds the id {shown} in document {number}, and the tokenizer's largest is {LARGEST}"
    )
    assert "data.token_dtype" in caught.value.problems[0].fix
    assert not (tmp_path / "cache").exists()


def test_the_wrong_width_is_noticed_by_its_ids(tmp_path: Path) -> None:
    """Pairs of 16-bit ids read as 32-bit ones."""
    path = _write(tmp_path / "a.bin", [[1, 2, 3, 4]])
    with pytest.raises(DataError, match=f"holds the id {4 * 65536 + 3} in document 1, and"):
        _open(tmp_path, path, token_dtype="uint32")


# --- Empty ------------------------------------------------------------------------------------------------------


def test_an_empty_file_alone_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(0, dtype=np.uint16))
    with pytest.raises(DataError) as caught:
        _open(tmp_path, tmp_path / "a.npy")
    assert str(caught.value) == f"data.path: no usable document in {tmp_path / 'a.npy'}"


@pytest.mark.parametrize("kind", ["numpy", "bin", "raw", "raw with a table"])
def test_an_empty_file_among_others(tmp_path: Path, kind: str) -> None:
    """A process of the tool that got no document leaves one."""
    empty = tmp_path / ("b.bin" if kind == "bin" else "b.npy")
    if kind == "numpy":
        np.save(empty, np.zeros(0, dtype=np.uint16))
    else:
        empty.touch()
    if kind == "raw with a table":
        _write_table(empty, [])
    paths = [_with_table(tmp_path / "a.npy", [[1, EOS]]), empty, _with_table(tmp_path / "c.npy", [[2, 3]])]
    opened = _open(tmp_path, *paths, token_dtype=None if kind == "raw with a table" else "uint16")
    assert _documents(opened.stream) == [[1, EOS], [2, 3]]
    assert _locations(opened.stream) == [(0, 1), (2, 1)]


# --- Later ------------------------------------------------------------------------------------------------------


def test_a_file_that_is_cut_off_later_is_not_opened(tmp_path: Path) -> None:
    path = _with_table(tmp_path / "a.npy", [[1, 2], [3, 4]])
    built = _open(tmp_path, path)
    assert open_manifest(built.path, [path]) is not None
    os.truncate(path, 6)
    assert open_manifest(built.path, [path]) is None


@pytest.mark.parametrize(
    ("dtype", "token_dtype", "expected"),
    [
        ("<u2", None, ("<u2", 3)),
        ("<u4", None, ("<u4", 3)),
        ("<u2", "uint16", ("<u2", 3)),
        ("<u4", "uint16", ("<u2", 6)),
    ],
)
def test_what_a_file_is_taken_for(
    tmp_path: Path, dtype: str, token_dtype: str | None, expected: tuple[str, int]
) -> None:
    path = _with_table(tmp_path / "a.npy", [[1, 2, 3]], dtype)
    (file,) = resolve_files(str(path))
    table = tmp_path / "a.csv.gz"
    assert describe(file, token_dtype) == TokenFile(path, 0, np.dtype(expected[0]), expected[1], table)
