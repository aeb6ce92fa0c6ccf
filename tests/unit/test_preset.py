"""Preset text and `--set` -> typed values, errors with places and hints, model hints, and the shipped presets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from eulerforge.config.hints import apply_hints
from eulerforge.config.load import LoadedPreset, load_preset
from eulerforge.config.schema import MixtureSource, json_schema
from eulerforge.config.yaml_source import parse_yaml
from eulerforge.errors import PresetError

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = sorted((REPOSITORY / "presets" / "pretrain").glob("*.yml"))
BASE = "model_dir: m\ndata:\n  path: p\ntraining:\n  max_steps: 1000000\n"
"""Five lines; `training` is last, so that a test can go on below it."""


def _load(tmp_path: Path, text: str, *overrides: str) -> LoadedPreset:
    path = tmp_path / "p.yml"
    path.write_bytes(text.encode())
    return load_preset(path, overrides)


def _problems(tmp_path: Path, text: str, *overrides: str) -> list[tuple[str, str]]:
    """(what, fix) of every problem, with the folder cut off the file's name."""
    with pytest.raises(PresetError) as caught:
        _load(tmp_path, text, *overrides)
    return [(problem.what.replace(f"{tmp_path}/", ""), problem.fix) for problem in caught.value.problems]


def _with(key: str, text: str) -> str:
    """A minimal preset whose `key` is written as `text`."""
    tree = {"model_dir": "m", "data.path": "p", "training.max_steps": "1000000", key: text}
    lines = [f"{name}: {value}" for name, value in tree.items() if "." not in name]
    for section in ("data", "training", "distributed"):
        leaves = [(name.partition(".")[2], value) for name, value in tree.items() if name.startswith(f"{section}.")]
        if leaves:
            lines += [f"{section}:", *(f"  {leaf}: {value}" for leaf, value in leaves)]
    return "\n".join(lines) + "\n"


def _value(loaded: LoadedPreset, key: str) -> Any:
    node: Any = loaded.preset
    for part in key.split("."):
        node = getattr(node, part)
    return node


LR, ROWS, PACK, NAME = "training.lr", "training.batch_size", "data.packing", "tokenizer"
CLIP, BETAS, AMP = "training.max_grad_norm", "training.betas", "training.amp"

ACCEPTED: list[tuple[str, str, Any]] = [
    (LR, "3e-4", 0.0003),
    (LR, "3E-4", 0.0003),
    (LR, "1e5", 100000.0),
    (LR, "1e+3", 1000.0),
    (LR, ".5", 0.5),
    (LR, "5.", 5.0),
    (LR, "+.5e-1", 0.05),
    (LR, "1_000", 1000.0),
    (LR, "1_000.5", 1000.5),
    (LR, "1", 1.0),
    (LR, "0", 0.0),
    (LR, '"3e-4"', 0.0003),
    (LR, "'0.1'", 0.1),
    (LR, '" 2 "', 2.0),
    (ROWS, "1_000", 1000),
    (ROWS, "1.0", 1),
    (ROWS, "1e3", 1000),
    (ROWS, "1e+3", 1000),
    (ROWS, "2.5e1", 25),
    (ROWS, '"16"', 16),
    (ROWS, "+16", 16),
    ("training.seed", "9223372036854775807", 2**63 - 1),
    ("training.seed", "0", 0),
    (PACK, "yes", True),
    (PACK, "no", False),
    (PACK, "on", True),
    (PACK, "off", False),
    (PACK, "true", True),
    (PACK, "FALSE", False),
    (PACK, "No", False),
    (NAME, '"007"', "007"),
    (NAME, "007", "007"),
    (NAME, "2024-01-01", "2024-01-01"),
    (NAME, "1:30", "1:30"),
    (NAME, "0x10", "0x10"),
    (NAME, "é/ü", "é/ü"),
    (NAME, "a=b/c=d", "a=b/c=d"),
    (NAME, '"true"', "true"),
    (NAME, "null", None),
    (NAME, "~", None),
    (NAME, "", None),
    ("data.path", "runs/lr=3e-4/é.jsonl", "runs/lr=3e-4/é.jsonl"),
    ("data.path", '"*.jsonl"', "*.jsonl"),
    ("data.path", "2024-01-01", "2024-01-01"),
    ("data.path", "[a.jsonl, 2024-01-01]", ["a.jsonl", "2024-01-01"]),
    (
        "data.path",
        "[{path: a, weight: 7e-1}, {weight: '3', path: b}]",
        [MixtureSource(path="a", weight=0.7), MixtureSource(path="b", weight=3.0)],
    ),
    ("data.num_workers", "1e1", 10),
    (CLIP, "null", None),
    (CLIP, "", None),
    (CLIP, "5e-1", 0.5),
    (BETAS, "[0.9, 0.95]", (0.9, 0.95)),
    (BETAS, "[9e-1, .99]", (0.9, 0.99)),
    (BETAS, '["0.8", 0]', (0.8, 0.0)),
    (AMP, "null", None),
    (AMP, "on", True),
    ("training.global_batch_size", "8", 8),
    ("training.global_batch_size", "null", None),
    ("training.keep_checkpoints", "all", "all"),
    ("training.keep_checkpoints", "3", 3),
    ("training.keep_checkpoints", '"1e1"', 10),
    ("training.async_checkpoint", "yes", True),
    ("training.max_minutes", "90", 90.0),
    ("training.max_minutes", "1e-3", 0.001),
    ("training.max_minutes", "null", None),
    ("device", "cuda:12", "cuda:12"),
]


