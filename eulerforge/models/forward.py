"""Calling any causal LM the same way: token ids in, logits and auxiliary loss out.

The model is called without labels: its own loss may shift or not and may hold an auxiliary term or not, so the
trainer computes the loss itself (`train/loss.py`). What a model accepts is read from the signature of its `forward`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from eulerforge.errors import TrainingError
from eulerforge.models.document_mask import Way, block_causal_mask, restarted_positions


class CausalForward:
    """Adapter around a model.

    * `position_ids` are passed, contiguous from 0, where `forward` names them.
    * `attention_mask` is passed only when rows are padded.
    * Router auxiliary loss: EulerStack returns it already scaled when called with `output_aux=True`; Mixtral-like
      models return it unscaled when called with `output_router_logits=True` and give the factor as
      `config.router_aux_loss_coef`; any other model may return a scaled `aux_loss` of its own accord.

    Args:
        model: a causal LM whose output has `logits` (or is a tuple that starts with them).
        call: what to call instead of the model itself, for a model wrapped by a parallel strategy.
        document_way: how the model is told of documents that must not see each other.
    """

    def __init__(self, model: Any, call: Any = None, document_way: Way | None = None) -> None:
        self._model = model
        self._call = model if call is None else call
        accepted = inspect.signature(model.forward).parameters
        self._document_way = document_way
        self._takes_positions = "position_ids" in accepted
        self._takes_mask = "attention_mask" in accepted
        self._options: dict[str, Any] = {}
        if "use_cache" in accepted:
            self._options["use_cache"] = False
        if "return_dict" in accepted:
            self._options["return_dict"] = True
        self._aux_factor = 1.0
        coefficient = getattr(model.config, "router_aux_loss_coef", None)
        if "output_aux" in accepted:
            self._options["output_aux"] = True
        elif "output_router_logits" in accepted and coefficient:
            self._options["output_router_logits"] = True
            self._aux_factor = float(coefficient)

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        segments: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the model.

        Args:
            input_ids: (rows, length), int64.
            attention_mask: (rows, length) of 1 and 0, or None.
            segments: (rows, length), the number of each token's document in its row; None if documents may see each
                other. Not together with `attention_mask`.

        Returns:
            logits (rows, length, vocabulary) and the scaled auxiliary loss (a scalar), None if the model has none.

        Raises:
            TrainingError: the output has no logits of that shape.
        """
        options = dict(self._options)
        if segments is not None:
            options |= self._kept_apart(segments)
        elif self._takes_positions:
            length = input_ids.shape[1]
            options["position_ids"] = torch.arange(length, device=input_ids.device).expand_as(input_ids)
        if self._takes_mask and attention_mask is not None:
            options["attention_mask"] = attention_mask
        output = self._call(input_ids=input_ids, **options)
        logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != input_ids.shape:
            shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise TrainingError(
                f"{type(self._model).__name__}.forward gave logits of {shape} for ids of {list(input_ids.shape)}",
                "return an output whose `logits` have the shape (batch, length, vocabulary)",
                see="docs/models.md",
            )
        return logits, self._auxiliary_loss(output)

    def _kept_apart(self, segments: torch.Tensor) -> dict[str, torch.Tensor]:
        """What tells the model of documents.

        Raises:
            TypeError: its forward does not take that.
        """
        needed = "position_ids" if self._document_way == "positions" else "attention_mask"
        if not (self._takes_positions if needed == "position_ids" else self._takes_mask):
            raise TypeError(f"forward takes no {needed}")
        options = {}
        if self._takes_positions:
            options["position_ids"] = restarted_positions(segments)
        if self._document_way == "mask":
            options["attention_mask"] = block_causal_mask(segments, self._mask_dtype(segments.device))
        return options

    def _mask_dtype(self, device: torch.device) -> torch.dtype:
        """That of attention scores, which sdpa asks of an additive mask."""
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return next(parameter.dtype for parameter in self._model.parameters() if parameter.is_floating_point())

    def _auxiliary_loss(self, output: Any) -> torch.Tensor | None:
        reported = getattr(output, "moe_aux", None)
        aux = reported.get("aux_loss_total") if isinstance(reported, dict) else getattr(output, "aux_loss", None)
        if not isinstance(aux, torch.Tensor):
            return None
        return aux.float().sum() * self._aux_factor
