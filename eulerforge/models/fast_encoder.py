"""Texts -> ids by the tokenizers library alone: for raw text, and for processes that do not import transformers."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer


class FastEncoder:
    """A tokenizer that takes texts as plain text: no special token is added or recognised.

    Args:
        serialized: the content of a tokenizer.json.
    """

    def __init__(self, serialized: str) -> None:
        self._core = Tokenizer.from_str(serialized)
        self._core.no_truncation()
        self._core.no_padding()
        self._core.encode_special_tokens = True

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [encoding.ids for encoding in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]
