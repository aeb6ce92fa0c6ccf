"""Everything that a user can get wrong, one row each: what the error must say, and that nothing is left behind.

Each case starts from one small project that is right in all respects (`test_the_project_...` proves that it is) and
spoils one thing. The contract is the same for all: exit code 2, three lines on stderr, and no file or directory made
in the working directory, at `output_dir` or in the caches.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file

from tests.kit.commands import Result, Workspace, run_command, run_here, run_python
from tests.kit.models import write_custom, write_llama
from tests.kit.tokenizers import write_byte_tokenizer

ROOT = Path(__file__).parents[2]

GOOD = """\
device: cpu
model_dir: model
tokenizer: tokenizer
output_dir: run
data:
  path: data.jsonl
  max_length: 16
training:
  max_steps: 3
  dtype: float32
  amp: false
"""

Prepare = Callable[[Path], object]
Expected = str | tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """One way to go wrong.

    Attributes:
        name: the test's id.
        error: what the `Error:` line must hold.
        fix: what the `Fix:` line must hold.
        preset: content of preset.yml.
        at: a line of the preset that the error must point to, as `preset.yml:<number>:`.
        prepare: spoils the project, given its directory.
        arguments: the command line.
        absent: what no line may hold: contradictions, and words of Python's that say nothing to a user.
    """

    name: str
    error: tuple[str, ...]
    fix: tuple[str, ...]
    preset: str | bytes = GOOD
    at: str | None = None
    prepare: Prepare | None = None
    arguments: tuple[str, ...] = ("pretrain", "--preset", "preset.yml")
    absent: tuple[str, ...] = ()

    @property
    def place(self) -> tuple[str, ...]:
        """The file and line that the error must name."""
        if self.at is None:
            return ()
        assert isinstance(self.preset, str)
        lines = [line.strip() for line in self.preset.splitlines()]
        assert lines.count(self.at) == 1, self.at
        return (f"preset.yml:{lines.index(self.at) + 1}:",)


def _tuple(expected: Expected) -> tuple[str, ...]:
    return (expected,) if isinstance(expected, str) else expected


def _with(*edits: tuple[str, str], text: str = GOOD) -> str:
    """The good preset with lines `key: value` set in a section (`""` is the top level); replaces a key that is there.

    Works on text, so that a test sees the preset as a user writes it, and can put anything into it.
    """
    lines = text.splitlines()
    for section, line in edits:
        indent = "  " if section else ""
        key = f"{indent}{line.partition(':')[0]}:"
        if section and f"{section}:" not in lines:
            lines.append(f"{section}:")
        same = [index for index, other in enumerate(lines) if other.startswith(key)]
        if same:
            lines[same[0]] = indent + line
        else:
            lines.insert(lines.index(f"{section}:") + 1 if section else 0, indent + line)
    return "\n".join([*lines, ""])


def _without(*keys: str) -> str:
    """The good preset without some lines."""
    return "".join(line for line in GOOD.splitlines(keepends=True) if line.strip().partition(":")[0] not in keys)


def _preset(
    name: str, preset: str | bytes, error: Expected, fix: Expected, at: str | None = None, absent: Expected = ()
) -> Case:
    """A preset that is wrong as a file."""
    return Case(name, _tuple(error), _tuple(fix), preset=preset, at=at, absent=_tuple(absent))


def _value(section: str, line: str, error: Expected, fix: Expected = "", absent: Expected = ()) -> Case:
    """A line of the preset that is wrong; the error must name its key and line."""
    key = f"{section}.{line.partition(':')[0]}".removeprefix(".")
    return Case(
        f"{key}={line.partition(':')[2].strip()}",
        (f": {key}: ", *_tuple(error)),
        _tuple(fix or key.rpartition(".")[2]),
        preset=_with((section, line)),
        at=line,
        absent=_tuple(absent),
    )


def _set(*overrides: str, error: Expected, fix: Expected) -> Case:
    """`--set` arguments that are wrong."""
    arguments = [argument for override in overrides for argument in ("--set", override)]
    return Case(f"--set {' '.join(overrides)}", _tuple(error), _tuple(fix), arguments=(*Case.arguments, *arguments))


def _project(
    name: str,
    prepare: Prepare | None,
    error: Expected,
    fix: Expected,
    *edits: tuple[str, str],
    text: str = GOOD,
    absent: Expected = (),
) -> Case:
    """A preset that is right about a model, tokenizer, corpus or run directory that is wrong."""
    return Case(
        name, _tuple(error), _tuple(fix), preset=_with(*edits, text=text), prepare=prepare, absent=_tuple(absent)
    )


# --- Spoiling the model directory -------------------------------------------------------------------------------


def _configure(root: Path, **values: Any) -> None:
    """Change keys of the model's config.json."""
    path = root / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _custom(root: Path, append: str = "", **config: Any) -> None:
    """A model directory with custom code that works, with `append` at the end of its model file."""
    shutil.rmtree(root / "model")
    write_custom(root / "model", "failing")
    _configure(root, **{"kind": "none", "at": 0, **config})
    # transformers keeps one model class per configuration class and process: make it this project's own.
    for name, end in (("configuration_kit.py", f"\n# {root}\n"), ("modeling_kit.py", append)):
        file = root / "model" / name
        file.write_text(file.read_text() + end)


_MARKER = '\n\npathlib.Path("imported").touch()\n'
"""Appended to custom code: shows in the working directory that the code ran."""


def _broken_code(root: Path) -> None:
    _custom(root)
    (root / "model" / "helper_kit.py").write_text("import torch\n\ndef broken(:\n")
    path = root / "model" / "modeling_kit.py"
    path.write_text("from .helper_kit import broken\n" + path.read_text() + _MARKER)


def _code_missing(root: Path) -> None:
    _custom(root, _MARKER)
    (root / "model" / "configuration_kit.py").unlink()


def _fixed_vocabulary(root: Path) -> None:
    """A model that does not tell where its embeddings are, and a tokenizer with more ids than it has rows."""
    shutil.rmtree(root / "model")
    write_custom(root / "model", "oracle")
    _tokenizer(root, extra=10)


def _weights(root: Path, **changes: torch.Tensor | None) -> Path:
    """Write model.safetensors for the tiny Llama, with tensors replaced or left out (`__` stands for a dot)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    state = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(root / "model")).state_dict()
    tensors: dict[str, torch.Tensor] = {name: tensor.clone() for name, tensor in state.items()}
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        if tensor is None:
            del tensors[key]
        else:
            tensors[key] = tensor
    path = root / "model" / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def _truncated_weights(root: Path) -> None:
    path = _weights(root)
    path.write_bytes(path.read_bytes()[:-100])


def _index(root: Path, content: str) -> None:
    (root / "model" / "model.safetensors.index.json").write_text(content)


class _Payload:
    """What a hostile pickle holds: a call that leaves a trace."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("imported",))


# --- Spoiling the tokenizer -------------------------------------------------------------------------------------


def _tokenizer(root: Path, **options: Any) -> None:
    shutil.rmtree(root / "tokenizer")
    write_byte_tokenizer(root / "tokenizer", **options)


# --- Spoiling the corpus ----------------------------------------------------------------------------------------


def _corpus(content: bytes, root: Path) -> None:
    (root / "data.jsonl").write_bytes(content)


def _data(
    name: str, content: bytes, error: Expected, fix: Expected, *edits: tuple[str, str], absent: Expected = ()
) -> Case:
    """A corpus of these bytes."""
    return _project(f"data {name}", partial(_corpus, content), error, fix, *edits, absent=absent)


def _no_jsonl(root: Path) -> None:
    (root / "corpus").mkdir()
    (root / "corpus" / "notes.md").write_text("a corpus, some day\n")


def _several_kinds(root: Path) -> None:
    _no_jsonl(root)
    (root / "corpus" / "notes.md").rename(root / "corpus" / "README.txt")
    (root / "corpus" / "a.jsonl").write_bytes(_LINE)


def _parquet(columns: dict[str, list[object]], root: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "data.parquet")


def _token_ids(name: str, root: Path) -> None:
    np.array([*range(40), 60_000], dtype="<u2").tofile(root / name)


_LINE = b'{"text": "a document that is long enough"}\n'

