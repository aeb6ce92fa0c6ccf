"""What precision costs and what it loses.

* An EulerStack hybrid (Mamba, RetNet, Hyena, attention with experts) in float32, with `amp: selective`, and with all
  in autocast: tokens/s in turns.
* bfloat16 weights at a small learning rate: how much of the norm weights has moved after 300 steps under plain AdamW
  in bfloat16, and with the two ways that EulerForge offers; the losses.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.inputs import environment, write_inputs

ROUNDS = 3
STEPS = 20
WARMUP = 5
BATCH, LENGTH, VOCABULARY = 4, 256, 8192
WIDTH, LAYERS = 512, 2
LONG = 300
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Print both tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = {"data": {"max_length": LENGTH}, "training": {"max_steps": STEPS, "batch_size": BATCH, "log_steps": 1}}
        write_inputs(folder, LLAMA, VOCABULARY, data)
        _hybrid(folder)
        _norms(folder)


def _hybrid(folder: Path) -> None:
    _export(folder / "hybrid")
    sides: dict[str, dict[str, Any]] = {
        "float32": {"dtype": "float32", "amp": False},
        "selective": {"dtype": "float32", "amp": "selective"},
        "autocast": {"dtype": "float32", "amp": True, "precision_check": "warn"},
    }
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(ROUNDS):
        for side, training in sides.items():
            steps = _train(folder, f"{side}{number}", folder / "hybrid", {"lr": 3e-4, **training})
            times = [step["elapsed_sec"] for step in steps]
            speeds[side].append((STEPS - WARMUP) * BATCH * LENGTH / (times[-1] - times[WARMUP - 1]))
    print(f"EulerStack hybrid, width {WIDTH}, {4 * LAYERS} layers, {BATCH} x {LENGTH} tokens, CPU, {ROUNDS} rounds:")
    medians = {side: statistics.median(values) for side, values in speeds.items()}
    for side, speed in medians.items():
        print(f"  {side:<10} {speed:>8,.0f} tokens/s   {speed / medians['float32']:.2f} x float32")


def _norms(folder: Path) -> None:
    from safetensors.torch import load_file

    common = {"lr": 3e-4, "scheduler": "constant", "max_steps": LONG, "save_steps": LONG, "dtype": "bfloat16"}
    runs = {
        "float32 masters": {**common, "master_weights": True},
        "stochastic rounding": {**common, "master_weights": False},
    }
    print(
        f"Llama, bfloat16, lr 3e-4, {LONG} steps; share of norm weights that are no longer 1.0, loss of the last 20:"
    )
    for side, training in runs.items():
        name = side.replace(" ", "-")
        steps = _train(folder, name, folder / "model", training)
        weights = load_file(folder / name / "final" / "model.safetensors")
        values = [value for key, value in weights.items() if "norm" in key]
        moved = sum(int((value != 1).sum()) for value in values) / sum(value.numel() for value in values)
        loss = statistics.mean(step["loss"] for step in steps[-20:])
        print(f"  {side:<20} {moved:>6.1%}   {loss:.4f}")
    plain = subprocess.run(
        [sys.executable, "-m", "benchmarks.precision", "plain", str(folder)],
        check=True, capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    found = json.loads(plain.stdout.splitlines()[-1])
    print(f"  {'plain AdamW':<20} {found['moved']:>6.1%}   {found['loss']:.4f}")


def _train(folder: Path, name: str, model: Path, training: dict[str, Any]) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    settings = {"model_dir": str(model), "trust_remote_code": "true", "output_dir": str(folder / name)}
    settings |= {f"training.{key}": json.dumps(value) for key, value in training.items()}
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "eulerforge", "pretrain", "--preset", str(folder / "preset.yml"), *overrides]
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def _plain(folder: Path) -> None:
    """The same training with torch's AdamW on bfloat16 weights, as trainers without masters do it."""
    import torch

    from eulerforge import (
        assembly,
        worker,  # noqa: F401  (the parts below are patched before it runs)
    )
    from eulerforge.cli import main as eulerforge

    def build(model: torch.nn.Module, *, lr: float, weight_decay: float, betas: Any, **_: Any) -> Any:
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)

    assembly.build_optimizer = build
    values = ("lr=3e-4", "scheduler=constant", f"max_steps={LONG}", "dtype=bfloat16", "master_weights=false")
    overrides = [part for value in values for part in ("--set", f"training.{value}")]
    run = folder / "plain"
    code = eulerforge(["pretrain", "--preset", str(folder / "preset.yml"), "--output-dir", str(run), *overrides])
    assert code == 0
    from safetensors.torch import load_file

    weights = load_file(run / "final" / "model.safetensors")
    norms = [value for key, value in weights.items() if "norm" in key]
    moved = sum(int((value != 1).sum()) for value in norms) / sum(value.numel() for value in norms)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    print(json.dumps({"moved": moved, "loss": statistics.mean(step["loss"] for step in steps[-20:])}))


def _export(path: Path) -> None:
    """A hybrid of all mixers, compiled by the `eulerstack` command."""
    gated = {"type": "gated_mlp", "activation": "swiglu"}
    experts = {"type": "moe", "moe": {"experts": 4, "top_k": 2}}
    layers: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"type": "mamba", "mamba": {"variant": "mamba2", "d_state": 16}}, gated),
        ({"type": "retnet", "retnet": {}}, gated),
        ({"type": "hyena", "hyena": {}}, gated),
        ({"type": "attention", "attention": {}}, experts),
    ]
    spec = {
        "schema_version": 1,
        "model": {
            "name": "hybrid",
            "d_model": WIDTH,
            "vocab_size": VOCABULARY,
            "max_seq_len": LENGTH,
            "n_heads": 8,
            "mlp_ratio": 4,
            "dtype": "float32",
        },
        "tokenizer_contract": {"type": "hf", "pretrained": "gpt2", "add_bos": True, "add_eos": True},
        "embedding": {"type": "learned", "positional": "rope", "tie_word_embeddings": True},
        "layer_templates": {
            f"layer{index}": {"mixer": mixer, "ffn": ffn, "norm": {"type": "rmsnorm", "position": "pre"}}
            for index, (mixer, ffn) in enumerate(layers)
        },
        "layer_schedule": [
            {"template": f"layer{index}", "repeat": 1} for _ in range(LAYERS) for index in range(len(layers))
        ],
        "head": {"type": "causal_lm", "tie_weights": True},
    }
    file = path.with_suffix(".yml")
    file.write_text(yaml.safe_dump(spec))
    command = [Path(sys.executable).with_name("eulerstack"), "--lang", "en", "compile"]
    subprocess.run([*command, "--preset", file, "--output-dir", path], check=True, capture_output=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["plain"]:
        _plain(Path(sys.argv[2]))
    else:
        main()
