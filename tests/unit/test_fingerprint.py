"""What a resume refuses, warns of and merely mentions: every difference by its name."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from eulerforge.config.load import load_preset
from eulerforge.config.schema import PretrainPreset
from eulerforge.data.manifest import TokenCache
from eulerforge.data.readers import DocumentCounts
from eulerforge.data.tokens import Shard, TokenStream
from eulerforge.errors import ResumeError
from eulerforge.models.directory import ModelDirectory
from eulerforge.train.fingerprint import (
    fixed_by_data,
    fixed_by_input,
    preset_settings,
    require_unchanged,
    setting_changes,
)
from eulerforge.train.state import Progress

PRESET = """\
device: cpu
model_dir: m
data:
  path: d.jsonl
  max_length: 16
training:
  max_steps: 10
"""

CONFIG = {
    "architectures": ["KitModel"],
    "auto_map": {"AutoModelForCausalLM": "modeling_kit.KitModel"},
    "dtype": "float32",
    "hidden_size": 16,
    "model_type": "kit",
    "rope_scaling": {"factor": 2.0, "type": "linear"},
    "tie_word_embeddings": True,
    "transformers_version": "5.5.0",
    "use_cache": True,
    "vocab_size": 260,
}


@dataclass(frozen=True)
class _Tokenizer:
    vocab_size: int = 257
    fingerprint: str = "0123456789abcdef0123"


@dataclass(frozen=True)
class _Run:
    """What a run is made of."""

    preset: PretrainPreset
    config: dict[str, Any]
    code: dict[str, str]
    tokenizer: _Tokenizer
    rows: int
    cache: TokenCache
    held_out: int
    folder: Path

    def by_input(self) -> dict[str, Any]:
        for name, text in self.code.items():
            (self.folder / name).write_text(text)
        modules = {name: ast.parse(text) for name, text in self.code.items()}
        directory = ModelDirectory(self.folder, self.config, modules, None)
        return fixed_by_input(directory, self.tokenizer, self.preset, self.rows)  # type: ignore[arg-type]

    def by_data(self) -> dict[str, Any]:
        return fixed_by_data([self.cache], [Fraction(1)], [self.held_out])


def _preset(folder: Path, *overrides: str) -> PretrainPreset:
    (folder / "p.yml").write_text(PRESET)
    return load_preset(folder / "p.yml", list(overrides)).preset


def _cache(tokens: int = 2000, documents: int = 3, digest: str = "d1" * 32) -> TokenCache:
    shard = Shard(Path("s"), Path("s/tokens.bin"), 0, "<u2", tokens, documents, 0, 0)
    return TokenCache(Path("c"), TokenStream([shard]), DocumentCounts(), digest, True)


@pytest.fixture
def run(tmp_path: Path) -> _Run:
    return _Run(
        _preset(tmp_path),
        CONFIG,
        {"modeling_kit.py": "a = 1\n", "helper_kit.py": "b = 2\n"},
        _Tokenizer(),
        8,
        _cache(),
        1,
        tmp_path,
    )


def _stored(run: _Run) -> Progress:
    """The run's checkpoint, through JSON."""
    fixed = json.loads(json.dumps(run.by_input() | run.by_data(), allow_nan=False))
    settings = json.loads(json.dumps(preset_settings(run.preset), allow_nan=False))
    return Progress("id", 3, 100, 1.0, 1, "single", "float32", False, 0, None, fixed, settings)


def _problems(stored: Progress, current: dict[str, Any]) -> list[tuple[str, str]]:
    with pytest.raises(ResumeError) as caught:
        require_unchanged(stored, current, "checkpoint-3")
    return [(problem.what, problem.fix) for problem in caught.value.problems]


def test_what_is_fixed_has_readable_names_and_values(run: _Run) -> None:
    fixed = run.by_input()
    code = {name: value for name, value in fixed.items() if name.startswith("model code ")}
    assert list(code) == ["model code helper_kit.py", "model code modeling_kit.py"]
    assert {name: value for name, value in fixed.items() if name not in code} == {
        "model config.hidden_size": 16,
        "model config.model_type": "kit",
        "model config.rope_scaling": {"factor": 2.0, "type": "linear"},
        "model config.tie_word_embeddings": True,
        "model config.vocab_size": 260,
        "tokenizer": "257 ids, content 0123456789abcdef",
        "training.seed": 42,
        "data.max_length": 16,
        "data.packing": True,
        "data.shuffle": True,
        "data.document_mask": False,
        "rows per step": 8,
    }
    assert run.by_data() == {
        "data": "2,000 tokens in 3 documents, content d1d1d1d1d1d1d1d1",
        "held-out documents of the data": "1",
    }