@pytest.mark.parametrize(("key", "text", "expected"), ACCEPTED)
def test_a_value_means_the_same_in_yaml_and_in_set(tmp_path: Path, key: str, text: str, expected: Any) -> None:
    for loaded in (_load(tmp_path, _with(key, text)), _load(tmp_path, BASE, f"{key}={text}")):
        value = _value(loaded, key)
        assert value == expected
        assert type(value) is type(expected)
        assert key in loaded.given


REFUSED: list[tuple[str, str, str]] = [
    (LR, "nan", "must be a finite number, not the text 'nan'"),
    (LR, ".nan", "must be a finite number, not nan"),
    (LR, "inf", "must be a finite number, not the text 'inf'"),
    (LR, ".inf", "must be a finite number, not inf"),
    (LR, "-.inf", "must be a finite number, not -inf"),
    (LR, "1e999", "must be a finite number, not inf"),
    (LR, '"1e999"', "must be a finite number, not inf"),
    (LR, "1:30", "must be a finite number, not the text '1:30'"),
    (LR, "0x10", "must be a finite number, not the text '0x10'"),
    (LR, "abc", "must be a finite number, not the text 'abc'"),
    (LR, "true", "must be a number, not true"),
    (LR, "null", "must be a number, not nothing (null)"),
    (LR, "", "must be a number, not nothing (null)"),
    (LR, "[1]", "must be a number, not a list"),
    (LR, "{a: 1}", "must be a number, not a mapping"),
    (LR, "-1e-4", "must be greater than or equal to 0, not -0.0001"),
    (ROWS, "010", "must be a whole number, not the text '010'"),
    (ROWS, '"010"', "must be a whole number, not the text '010'"),
    (ROWS, "1:30", "must be a whole number, not the text '1:30'"),
    (ROWS, "0x10", "must be a whole number, not the text '0x10'"),
    (ROWS, "1.5", "must be a whole number, not 1.5"),
    (ROWS, "1e-3", "must be a whole number, not 0.001"),
    (ROWS, "1e30", "must be a whole number, not 1e+30"),
    (ROWS, "true", "must be a whole number, not true"),
    (ROWS, "yes", "must be a whole number, not true"),
    (ROWS, "null", "must be a whole number, not nothing (null)"),
    (ROWS, "", "must be a whole number, not nothing (null)"),
    (ROWS, ".inf", "must be a whole number, not inf"),
    (ROWS, "0", "must be greater than or equal to 1, not 0"),
    (ROWS, "-1", "must be greater than or equal to 1, not -1"),
    ("data.max_length", "1", "must be greater than or equal to 2, not 1"),
    ("training.min_lr_ratio", "1.5", "must be less than or equal to 1, not 1.5"),
    (PACK, "1", "must be true or false, not 1"),
    (PACK, '"true"', "must be true or false, not the text 'true'"),
    (PACK, "null", "must be true or false, not nothing (null)"),
    (NAME, "7", 'must be text, not 7; if text is meant, quote it: "7"'),
    (NAME, "1.5", "must be text, not 1.5; if text is meant, quote it"),
    (NAME, '""', "must not be empty"),
    (NAME, '" "', "must not be empty"),
    (NAME, '"a\\0b"', "must not contain a NUL character"),
    ("data.text_column", "", "must be text, not nothing (null)"),
    (CLIP, "0.0", "must be greater than 0, not 0.0"),
    (CLIP, "abc", "must be a finite number, not the text 'abc'"),
    (CLIP, "true", "must be a number, not true"),
    (BETAS, "0.9", "must be a list of two numbers"),
    (BETAS, "[0.9]", "must be a list of two numbers"),
    (BETAS, "[0.9, 0.95, 0.99]", "must be a list of two numbers"),
    (BETAS, "[0.9, 1.0]", "must be less than 1, not 1.0"),
    (BETAS, "[a, 0.9]", "must be a finite number, not the text 'a'"),
    (AMP, "1", "must be true, false or selective, not 1"),
    ("training.dtype", "fp16", "must be 'bfloat16', 'float16' or 'float32', not 'fp16'"),
    ("training.scheduler", "Cosine", "must be 'cosine', 'linear', 'constant' or 'wsd', not 'Cosine'"),
    ("device", "gpu", "'gpu' is not a device"),
    ("device", '"cuda:"', "'cuda:' is not a device"),
    ("data.num_workers", "0", "must be auto or a whole number of at least 1, not 0"),
    ("training.keep_checkpoints", "some", "must be all or a whole number of at least 1, not the text 'some'"),
    ("training.keep_checkpoints", "0", "must be all or a whole number of at least 1, not 0"),
    ("training.keep_checkpoints", "-1", "must be all or a whole number of at least 1, not -1"),
    ("training.keep_checkpoints", "null", "must be all or a whole number of at least 1, not nothing (null)"),
    ("training.async_checkpoint", "1", "must be true or false, not 1"),
    ("training.max_minutes", "0", "must be greater than 0, not 0.0"),
    ("training.max_minutes", "1:30", "must be a finite number, not the text '1:30'"),
    ("training.max_minutes", "inf", "must be a finite number, not the text 'inf'"),
    ("training.eval_steps", "0", "must be greater than or equal to 1, not 0"),
    ("data.validation", "x.jsonl", "must be a mapping of keys, not the text 'x.jsonl'"),
]


