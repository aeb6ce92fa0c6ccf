"""The token cache: exact stream, reuse, damage, and failures that leave nothing behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from eulerforge.config.paths import default_cache_dir
from eulerforge.data.cache import CacheSpec, TokenCache, open_or_build
from eulerforge.data.sources import DocumentCounts
from eulerforge.errors import DataError

BOS, EOS = 300, 301


class _Bytes:
    """One id per byte, plus `shift`."""

    def __init__(self, fingerprint: str = "bytes", shift: int = 0, largest_id: int = EOS) -> None:
        self.fingerprint = fingerprint
        self.largest_id = largest_id
        self.texts = 0
        self._shift = shift

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        self.texts += len(texts)
        return [[byte + self._shift for byte in text.encode()] for text in texts]


class _Never(_Bytes):
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        raise AssertionError("a cache that exists is not built again")


def _corpus(tmp_path: Path, *texts: str, name: str = "data.jsonl", column: str = "text") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return path


def _spec(*files: Path, **changes: object) -> CacheSpec:
    return replace(CacheSpec(files, "text", "error", bos_id=None, eos_id=EOS), **changes)  # type: ignore[arg-type]


def _open(
    tmp_path: Path,
    spec: CacheSpec,
    encoder: _Bytes | None = None,
    check: Callable[[npt.NDArray[np.int64]], None] = lambda offsets: None,
    say: Callable[[str], None] = lambda line: None,
    folder: str = "cache",
) -> TokenCache:
    return open_or_build(spec, encoder or _Bytes(), tmp_path / folder, check, say)


@pytest.mark.parametrize(
    ("bos", "eos", "stream", "offsets"),
    [
        (None, EOS, [*b"ab", EOS, *b"c", EOS], [0, 3, 5]),
        (BOS, EOS, [BOS, *b"ab", EOS, BOS, *b"c", EOS], [0, 4, 7]),
        (BOS, None, [BOS, *b"ab", BOS, *b"c"], [0, 3, 5]),
        (None, None, [*b"abc"], [0, 2, 3]),
        (0, 0, [0, *b"ab", 0, 0, *b"c", 0], [0, 4, 7]),
    ],
)
def test_the_stream_is_the_documents_with_the_tokens_of_the_policy(
    tmp_path: Path, bos: int | None, eos: int | None, stream: list[int], offsets: list[int]
) -> None:
    """Id 0 is an id, not "none". The empty text between the two leaves no lone EOS."""
    cache = _open(tmp_path, _spec(_corpus(tmp_path, "ab", "", "c"), bos_id=bos, eos_id=eos))
    assert cache.tokens.tolist() == stream
    assert cache.offsets.tolist() == offsets
    assert cache.documents == 2
    assert cache.counts == DocumentCounts(documents=2, empty=1)
    assert cache.reused is False


@pytest.mark.parametrize(
    ("largest", "dtype", "shift"), [(65535, "uint16", 65435), (65536, "uint32", 65436), (200_000, "uint32", 199_900)]
)
def test_ids_are_stored_as_narrow_as_they_fit(tmp_path: Path, largest: int, dtype: str, shift: int) -> None:
    encoder = _Bytes(shift=shift, largest_id=largest)
    cache = _open(tmp_path, _spec(_corpus(tmp_path, "\x64\x00"), eos_id=largest), encoder)
    assert cache.tokens.dtype == np.dtype(dtype)
    assert cache.tokens.tolist() == [100 + shift, shift, largest]
    assert (cache.path / "tokens.bin").stat().st_size == 3 * np.dtype(dtype).itemsize


def test_files_follow_each_other_and_groups_leave_no_seam(tmp_path: Path) -> None:
    """2,500 documents are more than two groups of 1,024."""
    first = [f"a{index}" for index in range(1500)]
    second = [f"b{index}" for index in range(1000)]
    files = _corpus(tmp_path, *first, name="z.jsonl"), _corpus(tmp_path, *second, name="a.jsonl")
    encoder = _Bytes()
    cache = _open(tmp_path, _spec(*files), encoder)
    expected: list[int] = []
    for text in first + second:
        expected += [*text.encode(), EOS]
    assert cache.tokens.tolist() == expected
    assert cache.documents == encoder.texts == 2500
    assert [len(text) + 1 for text in first + second] == np.diff(cache.offsets).tolist()


def test_a_second_opening_builds_nothing_and_keeps_the_counts(tmp_path: Path) -> None:
    path = _corpus(tmp_path, "ab", "", "x\ud800", "c")
    with path.open("a") as handle:
        handle.write("oops\n[1]\n[2]\n")
    spec = _spec(path, on_bad_line="skip")
    built = _open(tmp_path, spec)
    reused = _open(tmp_path, spec, _Never())
    assert (built.reused, reused.reused) == (False, True)
    assert reused.path == built.path
    assert reused.tokens.tolist() == built.tokens.tolist()
    assert reused.offsets.tolist() == built.offsets.tolist()
    for cache in (built, reused):
        assert (cache.counts.documents, cache.counts.empty, cache.counts.repaired) == (3, 1, 1)
        assert cache.counts.skipped == {"malformed JSON": 1, "not an object": 2}


def _touch(path: Path, spec: CacheSpec) -> CacheSpec:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    return spec


def _grow(path: Path, spec: CacheSpec) -> CacheSpec:
    before = path.stat()
    path.write_bytes(path.read_bytes() + b"\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return spec


CHANGES: dict[str, Callable[[Path, CacheSpec], CacheSpec]] = {
    "file modified": _touch,
    "file size": _grow,
    "column": lambda path, spec: replace(spec, text_column="other"),
    "bad line policy": lambda path, spec: replace(spec, on_bad_line="skip"),
    "eos": lambda path, spec: replace(spec, eos_id=None),
    "bos": lambda path, spec: replace(spec, bos_id=BOS),
    "files": lambda path, spec: replace(spec, files=(path, path)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_the_tokens_makes_another_cache(tmp_path: Path, change: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a", "other": "b"}\n')
    spec = _spec(path)
    first = _open(tmp_path, spec)
    second = _open(tmp_path, CHANGES[change](path, spec))
    assert second.reused is False
    assert second.path != first.path
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_another_tokenizer_makes_another_cache(tmp_path: Path) -> None:
    spec = _spec(_corpus(tmp_path, "a"))
    first = _open(tmp_path, spec)
    second = _open(tmp_path, spec, _Bytes("shifted", shift=1))
    assert (first.tokens.tolist(), second.tokens.tolist()) == ([97, EOS], [98, EOS])
    assert _open(tmp_path, spec, _Never()).tokens.tolist() == [97, EOS]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "tokens cut": lambda folder: os.truncate(folder / "tokens.bin", 3),
    "tokens empty": lambda folder: os.truncate(folder / "tokens.bin", 0),
    "tokens gone": lambda folder: (folder / "tokens.bin").unlink(),
    "offsets cut": lambda folder: os.truncate(folder / "offsets.npy", 140),
    "offsets empty": lambda folder: os.truncate(folder / "offsets.npy", 0),
    "offsets gone": lambda folder: (folder / "offsets.npy").unlink(),
    "meta empty": lambda folder: os.truncate(folder / "meta.json", 0),
    "meta gone": lambda folder: (folder / "meta.json").unlink(),
    "meta without keys": lambda folder: (folder / "meta.json").write_text("{}"),
    "meta of another shape": lambda folder: (folder / "meta.json").write_text("[]"),
    "meta zeroed": lambda folder: (folder / "meta.json").write_bytes(bytes(200)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_announced_and_built_again(tmp_path: Path, damage: str) -> None:
    """After a power cut, files that were not synced are often there with no content."""
    spec = _spec(_corpus(tmp_path, "ab", "c"))
    folder = _open(tmp_path, spec).path
    DAMAGES[damage](folder)
    said: list[str] = []
    cache = _open(tmp_path, spec, say=said.append)
    assert cache.reused is False
    assert cache.tokens.tolist() == [*b"ab", EOS, *b"c", EOS]
    assert len(said) == 2
    assert said[1] == f"Tokenizing 1 file into {folder}"
    assert said[0].startswith(f"Token cache {folder} is damaged (")
    assert said[0].endswith("): building it again.")
    assert _open(tmp_path, spec, _Never()).reused is True


def test_a_half_built_cache_of_a_killed_run_is_not_taken_for_one(tmp_path: Path) -> None:
    spec = _spec(_corpus(tmp_path, "ab"))
    folder = _open(tmp_path, spec).path
    folder.rename(folder.with_name(f".{folder.name}.xyz.tmp"))
    assert _open(tmp_path, spec).reused is False


def _refuse(offsets: npt.NDArray[np.int64]) -> None:
    raise DataError(f"{int(offsets[-1])} tokens", "more")


class _Broken(_Bytes):
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        raise RuntimeError("tokenizer broke")


@pytest.mark.parametrize("kept", [False, True], ids=["new cache folder", "existing cache folder"])
@pytest.mark.parametrize("failure", ["bad line", "no document", "check", "encoder"])
def test_a_failing_build_leaves_nothing_behind(tmp_path: Path, failure: str, kept: bool) -> None:
    path = _corpus(tmp_path, "ab", "")
    if failure == "bad line":
        path.write_text(path.read_text() + "oops\n")
    if failure == "no document":
        path.write_text('{"text": ""}\n{"text": ""}\n[1]\n')
    if kept:
        (tmp_path / "a" / "b").mkdir(parents=True)
    message = {
        "bad line": r"data\.jsonl:3: malformed JSON",
        "no document": r"no usable document in .*data\.jsonl \(2 empty texts; 1 not an object\)",
        "check": "^3 tokens$",
        "encoder": "tokenizer broke",
    }[failure]
    spec = _spec(path, on_bad_line="skip" if failure == "no document" else "error")
    with pytest.raises((DataError, RuntimeError), match=message):
        _open(
            tmp_path,
            spec,
            _Broken() if failure == "encoder" else None,
            check=_refuse if failure == "check" else lambda offsets: None,
            folder="a/b",
        )
    assert sorted(str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*")) == (
        ["a", "a/b", "data.jsonl"] if kept else ["data.jsonl"]
    )


def test_a_reused_cache_is_checked_too(tmp_path: Path) -> None:
    """Another data.max_length may make the same tokens too few."""
    spec = _spec(_corpus(tmp_path, "ab"))
    folder = _open(tmp_path, spec).path
    with pytest.raises(DataError, match=r"^3 tokens$"):
        _open(tmp_path, spec, _Never(), check=_refuse)
    assert folder.is_dir()


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = _corpus(tmp_path, "ab")
    with pytest.raises(DataError) as caught:
        _open(tmp_path, _spec(path), folder="data.jsonl/cache")
    assert str(caught.value) == f"data.cache_dir: {path}/cache cannot be written: Not a directory"
    assert "data.cache_dir" in caught.value.problems[0].fix


def test_the_default_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "eulerforge" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache_dir() == Path("/home/someone/.cache/eulerforge/tokens")


# --- The digest -------------------------------------------------------------------------------------------------


def test_the_digest_is_that_of_the_content_wherever_it_lies(tmp_path: Path) -> None:
    """A run may be resumed on another machine, with the corpus elsewhere and the cache built anew."""
    path = _corpus(tmp_path, "ab", "c")
    first = _open(tmp_path, _spec(path))
    assert len(first.digest) == 64
    assert _open(tmp_path, _spec(path), _Never()).digest == first.digest
    _touch(path, _spec(path))
    touched = _open(tmp_path, _spec(path))
    (tmp_path / "elsewhere").mkdir()
    moved = _open(tmp_path, _spec(path.rename(tmp_path / "elsewhere" / "other.jsonl")))
    parts = _corpus(tmp_path, "ab", name="1.jsonl"), _corpus(tmp_path, "", "c", name="2.jsonl")
    split = _open(tmp_path, _spec(*parts))
    caches = (first, touched, moved, split)
    assert len({cache.path for cache in caches}) == 4
    assert [cache.reused for cache in caches] == [False] * 4
    assert {cache.digest for cache in caches} == {first.digest}


CONTENTS: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    # texts, what else differs
    "one byte": (("ab", "d"), {}),
    "the order": (("c", "ab"), {}),
    "a document more": (("ab", "c", "d"), {}),
    "a document less": (("ab",), {}),
    "the end token": (("ab", "c"), {"eos_id": BOS}),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_another_content_has_another_digest(tmp_path: Path, case: str) -> None:
    texts, changes = CONTENTS[case]
    first = _open(tmp_path, _spec(_corpus(tmp_path, "ab", "c")))
    other = _open(tmp_path, _spec(_corpus(tmp_path, *texts, name="other.jsonl"), **changes))
    assert other.digest != first.digest


def test_other_boundaries_of_the_same_tokens_have_another_digest(tmp_path: Path) -> None:
    first = _open(tmp_path, _spec(_corpus(tmp_path, "ab", "c"), eos_id=None))
    other = _open(tmp_path, _spec(_corpus(tmp_path, "a", "bc", name="other.jsonl"), eos_id=None))
    assert first.tokens.tolist() == other.tokens.tolist() == [*b"abc"]
    assert (first.offsets.tolist(), other.offsets.tolist()) == ([0, 2, 3], [0, 1, 3])
    assert first.digest != other.digest
