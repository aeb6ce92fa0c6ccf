"""The import diagram and the lists of ARCHITECTURE.md and docs/ are true."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eulerforge.config.load import known_keys

ROOT = Path(__file__).parent.parent
LAYERS = (
    {"errors", "files"},
    {"config"},
    {"precision", "models"},
    {"distributed", "optim", "data", "metrics"},
    {"memory"},
    {"train"},
    {"preflight"},
    {"corpus"},
    {"loading", "inspection", "rehearsal"},
    {"assembly"},
    {"worker", "quickstart"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
"""From the bottom up, as ARCHITECTURE.md draws them."""

HEAVY = {"torch", "transformers", "tokenizers", "numpy", "safetensors", "tensorboard", "pyarrow", "zstandard"}
LIGHT_MODULES = (
    "cli",
    "preflight",
    "quickstart",
    "config.load",
    "config.hints",
    "models.directory",
    "models.blocks",
    "precision.plan",
    "data.sources",
    "data.readers",
    "data.order",
    "train.run_directory",
    "train.resume",
    "train.signals",
    "metrics.console",
)
"""What `--help` and all checks before the model import: none of HEAVY, at any depth, outside functions."""


def _modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _group(module: str) -> str | None:
    """`eulerforge.data.rows` -> `data`; None for what is not below eulerforge."""
    parts = module.split(".")
    return parts[1] if parts[0] == "eulerforge" and len(parts) > 1 else None


def _layer(group: str) -> int:
    return next(index for index, groups in enumerate(LAYERS) if group in groups)


@pytest.mark.parametrize("path", _modules("eulerforge"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[1] == "__init__":
        return
    own, groups = parts[1], {group for layer in LAYERS for group in layer}
    for module in _imports(ast.parse(path.read_text(encoding="utf-8"))):
        target = _group(module)
        if target is None or target == own or target not in groups:
            continue
        assert _layer(target) < _layer(own), f"{'.'.join(parts)} must not import {module}"


@pytest.mark.parametrize("path", _modules("launch"), ids=lambda path: str(path.relative_to(ROOT)))
def test_launch_knows_nothing_of_eulerforge(path: Path) -> None:
    allowed = set(sys.stdlib_module_names) | {"launch", "psutil", "torch"}
    for module in _imports(ast.parse(path.read_text(encoding="utf-8"))):
        assert module.split(".")[0] in allowed, module


def test_every_module_has_a_docstring_and_a_layer() -> None:
    for path in (*_modules("eulerforge"), *_modules("launch")):
        text = path.read_text(encoding="utf-8")
        if path.name == "__init__.py" and not text:
            continue
        assert ast.get_docstring(ast.parse(text)), path
    for path in (ROOT / "eulerforge").iterdir():
        if path.suffix == ".py" or (path / "__init__.py").is_file():
            assert path.stem == "__init__" or _layer(path.stem) >= 0


@pytest.mark.parametrize("name", LIGHT_MODULES)
def test_light_modules_stay_light(name: str) -> None:
    """By the import statements at the top of each module that it reaches."""
    seen: set[str] = set()
    queue = [f"eulerforge.{name}"]
    while queue:
        module = queue.pop()
        if module in seen:
            continue
        seen.add(module)
        assert module.split(".")[0] not in HEAVY, f"{name} reaches {module}"
        base = ROOT / Path(*module.split("."))
        file = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
        if module.startswith("eulerforge") and file.is_file():
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                queue += _imports(node) if isinstance(node, ast.Import | ast.ImportFrom) else []


def test_architecture_page_names_every_module() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for path in (*_modules("eulerforge"), *_modules("launch")):
        if not path.name.startswith("__"):
            assert path.name in page, f"{path.relative_to(ROOT)} is missing in ARCHITECTURE.md"
    for group in {group for layer in LAYERS for group in layer} - {"__main__"}:
        assert group in page


def test_preset_page_lists_every_key() -> None:
    page = (ROOT / "docs" / "preset.md").read_text(encoding="utf-8")
    sections = {"data", "training", "distributed"}
    assert [key for key in known_keys() if key not in sections and f"| `{key}` |" not in page] == []


def test_pages_that_errors_point_to_exist() -> None:
    for path in _modules("eulerforge"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("docs/"):
                assert (ROOT / node.value).is_file(), f"{path.name}: {node.value}"
