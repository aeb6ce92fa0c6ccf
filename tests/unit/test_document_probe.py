"""Documents of a row kept apart: positions, mask, and the proof on the model itself."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from eulerforge.data.rows import IGNORE_INDEX, PackedRows, StepBatches, StepPlan
from eulerforge.errors import ModelError
from eulerforge.models.blocks import FoundBlock, refuse_leaking_blocks
from eulerforge.models.document_mask import block_causal_mask, restarted_positions
from eulerforge.models.document_probe import ProbedModel, find_way
from eulerforge.models.forward import CausalForward
from tests.kit.streams import make_stream

SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]], dtype=torch.int32)
VOCABULARY = 100
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def test_positions_begin_anew_at_each_document() -> None:
    assert restarted_positions(SEGMENTS).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]


def test_a_token_looks_at_its_own_document_up_to_itself() -> None:
    mask = block_causal_mask(SEGMENTS, torch.float32)
    assert mask.shape == (2, 1, 6, 6)
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert block_causal_mask(SEGMENTS, torch.bfloat16).dtype == torch.bfloat16


def _llama(attention: str = "sdpa", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_SHAPE | changes)
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention)


def _qwen(attention: str) -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**_SHAPE, head_dim=16)
    return transformers.Qwen3ForCausalLM._from_config(config, attn_implementation=attention)


def _gpt2(attention: str) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel._from_config(config, attn_implementation=attention)


def _mixtral(attention: str) -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**_SHAPE, num_local_experts=4)
    return transformers.MixtralForCausalLM._from_config(config, attn_implementation=attention)


def _mamba() -> Any:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8)
    return transformers.MambaForCausalLM(config)


def _probe(model: Any, precision: Any = contextlib.nullcontext) -> str:
    return find_way(ProbedModel(model, VOCABULARY, precision, lambda: None, torch.device("cpu")))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("make", "way"), [(_llama, "mask"), (_qwen, "mask"), (_gpt2, "mask"), (_mixtral, "positions")]
)
def test_models_of_transformers_keep_documents_apart(make: Any, way: str, attention: str) -> None:
    """Mixtral's router loss takes no 4-D mask, so it is told by positions."""
    assert _probe(make(attention)) == way


def test_low_precision_is_no_leak() -> None:
    assert _probe(_llama(), lambda: torch.autocast("cpu", dtype=torch.bfloat16)) == "mask"
    assert _probe(_llama().bfloat16()) == "mask"


def test_the_model_and_the_random_numbers_are_as_they_were() -> None:
    model = _llama(attention_dropout=0.5)
    model.train()
    settled: list[bool] = []
    state = torch.get_rng_state()
    find_way(
        ProbedModel(
            model,
            VOCABULARY,
            contextlib.nullcontext,
            lambda: settled.append(model.training),
            torch.device("cpu"),
        )
    )
    assert model.training
    assert settled == [False]
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


class _Kit(nn.Module):
    """Embedding, a mixer, head. `config` is what CausalForward looks at."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = transformers.PretrainedConfig(vocab_size=VOCABULARY)
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.mixer = mixer
        self.head = nn.Linear(16, VOCABULARY)

    def _logits(self, hidden: torch.Tensor) -> CausalLMOutput:
        return CausalLMOutput(logits=self.head(self.mixer(hidden)))

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, position_ids: Any = None) -> Any:
        return self._logits(self.embed(input_ids))


class _Average(nn.Module):
    """Each token becomes the mean of all up to it: a state that runs on, whatever mask is given."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1)[:, None]