PRESET_CASES = [
    Case(
        "preset missing",
        ("preset not found", "none.yml"),
        ("--preset",),
        arguments=("pretrain", "--preset", "none.yml"),
    ),
    Case(
        "preset is a directory",
        ("is a directory", "model"),
        ("YAML file", "--preset"),
        arguments=("pretrain", "--preset", "model"),
    ),
    Case(
        "preset below a file",
        ("data.jsonl/preset.yml", "Not a directory"),
        ("path",),
        arguments=("pretrain", "--preset", "data.jsonl/preset.yml"),
    ),
    _preset("not UTF-8", GOOD.encode() + b"# \xff\n", ("preset.yml", "UTF-8", f"byte {len(GOOD) + 2}"), "UTF-8"),
    _preset("UTF-16", GOOD.encode("utf-16"), ("preset.yml", "UTF-8"), "UTF-8"),
    _preset("empty", "", ("preset.yml", "empty"), ("model_dir", "data.path", "training.max_steps")),
    _preset("only a comment", "# model_dir: x\n", ("preset.yml", "empty"), "model_dir"),
    _preset("a list", "- model_dir: model\n", ("preset.yml:1:", "mapping"), "model_dir: ..."),
    _preset("a word", "pretrain\n", ("preset.yml:1:", "mapping"), "model_dir: ..."),
    _preset("open bracket", GOOD + "x: [1, 2\n", "not valid YAML", ("syntax", "line"), at="x: [1, 2"),
    _preset("open quote", GOOD + "x: 'ab\n", "not valid YAML", ("syntax", "line"), at="x: 'ab"),
    _preset("control character", GOOD + "x: \x01\n", ("preset.yml", "not valid YAML"), "control characters"),
    _preset("undefined alias", _with(("training", "lr: *x")), ("not valid YAML", "'x'"), "line", at="lr: *x"),
    _preset("bad indentation", _with(("training", " lr: 1")), "not valid YAML", "indentation", at="max_steps: 3"),
    _preset("tab", _with(("training", "lr:\t1\n\tseed: 1")), "not valid YAML", "line"),
    _preset("two documents", GOOD + "---\n" + GOOD, ("preset.yml:12:", "not valid YAML"), "line"),
    _preset("Python object", _with(("", "seed: !!python/name:os.system")), "preset.yml:1", "line"),
    _preset(
        "duplicate key at top level",
        GOOD + "device: cuda\n",
        ("duplicate key device", "first on line 1"),
        "remove one",
        at="device: cuda",
    ),
    _preset(
        "duplicate key in a section",
        GOOD + "  max_steps: 4\n",
        ("duplicate key training.max_steps", "first on line 9"),
        "remove one",
        at="max_steps: 4",
    ),
    _preset("key is not text", _with(("", "on: 1")), ("the key on is not text",), 'quote it: "on"', at="on: 1"),
    _preset(
        "key is a list", GOOD + "? [a, b]\n: 1\n", "preset.yml:12: the key", "name as the key", absent="ScalarNode"
    ),
    _value("", "devise: cpu", "unknown key", "did you mean device?"),
    _value("data", "max_lenght: 8", "unknown key", "did you mean data.max_length?"),
    _value("training", "lerning_rate: 1", "unknown key", "training.lr"),
    _value("training", "warmup_step: 1", "unknown key", "did you mean training.warmup_steps?"),
    _value("training", "batch-size: 2", "unknown key", "training.batch_size"),
    _value("training", "num-steps: 2", "unknown key", "training.max_steps"),
    _value("distributed", "stategy: auto", "unknown key", "did you mean distributed.strategy?"),
    _value("", "lr: 0.1", "unknown key", "training.lr"),
    _value("training", "packing: true", "unknown key", "data.packing"),
    _value("", "xyzzy: 1", "unknown key", "eulerforge schema"),
    _preset(
        "section is a list",
        GOOD.replace("  path: data.jsonl\n  max_length: 16\n", "- path: data.jsonl\n"),
        (": data: ", "mapping"),
        "data",
        at="data:",
    ),
    _preset(
        "section is a number",
        GOOD.replace("  path: data.jsonl\n  max_length: 16\n", "").replace("data:", "data: 5"),
        (": data: ", "mapping"),
        "data",
        at="data: 5",
    ),
    _preset("section is null", GOOD + "distributed:\n", (": distributed: ", "mapping"), "distributed"),
    _preset("no model_dir", _without("model_dir"), ("model_dir", "required", "missing"), "add model_dir"),
    _preset("no data", _without("data", "path", "max_length"), ("preset.yml: data: ", "missing"), "add data"),
    _preset(
        "no training",
        _without("training", "max_steps", "dtype", "amp"),
        ("preset.yml: training: ", "missing"),
        "add training",
    ),
    _preset(
        "no max_steps",
        _without("max_steps"),
        ("training.max_steps", "missing"),
        "add training.max_steps",
        at="training:",
    ),
    _preset("no data.path", _without("path"), ("data.path", "missing"), "add data.path", at="data:"),
    *(
        _value("", f"{key}: {value}", "eulerforge train", f"remove {key}")
        for key, value in (("injection", "{lora_r: 8}"), ("moe", "{experts: 4}"), ("backbone", "qwen"))
    ),
]

VALUE_CASES = [
    *(
        _value("training", f"max_steps: {value}", expected)
        for value, expected in (
            ("1.5", ("whole number", "1.5")),
            ("true", ("whole number", "true")),
            ("ten", ("whole number", "'ten'")),
            ("010", ("whole number", "'010'")),
            ("0", ("greater than or equal to 1", "0")),
            ("-1", ("greater than or equal to 1", "-1")),
            ("[3]", ("whole number", "a list")),
        )
    ),
    _preset(
        "training.max_steps=null",
        _with(("training", "max_steps:")),
        (": training.max_steps: ", "whole number", "null"),
        "training.max_steps",
        at="max_steps:",
    ),
    *(
        _value("training", f"lr: {value}", expected)
        for value, expected in (
            (".nan", ("finite", "nan")),
            ("nan", ("finite", "'nan'")),
            ("inf", ("finite", "'inf'")),
            (".inf", ("finite", "inf")),
            ("1e999", ("finite", "inf")),
            ("-1", ("greater than or equal to 0", "-1")),
            ("fast", ("number", "'fast'")),
            ("true", ("number", "true")),
        )
    ),
    _value("training", "betas: [0.9]", "two numbers", "betas: [0.9, 0.95]"),
    _value("training", "betas: [0.9, 0.9, 0.9]", "two numbers", "betas: [0.9, 0.95]"),
    _value("training", "betas: 0.9", "two numbers", "betas: [0.9, 0.95]"),
    _value("training", "betas: [0.9, 1.0]", ("less than 1", "1"), "betas"),
    _value("training", "eps: 0", "greater than 0"),
    _value("training", "min_lr_ratio: 2", "less than or equal to 1"),
    _value("training", "seed: -1", "greater than or equal to 0"),
    _value("training", "max_grad_norm: 0", "greater than 0"),
    _value("training", "scheduler: polynomial", ("'cosine'", "'wsd'", "'polynomial'"), "one of those values"),
    _value("training", "dtype: bf16", ("'bfloat16'", "'float32'", "'bf16'"), "one of those values"),
    _value("training", "amp: maybe", ("true, false", "'maybe'")),
    _value("training", "warmup_steps: 4", ("warm-up", "4", "max_steps 3"), "training.warmup_steps"),
    _value("training", "global_batch_size: 5", ("not a multiple", "5", "batch_size 2"), "multiple"),
    _value("data", "packing: maybe", ("true or false", "'maybe'")),
    _value("data", "max_length: 1", ("greater than or equal to 2", "1")),
    _value("data", "text_column: [text]", ("text", "a list")),
    _value("data", "path: 5", ("must be text", "5")),
    _value("data", "path: ''", ("must not be empty",)),
    _value("data", 'path: "a\\0b"', "NUL"),
    _value("data", "on_bad_line: ignore", ("'error'", "'skip'", "'ignore'"), "one of those values"),
    _value("", "model_dir: 2024", ("text", 'quote it: "2024"')),
    _value("", "model_dir: true", ("text", "quote it"), absent="True"),
    _value("", "output_dir: 1.10", ("text", "quote it"), absent='"1.1"'),
    _value("", "tokenizer: ''", "empty"),
    _value("", "device: gpu", ("device", "'gpu'"), ("cuda", "cuda:N", "cpu")),
    _value("", "device: cuda:-1", ("device", "'cuda:-1'"), ("cuda", "cuda:N", "cpu")),
]
"""Wrong types, ranges and combinations."""