@pytest.mark.parametrize(("key", "text", "reason"), REFUSED)
def test_a_wrong_value_is_refused_alike_in_yaml_and_in_set(tmp_path: Path, key: str, text: str, reason: str) -> None:
    written = _with(key, text)
    leaf = key.rpartition(".")[2]
    line = next(number for number, row in enumerate(written.splitlines(), 1) if row.lstrip().startswith(f"{leaf}:"))
    assert [what for what, _ in _problems(tmp_path, written)] == [f"p.yml:{line}: {key}: {reason}"]
    assert [what for what, _ in _problems(tmp_path, BASE, f"{key}={text}")] == [f"--set {key}: {reason}"]


@pytest.mark.parametrize("key", [LR, ROWS])
def test_a_number_of_400_digits_is_a_wrong_value_not_a_crash(tmp_path: Path, key: str) -> None:
    ((what, _),) = _problems(tmp_path, _with(key, "1" * 400))
    assert key in what


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must not be an empty list"),
        ("{path: a, weight: 1}", "must be a path, a list of paths, or a list of {path, weight}, not a mapping"),
        ("[a, 5]", "entry 2: must be text, not 5"),
        ("[a, ~]", "entry 2: must be text, not nothing (null)"),
        ("[a, '']", "entry 2: must not be empty"),
        ("[[a]]", "entry 1: must be text, not a list"),
        ("[{path: a, weight: 1}, b]", "entry 2 has no weight: in a mixture each entry is {path: ..., weight: ...}"),
        ("[{path: a}]", "entry 1 has no weight: each entry is {path: ..., weight: ...}"),
        ("[{weight: 1}]", "entry 1 has no path: each entry is {path: ..., weight: ...}"),
        ("[{path: a, wieght: 1}]", "entry 1 has an unknown key 'wieght'; it takes path and weight"),
        ("[{path: a, weight: 0}]", "entry 1: weight must be greater than 0, not 0"),
        ("[{path: a, weight: -1}]", "entry 1: weight must be greater than 0, not -1"),
        ("[{path: a, weight: .nan}]", "entry 1: must be a finite number, not nan"),
        ("[{path: a, weight: half}]", "entry 1: must be a finite number, not the text 'half'"),
        ("[{path: 7, weight: 1}]", "entry 1: must be text, not 7"),
    ],
)
def test_lists_of_sources_that_make_no_sense(tmp_path: Path, text: str, message: str) -> None:
    for problems in (_problems(tmp_path, _with("data.path", text)), _problems(tmp_path, BASE, f"data.path={text}")):
        ((what, fix),) = problems
        assert what.partition("data.path: ")[2].startswith(message)
        assert fix == "correct data.path"


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (("data.path=[{path: a, weight: 1}]",), "data.path", "a mixture counts tokens, which needs packed rows"),
        (("data.document_mask=true",), "data.document_mask", "rows of one document need no mask"),
    ],
)
def test_what_needs_packed_rows(tmp_path: Path, overrides: tuple[str, ...], key: str, message: str) -> None:
    ((what, fix),) = _problems(tmp_path, BASE, "data.packing=false", *overrides)
    assert what == f"--set {key}: {message}"
    assert "data.packing: true" in fix


