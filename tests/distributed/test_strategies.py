"""Several processes train what one process trains: loss, gradient norm, learning rate, gradients and token ids.

Real processes on gloo, started by the command line. One process with as many micro-batches as there are ranks is the
reference: it sees the same rows in the same micro-batches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.test_eulerstack import export
from tests.kit.commands import Result, Workspace, run_command, run_here, run_python
from tests.kit.models import write_custom, write_llama, write_mixtral
from tests.kit.tokenizers import write_byte_tokenizer

TINY_HYBRID = Path(__file__).parents[2] / "presets" / "models" / "tiny_hybrid"
TEXTS = [f"document {index} " + chr(97 + index % 26) * (20 + index) for index in range(40)]

MODELS: dict[str, Callable[[Path], Path]] = {
    "llama tied": lambda path: write_llama(path, tie_word_embeddings=True, vocab_size=250),
    "llama untied": lambda path: write_llama(path),
    "mixtral": lambda path: write_mixtral(path),
    "tiny_hybrid": lambda path: TINY_HYBRID,
    "eulerstack full": lambda path: export(path, "full"),
    "eulerstack attention": lambda path: export(path, "attention"),
}


@pytest.fixture
def ready(workspace: Workspace) -> Iterator[Workspace]:
    """A workspace with tokenizer and corpus. The reference computes with one thread, as each of the ranks does."""
    write_byte_tokenizer(workspace.path / "tokenizer")
    workspace.jsonl("data.jsonl", TEXTS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield workspace
    torch.set_num_threads(threads)


def _preset(workspace: Workspace, model: Path, **values: Any) -> str:
    """A preset for one rank of a step of 4 micro-batches; one padded row in most of them."""
    defaults: dict[str, Any] = {
        "model_dir": str(model),
        "trust_remote_code": True,
        "tokenizer": str(workspace.path / "tokenizer"),
        "output_dir": ...,
        "data__max_length": 32,
        "data__packing": False,
        "training__batch_size": 2,
        "training__global_batch_size": 8,
        "training__max_steps": 20,
        "training__warmup_steps": 4,
        "training__lr": 2e-4,
        # With the usual 1e-8, AdamW turns the rounding noise of gradients near zero into steps of full size: one
        # process on one thread and on two then differ by 1e-2 in the gradient norm after 20 steps.
        "training__eps": 1e-5,
    }
    return str(workspace.preset(**(defaults | values)))


def _parallel(workspace: Workspace, preset: str, name: str, nproc: int, strategy: str) -> Result:
    arguments = ("--nproc", str(nproc), "--set", f"distributed.strategy={strategy}", "--output-dir", name)
    result = run_command("pretrain", "--preset", preset, *arguments, cwd=workspace.path)
    assert result.code == 0, result.err + result.out
    return result


def _assert_same_run(workspace: Workspace, reference: str, other: str) -> None:
    expected, seen = workspace.metrics(reference), workspace.metrics(other)
    assert len(seen) == len(expected) == 20
    for left, right in zip(expected, seen, strict=True):
        assert right["step"] == left["step"]
        assert right["lr"] == left["lr"]
        assert right["tokens"] == left["tokens"]
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-5)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-5)
        assert right.get("aux_loss") == (
            None if "aux_loss" not in left else pytest.approx(left["aux_loss"], rel=1e-5)
        )


LINEAR_STEP = (
    "training.max_steps=1",
    "training.warmup_steps=0",
    "training.scheduler=constant",
    "training.weight_decay=0.0",
    "training.max_grad_norm=null",
    # AdamW's first step is lr * g / (|g| + eps): with both large, weights move by lr / eps = 100 times the gradient.
    "training.eps=1e4",
    "training.lr=1e6",
)


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def _assert_same_weights(reference: Path, other: Path, tolerance: float) -> None:
    expected, seen = _weights(reference), _weights(other)
    assert expected.keys() == seen.keys()
    for name, tensor in expected.items():
        assert torch.allclose(seen[name], tensor, rtol=0, atol=tolerance), name


def _overrides(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part for value in values for part in ("--set", value))


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_train_what_one_process_trains(ready: Workspace, name: str) -> None:
    preset = _preset(ready, MODELS[name](ready.path / "model"))
    assert run_here("pretrain", "--preset", preset, "--output-dir", "one").code == 0
    linear = _overrides(LINEAR_STEP)
    assert run_here("pretrain", "--preset", preset, "--output-dir", "one-linear", *linear).code == 0
    for strategy in ("ddp", "fsdp"):
        result = _parallel(ready, preset, strategy, 2, strategy)
        assert f"World size 2, strategy {strategy} (distributed.strategy: {strategy})" in result.out
        assert result.out.count("[Pretrain] step=1/20") == 1
        _assert_same_run(ready, "one", strategy)
        _assert_same_weights(ready.path / "one", ready.path / strategy, 2e-5)
    # Gradients of step 1, one by one, in the strategy where they are hardest to get right.
    done = run_command(
        "pretrain", "--preset", preset, "--output-dir", "linear", "--nproc", "2", *linear,
        "--set", "distributed.strategy=fsdp", cwd=ready.path,
    )  # fmt: skip
    assert done.code == 0, done.err
    _assert_same_weights(ready.path / "one-linear", ready.path / "linear", 100 * 1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "name", [name if name == "tiny_hybrid" else pytest.param(name, marks=pytest.mark.matrix) for name in MODELS]
)
def test_four_ranks_and_plain_torchrun(ready: Workspace, name: str, strategy: str) -> None:
    preset = _preset(ready, MODELS[name](ready.path / "model"))
    assert run_here("pretrain", "--preset", preset, "--output-dir", "one").code == 0
    _parallel(ready, preset, "four", 4, strategy)
    _assert_same_run(ready, "one", "four")
    _by_torchrun(ready, preset, "torchrun", f"distributed.strategy={strategy}")
    _assert_same_run(ready, "one", "torchrun")


@pytest.mark.matrix
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_the_first_step_under_ddp(ready: Workspace, name: str) -> None:
    preset = _preset(ready, MODELS[name](ready.path / "model"))
    assert run_here("pretrain", "--preset", preset, "--output-dir", "one", *_overrides(LINEAR_STEP)).code == 0
    _by_torchrun(ready, preset, "two", "distributed.strategy=ddp", *LINEAR_STEP)
    _assert_same_weights(ready.path / "one", ready.path / "two", 100 * 1e-6)


def _by_torchrun(workspace: Workspace, preset: str, name: str, *overrides: str) -> None:
    """Two workers under a torchrun that the user starts."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = ("-m", "eulerforge", "pretrain", "--preset", preset, "--output-dir", name, *_overrides(overrides))
    result = run_python(*torchrun, *command, cwd=workspace.path, OMP_NUM_THREADS="1")
    assert result.code == 0, result.err


