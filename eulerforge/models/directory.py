"""Static look at a Hugging Face model directory: no torch, no transformers, nothing of it imported.

`ModelDirectory.read` parses config.json and walks the custom code that `auto_map` reaches (through relative imports),
which is enough to say, before anything heavy is loaded, whether the directory can be trained and what it contains.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eulerforge.errors import ModelError

WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""In the order in which transformers looks for them."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_CONTEXT_KEYS = (
    "max_position_embeddings",
    "max_seq_len",
    "n_positions",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
)


@dataclass(frozen=True)
class ModelDirectory:
    """What is known about a model directory without loading it.

    Attributes:
        path: absolute path.
        config: config.json as parsed.
        code: custom Python files that `auto_map` needs, by path relative to the directory.
        weights: the weight file (or index) there is, None for a directory without weights.
    """

    path: Path
    config: Mapping[str, Any]
    code: Mapping[str, ast.Module]
    weights: Path | None

    @classmethod
    def read(cls, path: Path) -> ModelDirectory:
        """Look at a directory.

        Raises:
            ModelError: no directory, no or broken config.json, missing or broken custom code.
        """
        path = path.absolute()
        if not path.is_dir():
            found = "a file" if path.exists() else "nothing"
            raise ModelError(
                f"model_dir: {path} is not a directory ({found} there)",
                "set model_dir to a directory with a config.json (EulerStack: `eulerstack compile --output-dir DIR`)",
            )
        config = _read_config(path / "config.json")
        code = _reachable_code(path, config)
        return cls(path, config, code, find_weights(path))

    @property
    def auto_map(self) -> Mapping[str, Any]:
        """`auto_map` of config.json: which class of which file implements what."""
        auto_map = self.config.get("auto_map")
        return auto_map if isinstance(auto_map, dict) else {}

    @property
    def has_custom_code(self) -> bool:
        """Whether building the model runs Python from this directory."""
        return bool({"AutoConfig", "AutoModelForCausalLM"} & set(self.auto_map))

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the model."""
        return any((self.path / name).is_file() for name in TOKENIZER_FILES)

    @property
    def suggested_tokenizer(self) -> str | None:
        """The tokenizer that config.json names (EulerStack: `tokenizer.pretrained`)."""
        section = self.config.get("tokenizer")
        name = section.get("pretrained") if isinstance(section, dict) else None
        return name if isinstance(name, str) and name else None

    @property
    def context_length(self) -> tuple[str, int] | None:
        """The config key that bounds the sequence length and its value, None if there is none."""
        for key in _CONTEXT_KEYS:
            value = self.config.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return key, value
        return None

    def missing_packages(self) -> list[str]:
        """Top-level packages that the custom code imports at load time and that are not installed."""
        names = {name for tree in self.code.values() for name in _absolute_imports(tree)}
        return sorted(name for name in names if name not in sys.builtin_module_names and not _is_installed(name))

    def files_calling_fft(self) -> list[str]:
        """Custom code files that refer to `torch.fft` (by attribute or import)."""
        return sorted(name for name, tree in self.code.items() if _refers_to_fft(tree))


def find_weights(path: Path) -> Path | None:
    """The weight file (or index) in a directory, None if there is none."""
    return next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(
            f"model_dir: {path.parent} has no config.json", "point model_dir at a Hugging Face model directory"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}", "correct or re-export config.json") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}", "check the permissions") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: must hold a JSON object", "correct or re-export config.json")
    if "model_type" not in config and "auto_map" not in config:
        raise ModelError(
            f"{path}: has neither model_type nor auto_map, so no model class can be found",
            "re-export the model, or add model_type",
        )
    return config


def _entry_modules(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(auto class, module name) for each `auto_map` entry that lives in the directory itself."""
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, dict):
        return
    for auto_class, references in auto_map.items():
        for reference in references if isinstance(references, list) else [references]:
            if reference is None or (isinstance(reference, str) and "--" in reference):
                continue  # nothing (a tokenizer without its slow form), or code of a hub repository
            parts = reference.split(".") if isinstance(reference, str) else []
            if len(parts) != 2 or not all(part.isidentifier() for part in parts):
                raise ModelError(
                    f"config.json auto_map.{auto_class}: {reference!r} is not of the form file.Class",
                    "name a Python file beside config.json, without .py, and a class in it",
                )
            yield auto_class, parts[0]


def _reachable_code(root: Path, config: Mapping[str, Any]) -> dict[str, ast.Module]:
    """Parse every file that `auto_map` reaches, following relative imports (also those inside functions)."""
    found: dict[str, ast.Module] = {}
    queue = [(f"{module}.py", f"config.json auto_map.{auto_class}") for auto_class, module in _entry_modules(config)]
    while queue:
        name, wanted_by = queue.pop()
        if name in found:
            continue
        path = root / name
        try:
            found[name] = ast.parse(path.read_bytes(), filename=str(path))
        except OSError as error:
            fault = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            raise ModelError(
                f"{path} {fault}, wanted by {wanted_by}",
                "copy the file into model_dir or re-export the model",
            ) from None
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None)
            place = f"{path}:{line}" if line else str(path)
            raise ModelError(f"{place}: not valid Python: {error.args[0]}", "correct the model's code") from None
        queue += [(f"{module}.py", name) for module in _relative_imports(found[name], path)]
    return found


def _relative_imports(tree: ast.Module, path: Path) -> Iterator[str]:
    """Names of the modules beside `path` that it imports.

    transformers copies the files of `from .name import ...` and no others, so any other relative import fails there.
    """
    at_import = set(map(id, _import_time_statements(tree)))
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        if node.level == 1 and node.module and "." not in node.module and not (path.parent / node.module).is_dir():
            yield node.module
        elif id(node) in at_import:
            raise ModelError(
                f"{path}:{node.lineno}: transformers cannot load this relative import of custom code",
                "keep the code in one flat folder and write `from .name import ...`",
            )


def _absolute_imports(tree: ast.Module) -> Iterator[str]:
    """Packages imported when the module is loaded."""
    for node in _import_time_statements(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def _import_time_statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run whenever the module is loaded: not inside functions, `try` or `if`."""
    queue: list[ast.stmt] = list(tree.body)
    while queue:
        node = queue.pop()
        yield node
        if isinstance(node, ast.ClassDef | ast.With):
            queue += node.body


def _is_installed(package: str) -> bool:
    try:
        return package in sys.modules or importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _refers_to_fft(tree: ast.Module) -> bool:
    """`import torch.fft`, `from torch import fft`, `from torch.fft import ...`, or `torch.fft` under any alias."""
    nodes = list(ast.walk(tree))
    imports = [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    torch_names = {"torch"} | {alias.asname for alias in imports if alias.name == "torch" and alias.asname}
    return (
        any(alias.name == "torch.fft" for alias in imports)
        or any(node.module == "torch.fft" for node in froms)
        or any(node.module == "torch" and "fft" in [alias.name for alias in node.names] for node in froms)
        or any(
            isinstance(node, ast.Attribute)
            and node.attr == "fft"
            and isinstance(node.value, ast.Name)
            and node.value.id in torch_names
            for node in nodes
        )
    )