def test_a_list_of_sources_has_no_keys_of_its_own(tmp_path: Path) -> None:
    ((what, _),) = _problems(tmp_path, BASE, "data.path.weight=1")
    assert what == "--set data.path.weight: unknown key, data.path has no keys below it"


def test_nul_in_data_path_is_refused(tmp_path: Path) -> None:
    """No file name holds it; the file system functions raise ValueError on it."""
    ((what, _),) = _problems(tmp_path, _with("data.path", '"a\\0b"'))
    assert what == "p.yml:3: data.path: must not contain a NUL character"


@pytest.mark.parametrize(("text", "override"), [(BASE + "# \x07\n", None), (BASE, "data.path=a\x00b")])
def test_control_characters_are_a_preset_error(tmp_path: Path, text: str, override: str | None) -> None:
    ((what, _),) = _problems(tmp_path, text, *([override] if override else []))
    assert "special characters are not allowed" in what


def test_defaults_are_those_of_the_contract(tmp_path: Path) -> None:
    assert _load(tmp_path, BASE).preset.model_dump() == {
        "device": "cuda",
        "model_dir": "m",
        "trust_remote_code": False,
        "tokenizer": None,
        "output_dir": None,
        "data": {
            "path": "p",
            "text_column": "text",
            "max_length": 2048,
            "packing": True,
            "add_bos": False,
            "add_eos": True,
            "on_bad_line": "error",
            "validation": None,
            "shuffle": True,
            "document_mask": False,
            "token_dtype": None,
            "cache_dir": None,
            "verify": "mtime",
            "num_workers": "auto",
        },
        "training": {
            "max_steps": 1000000,
            "batch_size": 2,
            "grad_accum_steps": 1,
            "global_batch_size": None,
            "lr": 3e-4,
            "weight_decay": 0.1,
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "max_grad_norm": 1.0,
            "scheduler": "cosine",
            "warmup_steps": 0,
            "min_lr_ratio": 0.0,
            "log_steps": 10,
            "save_steps": 500,
            "keep_checkpoints": "all",
            "async_checkpoint": False,
            "max_minutes": None,
            "eval_steps": None,
            "dtype": None,
            "amp": None,
            "master_weights": "auto",
            "optimizer": "adamw",
            "precision_check": "error",
            "memory_check": "error",
            "seed": 42,
            "activation_checkpointing": False,
            "compile": False,
            "use_model_hints": False,
        },
        "distributed": {
            "strategy": "auto",
            "nproc_per_node": "auto",
            "replicate": 1,
            "timeout_seconds": 1800.0,
        },
    }


@pytest.mark.parametrize(("section", "key"), [("", "device"), ("data", "path"), ("training", "lr")])
def test_a_preset_is_frozen(tmp_path: Path, section: str, key: str) -> None:
    preset = _load(tmp_path, BASE).preset
    target = getattr(preset, section) if section else preset
    with pytest.raises(ValidationError, match="frozen"):
        setattr(target, key, "x")