SOURCE_CASES = [
    _value("data", "path: []", "must not be an empty list", "data.path"),
    _value("data", "path: {a.jsonl: 0.5}", "a list of {path, weight}, not a mapping", "data.path"),
    _value("data", "path: [a.jsonl, {path: b.jsonl, weight: 1}]", "entry 1 has no weight", "data.path"),
    _value("data", "path: [{path: a.jsonl, weight: 0}]", "entry 1: weight must be greater than 0", "data.path"),
    _value("data", "path: [{path: a.jsonl, wieght: 1}]", "unknown key 'wieght'", "data.path"),
    _value("data", "num_workers: 0", "auto or a whole number of at least 1", "data.num_workers"),
    _value("data", "verify: hash", "'mtime' or 'content'", "one of those"),
    _value("data", "token_dtype: int32", "'uint16' or 'uint32'", "one of those"),
]
"""Sources and how they are read."""

CONTRADICTION_CASES = [
    _value("training", "compile: 2", "must be true or false", "training.compile"),
    _value("training", "activation_checkpointing: -1", "false, true or a whole number of at least 1", ""),
    _value("training", "master_weights: 1", "must be true, false or auto", "training.master_weights"),
    _value("training", "optimizer: lion", "'adamw', 'adamw8bit' or 'muon'", "one of those"),
    _preset(
        "float16 without amp",
        _with(("training", "dtype: float16"), ("training", "amp: false")),
        (": training.amp: ", "float16 weights underflow"),
        "leave amp unset",
        at="amp: false",
    ),
    _preset(
        "selective in bfloat16",
        _with(("training", "dtype: bfloat16"), ("training", "amp: selective")),
        (": training.amp: ", "selective keeps some blocks in float32"),
        "training.dtype: float32",
        at="amp: selective",
    ),
    _preset(
        "no master weights for float32",
        _with(("training", "dtype: float32"), ("training", "master_weights: false")),
        (": training.master_weights: ", "false stores weights in bfloat16"),
        "training.dtype: bfloat16",
        at="master_weights: false",
    ),
]
"""Precision that contradicts itself; what contradicts the model is in test_precision.py."""

SET_CASES = [
    Case(
        "preset missing",
        ("preset not found", "none.yml"),
        ("--preset",),
        arguments=("pretrain", "--preset", "none.yml"),
    ),
    Case(
        "preset is a directory",
        ("is a directory", "model"),
        ("YAML file", "--preset"),
        arguments=("pretrain", "--preset", "model"),
    ),
    Case(
        "preset below a file",
        ("data.jsonl/preset.yml", "Not a directory"),
        ("path",),
        arguments=("pretrain", "--preset", "data.jsonl/preset.yml"),
    ),
    _preset("not UTF-8", GOOD.encode() + b"# \xff\n", ("preset.yml", "UTF-8", f"byte {len(GOOD) + 2}"), "UTF-8"),
    _preset("UTF-16", GOOD.encode("utf-16"), ("preset.yml", "UTF-8"), "UTF-8"),
    _preset("empty", "", ("preset.yml", "empty"), ("model_dir", "data.path", "training.max_steps")),
    _preset("only a comment", "# model_dir: x\n", ("preset.yml", "empty"), "model_dir"),
    _preset("a list", "- model_dir: model\n", ("preset.yml:1:", "mapping"), "model_dir: ..."),
    _preset("a word", "pretrain\n", ("preset.yml:1:", "mapping"), "model_dir: ..."),
    _preset("open bracket", GOOD + "x: [1, 2\n", "not valid YAML", ("syntax", "line"), at="x: [1, 2"),
    _preset("open quote", GOOD + "x: 'ab\n", "not valid YAML", ("syntax", "line"), at="x: 'ab"),
    _preset("control character", GOOD + "x: \x01\n", ("preset.yml", "not valid YAML"), "control characters"),
    _preset("undefined alias", _with(("training", "lr: *x")), ("not valid YAML", "'x'"), "line", at="lr: *x"),
    _preset("bad indentation", _with(("training", " lr: 1")), "not valid YAML", "indentation", at="max_steps: 3"),
    _preset("tab", _with(("training", "lr:\t1\n\tseed: 1")), "not valid YAML", "line"),
    _preset("two documents", GOOD + "---\n" + GOOD, ("preset.yml:12:", "not valid YAML"), "line"),
    _preset("Python object", _with(("", "seed: !!python/name:os.system")), "preset.yml:1", "line"),
    _preset(
        "duplicate key at top level",
        GOOD + "device: cuda\n",
        ("duplicate key device", "first on line 1"),
        "remove one",
        at="device: cuda",
    ),
    _preset(
        "duplicate key in a section",
        GOOD + "  max_steps: 4\n",
        ("duplicate key training.max_steps", "first on line 9"),
        "remove one",
        at="max_steps: 4",
    ),
    _preset("key is not text", _with(("", "on: 1")), ("the key on is not text",), 'quote it: "on"', at="on: 1"),
    _preset(
        "key is a list", GOOD + "? [a, b]\n: 1\n", "preset.yml:12: the key", "name as the key", absent="ScalarNode"
    ),
    _value("", "devise: cpu", "unknown key", "did you mean device?"),
    _value("data", "max_lenght: 8", "unknown key", "did you mean data.max_length?"),
    _value("training", "lerning_rate: 1", "unknown key", "training.lr"),
    _value("training", "warmup_step: 1", "unknown key", "did you mean training.warmup_steps?"),
    _value("training", "batch-size: 2", "unknown key", "training.batch_size"),
    _value("training", "num-steps: 2", "unknown key", "training.max_steps"),
    _value("distributed", "stategy: auto", "unknown key", "did you mean distributed.strategy?"),
    _value("", "lr: 0.1", "unknown key", "training.lr"),
    _value("training", "packing: true", "unknown key", "data.packing"),
    _value("", "xyzzy: 1", "unknown key", "eulerforge schema"),
    _preset(
        "section is a list",
        GOOD.replace("  path: data.jsonl\n  max_length: 16\n", "- path: data.jsonl\n"),
        (": data: ", "mapping"),
        "data",
        at="data:",
    ),
    _preset(
        "section is a number",
        GOOD.replace("  path: data.jsonl\n  max_length: 16\n", "").replace("data:", "data: 5"),
        (": data: ", "mapping"),
        "data",
        at="data: 5",
    ),
    _preset("section is null", GOOD + "distributed:\n", (": distributed: ", "mapping"), "distributed"),
    _preset("no model_dir", _without("model_dir"), ("model_dir", "required", "missing"), "add model_dir"),
    _preset("no data", _without("data", "path", "max_length"), ("preset.yml: data: ", "missing"), "add data"),
    _preset(
        "no training",
        _without("training", "max_steps", "dtype", "amp"),
        ("preset.yml: training: ", "missing"),
        "add training",
    ),
    _preset(
        "no max_steps",
        _without("max_steps"),
        ("training.max_steps", "missing"),
        "add training.max_steps",
        at="training:",
    ),
    _preset("no data.path", _without("path"), ("data.path", "missing"), "add data.path", at="data:"),
    *(
        _value("", f"{key}: {value}", "eulerforge train", f"remove {key}")
        for key, value in (("injection", "{lora_r: 8}"), ("moe", "{experts: 4}"), ("backbone", "qwen"))
    ),
]

