"""The corpus of a preset: files -> token caches -> training rows, held-out rows and their order.

Used by `pretrain`, by `prepare`, which stops at the caches, and by `data show`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

from eulerforge.config.schema import PretrainPreset
from eulerforge.data.cache import CacheSpec, Voice, open_or_build
from eulerforge.data.manifest import TokenCache
from eulerforge.data.order import EpochOrder, FileOrder, MixtureOrder, Order
from eulerforge.data.readers import DocumentCounts
from eulerforge.data.rows import DocumentRows, JoinedRows, PackedRows, Rows, require_rows
from eulerforge.data.sources import CorpusFiles, CorpusPart
from eulerforge.data.tokens import Span, TokenStream
from eulerforge.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class CorpusCaches:
    """The open token caches of a corpus.

    Attributes:
        parts: of each part of the corpus.
        validation: of the held-out text of its own, None without any.
    """

    parts: tuple[TokenCache, ...]
    validation: TokenCache | None


@dataclass(frozen=True)
class Corpus:
    """What a run trains on.

    Attributes:
        caches: of each part.
        held_out: documents of each part that are not trained on: its last ones.
        part_rows: training rows of each part.
        rows: all training rows.
        validation_rows: held-out rows, None without any.
        order: of `rows`, endless.
    """

    caches: tuple[TokenCache, ...]
    held_out: tuple[int, ...]
    part_rows: tuple[PackedRows | DocumentRows, ...]
    rows: Rows
    validation_rows: Rows | None
    order: Order

    @property
    def counts(self) -> DocumentCounts:
        """What was met while reading all parts."""
        counts = DocumentCounts()
        for cache in self.caches:
            counts.add(cache.counts)
        return counts


def open_caches(files: CorpusFiles, preset: PretrainPreset, tokenizer: Tokenizer, voice: Voice) -> CorpusCaches:
    """Open the caches of a corpus, building what is missing.

    Raises:
        DataError: bad input, or a corpus too small for one row.
        PreparationError: a tokenising process died.
    """
    parts = tuple(_open(part, "data.path", files, preset, tokenizer, voice) for part in files.parts)
    validation = [_open(part, "data.validation.path", files, preset, tokenizer, voice) for part in files.validation]
    return CorpusCaches(parts, validation[0] if validation else None)


def _open(
    part: CorpusPart, key: str, files: CorpusFiles, preset: PretrainPreset, tokenizer: Tokenizer, voice: Voice
) -> TokenCache:
    data = preset.data
    spec = CacheSpec(
        part.files,
        data.text_column,
        data.on_bad_line,
        bos_id=tokenizer.bos_id if data.add_bos else None,
        eos_id=tokenizer.eos_id if data.add_eos else None,
        separator=tokenizer.eos_id,
        token_dtype=data.token_dtype,
        verify=data.verify,
        processes=None if data.num_workers == "auto" else int(data.num_workers),
        key=key,
        name=part.name,
    )
    fills_a_row = partial(require_rows, max_length=data.max_length, packing=data.packing, key=key)

    def check(stream: TokenStream) -> None:
        fills_a_row(stream.span())

    cache = open_or_build(spec, tokenizer, files.cache_dir, check, voice)
    if key == "data.path":
        voice.say(f"Loaded {cache.stream.documents} texts from {part.name}")
        _say_notes(cache.counts, voice.say)
        voice.say(f"Token cache: {'reused' if cache.reused else 'built'} {cache.path}")
    return cache


def _say_notes(counts: DocumentCounts, say: Callable[[str], None]) -> None:
    notes = {
        **{f"skipped, {kind}": number for kind, number in counts.skipped.items()},
        "empty texts dropped": counts.empty,
        "texts with lone surrogates repaired": counts.repaired,
    }
    if any(notes.values()):
        say("Data notes: " + ", ".join(f"{number} {what}" for what, number in notes.items() if number))


def make_corpus(
    preset: PretrainPreset, parts: Sequence[CorpusPart], caches: CorpusCaches, say: Callable[[str], None]
) -> Corpus:
    """Rows and their order.

    Raises:
        DataError: nothing is left to train on, or to hold out.
    """
    held_out = tuple(_held_out_documents(preset, cache) for cache in caches.parts)
    rows: list[PackedRows | DocumentRows] = []
    held: list[Rows] = []
    for cache, number in zip(caches.parts, held_out, strict=True):
        border = cache.stream.documents - number
        training = cache.stream.span(0, border)
        if number:
            check = partial(require_rows, max_length=preset.data.max_length, packing=preset.data.packing)
            check(training, key="data.validation.fraction", what="what is left to train on")
            check(cache.stream.span(border), key="data.validation.fraction", what="the held-out part")
            held.append(_rows_of(preset, cache.stream.span(border)))
        rows.append(_rows_of(preset, training))
        say(_shape(preset, rows[-1]))
    if caches.validation is not None:
        held.append(_rows_of(preset, caches.validation.stream.span()))
    corpus = Corpus(
        caches.parts,
        held_out,
        tuple(rows),
        rows[0] if len(rows) == 1 else JoinedRows(rows),
        _joined(held),
        _order(preset, parts, rows),
    )
    if corpus.validation_rows is not None:
        documents = sum(held_out) or (caches.validation.stream.documents if caches.validation else 0)
        say(f"Held out: {documents:,} texts, {len(corpus.validation_rows):,} rows of {preset.data.max_length} tokens")
    return corpus


def _joined(rows: Sequence[Rows]) -> Rows | None:
    if len(rows) < 2:
        return rows[0] if rows else None
    return JoinedRows(rows)


def _held_out_documents(preset: PretrainPreset, cache: TokenCache) -> int:
    """How many of the last documents are not trained on."""
    validation = preset.data.validation
    if validation is None or validation.fraction is None:
        return 0
    return math.ceil(Fraction(str(validation.fraction)) * cache.stream.documents)


def _rows_of(preset: PretrainPreset, span: Span) -> PackedRows | DocumentRows:
    kind = PackedRows if preset.data.packing else DocumentRows
    return kind(span, preset.data.max_length)


def _order(preset: PretrainPreset, parts: Sequence[CorpusPart], rows: Sequence[Rows]) -> Order:
    seed = preset.training.seed
    orders: list[Order] = [
        EpochOrder(len(part), seed, number) if preset.data.shuffle else FileOrder(len(part))
        for number, part in enumerate(rows)
    ]
    if len(orders) == 1:
        return orders[0]
    return MixtureOrder(orders, [len(part) for part in rows], [part.weight for part in parts])


def say_mixture(corpus: Corpus, parts: Sequence[CorpusPart], steps_rows: int, say: Callable[[str], None]) -> None:
    """How often a run will see each source of a mixture.

    Args:
        steps_rows: rows of all steps of the run.
    """
    total = sum(part.weight for part in parts)
    for part, rows in zip(parts, corpus.part_rows, strict=True):
        share = float(part.weight / total)
        passes = share * steps_rows / len(rows)
        say(f"Mixture: {share:.4f} of the tokens from {part.name}, {passes:.2f} passes over its {len(rows):,} chunks")


def _shape(preset: PretrainPreset, rows: PackedRows | DocumentRows) -> str:
    """What a part has become, for the log."""
    length = preset.data.max_length
    if isinstance(rows, PackedRows):
        return f"Packed: {rows.total:,} tokens → {len(rows):,} chunks (max_length={length})"
    padding = 1 - rows.real_tokens / (len(rows) * length)
    return (
        f"Rows: {rows.texts:,} texts → {len(rows):,} rows (max_length={length}, {rows.cut:,} cut, "
        f"{rows.left_out:,} of one token left out, {padding:.1%} padding)"
    )
