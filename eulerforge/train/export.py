"""A trained model -> a Hugging Face directory that loads anywhere, with the source directory gone.

config.json             source config + grown vocabulary, token ids, dtype as saved, auto_map to local files
model*.safetensors      weights in the run's dtype; tied weights once
generation_config.json  token ids of the tokenizer
tokenizer files         as transformers saves them
*.py                    every file that auto_map reaches, through relative imports
modeling_eulerforge.py  only for custom code with non-persistent buffers: see modeling_eulerforge.py.in
"""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import torch

from eulerforge.files import write_json
from eulerforge.models.directory import ModelDirectory
from eulerforge.models.shards import full_tensor
from eulerforge.models.tokenizer import Tokenizer

LOADER_MODULE = "modeling_eulerforge"


def write_model_directory(
    target: Path,
    model: Any,
    state: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    source: ModelDirectory,
    dtype: torch.dtype,
) -> None:
    """Write weights, config, tokenizer and code into an existing directory.

    Args:
        state: the weights as `gather_state` gives them, in `dtype`.
        source: the model directory that was trained, for its code and `auto_map`.
    """
    model.save_pretrained(target, state_dict=state)
    tokenizer.backend.save_pretrained(target)
    for name in source.code:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path / name, target / name)
    config = json.loads((target / "config.json").read_bytes())
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["architectures"] = [type(model).__name__.removeprefix("FSDP")]  # fully_shard renames the class
    if source.auto_map:
        config["auto_map"] = dict(source.auto_map)
        reference = source.auto_map.get("AutoModelForCausalLM")
        if isinstance(reference, str) and _has_computed_buffers(model):
            config["auto_map"]["AutoModelForCausalLM"] = _write_loader(target, reference)
    write_json(target / "config.json", config)


def gather_state(model: Any, dtype: torch.dtype, keep: bool, copy: bool = False) -> dict[str, torch.Tensor]:
    """Weights as saved: whole, on CPU, floating-point parameters in `dtype`; tied weights stay one tensor.

    Sharded weights are gathered one after the other, so every process must call this. Where `keep` is False a tensor
    is dropped as soon as it has been gathered, and the result is empty.

    Args:
        copy: no tensor shares memory with the model, which may change it later.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    converted: dict[int, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in converted:
            whole = full_tensor(tensor.detach())
            if keep:
                cast = name in parameters and whole.is_floating_point()
                target = whole.to(device="cpu", dtype=dtype if cast else whole.dtype)
                converted[id(tensor)] = target.clone() if copy and target.data_ptr() == tensor.data_ptr() else target
            else:
                converted[id(tensor)] = torch.empty(0)
        if keep:
            state[name] = converted[id(tensor)]
    return state


def _has_computed_buffers(model: Any) -> bool:
    return any(module._non_persistent_buffers_set for module in model.modules())


def _write_loader(target: Path, reference: str) -> str:
    """Write the loading subclass; the `auto_map` entry that names it."""
    module, _, class_name = reference.rpartition(".")
    if module != LOADER_MODULE:
        template = resources.files("eulerforge.train").joinpath(f"{LOADER_MODULE}.py.in").read_text(encoding="utf-8")
        text = Template(template).substitute(module=module, class_name=class_name)
        (target / f"{LOADER_MODULE}.py").write_text(text, encoding="utf-8")
    return f"{LOADER_MODULE}.{class_name}"
