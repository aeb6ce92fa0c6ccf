"""Peak memory of each process while a model is built: FSDP on two processes against one process.

The limit is 0.75 of the full model's bytes plus 600 MB for Python, torch and transformers: a rank that held the whole
model, even for a moment, would break it. The peak is the process's maximum resident set after the model has been
built, before the first step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.inputs import environment, write_inputs

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 13,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
FIXED_MB = 600
SHARE = 0.75


def main() -> None:
    """Build in both ways and print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder)
        worker = ["-m", "benchmarks.sharded_start_memory", str(folder)]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        single = _records([sys.executable, *worker])
        sharded = _records([sys.executable, *torchrun, *worker])
    parameters = single[0]["parameters"]
    model_mb = parameters * 4 / 2**20
    limit = SHARE * model_mb + FIXED_MB
    print(f"Llama with {parameters / 1e6:.0f} M parameters, {model_mb:,.0f} MiB in float32; peak while building:")
    print(f"  one process    {single[0]['peak_mb']:>6,.0f} MiB")
    for record in sorted(sharded, key=lambda record: record["rank"]):
        print(f"  fsdp, rank {record['rank']:.0f}   {record['peak_mb']:>6,.0f} MiB")
    worst = max(record["peak_mb"] for record in sharded)
    verdict = "under" if worst < limit else "OVER"
    print(f"  {SHARE} x {model_mb:,.0f} + {FIXED_MB} = {limit:,.0f} MiB: every rank is {verdict} it")


def _prepare(folder: Path) -> None:
    preset = {
        "output_dir": str(folder / "run"),
        "data": {"max_length": 64},
        "training": {"max_steps": 1, "dtype": "float32", "amp": False},
        "distributed": {"strategy": "fsdp"},
    }
    write_inputs(folder, MODEL, 1024, preset)


def _records(command: list[str]) -> list[dict[str, float]]:
    variables = environment() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=variables)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _worker(folder: Path) -> None:
    from eulerforge.config.load import load_preset
    from eulerforge.distributed.context import finish_processes, start_processes
    from eulerforge.metrics.console import Console
    from eulerforge.models.stats import count_parameters
    from eulerforge.models.tokenizer import load_tokenizer
    from eulerforge.preflight import inspect, precision_request
    from eulerforge.train.decide import ModelRequest
    from eulerforge.train.load import load_model

    flight = inspect(load_preset(folder / "preset.yml"))
    context = start_processes("cpu", int(os.environ.get("WORLD_SIZE", "1")), 600)
    tokenizer = load_tokenizer(flight.corpus.tokenizer, False, False, True)
    silent = Console("Benchmark", enabled=False)
    wanted = precision_request(flight.preset)
    model = load_model(
        ModelRequest(flight.directory, flight.blocks, wanted, flight.preset, tokenizer, context, silent)
    ).model
    peak = int(
        next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1]
    )
    record = {"rank": context.rank, "peak_mb": peak / 1024, "parameters": count_parameters(model)[0]}
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()
    finish_processes(context, keep=model)
    os._exit(0)


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
