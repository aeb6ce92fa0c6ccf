"""The manifest of a complete corpus: which shards it consists of, in order, and what was met while reading it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eulerforge.data.build import FORMAT_VERSION, BuiltTask, Recipe, Task, total_counts
from eulerforge.data.readers import DocumentCounts, line_of_byte
from eulerforge.data.shards import ContentDigest, ShardMeta
from eulerforge.data.tokens import Shard, TokenStream


@dataclass(frozen=True)
class TokenCache:
    """An open cache.

    Attributes:
        path: of its manifest.
        stream: all tokens.
        counts: what was met while reading the corpus.
        digest: of ids and document boundaries, the same wherever the corpus lies and however it is cut into files.
        reused: whether it was found rather than built.
    """

    path: Path
    stream: TokenStream
    counts: DocumentCounts
    digest: str
    reused: bool


def describe(
    name: str, recipe: Recipe, files: Sequence[Path], tasks: Sequence[Task], built: Sequence[BuiltTask]
) -> dict[str, Any]:
    """The manifest of a corpus that has been built.

    Args:
        name: for people.
        files: of the corpus.
        tasks, built: what was to be done, and the shards that came of it.
    """
    shards: list[dict[str, Any]] = []
    digest = ContentDigest()
    first_bad: dict[str, str] | None = None
    for task, chain in zip(tasks, built, strict=True):
        # Ranges of a file count their lines from where they begin.
        before = shards[-1] if shards and task.start else None
        first_line = before["first_line"] + before["lines"] if before else 0
        for shard, meta in chain:
            shards.append(_shard_values(shard, meta, task, first_line))
            digest.join(meta.content)
            if meta.first_bad is not None and first_bad is None:
                path = task.files[meta.first_bad.file].path
                line = line_of_byte(path, task.start) + meta.first_bad.line
                first_bad = {"place": f"{path}:{line}", "what": meta.first_bad.what, "fix": meta.first_bad.fix}
    return {
        "format": FORMAT_VERSION,
        "name": name,
        "files": [str(path) for path in files],
        "recipe": asdict(recipe),
        "digest": digest.hex(),
        "counts": asdict(total_counts(built)),
        "first_bad": first_bad,
        "shards": shards,
    }


def _shard_values(name: str, meta: ShardMeta, task: Task, first_line: int) -> dict[str, Any]:
    return {
        "id": name,
        "tokens": meta.tokens,
        "documents": meta.documents,
        "dtype": meta.dtype,
        "first_file": task.first_file,
        "first_line": first_line,
        "lines": meta.lines,
        "external": meta.external,
    }


DAMAGE = (OSError, EOFError, ValueError, LookupError, TypeError)
"""What reading a cache raises that is not as it was written."""


def open_manifest(path: Path, files: Sequence[Path]) -> TokenCache | None:
    """The cache of a manifest, None if it is not there or not whole.

    Args:
        files: of the corpus.
    """
    try:
        return read_manifest(path, json.loads(path.read_bytes()), files)
    except DAMAGE:
        return None


def read_manifest(path: Path, manifest: dict[str, Any], files: Sequence[Path], reused: bool = True) -> TokenCache:
    """The cache that a manifest describes, if its files are as long as they should be.

    Raises:
        one of `DAMAGE`: they are not.
    """
    shards = [_open_shard(values, path.parents[1] / "shards", files) for values in manifest["shards"]]
    counts = DocumentCounts(**manifest["counts"])
    return TokenCache(path, TokenStream(shards), counts, manifest["digest"], reused)


def _open_shard(values: dict[str, Any], shards: Path, files: Sequence[Path]) -> Shard:
    folder, header = shards / values["id"], values["external"]
    tokens_file = folder / "tokens.bin" if header is None else files[values["first_file"]]
    shard = Shard(
        folder,
        tokens_file,
        header or 0,
        values["dtype"],
        values["tokens"],
        values["documents"],
        values["first_file"],
        values["first_line"],
    )
    expected = {
        tokens_file: shard.header + shard.tokens * np.dtype(shard.dtype).itemsize,
        folder / "ends.bin": shard.documents * 8,
        folder / "lines.bin": shard.documents * 8,
        folder / "shard.json": None,
    }
    for path, size in expected.items():
        found = path.stat().st_size
        if found != size if size is not None else not found:
            raise ValueError(f"{path} has {found} bytes, expected {size}")
    return shard
