"""Files and directories that are either complete or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eulerforge.files import publish_directory, shown_path, write_json


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
