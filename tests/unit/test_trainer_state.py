"""What a checkpoint holds besides the model: names, files, and exactly the same numbers when it is read."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from eulerforge.distributed.gradients import fill_missing_gradients
from eulerforge.errors import ResumeError
from eulerforge.optim.optimizer import build_optimizer
from eulerforge.train import trainer_state
from eulerforge.train.state import Progress, TrainState
from eulerforge.train.trainer_state import (
    MASTERS,
    BufferWatch,
    Tensors,
    master_tensors,
    rank_file,
    read_own,
    read_shared,
    shared_tensors,
    write_own,
    write_shared,
)

PARAMETERS = {"embed.weight": (7, 4), "layers.0.weight": (4, 4), "layers.0.bias": (4,), "unused.weight": (2, 3)}
STATES = ("step", "exp_avg", "exp_avg_sq")


class _Model(nn.Module):
    """A tied head, a frozen parameter and one that no forward pass uses."""

    def __init__(self, vocabulary: int = 7) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.head = nn.Linear(4, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(3, 2, bias=False)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.layers[0](self.embed(ids))))


def _model(seed: int = 0, vocabulary: int = 7) -> tuple[_Model, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = _Model(vocabulary)
    return model, build_optimizer(model, kind="adamw", lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, seed=0)


def _train(model: _Model, optimizer: torch.optim.AdamW, steps: int = 3) -> None:
    for step in range(steps):
        model(torch.tensor([[step, 1, 2]])).square().sum().backward()
        fill_missing_gradients(model.parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _copies(tensors: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _require_equal(first: Tensors, second: Tensors) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def _folder(tmp_path: Path, name: str = "checkpoint-3") -> Path:
    folder = tmp_path / name
    (folder / "trainer_state").mkdir(parents=True)
    return folder


EXPECTED_STATE = {
    f"optimizer.{name}.{key}": () if key == "step" else shape for name, shape in PARAMETERS.items() for key in STATES
}
EXPECTED_MASTERS = {f"model.{name}": shape for name, shape in (PARAMETERS | {"frozen": (3,)}).items()}


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
def test_every_trained_parameter_has_its_state_under_its_name(steps: int, masters: bool) -> None:
    """Tied weights once, frozen ones not at all, and before the first step as after it."""
    model, optimizer = _model()
    _train(model, optimizer, steps)
    shapes = _shapes(shared_tensors(model, optimizer, masters))
    assert shapes == EXPECTED_STATE | (EXPECTED_MASTERS if masters else {})
    assert _shapes(master_tensors(model)) == EXPECTED_MASTERS


def test_making_the_state_of_a_new_optimiser_changes_no_weight() -> None:
    model, optimizer = _model()
    before = _copies(dict(model.named_parameters()))
    shared_tensors(model, optimizer, masters=True)
    _require_equal(before, {name: parameter.detach() for name, parameter in model.named_parameters()})
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-2]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tensors_are_the_optimisers_own_so_that_reading_fills_them() -> None:
    model, optimizer = _model()
    _train(model, optimizer)
    shared = shared_tensors(model, optimizer, masters=True)
    state = optimizer.state[model.embed.weight]
    assert shared["optimizer.embed.weight.exp_avg"].data_ptr() == state["exp_avg"].data_ptr()
    assert shared["optimizer.embed.weight.step"].data_ptr() == state["step"].data_ptr()
    assert shared["model.embed.weight"].data_ptr() == model.embed.weight.data_ptr()


@pytest.mark.parametrize("file_bytes", [2**30, 100, 40, 4])
@pytest.mark.parametrize("masters", [False, True])
def test_what_was_written_is_read_into_a_new_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masters: bool, file_bytes: int
) -> None:
    monkeypatch.setattr(trainer_state, "_FILE_BYTES", file_bytes)
    model, optimizer = _model()
    _train(model, optimizer)
    written = shared_tensors(model, optimizer, masters)
    folder = _folder(tmp_path)
    write_shared(folder, written, None)
    assert all(written[f"optimizer.{name}.step"].item() == 3.0 for name in PARAMETERS)
    files = sorted((folder / "trainer_state" / "shards").iterdir())
    count = len(set(trainer_state._files_by_size(written).values()))
    assert (count > 1) == (file_bytes < 2**30)
    assert [path.name for path in files] == [
        f"shard-00001-model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]

    other, other_optimizer = _model(seed=1)
    weights = _copies({name: parameter.detach() for name, parameter in other.named_parameters()})
    target = shared_tensors(other, other_optimizer, masters)
    read_shared(folder, target, None)
    _require_equal(target, written)
    # Without masters the weights come from the saved model, and reading must leave them alone.
    kept = {name: parameter.detach() for name, parameter in other.named_parameters()}
    _require_equal(kept, {name: p.detach() for name, p in model.named_parameters()} if masters else weights)
    other.load_state_dict(model.state_dict())
    for both in ((model, optimizer), (other, other_optimizer)):
        _train(*both)
    _require_equal(shared_tensors(model, optimizer, True), shared_tensors(other, other_optimizer, True))


@pytest.mark.parametrize("file_bytes", [10, 64, 80, 200])
def test_files_are_cut_at_their_size(monkeypatch: pytest.MonkeyPatch, file_bytes: int) -> None:
    monkeypatch.setattr(trainer_state, "_FILE_BYTES", file_bytes)
    tensors = {f"t{index}": torch.zeros(size) for index, size in enumerate((1, 4, 16, 20, 1, 1, 2, 16))}
    numbers = trainer_state._files_by_size(tensors)
    assert list(numbers) == list(tensors)
    assert sorted(set(numbers.values())) == list(range(1, max(numbers.values()) + 1))
    for number in set(numbers.values()):
        inside = [tensors[name].nbytes for name in numbers if numbers[name] == number]
        assert len(inside) == 1 or sum(inside) <= file_bytes
    order = list(numbers.values())
    assert order == sorted(order)
    for first, second in zip(range(1, max(order)), range(2, max(order) + 1), strict=True):
        together = [tensors[name].nbytes for name in numbers if numbers[name] == first]
        next_one = next(tensors[name].nbytes for name in numbers if numbers[name] == second)
        assert sum(together) + next_one > file_bytes  # no file is begun before it must be


def test_masters_can_be_read_by_themselves(tmp_path: Path) -> None:
    model, optimizer = _model()
    _train(model, optimizer)
    folder = _folder(tmp_path)
    write_shared(folder, shared_tensors(model, optimizer, masters=True), None)
    other, _ = _model(seed=1)
    read_shared(folder, master_tensors(other), None, kind=MASTERS)
    _require_equal(master_tensors(other), master_tensors(model))


def _drop(tensors: Tensors, name: str) -> Tensors:
    return {key: value for key, value in tensors.items() if key != name}


MISFITS: list[tuple[str, Callable[[Tensors], Tensors], str]] = [
    (
        "another shape",
        lambda tensors: tensors | {"optimizer.layers.0.bias.exp_avg": torch.zeros(5)},
        "1 entries differ: optimizer.layers.0.bias.exp_avg (4,) -> (5,)",
    ),
    (
        "another rank",
        lambda tensors: tensors | {"optimizer.embed.weight.step": torch.zeros(1)},
        "1 entries differ: optimizer.embed.weight.step () -> (1,)",
    ),
    (
        "a parameter more",
        lambda tensors: tensors | {"optimizer.new.exp_avg": torch.zeros(2)},
        "1 entries differ: optimizer.new.exp_avg missing -> (2,)",
    ),
    (
        "a parameter less",
        lambda tensors: _drop(tensors, "optimizer.unused.weight.exp_avg_sq"),
        "1 entries differ: optimizer.unused.weight.exp_avg_sq (2, 3) -> gone",
    ),
    (
        "masters where none are",
        lambda tensors: tensors | {"model.frozen": torch.zeros(3)},
        "1 entries differ: model.frozen missing -> (3,)",
    ),
    (
        "all names",
        lambda tensors: {f"x{name}": tensor for name, tensor in tensors.items()},
        "24 entries differ: optimizer.embed.weight.exp_avg (7, 4) -> gone, optimizer.embed.weight.exp_avg_sq (7, 4) "
        "-> gone, optimizer.embed.weight.step () -> gone",
    ),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in MISFITS], ids=[row[0] for row in MISFITS])
def test_what_does_not_fit_is_named_and_nothing_is_read(
    tmp_path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    model, optimizer = _model()
    _train(model, optimizer)
    folder = _folder(tmp_path)
    write_shared(folder, shared_tensors(model, optimizer, masters=False), None)
    other, other_optimizer = _model(seed=1)
    target = change(shared_tensors(other, other_optimizer, masters=False))
    before = _copies(target)
    with pytest.raises(ResumeError) as caught:
        read_shared(folder, target, None)
    assert str(caught.value) == f"{folder}: the optimiser state does not fit the model: {message}"
    _require_equal(target, before)


def test_masters_that_nobody_asks_for_are_named(tmp_path: Path) -> None:
    """A float32 run resumed from a bfloat16 one must not lose the more precise weights silently."""
    model, optimizer = _model()
    folder = _folder(tmp_path)
    write_shared(folder, shared_tensors(model, optimizer, masters=True), None)
    with pytest.raises(ResumeError, match=r"5 entries differ: model\.embed\.weight \(7, 4\) -> gone"):
        read_shared(folder, shared_tensors(model, optimizer, masters=False), None)


# --- A process's own file ---------------------------------------------------------------------------------------


def test_own_states_and_buffers_keep_their_names(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    rng = {"torch": torch.arange(5, dtype=torch.uint8), "python_gauss": torch.tensor([1.5], dtype=torch.float64)}
    buffers = {
        "model.layers.0.mean": torch.randn(3),
        "rng.torch": torch.ones(2, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "steps": torch.tensor(7),
    }
    path = write_own(folder, 12, rng, buffers)
    assert path == rank_file(folder, 12) == folder / "trainer_state" / "rank-00012.safetensors"
    assert load_file(path).keys() == {
        *("rng.torch", "rng.python_gauss"),
        *("buffer.model.layers.0.mean", "buffer.rng.torch", "buffer.empty", "buffer.steps"),
    }
    read_rng, read_buffers = read_own(folder, 12)
    _require_equal(dict(sorted(read_rng.items())), dict(sorted(rng.items())))
    _require_equal(dict(sorted(read_buffers.items())), dict(sorted(buffers.items())))


def test_no_buffers_is_a_file_too(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    write_own(folder, 0, {"torch": torch.zeros(1)}, {})
    assert read_own(folder, 0)[1] == {}


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint from elsewhere must not be able to run code when it is read."""
    model, optimizer = _model()
    _train(model, optimizer)
    folder = _folder(tmp_path)

    def refuse(*values: object, **options: object) -> None:
        raise AssertionError("pickle")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    write_shared(folder, shared_tensors(model, optimizer, masters=True), None)
    write_own(folder, 0, {"torch": torch.get_rng_state()}, {"mean": torch.ones(1)})
    PROGRESS.write(folder)
    read_shared(folder, shared_tensors(model, optimizer, masters=True), None)
    read_own(folder, 0)
    Progress.read(folder)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "trainer_state/state.json",
        "trainer_state/rank-00000.safetensors",
        "trainer_state/shards/shard-00001-model-00001-of-00001.safetensors",
    }