def test_replicas_of_shards_train_the_same(ready: Workspace) -> None:
    """HSDP: two replicas, each sharded over two processes."""
    preset = _preset(ready, TINY_HYBRID, distributed__replicate=2, distributed__strategy="fsdp")
    single = _overrides(("distributed.replicate=1", "distributed.strategy=auto"))
    assert run_here("pretrain", "--preset", preset, "--output-dir", "one", *single).code == 0
    _parallel(ready, preset, "hybrid", 4, "fsdp")
    _assert_same_run(ready, "one", "hybrid")


@pytest.mark.parametrize("widths", [(8, 8, 8), (8, 12, 5)], ids=["equal", "different"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_experts_of_one_rank_only_get_the_gradients_of_one_process(
    ready: Workspace, strategy: str, widths: tuple[int, ...]
) -> None:
    """Rank r uses expert r; the third expert and one linear are used by nobody and get zero."""
    model = write_custom(ready.path / "model", "experts", widths=list(widths))
    preset = _preset(ready, model, training__global_batch_size=4)
    linear = _overrides(LINEAR_STEP)
    assert run_here("pretrain", "--preset", preset, "--output-dir", "one", *linear).code == 0
    done = run_command(
        "pretrain", "--preset", preset, "--output-dir", "two", "--nproc", "2", *linear,
        "--set", f"distributed.strategy={strategy}", cwd=ready.path,
    )  # fmt: skip
    assert done.code == 0, done.err
    _assert_same_weights(ready.path / "one", ready.path / "two", 100 * 1e-8)
    start = run_here("pretrain", "--preset", preset, "--output-dir", "start", "--set", "training.lr=0")
    assert start.code == 0, start.err
    before, after = _weights(ready.path / "start"), _weights(ready.path / "two")
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    for layer in range(2):
        assert moved[f"layers.{layer}.experts.0.up.weight"] > 1e-4
        assert moved[f"layers.{layer}.experts.1.up.weight"] > 1e-4
        assert moved[f"layers.{layer}.experts.2.up.weight"] == 0
        assert moved[f"layers.{layer}.unused.weight"] == 0


def test_a_model_without_blocks_is_not_sharded_as_one_giant_unit(ready: Workspace) -> None:
    preset = _preset(ready, write_custom(ready.path / "model", "probe"), distributed__strategy="fsdp")
    done = run_command(
        "pretrain", "--preset", preset, "--nproc", "2", "--output-dir", "two", cwd=ready.path,
        PROBE_DIR=str(ready.path),
    )  # fmt: skip
    assert done.code == 2
    assert done.err.count("no repeated blocks found to shard") == 1
    assert not (ready.path / "two").exists()


def test_ranks_see_disjoint_rows_that_are_the_reference_s(ready: Workspace) -> None:
    model = write_custom(ready.path / "model", "probe")
    preset = _preset(ready, model, data__packing=True, training__max_steps=5, distributed__strategy="ddp")
    seen: dict[str, list[list[list[int]]]] = {}
    for name, nproc in (("one", 1), ("two", 2)):
        folder = ready.path / f"probe-{name}"
        folder.mkdir()
        done = run_command(
            "pretrain", "--preset", preset, "--nproc", str(nproc), "--output-dir", name, cwd=ready.path,
            PROBE_DIR=str(folder),
        )  # fmt: skip
        assert done.code == 0, done.err
        for path in sorted(folder.glob("rank*.jsonl")):
            calls = [json.loads(line)["input_ids"] for line in path.read_text().splitlines()]
            seen[f"{name} {path.stem}"] = calls
    reference = seen["one rank0"]
    assert len(reference) == 5 * 4
    # Micro-batch m of rank r is micro-batch 2 * m + r of the single process.
    assert seen["two rank0"] == reference[0::2]
    assert seen["two rank1"] == reference[1::2]


def test_final_of_a_sharded_run_is_whole_and_loads(ready: Workspace) -> None:
    from transformers import AutoModelForCausalLM

    preset = _preset(ready, MODELS["llama tied"](ready.path / "model"), training__save_steps=10)
    _parallel(ready, preset, "two", 2, "fsdp")
    run = ready.path / "two"
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock",
        "checkpoint-10",
        "checkpoint-20",
        "final",
        "metrics.jsonl",
        "pretrain_config.json",
        "status.json",
        "tensorboard",
    ]
    assert len(list((run / "tensorboard").iterdir())) == 1
    config = json.loads((run / "final" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == 257
    snapshot = json.loads((run / "pretrain_config.json").read_text())
    assert (snapshot["world_size"], snapshot["strategy"], snapshot["grad_accum_steps"]) == (2, "fsdp", 2)
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    assert model.lm_head.weight is model.model.embed_tokens.weight
