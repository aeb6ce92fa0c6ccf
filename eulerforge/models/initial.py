"""Starting weights as one safetensors file, made in a process of its own.

A sharded rank must not hold the whole model, not even for a moment. So the first process of each node starts this
module: it builds the model on CPU exactly as a single process would (same seed, same weights), grows the vocabulary,
writes every tensor once, and is gone with its memory. Ranks then read their own rows from the file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from eulerforge.errors import ModelError
from eulerforge.models.build import build_grown
from eulerforge.models.directory import ModelDirectory


@dataclass(frozen=True)
class InitialWeights:
    """What to build.

    Attributes:
        directory: the model directory.
        rows: rows that the embedding needs at least.
        checkpoint: where the weights come from when a run is resumed.
        target: the file to write.
    """

    directory: str
    trust_remote_code: bool
    seed: int
    rows: int
    checkpoint: str | None
    target: str


def write_initial_weights(request: InitialWeights) -> None:
    """Build in a new process and wait for it.

    Raises:
        ModelError: as `build_grown` raises it.
    """
    command = [sys.executable, "-m", "eulerforge.models.initial", json.dumps(asdict(request))]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode == ModelError.exit_code:
        problem = json.loads(done.stdout.splitlines()[-1])
        raise ModelError(problem["what"], problem["fix"])
    if done.returncode:
        raise RuntimeError(f"building the starting weights failed with code {done.returncode}:\n{done.stderr}")


def _main(text: str) -> int:
    request = InitialWeights(**json.loads(text))
    try:
        directory = ModelDirectory.read(Path(request.directory))
        checkpoint = None if request.checkpoint is None else Path(request.checkpoint)
        model = build_grown(directory, request.trust_remote_code, request.seed, request.rows, checkpoint)
    except ModelError as error:
        sys.stdout.write(json.dumps({"what": error.problems[0].what, "fix": error.problems[0].fix}) + "\n")
        return ModelError.exit_code
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        tensors.setdefault(tensor.data_ptr() if tensor.numel() else id(tensor), (name, tensor.contiguous()))
    save_file(dict(tensors.values()), request.target)
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
