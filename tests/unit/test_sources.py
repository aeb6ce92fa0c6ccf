"""Which files a path means, in which order, and what kind each of them is."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from eulerforge.config.fields import to_data_path
from eulerforge.config.schema import MixtureSource
from eulerforge.data import sources
from eulerforge.data.sources import CorpusPart, SourceFile, resolve_corpus, resolve_files
from eulerforge.errors import DataError

LINE = b'{"text": "ok"}\n'
ZSTD = zstandard.ZstdCompressor().compress(LINE)


def _file(tmp_path: Path, content: bytes, name: str) -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _paths(value: str) -> tuple[Path, ...]:
    return tuple(file.path for file in resolve_files(value))


def _parquet() -> bytes:
    target = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["ok"]}), target)
    return target.getvalue()


def _numpy() -> bytes:
    target = io.BytesIO()
    np.save(target, np.zeros(3, dtype=np.uint16))
    return target.getvalue()


# --- Format and compression -------------------------------------------------------------------------------------

KINDS: list[tuple[str, bytes, str, str]] = [
    # name, content, format, compression
    ("a.jsonl", LINE, "jsonl", "none"),
    ("a.json", LINE, "jsonl", "none"),
    ("a.NDJSON", LINE, "jsonl", "none"),
    ("a", LINE, "jsonl", "none"),
    ("a.log", LINE, "jsonl", "none"),
    ("a.jsonl.gz", gzip.compress(LINE), "jsonl", "gzip"),
    ("a.jsonl", gzip.compress(LINE), "jsonl", "gzip"),
    ("a.jsonl.gz", LINE, "jsonl", "none"),
    ("a.jsonl.zst", ZSTD, "jsonl", "zstd"),
    ("a.jsonl.gz", ZSTD, "jsonl", "zstd"),
    ("a.zst", LINE, "jsonl", "none"),
    ("a.jsonl", b"\x50\x2a\x4d\x18\x00\x00\x00\x00" + ZSTD, "jsonl", "zstd"),
    ("a.jsonl", b"\x5f\x2a\x4d\x18\x00\x00\x00\x00" + ZSTD, "jsonl", "zstd"),
    ("a.jsonl", b"\x60\x2a\x4d\x18", "jsonl", "none"),
    ("a.txt", b"text", "text", "none"),
    ("a.TXT.gz", gzip.compress(b"text"), "text", "gzip"),
    ("a.txt.zstd", ZSTD, "text", "zstd"),
    ("a.txt.gz", b"text", "text", "none"),
    ("a.parquet", _parquet(), "parquet", "none"),
    ("a.jsonl", _parquet(), "parquet", "none"),
    ("a.parquet", LINE, "jsonl", "none"),
    ("a.npy", bytes(6), "npy", "none"),
    ("a.npy", _numpy(), "npy", "none"),
    ("a.jsonl", _numpy(), "npy", "none"),
    ("a.bin", bytes(6), "bin", "none"),
    ("a.jsonl", b"5", "jsonl", "none"),
]


@pytest.mark.parametrize(("name", "content", "form", "compression"), KINDS)
def test_the_kind_of_a_file(tmp_path: Path, name: str, content: bytes, form: Any, compression: Any) -> None:
    path = _file(tmp_path, content, name)
    status = path.stat()
    (file,) = resolve_files(str(path))
    assert file == SourceFile(path, form, compression, len(content), status.st_mtime_ns)
    assert file.holds_tokens == (form in ("npy", "bin"))


@pytest.mark.parametrize("name", ["a.npy.gz", "a.bin.gz", "a.npy"])
def test_compressed_token_ids_are_refused(tmp_path: Path, name: str) -> None:
    path = _file(tmp_path, gzip.compress(bytes(6)), name)
    with pytest.raises(DataError) as caught:
        resolve_files(str(path))
    assert str(caught.value) == f"data.path: {path} holds compressed token ids, which cannot be read in place"
    assert caught.value.problems[0].fix == "unpack it"


@pytest.mark.parametrize(
    ("name", "content", "kind", "package"),
    [
        ("b.jsonl.zst", ZSTD, "zstd", "zstandard"),
        ("b.jsonl", ZSTD, "zstd", "zstandard"),
        ("b.parquet", _parquet(), "parquet", "pyarrow"),
    ],
)
def test_a_package_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, kind: str, package: str
) -> None:
    """Training on the readable half of a corpus without a word is worse than an error."""
    _file(tmp_path, LINE, "a.jsonl")
    path = _file(tmp_path, content, name)
    installed = {"zstandard", "pyarrow"} - {package}
    monkeypatch.setattr(sources, "find_spec", lambda name: object() if name in installed else None)
    for value in (str(path), str(tmp_path), f"{tmp_path}/*"):
        with pytest.raises(DataError) as caught:
            resolve_files(value)
        assert str(caught.value) == (
            f"data.path: {path} is a {kind} file, and the package {package} is not installed"
        )
        assert caught.value.problems[0].fix == f"pip install {package} (or eulerforge[data])"


def test_packages_are_asked_for_only_where_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    files = _file(tmp_path, LINE, "a.jsonl"), _file(tmp_path, gzip.compress(LINE), "b.jsonl.gz")
    assert _paths(str(tmp_path)) == files


# --- Directories ------------------------------------------------------------------------------------------------

DIRECTORIES: dict[str, tuple[list[str], list[str]]] = {
    # the files that are meant, in order; others
    "json lines": (
        ["B.JSONL", "a.jsonl", "b.json", "c.ndjson.gz", "d.jsonl.zst", "sub/deep/a.jsonl.gz", "sub/z.ndjson"],
        ["README.md", "jsonl", "a.jsonl.bak", ".hidden.jsonl", ".git/a.jsonl", "sub/.x/b.jsonl", "sub/.b.jsonl"],
    ),
    "json lines and parquet": (["a.jsonl", "b.parquet"], ["LICENSE", "a.csv"]),
    "text": (["a.txt", "b.TXT.gz", "sub/c.txt"], ["README.md", ".c.txt"]),
    "tokens": (["a.bin", "b.npy"], ["b.csv.gz", "tokens.json.md"]),
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_a_directory_means_its_files_of_one_kind_at_any_depth_in_order(tmp_path: Path, case: str) -> None:
    wanted, others = DIRECTORIES[case]
    for name in [*reversed(wanted), *others]:
        _file(tmp_path, LINE, name)
    assert _paths(str(tmp_path)) == tuple(tmp_path / name for name in wanted)


def test_a_hidden_directory_that_is_named_is_read(tmp_path: Path) -> None:
    path = _file(tmp_path, LINE, ".cache/sub/a.jsonl")
    assert _paths(f"{tmp_path}/.cache") == (path,)


@pytest.mark.parametrize(
    ("names", "counts", "example"),
    [
        (["a.jsonl", "b.parquet", "README.txt"], "2 records (a.jsonl), 1 text (README.txt)", "/**/*.jsonl*"),
        (["a.txt", "sub/b.txt", "c.json.gz"], "1 records (c.json.gz), 2 text (a.txt)", "/**/*.txt*"),
        (["a.jsonl", "x.npy", "y.bin"], "1 records (a.jsonl), 2 token (x.npy)", "/**/*.npy*"),
        (
            ["a.parquet", "b.parquet", "x.bin", "n.txt"],
            "2 records (a.parquet), 1 text (n.txt), 1 token (x.bin)",
            "/**/*.parquet*",
        ),
    ],
)
def test_a_directory_of_several_kinds_is_refused(tmp_path: Path, names: list[str], counts: str, example: str) -> None:
    for name in names:
        _file(tmp_path, LINE, name)
    with pytest.raises(DataError) as caught:
        resolve_files(str(tmp_path))
    assert str(caught.value) == f"data.path: the directory {tmp_path} holds files of several kinds: {counts}"
    assert caught.value.problems[0].fix == f"say which are meant with a glob, for example {tmp_path}{example}"
    assert _paths(f"{tmp_path}{example}")  # the advice works


@pytest.mark.parametrize("kind", ["dangling link", "pipe"])
def test_a_file_of_a_directory_that_cannot_be_read_is_not_left_out_silently(tmp_path: Path, kind: str) -> None:
    _file(tmp_path, LINE, "a.jsonl")
    path = tmp_path / "b.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "not there")
    with pytest.raises(DataError, match=r"b\.jsonl"):
        resolve_files(str(tmp_path))


# --- Globs and single paths -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("[ab].jsonl", ["a.jsonl", "b.jsonl"]),
        ("?.jsonl", ["a.jsonl", "b.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "sub/c.jsonl"]),
        ("**/**/*.jsonl", ["a.jsonl", "b.jsonl", "sub/c.jsonl"]),
        ("*/*", ["sub/c.jsonl"]),
        ("*", ["a.jsonl", "b.jsonl", "c.txt", "d.npy"]),
        ("d*", ["d.npy"]),
        ("c.txt", ["c.txt"]),
    ],
)
def test_a_glob_means_its_files_in_order(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    """`d.csv.gz` is the index of `d.npy`, not a source. Hidden files and directories are left out."""
    for name in ("b.jsonl", "a.jsonl", "c.txt", "sub/c.jsonl", "d.npy", "d.csv.gz", ".hidden.jsonl"):
        _file(tmp_path, LINE, name)
    assert _paths(f"{tmp_path}/{pattern}") == tuple(tmp_path / name for name in expected)


def test_a_table_without_its_token_file_is_a_file(tmp_path: Path) -> None:
    path = _file(tmp_path, LINE, "e.csv.gz")
    assert _paths(f"{tmp_path}/*") == (path,)


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    path = _file(tmp_path, LINE, "data[1].jsonl")
    _file(tmp_path, LINE, "data1.jsonl")
    assert _paths(str(path)) == (path,)


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _file(tmp_path, LINE, "data.jsonl")
    monkeypatch.chdir(tmp_path)
    assert _paths("data.jsonl") == _paths("*.jsonl") == _paths(".") == (path,)


def test_a_relative_glob_in_a_folder_whose_name_looks_like_a_glob(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _file(tmp_path, LINE, "run[1]/data.jsonl")
    monkeypatch.chdir(path.parent)
    assert _paths("*.jsonl") == (path,)


def test_the_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _file(tmp_path, LINE, "data.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _paths("~/data.jsonl") == _paths("~/*.jsonl") == (path,)


@pytest.mark.parametrize("key", ["data.path", "data.validation.path"])
@pytest.mark.parametrize(
    ("given", "message", "fix"),
    [
        ("none.jsonl", "{root}/none.jsonl does not exist", "set {key} to an existing JSONL file"),
        (
            "none/*.jsonl",
            "the glob {root}/none/*.jsonl matches no file",
            "correct the pattern or the directory",
        ),
        ("fold*", "the glob {root}/fold* matches no file", "correct the pattern or the directory"),
        (
            "folder",
            "the directory {root}/folder holds no .jsonl, .ndjson, .json (plain, .gz or .zst), .parquet, .txt, "
            ".npy or .bin file",
            "point {key} at a file, or at a directory that holds some",
        ),
        ("empty.jsonl", "{root}/empty.jsonl is empty", "give a file with at least one JSON line"),
        ("empty", "{root}/empty/a.txt is empty", "give a file with at least one JSON line"),
        ("pipe", "{root}/pipe is not a regular file (a pipe or device)", "give a JSONL file on disk"),
        ("pip*", "{root}/pipe is not a regular file (a pipe or device)", "give a JSONL file on disk"),
        ("empty.jsonl/a", "{root}/empty.jsonl/a cannot be read: Not a directory", "check the file's permissions"),
        ("link.jsonl", "{root}/link.jsonl does not exist", "set {key} to an existing JSONL file"),
    ],
)
def test_paths_that_cannot_be_read(tmp_path: Path, given: str, message: str, fix: str, key: str) -> None:
    _file(tmp_path, b"x", "folder/notes.md")
    _file(tmp_path, b"", "empty.jsonl")
    _file(tmp_path, b"", "empty/a.txt")
    _file(tmp_path, b"", "empty/b.txt")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "not there")
    for found in (lambda value: resolve_files(value, key), lambda value: resolve_corpus(value, key)):
        with pytest.raises(DataError) as caught:
            found(f"{tmp_path}/{given}")
        assert str(caught.value) == f"{key}: " + message.format(root=tmp_path)
        assert caught.value.problems[0].fix == fix.format(key=key)


def test_an_empty_file_among_others_is_fine(tmp_path: Path) -> None:
    files = _file(tmp_path, b"", "a.jsonl"), _file(tmp_path, LINE, "b.jsonl"), _file(tmp_path, b"", "c.jsonl")
    assert _paths(str(tmp_path)) == _paths(f"{tmp_path}/*") == files


# --- Lists and mixtures -----------------------------------------------------------------------------------------


def test_a_path_is_a_corpus_of_one_part(tmp_path: Path) -> None:
    path = _file(tmp_path, LINE, "a.jsonl")
    for value in (str(path), str(tmp_path)):
        assert resolve_corpus(value) == (CorpusPart(value, Fraction(1), resolve_files(str(path))),)


def test_a_list_is_one_corpus_in_its_order(tmp_path: Path) -> None:
    names = ["z.jsonl", "folder/b.jsonl", "folder/c.jsonl", "a.txt", "x1.json", "x2.json"]
    paths = [_file(tmp_path, LINE, name) for name in names]
    value = [f"{tmp_path}/z.jsonl", f"{tmp_path}/folder", f"{tmp_path}/a.txt", f"{tmp_path}/x?.json"]
    (part,) = resolve_corpus(value)
    assert (part.name, part.weight) == (", ".join(value), Fraction(1))
    assert [file.path for file in part.files] == paths


@pytest.mark.parametrize(
    "second", ["a.jsonl", "*.jsonl", "", "sub/../a.jsonl", "link.jsonl"], ids=lambda name: name or "the directory"
)
def test_a_file_named_twice_is_refused(tmp_path: Path, second: str) -> None:
    path = _file(tmp_path, LINE, "a.jsonl")
    (tmp_path / "sub").mkdir()
    if second == "link.jsonl":
        (tmp_path / second).symlink_to(path)
    with pytest.raises(DataError, match="is named twice") as caught:
        resolve_corpus([str(path), f"{tmp_path}/{second}"])
    assert str(caught.value).startswith("data.path: ")
    assert caught.value.problems[0].fix == (
        "name it once; to see a source more often, give it a weight: [{path: ..., weight: ...}]"
    )


def test_the_message_names_the_file_that_is_named_twice(tmp_path: Path) -> None:
    paths = [_file(tmp_path, LINE, name) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(DataError) as caught:
        resolve_corpus([str(paths[0]), str(paths[1]), str(paths[1])], "data.validation.path")
    assert str(caught.value) == f"data.validation.path: {paths[1]} is named twice"


def _mixture(*entries: tuple[str, float]) -> list[MixtureSource]:
    return [MixtureSource(path=path, weight=weight) for path, weight in entries]


def test_a_mixture_has_a_part_for_each_source(tmp_path: Path) -> None:
    first, second = _file(tmp_path, LINE, "web/a.jsonl"), _file(tmp_path, LINE, "code.jsonl")
    value = _mixture((f"{tmp_path}/web", 0.7), (str(second), 0.3), (f"{tmp_path}/web", 3))
    assert resolve_corpus(value) == (
        CorpusPart(f"{tmp_path}/web", Fraction(7, 10), resolve_files(str(first))),
        CorpusPart(str(second), Fraction(3, 10), resolve_files(str(second))),
        CorpusPart(f"{tmp_path}/web", Fraction(3), resolve_files(str(first))),
    )


def test_a_source_of_a_mixture_that_cannot_be_read(tmp_path: Path) -> None:
    path = _file(tmp_path, LINE, "a.jsonl")
    with pytest.raises(DataError, match=r"^data\.path: .*/none\.jsonl does not exist$"):
        resolve_corpus(_mixture((str(path), 1), (f"{tmp_path}/none.jsonl", 1)))


# --- What the preset may say ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", "a"),
        (["a", "b"], ["a", "b"]),
        ([{"path": "a", "weight": "7e-1"}], [{"path": "a", "weight": 0.7}]),
        (
            [{"weight": 2, "path": "a"}, {"path": "b", "weight": 0.5}],
            [{"path": "a", "weight": 2.0}, {"path": "b", "weight": 0.5}],
        ),
    ],
)
def test_values_of_data_path(value: Any, expected: Any) -> None:
    assert to_data_path(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "must not be an empty list"),
        ({"path": "a"}, "must be a path, a list of paths, or a list of {path, weight}, not a mapping"),
        (None, "must be text, not nothing (null)"),
        ("", "must not be empty"),
        (["a", ""], "entry 2: must not be empty"),
        (["a", 7], 'entry 2: must be text, not 7; if text is meant, quote it: "7"'),
        ([["a"]], "entry 1: must be text, not a list"),
        (
            [{"path": "a", "weight": 1}, "b"],
            "entry 2 has no weight: in a mixture each entry is {path: ..., weight: ...}",
        ),
        (
            ["b", {"path": "a", "weight": 1}],
            "entry 1 has no weight: in a mixture each entry is {path: ..., weight: ...}",
        ),
        ([{"path": "a", "wieght": 1}], "entry 1 has an unknown key 'wieght'; it takes path and weight"),
        ([{"path": "a"}], "entry 1 has no weight: each entry is {path: ..., weight: ...}"),
        ([{"weight": 1}], "entry 1 has no path: each entry is {path: ..., weight: ...}"),
        ([{"path": "a", "weight": 0}], "entry 1: weight must be greater than 0, not 0"),
        ([{"path": "a", "weight": -1.5}], "entry 1: weight must be greater than 0, not -1.5"),
        ([{"path": "a", "weight": True}], "entry 1: must be a number, not true"),
        ([{"path": "a", "weight": "half"}], "entry 1: must be a finite number, not the text 'half'"),
        ([{"path": "", "weight": 1}], "entry 1: must not be empty"),
    ],
)
def test_values_of_data_path_that_mean_nothing(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"must|has") as caught:
        to_data_path(value)
    assert str(caught.value) == message


def _tar() -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        entry = tarfile.TarInfo("a.jsonl")
        entry.size = len(LINE)
        archive.addfile(entry, io.BytesIO(LINE))
    return target.getvalue()


def _zip() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("a.jsonl", LINE)
    return target.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.jsonl.bz2", bz2.compress(LINE), "bzip2"),
        ("a.jsonl.xz", lzma.compress(LINE), "xz"),
        ("a.zip", _zip(), "zip"),
        ("a.jsonl", _zip(), "zip"),
        ("a.tar", _tar(), "tar"),
        ("a.tar.gz", gzip.compress(_tar()), "tar"),
        ("a.parquet.gz", gzip.compress(_parquet()), "compressed binary"),
        ("a.jsonl.gz", gzip.compress(_numpy()), "compressed binary"),
    ],
)
def test_what_is_not_read_is_not_taken_for_bad_json_lines(
    tmp_path: Path, name: str, content: bytes, kind: str
) -> None:
    """Its lines could be skipped in silence."""
    path = _file(tmp_path, content, name)
    with pytest.raises(DataError) as caught:
        resolve_files(str(path))
    assert str(caught.value) == f"data.path: {path} is a {kind} file, which is not read"


@pytest.mark.parametrize("content", [b"BZhang wrote this.\n", b"Rar! it said\n", b"PK is a name\n"])
def test_a_text_that_begins_like_an_archive_is_text(tmp_path: Path, content: bytes) -> None:
    (file,) = resolve_files(str(_file(tmp_path, content, "a.txt")))
    assert (file.format, file.compression) == ("text", "none")


@pytest.mark.parametrize(("name", "content"), [("a.jsonl.gz", gzip.compress(LINE)[:1]), ("a.jsonl.zst", ZSTD[:3])])
def test_a_compressed_file_of_a_few_bytes_is_cut_off(tmp_path: Path, name: str, content: bytes) -> None:
    path = _file(tmp_path, content, name)
    with pytest.raises(DataError) as caught:
        resolve_files(str(path))
    assert str(caught.value) == f"data.path: {path} is a cut-off compressed file"
