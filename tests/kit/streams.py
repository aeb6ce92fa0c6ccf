"""A `TokenStream` made of lists, in shards as a cache has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import numpy as np

from eulerforge.data.shards import ShardMeta
from eulerforge.data.tokens import Shard, Span, TokenStream

Documents = Sequence[Sequence[int]]


def write_shard(
    folder: Path,
    documents: Documents,
    dtype: str = "<u2",
    *,
    lines: Sequence[int] | None = None,
    files: Sequence[tuple[int, int]] | None = None,
    first_file: int = 0,
    first_line: int = 0,
    header: int = 0,
) -> Shard:
    """Write a shard of documents.

    Args:
        lines: of each document; 1, 2, 3, ... without.
        files: (file of the shard, documents) in order; one file without.
        first_file, first_line, header: as in `Shard`.
    """
    folder.mkdir(parents=True)
    ids = [token for document in documents for token in document]
    tokens_file = folder / "tokens.bin"
    tokens_file.write_bytes(bytes(header) + np.array(ids, dtype=dtype).tobytes())
    ends = list(accumulate(len(document) for document in documents))
    (folder / "ends.bin").write_bytes(np.array(ends, dtype="<i8").tobytes())
    numbers = range(1, len(documents) + 1) if lines is None else lines
    (folder / "lines.bin").write_bytes(np.array(list(numbers), dtype="<i8").tobytes())
    meta = ShardMeta(
        dtype,
        documents=len(documents),
        tokens=len(ids),
        files=[list(pair) for pair in files or [(0, len(documents))]],
        external=header or None,
    )
    (folder / "shard.json").write_text(json.dumps(asdict(meta)))
    return Shard(folder, tokens_file, header, dtype, len(ids), len(documents), first_file, first_line)


def make_stream(folder: Path, *shards: Documents, dtypes: Sequence[str] = ("<u2",)) -> TokenStream:
    """A stream with the documents of each shard; `dtypes` of the shards are taken in turn."""
    return TokenStream(
        [
            write_shard(folder / str(number), documents, dtypes[number % len(dtypes)])
            for number, documents in enumerate(shards)
        ]
    )


def span_of_tokens(folder: Path, ids: Sequence[int], dtype: str = "<u2") -> Span:
    """A stream of one document."""
    return make_stream(folder, [ids], dtypes=[dtype]).span()


def span_of_lengths(folder: Path, *lengths: int, shard_documents: int = 2) -> Span:
    """A stream of the ids 0, 1, 2, ... in documents of these lengths, so many of them in a shard."""
    ends = [0, *accumulate(lengths)]
    documents = [range(ends[number], ends[number + 1]) for number in range(len(lengths))]
    shards = [documents[first : first + shard_documents] for first in range(0, len(documents), shard_documents)]
    return make_stream(folder, *shards).span()
