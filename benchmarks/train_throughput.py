"""Training throughput and peak memory: EulerForge against Hugging Face's Trainer.

Both train the same Llama (`MODEL`) from scratch on the same packed rows with AdamW in float32, each in a process of
its own, in turns, `ROUNDS` times. Tokens/s are taken over the steps after the first `WARMUP`; the median counts. Peak
memory is the process's maximum resident set.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.inputs import environment, write_inputs

ROUNDS = 3
STEPS = 30
WARMUP = 10
BATCH, LENGTH = 8, 256
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Run both in turns and print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder)
        results: dict[str, list[dict[str, float]]] = {"eulerforge": [], "trainer": []}
        for _ in range(ROUNDS):
            for side, seen in results.items():
                command = [sys.executable, "-m", "benchmarks.train_throughput", side, str(folder)]
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
                seen.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"Llama, {BATCH} rows of {LENGTH} tokens, float32, CPU, {ROUNDS} rounds of {STEPS} steps, medians:")
    medians = {
        side: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for side, runs in results.items()
    }
    for side, values in medians.items():
        print(f"  {side:<11} {values['tokens_per_second']:>8,.0f} tokens/s   {values['peak_mib']:>7,.0f} MiB peak")
    ours, theirs = medians["eulerforge"], medians["trainer"]
    print(f"  ratio       {ours['tokens_per_second'] / theirs['tokens_per_second']:.2f} x tokens/s, ", end="")
    print(f"{ours['peak_mib'] / theirs['peak_mib']:.2f} x memory")


def _prepare(folder: Path) -> None:
    training = {"max_steps": STEPS, "batch_size": BATCH, "log_steps": 1, "lr": 1e-3, "dtype": "float32", "amp": False}
    write_inputs(folder, MODEL, 8192, {"data": {"max_length": LENGTH}, "training": training})


def _run_eulerforge(folder: Path) -> list[float]:
    """Seconds of each step."""
    from eulerforge.cli import main as eulerforge

    output = Path(tempfile.mkdtemp(dir=folder)) / "run"
    assert eulerforge(["pretrain", "--preset", str(folder / "preset.yml"), "--output-dir", str(output)]) == 0
    ends = [json.loads(line)["elapsed_sec"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [after - before for before, after in zip([0.0, *ends], ends, strict=False)]


def _run_trainer(folder: Path) -> list[float]:
    """Seconds of each step."""
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from eulerforge.data.rows import PackedRows

    rows = _packed_rows(folder)
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **values: Any) -> None:
            ends.append(time.monotonic())

    class Dataset:
        def __init__(self, source: PackedRows) -> None:
            self.source = source

        def __len__(self) -> int:
            return len(self.source)

        def __getitem__(self, index: int) -> dict[str, Any]:
            ids = self.source[index].tolist()
            return {"input_ids": ids, "labels": ids}

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "model"))
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(dir=folder),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    start = time.monotonic()
    Trainer(model=model, args=arguments, train_dataset=Dataset(rows), callbacks=[Clock()]).train()
    return [after - before for before, after in zip([start, *ends], ends, strict=False)]


def _packed_rows(folder: Path) -> Any:
    """The rows that EulerForge trains on."""
    from eulerforge.config.load import load_preset
    from eulerforge.corpus import make_corpus, open_caches
    from eulerforge.data.cache import Voice
    from eulerforge.metrics.console import Console
    from eulerforge.metrics.progress import tokenizing
    from eulerforge.models.tokenizer import load_tokenizer
    from eulerforge.preflight import inspect_corpus

    loaded = load_preset(folder / "preset.yml")
    files, silent = inspect_corpus(loaded), Console("Benchmark", enabled=False)
    tokenizer = load_tokenizer(files.tokenizer, trust_remote_code=False, add_bos=False, add_eos=True)
    caches = open_caches(files, loaded.preset, tokenizer, Voice(silent.say, partial(tokenizing, silent)))
    return make_corpus(loaded.preset, files.parts, caches, silent.say).rows


def _report(seconds: list[float]) -> None:
    step = statistics.median(seconds[WARMUP:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"tokens_per_second": BATCH * LENGTH / step, "peak_mib": peak}))


if __name__ == "__main__":
    _report({"eulerforge": _run_eulerforge, "trainer": _run_trainer}[sys.argv[1]](Path(sys.argv[2])))
