"""TinyHybrid: a small causal language model whose layers mix tokens by attention, retention or long convolution.

It has no key-value cache: `generate` recomputes the whole sequence at each step, which is fine at this size. Padding,
where a batch needs it, goes on the right.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .blocks_tiny_hybrid import (
    HYENA_SHORT_KERNEL,
    HYENA_SINE_FREQUENCY,
    CausalSelfAttention,
    HyenaFilter,
    HyenaMixer,
    MixtureOfExperts,
    MultiScaleRetention,
    Sine,
    SwiGLU,
    TinyHybridRMSNorm,
    TinyHybridRotaryEmbedding,
    hyena_bands,
    hyena_log_decay_rates,
    retention_log_decays,
    rotary_inverse_frequencies,
)
from .configuration_tiny_hybrid import TinyHybridConfig

MIXERS = {
    "attention": CausalSelfAttention,
    "attention_moe": CausalSelfAttention,
    "hyena": HyenaMixer,
    "retention": MultiScaleRetention,
}

# Parameters that weight decay would pull away from where they belong: norm scales, and scales whose neutral value is
# not zero. Some of them have two dimensions, so the usual rule "decay whatever is more than a vector" misses them.
NO_WEIGHT_DECAY: dict[type[nn.Module], tuple[str, ...]] = {
    TinyHybridRMSNorm: ("weight",),
    nn.GroupNorm: ("weight", "bias"),
    Sine: ("frequency",),
    HyenaFilter: ("log_decay_rate",),
    HyenaMixer: ("skip",),
}


@dataclass
class TinyHybridOutput(ModelOutput):
    """What the model returns; entries that are None are left out when it is used as a tuple or dict.

    Attributes:
        loss: scalar, the cross-entropy plus `aux_loss`. Only with labels.
        logits: (B, T, vocab_size).
        aux_loss: scalar, the load-balancing losses of all mixture-of-experts layers, summed and already multiplied
            by `router_aux_loss_coef`. None if the model has no such layer.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


class TinyHybridBlock(GradientCheckpointingLayer):
    """One pre-norm layer: a token mixer and an MLP, each added to the residual stream."""

    def __init__(self, config: TinyHybridConfig, layer_kind: str):
        super().__init__()
        self.has_experts = layer_kind == "attention_moe"
        self.mixer_norm = TinyHybridRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = MIXERS[layer_kind](config)
        self.mlp_norm = TinyHybridRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config) if self.has_experts else SwiGLU(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states: (B, T, D). Returns (B, T, D), and the load-balancing loss or None."""
        mixed = self.mixer(self.mixer_norm(hidden_states), cos, sin)
        hidden_states = hidden_states + self.dropout(mixed)
        normed = self.mlp_norm(hidden_states)
        balance_loss = None
        if self.has_experts:
            update, balance_loss = self.mlp(normed, attention_mask)
        else:
            update = self.mlp(normed)
        return hidden_states + self.dropout(update), balance_loss


class TinyHybridPreTrainedModel(PreTrainedModel):
    config_class = TinyHybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["TinyHybridBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what the module itself holds, and the submodules whose start differs from the default.

        Called for each module, children before parents. It is also called after `from_pretrained` for modules that
        hold anything the checkpoint does not, which is how the non-persistent buffers get their values back. The
        `init` functions leave parameters alone that were loaded; plain in-place calls would overwrite them.
        """
        super()._init_weights(module)  # linear, convolution, embedding, RMS and group norm
        if isinstance(module, TinyHybridRotaryEmbedding):
            init.copy_(module.inv_freq, rotary_inverse_frequencies(module.head_dim, module.theta))
        elif isinstance(module, MultiScaleRetention):
            init.copy_(module.log_decay, retention_log_decays(module.num_heads))
        elif isinstance(module, Sine):
            init.constant_(module.frequency, HYENA_SINE_FREQUENCY)
        elif isinstance(module, HyenaFilter):
            init.copy_(module.bands, hyena_bands())
            init.copy_(module.log_decay_rate, hyena_log_decay_rates(module.log_decay_rate.shape[-1]))
            for layer in module.mlp:
                if isinstance(layer, nn.Linear):
                    # Not `initializer_range`: the sines need inputs of order one to be more than a straight line.
                    init.normal_(layer.weight, std=layer.in_features**-0.5)
        elif isinstance(module, HyenaMixer):
            init.ones_(module.skip)
            # Not `initializer_range` either: three outputs of this convolution are multiplied with each other.
            bound = HYENA_SHORT_KERNEL**-0.5
            init.uniform_(module.short_conv.weight, -bound, bound)

    def tie_weights(self, *args, **kwargs) -> None:
        """Tie the weights, and mark the parameters of `NO_WEIGHT_DECAY` for the trainer's optimizer groups.

        The marks are set here, not where the parameters are made: `from_pretrained` puts new parameter objects in
        their place, without the attributes of the old. This method is the last step of building as of loading.
        """
        super().tie_weights(*args, **kwargs)
        for module in self.modules():
            for name in NO_WEIGHT_DECAY.get(type(module), ()):
                getattr(module, name)._no_weight_decay = True


class TinyHybridModel(TinyHybridPreTrainedModel):
    """The model without its output head."""

    def __init__(self, config: TinyHybridConfig):
        super().__init__(config)
        config.check()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = TinyHybridRotaryEmbedding(config)
        self.layers = nn.ModuleList([TinyHybridBlock(config, name) for name in config.layer_pattern])
        self.norm = TinyHybridRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Arguments as in `TinyHybridForCausalLM.forward`. Returns (B, T, D), and the scaled aux loss or None."""
        hidden_states = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None, :]
        # Once for all layers, from positions that are the same in each of them.
        cos, sin = self.rotary(position_ids)
        aux_loss = None
        for layer in self.layers:
            hidden_states, balance_loss = layer(hidden_states, cos, sin, attention_mask)
            if balance_loss is not None:
                scaled = self.config.router_aux_loss_coef * balance_loss
                aux_loss = scaled if aux_loss is None else aux_loss + scaled
        return self.norm(hidden_states), aux_loss


class TinyHybridForCausalLM(TinyHybridPreTrainedModel, GenerationMixin):
    """TinyHybrid with a language modelling head."""

    # The head's weight is the embedding's when `config.tie_word_embeddings` says so: {target: source}.
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TinyHybridConfig):
        super().__init__(config)
        self.model = TinyHybridModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> TinyHybridOutput:
        """Predict the next token at each position.

        Args:
            input_ids: (B, T), T of 1 or more.
            attention_mask: (B, T), 1 for tokens and 0 for padding on the right. As all layers are causal, it is
                needed only to keep padding out of the load-balancing loss.
            position_ids: (B, T) or (1, T), the rotary positions; 0 to T - 1 if left out.
            labels: (B, T), the input ids with -100 where there is nothing to predict. They are shifted here, so
                label t is the target of position t - 1.
            kwargs: passed on to the loss function (`num_items_in_batch`); others are ignored.
        """
        hidden_states, aux_loss = self.model(input_ids, attention_mask, position_ids)
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if aux_loss is not None:
                loss = loss + aux_loss
        return TinyHybridOutput(loss=loss, logits=logits, aux_loss=aux_loss)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> dict[str, torch.Tensor | None]:
        """Pass on the whole sequence at each step. The inherited method cuts it to the newest token when it
        believes that a cache holds the rest."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Keep `generate` from building a key-value cache, which has no layer class for these layer types."""
        return False


__all__ = ["TinyHybridForCausalLM", "TinyHybridModel", "TinyHybridOutput", "TinyHybridPreTrainedModel"]