def test_the_same_run_is_unchanged(run: _Run) -> None:
    stored = _stored(run)
    assert require_unchanged(stored, run.by_input(), "checkpoint-3") == []
    assert require_unchanged(stored, run.by_data(), "checkpoint-3") == []
    assert setting_changes(stored, run.preset) == ([], [])


MODEL = "give the model that the run began with, or start a new run with model_dir: <the checkpoint>"
CORPUS = "give the corpus that the run began with, or start a new run with model_dir: <the checkpoint>"


def _config(**changes: Any) -> Callable[[_Run], _Run]:
    """Change keys of config.json; `...` removes one."""

    def change(run: _Run) -> _Run:
        config = {key: value for key, value in (run.config | changes).items() if value is not ...}
        return replace(run, config=config)

    return change


def _override(text: str) -> Callable[[_Run], _Run]:
    return lambda run: replace(run, preset=_preset(run.folder, text))


DIFFERENCES: dict[str, tuple[Callable[[_Run], _Run], str, str]] = {
    "seed": (
        _override("training.seed=43"),
        "training.seed is 43, but 42 in checkpoint-3",
        "set training.seed back to 42, or start a new run",
    ),
    "max_length": (
        _override("data.max_length=32"),
        "data.max_length is 32, but 16 in checkpoint-3",
        "set data.max_length back to 16, or start a new run",
    ),
    "packing": (
        _override("data.packing=false"),
        "data.packing is false, but true in checkpoint-3",
        "set data.packing back to true, or start a new run",
    ),
    "rows": (
        lambda run: replace(run, rows=12),
        "rows per step is 12, but 8 in checkpoint-3",
        "keep batch_size x grad_accum_steps x processes = 8; training.global_batch_size: 8 keeps it on any number of "
        "processes",
    ),
    "tokenizer content": (
        lambda run: replace(run, tokenizer=_Tokenizer(fingerprint="f" * 20)),
        "tokenizer is 257 ids, content ffffffffffffffff, but 257 ids, content 0123456789abcdef in checkpoint-3",
        "give the tokenizer that the run began with",
    ),
    "tokenizer size": (
        lambda run: replace(run, tokenizer=_Tokenizer(vocab_size=258)),
        "tokenizer is 258 ids, content 0123456789abcdef, but 257 ids, content 0123456789abcdef in checkpoint-3",
        "give the tokenizer that the run began with",
    ),
    "config value": (
        _config(hidden_size=32),
        "model config.hidden_size is 32, but 16 in checkpoint-3",
        MODEL,
    ),
    "config value inside": (
        _config(rope_scaling={"factor": 2.5, "type": "linear"}),
        'model config.rope_scaling is {"factor": 2.5, "type": "linear"}, but {"factor": 2.0, "type": "linear"} in '
        "checkpoint-3",
        MODEL,
    ),
    "config key more": (
        _config(attention_bias=True),
        "model config.attention_bias is true, but not set in checkpoint-3",
        MODEL,
    ),
    "config key less": (
        _config(tie_word_embeddings=...),
        "model config.tie_word_embeddings is not set, but true in checkpoint-3",
        MODEL,
    ),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_every_difference_is_named_with_its_remedy(run: _Run, difference: str) -> None:
    change, what, fix = DIFFERENCES[difference]
    assert _problems(_stored(run), change(run).by_input()) == [(f"--resume: {what}", fix)]


@pytest.mark.parametrize(
    ("cache", "now"),
    [
        (_cache(digest="d2" * 32), "2,000 tokens in 3 documents, content d2d2d2d2d2d2d2d2"),
        (_cache(tokens=2001), "2,001 tokens in 3 documents, content d1d1d1d1d1d1d1d1"),
        (_cache(documents=4), "2,000 tokens in 4 documents, content d1d1d1d1d1d1d1d1"),
    ],
)
def test_another_corpus_is_named(run: _Run, cache: TokenCache, now: str) -> None:
    before = "2,000 tokens in 3 documents, content d1d1d1d1d1d1d1d1"
    assert _problems(_stored(run), replace(run, cache=cache).by_data()) == [
        (f"--resume: data is {now}, but {before} in checkpoint-3", CORPUS)
    ]


def test_the_shares_of_a_mixture_are_fixed(run: _Run) -> None:
    """Their proportion, not the numbers that the preset has for it."""
    caches = [_cache(), _cache(digest="d2" * 32)]

    def data(*weights: int) -> dict[str, Any]:
        return fixed_by_data(caches, [Fraction(weight) for weight in weights], [1, 0])

    assert data(7, 3) == {
        "data": "7/10 of 2,000 tokens in 3 documents, content d1d1d1d1d1d1d1d1; "
        "3/10 of 2,000 tokens in 3 documents, content d2d2d2d2d2d2d2d2",
        "held-out documents of the data": "1, 0",
    }
    assert data(70, 30) == data(7, 3)
    assert data(3, 7) != data(7, 3)


@pytest.mark.parametrize("held_out", [0, 2])
def test_another_share_of_held_out_text_is_named(run: _Run, held_out: int) -> None:
    """It would train on what it has been measured with, or the other way round."""
    assert _problems(_stored(run), replace(run, held_out=held_out).by_data()) == [
        (
            f"--resume: held-out documents of the data is {held_out}, but 1 in checkpoint-3",
            "set data.validation so that 1 documents are held out again, or start a new run",
        )
    ]


def test_several_differences_are_told_at_once(run: _Run) -> None:
    changed = _config(hidden_size=32, tie_word_embeddings=..., attention_bias=True)(run)
    changed = replace(changed, rows=4, tokenizer=_Tokenizer(vocab_size=300), preset=_preset(run.folder, SEED))
    assert [what for what, _ in _problems(_stored(run), changed.by_input())] == [
        "--resume: model config.attention_bias is true, but not set in checkpoint-3",
        "--resume: model config.hidden_size is 32, but 16 in checkpoint-3",
        "--resume: model config.tie_word_embeddings is not set, but true in checkpoint-3",
        "--resume: rows per step is 4, but 8 in checkpoint-3",
        "--resume: tokenizer is 300 ids, content 0123456789abcdef, but 257 ids, content 0123456789abcdef in "
        "checkpoint-3",
        "--resume: training.seed is 1, but 42 in checkpoint-3",
    ]


SEED = "training.seed=1"


@pytest.mark.parametrize(
    "changes",
    [
        {"_name_or_path": "elsewhere"},
        {"architectures": ["Other"]},
        {"auto_map": {"AutoModelForCausalLM": "modeling_eulerforge.KitModel"}},
        {"dtype": "bfloat16"},
        {"torch_dtype": "bfloat16"},
        {"transformers_version": "5.9.0"},
        {"use_cache": False},
        {"use_cache": ..., "dtype": ..., "auto_map": ...},
        {"new_option": None},
    ],
    ids=str,
)
def test_keys_that_change_no_number_are_left_out(run: _Run, changes: dict[str, Any]) -> None:
    assert require_unchanged(_stored(run), _config(**changes)(run).by_input(), "checkpoint-3") == []


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ({"modeling_kit.py": "a = 2\n", "helper_kit.py": "b = 2\n"}, ["modeling_kit.py"]),
        ({"modeling_kit.py": "a = 1\n"}, ["helper_kit.py"]),
        ({"modeling_kit.py": "a = 1\n", "helper_kit.py": "b = 2\n", "new.py": ""}, ["new.py"]),
        ({"modeling_kit.py": "a = 1 \n", "helper_kit.py": ""}, ["helper_kit.py", "modeling_kit.py"]),
        ({}, ["helper_kit.py", "modeling_kit.py"]),
    ],
    ids=["changed", "gone", "new", "two", "all gone"],
)
def test_other_code_of_the_model_is_a_warning(run: _Run, code: dict[str, str], names: list[str]) -> None:
    """A comment may have been changed as well as a formula; only its author knows."""
    warnings = require_unchanged(_stored(run), replace(run, code=code).by_input(), "checkpoint-3")
    assert warnings == [f"{name} of the model's code is not as it was at checkpoint-3" for name in names]


