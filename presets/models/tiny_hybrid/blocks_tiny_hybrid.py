"""The building blocks of TinyHybrid: norms, token mixers, MLPs.

Shapes in the docstrings: B is the batch, T the sequence length, D the hidden size, H the number of heads, d = D / H
the width of one head, E the number of experts.

Every token mixer here is causal: position t of its output depends on positions 0 to t of its input only. So padding
on the right never reaches a real token, and no mixer takes an attention mask.

Buffers that follow from the configuration (`inv_freq`, `log_decay`, `bands`) are not saved with the weights. Each is
computed by a function of its own, because it is needed twice: when the module is built, and again after
`from_pretrained`, which builds the module on the meta device and so leaves such buffers without values (see
`_init_weights` in `modeling_tiny_hybrid.py`).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_tiny_hybrid import TinyHybridConfig


class TinyHybridRMSNorm(nn.Module):
    """Root mean square layer norm (Zhang & Sennrich 2019, arXiv:1910.07467) over the last dimension."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., size). Returns the same shape and dtype; the statistics are taken in float32."""
        x_float = x.float()
        normed = x_float * torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * normed).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# Rotary position embedding
# --------------------------------------------------------------------------------------------------


def rotary_inverse_frequencies(head_dim: int, theta: float) -> torch.Tensor:
    """The angle per position of each rotated pair, (d / 2)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return theta**-exponents


class TinyHybridRotaryEmbedding(nn.Module):
    """Angles of the rotary position embedding (RoPE; Su et al. 2021, arXiv:2104.09864)."""

    def __init__(self, config: TinyHybridConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.theta = config.rope_theta
        self.register_buffer("inv_freq", rotary_inverse_frequencies(self.head_dim, self.theta), persistent=False)

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids: (B, T) or (1, T). Returns cos and sin, each (B or 1, 1, T, d), to broadcast over heads."""
        angles = position_ids[:, None, :, None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + d/2]) of each head. x: (B, H, T, d). Returns the same shape and dtype."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)


def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, T, D) -> (B, H, T, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, H, T, d) -> (B, T, D)."""
    return x.transpose(1, 2).flatten(-2)


# --------------------------------------------------------------------------------------------------
# Token mixers. Each has the signature forward(x, cos, sin), so that a block need not know which one it holds.
# --------------------------------------------------------------------------------------------------


class CausalSelfAttention(nn.Module):
    """Causal multi-head attention (Vaswani et al. 2017, arXiv:1706.03762) with rotary positions."""

    def __init__(self, config: TinyHybridConfig):
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x: (B, T, D). Returns (B, T, D)."""
        q = apply_rotary(split_heads(self.q_proj(x), self.num_heads), cos, sin)
        k = apply_rotary(split_heads(self.k_proj(x), self.num_heads), cos, sin)
        v = split_heads(self.v_proj(x), self.num_heads)
        return self.o_proj(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


def retention_log_decays(num_heads: int) -> torch.Tensor:
    """log(gamma) of each head, (H), with gamma = 1 - 2^(-5 - h): RetNet's, eq. 8."""
    return torch.log1p(-(2.0 ** (-5.0 - torch.arange(num_heads, dtype=torch.float32))))


def parallel_retention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor) -> torch.Tensor:
    """RetNet's retention in its parallel form (eq. 5), which is the recurrence

        S_t = gamma * S_(t-1) + k_t^T v_t,    o_t = q_t S_t

    written as one masked matrix product.

    q, k, v: (B, H, T, d), with positions already applied to q and k. log_decay: (H). Returns (B, H, T, d).
    """
    positions = torch.arange(q.shape[2], device=q.device)
    distance = positions[:, None] - positions[None, :]  # (T, T): how far the key lies behind the query
    # Clamped before exp(): a distance below zero would give a huge value, and multiplying that by the mask's
    # zero is no safe way to be rid of it (inf * 0 is nan).
    decay = torch.exp(distance.clamp(min=0) * log_decay.float()[:, None, None])  # (H, T, T)
    decay = decay.masked_fill(distance < 0, 0.0)
    scores = q @ k.transpose(-1, -2)
    return (scores * decay.to(scores.dtype)) @ v