class _Spectrum(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        length = hidden.shape[1]
        spectrum = torch.fft.rfft(hidden, n=2 * length, dim=1)
        kernel = torch.fft.rfft(torch.exp(-torch.arange(length) / 4.0), n=2 * length)
        return torch.fft.irfft(spectrum * kernel[:, None], n=2 * length, dim=1)[:, :length]


class _WithoutPositions(_Kit):
    def forward(self, input_ids: torch.Tensor) -> Any:  # type: ignore[override]
        return self._logits(self.embed(input_ids))


class _OwnPositions(_Kit):
    """Honours the mask, but counts positions itself from the beginning of the row."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.places = nn.Embedding(64, 16)

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> Any:  # type: ignore[override]
        hidden = self.embed(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        length = input_ids.shape[1]
        mask = torch.full((length, length), -1e9).triu(1) if attention_mask is None else attention_mask[:, 0]
        return self._logits(torch.softmax(hidden @ hidden.transpose(1, 2) + mask, dim=-1) @ hidden)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_mamba, "backbone.layers.0.mixer (MambaMixer) carries information from one document to the next ("),
        (lambda: _Kit(_Average()), "mixer (_Average) carries information from one document to the next"),
        (lambda: _Kit(_Spectrum()), "mixer (_Spectrum) carries information from one document to the next"),
        (
            lambda: _WithoutPositions(_Average()),
            "mixer (_Average) carries information from one document to the next "
            "(TypeError: forward takes no attention_mask; TypeError: forward takes no position_ids)",
        ),
        (_OwnPositions, "_OwnPositions cannot keep documents apart: its positions cannot begin anew; TypeError: "),
        (lambda: _Kit(nn.Identity()), "no token's prediction depends on those before it yet"),
    ],
    ids=["mamba", "average", "fft", "no positions", "own positions", "embedding and head"],
)
def test_models_that_leak_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        _probe(make())
    assert str(caught.value).startswith(f"data.document_mask: {message}")
    assert "data.document_mask: false" in caught.value.problems[0].fix
    assert caught.value.exit_code == 2


def test_the_shipped_hybrid_is_refused_with_its_block() -> None:
    folder = Path(__file__).parents[2] / "presets" / "models" / "tiny_hybrid"
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mixer \(HyenaMixer\) carries information"):
        find_way(ProbedModel(model, config.vocab_size, contextlib.nullcontext, lambda: None, torch.device("cpu")))


def test_families_that_carry_a_state_are_refused_without_loading() -> None:
    refuse_leaking_blocks([FoundBlock("attention", "a"), FoundBlock("moe", "b")])
    with pytest.raises(ModelError) as caught:
        found = [FoundBlock("attention", "a"), FoundBlock("mamba", "stack.pattern[0]"), FoundBlock("fft", "x.py")]
        refuse_leaking_blocks(found)
    assert [problem.what for problem in caught.value.problems] == [
        "data.document_mask: Mamba blocks carry their state from one document to the next (stack.pattern[0])",
        "data.document_mask: FFT blocks convolve from one document to the next (x.py)",
    ]


@pytest.mark.parametrize("make", [_llama, _qwen, _gpt2, _mixtral])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_change_of_the_first_document_leaves_the_losses_of_the_second(
    make: Any, attention: str, tmp_path: Path
) -> None:
    """Through the rows of a corpus; without the mask the same change is seen."""
    model = make(attention).eval()
    way = _probe(model)
    losses: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for first in ([5, 6, 7, 8, 9], [5, 6, 7, 8, 90]):  # the last token of A changes
        rows = PackedRows(make_stream(tmp_path / str(first[-1]), [first, [11, 12, 13, 14, 15, 16, 17]]).span(), 12)
        for apart in (True, False):
            (batch,) = StepBatches(rows, StepPlan(_Identity(), 1, 1, 1), 0, 0, keep_apart=apart).of_step(0)
            assert batch.labels[0, 5] == (IGNORE_INDEX if apart else 11)
            assert batch.targets == (10 if apart else 11)
            with torch.no_grad():
                forward = CausalForward(model, document_way=way)  # type: ignore[arg-type]
                logits, _ = forward(batch.input_ids, None, batch.segments)
            losses[apart].append(
                nn.functional.cross_entropy(logits[0, 5:-1], batch.input_ids[0, 6:], reduction="none")
            )
    assert torch.allclose(*losses[True], atol=1e-6, rtol=0)
    assert not torch.allclose(*losses[False], atol=1e-4, rtol=0)


class _Identity:
    def row(self, position: int) -> int:
        return position
