"""Files that are either complete or not there (temporary sibling, fsync, rename), and paths as people read them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"
"""Ending of what is being written; the name begins with a dot."""


def write_json(path: Path, values: Any) -> None:
    """Replace a JSON file in one move; a reader sees the old content or the new, never a part."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one move."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def temporary_name(target: Path) -> Path:
    """Where a file or directory is written before it has its name."""
    return target.with_name(f".{target.name}{TEMPORARY}")


def begin_directory(target: Path) -> Path:
    """Make the temporary sibling in which a directory is written before `publish` gives it its name.

    A leftover of a killed process is removed. The parent is not made: when it is gone (an unmounted disk), writing
    somewhere else would lose the data.
    """
    temporary = temporary_name(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def publish(temporary: Path, target: Path, *, replace: bool = False) -> None:
    """Give a complete, synced directory its name.

    Args:
        replace: an older directory of that name is moved aside first and removed last.
    """
    # Some writers make files for their owner only; in the end the umask decides, as it did for the directory.
    mode = temporary.stat().st_mode & 0o666
    for path in temporary.rglob("*"):
        if path.is_file():
            path.chmod(mode)
    old = target.with_name(f".{target.name}.old{TEMPORARY}")
    if replace and target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def publish_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Write a directory under a temporary name and rename it when the block ends without an exception.

    Args:
        replace: see `publish`.

    Yields:
        the temporary sibling to write into. After an exception it is removed and `target` is as before.
    """
    temporary = begin_directory(target)
    try:
        yield temporary
        sync_tree(temporary)
        publish(temporary, target, replace=replace)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sync_tree(folder: Path) -> None:
    """Force all files of a folder, and its list of names, to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync_file(path)
        elif path.is_dir():
            sync_directory(path)
    sync_directory(folder)


def tree_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def shown_path(path: Path) -> str:
    """A path as short as it stays clear: relative to the current directory where it lies below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def sync_file(path: Path) -> None:
    """Force a file's content to disk."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def sync_directory(path: Path) -> None:
    """Force a directory's list of names to disk."""
    if os.name != "posix":
        return  # Windows has no fsync of directories.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
