"""Real EulerStack exports, made by the real package: built right, trained, saved, and loaded again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from eulerforge.models.blocks import find_blocks
from eulerforge.models.build import build_model
from eulerforge.models.directory import ModelDirectory
from tests.e2e.test_output import reload_in_new_process
from tests.kit.commands import Workspace
from tests.kit.tokenizers import write_byte_tokenizer

pytest.importorskip("eulerstack", reason="`make test` installs it without its dependencies")

WIDTH, HEADS, CONTEXT, VOCAB = 32, 2, 64, 200
_MIXERS = {
    "attention": {"type": "attention", "attention": {}},
    "mamba": {"type": "mamba", "mamba": {"variant": "mamba2", "d_state": 8}},
    "retnet": {"type": "retnet", "retnet": {}},
    "hyena": {"type": "hyena", "hyena": {}},
}
_GATED = {"type": "gated_mlp", "activation": "swiglu"}
_EXPERTS = {"type": "moe", "moe": {"experts": 4, "top_k": 2}}

SPECS = {
    "attention": [("attention", _GATED), ("attention", _GATED)],
    "moe": [("attention", _GATED), ("attention", _EXPERTS)],
    "mamba": [("mamba", _GATED), ("attention", _GATED)],
    "retnet": [("retnet", _GATED), ("attention", _GATED)],
    "hyena": [("hyena", _GATED), ("attention", _GATED)],
    "full": [("mamba", _GATED), ("retnet", _GATED), ("hyena", _GATED), ("attention", _EXPERTS)],
}


def export(path: Path, kind: str) -> Path:
    """Compile a spec with the `eulerstack` command."""
    layers = SPECS[kind]
    spec = {
        "schema_version": 1,
        "model": {
            "name": kind,
            "d_model": WIDTH,
            "vocab_size": VOCAB,
            "max_seq_len": CONTEXT,
            "n_heads": HEADS,
            "mlp_ratio": 2,
            "dtype": "float32",
        },
        "tokenizer_contract": {"type": "hf", "pretrained": "gpt2", "add_bos": True, "add_eos": True},
        "embedding": {"type": "learned", "positional": "rope", "tie_word_embeddings": True},
        "layer_templates": {
            f"layer{index}": {
                "mixer": _MIXERS[mixer],
                "ffn": feed_forward,
                "norm": {"type": "rmsnorm", "position": "pre"},
            }
            for index, (mixer, feed_forward) in enumerate(layers)
        },
        "layer_schedule": [{"template": f"layer{index}", "repeat": 1} for index in range(len(layers))],
        "head": {"type": "causal_lm", "tie_weights": True},
    }
    file = path.with_suffix(".yml")
    file.write_text(yaml.safe_dump(spec))
    command = [Path(sys.executable).with_name("eulerstack"), "--lang", "en", "compile"]
    subprocess.run([*command, "--preset", file, "--output-dir", path], check=True, capture_output=True, timeout=120)
    return path


def rope_tables() -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of positions x theta^(-2i/d), each frequency for both halves of a head (Su et al. 2021)."""
    half = WIDTH // HEADS // 2
    angles = torch.arange(CONTEXT).float()[:, None] * 10000.0 ** (-torch.arange(half).float() / half)
    return torch.cat([angles.cos()] * 2, dim=-1), torch.cat([angles.sin()] * 2, dim=-1)


@pytest.mark.parametrize("kind", SPECS)
def test_export_trains_and_reloads(workspace: Workspace, kind: str) -> None:
    export(workspace.path / "model", kind)
    tokenizer = write_byte_tokenizer(workspace.path / "tokenizer")
    workspace.jsonl(
        "data.jsonl", [f"document {index} has some words in it, and then some more" for index in range(20)]
    )
    result = workspace.pretrain(
        trust_remote_code=True,
        tokenizer=str(tokenizer),
        data__max_length=32,
        training__dtype=...,
        training__amp=...,
        training__max_steps=4,
    )
    assert result.code == 0, result.err
    assert f"Tokenizer vocab (257) > model vocab ({VOCAB}). Resizing model embeddings to 257." in result.out
    has_fft = kind in ("retnet", "hyena", "full")
    assert f"compute {'float32' if has_fft else 'bfloat16'}" in result.out
    records = workspace.metrics()
    assert records[0]["loss"] == pytest.approx(5.55, abs=0.2)  # ln(257) = 5.549
    assert all(0 < record["grad_norm"] < 100 for record in records)
    assert ("aux_loss" in records[0]) is (kind in ("moe", "full"))

    final = workspace.path / "run" / "final"
    model = build_model(ModelDirectory.read(final), trust_remote_code=True, seed=0).model.eval()
    cos, sin = rope_tables()
    assert torch.allclose(model.eulerstack._rope_cos_buf, cos, atol=1e-5)
    assert torch.allclose(model.eulerstack._rope_sin_buf, sin, atol=1e-5)
    (workspace.path / "model").rename(workspace.path / "gone")
    seen = reload_in_new_process(workspace, final)
    assert torch.allclose(seen["buffers"]["eulerstack._rope_cos_buf"], cos, atol=1e-5)
    assert torch.allclose(seen["buffers"]["eulerstack._rope_sin_buf"], sin, atol=1e-5)
    with torch.no_grad():
        logits = model.to(seen["logits"].dtype)(input_ids=seen["ids"]).logits
    assert torch.allclose(seen["logits"], logits, atol=1e-6)


def test_blocks_are_read_from_the_export(tmp_path: Path) -> None:
    found = find_blocks(ModelDirectory.read(export(tmp_path / "model", "full")))
    assert [block.family for block in found] == ["mamba", "retnet", "hyena", "attention", "moe"]


def test_missing_eulerstack_package_is_named(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export imports the package; on a machine without it the error says what to install."""
    export(workspace.path / "model", "attention")
    tokenizer = write_byte_tokenizer(workspace.path / "tokenizer")
    workspace.jsonl("data.jsonl", ["some text"])
    monkeypatch.setattr("eulerforge.models.directory._is_installed", lambda package: package != "eulerstack")
    result = workspace.pretrain("--validate-only", trust_remote_code=True, tokenizer=str(tokenizer))
    assert result.code == 2
    assert "imports eulerstack, which is not installed" in result.err
    assert "Fix: pip install eulerstack" in result.err
