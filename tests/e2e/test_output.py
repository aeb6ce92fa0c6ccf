"""What a run leaves behind: console lines, run directory, and a `final/` that plain transformers loads anywhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.kit.commands import Workspace, run_command, run_python
from tests.kit.models import write_custom, write_llama, write_mixtral
from tests.kit.tokenizers import EOS, write_byte_tokenizer

TEXTS = [f"document {index} with some text in it" for index in range(12)]

# Loads a directory the way a user does, in a process that has never seen the source, and keeps its logits.
RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
ids = torch.tensor([tokenizer("some text")["input_ids"]])
with torch.no_grad():
    logits = model(input_ids=ids).logits
torch.save({"ids": ids, "logits": logits, "buffers": dict(model.named_buffers()), "dtype": str(model.dtype)}, target)
"""


def reload_in_new_process(workspace: Workspace, path: Path) -> dict[str, torch.Tensor]:
    """Logits and buffers of a directory in a new process with an empty cache of remote code."""
    target = workspace.path / "reloaded.pt"
    modules = workspace.path / "modules"
    shutil.rmtree(modules, ignore_errors=True)
    result = run_python("-c", RELOAD, str(path), str(target), cwd=workspace.path, HF_MODULES_CACHE=str(modules))
    assert result.code == 0, result.err
    return torch.load(target, weights_only=True)


