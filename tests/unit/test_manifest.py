"""The completeness marker: every kind of damage is seen and named, and nothing else is."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eulerforge.train import manifest
from eulerforge.train.manifest import MANIFEST, find_damage, note_files, write_manifest

CONTENTS = {
    "config.json": b"{}",
    "model.safetensors": b"0123456789",
    "trainer_state/state.json": b'{"step": 3}',
    "trainer_state/shards/shard-00001-model-00001-of-00001.safetensors": bytes(range(256)),
    "empty": b"",
}


def _checkpoint(folder: Path, contents: dict[str, bytes] | None = None) -> Path:
    """A complete checkpoint."""
    files = []
    for name, content in (CONTENTS if contents is None else contents).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        files.append(path)
    (folder / MANIFEST).parent.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, note_files(folder, files))
    return folder


def test_the_marker_lists_sizes_and_checksums(tmp_path: Path) -> None:
    written = json.loads((_checkpoint(tmp_path) / MANIFEST).read_bytes())
    assert written == {
        "format": 1,
        "files": {
            name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in CONTENTS.items()
        },
    }


@pytest.mark.parametrize("contents", [False, True])
def test_a_complete_checkpoint_has_no_damage(tmp_path: Path, contents: bool) -> None:
    assert find_damage(_checkpoint(tmp_path), contents=contents) is None


@pytest.mark.parametrize("contents", [False, True])
def test_other_files_are_no_damage(tmp_path: Path, contents: bool) -> None:
    """Users put notes there, and file managers their own files."""
    folder = _checkpoint(tmp_path)
    (folder / "NOTES.md").write_text("the good one")
    (folder / "trainer_state" / "extra").mkdir()
    assert find_damage(folder, contents=contents) is None


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _as_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


SHARD = "trainer_state/shards/shard-00001-model-00001-of-00001.safetensors"
UNREADABLE = f"its completeness marker {MANIFEST} cannot be read"
UNNAMED = f"its completeness marker {MANIFEST} does not name "
ALWAYS: dict[str, Any] = {name: {"size": len(CONTENTS[name])} for name in ("config.json", "trainer_state/state.json")}
MISSING = f"its completeness marker {MANIFEST} is missing"


def _note(**changes: Any) -> Callable[[Path], object]:
    """Replace keys of the marker."""

    def change(folder: Path) -> None:
        values = json.loads((folder / MANIFEST).read_bytes())
        (folder / MANIFEST).write_text(json.dumps(values | changes))

    return change


def _drop(key: str) -> Callable[[Path], object]:
    """Remove a key from the marker."""

    def change(folder: Path) -> None:
        values = json.loads((folder / MANIFEST).read_bytes())
        del values[key]
        (folder / MANIFEST).write_text(json.dumps(values))

    return change


def _marker(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / MANIFEST).write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "marker gone": (lambda folder: (folder / MANIFEST).unlink(), MISSING),
    "marker is a folder": (lambda folder: _as_folder(folder / MANIFEST), MISSING),
    "marker is a dangling link": (lambda folder: _as_dangling_link(folder / MANIFEST), MISSING),
    "marker empty": (_marker(b""), UNREADABLE),
    "marker cut": (lambda folder: os.truncate(folder / MANIFEST, 40), UNREADABLE),
    "marker zeroed": (_marker(bytes(200)), UNREADABLE),
    "marker not UTF-8": (_marker(b'{"format": "\xff"}'), UNREADABLE),
    "marker a list": (_marker(b"[]"), UNREADABLE),
    "marker null": (_marker(b"null"), UNREADABLE),
    "marker a number": (_marker(b"1"), UNREADABLE),
    "no format": (_drop("format"), UNREADABLE),
    "no files": (_drop("files"), UNREADABLE),
    "files a list": (_note(files=["config.json", "trainer_state/state.json"]), UNREADABLE),
    "files null": (_note(files=None), UNREADABLE),
    "no file named": (_note(files={}), UNNAMED + "config.json"),
    "state not named": (_note(files={"config.json": {}}), UNNAMED + "trainer_state/state.json"),
    "a note without size": (_note(files=ALWAYS | {"config.json": {}}), UNREADABLE),
    "a note that is a number": (_note(files=ALWAYS | {"config.json": 10}), UNREADABLE),
    "another format": (
        _note(format=2),
        "its format 2 is not 1: another version of eulerforge wrote it",
    ),
    "a text as format": (
        _note(format="1"),
        "its format 1 is not 1: another version of eulerforge wrote it",
    ),
    "file gone": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    "file in a folder gone": (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing"),
    "file is a folder": (lambda folder: _as_folder(folder / "config.json"), "config.json is missing"),
    "file is a dangling link": (lambda folder: _as_dangling_link(folder / "empty"), "empty is missing"),
    "file cut": (
        lambda folder: os.truncate(folder / "model.safetensors", 9),
        "model.safetensors has 9 bytes, 10 were written",
    ),
    "file emptied": (
        lambda folder: os.truncate(folder / SHARD, 0),
        f"{SHARD} has 0 bytes, 256 were written",
    ),
    "file grown": (
        lambda folder: os.truncate(folder / "empty", 1_234_567),
        "empty has 1,234,567 bytes, 0 were written",
    ),
}


@pytest.mark.parametrize("contents", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_named(tmp_path: Path, damage: str, contents: bool) -> None:
    spoil, message = DAMAGES[damage]
    folder = _checkpoint(tmp_path)
    spoil(folder)
    assert find_damage(folder, contents=contents) == message


@pytest.mark.parametrize("name", [name for name, content in CONTENTS.items() if content])
def test_a_flipped_bit_is_seen_by_the_contents_only(tmp_path: Path, name: str) -> None:
    folder = _checkpoint(tmp_path)
    content = bytearray(CONTENTS[name])
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert find_damage(folder, contents=False) is None
    assert find_damage(folder, contents=True) == f"the content of {name} differs from what was written"


def test_a_note_without_checksum_is_unreadable_only_when_it_is_needed(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path)
    _note(files=ALWAYS)(folder)
    assert find_damage(folder, contents=False) is None
    assert find_damage(folder, contents=True) == UNREADABLE


def test_one_flipped_bit_among_many_files_is_found(tmp_path: Path) -> None:
    """More files than threads that share the work; each of them counts."""
    many = {f"shards/{index}": b"%d" % index for index in range(100)}
    folder = _checkpoint(tmp_path, CONTENTS | many)
    assert find_damage(folder, contents=True) is None
    for index in (0, 57, 99):
        path = folder / "shards" / str(index)
        path.write_bytes(b"x" * len(b"%d" % index))
        assert find_damage(folder, contents=True) == f"the content of shards/{index} differs from what was written"
        path.write_bytes(b"%d" % index)
    assert find_damage(folder, contents=True) is None


def test_a_disk_that_cannot_be_read_is_damage_not_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _checkpoint(tmp_path)

    def fail(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(manifest, "_sha256", fail)
    assert find_damage(folder, contents=False) is None
    assert find_damage(folder, contents=True) == f"{folder / 'config.json'}: Input/output error"


def test_nothing_is_complete_before_the_marker_is_there(tmp_path: Path) -> None:
    assert find_damage(tmp_path, contents=False) == MISSING
    assert find_damage(tmp_path / "nowhere", contents=True) == MISSING