def test_numbers_that_json_has_not_are_kept_and_compared(run: _Run) -> None:
    """Mamba's config.json holds `"time_step_limit": [0.0, Infinity]`."""
    endless = _config(time_step_limit=[0.0, float("inf")], floor=float("nan"))(run)
    stored = _stored(endless)
    assert require_unchanged(stored, endless.by_input(), "checkpoint-3") == []
    other = _config(time_step_limit=[0.0, 1.0], floor=float("nan"))(run)
    ((what, _),) = _problems(stored, other.by_input())
    assert what.startswith("--resume: model config.time_step_limit is ")


# --- Settings ---------------------------------------------------------------------------------------------------


def test_settings_are_all_values_of_the_preset_but_paths(run: _Run) -> None:
    settings = preset_settings(run.preset)
    paths = {"model_dir", "tokenizer", "output_dir", "data.path", "data.cache_dir"}
    known = {"device", "trust_remote_code", "data.max_length", "training.betas", "distributed.strategy"}
    assert known <= settings.keys()
    assert not paths & settings.keys()
    sections = {"data": "data", "training": "training", "distributed": "distributed"}
    total = sum(len(type(getattr(run.preset, name)).model_fields) for name in sections)
    total += len(type(run.preset).model_fields) - len(sections)
    assert len(settings) == total - len(paths)


