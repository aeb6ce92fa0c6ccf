"""Calling any causal LM the same way: token ids in, logits and auxiliary loss out.

The model is called without labels: its own loss may shift or not and may hold an auxiliary term or not, so the
trainer computes the loss itself (`train/loss.py`). What a model accepts is read from the signature of its `forward`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from eulerforge.errors import TrainingError


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
    """

    def __init__(self, model: Any, call: Any = None, document_way: Any = None) -> None:
        self._model = model
        self._call = model if call is None else call
        accepted = inspect.signature(model.forward).parameters
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
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, segments: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the model.

        Args:
            input_ids: (rows, length), int64.
            attention_mask: (rows, length) of 1 and 0, or None.

        Returns:
            logits (rows, length, vocabulary) and the scaled auxiliary loss (a scalar), None if the model has none.

        Raises:
            TrainingError: the output has no logits of that shape.
        """
        options = dict(self._options)
        if self._takes_positions:
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

    def _auxiliary_loss(self, output: Any) -> torch.Tensor | None:
        reported = getattr(output, "moe_aux", None)
        aux = reported.get("aux_loss_total") if isinstance(reported, dict) else getattr(output, "aux_loss", None)
        if not isinstance(aux, torch.Tensor):
            return None
        return aux.float().sum() * self._aux_factor
