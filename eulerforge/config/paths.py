"""Paths that a user gives: expanded, absolute, and refused in one clear line when the system cannot look at them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from eulerforge.errors import InputError

_SHOWN = 80


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/eulerforge/tokens`, or below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "eulerforge" / "tokens"


def expand_path(text: str, key: str, error: type[InputError]) -> Path:
    """`~` and relative paths made absolute.

    Args:
        text: the value of the preset.
        key: its name, for messages.
        error: what to raise.

    Raises:
        InputError: of the given kind, when the home directory is unknown or the path is too long.
    """
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    try:
        path = Path(text).expanduser().absolute()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except RuntimeError:
        raise error(
            f"{key}: {shown}: the home directory of that user is not known", f"write {key} out without ~"
        ) from None
    except OSError as reason:
        raise error(f"{key}: {shown}: {reason.strerror}", f"set {key} to another path") from None
    return path


def require_writable(path: Path, key: str, error: type[InputError]) -> None:
    """Refuse a directory (existing or to be made) in which nothing can be written. Leaves nothing behind.

    Raises:
        InputError: of the given kind.
    """
    existing = next(place for place in (path, *path.parents) if place.exists())
    try:
        # Trying is the only test that holds for root, read-only mounts and quotas alike.
        with tempfile.TemporaryDirectory(prefix=".eulerforge-probe-", dir=existing):
            pass
    except OSError as reason:
        raise error(
            f"{key}: {path} cannot be made: {existing} is not writable ({reason.strerror})",
            f"set {key} to a place that you can write to",
        ) from None