@pytest.mark.parametrize(
    ("added", "what", "fix"),
    [
        ("modle_dir: x\n", "p.yml:6: modle_dir: unknown key", "did you mean model_dir?"),
        ("  warmup_step: 1\n", "p.yml:6: training.warmup_step: unknown key", "did you mean training.warmup_steps?"),
        ("  max-steps: 3\n", "p.yml:6: training.max-steps: unknown key", "write it as training.max_steps"),
        ("num-steps: 3\n", "p.yml:6: num-steps: unknown key", "did you mean training.max_steps?"),
        ("lr: 3\n", "p.yml:6: lr: unknown key", "write it as training.lr"),
        ("  max_length: 3\n", "p.yml:6: training.max_length: unknown key", "write it as data.max_length"),
        ("batchsize: 3\n", "p.yml:6: batchsize: unknown key", "did you mean training.batch_size?"),
        (
            "zzz: 3\n",
            "p.yml:6: zzz: unknown key",
            "remove it; `eulerforge schema` lists the known keys",
        ),
        (
            "moe: {}\n",
            "p.yml:6: moe: this key belongs to `eulerforge train` (LoRA fine-tuning), not to a pretrain preset",
            "remove moe; pretraining trains all parameters",
        ),
        ("on: 3\n", "p.yml:6: the key on is not text", 'quote it: "on"'),
        ("7: 3\n", "p.yml:6: the key 7 is not text", 'quote it: "7"'),
        ("model_dir: n\n", "p.yml:6: duplicate key model_dir (first on line 1)", "remove one of the two"),
        (
            "  max_steps: 5\n",
            "p.yml:6: duplicate key training.max_steps (first on line 5)",
            "remove one of the two",
        ),
        (
            "distributed: [1]\n",
            "p.yml:6: distributed: must be a mapping of keys, not a list",
            "indent the keys of distributed below it, or set them one by one with --set distributed.key=value",
        ),
    ],
)
def test_wrong_keys_have_a_line_and_a_hint(tmp_path: Path, added: str, what: str, fix: str) -> None:
    assert _problems(tmp_path, BASE + added) == [(what, fix)]


def test_a_dotted_key_in_a_file_is_shown_where_it_stands(tmp_path: Path) -> None:
    """People paste `training.lr=...` into the file; the section's own line would send them to the wrong place."""
    ((what, _),) = _problems(tmp_path, BASE + "training.lr: 1e-3\n")
    assert what == "p.yml:6: training.lr: unknown key"


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("training.lr", "--set training.lr: no '=' found"),
        ("=3", "--set =3: no key before '='"),
        ("training.warmup=3", "--set training.warmup: unknown key"),
        ("nope.lr=3", "--set nope.lr: unknown key"),
        ("backbone.x=3", "--set backbone.x: this key belongs to `eulerforge train` (LoRA fine-tuning), not to a"),
        ("data.path=*.jsonl", "--set data.path=*.jsonl: not valid YAML"),
        ("data=x", "--set data: must be a mapping of keys"),
        ("training=null", "--set training: must be a mapping of keys"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, what: str) -> None:
    ((found, _),) = _problems(tmp_path, BASE, override)
    assert found.startswith(what)


def test_the_last_override_wins_and_new_sections_can_be_set(tmp_path: Path) -> None:
    loaded = _load(tmp_path, BASE, "training.lr=1", "training.lr=2", "distributed.strategy=auto")
    assert loaded.preset.training.lr == 2.0
    assert loaded.overrides == ("training.lr=1", "training.lr=2", "distributed.strategy=auto")
    assert loaded.given == {"model_dir", "data.path", "training.max_steps", LR, "distributed.strategy"}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "p.yml: the preset is empty"),
        ("# nothing\n", "p.yml: the preset is empty"),
        ("- a\n", "p.yml:1: a preset is a mapping of keys"),
        ("a: 1\nb: c: d\n", "p.yml:2: not valid YAML: mapping values are not allowed here"),
    ],
)
def test_files_that_are_no_preset(tmp_path: Path, text: str, what: str) -> None:
    assert [found for found, _ in _problems(tmp_path, text)] == [what]


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.yml").write_bytes(b"model_dir: \xe9\n")
    for name, what in (
        ("none.yml", "preset not found"),
        (".", "preset is a directory"),
        ("latin.yml", "not UTF-8 text (byte 11)"),
    ):
        with pytest.raises(PresetError, match=re.escape(what)):
            load_preset(tmp_path / name)