class MultiScaleRetention(nn.Module):
    """Multi-scale retention (RetNet; Sun et al. 2023, arXiv:2307.08621): linear attention with a decay per head."""

    def __init__(self, config: TinyHybridConfig):
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.key_scale = config.head_dim**-0.5
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.gate_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)
        # Retention has no softmax, so nothing bounds its outputs and heads with a slow decay give larger ones;
        # the group norm puts every head back on one scale.
        self.head_norm = nn.GroupNorm(self.num_heads, size, eps=config.rms_norm_eps)
        self.register_buffer("log_decay", retention_log_decays(self.num_heads), persistent=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x: (B, T, D). Returns (B, T, D)."""
        q = apply_rotary(split_heads(self.q_proj(x), self.num_heads), cos, sin)
        k = apply_rotary(split_heads(self.k_proj(x), self.num_heads), cos, sin) * self.key_scale
        v = split_heads(self.v_proj(x), self.num_heads)
        retained = merge_heads(parallel_retention(q, k, v, self.log_decay))
        # nn.GroupNorm normalises over all dimensions after the second. Folding T into the batch gives each
        # position statistics of its own, without which the norm would look into the future.
        normed = self.head_norm(retained.flatten(0, 1)).view_as(retained)
        return self.o_proj(F.silu(self.gate_proj(x)) * normed)


def fft_causal_convolution(u: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """y[t] = sum over s <= t of h[t - s] * u[s], for each channel by itself, in O(T log T).

    u: (B, T, D), the signal. h: (T, D), the filter. Returns (B, T, D).

    Both are zero-padded to 2T: the product of two spectra is a circular convolution, and the padding takes up what
    would wrap around from the end of the sequence to its start.
    """
    length = u.shape[1]
    # As most FFT code found in the wild, this does not cast to float32. There is no FFT in bfloat16, and autocast
    # takes care of that on the CPU only; on a GPU the trainer that runs this model has a rule for it.
    u_spectrum = torch.fft.rfft(u, n=2 * length, dim=1)
    h_spectrum = torch.fft.rfft(h, n=2 * length, dim=0)
    return torch.fft.irfft(u_spectrum * h_spectrum, n=2 * length, dim=1)[:, :length]


HYENA_NUM_BANDS = 8
HYENA_FILTER_WIDTH = 32
HYENA_SINE_FREQUENCY = 10.0
HYENA_SHORT_KERNEL = 3


def hyena_bands() -> torch.Tensor:
    """Frequencies of the filter's positional features, in cycles per `max_position_embeddings`, (bands)."""
    return torch.linspace(1e-4, HYENA_NUM_BANDS - 1, HYENA_NUM_BANDS, dtype=torch.float32)


def hyena_log_decay_rates(hidden_size: int) -> torch.Tensor:
    """Starting point of the filters' decay, (1, D): from channels that fade to 1 % within 0.3 of
    `max_position_embeddings`, to channels that need 1.5 of it."""
    fade = math.log(100.0)
    return torch.linspace(fade / 1.5, fade / 0.3, hidden_size, dtype=torch.float32).log()[None, :]


class Sine(nn.Module):
    """sin(frequency * x) with a learned frequency per channel; lets a small MLP draw filters that oscillate."""

    def __init__(self, size: int):
        super().__init__()
        self.frequency = nn.Parameter(torch.full((1, size), HYENA_SINE_FREQUENCY))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (T, size). Returns (T, size)."""
        return torch.sin(self.frequency * x)


class HyenaFilter(nn.Module):
    """An implicit long filter: an MLP from position to filter value, times an exponential window.

    The number of parameters does not depend on the filter's length. Time runs in units of
    `max_position_embeddings`, not of T, so that h[t] is the same whatever the length of the sequence.
    """

    def __init__(self, config: TinyHybridConfig):
        super().__init__()
        self.max_length = config.max_position_embeddings
        self.mlp = nn.Sequential(
            nn.Linear(1 + 2 * HYENA_NUM_BANDS, HYENA_FILTER_WIDTH),
            Sine(HYENA_FILTER_WIDTH),
            nn.Linear(HYENA_FILTER_WIDTH, HYENA_FILTER_WIDTH),
            Sine(HYENA_FILTER_WIDTH),
            nn.Linear(HYENA_FILTER_WIDTH, config.hidden_size, bias=False),
        )
        self.log_decay_rate = nn.Parameter(hyena_log_decay_rates(config.hidden_size))
        self.register_buffer("bands", hyena_bands(), persistent=False)

    def forward(self, length: int) -> torch.Tensor:
        """Returns the filter's first `length` values for each channel, (length, D)."""
        steps = torch.arange(length, device=self.bands.device, dtype=torch.float32)
        time = (steps / self.max_length)[:, None]  # (length, 1)
        angles = 2 * math.pi * time * self.bands.float()
        features = torch.cat((time, angles.cos(), angles.sin()), dim=-1)
        window = torch.exp(-time * self.log_decay_rate.exp())  # (length, D)
        return self.mlp(features.to(self.mlp[0].weight.dtype)) * window


class HyenaMixer(nn.Module):
    """The Hyena operator of order 2 (Poli et al. 2023, arXiv:2302.10866), with one long filter per channel.

    y = gate_out * (h conv (gate_in * v)), where each of the three factors comes from a projection and a short
    causal convolution. It has no rotary positions: the filter knows how far apart two tokens are.
    """

    def __init__(self, config: TinyHybridConfig):
        super().__init__()
        size = config.hidden_size
        self.in_proj = nn.Linear(size, 3 * size, bias=False)
        # Padded by kernel - 1 on both sides; forward() cuts the right-hand surplus off, which makes it causal.
        self.short_conv = nn.Conv1d(
            3 * size,
            3 * size,
            kernel_size=HYENA_SHORT_KERNEL,
            padding=HYENA_SHORT_KERNEL - 1,
            groups=3 * size,
            bias=False,
        )
        self.filter = HyenaFilter(config)
        self.skip = nn.Parameter(torch.ones(size))  # a filter value of its own for distance zero
        self.out_proj = nn.Linear(size, size, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x: (B, T, D). Returns (B, T, D)."""
        length = x.shape[1]
        projected = self.short_conv(self.in_proj(x).transpose(1, 2))[..., :length].transpose(1, 2)
        gate_out, gate_in, v = projected.chunk(3, dim=-1)
        u = gate_in * v
        mixed = fft_causal_convolution(u, self.filter(length)) + self.skip * u
        return self.out_proj(gate_out * mixed)


# --------------------------------------------------------------------------------------------------
# MLPs
# --------------------------------------------------------------------------------------------------


class SwiGLU(nn.Module):
    """Gated MLP (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: TinyHybridConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., D). Returns (..., D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def load_balancing_loss(
    probabilities: torch.Tensor, chosen: torch.Tensor, token_mask: torch.Tensor | None
) -> torch.Tensor:
    """The Switch Transformer's auxiliary loss (Fedus et al. 2021, arXiv:2101.03961, eq. 4), for top-k routing.

    E * sum over experts of (share of the assignments) * (mean router probability). It is 1 when both are uniform.
    Only the probabilities carry a gradient; counting is not differentiable.

    probabilities: (N, E), one row per token. chosen: (N, k), expert indices. token_mask: (N), 1 for the tokens that
    count and 0 for padding, or None if all count. Returns a scalar.
    """
    num_experts = probabilities.shape[-1]
    assigned = F.one_hot(chosen, num_experts).sum(dim=1).to(probabilities.dtype)  # (N, E), k ones per row
    if token_mask is None:
        token_mask = torch.ones_like(probabilities[:, 0])
    weight = token_mask.to(probabilities.dtype)[:, None]
    num_tokens = weight.sum().clamp(min=1.0)  # a batch that is all padding gives a loss of 0, not nan
    share = (assigned * weight).sum(dim=0) / (num_tokens * chosen.shape[-1])
    mean_probability = (probabilities * weight).sum(dim=0) / num_tokens
    return num_experts * (share * mean_probability).sum()


class MixtureOfExperts(nn.Module):
    """Sparse mixture of SwiGLU experts with top-k routing (Shazeer et al. 2017, arXiv:1701.06538)."""

    def __init__(self, config: TinyHybridConfig):
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList([SwiGLU(config) for _ in range(config.num_experts)])

    def forward(self, x: torch.Tensor, token_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x: (B, T, D). token_mask: (B, T), 1 for real tokens and 0 for padding, or None.

        Returns the output (B, T, D), and the load-balancing loss, not yet multiplied by its coefficient (scalar).
        """
        tokens = x.flatten(0, 1)  # (N, D) with N = B * T
        # In float32 also when the rest runs in bfloat16: near-ties between experts must not depend on rounding.
        probabilities = self.router(tokens).float().softmax(dim=-1)  # (N, E)
        weights, chosen = probabilities.topk(self.experts_per_token, dim=-1)  # both (N, k)
        weights = weights / weights.sum(dim=-1, keepdim=True)

        output = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            # An expert that no token chose still runs, on zero rows: its parameters then get a zero gradient
            # rather than none, and every process of a distributed run has gradients for the same parameters.
            token_index, slot = torch.where(chosen == index)
            weighted = expert(tokens[token_index]) * weights[token_index, slot][:, None]
            output = output.index_add(0, token_index, weighted.to(output.dtype))

        flat_mask = None if token_mask is None else token_mask.flatten()
        return output.view_as(x), load_balancing_loss(probabilities, chosen, flat_mask)
