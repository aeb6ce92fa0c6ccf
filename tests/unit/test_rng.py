"""Random numbers go on after a resume exactly where they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eulerforge.train.rng import capture_rng, restore_rng, seed_rng

CPU = torch.device("cpu")


def _draw() -> list[float]:
    """Some numbers of each generator, in ways that use its caches."""
    return [
        random.random(),
        random.gauss(0, 1),
        random.gauss(0, 1),
        random.gauss(0, 1),
        float(random.getrandbits(200)),
        *np.random.standard_normal(3).tolist(),
        float(np.random.randint(2**31)),
        np.random.rand(),
        *torch.randn(17).tolist(),
        *torch.rand(3).tolist(),
        float(torch.randint(2**31, ()).item()),
    ]


USES: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "one random.gauss": lambda: random.gauss(0, 1),
    "two random.gauss": lambda: [random.gauss(0, 1) for _ in range(2)],
    "one normal of NumPy": lambda: np.random.standard_normal(),
    "three normals of NumPy": lambda: np.random.standard_normal(3),
    "two normals of NumPy": lambda: np.random.standard_normal(2),
    "one normal of torch": lambda: torch.randn(()),
    "odd counts of all": _draw,
    "many words": lambda: ([random.random() for _ in range(1000)], np.random.rand(1000), torch.rand(1000)),
}


@pytest.mark.parametrize("stored", [False, True], ids=["in memory", "through a file"])
@pytest.mark.parametrize("use", USES)
def test_streams_continue_exactly(tmp_path: Path, use: str, stored: bool) -> None:
    """Python's and NumPy's normal numbers come in pairs; the second one waits in a cache."""
    seed_rng(5)
    USES[use]()
    states = capture_rng(CPU)
    expected = _draw()
    _draw()
    if stored:
        save_file(states, tmp_path / "rng.safetensors")
        states = load_file(tmp_path / "rng.safetensors")
    restore_rng(states, CPU)
    assert _draw() == expected
    restore_rng(states, CPU)
    assert _draw() == expected  # what was captured does not follow the generators


def test_the_cached_normal_numbers_are_part_of_the_state() -> None:
    """Otherwise the tests above could pass without them."""
    seed_rng(5)
    before = capture_rng(CPU)
    random.gauss(0, 1)
    np.random.standard_normal()
    after = capture_rng(CPU)
    assert torch.isnan(before["python_gauss"]).all()
    assert before["numpy_gauss"].tolist() == [0.0, 0.0]
    assert after["python_gauss"].item() == random.gauss(0, 1)
    assert after["numpy_gauss"].tolist() == [1.0, np.random.standard_normal()]


def test_a_cached_normal_number_is_dropped_when_there_was_none() -> None:
    seed_rng(5)
    states = capture_rng(CPU)
    expected = _draw()
    seed_rng(6)
    random.gauss(0, 1)
    np.random.standard_normal()
    restore_rng(states, CPU)
    assert _draw() == expected


def test_capturing_uses_up_nothing() -> None:
    seed_rng(5)
    expected = _draw()
    seed_rng(5)
    capture_rng(CPU)
    assert _draw() == expected


def test_states_are_tensors_with_names_of_their_own() -> None:
    states = capture_rng(CPU)
    assert list(states) == ["python", "python_gauss", "numpy", "numpy_gauss", "torch"]
    assert all(type(value) is torch.Tensor and value.is_contiguous() for value in states.values())


@pytest.mark.parametrize("seed", [0, 42, 2**32, 2**63 - 1, 2**63 + 10**6])
def test_a_seed_makes_all_three_repeatable(seed: int) -> None:
    seed_rng(seed)
    first = _draw()
    assert _draw() != first
    seed_rng(seed)
    assert _draw() == first


def test_neighbouring_seeds_are_other_seeds_to_all_three() -> None:
    """Each rank gets the seed plus its number. (NumPy, and torch on CPU, take the lower 32 bits of a seed.)"""
    draws = []
    for seed in (2**32 - 1, 2**32):
        seed_rng(seed)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert [first != second for first, second in zip(*draws, strict=True)] == [True, True, True]


def test_the_state_of_a_gpu_is_kept_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:1")
    told: list[tuple[list[int], torch.device]] = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([1, 2], dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: told.append((state.tolist(), device)))
    with_gpu, without = capture_rng(device), capture_rng(CPU)
    assert with_gpu.keys() - without.keys() == {"cuda"}
    restore_rng(with_gpu, CPU)
    restore_rng(without, device)  # a checkpoint of a CPU run
    assert told == []
    restore_rng(with_gpu, device)
    assert told == [([1, 2], device)]