VALUE_CASES = [
    *(
        _value("training", f"max_steps: {value}", expected)
        for value, expected in (
            ("1.5", ("whole number", "1.5")),
            ("true", ("whole number", "true")),
            ("ten", ("whole number", "'ten'")),
            ("010", ("whole number", "'010'")),
            ("0", ("greater than or equal to 1", "0")),
            ("-1", ("greater than or equal to 1", "-1")),
            ("[3]", ("whole number", "a list")),
        )
    ),
    _preset(
        "training.max_steps=null",
        _with(("training", "max_steps:")),
        (": training.max_steps: ", "whole number", "null"),
        "training.max_steps",
        at="max_steps:",
    ),
    *(
        _value("training", f"lr: {value}", expected)
        for value, expected in (
            (".nan", ("finite", "nan")),
            ("nan", ("finite", "'nan'")),
            ("inf", ("finite", "'inf'")),
            (".inf", ("finite", "inf")),
            ("1e999", ("finite", "inf")),
            ("-1", ("greater than or equal to 0", "-1")),
            ("fast", ("number", "'fast'")),
            ("true", ("number", "true")),
        )
    ),
    _value("training", "betas: [0.9]", "two numbers", "betas: [0.9, 0.95]"),
    _value("training", "betas: [0.9, 0.9, 0.9]", "two numbers", "betas: [0.9, 0.95]"),
    _value("training", "betas: 0.9", "two numbers", "betas: [0.9, 0.95]"),
    _value("training", "betas: [0.9, 1.0]", ("less than 1", "1"), "betas"),
    _value("training", "eps: 0", "greater than 0"),
    _value("training", "min_lr_ratio: 2", "less than or equal to 1"),
    _value("training", "seed: -1", "greater than or equal to 0"),
    _value("training", "max_grad_norm: 0", "greater than 0"),
    _value("training", "scheduler: polynomial", ("'cosine'", "'wsd'", "'polynomial'"), "one of those values"),
    _value("training", "dtype: bf16", ("'bfloat16'", "'float32'", "'bf16'"), "one of those values"),
    _value("training", "amp: maybe", ("true, false", "'maybe'")),
    _value("training", "warmup_steps: 4", ("warm-up", "4", "max_steps 3"), "training.warmup_steps"),
    _value("training", "global_batch_size: 5", ("not a multiple", "5", "batch_size 2"), "multiple"),
    _value("data", "packing: maybe", ("true or false", "'maybe'")),
    _value("data", "max_length: 1", ("greater than or equal to 2", "1")),
    _value("data", "text_column: [text]", ("text", "a list")),
    _value("data", "path: 5", ("must be text", "5")),
    _value("data", "path: ''", ("must not be empty",)),
    _value("data", 'path: "a\\0b"', "NUL"),
    _value("data", "on_bad_line: ignore", ("'error'", "'skip'", "'ignore'"), "one of those values"),
    _value("", "model_dir: 2024", ("text", 'quote it: "2024"')),
    _value("", "model_dir: true", ("text", "quote it"), absent="True"),
    _value("", "output_dir: 1.10", ("text", "quote it"), absent='"1.1"'),
    _value("", "tokenizer: ''", "empty"),
    _value("", "device: gpu", ("device", "'gpu'"), ("cuda", "cuda:N", "cpu")),
    _value("", "device: cuda:-1", ("device", "'cuda:-1'"), ("cuda", "cuda:N", "cpu")),
]
"""Wrong types, ranges and combinations."""

SOURCE_CASES = [
    _value("data", "path: []", "must not be an empty list", "data.path"),
    _value("data", "path: {a.jsonl: 0.5}", "a list of {path, weight}, not a mapping", "data.path"),
    _value("data", "path: [a.jsonl, {path: b.jsonl, weight: 1}]", "entry 1 has no weight", "data.path"),
    _value("data", "path: [{path: a.jsonl, weight: 0}]", "entry 1: weight must be greater than 0", "data.path"),
    _value("data", "path: [{path: a.jsonl, wieght: 1}]", "unknown key 'wieght'", "data.path"),
    _value("data", "num_workers: 0", "auto or a whole number of at least 1", "data.num_workers"),
    _value("data", "verify: hash", "'mtime' or 'content'", "one of those"),
    _value("data", "token_dtype: int32", "'uint16' or 'uint32'", "one of those"),
]
"""Sources and how they are read."""

PRECISION_CASES = [
    _value("training", "compile: true", "not available in this version", "false"),
    _value("training", "activation_checkpointing: true", "not available in this version", "false"),
    _value("training", "activation_checkpointing: 2", "not available in this version", "false"),
    _value("training", "amp: selective", "not available in this version", ("float32", "amp: false")),
    _value("training", "dtype: float16", "not available in this version", "bfloat16 or float32"),
    _preset(
        "bfloat16 without amp",
        _with(("training", "dtype: bfloat16"), ("training", "amp: false")),
        (": training.amp: ", "not available in this version"),
        "leave amp unset",
        at="amp: false",
    ),
]
"""Values that the schema knows and this version cannot honour: refused, never ignored."""

SET_CASES = [
    _set("training.lr", error=("--set training.lr", "no '='"), fix="section.key=value"),
    _set("=1", error=("--set =1", "no key"), fix="section.key=value"),
    _set("training.lrr=1", error=("--set training.lrr", "unknown key"), fix="training.lr"),
    _set("lr=1", error=("--set lr", "unknown key"), fix="training.lr"),
    _set("training.lr.x=1", error=("--set training.lr.x", "unknown key"), fix=""),
    _set("training.=1", error=("--set training.", "unknown key"), fix=""),
    _set("data.path=*.jsonl", error=("--set data.path=*.jsonl",), fix="quote the value"),
    _set("data.path=[a", error=("--set data.path=[a", "not valid YAML"), fix="quote the value"),
    _set(
        "training.max_steps=1.5", error=("--set training.max_steps", "whole number", "1.5"), fix="training.max_steps"
    ),
    _set("training.max_steps=", error=("--set training.max_steps", "whole number"), fix="training.max_steps"),
    _set("data.packing=maybe", error=("--set data.packing", "true or false", "'maybe'"), fix="data.packing"),
    _set("training=5", error=("--set training", "mapping"), fix="training"),
    _set("training.warmup_steps=9", error=("--set training.warmup_steps", "max_steps 3"), fix="training.max_steps"),
    *(
        _set(f"{key}.x=1", error=(f"--set {key}", "eulerforge train"), fix=f"remove {key}")
        for key in ("injection", "moe", "backbone")
    ),
    _set("moe=true", error=("--set moe", "eulerforge train"), fix="remove moe"),
]

USAGE_CASES = [
    Case("no command", ("COMMAND",), ("eulerforge --help",), arguments=()),
    Case("unknown command", ("'finetune'", "pretrain"), ("eulerforge --help",), arguments=("finetune",)),
    Case("unknown option", ("--lr",), ("--help",), arguments=(*Case.arguments, "--lr", "1")),
    Case("stray argument", ("more.yml",), ("--help",), arguments=(*Case.arguments, "more.yml")),
    Case("missing --preset", ("--preset",), ("eulerforge pretrain --help",), arguments=("pretrain",)),
    Case("--preset without value", ("--preset",), ("pretrain --help",), arguments=("pretrain", "--preset")),
    Case("--set without value", ("--set",), ("pretrain --help",), arguments=(*Case.arguments, "--set")),
    Case(
        "empty --output-dir",
        ("output_dir", "empty"),
        ("output_dir",),
        arguments=(*Case.arguments, "--output-dir", ""),
    ),
]

_CONFIG = "model/config.json"

