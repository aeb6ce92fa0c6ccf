"""The tokenizer: found, checked, and used for raw text only.

Raw text is encoded without special tokens: a document that contains the text of `<eos>` is plain text, and BOS/EOS
come from the preset's policy alone, so a post-processor cannot add them twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eulerforge.errors import ModelError, TokenizerError, reason_of
from eulerforge.models.directory import TOKENIZER_FILES, ModelDirectory
from eulerforge.models.fast_encoder import FastEncoder


class Tokenizer:
    """A Hugging Face tokenizer behind the few things that pretraining needs.

    Args:
        backend: the transformers tokenizer.
        name: what the preset calls it, for the log.
    """

    def __init__(self, backend: Any, name: str) -> None:
        self.backend = backend
        self.name = name
        self.largest_id: int = max([len(backend) - 1, *backend.get_vocab().values()])
        self._fast = self._find_fast()

    @property
    def vocab_size(self) -> int:
        """Rows an embedding needs: largest id + 1. Added tokens count; `backend.vocab_size` leaves them out."""
        return self.largest_id + 1

    @property
    def bos_id(self) -> int | None:
        """Id of the begin-of-document token."""
        return self.backend.bos_token_id

    @property
    def eos_id(self) -> int | None:
        """Id of the end-of-document token."""
        return self.backend.eos_token_id

    @property
    def pad_id(self) -> int:
        """A valid id for padding: the tokenizer's own, else EOS, else 0. Padding is masked, so any id serves."""
        candidates = (self.backend.pad_token_id, self.eos_id, 0)
        return next(candidate for candidate in candidates if candidate is not None)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the content that decides which ids a text gets (not over paths or names)."""
        core = getattr(self.backend, "backend_tokenizer", None)
        if core is not None:
            state = json.loads(core.to_str())
            # Encoding resets these two, so they say nothing about ids and would change the hash after first use.
            state["truncation"] = state["padding"] = None
            content = json.dumps(state)
        else:
            settings = {
                key: repr(value) for key, value in sorted(self.backend.init_kwargs.items()) if "path" not in key
            }
            content = json.dumps(
                [type(self.backend).__qualname__, settings, sorted(self.backend.get_vocab().items())]
            )
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def serialized(self) -> str | None:
        """Content of a tokenizer.json from which another process can make it; None where Python code takes part."""
        return None if self._fast is None else self.backend.backend_tokenizer.to_str()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as plain text: no special token is added or recognised."""
        return self._encode_by_backend(texts) if self._fast is None else self._fast.encode(texts)

    def encode_long(self, text: str) -> npt.NDArray[np.uint32]:
        """Ids of one long text, with bounded memory where the tokenizer allows it."""
        if self._fast is not None:
            return self._fast.encode_long(text)
        return np.array(self._encode_by_backend([text])[0], dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens shown."""
        return self.backend.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _encode_by_backend(self, texts: Sequence[str]) -> list[list[int]]:
        return self.backend(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            padding=False,
            verbose=False,
        )["input_ids"]

    def _find_fast(self) -> FastEncoder | None:
        """A copy of the tokenizer's Rust core, if it alone decides the ids.

        The backend may do more in Python. Custom code is never passed by, as a sample proves little about it; what
        transformers brings along is asked too.
        """
        core = getattr(self.backend, "backend_tokenizer", None)
        if core is None or not type(self.backend).__module__.startswith("transformers."):
            return None
        try:
            fast = FastEncoder(core.to_str())
        except Exception:  # the library's bare Exception, for parts written in Python
            return None
        sample = [*_SAMPLE, *(f"a{token} {token}b" for token in self.backend.all_special_tokens)]
        return fast if fast.encode(sample) == self._encode_by_backend(sample) else None


_SAMPLE = (
    " two  spaces\n\n\tand a line end \r\n",
    "Don't stop 1234567 times; naïve café, ＡＢＣ ½ \u0301e",
    "日本語 и русский \U0001f600\u200d\U0001f680 \ufffd\x00\x85\u2028",
    "",
    "a",
)
"""Texts on which tokenizers differ."""


def load_tokenizer(name: str, trust_remote_code: bool, add_bos: bool, add_eos: bool) -> Tokenizer:
    """Load a tokenizer and check that it can serve the preset.

    Args:
        name: directory or hub name.
        add_bos, add_eos: the policy of the preset; the tokens they need must exist.

    Raises:
        TokenizerError: not found, not loadable, or without the token that the policy needs.
    """
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise TokenizerError(
            f"tokenizer: cannot load {_described(name)}: {type(error).__name__}: {reason_of(error)}",
            "set tokenizer to a directory with tokenizer.json, or to a name that is in the local Hugging Face cache "
            "or can be downloaded",
        ) from error
    tokenizer = Tokenizer(backend, name)
    _require_token(tokenizer, "eos", add_eos)
    _require_token(tokenizer, "bos", add_bos)
    return tokenizer


def adopt_special_ids(model: Any, tokenizer: Tokenizer, directory: ModelDirectory) -> list[str]:
    """Put the tokenizer's special ids into config and generation config, so that `final/` stops where it should.

    Returns:
        warnings: where config.json named another end of text.

    Raises:
        ModelError: the directory's generation_config.json cannot be read.
    """
    from transformers import GenerationConfig

    path = directory.path / "generation_config.json"
    if path.is_file() and model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(directory.path)
        except (OSError, ValueError, TypeError) as error:
            advice = "correct or remove generation_config.json"
            raise ModelError(f"{path}: cannot be read: {reason_of(error)}", advice) from error
    warnings = []
    stored = getattr(model.config, "eos_token_id", None)
    if tokenizer.eos_id is not None and stored not in (None, tokenizer.eos_id):
        used = tokenizer.eos_id
        warnings.append(f"config.json says eos_token_id {stored}, the tokenizer says {used}: using the tokenizer's.")
    targets = [model.config] + ([model.generation_config] if model.can_generate() else [])
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        used = getattr(tokenizer.backend, name)
        for target in targets if used is not None else ():
            setattr(target, name, used)
    return warnings


def _described(name: str) -> str:
    folder = Path(name)
    if not folder.is_dir():
        return f"{name} (as hub name)"
    files = sorted(file.name for file in folder.iterdir() if "token" in file.name or file.name in TOKENIZER_FILES)
    return f"{name} ({', '.join(files)})"


def _require_token(tokenizer: Tokenizer, kind: str, wanted: bool) -> None:
    if wanted and getattr(tokenizer, f"{kind}_id") is None:
        raise TokenizerError(
            f"tokenizer: {tokenizer.name} has no {kind.upper()} token, but data.add_{kind} is true",
            f'add "{kind}_token" to its tokenizer_config.json, or set data.add_{kind}: false',
        )
