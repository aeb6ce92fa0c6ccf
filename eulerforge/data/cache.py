"""Documents -> a memory-mapped token cache on disk, built once and reused by later runs.

    <cache_dir>/<key>/tokens.bin     token ids of all documents, one after the other (uint16 or uint32, little-endian)
    <cache_dir>/<key>/offsets.npy    int64, documents + 1: document d is tokens[offsets[d]:offsets[d + 1]]
    <cache_dir>/<key>/meta.json      counts, a digest of the content, and everything the key was made of

The key covers the tokenizer's content, each file's identity (path, size, modification time), the text column and the
BOS/EOS policy. The folder is written under a temporary name and renamed when complete, so a killed build leaves
nothing that could be taken for a cache. Documents are encoded in bounded groups, so memory does not grow with the
corpus.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from eulerforge.data.sources import DocumentCounts, iter_documents
from eulerforge.errors import DataError
from eulerforge.files import sync_tree, write_json

FORMAT_VERSION = 2
_GROUP_DOCUMENTS = 1024
_GROUP_CHARACTERS = 4_000_000

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class DocumentEncoder(Protocol):
    """What the cache needs of a tokenizer (`models.tokenizer.Tokenizer`)."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides which ids a text gets."""

    @property
    def largest_id(self) -> int:
        """The largest id it can give."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""


@dataclass(frozen=True)
class CacheSpec:
    """What a cache is made from. `bos_id`/`eos_id` are None where the policy adds none.

    Attributes:
        key: what the preset calls the files, for messages; it does not matter to the cache.
    """

    files: tuple[Path, ...]
    text_column: str
    on_bad_line: Literal["error", "skip"]
    bos_id: int | None
    eos_id: int | None
    key: str = "data.path"


@dataclass(frozen=True)
class TokenCache:
    """An open cache.

    Attributes:
        path: its folder.
        tokens: all ids, memory-mapped, shape (total,).
        offsets: document boundaries, shape (documents + 1,).
        counts: what was met while reading the corpus.
        digest: SHA-256 of ids and boundaries, the same wherever the corpus lies.
        reused: whether it was found rather than built.
    """

    path: Path
    tokens: Tokens
    offsets: npt.NDArray[np.int64]
    counts: DocumentCounts
    digest: str
    reused: bool

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1


def open_or_build(
    spec: CacheSpec,
    encoder: DocumentEncoder,
    cache_dir: Path,
    check: Callable[[npt.NDArray[np.int64]], None],
    say: Callable[[str], None],
) -> TokenCache:
    """Open the cache of `spec`, building it first if needed.

    Args:
        check: called with the document offsets before a new cache is published; raises if the corpus cannot be used.
        say: prints a line (a damaged cache is announced before it is rebuilt).

    Raises:
        DataError: bad input, no usable document, or a cache directory that cannot be written.
    """
    identity = _identity(spec, encoder)
    folder = cache_dir / _digest(identity)
    if folder.is_dir():
        try:
            cache = _open(folder, reused=True)
        except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
            say(f"Token cache {folder} is damaged ({error}): building it again.")
            shutil.rmtree(folder)
        else:
            check(cache.offsets)
            return cache
    say(f"Tokenizing {len(spec.files)} file{'s' if len(spec.files) > 1 else ''} into {folder}")
    _build(spec, encoder, folder, identity, check)
    return _open(folder, reused=False)


def _identity(spec: CacheSpec, encoder: DocumentEncoder) -> dict[str, Any]:
    files = []
    for path in spec.files:
        status = path.stat()
        files.append([str(path), status.st_size, status.st_mtime_ns])
    return {
        "format": FORMAT_VERSION,
        "tokenizer": encoder.fingerprint,
        "files": files,
        "text_column": spec.text_column,
        "on_bad_line": spec.on_bad_line,
        "bos_id": spec.bos_id,
        "eos_id": spec.eos_id,
    }


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _open(folder: Path, reused: bool) -> TokenCache:
    meta = json.loads((folder / "meta.json").read_bytes())
    counts = DocumentCounts(**meta["counts"])
    offsets = np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False)
    dtype = np.dtype(meta["dtype"])
    size = (folder / "tokens.bin").stat().st_size
    if size != meta["tokens"] * dtype.itemsize or int(offsets[-1]) != meta["tokens"]:
        raise ValueError(f"{size} bytes of tokens, expected {meta['tokens'] * dtype.itemsize}")
    tokens = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r")
    return TokenCache(folder, tokens, offsets, counts, meta["digest"], reused)


def _build(
    spec: CacheSpec,
    encoder: DocumentEncoder,
    folder: Path,
    identity: dict[str, Any],
    check: Callable[[npt.NDArray[np.int64]], None],
) -> None:
    made = [path for path in (folder.parent, *folder.parent.parents) if not path.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    except OSError as error:
        raise DataError(
            f"data.cache_dir: {folder.parent} cannot be written: {error.strerror}",
            "set data.cache_dir to a directory that you can write",
        ) from None
    try:
        counts = DocumentCounts()
        dtype = np.dtype("<u2" if encoder.largest_id < 2**16 else "<u4")
        documents = iter_documents(spec.files, spec.text_column, spec.on_bad_line, counts)
        content = hashlib.sha256()
        with (temporary / "tokens.bin").open("wb") as sink:
            offsets = array("q", [0])
            for ids in _encoded(documents, spec, encoder, dtype):
                sink.write(data := ids.tobytes())
                content.update(data)
                offsets.append(offsets[-1] + len(ids))
        _require_documents(spec, counts)
        boundaries = np.array(offsets, dtype=np.int64)
        check(boundaries)
        np.save(temporary / "offsets.npy", boundaries)
        content.update(boundaries.tobytes())
        meta = {
            "dtype": dtype.str,
            "tokens": int(boundaries[-1]),
            "digest": content.hexdigest(),
            "counts": asdict(counts),
            "identity": identity,
        }
        write_json(temporary / "meta.json", meta)
        sync_tree(temporary)
        _publish(temporary, folder)
    except OSError as error:
        raise DataError(
            f"the token cache in {folder.parent} cannot be written: {error.strerror}",
            "free some space or set data.cache_dir to another disk",
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()  # goes only if it is empty, that is when nothing was published


def _publish(temporary: Path, folder: Path) -> None:
    """Rename into place. Another run may have published the same content first: then theirs is used."""
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / "meta.json").is_file():
            raise


def _require_documents(spec: CacheSpec, counts: DocumentCounts) -> None:
    if counts.documents:
        return
    skipped = ", ".join(f"{number} {kind}" for kind, number in counts.skipped.items())
    details = "; ".join(filter(None, [f"{counts.empty} empty texts" if counts.empty else "", skipped]))
    names = ", ".join(str(path) for path in spec.files[:3])
    raise DataError(
        f"{spec.key}: no usable document in {names}" + (f" ({details})" if details else ""),
        f"give lines with non-empty text under {spec.text_column!r} (data.text_column)",
    )


def _encoded(
    documents: Iterable[str], spec: CacheSpec, encoder: DocumentEncoder, dtype: np.dtype[Any]
) -> Iterator[npt.NDArray[Any]]:
    """Ids of each document with its BOS/EOS, in order."""
    before = [] if spec.bos_id is None else [spec.bos_id]
    after = [] if spec.eos_id is None else [spec.eos_id]
    for group in _groups(documents):
        for ids in encoder.encode(group):
            yield np.array([*before, *ids, *after], dtype=dtype)


def _groups(documents: Iterable[str]) -> Iterator[list[str]]:
    """Bounded groups of documents: large enough to keep the tokenizer's threads busy, small in memory."""
    group: list[str] = []
    characters = 0
    for text in documents:
        group.append(text)
        characters += len(text)
        if len(group) >= _GROUP_DOCUMENTS or characters >= _GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group
