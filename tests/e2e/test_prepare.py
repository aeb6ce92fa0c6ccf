"""`prepare`, `cache`, `tokenizer` and `data show`, as a user runs them; builds that are killed go on."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from tests.kit.commands import Result, Workspace, run_command, run_here, run_python
from tests.kit.models import write_llama
from tests.kit.processes import Command, marked, until
from tests.kit.tokenizers import write_byte_tokenizer

REPOSITORY = Path(__file__).parents[2]
SHARD_BYTES = 64 * 1024
KILLS = 10
EOS = 256


@pytest.fixture
def project(workspace: Workspace) -> Workspace:
    """A corpus and a tokenizer, no model."""
    write_byte_tokenizer(workspace.path / "tokenizer")
    workspace.jsonl("data.jsonl", [f"document {index} " + "x" * (index % 17) for index in range(60)])
    return workspace


def _preset(workspace: Workspace, **values: Any) -> str:
    defaults = {"tokenizer": str(workspace.path / "tokenizer"), "data__cache_dir": str(workspace.path / "cache")}
    return str(workspace.preset(**{key: value for key, value in (defaults | values).items() if value is not ...}))


def _prepare(workspace: Workspace, *arguments: str, **values: Any) -> Result:
    return run_here("prepare", "--preset", _preset(workspace, **values), *arguments)


def _files(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


def test_prepare_needs_no_model_and_pretrain_reuses_what_it_made(project: Workspace) -> None:
    result = _prepare(project)
    assert result.code == 0, result.err
    tokens = 60 * len("document 10 ") - 10 + sum(index % 17 for index in range(60)) + 60
    assert f"[Prepare] Tokenized 60 documents, {tokens:,} tokens in " in result.out
    assert f"[Prepare] Packed: {tokens:,} tokens → {tokens // 16} chunks (max_length=16)\n" in result.out
    assert result.out.endswith("[Prepare] Ready: pretrain reads this cache.\n")
    assert not (project.path / "model").exists()
    before = _files(project.path / "cache")
    write_llama(project.path / "model")
    trained = run_here("pretrain", "--preset", _preset(project))
    assert trained.code == 0, trained.err
    assert "Token cache: reused" in trained.out
    assert "Tokenizing" not in trained.out
    assert _files(project.path / "cache") == before


def test_prepare_takes_the_tokenizer_of_the_model_directory(project: Workspace) -> None:
    write_llama(project.path / "model")
    write_byte_tokenizer(project.path / "model")
    (project.path / "model" / "model.safetensors").unlink(missing_ok=True)
    assert _prepare(project, tokenizer=...).code == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokenizer": ...}, "model_dir: "),
        ({"tokenizer": "nowhere/tokenizer/at/all"}, "tokenizer: nowhere/tokenizer/at/all is not a directory"),
        ({"data__path": "none.jsonl"}, "none.jsonl does not exist"),
        ({"data__max_length": 8192}, "less than one chunk of data.max_length 8,192"),
        ({"data__text_column": "body"}, "data.jsonl:1: no key 'body'; keys found: 'text'"),
    ],
)
def test_what_prepare_cannot_use_leaves_nothing(project: Workspace, values: dict[str, Any], message: str) -> None:
    result = _prepare(project, **values)
    assert (result.code, result.err.count("\n")) == (2, 3)
    assert message in result.err
    assert not (project.path / "cache").exists()


def test_all_problems_of_the_data_are_told_at_once(project: Workspace) -> None:
    result = _prepare(project, data__path="none.jsonl", tokenizer="/nowhere")
    assert result.code == 2
    assert result.err.startswith("Error: 2 problems\n")


def test_a_mixture_says_how_often_each_source_is_seen(project: Workspace) -> None:
    project.jsonl("other.jsonl", ["y" * 160] * 10)
    mixture = [
        {"path": str(project.path / f"{name}.jsonl"), "weight": weight}
        for name, weight in (("data", 3), ("other", 1))
    ]
    result = _prepare(project, data__path=mixture, training__global_batch_size=4, training__max_steps=100)
    assert result.code == 0, result.err
    chunks = [int(number) for number in re.findall(r"→ (\d+) chunks", result.out)]
    for name, share, rows in (("data", 0.75, chunks[0]), ("other", 0.25, chunks[1])):
        line = f"Mixture: {share:.4f} of the tokens from {project.path / name}.jsonl, {share * 400 / rows:.2f} passes"
        assert line in result.out


# --- Builds that are disturbed -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A corpus of many small shards, one plain file and one that can only be read from its beginning."""
    workspace = Workspace(tmp_path_factory.mktemp("large"))
    write_byte_tokenizer(workspace.path / "tokenizer")
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh \n", k=draw.randint(1, 2000))) for _ in range(80 * SHARD_BYTES // 1000)]
    workspace.jsonl("corpus/a.jsonl", texts)
    table = pyarrow.table({"text": texts[: len(texts) // 2]})
    pyarrow.parquet.write_table(table, workspace.path / "corpus" / "b.parquet", compression="zstd")
    done = run_python(*_build(workspace, "straight"), cwd=workspace.path, **_environment())
    assert done.code == 0, done.err
    return workspace


def _environment() -> dict[str, str]:
    return {"PYTHONPATH": str(REPOSITORY), "SHARD_BYTES": str(SHARD_BYTES)}


def _build(workspace: Workspace, cache: str, workers: int = 1) -> list[str]:
    preset = _preset(
        workspace,
        data__path=str(workspace.path / "corpus"),
        data__cache_dir=str(workspace.path / cache),
        data__num_workers=workers,
    )
    return ["-m", "tests.kit.small_shards", "prepare", "--preset", preset]


def _shards(cache: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each finished shard."""
    found = {}
    for path in (cache / "shards").glob("*/shard.json"):
        status = path.stat()
        found[path.parent.name] = (status.st_ino, status.st_mtime_ns)
    return found


def test_any_number_of_processes_writes_the_same_bytes(large: Workspace) -> None:
    straight = _files(large.path / "straight")
    assert len(_shards(large.path / "straight")) > 60  # twice the size, as the file is large for such shards
    for workers in (2, 3):
        done = run_python(*_build(large, "several", workers), cwd=large.path, **_environment())
        assert done.code == 0, done.err
        assert f"with {workers} processes" in done.out
        assert _files(large.path / "several") == straight
        shutil.rmtree(large.path / "several")


def test_a_build_killed_ten_times_ends_with_the_same_bytes_and_does_nothing_twice(large: Workspace) -> None:
    """The kills come after a random number of further shards; the workers must not outlive their parent."""
    cache, draw = large.path / "killed", random.Random(1)
    building, kept = cache / "building", {}
    for _ in range(KILLS):
        goal = len(kept) + draw.randint(0, 7)
        with Command.start(*_build(large, "killed", workers=2), cwd=large.path, **_environment()) as run:
            run.until(
                lambda goal=goal, building=building: building.exists() and len(_shards(cache)) >= goal, "shards"
            )
            run.process.kill()
            run.end()
            until(lambda run=run: not marked(run.marker), "the end of the workers")
        found = _shards(cache)
        assert {name: found.get(name) for name in kept} == kept
        kept = found
    assert not list((cache / "corpora").glob("*.json")), "the last kill came too late"
    done = run_python(*_build(large, "killed", workers=2), cwd=large.path, **_environment())
    assert done.code == 0, done.err
    found = _shards(cache)
    assert {name: found[name] for name in kept} == kept
    assert _files(cache) == _files(large.path / "straight")
    assert not (cache / "building").exists()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_a_build_in_order_and_it_goes_on(
    large: Workspace, number: signal.Signals, workers: int
) -> None:
    name = f"signal-{number.name}-{workers}"
    cache = large.path / name
    with Command.start(*_build(large, name, workers), cwd=large.path, **_environment()) as run:
        run.until(lambda: len(_shards(cache)) >= 5, "five shards")
        run.process.send_signal(number)
        assert run.end() == 75
        until(lambda: not marked(run.marker), "the end of the workers")
        assert run.err == f"[Prepare] stopped by {number.name}. Finished parts are kept: run it again to go on.\n"
    kept = _shards(cache)
    assert len(kept) >= 5
    assert [path.name for path in cache.iterdir()] == ["shards"]
    done = run_python(*_build(large, name, workers), cwd=large.path, **_environment())
    assert done.code == 0, done.err
    assert {name: value for name, value in _shards(cache).items() if name in kept} == kept
    assert _files(cache) == _files(large.path / "straight")


# --- cache ls, cache rm --------------------------------------------------------------------------------------------


def _cache(workspace: Workspace, *arguments: str) -> Result:
    return run_here("cache", *arguments, "--cache-dir", str(workspace.path / "cache"))


def test_the_cache_is_listed_and_removed(project: Workspace) -> None:
    project.jsonl("more.jsonl", ["some more text"] * 20)
    for path in ("data.jsonl", "more.jsonl"):
        assert _prepare(project, data__path=str(project.path / path)).code == 0
    listed = _cache(project, "ls")
    header, *lines = listed.out.splitlines()
    assert header.split() == ["KEY", "LAST", "USED", "SIZE", "DOCUMENTS", "TOKENS", "PATH"]
    by_name = {Path(line.split()[-1]).name: line.split() for line in lines}
    assert set(by_name) == {"data.jsonl", "more.jsonl"}
    assert by_name["more.jsonl"][5:7] == ["20", "300"]
    removed = _cache(project, "rm", by_name["more.jsonl"][0])
    assert (removed.code, removed.out.startswith("Removed 1 corpora, ")) == (0, True)
    assert "more.jsonl" not in _cache(project, "ls").out
    assert len(_shards(project.path / "cache")) == 1
    assert "Token cache: reused" in _prepare(project).out
    assert _cache(project, "rm", "--all").code == 0
    assert _files(project.path / "cache") == {}
    assert _cache(project, "ls").out == f"{project.path / 'cache'} holds no token cache\n"


def test_what_a_killed_build_has_left_is_listed_and_removed(project: Workspace) -> None:
    assert _prepare(project).code == 0
    for path in (project.path / "cache" / "corpora").iterdir():
        path.unlink()
    (project.path / "cache" / "building" / "key" / "tmp1").mkdir(parents=True)
    assert re.fullmatch(
        r"unfinished: 2 shards, .* \(`eulerforge cache rm --unfinished`\)\n", _cache(project, "ls").out
    )
    assert _cache(project, "rm", "--unfinished").code == 0
    assert _cache(project, "ls").out.endswith("holds no token cache\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rm",), "nothing to remove"),
        (("rm", "abc"), "no key in"),
        (("rm", ""), "2 keys in"),
    ],
)
def test_what_cannot_be_removed(project: Workspace, arguments: tuple[str, ...], message: str) -> None:
    for policy in (True, False):
        assert _prepare(project, data__add_eos=policy).code == 0
    before = _files(project.path / "cache")
    result = _cache(project, *arguments)
    assert result.code == 2
    assert message in result.err
    assert _files(project.path / "cache") == before


def test_a_cache_that_is_not_there(project: Workspace) -> None:
    result = run_here("cache", "ls", "--cache-dir", str(project.path / "nowhere"))
    assert (result.code, result.err.count("\n")) == (2, 3)


# --- tokenizer -----------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_trained_and_a_model_with_it(project: Workspace) -> None:
    project.raw("more/a.txt", b"naive caf\xc3\xa9 words " * 50)
    data = ("--data", str(project.path / "data.jsonl"), "--data", str(project.path / "more"))
    result = run_here("tokenizer", *data, "--vocab-size", "300", "--output", str(project.path / "mine"))
    assert result.code == 0, result.err
    assert "[Tokenizer] Learning 300 entries from 2 files\n" in result.out
    assert "[Tokenizer] Read 61 texts, " in result.out
    tokenizer = AutoTokenizer.from_pretrained(project.path / "mine")
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id) == (300, 0, 0)
    text = " naive  caf\u00e9\n\t\u65e5\u672c \U0001f600 <|endoftext|"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(" words words")["input_ids"]) == 2
    write_llama(project.path / "model")
    trained = run_here("pretrain", "--preset", _preset(project, tokenizer=str(project.path / "mine")))
    assert trained.code == 0, trained.err
    assert "Tokenizer vocab (300) > model vocab" in trained.out


def test_a_small_text_gives_fewer_entries_and_says_so(project: Workspace) -> None:
    project.jsonl("small.jsonl", ["ab ab ab", ""])
    project.raw("bad.jsonl", b'{"text": "ab"}\noops\n')
    data = ("--data", str(project.path / "small.jsonl"), "--data", str(project.path / "bad.jsonl"))
    arguments = ("--vocab-size", "1000", "--output", str(project.path / "mine"), "--eos", "<end>")
    result = run_here("tokenizer", *data, *arguments, "--on-bad-line", "skip")
    assert result.code == 0, result.err
    entries = len(AutoTokenizer.from_pretrained(project.path / "mine"))
    assert f"Warning: the text holds only {entries} entries; give more text for 1000" in result.out
    assert "Skipped 1 lines: malformed JSON" in result.out
    assert AutoTokenizer.from_pretrained(project.path / "mine").eos_token == "<end>"


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        ("data.jsonl", ("--vocab-size", "256"), "--vocab-size 256 is too small"),
        ("data.jsonl", ("--vocab-size", "many"), "--vocab-size"),
        ("data.jsonl", ("--eos", " "), "--eos is empty"),
        ("data.jsonl", ("--output", "tokenizer"), "--output: "),
        ("data.jsonl", ("--output", "data.jsonl/x"), "--output: "),
        ("none.jsonl", (), "none.jsonl does not exist"),
        ("bad.jsonl", (), "bad.jsonl:2: malformed JSON"),
        ("data.jsonl", ("--text-column", "body"), "data.jsonl:1: no key 'body'"),
        ("empty.jsonl", (), "there is no text to learn from"),
        ("ids.npy", (), "token ids hold no text"),
    ],
)
def test_a_tokenizer_that_cannot_be_trained(
    project: Workspace, data: str, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.path)
    project.raw("bad.jsonl", b'{"text": "ab"}\noops\n')
    project.raw("empty.jsonl", b'{"text": ""}\n')
    np.arange(10, dtype="<u2").tofile(project.path / "ids.npy")
    before = _files(project.path)
    defaults = {"--vocab-size": "300", "--output": "mine"} | dict(zip(arguments[::2], arguments[1::2], strict=True))
    result = run_here("tokenizer", "--data", data, *(part for pair in defaults.items() for part in pair))
    assert (result.code, result.err.count("\n")) == (2, 3), result.err
    assert message in result.err
    assert _files(project.path) == before


# --- data show -----------------------------------------------------------------------------------------------------


def _show(workspace: Workspace, step: int, *arguments: str) -> Result:
    return run_here("data", "show", "--run", str(workspace.path / "run"), "--step", str(step), *arguments)


def _trained(workspace: Workspace, *arguments: str, **values: Any) -> None:
    if not (workspace.path / "model").exists():
        write_llama(workspace.path / "model")
    result = run_here("pretrain", "--preset", _preset(workspace, **values), *arguments)
    assert result.code == 0, result.err


def test_a_step_in_file_order_shows_documents_lines_and_text(project: Workspace) -> None:
    project.jsonl("data.jsonl", ["abcdef", "ghi", "", "jklmnopqrst", "uvwxyz"])
    _trained(project, data__shuffle=False, data__max_length=8, training__max_steps=1, training__batch_size=3)
    rows = [json.loads(line) for line in _show(project, 1, "--json").out.splitlines()]
    file = project.path / "data.jsonl"
    seen = [
        [
            (part["location"], part["from_start"], part["first"], part["last"], part["text"])
            for part in row["documents"]
        ]
        for row in rows
    ]
    assert seen == [
        [(f"{file}:1", True, 0, 6, "abcdef<eos>"), (f"{file}:2", True, 7, 7, "g")],
        [(f"{file}:2", False, 0, 2, "hi<eos>"), (f"{file}:4", True, 3, 7, "jklmn")],
        [(f"{file}:4", False, 0, 6, "opqrst<eos>"), (f"{file}:5", True, 7, 7, "u")],
    ]
    assert [(row["place"], row["row"], row["tokens"]) for row in rows] == [(0, 0, 8), (1, 1, 8), (2, 2, 8)]
    text = _show(project, 1).out.splitlines()
    assert text[0] == f"row 0: chunk 0 of {file}, 8 tokens"
    assert text[1] == f'  {file}:1, tokens 0 to 6: "abcdef<eos>"'
    assert text[4] == f'  {file}:2 (goes on), tokens 0 to 2: "hi<eos>"'
    assert text[-1] == f"data_hash {project.metrics()[0]['data_hash']} (as in metrics.jsonl)"


def test_every_step_shows_what_metrics_have_noted(project: Workspace) -> None:
    """Packed and shuffled over more than one epoch, before and after a resume; a mixture; unpacked rows."""
    pyarrow.parquet.write_table(pyarrow.table({"text": ["p" * 40, "q" * 40] * 9}), project.path / "b.parquet")
    mixture = [
        {"path": str(project.path / "data.jsonl"), "weight": 0.7},
        {"path": str(project.path / "b.parquet"), "weight": 0.3},
    ]
    for values in ({}, {"data__path": mixture}, {"data__packing": False}):
        shutil.rmtree(project.path / "run", ignore_errors=True)
        defaults = {"training__batch_size": 16, "data__max_length": 32, "training__save_steps": 3}
        _trained(project, training__max_steps=3, **defaults, **values)
        _trained(project, "--resume", training__max_steps=6, **defaults, **values)
        hashes = [record["data_hash"] for record in project.metrics()]
        assert len(hashes) == len(set(hashes)) == 6
        for step, expected in enumerate(hashes, 1):
            result = _show(project, step)
            assert result.code == 0, result.err
            assert result.out.endswith(f"data_hash {expected} (as in metrics.jsonl)\n")


def test_rows_of_a_mixture_name_their_source(project: Workspace) -> None:
    project.raw("notes/one.txt", b"first note " * 10)
    project.raw("notes/two.txt", b"second note " * 10)
    mixture = [
        {"path": str(project.path / "data.jsonl"), "weight": 1},
        {"path": str(project.path / "notes"), "weight": 1},
    ]
    _trained(project, data__path=mixture, data__shuffle=False, training__max_steps=1, training__batch_size=4)
    rows = [json.loads(line) for line in _show(project, 1, "--json").out.splitlines()]
    sources = [row["source"] for row in rows]
    assert sorted(sources) == sorted([str(project.path / "data.jsonl")] * 2 + [str(project.path / "notes")] * 2)
    notes = [row for row in rows if row["source"].endswith("notes")]
    assert [row["row"] for row in notes] == [0, 1]
    assert notes[0]["documents"][0]["location"] == f"{project.path / 'notes' / 'one.txt'}:1"
    assert notes[0]["documents"][0]["text"] == "first note first"


def test_long_texts_are_cut_unless_all_is_asked_for(project: Workspace) -> None:
    project.jsonl("data.jsonl", ["z" * 300])
    write_llama(project.path / "model", max_position_embeddings=512)
    _trained(project, data__max_length=300, training__max_steps=1, training__batch_size=1)
    assert f'"{"z" * 200}..."' in _show(project, 1).out
    assert f'"{"z" * 300}"' in _show(project, 1, "--full").out


def test_what_cannot_be_shown(project: Workspace) -> None:
    _trained(project, training__max_steps=2)
    for step in (0, 3):
        result = _show(project, step)
        assert (result.code, "give a step from 1 to 2" in result.err) == (2, True)
    result = run_here("data", "show", "--run", str(project.path), "--step", "1")
    assert (result.code, "holds no pretrain_config.json" in result.err) == (2, True)
    metrics = project.path / "run" / "metrics.jsonl"
    good = metrics.read_text()
    metrics.write_text(good.replace(project.metrics()[0]["data_hash"], "0" * 12))
    result = _show(project, 1)
    assert (result.code, "metrics.jsonl says 000000000000" in result.err) == (2, True)
    metrics.unlink()
    assert _show(project, 1).out.endswith("(not logged in metrics.jsonl)\n")
    shutil.rmtree(project.path / "cache")
    result = _show(project, 1)
    assert (result.code, "eulerforge prepare" in result.err) == (2, True)
    assert _prepare(project, training__max_steps=2).code == 0
    assert _show(project, 1).code == 0
    (project.path / "run" / "pretrain_config.json").write_text("{}")
    result = _show(project, 1)
    assert (result.code, "was written by another version" in result.err) == (2, True)


def test_help_names_the_commands(project: Workspace) -> None:
    result = run_command("--help", cwd=project.path)
    assert result.code == 0
    for command in ("pretrain", "prepare", "cache", "tokenizer", "data", "export", "schema", "quickstart"):
        assert re.search(rf"^    {command}\b", result.out, re.M), command
