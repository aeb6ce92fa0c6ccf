"""Files that are either complete or not there (temporary sibling, fsync, rename), and paths as people read them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_json(path: Path, values: Any) -> None:
    """Replace a JSON file in one move; a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


@contextlib.contextmanager
def publish_directory(target: Path) -> Iterator[Path]:
    """Write a directory under a temporary name and rename it when the block ends without an exception.

    Yields:
        the temporary sibling to write into. After an exception it is removed and `target` is as before.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_tree(temporary)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_directory(target.parent)


def sync_tree(folder: Path) -> None:
    """Force all files of a folder, and its list of names, to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            _sync_file(path)
    _sync_directory(folder)


def shown_path(path: Path) -> str:
    """A path as short as it stays clear: relative to the current directory where it lies below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def _sync_directory(path: Path) -> None:
    if os.name != "posix":
        return  # Windows has no fsync of directories.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
