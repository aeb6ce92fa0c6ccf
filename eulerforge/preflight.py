"""Preset against reality, before anything heavy: model directory, tokenizer, data, run directory, precision.

No torch, no transformers: `--validate-only` answers in a fraction of a second, and a wrong path costs no model load.
All problems are reported at once. What only loading can show (weights that do not fit, a damaged tokenizer) is
checked by the worker, still before the run directory is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from eulerforge.config.hints import Hint, apply_hints
from eulerforge.config.load import LoadedPreset
from eulerforge.config.paths import default_cache_dir, expand_path, require_writable
from eulerforge.config.schema import MixtureSource, PretrainPreset
from eulerforge.data.readers import DocumentCounts, iter_texts
from eulerforge.data.sources import CorpusFiles, CorpusPart, SourceFile, resolve_corpus
from eulerforge.errors import DataError, InputError, ModelError, Problem, TokenizerError
from eulerforge.models.blocks import FoundBlock, find_blocks, refuse_leaking_blocks
from eulerforge.models.directory import TOKENIZER_FILES, ModelDirectory
from eulerforge.precision.plan import PrecisionPlan, PrecisionRequest, plan_precision
from eulerforge.train.resume import RunPlan, plan_run

T = TypeVar("T")


@dataclass(frozen=True)
class Preflight:
    """A preset that has been held against the file system.

    Attributes:
        loaded: the preset as given.
        preset: the preset in force (with the model's hints, if asked for).
        hints: training hints of the model's config.json.
        directory: what is known about the model.
        corpus: where the text comes from.
        blocks: block families that the directory shows.
        precision: how numbers are held, as far as the directory tells.
        run_plan: where the run writes, and what it begins with.
    """

    loaded: LoadedPreset
    preset: PretrainPreset
    hints: tuple[Hint, ...]
    directory: ModelDirectory
    corpus: CorpusFiles
    blocks: tuple[FoundBlock, ...]
    precision: PrecisionPlan
    run_plan: RunPlan


def corpus_name(preset: PretrainPreset) -> str:
    """`data.path` for people."""
    path = preset.data.path
    if isinstance(path, str):
        return path
    return ", ".join(
        f"{entry.path} (weight {entry.weight:g})" if isinstance(entry, MixtureSource) else entry for entry in path
    )


def inspect(loaded: LoadedPreset, resume: str | None = None, owns_output: bool = True) -> Preflight:
    """Check a preset against what it names.

    Args:
        resume: the value of `--resume`, "" for none, None without the option.
        owns_output: whether this process makes the run directory. Another rank may come to look at it when rank 0
            has begun to fill it.

    Raises:
        InputError: with every problem found.
    """
    preset = loaded.preset
    attempts = _Attempts()
    directory = attempts.run(lambda: ModelDirectory.read(expand_path(preset.model_dir, "model_dir", ModelError)))
    parts, validation = _find_corpus(preset, attempts)
    plan: RunPlan | None = RunPlan(preset.output_dir)
    if owns_output or resume is not None:
        plan = attempts.run(lambda: plan_run(preset.output_dir, resume))
    cache_dir = attempts.run(lambda: _check_cache_dir(preset.data.cache_dir))
    if directory is None:
        raise attempts.error()
    preset, hints = attempts.run(lambda: apply_hints(loaded, directory.config)) or (preset, ())
    tokenizer = attempts.run(lambda: _find_tokenizer(preset, directory))
    attempts.run(lambda: _check_model(preset, directory))
    blocks = find_blocks(directory)
    if preset.data.document_mask:
        attempts.run(lambda: refuse_leaking_blocks(blocks))
    request = precision_request(preset)
    precision = attempts.run(lambda: plan_precision(request, blocks))
    if attempts.failed:
        raise attempts.error()
    assert parts is not None
    assert validation is not None
    assert tokenizer is not None
    assert precision is not None
    assert cache_dir is not None
    assert plan is not None
    corpus = CorpusFiles(parts, validation, cache_dir, tokenizer)
    return Preflight(loaded, preset, hints, directory, corpus, blocks, precision, plan)


def precision_request(preset: PretrainPreset) -> PrecisionRequest:
    """What the preset says about precision."""
    training = preset.training
    return PrecisionRequest(training.dtype, training.amp, training.master_weights, training.precision_check)


def inspect_corpus(loaded: LoadedPreset) -> CorpusFiles:
    """Check what `prepare` needs: the text, the tokenizer and the cache. The model may be somewhere else.

    Raises:
        InputError: with every problem found.
    """
    preset = loaded.preset
    attempts = _Attempts()
    parts, validation = _find_corpus(preset, attempts)
    cache_dir = attempts.run(lambda: _check_cache_dir(preset.data.cache_dir))

    def find() -> str:
        directory = None
        if preset.tokenizer is None:
            directory = ModelDirectory.read(expand_path(preset.model_dir, "model_dir", ModelError))
        return _find_tokenizer(preset, directory)

    tokenizer = attempts.run(find)
    if attempts.failed:
        raise attempts.error()
    assert parts is not None
    assert validation is not None
    assert tokenizer is not None
    assert cache_dir is not None
    return CorpusFiles(parts, validation, cache_dir, tokenizer)


def _find_corpus(
    preset: PretrainPreset, attempts: _Attempts
) -> tuple[tuple[CorpusPart, ...] | None, tuple[CorpusPart, ...] | None]:
    """Training text and held-out text of its own; None for what is wrong."""

    def find(value: str | list[str] | list[MixtureSource], key: str) -> tuple[CorpusPart, ...] | None:
        parts = attempts.run(lambda: resolve_corpus(value, key))
        for part in parts or ():
            attempts.run(partial(_peek, part, preset))
        return parts

    held_out = preset.data.validation.path if preset.data.validation else None
    return find(preset.data.path, "data.path"), find(held_out, "data.validation.path") if held_out else ()


class _Attempts:
    """Runs checks one after the other and keeps their errors, so that a user hears of all of them."""

    def __init__(self) -> None:
        self._errors: list[InputError] = []

    @property
    def failed(self) -> bool:
        return bool(self._errors)

    def run(self, check: Callable[[], T]) -> T | None:
        try:
            return check()
        except InputError as error:
            self._errors.append(error)
            return None

    def error(self) -> InputError:
        """The one error, or all of them as one."""
        if len(self._errors) == 1:
            return self._errors[0]
        problems = [problem for error in self._errors for problem in error.problems]
        pages = dict.fromkeys(error.see for error in self._errors)
        return InputError.of(problems, see=", ".join(pages))


def _peek(part: CorpusPart, preset: PretrainPreset) -> None:
    """Read up to the first document: a wrong text column or format should not wait for the model."""
    for file in part.files:
        if file.holds_tokens or next(_texts(file, preset), None) is not None:
            return


def _texts(file: SourceFile, preset: PretrainPreset) -> Iterator[str]:
    return iter_texts(file, preset.data.text_column, preset.data.on_bad_line, DocumentCounts())


def _find_tokenizer(preset: PretrainPreset, directory: ModelDirectory | None) -> str:
    name = preset.tokenizer
    if name is None:
        assert directory is not None
        if directory.has_tokenizer:
            return str(directory.path)
        suggestion = directory.suggested_tokenizer
        raise TokenizerError(
            f"tokenizer: not set, and {directory.path} holds none",
            f"set tokenizer: {suggestion} (config.json names it as tokenizer.pretrained)"
            if suggestion
            else "set tokenizer to a tokenizer directory or a Hugging Face name",
        )
    advice = "set tokenizer to a directory with tokenizer.json, or to a Hugging Face name"
    path = expand_path(name, "tokenizer", TokenizerError)
    if path.is_dir():
        known = ("tokenizer_config.json", *TOKENIZER_FILES)
        if not any((path / file).is_file() for file in known):
            raise TokenizerError(f"tokenizer: {path} holds no tokenizer.json or other tokenizer file", advice)
        return str(path)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path or path.exists():
        raise TokenizerError(f"tokenizer: {name} is not a directory", advice)
    return name


def _check_cache_dir(cache_dir: str | None) -> Path:
    path = default_cache_dir() if cache_dir is None else expand_path(cache_dir, "data.cache_dir", DataError)
    if path.exists() and not path.is_dir():
        raise DataError(f"data.cache_dir: {path} is a file", "set data.cache_dir to a directory")
    if not (path / "corpora").is_dir():  # one that is there already may be shared, and only to be read
        require_writable(path, "data.cache_dir", DataError)
    return path


def _check_model(preset: PretrainPreset, directory: ModelDirectory) -> None:
    problems = list(_model_problems(preset, directory))
    if problems:
        raise ModelError.of(problems)


def _model_problems(preset: PretrainPreset, directory: ModelDirectory) -> Iterator[Problem]:
    if directory.has_custom_code and not preset.trust_remote_code:
        names = ", ".join(sorted(directory.code)) or "a hub repository"
        yield Problem(
            f"model_dir: {directory.path} needs its own Python code ({names}), and trust_remote_code is false",
            "read that code, then set trust_remote_code: true",
        )
    elif missing := directory.missing_packages():
        yield Problem(
            f"model_dir: the code in {directory.path} imports {', '.join(missing)}, which is not installed",
            f"pip install {' '.join(missing)}",
        )
    context = directory.context_length
    if context is not None and preset.data.max_length > context[1]:
        yield Problem(
            f"data.max_length {preset.data.max_length} is beyond the model's {context[0]} {context[1]}",
            f"lower data.max_length to {context[1]} or raise {context[0]} in {directory.path / 'config.json'}",
        )