@pytest.mark.parametrize("place", ["model_dir", "tokenizer", "output_dir", "data.path", "data.cache_dir"])
def test_another_place_is_no_change(run: _Run, place: str) -> None:
    assert setting_changes(_stored(run), _preset(run.folder, f"{place}=elsewhere")) == ([], [])


SHAPING = [
    ("training.lr=1e-4", "training.lr 0.0003 -> 0.0001"),
    ("training.scheduler=wsd", "training.scheduler cosine -> wsd"),
    ("training.warmup_steps=2", "training.warmup_steps 0 -> 2"),
    ("training.min_lr_ratio=0.1", "training.min_lr_ratio 0.0 -> 0.1"),
    ("training.max_steps=20", "training.max_steps 10 -> 20"),
    ("training.weight_decay=0", "training.weight_decay 0.1 -> 0.0"),
    ("training.betas=[0.9, 0.99]", "training.betas [0.9, 0.95] -> [0.9, 0.99]"),
    ("training.eps=1e-6", "training.eps 1e-08 -> 1e-06"),
    ("training.max_grad_norm=null", "training.max_grad_norm 1.0 -> null"),
    ("training.dtype=float32", "training.dtype null -> float32"),
    ("training.amp=true", "training.amp null -> true"),
]
PLAIN = [
    ("training.log_steps=1", "training.log_steps 10 -> 1"),
    ("training.save_steps=7", "training.save_steps 500 -> 7"),
    ("training.keep_checkpoints=2", "training.keep_checkpoints all -> 2"),
    ("training.async_checkpoint=true", "training.async_checkpoint false -> true"),
    ("training.max_minutes=5", "training.max_minutes null -> 5.0"),
    ("training.batch_size=1", "training.batch_size 2 -> 1"),
    ("device=cuda", "device cpu -> cuda"),
    ("distributed.strategy=ddp", "distributed.strategy auto -> ddp"),
    ("data.on_bad_line=skip", "data.on_bad_line error -> skip"),
]


@pytest.mark.parametrize(("override", "text"), SHAPING)
def test_what_changes_the_course_of_training_is_told_apart(run: _Run, override: str, text: str) -> None:
    assert setting_changes(_stored(run), _preset(run.folder, override)) == ([], [text])


@pytest.mark.parametrize(("override", "text"), PLAIN)
def test_what_does_not_change_it_is_only_mentioned(run: _Run, override: str, text: str) -> None:
    assert setting_changes(_stored(run), _preset(run.folder, override)) == ([text], [])


def test_all_changes_are_listed_by_name(run: _Run) -> None:
    everything = _preset(run.folder, *(override for override, _ in (*SHAPING, *PLAIN)))
    plain, shaping = setting_changes(_stored(run), everything)
    assert plain == sorted(text for _, text in PLAIN)
    assert shaping == sorted(text for _, text in SHAPING)


def test_a_setting_that_one_version_does_not_know_is_a_change(run: _Run) -> None:
    """A checkpoint of an older or a newer version has keys less or more."""
    stored = _stored(run)
    settings = {key: value for key, value in stored.settings.items() if key != "training.seed"}
    older = replace(stored, settings=settings | {"training.old": 1})
    assert setting_changes(older, run.preset) == (["training.old 1 -> not set", "training.seed not set -> 42"], [])
