"""`eulerforge quickstart`, from a wheel as a user without a checkout has it, and what it leaves behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.kit.commands import run_python

ROOT = Path(__file__).parents[2]

SAMPLE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = model.generate(**tokenizer("The ", return_tensors="pt"), max_new_tokens=8, do_sample=False)
print(len(ids[0]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel, unpacked: its modules and its presets, and nothing of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    target = folder / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_wheel_holds_every_module_and_preset(installed: Path) -> None:
    for package in ("eulerforge", "launch"):
        wanted = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".in")}
        assert {path for path in wanted if not (installed / path).is_file()} == set()
    presets = {path.relative_to(ROOT) for path in (ROOT / "presets").rglob("*") if path.suffix in (".yml", ".json")}
    assert presets
    assert {path for path in presets if not (installed / "eulerforge" / path).is_file()} == set()


def test_quickstart_trains_and_final_outlives_its_source(installed: Path, tmp_path: Path) -> None:
    steps = ("--set=training.max_steps=40", "--set=training.warmup_steps=10", "--set=training.batch_size=4")
    environment = {"PYTHONPATH": str(installed), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = run_python(
        "-m", "eulerforge", "quickstart", *steps, "--output-dir", "run", cwd=tmp_path, timeout=600, **environment
    )
    assert result.code == 0, result.err
    assert f"model_dir: {installed}/eulerforge/presets/models/tiny_hybrid" in result.out
    assert "Sample from final/" in result.out
    assert re.search(r"\[Quickstart\] Curves: \S*tensorboard --logdir run", result.out)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = float(re.search(r"First loss: ([\d.]+)", result.out)[1])  # type: ignore[index]
    assert first == pytest.approx(8.32, abs=0.1)  # ln(4096) = 8.318
    assert records[-1]["loss"] < 0.85 * first

    source = installed / "eulerforge" / "presets" / "models" / "tiny_hybrid"
    source.rename(tmp_path / "gone")
    sample = run_python(
        "-c", SAMPLE, str(tmp_path / "run" / "final"), cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "fresh")
    )
    assert sample.code == 0, sample.err
    assert int(sample.out) > 1
    (tmp_path / "gone").rename(source)

    again = run_python("-m", "eulerforge", "quickstart", *steps, "--output-dir", "run", cwd=tmp_path, **environment)
    assert again.code == 2
    assert "is not empty" in again.err
