"""Forecasts of memory: counts by hand, against what autograd really keeps, and advice that fits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from eulerforge.errors import ModelError
from eulerforge.memory.advice import fitting_settings
from eulerforge.memory.forecast import Workload, forecast, local_elements, rows_of
from eulerforge.memory.peak import PeakMemory
from eulerforge.memory.trace import LOSS_CHUNK, Pass, Tracer, trace
from eulerforge.models.directory import ModelDirectory
from eulerforge.models.lean import parameters_on_meta
from eulerforge.train.loss import CHUNK_ELEMENTS

VOCAB, HIDDEN, INNER, BLOCKS = 1000, 32, 128, 3
ROWS, LENGTH = 4, 16
TOKENS = ROWS * LENGTH
IN_BLOCK = 2 * HIDDEN * INNER
PARAMETERS = 2 * VOCAB * HIDDEN + BLOCKS * IN_BLOCK


class Block(nn.Module):
    """Keeps what ReLU gave (INNER numbers a token) and its own result (HIDDEN numbers a token)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(hidden)))


class Stubborn(Block):
    """Leaves torch for a moment, where no fake tensor can follow."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) * float(hidden.detach().float().numpy().max())


class Stack(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self, blocks: list[type[Block]], tied: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList([block() for block in blocks])
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: torch.Tensor) -> Any:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return SimpleNamespace(logits=self.head(hidden))


def stack(*blocks: type[Block], tied: bool = False) -> Stack:
    with parameters_on_meta():
        return Stack(list(blocks) or [Block] * BLOCKS, tied)


def workload(**values: Any) -> Workload:
    return Workload(**{"rows": ROWS, "length": LENGTH, "device": "cuda"} | values)


KEPT_OUTSIDE = TOKENS * (HIDDEN * 4 + 8)
"""The embedding's result, and the ids in 64 bits, for its gradient."""
KEPT_BY_BLOCK = TOKENS * (INNER + HIDDEN) * 4


# What stays


@pytest.mark.parametrize(
    ("values", "parameters", "gradients", "optimizer"),
    [
        ({}, 4, 4, 8),
        ({"compute": torch.bfloat16}, 4, 4, 8),
        ({"stored": torch.bfloat16, "compute": torch.bfloat16}, 2, 2, 4),
        ({"strategy": "ddp", "world_size": 2}, 4, 4, 8),
        ({"strategy": "fsdp", "world_size": 2}, 2, 2, 4),
        ({"strategy": "fsdp", "world_size": 4, "replicate": 2}, 2, 2, 4),
        ({"strategy": "fsdp", "world_size": 2, "accumulation": 2}, 2, 4 + 2, 4),
    ],
)
def test_bytes_a_parameter(values: dict[str, Any], parameters: float, gradients: float, optimizer: float) -> None:
    result = forecast(stack(), workload(**values))
    assert result.parameters == parameters * PARAMETERS
    assert result.gradients == gradients * PARAMETERS
    assert result.optimizer == optimizer * PARAMETERS


def test_ddp_has_its_buckets() -> None:
    assert forecast(stack(), workload(strategy="ddp", world_size=2)).compute_copies == 4 * PARAMETERS


def test_muon_has_one_moment_for_matrices_of_blocks() -> None:
    result = forecast(stack(), workload(optimizer="muon"))
    assert result.optimizer == BLOCKS * IN_BLOCK * 4 + 2 * VOCAB * HIDDEN * 8


