"""EulerForge: pretrain freshly assembled Hugging Face causal language models from scratch, correctly."""

from __future__ import annotations

__version__ = "0.2.0.dev0"
