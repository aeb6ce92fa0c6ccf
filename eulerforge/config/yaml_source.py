"""YAML text -> plain values + the line of every key.

PyYAML reads YAML 1.1, which surprises people who write training presets: `010` is 8, `1:30` is 90, `2024-01-01` is a
date, `3e-4` is text, and a repeated key silently replaces the first. This loader keeps PyYAML's syntax and mends the
values: plain decimal integers, floats with or without a dot, no dates, no octal or sexagesimal numbers, and a
repeated key is an error. Each key's line is kept so that an error of the schema can say where.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import yaml

from eulerforge.errors import PresetError, Problem

KeyPath = tuple[str, ...]


@dataclass
class YamlDocument:
    """A parsed preset: `values` as written, `lines[("training", "lr")]` = 1-based line of that key."""

    values: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalar rules of YAML 1.2's core schema (plus 1.1's yes/no/on/off booleans)."""


_KEPT = {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""(?x) [-+]? (?: (?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+) (?:[eE][-+]?[0-9]+)?
            | [0-9][0-9_]* [eE][-+]?[0-9]+
            | \.(?:inf|Inf|INF) ) $ | \.(?:nan|NaN|NAN)$"""
    ),
    list("-+0123456789."),
)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse_yaml(text: str, name: str) -> YamlDocument:
    """Parse one YAML document.

    Args:
        text: the file's content.
        name: the file's name for messages.

    Raises:
        PresetError: syntax error (with line), duplicate key, or a key that is not text.
    """
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return YamlDocument(values=None)
        document = YamlDocument(values=None)
        problems: list[Problem] = []
        _index(node, (), loader, document.lines, problems, name, set())
        if problems:
            raise PresetError.of(problems)
        document.values = loader.construct_document(node)
        return document
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if error.context_mark is not None and mark is not None and mark.line >= len(text.splitlines()):
            mark = error.context_mark  # an open bracket or quote is found at the end, but was made where it began
        place = f"{name}:{mark.line + 1}" if mark else name
        reason = " ".join(part for part in (error.context, error.problem) if part)
        raise PresetError(
            f"{place}: not valid YAML: {reason}",
            "correct the YAML syntax at that line (check indentation and quotes)",
        ) from None
    except yaml.reader.ReaderError as error:
        raise PresetError(
            f"{name}: not valid YAML text: {error.reason} at character {error.position}",
            "save the preset as UTF-8 text without control characters",
        ) from None
    except (ValueError, RecursionError) as error:
        raise PresetError(f"{name}: cannot read a value: {error}", "correct that value") from None
    finally:
        if loader is not None:
            loader.dispose()


def parse_scalar(text: str) -> Any:
    """The value of one `--set` override, read by the same rules as a value in a preset."""
    if not text.strip():
        return None
    return parse_yaml(text, "--set").values


def _index(
    node: yaml.Node,
    path: KeyPath,
    loader: _Loader,
    lines: dict[KeyPath, int],
    problems: list[Problem],
    name: str,
    open_nodes: set[int],
) -> None:
    """Record the line of every key below `node` and collect duplicate or non-text keys."""
    if not isinstance(node, yaml.MappingNode) or id(node) in open_nodes:
        return
    open_nodes = open_nodes | {id(node)}
    seen: dict[Hashable, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            if isinstance(key_node, yaml.ScalarNode):
                shown = key_node.value
                problems.append(Problem(f"{name}:{line}: the key {shown} is not text", f'quote it: "{shown}"'))
            else:
                problems.append(Problem(f"{name}:{line}: the key is a list or mapping", "write a name as the key"))
            continue
        if key in seen:
            what = f"{name}:{line}: duplicate key {'.'.join((*path, key))} (first on line {seen[key]})"
            problems.append(Problem(what, "remove one of the two"))
            continue
        seen[key] = line
        lines[(*path, key)] = line
        _index(value_node, (*path, key), loader, lines, problems, name, open_nodes)