MODEL_CASES = [
    _project("model_dir absent", None, ("model_dir", "/none", "nothing"), "config.json", ("", "model_dir: none")),
    _project(
        "model_dir is a file",
        None,
        ("model_dir", "data.jsonl", "a file"),
        "config.json",
        ("", "model_dir: data.jsonl"),
    ),
    _project(
        "no config.json",
        lambda root: (root / _CONFIG).unlink(),
        ("model_dir", "/model", "no config.json"),
        "model_dir",
    ),
    _project(
        "config.json malformed",
        lambda root: (root / _CONFIG).write_text('{"model_type": "llama",\n'),
        (_CONFIG, "not valid JSON", "line"),
        "config.json",
    ),
    _project(
        "config.json is a list",
        lambda root: (root / _CONFIG).write_text("[]"),
        (_CONFIG, "JSON object"),
        "config.json",
    ),
    _project(
        "no model_type",
        lambda root: (root / _CONFIG).write_text('{"vocab_size": 260}'),
        (_CONFIG, "model_type"),
        "model_type",
    ),
    _project(
        "unknown model_type",
        partial(_configure, model_type="llamma"),
        ("/model", "llamma"),
        "config.json",
    ),
    _project(
        "model_type is not text", partial(_configure, model_type=5), ("/model", "model type `5`"), "config.json"
    ),
    _project(
        "constructor raises",
        partial(_configure, hidden_act="swish9"),
        ("cannot build the model", "swish9"),
        "config.json",
    ),
    _project(
        "config value of a wrong type",
        partial(_configure, vocab_size="many"),
        ("/model", "vocab_size", "int"),
        "config.json",
    ),
    _project(
        "generation_config.json malformed",
        lambda root: (root / "model" / "generation_config.json").write_text("{"),
        "generation_config.json",
        "generation_config.json",
    ),
    _project("impossible size", partial(_configure, hidden_size=-16), ("/model", "cannot"), "config.json"),
    _project(
        "custom code without trust_remote_code",
        partial(_custom, append=_MARKER),
        ("modeling_kit.py", "configuration_kit.py", "trust_remote_code"),
        "trust_remote_code: true",
    ),
    _project(
        "custom code with a syntax error",
        _broken_code,
        ("helper_kit.py:3", "not valid Python"),
        "code",
        ("", "trust_remote_code: true"),
    ),
    _project(
        "custom file missing",
        _code_missing,
        ("configuration_kit.py is missing", "wanted by"),
        "model_dir",
        ("", "trust_remote_code: true"),
    ),
    _project(
        "custom code needs a package",
        partial(_custom, append=f"\nimport no_such_package_abc.deep{_MARKER}"),
        ("no_such_package_abc", "not installed"),
        "pip install no_such_package_abc",
        ("", "trust_remote_code: true"),
    ),
    _project(
        "auto_map names a class that is not there",
        partial(
            _custom,
            auto_map={"AutoConfig": "configuration_kit.KitConfig", "AutoModelForCausalLM": "modeling_kit.KitModell"},
        ),
        ("/model", "KitModell"),
        "config.json",
        ("", "trust_remote_code: true"),
    ),
    *(
        _project(
            f"auto_map leads to {module}",
            partial(_custom, append=_MARKER, auto_map={"AutoModelForCausalLM": f"{module}.KitModel"}),
            ("/model", "auto_map", module),
            "config.json",
            ("", "trust_remote_code: true"),
        )
        for module in ("../modeling_kit", "/tmp/modeling_kit")
    ),
    *(
        _project(
            f"custom code that {what}",
            partial(_custom, append=f"\n{code}"),
            ("/model", "cannot build the model", shown, "modeling_kit.py:"),
            "code",
            ("", "trust_remote_code: true"),
        )
        for what, code, shown in (
            ("raises when imported", 'raise ValueError("not here")', "ValueError: not here"),
            ("ends the process when imported", "raise SystemExit(0)", "SystemExit"),
            ("raises when built", "KitModel.__init__ = lambda self, config: config.absent", "absent"),
        )
    ),
    _project(
        "vocabulary that cannot grow",
        _fixed_vocabulary,
        ("267 embedding rows", "KitModel", "does not expose its embeddings"),
        "vocab_size 267",
        ("", "trust_remote_code: true"),
    ),
    *(
        _project(
            f"model hint {key}={value!r}",
            partial(_configure, **{"lr_peak": 0.1, key: value}),
            ("training.use_model_hints", "config.json", shown),
            "use_model_hints: false",
            ("training", "use_model_hints: true"),
            absent="Value error",
        )
        for key, value, shown in (
            ("lr_peak", "fast", "training.lr: must be a finite number"),
            ("betas", [0.9], "training.betas"),
            ("optimizer", "muon", "'muon'"),
            ("router_lr_multiplier", 0.5, "router_lr_multiplier 0.5"),
        )
    ),
    _project("weights truncated", _truncated_weights, ("model.safetensors", "cannot be read"), "again"),
    _project(
        "weights are no weights",
        lambda root: (root / "model" / "model.safetensors").write_bytes(
            b"version https://git-lfs.github.com/spec/v1\n"
        ),
        ("model.safetensors", "cannot be read"),
        "again",
    ),
    _project(
        "weight missing",
        lambda root: _weights(root, model__norm__weight=None),
        ("model.safetensors", "1 missing: model.norm.weight"),
        "weight",
    ),
    _project(
        "weight unexpected",
        lambda root: _weights(root, model__extra__weight=torch.zeros(2)),
        ("model.safetensors", "1 unexpected: model.extra.weight"),
        "weight",
    ),
    _project(
        "weight of another shape",
        lambda root: _weights(root, lm_head__weight=torch.zeros(7, 16)),
        ("model.safetensors", "shape: lm_head.weight", "[7, 16]", "[260, 16]"),
        "weight",
    ),
    _project(
        "weight renamed",
        lambda root: _weights(root, model__norm__weight=None, model__extra__weight=torch.zeros(2)),
        ("model.safetensors", "missing: model.norm.weight", "unexpected: model.extra.weight"),
        "weight",
    ),
    _project(
        "index names a missing shard",
        lambda root: _index(root, '{"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}'),
        ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "does not exist"),
        "shard",
    ),
    _project(
        "index is not JSON",
        lambda root: _index(root, '{"weight_map": '),
        ("model.safetensors.index.json", "not a valid weight index"),
        "again",
    ),
    _project(
        "index without weight_map",
        lambda root: _index(root, "{}"),
        ("model.safetensors.index.json", "not a valid weight index", "weight_map"),
        "again",
    ),
    _project(
        "index names a number",
        lambda root: _index(root, '{"weight_map": {"lm_head.weight": 5}}'),
        ("model.safetensors.index.json", "not a valid weight index"),
        "again",
        absent="PosixPath",
    ),
    _project(
        "weights are a hostile pickle",
        lambda root: torch.save(_Payload(), root / "model" / "pytorch_model.bin"),
        ("pytorch_model.bin", "cannot be read"),
        "safetensors",
        absent="will likely succeed",
    ),
    _project(
        "weights are a pickle of something else",
        lambda root: torch.save([1, 2], root / "model" / "pytorch_model.bin"),
        ("pytorch_model.bin",),
        "again",
    ),
    _project(
        "max_length beyond the context",
        None,
        ("data.max_length 256", "max_position_embeddings 128"),
        ("data.max_length", "128", "max_position_embeddings"),
        ("data", "max_length: 256"),
    ),
]

_NO_TOKENIZER = _without("tokenizer")

