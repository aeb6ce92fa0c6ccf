"""Documents of a packed row kept apart: positions that begin anew, and a mask between documents.

`segments` has the number of the document of each token within its row: 0, 0, 0, 1, 1, 2, ...
"""

from __future__ import annotations

from typing import Literal

import torch

Way = Literal["mask", "positions"]
"""How a model is told of documents. mask: a 4-D additive mask, and positions that begin anew where `forward` takes
them. positions: those alone; transformers' own masks take a restart for a new document (the way of flash attention,
which takes no 4-D mask)."""


def restarted_positions(segments: torch.Tensor) -> torch.Tensor:
    """Position of each token in its document, or from the beginning of the row for a document that began before it.

    Args:
        segments: (rows, length), not falling along a row.

    Returns:
        (rows, length), int64.
    """
    index = torch.arange(segments.shape[1], device=segments.device).expand(segments.shape)
    begins = torch.zeros_like(index)
    begins[:, 1:] = torch.where(segments[:, 1:] != segments[:, :-1], index[:, 1:], 0)
    return index - begins.cummax(dim=1).values


def block_causal_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive attention mask: 0 where a token may look (its own document, not later than itself), else the lowest
    number of `dtype`. Both eager and sdpa attention of transformers take it as it is.

    Args:
        segments: (rows, length).
        dtype: floating.

    Returns:
        (rows, 1, length, length): query, key.
    """
    length = segments.shape[1]
    same = segments.unsqueeze(2) == segments.unsqueeze(1)
    earlier = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    hidden = ~(same & earlier)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min).unsqueeze(1)
