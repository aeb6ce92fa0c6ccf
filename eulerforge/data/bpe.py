"""Training a byte-level BPE tokenizer on the texts of a corpus (Sennrich et al., 2016; bytes as in GPT-2)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
BYTES = 256


def train_tokenizer(texts: Iterable[str], output_dir: Path, vocab_size: int, end_of_text: str = END_OF_TEXT) -> int:
    """Train a byte-level BPE tokenizer and save it to `output_dir`.

    It has one special token, `end_of_text` with id 0, as both beginning and end of text, and it encodes any text
    without an unknown token. `output_dir` appears only once it is complete; it may exist before, but only empty.

    Args:
        output_dir: where `AutoTokenizer.from_pretrained` will find the tokenizer.
        vocab_size: entries of the vocabulary, special token included. At least 257: it and the 256 bytes. A corpus
            too small for that many merges gives fewer entries.

    Returns:
        entries of the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    # Sorted, as the library returns it in an order that differs from call to call, and ids follow the order.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < BYTES + 1:
        raise ValueError(
            f"vocab_size is {vocab_size}, but {end_of_text} and the {BYTES} bytes alone take {BYTES + 1} entries"
        )
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"{output_dir} exists and is not an empty directory")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_text],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end_of_text,
        eos_token=end_of_text,
        # Otherwise decoding could drop spaces before punctuation, and text would not survive a round trip.
        clean_up_tokenization_spaces=False,
    )

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.tmp")
    try:
        wrapped.save_pretrained(str(temporary))
        if output_dir.exists():
            output_dir.rmdir()  # Windows does not rename onto a directory, not even an empty one.
        temporary.replace(output_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return len(wrapped)