def test_bom_and_crlf_change_nothing(tmp_path: Path) -> None:
    plain = _load(tmp_path, BASE).preset
    assert _load(tmp_path, "\ufeff" + BASE.replace("\n", "\r\n")).preset == plain


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    text = (
        "device: tpu\nmoe: {}\ndata:\n  path: p\n  max_length: 1\n  packin: true\n"
        "training:\n  lr: abc\n  batch_size: 1.5\n"
    )
    found = {what for what, _ in _problems(tmp_path, text, "training.seed=-1", "nope=1")}
    assert found == {
        "p.yml:1: device: 'tpu' is not a device",
        "p.yml:2: moe: this key belongs to `eulerforge train` (LoRA fine-tuning), not to a pretrain preset",
        "p.yml:5: data.max_length: must be greater than or equal to 2, not 1",
        "p.yml:6: data.packin: unknown key",
        "p.yml:8: training.lr: must be a finite number, not the text 'abc'",
        "p.yml:9: training.batch_size: must be a whole number, not 1.5",
        "p.yml: model_dir: required key is missing",
        "p.yml:7: training.max_steps: required key is missing",
        "--set training.seed: must be greater than or equal to 0, not -1",
        "--set nope: unknown key",
    }


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("training.warmup_steps=1000001", "training.warmup_steps"),
        ("training.global_batch_size=3", "training.global_batch_size"),
    ],
)
def test_combinations_that_cannot_be_meant_are_refused(tmp_path: Path, override: str, key: str) -> None:
    ((what, fix),) = _problems(tmp_path, BASE, override)
    assert what.startswith(f"--set {key}: ")
    assert fix


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("data.validation={fraction: 0.1}",), (None, 0.1)),
        (("data.validation.fraction=1e-3",), (None, 0.001)),
        (("data.validation={path: held.jsonl}",), ("held.jsonl", None)),
        (("data.validation.path=a*.jsonl", "training.eval_steps=5"), ("a*.jsonl", None)),
    ],
)
def test_held_out_text(tmp_path: Path, overrides: tuple[str, ...], expected: tuple[str | None, float | None]) -> None:
    validation = _load(tmp_path, BASE, *overrides).preset.data.validation
    assert validation is not None
    assert (validation.path, validation.fraction) == expected


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("data.validation={}", "data.validation: needs either path or fraction"),
        ("data.validation={path: a, fraction: 0.1}", "data.validation: needs either path or fraction"),
        ("data.validation={fraction: 0}", "data.validation.fraction: must be greater than 0, not 0.0"),
        ("data.validation={fraction: 1}", "data.validation.fraction: must be less than 1, not 1.0"),
        ("data.validation={part: 0.1}", "data.validation.part: unknown key"),
        ("training.eval_steps=5", "training.eval_steps: there is nothing to evaluate on"),
    ],
)
def test_held_out_text_that_cannot_be_meant(tmp_path: Path, override: str, what: str) -> None:
    assert any(found.endswith(what) for found, _ in _problems(tmp_path, BASE, override))


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("dtype: float16\n  amp: false", "training.amp: float16 weights underflow"),
        ("dtype: bfloat16\n  amp: selective", "training.amp: selective keeps some blocks in float32"),
        ("dtype: float16\n  amp: selective", "training.amp: selective keeps some blocks in float32"),
        ("dtype: float32\n  master_weights: false", "training.master_weights: false stores weights in bfloat16"),
        ("dtype: float16\n  master_weights: false", "training.master_weights: false stores weights in bfloat16"),
        ("amp: selective\n  master_weights: false", "training.master_weights: false stores weights in bfloat16"),
        (
            "dtype: bfloat16\n  amp: false\n  master_weights: true",
            "training.master_weights: amp: false computes in the stored dtype",
        ),
    ],
)
def test_precision_that_contradicts_itself(tmp_path: Path, given: str, what: str) -> None:
    ((found, _),) = _problems(tmp_path, BASE + f"  {given}\n")
    assert what in found


