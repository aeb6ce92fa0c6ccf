"""Files and directories that are either complete or not there."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from eulerforge.files import begin_directory, publish, publish_directory, shown_path, tree_bytes, write_json


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_directory_appears_under_its_name_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint-5"
    with publish_directory(target) as temporary:
        assert temporary.parent == tmp_path
        assert not target.exists()
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a.txt").write_text("a")
    assert _names(tmp_path) == ["checkpoint-5"]
    assert (target / "sub" / "a.txt").read_text() == "a"


def test_parents_are_not_made(tmp_path: Path) -> None:
    """When the parent has gone (an unmounted disk), data written to another place would be lost."""
    with pytest.raises(FileNotFoundError), publish_directory(tmp_path / "a" / "b"):
        raise AssertionError("entered")
    assert _names(tmp_path) == []


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_after_an_exception_nothing_is_there(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), publish_directory(tmp_path / "final") as temporary:
        (temporary / "half").write_text("x")
        raise error
    assert _names(tmp_path) == []


def test_after_an_exception_the_target_is_as_before(tmp_path: Path) -> None:
    target = tmp_path / "final"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(ValueError, match="broke"), publish_directory(target) as temporary:
        (temporary / "new").write_text("new")
        raise ValueError("broke")
    assert _names(tmp_path) == ["final"]
    assert _names(target) == ["old"]


def test_an_existing_directory_is_never_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "final"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(OSError), publish_directory(target) as temporary:
        (temporary / "new").write_text("new")
    assert _names(tmp_path) == ["final"]
    assert _names(target) == ["old"]


def test_what_a_killed_run_left_is_not_mixed_in(tmp_path: Path) -> None:
    target = tmp_path / "final"
    leftover = tmp_path / ".final.tmp"
    leftover.mkdir()
    (leftover / "stale").write_text("stale")
    with publish_directory(target) as temporary:
        assert temporary == leftover
        (temporary / "fresh").write_text("fresh")
    assert _names(target) == ["fresh"]
    assert _names(tmp_path) == ["final"]


def test_json_is_replaced_in_one_move(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_json(path, {"step": 1})
    with path.open() as earlier:
        write_json(path, {"step": 2, "name": "é"})
        assert json.load(earlier) == {"step": 1}  # a reader keeps the file it has opened
    assert path.read_text(encoding="utf-8") == '{\n  "step": 2,\n  "name": "é"\n}\n'
    assert _names(tmp_path) == ["status.json"]


@pytest.mark.parametrize("value", [{"loss": float("nan")}, {"path": Path("x")}])
def test_json_that_cannot_be_written_leaves_the_old_file_and_no_other(tmp_path: Path, value: object) -> None:
    path = tmp_path / "status.json"
    write_json(path, {"step": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(path, {"good": 1, "bad": value})
    assert json.loads(path.read_text()) == {"step": 1}
    assert _names(tmp_path) == ["status.json"]


def test_shown_path_is_relative_below_the_current_directory_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "outputs" / "run") == "outputs/run"
    assert shown_path(tmp_path.parent / "elsewhere") == str(tmp_path.parent / "elsewhere")


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_the_umask_decides_who_may_read_what_is_published(
    tmp_path: Path, umask: int, file_mode: int, folder_mode: int
) -> None:
    """Whatever modes the writers of single files choose; safetensors makes them for the owner only."""
    before = os.umask(umask)
    try:
        temporary = begin_directory(tmp_path / "final")
        (temporary / "sub").mkdir()
        for name, mode in (("private", 0o600), ("sub/open", 0o666), ("script", 0o755)):
            (temporary / name).write_text(name)
            (temporary / name).chmod(mode)
        publish(temporary, tmp_path / "final")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "final").rglob("*")}
    assert modes == {"private": file_mode, "open": file_mode, "script": file_mode, "sub": folder_mode}
    assert stat.S_IMODE((tmp_path / "final").stat().st_mode) == folder_mode


@pytest.mark.parametrize("old", ["there", "with a leftover of an earlier replacement", "not there"])
def test_an_older_directory_is_replaced_where_that_is_meant(tmp_path: Path, old: str) -> None:
    target = tmp_path / "final"
    if old != "not there":
        target.mkdir()
        (target / "old").write_text("old")
    if old.startswith("with"):
        (tmp_path / ".final.old.tmp").mkdir()
        (tmp_path / ".final.old.tmp" / "older").write_text("older")
    with publish_directory(target, replace=True) as temporary:
        (temporary / "new").write_text("new")
        assert target.exists() == (old != "not there")
    assert _names(tmp_path) == ["final"]
    assert _names(target) == ["new"]


def test_a_replacement_that_fails_leaves_the_older_directory(tmp_path: Path) -> None:
    target = tmp_path / "final"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(ValueError, match="broke"), publish_directory(target, replace=True):
        raise ValueError("broke")
    assert _names(tmp_path) == ["final"]
    assert _names(target) == ["old"]


def test_a_begun_directory_is_empty_and_hidden(tmp_path: Path) -> None:
    leftover = tmp_path / ".checkpoint-3.tmp"
    (leftover / "sub").mkdir(parents=True)
    (leftover / "sub" / "stale").write_text("stale")
    assert begin_directory(tmp_path / "checkpoint-3") == leftover
    assert _names(tmp_path) == [".checkpoint-3.tmp"]
    assert _names(leftover) == []


def test_a_begun_directory_makes_no_parents(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        begin_directory(tmp_path / "gone" / "checkpoint-3")
    assert _names(tmp_path) == []


def test_the_bytes_of_a_tree_are_those_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "a" / "b" / "empty").mkdir(parents=True)
    for name, size in (("one", 1000), ("a/two", 200), ("a/b/three", 30), ("a/none", 0)):
        (tmp_path / name).write_bytes(bytes(size))
    assert tree_bytes(tmp_path) == 1230
    assert tree_bytes(tmp_path / "a") == 230
    assert tree_bytes(tmp_path / "one") == 1000
    assert tree_bytes(tmp_path / "a" / "b" / "empty") == 0


def test_what_was_to_be_replaced_comes_back_when_the_new_one_cannot_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "final"
    target.mkdir()
    (target / "old").write_text("old")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self.name == ".final.tmp":
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"), publish_directory(target, replace=True) as temporary:
        (temporary / "new").write_text("new")
    assert _names(tmp_path) == ["final"]
    assert _names(target) == ["old"]
