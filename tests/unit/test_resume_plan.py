"""`--resume` and `output_dir` together: where a run writes, and from which checkpoint it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from eulerforge.errors import EulerForgeError, OutputError, ResumeError
from eulerforge.train.manifest import note_files, write_manifest
from eulerforge.train.resume import RunPlan, choose_checkpoint, plan_run
from eulerforge.train.state import Progress

RUN_ID, OTHER_ID = "a" * 16, "b" * 16


def _run(path: Path, run_id: str | None = RUN_ID, status: str = "running", step: int = 0) -> Path:
    """A run directory without checkpoints."""
    path.mkdir(parents=True)
    (path / "pretrain_config.json").write_text(json.dumps({"run_id": run_id}))
    (path / "status.json").write_text(json.dumps({"status": status, "step": step, "reason": ""}))
    return path


def _checkpoint(run: Path, step: int, run_id: str = RUN_ID, name: str = "") -> Path:
    """A complete checkpoint."""
    path = run / (name or f"checkpoint-{step}")
    (path / "trainer_state").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights %03d" % step)
    Progress(run_id, step, 0, 0.0, 1, "single", "float32", False, 0, None, {}, {}).write(path)
    write_manifest(path, note_files(path, [file for file in path.rglob("*") if file.is_file()]))
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with one of everything that a user may point at."""
    monkeypatch.chdir(tmp_path)
    _checkpoint(_run(tmp_path / "run"), 3)
    _run(tmp_path / "begun")
    (tmp_path / "empty").mkdir()
    _checkpoint(tmp_path / "copied", 5)  # checkpoints alone, as copied from elsewhere
    _checkpoint(tmp_path, 7, name="renamed")
    _checkpoint(tmp_path / "run", 9, name="checkpoint-9.set-aside")
    (tmp_path / "run" / "final").mkdir()
    (tmp_path / "run" / "final" / "config.json").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    (tmp_path / "file").touch()
    (tmp_path / "killed").mkdir()  # by SIGKILL, before its first files were complete
    (tmp_path / "killed" / ".lock").touch()
    (tmp_path / "killed" / ".pretrain_config.json.tmp").touch()
    (tmp_path / "partly").mkdir()
    for name in ("metrics.jsonl", "status.json"):
        (tmp_path / "partly" / name).touch()
    _checkpoint(tmp_path / "partly", 2)
    (tmp_path / "partly" / "tensorboard").mkdir()
    return tmp_path


GOOD: list[tuple[str, str | None, str | None, tuple[str | None, str | None, str | None, bool]]] = [
    # name, output_dir, --resume, expected plan: output_dir, source, checkpoint, branch
    ("fresh, default place", None, None, (None, None, None, False)),
    ("fresh, new place", "new", None, ("new", None, None, False)),
    ("fresh, new place below new ones", "a/b/c", None, ("a/b/c", None, None, False)),
    ("fresh, empty place", "empty", None, ("empty", None, None, False)),
    ("resume, nothing there yet", "new", "", ("new", "new", None, False)),
    ("resume, empty place", "empty", "", ("empty", "empty", None, False)),
    ("resume the run there", "run", "", ("run", "run", None, False)),
    ("resume a run without checkpoint", "begun", "", ("begun", "begun", None, False)),
    ("resume a run that was killed at once", "killed", "", ("killed", "killed", None, False)),
    ("resume a run without its config", "partly", "", ("partly", "partly", None, False)),
    ("a run by its name", None, "run", ("/run", "run", None, False)),
    ("a run by its name and a slash", None, "run/", ("/run", "run", None, False)),
    ("a run by its name, without checkpoint", None, "begun", ("/begun", "begun", None, False)),
    ("a run by its name, named twice", "run", "run", ("/run", "run", None, False)),
    ("a checkpoint by its name", None, "run/checkpoint-3", ("/run", "run", "run/checkpoint-3", False)),
    ("a checkpoint, its run named too", "run", "run/checkpoint-3", ("/run", "run", "run/checkpoint-3", False)),
    (
        "a checkpoint that was set aside",
        None,
        "run/checkpoint-9.set-aside",
        ("/run", "run", "run/checkpoint-9.set-aside", False),
    ),
    ("branch off from a run", "new", "run", ("new", "run", None, True)),
    ("branch off into an empty place", "empty", "run", ("empty", "run", None, True)),
    ("branch off from a checkpoint", "new", "run/checkpoint-3", ("new", "run", "run/checkpoint-3", True)),
    ("branch off from a copy", "new", "copied", ("new", "copied", None, True)),
    (
        "branch off from a copied checkpoint",
        "new",
        "copied/checkpoint-5",
        ("new", "copied", "copied/checkpoint-5", True),
    ),
    ("branch off from a renamed checkpoint", "new", "renamed", ("new", "", "renamed", True)),
    ("branch off into the run's own folder", "run/checkpoint-3b", "run", ("run/checkpoint-3b", "run", None, True)),
]