@pytest.mark.parametrize("value", ["1", "yes please", "maybe", "0.5"])
def test_master_weights_is_a_switch_or_auto(tmp_path: Path, value: str) -> None:
    ((found, _),) = _problems(tmp_path, BASE + f"  master_weights: {value}\n")
    assert "training.master_weights: must be true, false or auto" in found


@pytest.mark.parametrize(
    ("given", "warmup", "total"), [("  warmup_steps: 1000000\n", 1000000, None), ("  global_batch_size: 6\n", 0, 6)]
)
def test_limits_of_combinations_are_inclusive(tmp_path: Path, given: str, warmup: int, total: int | None) -> None:
    training = _load(tmp_path, BASE + given).preset.training
    assert (training.warmup_steps, training.global_batch_size) == (warmup, total)


def test_anchors_aliases_and_merge_keys(tmp_path: Path) -> None:
    text = "model_dir: &name m\ntokenizer: *name\ndata: {path: p}\ntraining:\n  <<: {lr: 1e-4, seed: 7}\n"
    loaded = _load(tmp_path, text + "  max_steps: 3\n  seed: 8\n")
    assert loaded.preset.tokenizer == "m"
    assert (loaded.preset.training.lr, loaded.preset.training.seed) == (1e-4, 8)
    assert loaded.given == {"model_dir", "tokenizer", "data.path", LR, "training.seed", "training.max_steps"}


# --- hints of the model ---

HINTED = {"lr_peak": 1e-3, "betas": [0.8, 0.9], "grad_clip": 0.5, "lr_floor_ratio": 0.1, "weight_decay": 0.01}


def test_hints_are_shown_and_not_applied_unless_asked(tmp_path: Path) -> None:
    loaded = _load(tmp_path, BASE)
    preset, hints = apply_hints(loaded, HINTED)
    assert preset == loaded.preset
    assert [hint.line() for hint in hints] == [
        "Model hint lr_peak=0.001: training.lr is 0.0003",
        "Model hint betas=[0.8, 0.9]: training.betas is (0.9, 0.95)",
        "Model hint grad_clip=0.5: training.max_grad_norm is 1.0",
        "Model hint lr_floor_ratio=0.1: training.min_lr_ratio is 0.0",
        "Model hint weight_decay=0.01: training.weight_decay is 0.1",
    ]


def test_hints_fill_only_what_the_preset_leaves_unset(tmp_path: Path) -> None:
    """`max_grad_norm: null` is a choice (no clipping), not an omission."""
    loaded = _load(tmp_path, BASE + "  use_model_hints: true\n  max_grad_norm: null\n", "training.betas=[0.9, 0.95]")
    preset, hints = apply_hints(loaded, HINTED)
    training = preset.training
    assert (training.lr, training.betas, training.max_grad_norm) == (1e-3, (0.9, 0.95), None)
    assert (training.min_lr_ratio, training.weight_decay) == (0.1, 0.01)
    assert [hint.key for hint in hints if hint.applied] == ["lr", "min_lr_ratio", "weight_decay"]
    assert hints[0].line() == "Model hint lr_peak=0.001: applied to training.lr"
    assert preset.model_copy(update={"training": loaded.preset.training}) == loaded.preset


