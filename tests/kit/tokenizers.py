"""Byte-level tokenizers with one id per byte, so that a test knows every id: id of byte b is b.

Special tokens come after: `<eos>` 256, then `<bos>`, `<pad>` and extra ones as asked for.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

EOS = 256


def byte_symbols() -> list[str]:
    """The printable stand-in of each byte in ByteLevel's alphabet, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = {byte: chr(byte) for byte in printable}
    missing = [byte for byte in range(256) if byte not in symbols]
    symbols |= {byte: chr(256 + index) for index, byte in enumerate(missing)}
    return [symbols[byte] for byte in range(256)]


def write_byte_tokenizer(
    path: Path, *, eos: bool = True, bos: bool = False, bos_by_itself: bool = False, extra: int = 0
) -> Path:
    """Write a tokenizer directory.

    Args:
        eos, bos: whether it has these special tokens.
        bos_by_itself: its post-processor puts a BOS before every text (a trap: it must not appear twice).
        extra: added tokens above all others, which `vocab_size` does not count.
    """
    vocab = {symbol: index for index, symbol in enumerate(byte_symbols())}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    special = {}
    if eos:
        special["eos_token"] = "<eos>"
    if bos:
        special["bos_token"] = "<bos>"
    core.add_special_tokens(list(special.values()))
    core.add_tokens([AddedToken(f"<extra{index}>", normalized=False) for index in range(extra)])
    if bos_by_itself:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
        )
    PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **special).save_pretrained(
        path
    )
    return path


def byte_ids(text: str) -> list[int]:
    """What the tokenizer gives for a text."""
    return list(text.encode("utf-8"))