# --- Buffers ----------------------------------------------------------------------------------------------------


class _Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)
        self.register_buffer("brief", torch.ones(4, dtype=torch.bfloat16))
        self.register_buffer("mask", torch.ones(2, 2, dtype=torch.bool), persistent=False)
        self.register_buffer("turns", torch.ones(2, dtype=torch.complex64), persistent=False)
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("none", None)
        self.inner = nn.BatchNorm1d(2)


def _set(name: str, value: Any) -> Callable[[_Buffers], object]:
    return lambda module: module.get_buffer(name).copy_(torch.as_tensor(value))


def _replace(module: _Buffers) -> None:
    module.mean = torch.full((3,), 2.0)


def _transpose(module: _Buffers) -> None:
    module.mean = torch.arange(6.0).reshape(2, 3).t()


def _negative_zero(module: _Buffers) -> None:
    module.mean.neg_()


CHANGES: dict[str, tuple[Callable[[_Buffers], object], list[str]]] = {
    "nothing": (lambda module: None, []),
    "rewritten as it was": (_set("mean", torch.zeros(3)), []),
    "persistent": (_set("mean", [0.0, 0.0, 1e-30]), ["mean"]),
    "not persistent": (lambda module: module.calls.add_(1), ["calls"]),
    "bfloat16": (_set("brief", [1.0, 1.0, 1.0, 1.0078125]), ["brief"]),
    "bool": (_set("mask", [[True, True], [False, True]]), ["mask"]),
    "complex": (_set("turns", torch.tensor([1, 1j])), ["turns"]),
    "minus zero": (_negative_zero, ["mean"]),
    "another tensor": (_replace, ["mean"]),
    "another layout": (_transpose, ["mean"]),
    "in a module": (
        lambda module: module.inner(torch.randn(5, 2)),
        ["inner.num_batches_tracked", "inner.running_mean", "inner.running_var"],
    ),
    "two": (lambda module: (module.calls.add_(1), module.mean.add_(1)), ["calls", "mean"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_buffers_that_training_changes_are_kept_and_no_others(tmp_path: Path, change: str) -> None:
    module = _Buffers()
    watch = BufferWatch(module)
    spoil, names = CHANGES[change]
    with torch.no_grad():
        spoil(module)
    changed = watch.changed()
    assert sorted(changed) == names
    for name, value in changed.items():
        assert torch.equal(value, module.get_buffer(name))
        assert value.data_ptr() != module.get_buffer(name).data_ptr()
    write_own(_folder(tmp_path), 0, {}, changed)  # safetensors can hold them
    assert sorted(read_own(tmp_path / "checkpoint-3", 0)[1]) == names


def test_what_was_kept_does_not_follow_the_buffer() -> None:
    module = _Buffers()
    watch = BufferWatch(module)
    module.calls.fill_(3)
    kept = watch.changed()
    module.calls.fill_(4)
    assert kept["calls"].item() == 3


def test_a_buffer_that_is_as_it_was_built_again_is_not_kept() -> None:
    module = _Buffers()
    watch = BufferWatch(module)
    module.calls.fill_(3)
    assert list(watch.changed()) == ["calls"]
    module.calls.fill_(0)
    assert watch.changed() == {}


def test_restored_buffers_stay_kept() -> None:
    """The one that is restored may be as the model builds it, but its run had changed it: never forget it again."""
    module = _Buffers()
    watch = BufferWatch(module)
    mean, calls = module.mean, module.calls
    watch.restore({"mean": torch.tensor([1.0, 2.0, 3.0]), "calls": torch.tensor(0)})
    assert module.mean is mean  # in place: parallel strategies hold on to the tensor
    assert module.calls is calls
    assert mean.tolist() == [1.0, 2.0, 3.0]
    assert sorted(watch.changed()) == ["calls", "mean"]
    watch.restore({"brief": torch.full((4,), 0.5, dtype=torch.bfloat16)})
    assert sorted(watch.changed()) == ["brief", "calls", "mean"]


class _Lazy(nn.Module):
    """Makes a table for the longest row that it has met, as rotary embeddings often do."""

    def __init__(self, length: int | None) -> None:
        super().__init__()
        if length is not None:
            self.register_buffer("table", torch.zeros(length), persistent=False)

    def forward(self, length: int) -> None:
        self.register_buffer("table", torch.arange(float(length)), persistent=False)


@pytest.mark.parametrize("length", [None, 2], ids=["made by the first forward pass", "made larger by it"])
def test_buffers_that_training_has_made_come_back(length: int | None) -> None:
    first = _Lazy(length)
    watch = BufferWatch(first)
    first(5)
    changed = watch.changed()
    assert list(changed) == ["table"]
    second = _Lazy(length)
    BufferWatch(second).restore(changed)
    assert second.get_buffer("table").tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert "table" not in second.state_dict()


# --- state.json -------------------------------------------------------------------------------------------------

PROGRESS = Progress(
    run="0123456789abcdef",
    step=3,
    tokens=4096,
    elapsed=12.5,
    world_size=4,
    strategy="fsdp",
    stored="float32",
    masters=True,
    skipped=2,
    loss_scale=(1024.0, 7),
    fixed={"training.seed": 42, "data": "1 tokens", "model config.rope": {"theta": 10000.0, "kind": None}},
    settings={"training.lr": 3e-4, "training.betas": [0.9, 0.95], "data.text_column": "é"},
)


def test_progress_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    PROGRESS.write(folder)
    assert Progress.read(folder) == PROGRESS
    content = json.loads((folder / "trainer_state" / "state.json").read_bytes())
    assert content["format"] == 2
    assert (content["run"], content["step"], content["fixed"]["training.seed"]) == ("0123456789abcdef", 3, 42)


@pytest.mark.parametrize("elapsed", [0.1 + 0.2, 1e-9, 123456789.987654321])
def test_numbers_survive_to_the_last_bit(tmp_path: Path, elapsed: float) -> None:
    folder = _folder(tmp_path)
    replace(PROGRESS, elapsed=elapsed).write(folder)
    assert Progress.read(folder).elapsed == elapsed


def _edit(**changes: Any) -> Callable[[Path], object]:
    """Change keys of state.json; `...` removes one."""

    def edit(path: Path) -> None:
        values = json.loads(path.read_bytes()) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value != "..."}))

    return edit


DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "zeroed": lambda path: path.write_bytes(bytes(100)),
    "not UTF-8": lambda path: path.write_bytes(b'{"run": "\xff"}'),
    "a list": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
    "no format": _edit(format="..."),
    "another format": _edit(format=1),
    "a key less": _edit(tokens="..."),
    "a key more": _edit(more=1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_that_cannot_be_read_is_one_error(tmp_path: Path, damage: str) -> None:
    folder = _folder(tmp_path)
    PROGRESS.write(folder)
    path = folder / "trainer_state" / "state.json"
    DAMAGES[damage](path)
    with pytest.raises(ResumeError) as caught:
        Progress.read(folder)
    assert str(caught.value).startswith(f"{path} cannot be read (")
    assert caught.value.problems[0].fix == "resume with the version of eulerforge that wrote it"


def test_a_state_advances_by_whole_steps() -> None:
    state = TrainState(4, 100, 7.0)
    state.advance(25, 9.5)
    assert state == TrainState(5, 125, 9.5, stopped=False)
