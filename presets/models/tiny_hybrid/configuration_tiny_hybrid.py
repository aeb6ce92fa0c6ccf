"""Configuration of TinyHybrid, a small causal language model that mixes four kinds of layers."""

from transformers import PreTrainedConfig

LAYER_KINDS = ("attention", "attention_moe", "hyena", "retention")
"""The names that `TinyHybridConfig.layer_pattern` may hold."""

DEFAULT_LAYER_KINDS = ("hyena", "attention", "retention", "attention_moe")


class TinyHybridConfig(PreTrainedConfig):
    """Shape of a TinyHybrid model.

    Args:
        vocab_size: number of rows of the embedding matrix.
        hidden_size: width of the residual stream; a multiple of `num_attention_heads`.
        num_attention_heads: heads of the attention and retention layers.
        intermediate_size: inner width of every SwiGLU MLP, and of every expert.
        layer_pattern: one name of `LAYER_KINDS` per layer, from the bottom up; its length is the depth.
        num_experts: experts of each `attention_moe` layer.
        num_experts_per_tok: experts that each token is sent to.
        router_aux_loss_coef: weight of the load-balancing loss.
        max_position_embeddings: longest sequence the model is meant for. It also sets the time scale of the
            Hyena filters, so changing it changes what a trained model computes.
        rope_theta: base of the rotary position embedding.
        rms_norm_eps: epsilon of every norm.
        initializer_range: standard deviation of the normal weight initialisation.
        hidden_dropout: dropout on what each sublayer adds to the residual stream.
        tie_word_embeddings: whether the output head shares the embedding matrix.
        use_cache: kept False, the model has no key-value cache.
    """

    model_type = "tiny_hybrid"

    vocab_size: int = 4096
    hidden_size: int = 128
    num_attention_heads: int = 4
    intermediate_size: int = 256
    layer_pattern: list[str] | tuple[str, ...] | None = None
    num_experts: int = 4
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float | int = 0.01
    max_position_embeddings: int = 512
    rope_theta: float | int = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float | int = 0.02
    hidden_dropout: float | int = 0.0
    tie_word_embeddings: bool = True
    use_cache: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        self.layer_pattern = list(DEFAULT_LAYER_KINDS if self.layer_pattern is None else self.layer_pattern)
        super().__post_init__(**kwargs)
        self.check()

    @property
    def num_hidden_layers(self) -> int:
        """The depth, one layer per entry of `layer_pattern`."""
        return len(self.layer_pattern)

    @property
    def head_dim(self) -> int:
        """Width of one attention or retention head."""
        return self.hidden_size // self.num_attention_heads

    def check(self) -> None:
        """Raise a ValueError that says what is wrong if no model can be built from this config.

        The model calls it too: fields may have been assigned since the config was made, and
        `AutoConfig.from_pretrained(path, layer_pattern=...)` does just that.
        """
        if not self.layer_pattern:
            raise ValueError("layer_pattern is empty; a TinyHybrid model needs at least one layer")
        unknown = sorted({str(name) for name in self.layer_pattern if name not in LAYER_KINDS})
        if unknown:
            raise ValueError(
                f"layer_pattern has unknown entries {', '.join(map(repr, unknown))}; "
                f"known ones are {', '.join(map(repr, LAYER_KINDS))}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"the head width hidden_size / num_attention_heads ({self.head_dim}) is odd; "
                "rotary position embedding needs an even one"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be between 1 and "
                f"num_experts ({self.num_experts})"
            )


__all__ = ["DEFAULT_LAYER_KINDS", "LAYER_KINDS", "TinyHybridConfig"]
