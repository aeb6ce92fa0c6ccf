"""A shard: the tokens of a bounded part of a corpus, with an index of its documents. Written once, then only read.

    shards/<id>/tokens.bin   ids of all its documents, one after the other (uint16 or uint32, little-endian)
    shards/<id>/ends.bin     int64, one a document: where it ends in tokens.bin
    shards/<id>/lines.bin    int64, one a document: its line or row (1-based)
    shards/<id>/shard.json   `ShardMeta`

A shard appears under its name when it is complete. Token files that others wrote get a shard with an index and
without tokens of its own (`external`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from eulerforge.data.readers import DocumentCounts
from eulerforge.files import sync_tree, write_json

Ids = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

_PRIME = (1 << 127) - 1
_BASE = int.from_bytes(hashlib.sha256(b"eulerforge content digest").digest()[:15], "little")


class ContentDigest:
    """A digest of a sequence of documents that does not depend on how the sequence is cut into shards.

    Each document's hash h_i (BLAKE2b of its ids as uint32) is a coefficient of a polynomial over the field of
    2^127 - 1: sum of h_i * B^(n - 1 - i). Two sequences one after the other have the digest a * B^m + b (Karp and
    Rabin, 1987), so digests of shards can be joined without reading them again.
    """

    def __init__(self, documents: int = 0, value: int = 0) -> None:
        self.documents = documents
        self.value = value

    def add(self, ids: Ids) -> None:
        """Append a document."""
        content = hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=15).digest()
        # 1 is added so that no document has the value of nothing.
        self.value = (self.value * _BASE + int.from_bytes(content, "little") + 1) % _PRIME
        self.documents += 1

    def join(self, later: ContentDigest) -> None:
        """Append another sequence."""
        self.value = (self.value * pow(_BASE, later.documents, _PRIME) + later.value) % _PRIME
        self.documents += later.documents

    def hex(self) -> str:
        """64 hexadecimal digits."""
        return hashlib.sha256(f"{self.documents} {self.value:x}".encode()).hexdigest()


@dataclass(frozen=True)
class BadLine:
    """The first bad record of a shard.

    Attributes:
        file: which of the shard's files.
        line: 1-based, counted from where the shard's task begins in the file.
    """

    file: int
    line: int
    what: str
    fix: str


@dataclass(frozen=True)
class Cursor:
    """Where the next shard of a task begins: after `lines` records of a file of the task."""

    file: int
    lines: int


@dataclass
class ShardMeta:
    """What is known of a shard without reading its tokens.

    Attributes:
        dtype: of its ids, as NumPy writes it.
        digest: value of `ContentDigest`, hexadecimal.
        sha256: over the hashes of its own files.
        files: documents of each file, in order: [number of the file in the task, documents].
        lines: lines of the last file read so far.
        next: where the next shard of the task begins, None for the last one.
        first_bad: the first bad record, None without any.
        external: for a token file that is read in place: bytes before its first id.
    """

    dtype: str
    documents: int = 0
    tokens: int = 0
    digest: str = "0"
    sha256: str = ""
    counts: DocumentCounts = field(default_factory=DocumentCounts)
    files: list[list[int]] = field(default_factory=list)
    lines: int = 0
    next: Cursor | None = None
    first_bad: BadLine | None = None
    external: int | None = None

    @classmethod
    def read(cls, folder: Path) -> ShardMeta:
        """Read a shard's meta and check that its files have the size it names.

        Raises:
            OSError, ValueError, LookupError, TypeError: the shard is not there, or damaged.
        """
        values = json.loads((folder / "shard.json").read_bytes())
        values["counts"] = DocumentCounts(**values["counts"])
        values["next"] = values["next"] and Cursor(**values["next"])
        values["first_bad"] = values["first_bad"] and BadLine(**values["first_bad"])
        meta = cls(**values)
        sizes = {"ends.bin": meta.documents * 8, "lines.bin": meta.documents * 8}
        if meta.external is None:
            sizes["tokens.bin"] = meta.tokens * np.dtype(meta.dtype).itemsize
        for name, expected in sizes.items():
            if (size := (folder / name).stat().st_size) != expected:
                raise ValueError(f"{name} has {size} bytes, expected {expected}")
        return meta

    def verify(self, folder: Path) -> None:
        """Read the shard's files and compare them with their hash.

        Raises:
            ValueError: they are not what was written.
        """
        hashes = []
        for name in _files(self.external):
            with (folder / name).open("rb") as handle:
                hashes.append(hashlib.file_digest(handle, "sha256").digest())
        if hashlib.sha256(b"".join(hashes)).hexdigest() != self.sha256:
            raise ValueError(f"{folder} is not as it was written")

    @property
    def content(self) -> ContentDigest:
        """The digest of its documents."""
        return ContentDigest(self.documents, int(self.digest, 16))


def _files(external: int | None) -> tuple[str, ...]:
    """The files of a shard beside its meta."""
    return ("tokens.bin", "ends.bin", "lines.bin") if external is None else ("ends.bin", "lines.bin")


class ShardWriter:
    """Writes a shard into a temporary folder, document by document; memory does not grow with it.

    Args:
        folder: where the files go.
        external: for tokens that are already on disk; `add` then only indexes them.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any], external: int | None = None) -> None:
        self._folder = folder
        self._dtype = dtype
        self._content = ContentDigest()
        self._open: dict[str, IO[bytes]] = {}
        self._hashes: dict[str, Any] = {}
        for name in _files(external):
            self._open[name] = (folder / name).open("wb")
            self._hashes[name] = hashlib.sha256()
        self.meta = ShardMeta(dtype.str, external=external)

    def add(self, ids: Ids, lengths: Sequence[int], lines: Sequence[int], file: int) -> None:
        """Append documents of one file.

        Args:
            ids: of all of them, one after the other.
            lengths: tokens of each.
            lines: line or row of each.
            file: number of the file in the task.
        """
        meta = self.meta
        ends = np.cumsum(lengths, dtype="<i8")
        start = 0
        for end in ends.tolist():
            self._content.add(ids[start:end])
            start = end
        if meta.external is None:
            self._write("tokens.bin", ids.astype(self._dtype, copy=False).tobytes())
        self._write("ends.bin", (ends + meta.tokens).tobytes())
        self._write("lines.bin", np.array(lines, dtype="<i8").tobytes())
        meta.tokens += len(ids)
        meta.documents += len(lengths)
        if not meta.files or meta.files[-1][0] != file:
            meta.files.append([file, 0])
        meta.files[-1][1] += len(lengths)

    def _write(self, name: str, data: bytes) -> None:
        self._open[name].write(data)
        self._hashes[name].update(data)

    def close(self) -> None:
        """Close the files, whatever has become of the shard."""
        for handle in self._open.values():
            handle.close()

    def finish(self) -> ShardMeta:
        """Write the meta; all is on disk then."""
        self.close()
        self.meta.digest = f"{self._content.value:x}"
        self.meta.sha256 = hashlib.sha256(b"".join(value.digest() for value in self._hashes.values())).hexdigest()
        write_json(self._folder / "shard.json", asdict(self.meta))
        sync_tree(self._folder)
        return self.meta


@contextlib.contextmanager
def new_shard(
    target: Path, workshop: Path, dtype: np.dtype[Any], external: int | None = None
) -> Iterator[ShardWriter]:
    """Write a shard: under its name when the block ends, not there at all after an exception.

    Args:
        target: its folder.
        workshop: where it is written before, on the same file system.
    """
    temporary = Path(tempfile.mkdtemp(dir=workshop))
    writer = ShardWriter(temporary, dtype, external)
    try:
        yield writer
        writer.finish()
        try:
            temporary.rename(target)
        except OSError:
            # Another corpus with the same part may have been first: its shard is the same.
            if not (target / "shard.json").is_file():
                raise
    finally:
        writer.close()
        shutil.rmtree(temporary, ignore_errors=True)