def test_eight_bits_have_scales_and_leave_small_parameters_alone() -> None:
    model = stack()
    model.norm = nn.Parameter(torch.empty(50, 60, device="meta"))
    scales = 2 * VOCAB + BLOCKS * (HIDDEN + INNER)  # every row is shorter than a block
    result = forecast(model, workload(optimizer="adamw8bit"))
    assert result.optimizer == 2 * PARAMETERS + 2 * 4 * scales + 2 * 4 * 50 * 60


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimiser_state_is_what_the_optimisers_have(kind: Any, dtype: torch.dtype) -> None:
    from eulerforge.optim.optimizer import build_optimizer

    model = LlamaForCausalLM(llama()).to(dtype)
    expected = forecast(model, workload(optimizer=kind, stored=dtype, compute=torch.bfloat16)).optimizer
    optimizer = build_optimizer(model, kind=kind, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, seed=0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert expected == sum(value.numel() * value.element_size() for value in states)


def test_tied_weights_count_once() -> None:
    tied = forecast(stack(tied=True), workload())
    assert tied.parameters == 4 * (PARAMETERS - VOCAB * HIDDEN)
    assert tied.gradients == tied.parameters


def test_frozen_parameters_have_no_gradient() -> None:
    model = stack()
    model.embedding.weight.requires_grad_(False)
    result = forecast(model, workload())
    assert result.parameters == 4 * PARAMETERS
    assert result.gradients == 4 * (PARAMETERS - VOCAB * HIDDEN)


@pytest.mark.parametrize(("rows", "shards"), [(1000, 3), (7, 4), (2, 4), (8, 8), (1, 2)])
def test_shards_make_up_the_whole(rows: int, shards: int) -> None:
    cut = [len(part) for part in torch.arange(rows).chunk(shards)]
    assert [rows_of(rows, shards, rank) for rank in range(shards)] == cut + [0] * (shards - len(cut))
    assert sum(local_elements((rows, 5), shards, rank) for rank in range(shards)) == rows * 5
    assert max(local_elements((rows, 5), shards, rank) for rank in range(shards)) == local_elements((rows, 5), shards)


def test_the_loss_s_chunk_is_that_of_the_trainer() -> None:
    assert LOSS_CHUNK == CHUNK_ELEMENTS


def test_muon_without_matrices_is_an_error_and_not_a_guess() -> None:
    with pytest.raises(ModelError):
        forecast(nn.Module(), Workload(1, 8, optimizer="muon"))


# Activations and the course of a step


def test_activations_by_hand() -> None:
    result = forecast(stack(), workload())
    assert result.activations == BLOCKS * KEPT_BY_BLOCK + KEPT_OUTSIDE
    assert result.logits == 3 * TOKENS * VOCAB * 4  # the logits, their gradient, and a chunk that holds all of them
    assert result.notes == ()


def test_activations_by_hand_under_autocast() -> None:
    """Weights and what products read are bfloat16; the embedding's result is there in both, its copy in block 0."""
    result = forecast(stack(), workload(compute=torch.bfloat16))
    assert result.activations == BLOCKS * KEPT_BY_BLOCK // 2 + TOKENS * HIDDEN * 2 + KEPT_OUTSIDE
    assert result.compute_copies == 2 * (BLOCKS * IN_BLOCK + VOCAB * HIDDEN)


def test_recomputed_blocks_keep_their_input_and_one_is_there_at_a_time() -> None:
    every, second = (forecast(stack(), workload(checkpoint_every=every)) for every in (1, 2))
    passed_on = TOKENS * HIDDEN * 4
    assert every.activations == BLOCKS * passed_on + KEPT_BY_BLOCK + KEPT_OUTSIDE
    assert second.activations == 2 * passed_on + 1 * KEPT_BY_BLOCK + KEPT_BY_BLOCK + KEPT_OUTSIDE
    assert every.total < second.total


def test_peak_around_the_loss_by_hand() -> None:
    """Gradients are not there yet; the loss and its gradient are a number each."""
    result = forecast(stack(), workload())
    state = result.parameters + result.optimizer
    assert result.total == state + result.activations + 3 * TOKENS * VOCAB * 4 + 2 * 4


def test_with_few_tokens_all_gradients_are_there_at_the_peak() -> None:
    result = forecast(stack(), workload(rows=1, length=2))
    assert 16 * PARAMETERS <= result.total <= 16 * PARAMETERS + result.activations + result.logits


def test_second_micro_batch_finds_gradients_and_the_logits_before() -> None:
    one, two = forecast(stack(), workload()), forecast(stack(), workload(accumulation=2))
    assert two.total >= one.total + two.gradients


def test_fsdp_gathers_two_blocks_and_the_rest() -> None:
    result = forecast(stack(), workload(strategy="fsdp", world_size=2, compute=torch.bfloat16))
    assert result.gathered == 2 * (2 * IN_BLOCK + 2 * VOCAB * HIDDEN)
    assert result.compute_copies == 0


def test_more_memory_on_cpu() -> None:
    cuda, cpu = forecast(stack(), workload()), forecast(stack(), workload(device="cpu"))
    assert cpu.total == cuda.total + cpu.overhead
    assert cpu.overhead > cuda.overhead == 0


def test_lines_add_up() -> None:
    result = forecast(stack(), workload(device="cpu"))
    *parts, total = [float(line.split(" MiB")[0].split()[-1].replace(",", "")) for line in result.lines()]
    assert sum(parts) == pytest.approx(total, abs=0.1 * len(parts))


# Against the real thing


def llama(**values: Any) -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 300}
    return LlamaConfig(**sizes | {"num_attention_heads": 4, "num_key_value_heads": 4} | values)


