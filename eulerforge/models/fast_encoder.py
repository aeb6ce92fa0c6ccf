"""Texts -> ids by the tokenizers library alone: for raw text, and for processes that do not import transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

_PIECE = 200_000
"""Characters of a very long text that are encoded at a time. The library needs about 130 bytes for each."""

_SEARCHED = 5_000
"""Characters within which a place to cut is looked for."""

_WINDOW = 500
"""Characters on either side of a cut in which it must not make a difference."""

_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S)(?=\n+\S)|(?<=\n)(?=\S)")
"""Where texts are cut, if the tokenizer agrees: between words, before and after line ends."""


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

    def encode_long(self, text: str) -> npt.NDArray[np.uint32]:
        """Ids of a text of any length, in memory that does not grow with more than the text and its ids.

        The text is encoded in pieces. Where it is cut, the ids around the cut must be the same as without it; a
        tokenizer that never agrees (one that puts a space before each text, or one without a pre-tokenizer, whose
        merges may reach across any place) gets the text whole.
        """
        pieces = self._pieces(text) if self._core.pre_tokenizer is not None else iter([text])
        return np.concatenate([np.array(self.encode([piece])[0], dtype=np.uint32) for piece in pieces])

    def _pieces(self, text: str) -> Iterator[str]:
        start = 0
        while len(text) - start > _PIECE:
            cut = self._find_cut(text, start + _PIECE)
            if cut is None:
                break
            yield text[start:cut]
            start = cut
        yield text[start:]

    def _find_cut(self, text: str, begin: int) -> int | None:
        for found in _CUT.finditer(text, begin, min(begin + _SEARCHED, len(text))):
            place = found.start()
            left, right = text[max(place - _WINDOW, 0) : place], text[place : place + _WINDOW]
            whole, first, second = self.encode([left + right, left, right])
            if whole == first + second:
                return place
        return None
