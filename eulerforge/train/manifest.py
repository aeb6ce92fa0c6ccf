"""The completeness marker of a checkpoint: every file with its size and checksum, written last.

    trainer_state/manifest.json    {"format": 1, "files": {"model.safetensors": {"size": 1234, "sha256": "..."}, ...}}

A checkpoint without it, or with a file that differs from it, is never resumed from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from eulerforge.files import sync_file, write_json

FORMAT = 1
STATE_FOLDER = "trainer_state"
MANIFEST = f"{STATE_FOLDER}/manifest.json"
_ALWAYS = ("config.json", f"{STATE_FOLDER}/state.json")
"""What every checkpoint has."""

FileNotes = dict[str, dict[str, Any]]
"""Path relative to the checkpoint -> size and checksum."""


def note_files(folder: Path, files: Iterable[Path]) -> FileNotes:
    """Force files to disk and note their sizes and checksums."""
    notes = {}
    for path in files:
        sync_file(path)
        notes[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    return notes


def write_manifest(folder: Path, notes: FileNotes) -> None:
    """Declare a checkpoint complete."""
    write_json(folder / MANIFEST, {"format": FORMAT, "files": notes})


def find_damage(folder: Path, *, contents: bool) -> str | None:
    """What is wrong with a checkpoint, None if it is complete.

    Args:
        contents: compare checksums too, which reads every byte; else names and sizes only.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return f"its completeness marker {MANIFEST} is missing"
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            return f"its format {manifest['format']} is not {FORMAT}: another version of eulerforge wrote it"
        notes: FileNotes = manifest["files"]
        if unnamed := [name for name in _ALWAYS if name not in notes]:
            return f"its completeness marker {MANIFEST} does not name {unnamed[0]}"
        for name, note in notes.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if (size := file.stat().st_size) != note["size"]:
                return f"{name} has {size:,} bytes, {note['size']:,} were written"
        if contents:
            # sha256 runs outside the GIL, so threads share the work.
            with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
                sums = pool.map(lambda name: _sha256(folder / name), notes)
                for name, value in zip(notes, sums, strict=True):
                    if value != notes[name]["sha256"]:
                        return f"the content of {name} differs from what was written"
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"its completeness marker {MANIFEST} cannot be read"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
