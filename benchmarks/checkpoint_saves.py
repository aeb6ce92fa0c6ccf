"""How long a save keeps the training loop waiting: written while it waits, and in the background.

One process trains a Llama of 50 MB (150 MB with AdamW's state) and saves `SAVES` times in either way; the time from
the loop's call of `save` to its return counts, the wait for an earlier save included. Medians.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.inputs import environment, write_inputs

SAVES = 5
STEPS_BETWEEN = 10
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Run both ways and print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training = {
            "max_steps": SAVES * STEPS_BETWEEN,
            "save_steps": STEPS_BETWEEN,
            "keep_checkpoints": 2,
            "batch_size": 4,
            "dtype": "float32",
            "amp": False,
        }
        write_inputs(folder, MODEL, 1024, {"data": {"max_length": 128}, "training": training})
        waits = {}
        for way in ("false", "true"):
            command = [sys.executable, "-m", "benchmarks.checkpoint_saves", str(folder), way]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
            waits[way] = json.loads(done.stdout.splitlines()[-1])
    sync, background = statistics.median(waits["false"]), statistics.median(waits["true"])
    print(f"Llama of 50 MB, float32, CPU; the loop waits for a save (median of {SAVES}):")
    print(f"  async_checkpoint: false   {sync * 1000:>6,.0f} ms")
    print(f"  async_checkpoint: true    {background * 1000:>6,.0f} ms")
    print(f"  ratio                     {background / sync:>6.0%}")


def _run(folder: Path, way: str) -> None:
    from eulerforge.cli import main as eulerforge
    from eulerforge.train.checkpoint import Checkpointer

    waits: list[float] = []
    save = Checkpointer.save

    def timed(self: Checkpointer, step: int) -> None:
        start = time.monotonic()
        save(self, step)
        waits.append(time.monotonic() - start)

    Checkpointer.save = timed  # type: ignore[method-assign]
    arguments = ["--set", f"training.async_checkpoint={way}", "--output-dir", str(folder / f"run-{way}")]
    assert eulerforge(["pretrain", "--preset", str(folder / "preset.yml"), *arguments]) == 0
    assert len(waits) == SAVES
    print(json.dumps(waits))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        _run(Path(sys.argv[1]), sys.argv[2])
