"""Which block families a model holds, as far as its directory tells (no torch, nothing loaded).

A family matters because precision rules are bound to it (`precision/rules.py`). Two sources: EulerStack's config,
which names the blocks of each layer, and a scan of the custom code for `torch.fft`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eulerforge.errors import ModelError, Problem
from eulerforge.models.directory import ModelDirectory

Family = Literal["attention", "mamba", "hyena", "retnet", "moe", "fft"]

_EULERSTACK_BLOCKS: Mapping[str, Family] = {
    "attn": "attention",
    "attention": "attention",
    "mamba": "mamba",
    "hyena": "hyena",
    "retnet": "retnet",
}


@dataclass(frozen=True)
class FoundBlock:
    """A block family and the evidence for it, in words for the user."""

    family: Family
    evidence: str


def find_blocks(directory: ModelDirectory) -> tuple[FoundBlock, ...]:
    """All block families that the directory shows, each once, in order of appearance."""
    found: dict[Family, FoundBlock] = {}
    for block in (*_from_eulerstack(directory.config), *_from_code(directory)):
        found.setdefault(block.family, block)
    return tuple(found.values())


def _from_eulerstack(config: Mapping[str, Any]) -> Iterator[FoundBlock]:
    stack = config.get("stack")
    if not isinstance(stack, dict):
        return
    for part in ("pattern", "tail"):
        layers = stack.get(part)
        for index, layer in enumerate(layers if isinstance(layers, list) else ()):
            if not isinstance(layer, dict):
                continue
            family = _EULERSTACK_BLOCKS.get(str(layer.get("block")))
            place = f"config.json stack.{part}[{index}]"
            if family is not None:
                yield FoundBlock(family, f"{place} block: {layer['block']}")
            feed_forward = layer.get("ffn")
            if isinstance(feed_forward, dict) and feed_forward.get("type") == "moe":
                yield FoundBlock("moe", f"{place} ffn: moe")


def _from_code(directory: ModelDirectory) -> Iterator[FoundBlock]:
    for name in directory.files_calling_fft():
        yield FoundBlock("fft", f"{name} calls torch.fft")


_LEAKING: Mapping[Family, str] = {
    "mamba": "Mamba blocks carry their state",
    "retnet": "RetNet blocks carry their state",
    "hyena": "Hyena blocks convolve",
    "fft": "FFT blocks convolve",
}
"""Families for which a row is one sequence, whatever documents it holds."""


def refuse_leaking_blocks(blocks: Sequence[FoundBlock]) -> None:
    """Refuse to keep documents apart in a model whose blocks cannot.

    Raises:
        ModelError: with each such family and its evidence.
    """
    problems = [
        Problem(
            f"data.document_mask: {_LEAKING[block.family]} from one document to the next ({block.evidence})",
            "set data.document_mask: false",
        )
        for block in blocks
        if block.family in _LEAKING
    ]
    if problems:
        raise ModelError.of(problems, see="docs/data.md")
