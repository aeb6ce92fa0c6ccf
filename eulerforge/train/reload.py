"""`python -m eulerforge.train.reload '["DIR", false]'`: plain transformers loads what was written, to the last bit.

In a process of its own, so that nothing of the writer (modules, registered classes) can help.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from eulerforge.models.build import build_model
from eulerforge.models.directory import ModelDirectory


def main(folder: str, trust_remote_code: bool) -> None:
    """Compare `from_pretrained` with a model built from its config, whose buffers are certain.

    Raises:
        ValueError: a weight or buffer differs, is missing or is left over.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=trust_remote_code, dtype="auto", output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise ValueError(f"{kind}: {sorted(map(str, report[kind]))[:4]}")
    built = build_model(ModelDirectory.read(Path(folder)), trust_remote_code, seed=0).model
    expected = {**dict(built.named_buffers()), **built.state_dict()}
    seen = {**dict(loaded.named_buffers()), **loaded.state_dict()}
    buffers = dict(built.named_buffers())
    for name, tensor in expected.items():
        # transformers casts buffers to the dtype of the weights, whatever their own; weights must be as in the file.
        dtype = seen[name].dtype if name in buffers else tensor.dtype
        if not torch.equal(seen[name].to(dtype), tensor.to(dtype)):
            raise ValueError(f"{name} is not as it was written")


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
