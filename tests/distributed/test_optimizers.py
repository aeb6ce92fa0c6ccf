"""Optimisers of sharded models: the numbers of one process, and state that any number of processes can read.

Real processes on gloo; this file is also what they run: `torchrun -m tests.distributed.test_optimizers FOLDER`.
Except in one test gradients are given and not computed: they are the same to the bit, and so must the weights be.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from eulerforge.distributed.context import start_processes
from eulerforge.models.shards import full_tensor
from eulerforge.optim.optimizer import Kind, build_optimizer, clip_gradients
from eulerforge.train.trainer_state import read_shared, shared_tensors, write_shared
from tests.kit.commands import run_python

CASES: dict[str, tuple[Kind, torch.dtype]] = {
    f"{kind}-{dtype}".replace("torch.", ""): (kind, dtype)
    for kind in ("adamw", "adamw8bit", "muon")
    for dtype in (torch.float32, torch.bfloat16)
}
PLACES = [(2, "fsdp"), (4, "fsdp"), (4, "hsdp")]
BEFORE, AFTER = range(3), range(3, 5)
"""Steps before and after the checkpoint."""


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(300, 50)
        self.down = nn.Linear(50, 300)
        self.wide = nn.Linear(2000, 5)  # over 4 ranks: 2, 2, 1 and no rows
        self.bias = nn.Parameter(torch.randn(1))  # over 2 ranks: one has nothing
        self.a_log = nn.Parameter(torch.randn(50, 16))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = torch.tanh(self.up(hidden)) * self.a_log.exp().mean()
        wide = self.wide(inner.repeat(1, 1, 40)).mean(-1, keepdim=True)
        return hidden + self.down(inner) * torch.sigmoid(wide + self.bias)


class _Model(nn.Module):
    """`a_log` stays float32 and whole on every rank."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(23, 300)
        self.layers = nn.ModuleList([_Block(), _Block()])
        self.norm = nn.LayerNorm(300)
        self.head = nn.Linear(300, 23, bias=False)
        self.to(dtype)
        for name, parameter in self.named_parameters():
            if name.endswith("a_log"):
                parameter.data = parameter.data.float()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden))


def _make(case: str, mesh: DeviceMesh | None, eps: float = 1e-8) -> tuple[_Model, torch.optim.Optimizer]:
    kind, dtype = CASES[case]
    model = _Model(dtype)
    if mesh is not None:
        whole = {parameter for name, parameter in model.named_parameters() if name.endswith("a_log")}
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, ignored_params=whole)
        fully_shard(model, mesh=mesh, ignored_params=whole)
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": eps}
    return model, build_optimizer(model, kind=kind, seed=3, **settings)