TOKENIZER_CASES = [
    _project(
        "no tokenizer", None, ("tokenizer", "not set", "/model"), "set tokenizer to a tokenizer", text=_NO_TOKENIZER
    ),
    _project(
        "no tokenizer, but config.json names one",
        partial(_configure, tokenizer={"pretrained": "acme/bytes"}),
        ("tokenizer", "not set", "/model"),
        ("tokenizer: acme/bytes", "tokenizer.pretrained"),
        text=_NO_TOKENIZER,
    ),
    _project(
        "tokenizer path absent",
        None,
        ("tokenizer", "./none", "not a directory"),
        "tokenizer.json",
        ("", "tokenizer: ./none"),
    ),
    _project(
        "tokenizer is a file",
        None,
        ("tokenizer", "data.jsonl", "not a directory"),
        "tokenizer",
        ("", "tokenizer: data.jsonl"),
    ),
    _project(
        "tokenizer directory without files",
        lambda root: (root / "hollow").mkdir(),
        ("tokenizer", "hollow", "tokenizer.json"),
        "tokenizer",
        ("", "tokenizer: hollow"),
    ),
    _project(
        "tokenizer not in the hub cache",
        None,
        ("tokenizer", "acme/never-cached", "hub name"),
        "cache",
        ("", "tokenizer: acme/never-cached"),
    ),
    _project(
        "tokenizer without EOS",
        partial(_tokenizer, eos=False),
        ("tokenizer", "no EOS token", "data.add_eos"),
        ("eos_token", "data.add_eos: false"),
    ),
    _project(
        "tokenizer without BOS",
        None,
        ("tokenizer", "no BOS token", "data.add_bos"),
        ("bos_token", "data.add_bos: false"),
        ("data", "add_bos: true"),
    ),
    _project(
        "tokenizer.json cut off",
        lambda root: (root / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0", "model":'),
        ("cannot load", "tokenizer.json"),
        "tokenizer",
    ),
    _project(
        "tokenizer.json of another kind",
        lambda root: (root / "tokenizer" / "tokenizer.json").write_text('{"model": {"type": "Quipu"}}'),
        ("cannot load", "tokenizer.json"),
        "tokenizer",
    ),
]

DATA_CASES = [
    _project(
        "data absent", None, ("data.path", "none.jsonl", "does not exist"), "data.path", ("data", "path: none.jsonl")
    ),
    _project(
        "data directory without JSONL",
        _no_jsonl,
        ("data.path", "corpus", "holds no", ".jsonl", ".parquet", ".npy"),
        "a directory that holds some",
        ("data", "path: corpus"),
    ),
    _project(
        "data directory of several kinds",
        _several_kinds,
        ("data.path", "corpus", "several kinds", "1 records (a.jsonl)", "1 text (README.txt)"),
        "/corpus/**/*.jsonl*",
        ("data", "path: corpus"),
    ),
    _project(
        "data named twice",
        None,
        ("data.path", "data.jsonl", "named twice"),
        "weight",
        ("data", "path: [data.jsonl, ./data.jsonl]"),
    ),
    _project(
        "data glob without match", None, ("data.path", "glob", "x*.jsonl"), "pattern", ("data", "path: x*.jsonl")
    ),
    _data("empty", b"", ("data.jsonl", "empty"), "at least one JSON line"),
    _data("blank lines", b"\n  \n\r\n", ("data.jsonl", "no usable document"), "data.text_column"),
    _data(
        "empty texts", b'{"text": ""}\n' * 3, ("data.jsonl", "no usable document", "3 empty texts"), "non-empty text"
    ),
    _data(
        "only bad lines, skipped",
        b"5\n[]\n{}\n",
        ("data.jsonl", "no usable document", "2 not an object", "1 no text column"),
        "non-empty text",
        ("data", "on_bad_line: skip"),
    ),
    _data(
        "no text column",
        b'{"content": "x", "id": 1}\n',
        ("data.jsonl:1:", "no key 'text'", "keys found: 'content', 'id'"),
        "data.text_column",
    ),
    _data(
        "no nested text column",
        b'{"body": {"de": "x"}}\n',
        ("data.jsonl:1:", "no key 'body.en'", "keys found: 'body'"),
        "data.text_column",
        ("data", "text_column: body.en"),
    ),
    _data("empty object", b"{}\n", ("data.jsonl:1:", "no key 'text'", "keys found: none"), "data.text_column"),
    *(
        _data(f"text is {what}", b'{"text": %s}\n' % raw, ("data.jsonl:1:", "'text' holds", what), "data.on_bad_line")
        for raw, what in ((b"null", "null"), (b"5", "a number"), (b'["a"]', "a list"), (b"true", "a boolean"))
    ),
    *(
        _data(f"line is {what}", raw + b"\n", ("data.jsonl:1:", what, "not a JSON object"), '{"text": "..."}')
        for raw, what in ((b'"abc"', "a string"), (b"[1]", "a list"), (b"5", "a number"), (b"null", "null"))
    ),
    _data(
        "line 3 of 5 is malformed",
        _LINE * 2 + b'{"text": oops}\n' + _LINE * 2,
        ("data.jsonl:3:", "malformed JSON", "column 10"),
        "data.on_bad_line: skip",
        absent="line 1 ",
    ),
    _data("cut-off last line", (_LINE * 3)[:-6], ("data.jsonl:3:", "malformed JSON"), "data.on_bad_line: skip"),
    _data(
        "a JSON array over lines",
        b'[\n{"text": "a"}\n]\n',
        ("data.jsonl:1:", "malformed JSON"),
        "line",
        absent="line 2 ",
    ),
    _data(
        "invalid UTF-8",
        _LINE + b'{"text": "\xff"}\n',
        ("data.jsonl:2:", "invalid UTF-8 at byte 10"),
        "save the file as UTF-8",
    ),
    _data("nested too deeply", b"[" * 200_000 + b"\n", ("data.jsonl:1:", "nested too deeply"), "data.on_bad_line"),
    _data("zstd cut off", zstandard.compress(_LINE * 100)[:-5], ("data.jsonl", "cut-off zstd"), "again"),
    _data("zstd damaged", b"\x28\xb5\x2f\xfd" + bytes(20), ("data.jsonl", "damaged"), "again"),
    _data("Parquet damaged", b"PAR1" + bytes(20), ("data.jsonl", "damaged Parquet"), "again"),
    _project(
        "data Parquet without the column",
        partial(_parquet, {"content": ["a", "b"]}),
        ("data.parquet", "no column 'text'", "columns found: 'content'"),
        "data.text_column",
        ("data", "path: data.parquet"),
    ),
    _project(
        "data Parquet column of numbers",
        partial(_parquet, {"text": [1, 2]}),
        ("data.parquet", "'text' holds int64, not text"),
        "data.text_column",
        ("data", "path: data.parquet"),
    ),
    _project(
        "data token ids of unknown size",
        partial(_token_ids, "ids.bin"),
        ("ids.bin", "their size is not known"),
        "data.token_dtype",
        ("data", "path: ids.bin"),
    ),
    _project(
        "data token ids beyond the tokenizer",
        partial(_token_ids, "ids.npy"),
        ("ids.npy", "id 60000 in document 1", "largest is 256"),
        "tokenizer",
        ("data", "path: ids.npy"),
        ("data", "token_dtype: uint16"),
    ),
    _project(
        "data token ids cut off",
        partial(_token_ids, "ids.bin"),
        ("ids.bin", "82 bytes", "no whole number of uint32"),
        "data.token_dtype",
        ("data", "path: ids.bin"),
        ("data", "token_dtype: uint32"),
    ),
    _data("gzip cut off", gzip.compress(_LINE * 100)[:-30], ("data.jsonl", "cut-off gzip"), "again"),
    _data(
        "gzip damaged",
        gzip.compress(_LINE * 100, mtime=0)[:10] + b"\xff" * 40,
        ("data.jsonl", "damaged"),
        "again",
    ),
    _data("shorter than a chunk", b'{"text": "abcd"}\n', ("5 tokens", "data.max_length 16"), "at most 5"),
    _data(
        "no document of two tokens",
        b'{"text": "a"}\n{"text": "b"}\n',
        "no document has two tokens",
        "longer texts",
        ("data", "packing: false"),
        ("data", "add_eos: false"),
    ),
    _project(
        "cache_dir is a file",
        None,
        ("data.cache_dir", "data.jsonl"),
        "data.cache_dir",
        ("data", "cache_dir: data.jsonl"),
    ),
]

_PATHS = (("", "model_dir"), ("", "tokenizer"), ("", "output_dir"), ("data", "path"), ("data", "cache_dir"))

OUTPUT_CASES = [
    _project(
        "output_dir is a link to nothing",
        lambda root: (root / "run").symlink_to("nowhere"),
        ("output_dir", "/run"),
        "output_dir",
    ),
    _project(
        "output_dir is a link to itself",
        lambda root: (root / "run").symlink_to("run"),
        ("output_dir", "/run"),
        "output_dir",
    ),
    Case(
        "output_dir is not UTF-8",
        ("output_dir", "UTF-8"),
        ("output_dir",),
        arguments=(*Case.arguments, "--output-dir", "run\udcff"),
    ),
    _project(
        "output_dir in use", None, ("output_dir", "/model is not empty"), "new output_dir", ("", "output_dir: model")
    ),
    _project(
        "output_dir is a file",
        None,
        ("output_dir", "data.jsonl is a file"),
        "directory",
        ("", "output_dir: data.jsonl"),
    ),
    _project(
        "output_dir below a file",
        None,
        ("output_dir", "data.jsonl/a/run", "cannot be made"),
        "set output_dir to a place",
        ("", "output_dir: data.jsonl/a/run"),
    ),
    _project(
        "output_dir not writable",
        None,
        ("output_dir", "/proc/eulerforge/run", "cannot be made"),
        "set output_dir to a place",
        ("", "output_dir: /proc/eulerforge/run"),
    ),
]

PATH_CASES = [
    *(
        _project(
            f"{key} of a user who is not there", None, (key, "~nosuchuser/x"), key, (section, f"{key}: ~nosuchuser/x")
        )
        for section, key in _PATHS
    ),
    *(
        _project(f"{key} too long", None, (key, "too long"), key, (section, f"{key}: {'x' * 5000}"))
        for section, key in _PATHS
    ),
]
"""Paths that the operating system itself refuses to look at."""

_FFT = ("", f"model_dir: {ROOT / 'presets' / 'models' / 'tiny_hybrid'}")
_TRUST = ("", "trust_remote_code: true")

PRECISION_CASES = [
    _project(
        f"FFT blocks with dtype {dtype} and amp {amp}",
        None,
        (f"dtype {dtype} with amp true", "blocks_tiny_hybrid.py calls torch.fft"),
        ("training.dtype: float32", "training.amp: false"),
        _FFT,
        _TRUST,
        ("training", f"dtype: {dtype}"),
        ("training", f"amp: {amp}"),
    )
    for dtype, amp in (("bfloat16", "null"), ("bfloat16", "true"), ("float32", "true"))
]

CASES = [
    *PRESET_CASES,
    *VALUE_CASES,
    *SOURCE_CASES,
    *CONTRADICTION_CASES,
    *SET_CASES,
    *USAGE_CASES,
    *MODEL_CASES,
    *TOKENIZER_CASES,
    *DATA_CASES,
    *OUTPUT_CASES,
    *PATH_CASES,
    *PRECISION_CASES,
]


# --- The checker ------------------------------------------------------------------------------------------------


@pytest.fixture
def project(workspace: Workspace, byte_tokenizer: Path) -> Workspace:
    """The project of `GOOD`: preset, tiny Llama, byte tokenizer and corpus, all named relative to the directory."""
    write_llama(workspace.path / "model")
    shutil.copytree(byte_tokenizer, workspace.path / "tokenizer")
    workspace.raw("data.jsonl", _LINE * 5)
    workspace.raw("preset.yml", GOOD.encode())
    return workspace


def _write(case: Case, project: Workspace) -> None:
    project.raw("preset.yml", case.preset if isinstance(case.preset, bytes) else case.preset.encode())
    if case.prepare is not None:
        case.prepare(project.path)


def _snapshot(project: Workspace) -> Mapping[str, bytes | None]:
    """Every path in the working directory and in the caches, with the content of files."""
    roots = (project.path, Path(os.environ["XDG_CACHE_HOME"]))
    paths = [path for root in roots for path in root.rglob("*")]
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def _require_lines(
    result: Result, code: int, error: tuple[str, ...], fix: tuple[str, ...], absent: tuple[str, ...] = ()
) -> None:
    """Exit code, and exactly the lines `Error:`, `Fix:` and `See:` on stderr, holding what they must."""
    assert result.code == code, result.err
    assert "Traceback" not in result.out + result.err
    lines = result.err.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["Error:", "Fix:", "See:"], result.err
    for line, fragments in zip(lines, (error, fix, ()), strict=True):
        assert line.partition(" ")[2].strip(), result.err
        assert not line.endswith(":"), f"cut off: {result.err}"
        for fragment in fragments:
            assert fragment in line, result.err
    for fragment in absent:
        assert fragment not in result.err


def test_every_case_has_its_own_name() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_three_lines_and_leaves_nothing(project: Workspace, case: Case) -> None:
    _write(case, project)
    before = _snapshot(project)
    result = run_here(*case.arguments)
    _require_lines(result, 2, (*case.place, *case.error), case.fix, case.absent)
    assert _snapshot(project) == before


@pytest.mark.parametrize("name", ["training.max_steps=1.5", "weight renamed", "data invalid UTF-8"])
def test_bad_input_as_a_user_meets_it(project: Workspace, name: str) -> None:
    """In a process of its own, where libraries may print to stderr what redirection in this process misses."""
    (case,) = (case for case in CASES if case.name == name)
    _write(case, project)
    before = _snapshot(project)
    result = run_command(*case.arguments, cwd=project.path)
    _require_lines(result, 2, (*case.place, *case.error), case.fix, case.absent)
    assert _snapshot(project) == before


def test_a_pipe_is_refused_not_waited_for(project: Workspace) -> None:
    """A corpus is read more than once, which a pipe does not allow; opening one without a writer waits forever."""
    (project.path / "data.jsonl").unlink()
    os.mkfifo(project.path / "data.jsonl")
    result = run_command(*Case.arguments, cwd=project.path, timeout=10)
    _require_lines(result, 2, ("data.path", "data.jsonl", "not a regular file"), ("JSONL",))


@pytest.mark.parametrize(
    ("arguments", "error", "fix"),
    [
        (("--nproc", "0"), "--nproc 0", "1 or more"),
        (("--nproc", "two"), "invalid int value", "--help"),
        (("--nnodes", "2"), "--node-rank", "--node-rank"),
        (("--nnodes", "2", "--node-rank", "2", "--rdzv-endpoint", "h:1"), "--node-rank 2", "0 to 1"),
        (("--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", "h"), "HOST:PORT", "node0:29500"),
        (("--node-rank", "0"), "--node-rank 0", "--nnodes"),
        (("--nproc", "3", "--set", "training.global_batch_size=4"), "global_batch_size 4", "multiple"),
        (
            ("--nproc", "3", "--set", "distributed.replicate=2", "--set", "distributed.strategy=fsdp"),
            "distributed.replicate 2 does not divide the 3 processes",
            "divisor",
        ),
        (("--set", "distributed.replicate=2"), "distributed.replicate", "distributed.strategy: fsdp"),
    ],
)
def test_bad_numbers_of_processes(project: Workspace, arguments: tuple[str, ...], error: str, fix: str) -> None:
    before = _snapshot(project)
    _require_lines(run_here(*Case.arguments, *arguments), 2, (error,), (fix,))
    assert _snapshot(project) == before


# --- Several problems at once -----------------------------------------------------------------------------------


def _require_list(result: Result, *faults: tuple[str, str]) -> None:
    """One error that numbers all faults, given as fragments of (problem, fix), and names the pages once."""
    assert result.code == 2, result.err
    lines = result.err.splitlines()
    assert lines[0] == f"Error: {len(faults)} problems", result.err
    assert len(lines) == 2 * len(faults) + 2, result.err
    assert lines[-1].startswith("See: ")
    problems = list(zip(lines[1:-1:2], lines[2:-1:2], strict=True))
    for number, (problem, fix) in enumerate(problems, 1):
        assert problem.startswith(f"  {number}. ")
        assert fix.startswith("     Fix: ")
    for what, remedy in faults:
        assert any(what in problem and remedy in fix for problem, fix in problems), (what, remedy, result.err)


def test_all_faults_of_a_preset_are_told_at_once(project: Workspace) -> None:
    text = _with(
        ("training", "lr: fast"),
        ("training", "max_steps: 1.5"),
        ("training", "betas: [0.9]"),
        ("data", "pakking: true"),
        ("", "device: gpu"),
        text=_without("model_dir"),
    )
    project.raw("preset.yml", text.encode())
    before = _snapshot(project)
    result = run_here(*Case.arguments, "--set", "training.seed", "--set", "moe.experts=4")
    lines = [line.strip() for line in text.splitlines()]

    def at(line: str) -> str:
        return f"preset.yml:{lines.index(line) + 1}:"

    _require_list(
        result,
        ("--set training.seed: ", "section.key=value"),
        ("--set moe.experts: ", "remove moe"),
        (f"{at('device: gpu')} device: ", "cpu"),
        ("preset.yml: model_dir: required", "add model_dir"),
        (f"{at('pakking: true')} data.pakking: unknown key", "data.packing"),
        (f"{at('max_steps: 1.5')} training.max_steps: ", "training.max_steps"),
        (f"{at('lr: fast')} training.lr: ", "training.lr"),
        (f"{at('betas: [0.9]')} training.betas: ", "[0.9, 0.95]"),
    )
    assert _snapshot(project) == before


def test_rules_between_keys_are_told_at_once(project: Workspace) -> None:
    project.raw(
        "preset.yml",
        _with(
            ("training", "warmup_steps: 9"),
            ("training", "global_batch_size: 3"),
            ("training", "dtype: float16"),
            ("training", "amp: false"),
        ).encode(),
    )
    _require_list(
        run_here(*Case.arguments),
        ("training.warmup_steps: ", "training.max_steps"),
        ("training.global_batch_size: ", "multiple"),
        ("training.amp: ", "leave amp unset"),
    )


def test_all_faults_of_what_a_preset_names_are_told_at_once(project: Workspace) -> None:
    _custom(project.path, _MARKER, max_position_embeddings=8)
    project.raw(
        "preset.yml",
        _with(("data", "path: none.jsonl"), ("", "tokenizer: ./none"), ("", "output_dir: model")).encode(),
    )
    before = _snapshot(project)
    result = run_here(*Case.arguments)
    _require_list(
        result,
        ("none.jsonl does not exist", "data.path"),
        ("/model is not empty", "output_dir"),
        ("tokenizer: ./none", "tokenizer"),
        ("trust_remote_code is false", "trust_remote_code: true"),
        ("data.max_length 16", "lower data.max_length to 8"),
    )
    see = result.err.splitlines()[-1]
    for page in ("docs/data.md", "docs/output.md", "docs/models.md"):
        assert see.count(page) == 1
    assert _snapshot(project) == before


# --- What must not be taken for bad input -----------------------------------------------------------------------


def test_the_project_that_all_cases_spoil_is_good(project: Workspace) -> None:
    """Otherwise a case could pass for a reason that is not its own."""
    before = _snapshot(project)
    result = run_here(*Case.arguments, "--validate-only")
    assert result.code == 0, result.err
    assert result.err == ""
    lines = result.out.splitlines()
    assert "[Pretrain] Config validation passed." in lines
    assert f"[Pretrain] model_dir: {project.path / 'model'}" in lines
    assert "[Pretrain] data.path: data.jsonl" in lines
    assert "[Pretrain] training.max_steps: 3" in lines
    assert _snapshot(project) == before
    result = run_here(*Case.arguments)
    assert result.code == 0, result.err
    assert (project.path / "run" / "final" / "model.safetensors").is_file()


def test_custom_code_runs_only_when_it_is_trusted(project: Workspace) -> None:
    """The marker that untrusted code must not leave is one that trusted code does leave."""
    _custom(project.path, _MARKER)
    project.raw("preset.yml", _with(_TRUST).encode())
    result = run_here(*Case.arguments, "--validate-only")
    assert result.code == 0, result.err
    assert (project.path / "imported").exists()


def test_weights_in_the_old_format_of_torch_are_read(project: Workspace) -> None:
    path = _weights(project.path)
    torch.save(load_file(path), path.with_name("pytorch_model.bin"), _use_new_zipfile_serialization=False)
    path.unlink()
    result = run_here(*Case.arguments)
    assert result.code == 0, result.err
    assert "(pytorch_model.bin)" in result.out


@pytest.mark.parametrize(
    "stack", [5, [], {"pattern": 5}, {"pattern": None, "tail": [1]}, {"tail": {"block": "hyena"}}]
)
def test_a_key_named_stack_need_not_be_that_of_eulerstack(project: Workspace, stack: Any) -> None:
    """Any model may have a key of that name; only EulerStack's shape means something."""
    _configure(project.path, stack=stack)
    result = run_here(*Case.arguments, "--validate-only")
    assert result.code == 0, result.err


def test_precision_check_warn_turns_the_fft_rule_into_a_warning(project: Workspace) -> None:
    project.raw(
        "preset.yml",
        _with(
            _FFT,
            _TRUST,
            ("training", "dtype: bfloat16"),
            ("training", "amp: true"),
            ("training", "precision_check: warn"),
        ).encode(),
    )
    before = _snapshot(project)
    result = run_here(*Case.arguments, "--validate-only")
    assert result.code == 0, result.err
    (warning,) = (line for line in result.out.splitlines() if line.startswith("[Pretrain] Warning: "))
    assert "blocks_tiny_hybrid.py calls torch.fft" in warning
    assert _snapshot(project) == before


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ((*Case.arguments, "--dry-run"), "Resolved preset:"),
        (("--help",), "pretrain"),
        (("pretrain", "--help"), "--validate-only"),
        (("--version",), "eulerforge 0."),
        (("schema",), '"max_steps"'),
    ],
    ids=("dry-run", "help", "pretrain-help", "version", "schema"),
)
def test_answers_without_training_load_no_torch_and_write_nothing(
    project: Workspace, arguments: tuple[str, ...], shown: str
) -> None:
    before = _snapshot(project)
    program = f"""
import sys
from eulerforge.cli import main
try:
    code = main({list(arguments)!r})
except SystemExit as stop:
    code = stop.code
print("END", code, [name for name in ("torch", "transformers", "tokenizers") if name in sys.modules])
"""
    result = run_python("-c", program, cwd=project.path, PYTHONPATH=str(ROOT))
    assert result.err == ""
    assert shown in result.out
    assert result.out.splitlines()[-1] == "END 0 []"
    assert _snapshot(project) == before


