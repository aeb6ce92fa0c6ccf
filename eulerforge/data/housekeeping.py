"""What lies in a cache directory, and removing it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from eulerforge.errors import DataError
from eulerforge.files import tree_bytes


@dataclass(frozen=True)
class Entry:
    """A corpus in a cache.

    Attributes:
        name: `data.path` as the preset had it.
        size: bytes of its shards, those shared with other corpora too.
        used: when it was last used, seconds since 1970.
    """

    key: str
    name: str
    documents: int
    tokens: int
    size: int
    used: float
    shards: frozenset[str]


@dataclass(frozen=True)
class Unfinished:
    """Shards that belong to no complete corpus, and what is being written."""

    shards: int
    size: int


def entries(root: Path) -> list[Entry]:
    """All complete corpora, the last used first."""
    found = []
    for path in sorted((root / "corpora").glob("*.json")):
        try:
            manifest = json.loads(path.read_bytes())
            shards = manifest["shards"]
            names = frozenset(shard["id"] for shard in shards)
            entry = Entry(
                path.stem,
                manifest["name"] or ", ".join(manifest["files"][:2]),
                sum(shard["documents"] for shard in shards),
                sum(shard["tokens"] for shard in shards),
                sum(tree_bytes(root / "shards" / name) for name in names),
                path.stat().st_mtime,
                names,
            )
        except (OSError, ValueError, LookupError, TypeError):
            entry = Entry(path.stem, "(damaged)", 0, 0, 0, path.stat().st_mtime, frozenset())
        found.append(entry)
    return sorted(found, key=lambda entry: entry.used, reverse=True)


def unfinished(root: Path) -> Unfinished:
    """What builds that were not finished have left, or are writing now."""
    paths = list(_unfinished(root))
    return Unfinished(len(paths), sum(map(tree_bytes, paths)))


def _unfinished(root: Path) -> Iterator[Path]:
    used = {name for entry in entries(root) for name in entry.shards}
    for folder in ("shards", "building"):
        if (root / folder).is_dir():
            yield from (path for path in sorted((root / folder).iterdir()) if path.name not in used)


def remove(root: Path, key: str) -> int:
    """Remove a corpus, and its shards that no other one uses; the bytes freed. A training that reads it fails.

    Raises:
        DataError: a process is building it.
    """
    with contextlib.ExitStack() as stack:
        locks = {key, *(lock.stem for lock in (root / "corpora").glob("*.lock"))}
        for name in sorted(locks):
            stack.enter_context(_idle(root, name))
        known = entries(root)
        own = next(entry.shards for entry in known if entry.key == key)
        others = {name for entry in known if entry.key != key for name in entry.shards}
        (root / "corpora" / f"{key}.json").unlink()
        return sum(_remove_tree(root / "shards" / name) for name in own - others)


def remove_unfinished(root: Path) -> int:
    """Remove what builds that were not finished have left; the bytes freed.

    Raises:
        DataError: a process is building.
    """
    with contextlib.ExitStack() as stack:
        for lock in sorted((root / "corpora").glob("*.lock")):
            stack.enter_context(_idle(root, lock.stem))
        return sum(_remove_tree(path) for path in list(_unfinished(root)))


@contextlib.contextmanager
def _idle(root: Path, key: str) -> Iterator[None]:
    """Hold a corpus's lock."""
    path = root / "corpora" / f"{key}.lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise DataError(
            f"{path} is held: a process is building this token cache", "wait for it, or stop it first"
        ) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _remove_tree(path: Path) -> int:
    size = tree_bytes(path)
    shutil.rmtree(path, ignore_errors=True)
    return size