@pytest.mark.parametrize(
    ("output_dir", "resume", "expected"), [row[1:] for row in GOOD], ids=[row[0] for row in GOOD]
)
@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
def test_plans(
    here: Path,
    output_dir: str | None,
    resume: str | None,
    expected: tuple[str | None, str | None, str | None, bool],
    absolute: bool,
) -> None:
    before = _names(here)
    place, source, checkpoint, branch = expected
    if absolute:
        output_dir = str(here / output_dir) if output_dir else output_dir
        resume = str(here / resume) if resume else resume
        place = str(here / place.removeprefix("/")) if place else place
    # The plan names an existing run by its absolute path, and takes over output_dir as it was given otherwise.
    elif place is not None and place.startswith("/"):
        place = str(here / place[1:])
    assert plan_run(output_dir, resume) == RunPlan(
        place,
        None if source is None else here / source,
        None if checkpoint is None else here / checkpoint,
        branch,
    )
    assert _names(here) == before


def _names(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


NEITHER = "holds neither pretrain_config.json nor a checkpoint"
USED = "is not empty; a run never mixes with an earlier one"
ADD_RESUME = "add --resume to go on with the run in it, or choose a new output_dir"
NO_RUN = "is not empty and not a run directory (pretrain_config.json is missing)"
IS_MODEL = "is a model, not a checkpoint: it holds no trainer_state"

BAD: list[tuple[str, str | None, str | None, type[EulerForgeError], str, str]] = [
    # name, output_dir, --resume, error, what ({here} stands for the folder), fix
    ("fresh, place in use", "run", None, OutputError, "output_dir: {here}/run " + USED, ADD_RESUME),
    ("fresh, place with other files", "photos", None, OutputError, "output_dir: {here}/photos " + USED, ADD_RESUME),
    ("fresh, a file", "file", None, OutputError, "output_dir: {here}/file is a file", "choose a directory"),
    (
        "resume without any place",
        None,
        "",
        ResumeError,
        "--resume: which run? output_dir is not set",
        "give --output-dir (or output_dir in the preset), or --resume RUN_DIRECTORY",
    ),
    (
        "resume, place with other files",
        "photos",
        "",
        OutputError,
        "--resume: {here}/photos " + NO_RUN,
        "give the output_dir of the run to go on with",
    ),
    ("resume, a file", "file", "", OutputError, "output_dir: {here}/file is a file", "choose a directory"),
    (
        "a run that is not there",
        None,
        "nowhere",
        ResumeError,
        "--resume: {here}/nowhere is not a directory",
        "give a run directory or a checkpoint-N in one",
    ),
    (
        "a checkpoint that is not there",
        None,
        "run/checkpoint-4",
        ResumeError,
        "--resume: {here}/run/checkpoint-4 is not a directory",
        "give a run directory or a checkpoint-N in one",
    ),
    (
        "a file of a checkpoint",
        None,
        "run/checkpoint-3/model.safetensors",
        ResumeError,
        "--resume: {here}/run/checkpoint-3/model.safetensors is not a directory",
        "give a run directory or a checkpoint-N in one",
    ),
    (
        "final/",
        None,
        "run/final",
        ResumeError,
        "--resume: {here}/run/final " + IS_MODEL,
        "give a checkpoint-N, or begin a new run from its weights with model_dir: {here}/run/final",
    ),
    (
        "a model",
        None,
        "model",
        ResumeError,
        "--resume: {here}/model " + IS_MODEL,
        "give a checkpoint-N, or begin a new run from its weights with model_dir: {here}/model",
    ),
    (
        "a model, to branch off",
        "new",
        "model",
        ResumeError,
        "--resume: {here}/model " + IS_MODEL,
        "give a checkpoint-N, or begin a new run from its weights with model_dir: {here}/model",
    ),
    (
        "an empty folder by its name",
        None,
        "empty",
        ResumeError,
        "--resume: {here}/empty " + NEITHER,
        "give a run directory or a checkpoint-N in one",
    ),
    (
        "other files by their folder's name",
        "new",
        "photos",
        ResumeError,
        "--resume: {here}/photos " + NEITHER,
        "give a run directory or a checkpoint-N in one",
    ),
    (
        "a copy without its config",
        None,
        "copied",
        ResumeError,
        "--resume: {here}/copied is not a run directory (pretrain_config.json is missing)",
        "add --output-dir NEW to begin a new run at this checkpoint",
    ),
    (
        "a copied checkpoint without its run",
        None,
        "copied/checkpoint-5",
        ResumeError,
        "--resume: {here}/copied is not a run directory (pretrain_config.json is missing)",
        "add --output-dir NEW to begin a new run at this checkpoint",
    ),
    (
        "branch off into a run",
        "begun",
        "run",
        OutputError,
        "output_dir: {here}/begun is not empty, and --resume names another run",
        "give --resume begun to go on with the run in it, or choose a new output_dir",
    ),
    (
        "branch off into other files",
        "photos",
        "run/checkpoint-3",
        OutputError,
        "output_dir: {here}/photos is not empty, and --resume names another run",
        "give --resume photos to go on with the run in it, or choose a new output_dir",
    ),
    ("branch off into a file", "file", "run", OutputError, "output_dir: {here}/file is a file", "choose a directory"),
    (
        "~ of nobody",
        None,
        "~nosuchuser/run",
        ResumeError,
        "--resume: ~nosuchuser/run: ",
        "write --resume out without",
    ),
    ("too long", None, "x" * 5000, ResumeError, "--resume: " + "x" * 80 + "...: File name too long", "set --resume"),
]


@pytest.mark.parametrize(
    ("output_dir", "resume", "error", "what", "fix"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_what_cannot_be_meant_is_refused(
    here: Path, output_dir: str | None, resume: str | None, error: type[EulerForgeError], what: str, fix: str
) -> None:
    before = _names(here)
    with pytest.raises(error) as caught:
        plan_run(output_dir, resume)
    assert type(caught.value) is error
    (problem,) = caught.value.problems
    assert problem.what.startswith(what.format(here=here))
    assert problem.fix.startswith(fix.format(here=here))
    assert _names(here) == before


def test_a_run_may_be_named_through_a_link(here: Path) -> None:
    (here / "latest").symlink_to("run")
    assert plan_run(None, "latest") == RunPlan(str(here / "latest"), here / "latest")
    assert plan_run("latest", "") == RunPlan("latest", here / "latest")


@pytest.mark.parametrize(
    ("output_dir", "resume"),
    [("run", "latest"), ("latest", "run"), ("run", "begun/../run"), ("empty/../run", "run/checkpoint-3")],
)
def test_two_names_of_one_run_are_no_branch(here: Path, output_dir: str, resume: str) -> None:
    """The preset names the run in one way, the command line in another."""
    (here / "latest").symlink_to("run")
    plan = plan_run(output_dir, resume)
    assert not plan.branch
    used = plan.directory_in_use()
    assert used is not None
    assert used.samefile(here / "run")


@pytest.mark.parametrize(
    ("output_dir", "resume", "used"),
    [
        (None, None, None),
        ("empty", None, None),
        ("new", "", None),
        ("empty", "", None),
        ("run", "", "run"),
        ("killed", "", "killed"),
        (None, "run", "run"),
        (None, "run/checkpoint-3", "run"),
        ("new", "run", None),
        ("empty", "run/checkpoint-3", None),
    ],
)
def test_the_directory_that_a_run_goes_on_in(
    here: Path, output_dir: str | None, resume: str | None, used: str | None
) -> None:
    plan = plan_run(output_dir, resume)
    assert plan.directory_in_use() == (None if used is None else here / used)
    assert plan.resumes is (resume is not None)


def test_a_finished_run_is_known_by_status_and_final(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", status="finished", step=3)
    _checkpoint(run, 3)
    plan = RunPlan(str(run), run)
    assert plan.finished_step() is None  # final/ is missing
    (run / "final").mkdir()
    assert plan.finished_step() == 3
    assert RunPlan(str(run)).finished_step() is None
    assert RunPlan(str(run), run, run / "checkpoint-3").finished_step() is None  # gone on from, whatever came later
    assert RunPlan("new", run, branch=True).finished_step() is None
    assert RunPlan("gone", tmp_path / "gone").finished_step() is None


@pytest.mark.parametrize(
    "status",
    [
        '{"status": "running", "step": 3}',
        '{"status": "preempted", "step": 3}',
        '{"status": "failed", "step": 3}',
        '{"status": "finished"}',
        '{"status": "finished", "step": "3"}',
        "[]",
        "{",
        "",
    ],
)
def test_any_other_status_is_not_finished(tmp_path: Path, status: str) -> None:
    run = _run(tmp_path / "run")
    (run / "final").mkdir()
    (run / "status.json").write_text(status)
    assert RunPlan(str(run), run).finished_step() is None


# --- Which checkpoint -------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def _become(path: Path, step: int) -> None:
    """A complete copy of another checkpoint."""
    shutil.rmtree(path)
    _checkpoint(path.parent, step, name=path.name)


def _choose(plan: RunPlan) -> tuple[Path | None, list[str]]:
    said: list[str] = []
    return choose_checkpoint(plan, said.append), said


def test_the_newest_is_that_of_the_highest_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By number: 10 comes after 9. Whatever else lies there does not matter."""
    monkeypatch.chdir(tmp_path)
    run = _run(tmp_path / "run")
    for step in (10, 9, 2):
        _checkpoint(run, step)
    _checkpoint(run, 50, name="checkpoint-50.set-aside")
    _checkpoint(run, 60, name=".checkpoint-60.tmp")
    (run / "checkpoint-70").touch()
    assert _choose(RunPlan(str(run), run)) == (run / "checkpoint-10", [])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no marker": (
        lambda path: (path / "trainer_state" / "manifest.json").unlink(),
        "its completeness marker trainer_state/manifest.json is missing",
    ),
    "a bit": (
        lambda path: _flip(path / "model.safetensors"),
        "the content of model.safetensors differs from what was written",
    ),
    "a file less": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
    "cut": (
        lambda path: (path / "model.safetensors").write_bytes(b"w"),
        "model.safetensors has 1 bytes, 11 were written",
    ),
    "another step under its name": (lambda path: _become(path, 12), "it holds step 12"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_ones_are_skipped_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.chdir(tmp_path)
    run = _run(tmp_path / "run")
    for step in (3, 20, 100):
        _checkpoint(run, step)
    spoil, reason = DAMAGES[damage]
    spoil(_checkpoint(run, 30))
    _flip(run / "checkpoint-100" / "trainer_state" / "state.json")
    assert _choose(RunPlan(str(run), run)) == (
        run / "checkpoint-20",
        [
            "Skipped run/checkpoint-100: the content of trainer_state/state.json differs from what was written",
            f"Skipped run/checkpoint-30: {reason}",
        ],
    )


def test_checkpoints_of_another_run_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied there by hand, or left by an older run."""
    monkeypatch.chdir(tmp_path)
    run = _run(tmp_path / "run")
    _checkpoint(run, 3)
    _checkpoint(run, 8, OTHER_ID)
    assert _choose(RunPlan(str(run), run)) == (
        run / "checkpoint-3",
        [f"Skipped run/checkpoint-8: it belongs to another run ({OTHER_ID}, this one is {RUN_ID})"],
    )


@pytest.mark.parametrize("config", [None, "{", "[]", '{"run_id": 7}'])
def test_a_run_that_does_not_know_its_name_takes_what_is_there(tmp_path: Path, config: str | None) -> None:
    run = _run(tmp_path / "run")
    _checkpoint(run, 8, OTHER_ID)
    (run / "pretrain_config.json").unlink()
    if config is not None:
        (run / "pretrain_config.json").write_text(config)
    assert _choose(RunPlan(str(run), run)) == (run / "checkpoint-8", [])


def test_if_none_is_left_the_run_is_refused_not_started_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = _run(tmp_path / "run")
    _checkpoint(run, 3, OTHER_ID)
    _flip(_checkpoint(run, 6) / "model.safetensors")
    (run / "checkpoint-9").mkdir()
    said: list[str] = []
    with pytest.raises(ResumeError) as caught:
        choose_checkpoint(RunPlan(str(run), run), said.append)
    reasons = [
        ("9", "its completeness marker trainer_state/manifest.json is missing"),
        ("6", "the content of model.safetensors differs from what was written"),
        ("3", f"it belongs to another run ({OTHER_ID}, this one is {RUN_ID})"),
    ]
    advice = "copy it back from a backup, or move it away: a run without any checkpoint starts from the beginning"
    assert [(problem.what, problem.fix) for problem in caught.value.problems] == [
        (f"--resume: run/checkpoint-{step} cannot be used: {reason}", advice) for step, reason in reasons
    ]
    assert said == [f"Skipped run/checkpoint-{step}: {reason}" for step, reason in reasons]


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    _checkpoint(run, 50, name="checkpoint-50.set-aside")
    assert _choose(RunPlan(str(run), run)) == (None, [])
    assert _choose(RunPlan("new", tmp_path / "new")) == (None, [])
    assert _choose(RunPlan("new")) == (None, [])


def test_the_one_that_was_asked_for_is_taken_whatever_else_there_is(tmp_path: Path) -> None:
    """A branch may begin at another run's checkpoint, and an older one may be wanted."""
    run = _run(tmp_path / "run")
    _checkpoint(run, 9)
    wanted = _checkpoint(run, 3, OTHER_ID)
    assert _choose(RunPlan(str(run), run, wanted)) == (wanted, [])


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_that_was_asked_for_must_be_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = _run(tmp_path / "run")
    _checkpoint(run, 3)
    wanted = _checkpoint(run, 30)
    spoil, reason = DAMAGES[damage]
    spoil(wanted)
    with pytest.raises(ResumeError) as caught:
        choose_checkpoint(RunPlan(str(run), run, wanted), print)
    (problem,) = caught.value.problems
    assert problem.what == f"--resume: run/checkpoint-30 is not complete: {reason}"
    assert problem.fix == "--resume run takes the newest complete one"


def test_a_branch_begins_at_the_newest_of_the_other_run(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    for step in (3, 6):
        _checkpoint(run, step)
    assert _choose(RunPlan("new", run, branch=True)) == (run / "checkpoint-6", [])


def test_a_branch_that_has_not_saved_yet_begins_again_where_it_began(tmp_path: Path) -> None:
    """And one that has saved, or that only looks so, is a run like any other."""
    origin = _checkpoint(_run(tmp_path / "old", OTHER_ID), 4, OTHER_ID)
    run = _run(tmp_path / "new")
    (run / "pretrain_config.json").write_text(json.dumps({"run_id": RUN_ID, "branched_from": str(origin)}))
    plan = RunPlan(str(run), run)
    assert _choose(plan) == (origin, [])
    own = _checkpoint(run, 5)
    assert _choose(plan) == (own, [])
    _flip(own / "model.safetensors")
    with pytest.raises(ResumeError, match="checkpoint-5 cannot be used"):
        choose_checkpoint(plan, print)


@pytest.mark.parametrize("damage", DAMAGES.keys() - {"another step under its name"})
def test_a_branch_whose_beginning_is_damaged_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    origin = _checkpoint(_run(tmp_path / "old", OTHER_ID), 4, OTHER_ID)
    run = _run(tmp_path / "new")
    (run / "pretrain_config.json").write_text(json.dumps({"run_id": RUN_ID, "branched_from": str(origin)}))
    spoil, reason = DAMAGES[damage]
    spoil(origin)
    with pytest.raises(ResumeError) as caught:
        choose_checkpoint(RunPlan(str(run), run), print)
    (problem,) = caught.value.problems
    start = (
        "--resume: the run in new has no checkpoint yet, and the one it began with, old/checkpoint-4, cannot be used"
    )
    assert problem.what == f"{start}: {reason}"
