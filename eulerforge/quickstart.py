"""`eulerforge quickstart`: a corpus and a tokenizer that any machine with Python can make, and a look at the result.

Importing this module imports neither torch nor transformers; the functions that need them import them when called.
`python -m eulerforge.quickstart DIR` writes a sample from a trained directory, in a process of its own.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from eulerforge.files import shown_path

VOCAB_SIZE = 4096
"""That of presets/models/tiny_hybrid, so that nothing has to be resized."""

PROMPTS = ("Return a new ", "The class ", "If the ")

_SKIPPED_DIRECTORIES = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "idlelib",
        "lib2to3",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
_MIN_DOCSTRING_LENGTH = 80


def shipped_presets() -> Path:
    """The presets/ folder: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).parent
    inside = package / "presets"
    return inside if inside.is_dir() else package.parent / "presets"


def prepare(corpus: Path, tokenizer: Path, say: Callable[[str], None]) -> None:
    """Make what presets/pretrain/quickstart.yml reads, unless it is there from an earlier run."""
    if not corpus.exists():
        documents = write_corpus(corpus)
        say(f"Corpus: {documents} documents of this Python's documentation written to {shown_path(corpus)}")
    if not tokenizer.exists():
        train_tokenizer(corpus, tokenizer, VOCAB_SIZE)
        say(f"Tokenizer: byte-level BPE with {VOCAB_SIZE} entries written to {shown_path(tokenizer)}")


def write_sample(model_dir: Path) -> Iterator[str]:
    """Continue each of `PROMPTS` with a model that plain transformers loads (40 tokens, sampled, seeded)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=True)
    torch.manual_seed(0)
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=40, do_sample=True, temperature=0.8, top_k=40)
        yield tokenizer.decode(ids[0], skip_special_tokens=True)


def write_corpus(path: Path) -> int:
    """Write the Python installation's own documentation to `path`, as JSON lines with "text" and "source".

    The documents are the topics of Python's built-in help, and for each module of the standard library its
    docstrings in the order of the source. The same Python writes the same bytes every time. The file appears under
    its name only once it is complete.

    Returns the number of documents.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_sibling(path)
    count = 0
    try:
        # Docstrings may hold lone surrogates, which UTF-8 has no bytes for: those become "?".
        with temporary.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
            for source, text in _documents():
                file.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
                count += 1
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def train_tokenizer(corpus: Path, output_dir: Path, vocab_size: int) -> None:
    """Train a tokenizer (see `data.bpe`) on what `write_corpus` has written."""
    from eulerforge.data.bpe import train_tokenizer

    train_tokenizer(_texts(corpus), output_dir, vocab_size)


def _temporary_sibling(path: Path) -> Path:
    """A name beside `path`, so on the same file system, that no other process uses."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _texts(corpus: Path) -> Iterator[str]:
    with corpus.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def _documents() -> Iterator[tuple[str, str]]:
    """The (source, text) pairs of the corpus, always in the same order."""
    from pydoc_data.topics import topics

    for name, topic in sorted(topics.items()):
        if text := topic.strip():
            yield f"pydoc_data.topics/{name}", text

    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for file in _module_files(root):
        sections = []
        for name, docstring in _docstrings(file):
            if len(docstring) < _MIN_DOCSTRING_LENGTH or docstring in seen:
                continue
            seen.add(docstring)
            sections.append(f"{name}\n\n{docstring}" if name else docstring)
        if sections:
            yield file.relative_to(root).as_posix(), "\n\n\n".join(sections)


def _module_files(root: Path) -> list[Path]:
    """The source files of the standard library, sorted, without tests and without installed packages."""
    files: list[Path] = []
    for directory, subdirectories, names in os.walk(root):
        # Changed in place: os.walk then leaves the skipped directories out, which may hold many files.
        subdirectories[:] = [name for name in subdirectories if name not in _SKIPPED_DIRECTORIES]
        files.extend(Path(directory, name) for name in names if name.endswith(".py"))
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _docstrings(file: Path) -> Iterator[tuple[str, str]]:
    """The (qualified name, docstring) pairs of a module; its own docstring comes first, with an empty name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules have invalid escape sequences
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # no module of this Python: a template, or a file for another version
    yield from _docstrings_below(tree, "")


def _docstrings_below(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield name, inspect.cleandoc(docstring)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings_below(child, f"{name}.{child.name}" if name else child.name)
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):  # an `if`, `try` or the like
            yield from _docstrings_below(child, name)


if __name__ == "__main__":
    for sample in write_sample(Path(sys.argv[1])):
        sys.stdout.write(f"{sample!r}\n")