# --- Failures while training ------------------------------------------------------------------------------------


def _break_at_step_two(project: Workspace, kind: str) -> None:
    _custom(project.path, kind=kind, at=2)
    project.raw("preset.yml", _with(_TRUST, ("training", "save_steps: 1"), ("training", "log_steps: 1")).encode())


def _require_failed_run(project: Workspace, reason: str) -> None:
    """status.json tells step and reason, the checkpoint of step 1 is whole, and there is no final/."""
    status = project.status()
    assert (status["status"], status["step"]) == ("failed", 1)
    assert reason in status["reason"]
    assert [record["step"] for record in project.metrics()] == [1]
    names = {path.name for path in (project.path / "run").iterdir()}
    assert "checkpoint-1" in names
    assert (project.path / "run" / "checkpoint-1" / "model.safetensors").is_file()
    assert not [name for name in names if "final" in name or "tmp" in name or name == "checkpoint-2"]


@pytest.mark.parametrize(("kind", "shown"), [("nan", "loss is nan"), ("grad", "grad_norm is ")])
def test_numbers_that_are_not_finite_end_the_run_without_a_traceback(
    project: Workspace, kind: str, shown: str
) -> None:
    _break_at_step_two(project, kind)
    result = run_here(*Case.arguments)
    _require_lines(result, 1, (f"step 2: {shown}", "earlier checkpoints are kept"), ("training.lr",))
    _require_failed_run(project, shown)