def mixtral(**values: Any) -> MixtralConfig:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
    return MixtralConfig(**sizes | experts | {"num_attention_heads": 4, "num_key_value_heads": 4} | values)


def really_kept(model: Any, compute: torch.dtype) -> int:
    """Bytes of the storages that autograd keeps, parameters and buffers not counted."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(300, (8, 64))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", compute, enabled=compute != torch.float32),
    ):
        model.train()(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eager", [False, True])
def test_dense_model_keeps_what_is_forecast(compute: torch.dtype, eager: bool) -> None:
    model = LlamaForCausalLM(llama(attn_implementation="eager" if eager else "sdpa"))
    result = forecast(model, workload(rows=8, length=64, compute=compute))
    assert result.activations + result.compute_copies == pytest.approx(really_kept(model, compute), rel=0.02)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_chosen_by_tokens_are_counted_as_balanced(implementation: str) -> None:
    model = MixtralForCausalLM(mixtral(experts_implementation=implementation))
    result = forecast(model, workload(rows=8, length=64))
    assert result.notes == ()
    assert result.activations == pytest.approx(really_kept(model, torch.float32), rel=0.1)


def test_custom_code_with_questions_of_data(tiny_hybrid: Any) -> None:
    result = forecast(tiny_hybrid, workload(rows=8, length=64))
    assert result.notes == ()
    assert result.activations == pytest.approx(really_kept(tiny_hybrid, torch.float32), rel=0.1)


class Experts(Block):
    """Half of the experts' tokens by counts that leave torch, half by masks."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 4, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.reshape(-1, HIDDEN)
        chosen = self.router(tokens).topk(1, dim=-1).indices.flatten()
        counts = torch.bincount(chosen, minlength=4).tolist()
        parts = tokens[chosen.argsort()].split(counts)
        result = torch.zeros_like(tokens)
        for expert, part in enumerate(parts):
            mask = chosen == expert
            if mask.any():
                result[mask] += self.up(part)[: int(mask.sum()), :HIDDEN]
        return result.view_as(hidden)


def test_counts_of_tokens_add_up() -> None:
    """tokens[chosen.argsort()] and the router's input are not new or not kept; each expert sees a quarter."""
    result = forecast(stack(Experts), workload())
    assert result.notes == ()
    assert TOKENS * HIDDEN * 4 * 2 < result.activations < TOKENS * (6 * HIDDEN + INNER) * 4 + KEPT_OUTSIDE


@pytest.fixture
def tiny_hybrid() -> Any:
    from pathlib import Path

    from eulerforge.models.build import build_model

    directory = ModelDirectory.read(Path(__file__).parents[2] / "presets" / "models" / "tiny_hybrid")
    return build_model(directory, trust_remote_code=True, seed=0).model


def test_doubling_the_length_doubles_what_sdpa_keeps() -> None:
    with parameters_on_meta():
        model = LlamaForCausalLM(llama())
    short, long = (forecast(model, workload(length=length)).activations for length in (256, 512))
    assert long == pytest.approx(2 * short, rel=0.01)


# Odd models


def test_a_block_that_cannot_be_traced_is_named_and_the_others_count() -> None:
    result = forecast(stack(Block, Stubborn, Block), workload())
    assert len(result.notes) == 1
    assert "Stubborn" in result.notes[0]
    assert result.activations == 2 * KEPT_BY_BLOCK + KEPT_OUTSIDE
    assert result.parameters == 4 * PARAMETERS


