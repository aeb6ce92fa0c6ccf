"""Preset file + `--set` overrides -> `LoadedPreset`, or one error that lists everything that is wrong.

read text -> parse_yaml -> apply overrides -> pydantic -> cross-field checks -> frozen preset
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from eulerforge.config.checks import cross_field_problems
from eulerforge.config.fields import describe
from eulerforge.config.schema import PretrainPreset
from eulerforge.config.yaml_source import KeyPath, YamlDocument, parse_scalar, parse_yaml
from eulerforge.errors import PresetError, Problem

_FOREIGN_NAMES = {
    "block_size": "data.max_length",
    "epochs": "training.max_steps",
    "gradient_accumulation_steps": "training.grad_accum_steps",
    "gradient_checkpointing": "training.activation_checkpointing",
    "learning_rate": "training.lr",
    "logging_steps": "training.log_steps",
    "lr_scheduler_type": "training.scheduler",
    "max_seq_length": "data.max_length",
    "max_train_steps": "training.max_steps",
    "micro_batch_size": "training.batch_size",
    "num_epochs": "training.max_steps",
    "num_train_epochs": "training.max_steps",
    "per_device_train_batch_size": "training.batch_size",
    "precision": "training.dtype",
    "seq_len": "data.max_length",
    "text_field": "data.text_column",
    "text_key": "data.text_column",
}
"""What other trainers call our keys."""

_FINETUNE_KEYS = ("injection", "moe", "backbone")


@dataclass(frozen=True)
class LoadedPreset:
    """A valid preset and where it came from.

    Attributes:
        preset: the typed values.
        path: the file.
        overrides: the `--set` arguments as given.
        given: dotted names of all keys that the user set (file or `--set`), for defaults that depend on it.
    """

    preset: PretrainPreset
    path: Path
    overrides: tuple[str, ...]
    given: frozenset[str]


def load_preset(path: Path, overrides: Sequence[str] = ()) -> LoadedPreset:
    """Read and check a preset.

    Raises:
        PresetError: with every problem found, each with file and line or the `--set` that caused it.
    """
    document = parse_yaml(_read(path), str(path))
    if document.values is None:
        raise PresetError(
            f"{path}: the preset is empty", "write at least model_dir, data.path and training.max_steps"
        )
    if not isinstance(document.values, dict):
        raise PresetError(f"{path}:1: a preset is a mapping of keys", "start with lines such as `model_dir: ...`")
    places = _Places(str(path), document)
    problems = list(_apply_overrides(document, overrides, places))
    problems += _finetune_key_problems(document.values, places)
    preset: PretrainPreset | None = None
    try:
        preset = PretrainPreset.model_validate(document.values)
    except ValidationError as error:
        problems += _schema_problems(error.errors(), places)
    if preset is not None:
        problems += [Problem(f"{places.of(key)}: {what}", fix) for key, what, fix in cross_field_problems(preset)]
    if problems or preset is None:
        raise PresetError.of(problems)
    return LoadedPreset(preset, path, tuple(overrides), frozenset(_leaves(document.values)))


class _Places:
    """Turns a key path into `file:line: a.b` or `--set a.b`."""

    def __init__(self, name: str, document: YamlDocument) -> None:
        self._name = name
        self._lines = document.lines
        self.overridden: set[KeyPath] = set()

    def of(self, dotted: str, path: KeyPath | None = None) -> str:
        path = path or tuple(dotted.split("."))
        for length in range(len(path), 0, -1):
            if path[:length] in self.overridden:
                return f"--set {dotted}"
            if path[:length] in self._lines:
                return f"{self._name}:{self._lines[path[:length]]}: {dotted}"
        return f"{self._name}: {dotted}"


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise PresetError(
            f"preset not found: {path}", "give the path of an existing YAML file with --preset"
        ) from None
    except IsADirectoryError:
        raise PresetError(f"preset is a directory: {path}", "give the path of a YAML file with --preset") from None
    except UnicodeDecodeError as error:
        raise PresetError(f"{path}: not UTF-8 text (byte {error.start})", "save the preset as UTF-8") from None
    except OSError as error:
        raise PresetError(f"cannot read preset {path}: {error.strerror}", "check the path and permissions") from None


def _apply_overrides(document: YamlDocument, overrides: Sequence[str], places: _Places) -> Iterator[Problem]:
    """Write each `a.b=value` into the values, so that the schema sees one tree."""
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted.strip():
            missing = "no key before '='" if equals else "no '=' found"
            yield Problem(f"--set {override}: {missing}", "write it as --set section.key=value")
            continue
        path = tuple(part.strip() for part in dotted.split("."))
        unknown = _unknown_path(path)
        if unknown is not None:
            yield unknown
            continue
        try:
            value = parse_scalar(text)
        except PresetError as error:
            reason = error.problems[0].what.removeprefix("--set:1: ")
            yield Problem(
                f"--set {override}: {reason}", "quote the value as YAML text, for example --set 'key=\"*.x\"'"
            )
            continue
        node = document.values
        for part in path[:-1]:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                break  # the schema reports the section that is not a mapping
        else:
            node[path[-1]] = value
        places.overridden.add(path)


def _unknown_path(path: KeyPath) -> Problem | None:
    section: type[BaseModel] | None = PretrainPreset
    for depth, part in enumerate(path):
        if section is None:
            leaf = ".".join(path[:depth])
            return Problem(
                f"--set {'.'.join(path)}: unknown key, {leaf} has no keys below it", f"write --set {leaf}=..."
            )
        if part not in section.model_fields:
            dotted = ".".join(path)
            if path[0] in _FINETUNE_KEYS:
                return _finetune_problem(f"--set {dotted}", path[0])
            return Problem(f"--set {dotted}: unknown key", _nearest(".".join(path[: depth + 1])))
        section = _subsection(section, part)
    return None


def _subsection(section: type[BaseModel], key: str) -> type[BaseModel] | None:
    annotation = section.model_fields[key].annotation
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _finetune_problem(place: str, key: str) -> Problem:
    return Problem(
        f"{place}: this key belongs to `eulerforge train` (LoRA fine-tuning), not to a pretrain preset",
        f"remove {key}; pretraining trains all parameters",
    )


def _finetune_key_problems(values: Mapping[str, Any], places: _Places) -> list[Problem]:
    return [_finetune_problem(places.of(key), key) for key in _FINETUNE_KEYS if key in values]


def known_keys() -> list[str]:
    """Dotted names of all preset keys, sections included."""
    return list(_known_keys(PretrainPreset, ()))


def _known_keys(section: type[BaseModel], prefix: KeyPath) -> Iterator[str]:
    for key in section.model_fields:
        yield ".".join((*prefix, key))
        child = _subsection(section, key)
        if child is not None:
            yield from _known_keys(child, (*prefix, key))


def _nearest(dotted: str) -> str:
    """Advice for an unknown key: the right section for a known name, else the nearest name."""
    leaf = dotted.rpartition(".")[2].replace("-", "_")
    # Outer keys win: `path` alone means data.path, not data.validation.path.
    names = {key.rpartition(".")[2]: key for key in reversed(known_keys())}
    if leaf in names:
        return f"write it as {names[leaf]}"
    # Every key by its own name and by its full one; and what other trainers call it.
    candidates = {**_FOREIGN_NAMES, **{key: key for key in names.values()}, **names}
    close = difflib.get_close_matches(dotted.replace("-", "_"), candidates, n=1, cutoff=0.8)
    close = close or difflib.get_close_matches(leaf, candidates, n=1, cutoff=0.7)
    return f"did you mean {candidates[close[0]]}?" if close else "remove it; `eulerforge schema` lists the known keys"


def _schema_problems(errors: Iterable[ErrorDetails], places: _Places) -> Iterator[Problem]:
    reported: set[str] = set()
    for error in errors:
        path = tuple(str(part) for part in _key_parts(error["loc"]))
        dotted = ".".join(path)
        if dotted in _FINETUNE_KEYS or dotted in reported:
            continue
        reported.add(dotted)
        yield _schema_problem(error, path, places)


def _key_parts(location: tuple[int | str, ...]) -> Iterator[int | str]:
    """The key path of an error, without pydantic's own union and type markers."""
    section: type[BaseModel] | None = PretrainPreset
    for part in location:
        if section is None:
            return
        yield part
        section = _subsection(section, str(part)) if str(part) in section.model_fields else None