def test_a_config_without_hints_is_not_mistaken_for_one(tmp_path: Path) -> None:
    """`betas` and `weight_decay` alone may mean anything in a model's config."""
    loaded = _load(tmp_path, BASE + "  use_model_hints: true\n")
    config = {"betas": [0.1, 0.2], "weight_decay": 0.5, "optimizer": "lion"}
    assert apply_hints(loaded, config) == (loaded.preset, ())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer": "muon"}, "asks for optimizer 'muon'"),
        ({"router_lr_multiplier": 2.0}, "asks for router_lr_multiplier 2.0"),
        ({"lr_peak": "fast"}, "gives a bad value for training.lr"),
        ({"betas": [0.9, 1.5]}, "gives a bad value for training.betas"),
    ],
)
def test_hints_that_cannot_be_honoured_are_refused_when_asked_for(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(PresetError, match=re.escape(message)):
        apply_hints(_load(tmp_path, BASE + "  use_model_hints: true\n"), HINTED | config)
    apply_hints(_load(tmp_path, BASE), HINTED | config)  # only shown: no reason to stop


@pytest.mark.parametrize("config", [{"optimizer": "adamw"}, {"router_lr_multiplier": 1}, {"grad_clip": None}])
def test_neutral_hints_are_no_obstacle(tmp_path: Path, config: dict[str, Any]) -> None:
    preset, _ = apply_hints(_load(tmp_path, BASE + "  use_model_hints: true\n"), HINTED | config)
    assert preset.training.lr == 1e-3
    assert preset.training.max_grad_norm == (1.0 if "grad_clip" in config else 0.5)


# --- the schema and the shipped presets ---


def test_the_schema_file_is_the_schema() -> None:
    stored = json.loads((REPOSITORY / "presets" / "pretrain.schema.json").read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(json_schema()))
    jsonschema.Draft202012Validator.check_schema(stored)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("training", "nope", 1),
        ("training", "dtype", "fp16"),
        ("training", "lr", -1.0),
        ("training", "batch_size", 0),
        ("training", "eps", 0),
        ("training", "betas", [0.9, 1.0]),
        ("training", "betas", [0.9]),
        ("training", "min_lr_ratio", 1.5),
        ("data", "max_length", 1),
        ("", "device", "gpu"),
        ("", "trust_remote_code", 1),
    ],
)
def test_an_editor_marks_what_the_loader_refuses(section: str, key: str, value: Any) -> None:
    """Bounds must be in the schema's own words (`minimum`, `pattern`, ...), or editors do not know them."""
    preset: dict[str, Any] = {"model_dir": "m", "data": {"path": "p"}, "training": {"max_steps": 5}}
    validator = jsonschema.Draft202012Validator(json_schema())
    assert validator.is_valid(preset)
    (preset[section] if section else preset)[key] = value
    assert not validator.is_valid(preset)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_presets_are_valid_and_explain_themselves(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    preset = load_preset(path).preset
    jsonschema.Draft202012Validator(json_schema()).validate(parse_yaml(text, path.name).values)
    lines = text.splitlines()
    assert lines[0] == "# yaml-language-server: $schema=../pretrain.schema.json"
    comment = " ".join(line.removeprefix("#").strip() for line in lines[: lines.index("")])
    for word in ("What:", "Hardware:", "Command:", "Batch:"):
        assert f" {word} " in comment
    assert f"presets/pretrain/{path.name}" in comment
    rows = preset.training.batch_size * preset.training.grad_accum_steps
    assert f"= {rows} rows of {preset.data.max_length:,} tokens" in comment
    assert f"{rows * preset.data.max_length:,} tokens per step" in comment


def test_there_are_shipped_presets() -> None:
    assert {"quickstart.yml", "eulerstack_hybrid_moe.yml"} <= {path.name for path in SHIPPED}


def test_quickstart_names_a_model_that_is_shipped() -> None:
    preset = load_preset(REPOSITORY / "presets" / "pretrain" / "quickstart.yml").preset
    assert not Path(preset.model_dir).is_absolute()
    assert (REPOSITORY / preset.model_dir / "config.json").is_file()


def test_the_hybrid_preset_has_exactly_the_agreed_values() -> None:
    path = REPOSITORY / "presets" / "pretrain" / "eulerstack_hybrid_moe.yml"
    loaded = load_preset(path)
    expected: dict[str, Any] = {
        "device": "cuda:0",
        "model_dir": "outputs/full_hybrid_moe",
        "trust_remote_code": True,
        "tokenizer": "gpt2",
        "data.path": "data/dolma_10k.jsonl",
        "data.text_column": "text",
        "data.max_length": 1024,
        "data.packing": True,
        "training.max_steps": 500,
        "training.batch_size": 2,
        "training.grad_accum_steps": 4,
        "training.lr": 3e-4,
        "training.weight_decay": 0.1,
        "training.warmup_steps": 50,
        "training.max_grad_norm": 1.0,
        "training.log_steps": 10,
        "training.save_steps": 250,
        "training.dtype": "float32",
        "training.amp": False,
        "training.seed": 42,
    }
    assert {key: _value(loaded, key) for key in loaded.given} == expected