def test_a_model_that_breaks_is_a_crash_with_its_traceback(project: Workspace) -> None:
    """Not the user's input, so nothing is hidden: the exception leaves, and Python makes it exit code 1."""
    _break_at_step_two(project, "raise")
    with pytest.raises(RuntimeError, match="the model broke on purpose"):
        run_here(*Case.arguments)
    _require_failed_run(project, "RuntimeError: the model broke on purpose")


def test_a_crash_is_exit_code_one(project: Workspace) -> None:
    _break_at_step_two(project, "raise")
    result = run_command(*Case.arguments, cwd=project.path)
    assert result.code == 1
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1] == "RuntimeError: the model broke on purpose"
    _require_failed_run(project, "RuntimeError: the model broke on purpose")


def test_logits_of_a_wrong_shape_are_told_without_a_traceback(project: Workspace) -> None:
    """Exit code 2 promises that nothing was written: then it must be found before the run directory is made."""
    wrong = "KitModel.forward = lambda self, input_ids: CausalLMOutput(logits=torch.zeros(1, 1))"
    _custom(project.path, f"\n\n{wrong}\n")
    project.raw("preset.yml", _with(_TRUST).encode())
    before = _snapshot(project)
    result = run_here(*Case.arguments)
    _require_lines(result, result.code, ("logits of [1, 1]", "[2, 16]"), ("logits",))
    if result.code == 2:
        assert _snapshot(project) == before
    else:
        assert result.code == 1
        assert project.status()["status"] == "failed"