def test_run_directory_and_console_lines(workspace: Workspace, byte_tokenizer: Path) -> None:
    write_llama(workspace.path / "model")
    workspace.jsonl("data.jsonl", TEXTS)
    preset = workspace.preset(
        tokenizer=str(byte_tokenizer),
        data__path="data.jsonl",
        model_dir="model",
        output_dir="run",
        training__max_steps=6,
        training__log_steps=2,
        training__save_steps=4,
        training__warmup_steps=2,
    )
    result = run_command("pretrain", "--preset", str(preset), cwd=workspace.path)
    assert result.code == 0, result.err
    assert result.err == ""
    lines = result.out.splitlines()
    root = workspace.path
    parameters = 2 * 260 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16
    expected = [
        "[Pretrain] Config validation passed.",
        f"[Pretrain] model_dir: {root}/model",
        "[Pretrain] data.path: data.jsonl",
        "[Pretrain] training.max_steps: 6",
        "[Pretrain] Device: cpu",
        f"[Pretrain] Loading model from {root}/model",
        f"[Pretrain] Model loaded: {parameters:,} params, {parameters:,} trainable, dtype=torch.float32 "
        "(initialised from seed 42)",
        f"[Pretrain] Tokenizer: {byte_tokenizer} (vocab=257)",
        "[Pretrain] Loaded 12 texts from data.jsonl",
        f"[Pretrain] Packed: {sum(len(t) + 1 for t in TEXTS)} tokens → {sum(len(t) + 1 for t in TEXTS) // 16} chunks "
        "(max_length=16)",
        "[Pretrain] Starting training: max_steps=6, batch_size=2, grad_accum=1, lr=0.01, warmup=2",
        "[Pretrain] Checkpoint saved: run/checkpoint-4",
        "[Pretrain] Checkpoint saved: run/checkpoint-6",
    ]
    positions = [lines.index(line) for line in expected]
    assert positions == sorted(positions)
    steps = [line for line in lines if line.startswith("[Pretrain] step=")]
    pattern = (
        r"\[Pretrain\] step=\d/6 \| loss=\d+\.\d{4} \| lr=\d\.\d\de[-+]\d\d \| \d+\.\d\d steps/s \| [\d,]+ tok/s \| "
    )
    assert [line.split("/")[0] for line in steps] == [f"[Pretrain] step={k}" for k in (2, 4, 6)]
    assert all(re.match(pattern, line) for line in steps)
    assert re.fullmatch(
        r"\[Pretrain\] Training complete\. 6 steps in \d+\.\ds\. Final model saved to run/final", lines[-1]
    )

    run = root / "run"
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock",
        "checkpoint-4",
        "checkpoint-6",
        "final",
        "metrics.jsonl",
        "pretrain_config.json",
        "status.json",
        "tensorboard",
    ]
    assert workspace.status() == {"status": "finished", "step": 6, "reason": ""}
    records = workspace.metrics()
    assert [record["step"] for record in records] == [2, 4, 6]
    assert all(list(record)[:4] == ["step", "loss", "lr", "elapsed_sec"] for record in records)
    config = json.loads((run / "pretrain_config.json").read_text())
    assert config["preset"]["model_dir"] == f"{root}/model"
    assert config["preset"]["data"]["path"] == f"{root}/data.jsonl"
    assert config["preset"]["training"]["eps"] == 1e-8
    assert config["world_size"] == 1
    assert any("precision" in decision for decision in config["decisions"])
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(
        [record["loss"] for record in records], rel=1e-6
    )
    last, final = run / "checkpoint-6", run / "final"
    assert (last / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()
    assert {path.name for path in last.iterdir()} == {path.name for path in final.iterdir()} | {"trainer_state"}


def test_buffers_of_custom_code_survive_reload_with_the_source_gone(
    workspace: Workspace, byte_tokenizer: Path
) -> None:
    """transformers 5 leaves such buffers uninitialised; every saved directory must load right all the same."""
    source = write_custom(workspace.path / "model", "buffers", tie_word_embeddings=True)
    workspace.jsonl("data.jsonl", TEXTS)
    result = workspace.pretrain(trust_remote_code=True, tokenizer=str(byte_tokenizer))
    assert result.code == 0, result.err
    source.rename(workspace.path / "gone")
    table = torch.exp(-torch.arange(16) / 8.0)
    offsets = torch.arange(16) / 16
    for name in ("checkpoint-3", "final"):
        saved = workspace.path / "run" / name
        seen = reload_in_new_process(workspace, saved)
        weights = load_file(saved / "model.safetensors")
        assert torch.equal(seen["buffers"]["table"], table)
        embedding = weights["embed.weight"]
        expected = (embedding[seen["ids"]] * table + offsets) @ embedding.T
        assert torch.allclose(seen["logits"], expected, atol=1e-6)


def test_a_trained_directory_can_be_trained_again(workspace: Workspace, byte_tokenizer: Path) -> None:
    """`final/` is a model directory like any other: its weights are the start, its code still complete."""
    write_custom(workspace.path / "model", "buffers", tie_word_embeddings=True)
    workspace.jsonl("data.jsonl", TEXTS)
    assert workspace.pretrain(trust_remote_code=True, tokenizer=str(byte_tokenizer)).code == 0
    (workspace.path / "model").rename(workspace.path / "gone")
    first = workspace.path / "run" / "final"
    second = workspace.path / "again" / "final"
    result = run_command(
        "pretrain",
        "--preset",
        str(workspace.preset(trust_remote_code=True, model_dir=str(first), training__lr=0.0)),
        "--output-dir",
        "again",
        cwd=workspace.path,
    )
    assert result.code == 0, result.err
    assert "(model.safetensors)" in result.out
    assert (second / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert sorted(path.name for path in second.iterdir()) == sorted(path.name for path in first.iterdir())
    shutil.rmtree(first)
    assert torch.equal(reload_in_new_process(workspace, second)["buffers"]["table"], torch.exp(-torch.arange(16) / 8))


@pytest.mark.parametrize("tied", [True, False])
def test_vocabulary_grows_for_added_tokens(workspace: Workspace, tied: bool) -> None:
    """Added tokens count; old rows stay untouched, tied stays tied, and the saved config says the new size."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = write_llama(workspace.path / "model", vocab_size=258, tie_word_embeddings=tied)
    start = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    start.save_pretrained(source)
    tokenizer = write_byte_tokenizer(workspace.path / "tokenizer", extra=5)  # ids up to 261
    workspace.jsonl("data.jsonl", [*TEXTS, "<extra4>" * 3])
    result = workspace.pretrain(tokenizer=str(tokenizer), training__lr=0.0)
    assert result.code == 0, result.err
    assert "Tokenizer vocab (262) > model vocab (258). Resizing model embeddings to 262." in result.out
    final = workspace.path / "run" / "final"
    weights = load_file(final / "model.safetensors")
    before = start.state_dict()
    assert weights["model.embed_tokens.weight"].shape == (262, 16)
    assert torch.equal(weights["model.embed_tokens.weight"][:258], before["model.embed_tokens.weight"])
    new_rows = weights["model.embed_tokens.weight"][258:]
    assert 0.005 < new_rows.std() < 0.05  # drawn like the others, not copies of one mean
    assert json.loads((final / "config.json").read_text())["vocab_size"] == 262
    reloaded = AutoModelForCausalLM.from_pretrained(final)
    assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) is tied


def test_vocabulary_never_shrinks(workspace: Workspace, byte_tokenizer: Path) -> None:
    write_llama(workspace.path / "model", vocab_size=400)
    workspace.jsonl("data.jsonl", TEXTS)
    result = workspace.pretrain(tokenizer=str(byte_tokenizer))
    assert result.code == 0, result.err
    assert "Resizing" not in result.out
    weights = load_file(workspace.path / "run" / "final" / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape == (400, 16)


def test_token_ids_of_the_tokenizer_win_over_the_config(workspace: Workspace, byte_tokenizer: Path) -> None:
    write_llama(workspace.path / "model", eos_token_id=5)
    workspace.jsonl("data.jsonl", TEXTS)
    result = workspace.pretrain(tokenizer=str(byte_tokenizer))
    assert result.code == 0, result.err
    assert f"Warning: config.json says eos_token_id 5, the tokenizer says {EOS}" in result.out
    final = workspace.path / "run" / "final"
    for name in ("config.json", "generation_config.json"):
        assert json.loads((final / name).read_text())["eos_token_id"] == EOS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_dtype_is_the_one_that_config_and_preset_say(
    workspace: Workspace, byte_tokenizer: Path, dtype: str
) -> None:
    write_llama(workspace.path / "model")
    workspace.jsonl("data.jsonl", TEXTS)
    result = workspace.pretrain(tokenizer=str(byte_tokenizer), training__dtype=dtype, training__amp=...)
    assert result.code == 0, result.err
    final = workspace.path / "run" / "final"
    with safe_open(final / "model.safetensors", "pt") as weights:
        dtypes = {str(weights.get_tensor(key).dtype) for key in weights.keys()}  # noqa: SIM118
    assert dtypes == {f"torch.{dtype}"}
    assert json.loads((final / "config.json").read_text())["dtype"] == dtype


def test_bfloat16_trains_on_float32_masters(
    workspace: Workspace, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bfloat16 norm weight would stay at exactly 1.0 under updates of 3e-4; float32 masters move."""
    monkeypatch.setenv("EULERFORGE_ALLOW_SLOW_BF16", "1")
    write_custom(workspace.path / "probe", "probe")
    write_llama(workspace.path / "model")
    workspace.jsonl("data.jsonl", TEXTS)
    result = workspace.pretrain(
        tokenizer=str(byte_tokenizer),
        training__dtype="bfloat16",
        training__amp=...,
        training__lr=3e-4,
        training__max_steps=60,
        training__scheduler="constant",
    )
    assert result.code == 0, result.err
    assert "  stored  float32   master weights and optimiser state (auto: " in result.out
    assert "  compute bfloat16  autocast" in result.out
    assert "  saved   bfloat16  weights" in result.out
    norm = load_file(workspace.path / "run" / "final" / "model.safetensors")["model.norm.weight"]
    assert (norm != 1.0).any()


def test_mixtral_is_saved_under_the_names_that_transformers_stores(
    workspace: Workspace, byte_tokenizer: Path
) -> None:
    """transformers fuses experts in memory and splits them on disk: loading, training and saving keep its names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = write_mixtral(workspace.path / "model")
    start = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    start.save_pretrained(source)
    workspace.jsonl("data.jsonl", TEXTS)
    result = workspace.pretrain(tokenizer=str(byte_tokenizer), training__lr=0.0)
    assert result.code == 0, result.err
    before, after = (load_file(path / "model.safetensors") for path in (source, workspace.path / "run" / "final"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_weights_in_the_directory_are_the_start(workspace: Workspace, byte_tokenizer: Path) -> None:
    source = write_llama(workspace.path / "model")
    workspace.jsonl("data.jsonl", TEXTS)
    assert workspace.pretrain(tokenizer=str(byte_tokenizer), training__lr=0.0, output_dir="first").code == 0
    weights = load_file(workspace.path / "first" / "final" / "model.safetensors")
    marked = {key: torch.full_like(value, 0.125) for key, value in weights.items()}
    save_file(marked, source / "model.safetensors", metadata={"format": "pt"})
    result = workspace.pretrain(tokenizer=str(byte_tokenizer), training__lr=0.0)
    assert result.code == 0, result.err
    assert "(model.safetensors)" in result.out
    after = load_file(workspace.path / "run" / "final" / "model.safetensors")
    assert all((value == 0.125).all() for value in after.values())


def test_second_run_reuses_the_token_cache(workspace: Workspace, byte_tokenizer: Path) -> None:
    write_llama(workspace.path / "model")
    workspace.jsonl("data.jsonl", TEXTS)
    first = workspace.pretrain(tokenizer=str(byte_tokenizer))
    second = workspace.pretrain(tokenizer=str(byte_tokenizer), output_dir="second")
    assert "Token cache: built" in first.out
    assert "Token cache: reused" in second.out
    drop = ("elapsed_sec", "tokens_per_sec", "steps_per_sec", "data_wait")
    runs = [[{k: v for k, v in r.items() if k not in drop} for r in workspace.metrics(n)] for n in ("run", "second")]
    assert runs[0] == runs[1]


def test_bad_lines_are_skipped_and_counted_when_asked(workspace: Workspace, byte_tokenizer: Path) -> None:
    write_llama(workspace.path / "model")
    good = [json.dumps({"text": text}) for text in TEXTS]
    bad = ["not json", '["list"]', '{"other": 1}', '{"text": null}', '{"text": ""}', '{"text": "lone \\ud800"}']
    workspace.raw("data.jsonl", "\n".join([*good, *bad]).encode())
    result = workspace.pretrain(tokenizer=str(byte_tokenizer), data__on_bad_line="skip")
    assert result.code == 0, result.err
    assert "Loaded 13 texts" in result.out
    notes = next(line for line in result.out.splitlines() if "Data notes" in line)
    for note in (
        "1 skipped, malformed JSON",
        "1 skipped, not an object",
        "1 skipped, no text column",
        "1 skipped, text not a string",
        "1 empty texts dropped",
        "1 texts with lone surrogates repaired",
    ):
        assert note in notes
    config = json.loads((workspace.path / "run" / "pretrain_config.json").read_text())
    assert config["data"]["counts"]["skipped"]["malformed JSON"] == 1


def test_default_output_dir_is_named_after_the_time(workspace: Workspace, byte_tokenizer: Path) -> None:
    write_llama(workspace.path / "model")
    workspace.jsonl("data.jsonl", TEXTS)
    for _ in range(2):  # both within one second: the second gets a suffix instead of an error
        assert workspace.pretrain(tokenizer=str(byte_tokenizer), output_dir=..., training__max_steps=1).code == 0
    names = sorted(path.name for path in (workspace.path / "outputs").iterdir())
    assert len(names) == 2
    assert all(re.fullmatch(r"pretrain_\d{8}_\d{6}(_2)?", name) for name in names)


def test_global_batch_size_sets_the_accumulation(workspace: Workspace, byte_tokenizer: Path) -> None:
    write_llama(workspace.path / "model")
    workspace.jsonl("data.jsonl", TEXTS)
    result = workspace.pretrain(tokenizer=str(byte_tokenizer), training__global_batch_size=6)
    assert result.code == 0, result.err
    assert "batch_size=2, grad_accum=3," in result.out
    assert workspace.metrics()[0]["tokens"] == 6 * 16


def test_variables_of_other_programs_do_not_make_it_wait_for_ranks(
    workspace: Workspace, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A SLURM allocation, or a shell with a left-over WORLD_SIZE: still one process."""
    for name, value in {
        "WORLD_SIZE": "8",
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "8",
        "SLURM_JOB_ID": "1",
        "SLURM_NTASKS_PER_NODE": "4",
    }.items():
        monkeypatch.setenv(name, value)
    write_llama(workspace.path / "model")
    workspace.jsonl("data.jsonl", TEXTS)
    result = workspace.pretrain(tokenizer=str(byte_tokenizer))
    assert result.code == 0, result.err
    assert "x 1 process = 2 rows" in result.out


def test_a_reader_that_leaves_does_not_end_the_run(workspace: Workspace, byte_tokenizer: Path) -> None:
    """`eulerforge pretrain ... | head -1`: the log is cut off, the training is not."""
    write_llama(workspace.path / "model")
    workspace.jsonl("data.jsonl", TEXTS)
    preset = workspace.preset(tokenizer=str(byte_tokenizer))
    command = [sys.executable, "-m", "eulerforge", "pretrain", "--preset", str(preset)]
    with subprocess.Popen(
        command, cwd=workspace.path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
        assert process.wait(timeout=120) == 0, err
    assert err == "[Pretrain] Warning: nobody reads stdout any more; going on without it.\n"
    assert workspace.status()["status"] == "finished"