def test_a_model_that_cannot_be_traced_has_a_forecast_of_the_rest() -> None:
    model = stack()
    model.forward = lambda input_ids: input_ids.numpy()
    result = forecast(model, workload())
    assert result.activations == 0
    assert "Stack are unknown" in result.notes[0]
    assert result.total == 16 * PARAMETERS


def test_a_model_without_blocks_is_traced_as_a_whole() -> None:
    model = stack()
    model.one = model.blocks[0]
    del model.blocks
    model.forward = lambda input_ids: SimpleNamespace(logits=model.head(model.one(model.embedding(input_ids))))
    result = forecast(model, workload())
    assert "no blocks" in result.notes[0]


def test_forecasting_changes_nothing() -> None:
    model = LlamaForCausalLM(llama()).eval()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    forecast(model, workload(compute=torch.bfloat16))
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all("forward" not in vars(module) for module in model.modules())
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.grad is None


def test_nothing_is_allocated() -> None:
    """A skeleton of 1.6 billion parameters, 6 GiB of them."""
    with parameters_on_meta():
        model = LlamaForCausalLM(llama(hidden_size=4096, intermediate_size=16384, num_hidden_layers=6))
    peak = PeakMemory(torch.device("cpu"))
    result = forecast(model, workload(rows=2, length=1024))
    assert result.total > 20 * 2**30
    assert (peak.bytes() or 0) < 200 * 2**20


# Advice


def test_single_settings_that_fit_come_first() -> None:
    model, plan = stack(), workload(rows=64, length=512, compute=torch.bfloat16)
    now = forecast(model, plan).total
    advice = fitting_settings(model, plan, now - 1)
    assert len(advice) == 3
    for entry in advice:
        assert entry.fits
        assert len(entry.settings) == 1
        assert entry.total == forecast(model, entry.workload).total < now
    assert advice[0].settings == ("training.activation_checkpointing: true",)


def test_batch_size_is_no_smaller_than_it_must_be() -> None:
    model, plan = stack(), workload(rows=64, length=512, checkpoint_every=1)
    free = forecast(model, workload(rows=16, length=512, checkpoint_every=1)).total
    advice = fitting_settings(model, plan, free)
    assert advice[0].settings == ("training.batch_size: 16",)


def test_settings_are_combined_where_one_is_not_enough() -> None:
    model, plan = stack(), workload(rows=2, length=256, compute=torch.bfloat16)
    free = forecast(model, workload(rows=1, length=256, compute=torch.bfloat16, stored=torch.bfloat16)).total
    advice = fitting_settings(model, plan, free)
    assert all(entry.fits and entry.total <= free for entry in advice)
    assert any(len(entry.settings) > 1 for entry in advice)


def test_advice_that_does_not_fit_says_so() -> None:
    advice = fitting_settings(stack(), workload(), 1)
    assert len(advice) == 3
    assert not any(entry.fits for entry in advice)


def test_fsdp_is_proposed_to_several_processes_only() -> None:
    def texts(**values: Any) -> set[str]:
        advice = fitting_settings(stack(), workload(rows=1, length=2, **values), 16 * PARAMETERS - 1)
        return {text for entry in advice for text in entry.settings}

    assert "distributed.strategy: fsdp" in texts(strategy="ddp", world_size=4)
    assert "distributed.strategy: fsdp" not in texts()


def test_traces_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Pass] = []
    monkeypatch.setattr("eulerforge.memory.trace.trace", lambda model, what: made.append(what) or trace(model, what))
    model, plan = stack(), workload(rows=8, length=512)
    tracer = Tracer(model)
    forecast(model, plan, tracer)
    fitting_settings(model, plan, 1, tracer)
    assert len(made) == len(set(made))


# Measured


def test_peak_memory_sees_what_has_gone() -> None:
    peak = PeakMemory(torch.device("cpu"))
    torch.ones(64 * 2**20)
    measured = peak.bytes()
    assert measured is not None
    assert 200 * 2**20 < measured < 400 * 2**20
