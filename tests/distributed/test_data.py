"""Several processes on one corpus: the same rows in the same steps, one build of the cache, and waiting for it."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.kit.commands import Result, Workspace, run_command, run_python
from tests.kit.models import write_custom, write_gated, write_llama
from tests.kit.processes import pretrain
from tests.kit.tokenizers import write_byte_tokenizer

REPOSITORY = Path(__file__).parents[2]
LENGTH = 16
CHUNKS = 48
ROWS = 4
STEPS = 3 * CHUNKS // ROWS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """48 chunks, each a document of its own with its number; a model that notes what it is given."""
    workspace = Workspace(tmp_path_factory.mktemp("corpus"))
    write_custom(workspace.path / "model", "probe")
    write_byte_tokenizer(workspace.path / "model")
    workspace.jsonl("data.jsonl", [f"{number:015d}" for number in range(CHUNKS)])
    return workspace


def _preset(workspace: Workspace, name: str, **values: Any) -> str:
    defaults = {
        "trust_remote_code": True,
        "output_dir": str(workspace.path / name),
        "data__cache_dir": str(workspace.path / f"cache-{name}"),
        "data__max_length": LENGTH,
        "training__max_steps": STEPS,
        "training__save_steps": 1000,
        "training__batch_size": 1,
        "training__global_batch_size": ROWS,
    }
    return str(workspace.preset(**(defaults | values)))


def _run(workspace: Workspace, name: str, nproc: int, *arguments: str, shard_bytes: int = 0, **values: Any) -> Result:
    """A run whose forward passes are noted in `probe-<name>`."""
    probe = workspace.path / f"probe-{name}"
    probe.mkdir(exist_ok=True)
    for path in probe.iterdir():
        path.unlink()
    command = ("pretrain", "--preset", _preset(workspace, name, **values), "--nproc", str(nproc), *arguments)
    environment = {"PROBE_DIR": str(probe), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    if shard_bytes:
        module = ("-m", "tests.kit.small_shards")
        result = run_python(*module, *command, cwd=workspace.path, SHARD_BYTES=str(shard_bytes), **environment)
    else:
        result = run_command(*command, cwd=workspace.path, **environment)
    assert result.code == 0, result.err
    return result


def _rows(workspace: Workspace, name: str, nproc: int) -> list[list[tuple[int, ...]]]:
    """The rows of each step, over all ranks, sorted."""
    ranks = []
    for rank in range(nproc):
        lines = (workspace.path / f"probe-{name}" / f"rank{rank}.jsonl").read_text().splitlines()
        ranks.append([row for line in lines for row in json.loads(line)["input_ids"]])
    own = ROWS // nproc
    steps = len(ranks[0]) // own
    return [
        sorted(tuple(row) for rank in ranks for row in rank[step * own : (step + 1) * own]) for step in range(steps)
    ]


def _hashes(workspace: Workspace, name: str) -> list[str]:
    return [record["data_hash"] for record in workspace.metrics(name)]


@pytest.fixture(scope="module")
def one(corpus: Workspace) -> list[list[tuple[int, ...]]]:
    """The rows of each step of one process."""
    _run(corpus, "one", 1)
    return _rows(corpus, "one", 1)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_a_step_has_the_same_rows_on_any_number_of_ranks_and_workers(
    corpus: Workspace, one: list[list[tuple[int, ...]]], nproc: int, workers: int
) -> None:
    """The corpus is cut into about ten shards, which the workers share. Of all ranks, which begin at once with an
    empty cache, one builds."""
    name = f"several-{nproc}-{workers}"
    result = _run(corpus, name, nproc, shard_bytes=130, data__num_workers=workers)
    assert len(list((corpus.path / f"cache-{name}" / "shards").iterdir())) >= 8
    assert result.out.count("Tokenizing 1 file") == 1
    assert result.out.count(" with 2 processes") == (workers == 2)
    assert len(list((corpus.path / f"cache-{name}" / "corpora").iterdir())) == 1
    assert _rows(corpus, name, nproc) == one
    assert _hashes(corpus, name) == _hashes(corpus, "one")
    assert len(set(_hashes(corpus, "one"))) == STEPS


def test_three_epochs_are_three_orders_of_the_whole_corpus(one: list[list[tuple[int, ...]]]) -> None:
    steps = CHUNKS // ROWS
    epochs = [one[number * steps : (number + 1) * steps] for number in range(3)]
    for epoch in epochs:
        rows = [row for step in epoch for row in step]
        assert len(set(rows)) == len(rows) == CHUNKS
    assert all(first != second for first, second in itertools.combinations(epochs, 2))


def test_a_run_goes_on_with_the_same_rows_on_other_numbers_of_ranks(
    corpus: Workspace, one: list[list[tuple[int, ...]]]
) -> None:
    """Stops within an epoch, at the end of one, and after a single step."""
    seen: list[list[tuple[int, ...]]] = []
    for last, nproc in ((5, 1), (12, 2), (13, 4), (20, 2), (STEPS, 1)):
        _run(corpus, "goes-on", nproc, "--resume", training__max_steps=last)
        seen += _rows(corpus, "goes-on", nproc)
        assert len(seen) == last
    assert seen == one
    assert _hashes(corpus, "goes-on") == _hashes(corpus, "one")


def test_a_mixture_is_exact_and_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    """2,000 chunks in 20 steps; every prefix of steps is off by less than one chunk."""
    workspace = Workspace(tmp_path)
    write_custom(workspace.path / "model", "probe")
    write_byte_tokenizer(workspace.path / "model")
    workspace.jsonl("a.jsonl", ["a" * 15] * 90)
    workspace.jsonl("b.jsonl", ["b" * 15] * 700)
    mixture = [
        {"path": str(workspace.path / "a.jsonl"), "weight": 0.7},
        {"path": str(workspace.path / "b.jsonl"), "weight": 0.3},
    ]
    values = {"data__path": mixture, "training__max_steps": 20, "training__global_batch_size": 100}
    for name, nproc in (("one", 1), ("two", 2)):
        result = _run(workspace, name, nproc, training__batch_size=50, **values)
        assert "Mixture: 0.7000 of the tokens from " in result.out
        assert "15.56 passes over its 90 chunks" in result.out
        counts = Counter(_first_bytes(workspace, name, nproc))
        assert counts == {ord("a"): 1400, ord("b"): 600}
    assert _hashes(workspace, "one") == _hashes(workspace, "two")
    letters = list(_first_bytes(workspace, "one", 1))
    for count in range(1, 2001):
        assert abs(letters[:count].count(ord("a")) - 0.7 * count) < 1


def _first_bytes(workspace: Workspace, name: str, nproc: int) -> Iterator[int]:
    for rank in range(nproc):
        for line in (workspace.path / f"probe-{name}" / f"rank{rank}.jsonl").read_text().splitlines():
            yield from (row[0] for row in json.loads(line)["input_ids"])


def test_a_builder_that_fails_ends_all_with_its_message(corpus: Workspace) -> None:
    corpus.raw("bad.jsonl", (corpus.path / "data.jsonl").read_bytes() + b'{"text": 5}\n')
    preset = _preset(corpus, "bad", data__path=str(corpus.path / "bad.jsonl"))
    result = run_command("pretrain", "--preset", preset, "--nproc", "4", cwd=corpus.path, PROBE_DIR=str(corpus.path))
    assert result.code == 2
    assert result.err.splitlines() == [
        f"Error: {corpus.path / 'bad.jsonl'}:{CHUNKS + 1}: 'text' holds a number, not text",
        "Fix: correct the line, set data.text_column, or set data.on_bad_line: skip",
        "See: docs/data.md",
    ]
    assert not (corpus.path / "bad").exists()
    assert not (corpus.path / "cache-bad").exists()


def test_waiting_for_the_cache_knows_no_time_limit(workspace: Workspace) -> None:
    """Real time: the builder stands at a gate for longer than a collective may take."""
    write_gated(workspace.path / "model")
    workspace.jsonl("data.jsonl", [f"document {index} " + "x" * 40 for index in range(40)])
    preset = str(workspace.preset(trust_remote_code=True, distributed__timeout_seconds=5))
    gates = {"GATES": "tokenize-1", "GATE_DIR": str(workspace.path)}
    with pretrain(preset, "--nproc", "2", cwd=workspace.path, **gates) as run:
        run.until(lambda: (workspace.path / "at-tokenize-1-0").exists(), "the builder")
        time.sleep(12)
        (workspace.path / "go-tokenize-1").touch()
        assert run.end() == 0, run.err
    assert len(workspace.metrics()) == 3


def test_of_two_runs_at_once_one_builds_and_the_other_waits(workspace: Workspace) -> None:
    write_gated(workspace.path / "model")
    workspace.jsonl("data.jsonl", [f"document {index} " + "x" * 40 for index in range(40)])
    gates = {"GATES": "tokenize-1", "GATE_DIR": str(workspace.path)}
    cache = str(workspace.path / "cache")
    first = str(workspace.preset(trust_remote_code=True, data__cache_dir=cache))
    with pretrain(first, cwd=workspace.path, **gates) as builder:
        builder.until(lambda: (workspace.path / "at-tokenize-1-0").exists(), "the builder")
        override = ("--output-dir", "other")
        with pretrain(first, *override, cwd=workspace.path, GATE_DIR=str(workspace.path)) as other:
            other.until(lambda: "Waiting for another process that builds the token cache" in other.out, "the other")
            (workspace.path / "go-tokenize-1").touch()
            assert (builder.end(), other.end()) == (0, 0), builder.err + other.err
            assert "Token cache: built" in builder.out
            assert "Token cache: reused" in other.out
    assert _hashes(workspace, "run") == _hashes(workspace, "other")


# --- Documents kept apart ------------------------------------------------------------------------------------------


def _curve(workspace: Workspace, name: str) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in workspace.metrics(name)]


def _train(workspace: Workspace, name: str, nproc: int, *overrides: str, **values: Any) -> Result:
    preset = _preset(workspace, name, training__max_steps=5, **values)
    arguments: Sequence[str] = [part for override in overrides for part in ("--set", override)]
    environment = {"OMP_NUM_THREADS": "1"}
    return run_command(
        "pretrain", "--preset", preset, "--nproc", str(nproc), *arguments, cwd=workspace.path, **environment
    )


def test_documents_are_kept_apart_alike_on_any_number_of_ranks(workspace: Workspace) -> None:
    write_llama(workspace.path / "model")
    write_byte_tokenizer(workspace.path / "model")
    workspace.jsonl("data.jsonl", [f"{index} " + "abc" * (index % 5) for index in range(80)])
    values = {"training__lr": 2e-4, "training__eps": 1e-5}
    runs = (
        ("one", 1, "auto", True),
        ("ddp", 2, "ddp", True),
        ("fsdp", 2, "fsdp", True),
        ("together", 1, "auto", False),
    )
    for name, nproc, strategy, apart in runs:
        done = _train(workspace, name, nproc, f"distributed.strategy={strategy}", data__document_mask=apart, **values)
        assert done.code == 0, done.err
    expected = _curve(workspace, "one")
    for name in ("ddp", "fsdp"):
        for own, other in zip(_curve(workspace, name), expected, strict=True):
            assert own == pytest.approx(other, abs=1e-5, rel=0)
    for own, other in zip(_curve(workspace, "together"), expected, strict=True):
        assert all(abs(together - apart) > 1e-4 for together, apart in zip(own, other, strict=True))
    assert _hashes(workspace, "one") == _hashes(workspace, "together")


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_hybrid_is_refused_with_its_block(workspace: Workspace, nproc: int) -> None:
    """By its code, before anything is loaded; and a model that only the probe can tell, on every rank at once."""
    workspace.jsonl("data.jsonl", ["some text that is long enough"] * 8)
    write_byte_tokenizer(workspace.path / "tokenizer")
    hybrid = REPOSITORY / "presets" / "models" / "tiny_hybrid"
    write_custom(workspace.path / "probe-model", "probe")
    for model, message in (
        (hybrid, "FFT blocks convolve from one document to the next (blocks_tiny_hybrid.py calls torch.fft)"),
        (workspace.path / "probe-model", "data.document_mask: no token's prediction depends on those before it"),
    ):
        values = {
            "model_dir": str(model),
            "tokenizer": str(workspace.path / "tokenizer"),
            "data__document_mask": True,
        }
        preset = _preset(workspace, "refused", **values)
        command = ("pretrain", "--preset", preset, "--nproc", str(nproc))
        result = run_command(*command, cwd=workspace.path, PROBE_DIR=str(workspace.path))
        assert result.code == 2, result.err
        assert message in result.err
        assert result.err.count("Fix: set data.document_mask: false") == 1
        assert not (workspace.path / "refused").exists()