def _give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        else:
            parameter.grad = gradient


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        _give_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _really_train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, ranks: int) -> None:
    """Three steps with gradients of the model's own, from this rank's rows of a batch of eight."""
    for step in BEFORE:
        ids = torch.randint(0, 23, (8, 6), generator=torch.Generator().manual_seed(step)).chunk(ranks)[rank]
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        for name, parameter in model.named_parameters():
            if name.endswith("a_log") and ranks > 1:
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad /= ranks
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: full_tensor(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def _norms(model: nn.Module) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Norms before and after clipping to 1, and the clipped gradients, of which some are whole and some sharded."""
    _give_gradients(model, 0)
    norms = [clip_gradients(model.parameters(), limit).item() for limit in (1.0, None)]
    gradients = {name: full_tensor(value.grad) for name, value in model.named_parameters() if value.grad is not None}
    return norms, gradients


# --- what the ranks do --------------------------------------------------------------------------------------------


def _as_rank(folder: Path) -> None:
    """Every case under every strategy for this number of ranks; each rank writes what it has seen."""
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    context = start_processes("cpu", ranks, 60.0)
    for strategy in [strategy for count, strategy in PLACES if count == ranks]:
        shape = (ranks,) if strategy == "fsdp" else (2, ranks // 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for case in CASES:
            place = folder / f"{case}-{ranks}-{strategy}"
            _one_case(case, mesh, place, folder / case, rank)
            if case.endswith("float32"):
                model, optimizer = _make(case, mesh, eps=1e-3)
                _really_train(model, optimizer, rank, ranks)
                _write(place, "real", rank, _weights(model))
    context.meet("all done")
    sys.stdout.flush()
    os._exit(0)  # as tests/kit/golden.py


def _one_case(case: str, mesh: DeviceMesh, place: Path, whole: Path, rank: int) -> None:
    place.mkdir(exist_ok=True)
    model, optimizer = _make(case, mesh)
    _train(model, optimizer, BEFORE)
    _write(place, "before", rank, _weights(model))
    write_shared(place, shared_tensors(model, optimizer, masters=True), dist.group.WORLD)
    _train(model, optimizer, AFTER)
    _write(place, "after", rank, _weights(model))
    # The checkpoint of one process goes on here.
    model, optimizer = _make(case, mesh)
    read_shared(whole, shared_tensors(model, optimizer, masters=True), dist.group.WORLD)
    _train(model, optimizer, AFTER)
    _write(place, "elsewhere", rank, _weights(model))
    norms, gradients = _norms(model)
    (place / f"norms-{rank}.json").write_text(json.dumps(norms))
    _write(place, "clipped", rank, gradients)


def _write(place: Path, name: str, rank: int, tensors: dict[str, torch.Tensor]) -> None:
    save_file({key: value.contiguous() for key, value in tensors.items()}, place / f"{name}-{rank}.safetensors")


# --- what they are compared with ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each case trained by one process, then by two and by four; all of it in one folder."""
    path = tmp_path_factory.mktemp("optimizers")
    for case in CASES:
        place = path / case
        place.mkdir()
        model, optimizer = _make(case, None)
        _train(model, optimizer, BEFORE)
        _write(place, "before", 0, _weights(model))
        write_shared(place, shared_tensors(model, optimizer, masters=True), None)
        _train(model, optimizer, AFTER)
        _write(place, "after", 0, _weights(model))
    for ranks in sorted({ranks for ranks, _ in PLACES}):
        done = run_python(
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            "-m", "tests.distributed.test_optimizers", str(path),
            cwd=path, PYTHONPATH=str(Path(__file__).parents[2]), OMP_NUM_THREADS="1",
        )  # fmt: skip
        assert done.code == 0, done.err[-6000:]
    return path


def _read(place: Path, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(place / f"{name}-{rank}.safetensors")


def _require_equal(seen: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert seen.keys() == expected.keys()
    for name, tensor in expected.items():
        assert seen[name].dtype == tensor.dtype, name
        assert torch.equal(seen[name], tensor), name


ALL_PLACES = pytest.mark.parametrize(("ranks", "strategy"), PLACES)


@ALL_PLACES
@pytest.mark.parametrize("case", CASES)
def test_shards_train_what_the_whole_trains(folder: Path, case: str, ranks: int, strategy: str) -> None:
    """Uneven and empty shards, plain parameters among them, rounding at random: the same on every rank.

    Torch's fused kernel ends a shard otherwise than it goes through a whole tensor, and Muon's matrix products differ
    on one thread and on two: both in the last bit of float32.
    """
    expected = _read(folder / case, "before")
    first = _read(folder / f"{case}-{ranks}-{strategy}", "before")
    for name, tensor in expected.items():
        assert first[name].dtype == tensor.dtype
        if case in ("adamw-float32", "muon-float32"):
            assert torch.allclose(first[name], tensor, rtol=0, atol=1e-6), name
        else:
            assert torch.equal(first[name], tensor), name
    for rank in range(1, ranks):
        _require_equal(_read(folder / f"{case}-{ranks}-{strategy}", "before", rank), first)


@ALL_PLACES
@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("float32")])
def test_gradients_of_their_own_give_the_same_weights(folder: Path, case: str, ranks: int, strategy: str) -> None:
    model, optimizer = _make(case, None, eps=1e-3)
    before = _weights(model)
    _really_train(model, optimizer, 0, 1)
    seen = _read(folder / f"{case}-{ranks}-{strategy}", "real")
    for name, tensor in _weights(model).items():
        assert (tensor - before[name]).abs().max() > 3e-3, name
        difference = (seen[name] - tensor).abs()
        if case == "adamw8bit-float32":  # the last bit of a gradient can decide between two codes of a moment
            assert difference.max() < 5e-4, name
            assert difference.quantile(0.99) < 1e-5, name
        else:
            assert difference.max() < 1e-5, name


@ALL_PLACES
@pytest.mark.parametrize("case", CASES)
def test_one_process_goes_on_with_the_state_of_several(folder: Path, case: str, ranks: int, strategy: str) -> None:
    place = folder / f"{case}-{ranks}-{strategy}"
    model, optimizer = _make(case, None)
    tensors = shared_tensors(model, optimizer, masters=True)
    read_shared(place, tensors, None)
    _require_equal(_weights(model), _read(place, "before"))
    whole = _make(case, None)
    _train(*whole, BEFORE)
    for name, tensor in shared_tensors(*whole, masters=True).items():
        assert tensors[name].dtype == tensor.dtype, name
        close = torch.allclose(tensors[name].float(), tensor.float(), rtol=1e-6, atol=1e-6)
        assert torch.equal(tensors[name], tensor) if "muon" not in case and case != "adamw-float32" else close, name
    _train(model, optimizer, AFTER)
    for name, tensor in _read(place, "after").items():
        assert torch.allclose(dict(model.named_parameters())[name], tensor, rtol=0, atol=1e-6), name


@ALL_PLACES
@pytest.mark.parametrize("case", CASES)
def test_several_go_on_with_the_state_of_one_process(folder: Path, case: str, ranks: int, strategy: str) -> None:
    expected = _read(folder / case, "after")
    for name, tensor in _read(folder / f"{case}-{ranks}-{strategy}", "elsewhere").items():
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-6), name


@ALL_PLACES
@pytest.mark.parametrize("case", CASES)
def test_the_norm_counts_whole_gradients_once(folder: Path, case: str, ranks: int, strategy: str) -> None:
    model, _ = _make(case, None)
    norms, gradients = _norms(model)
    place = folder / f"{case}-{ranks}-{strategy}"
    for rank in range(ranks):
        seen = json.loads((place / f"norms-{rank}.json").read_text())
        assert seen == pytest.approx(norms, rel=1e-6)
    for name, tensor in _read(place, "clipped").items():
        assert torch.allclose(tensor, gradients[name], rtol=1e-6 if tensor.dtype == torch.float32 else 2**-7), name


if __name__ == "__main__":
    _as_rank(Path(sys.argv[1]))