def _schema_problem(error: ErrorDetails, path: KeyPath, places: _Places) -> Problem:
    kind, context = error["type"], error.get("ctx", {})
    dotted = ".".join(path)
    place = places.of(dotted, path)
    if kind == "extra_forbidden":
        return Problem(f"{place}: unknown key", _nearest(dotted))
    if kind == "missing" and dotted == ".".join(map(str, error["loc"])):
        return Problem(f"{place}: required key is missing", f"add {dotted} to the preset")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        advice = f"indent the keys of {dotted} below it, or set them one by one with --set {dotted}.key=value"
        return Problem(f"{place}: must be a mapping of keys, not {describe(error['input'])}", advice)
    if kind == "literal_error":
        return Problem(f"{place}: must be {context['expected']}, not {error['input']!r}", "use one of those values")
    if kind == "value_error":
        return Problem(f"{place}: {context['error']}", f"correct {dotted}")
    if kind == "string_pattern_mismatch":
        return Problem(f"{place}: {error['input']!r} is not a device", "use cuda, cuda:N or cpu")
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if kind in bounds:
        words = kind.replace("_", " ").replace("than equal", "than or equal to")
        return Problem(
            f"{place}: must be {words} {context[bounds[kind]]:g}, not {error['input']!r}", f"correct {dotted}"
        )
    if kind in ("tuple_type", "too_short", "too_long", "missing"):
        return Problem(f"{place}: must be a list of two numbers", f"write {dotted}: [0.9, 0.95]")
    return Problem(f"{place}: {error['msg'][:1].lower()}{error['msg'][1:]}", f"correct {dotted}")


def _leaves(values: Mapping[str, Any], prefix: KeyPath = ()) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*prefix, key))
        else:
            yield ".".join((*prefix, key))
