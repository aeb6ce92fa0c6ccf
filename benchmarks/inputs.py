"""What the benchmarks train on: documentation of this Python, a tokenizer from it, a model, a preset."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml


def write_inputs(folder: Path, model: dict[str, Any], vocab_size: int, preset: dict[str, Any]) -> None:
    """Write corpus.jsonl, tokenizer/, model/ and preset.yml.

    Args:
        preset: sections `data` (without path), `training` and others, added to the paths in `folder`.
    """
    from eulerforge.quickstart import train_tokenizer, write_corpus

    write_corpus(folder / "corpus.jsonl")
    train_tokenizer(folder / "corpus.jsonl", folder / "tokenizer", vocab_size)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(model))
    data = {"path": str(folder / "corpus.jsonl"), "cache_dir": str(folder / "cache")} | preset["data"]
    paths = {"device": "cpu", "model_dir": str(folder / "model"), "tokenizer": str(folder / "tokenizer")}
    (folder / "preset.yml").write_text(yaml.safe_dump(paths | preset | {"data": data}))


def environment() -> dict[str, str]:
    """For a process of a benchmark: no model hub, and this checkout's modules."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
