"""The token cache: a corpus is tokenised once, and every rank, node and later run reads the result.

    <cache_dir>/corpora/<key>.json   a corpus that is complete: its shards in order, counts, a digest of the content
    <cache_dir>/corpora/<key>.lock   held by the process that builds it; others wait for it
    <cache_dir>/shards/<id>/         see `shards.py`; corpora that have files in common share their shards
    <cache_dir>/building/<key>/      shards that are being written

Keys and ids cover the tokenizer's content, each file's identity (path, size and modification time, or its content
with `data.verify: content`), the text column, the BOS/EOS policy and the format's version. `max_length`, `packing`
and `on_bad_line` are not in them: what was tokenised serves all of these.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from filelock import FileLock, Timeout

from eulerforge.data.build import (
    FORMAT_VERSION,
    SHARD_BYTES,
    BuiltTask,
    DocumentEncoder,
    Recipe,
    Report,
    Workplace,
    build_task,
    plan_tasks,
)
from eulerforge.data.manifest import DAMAGE, TokenCache, describe, read_manifest
from eulerforge.data.readers import DocumentCounts
from eulerforge.data.shards import ShardMeta
from eulerforge.data.sources import SourceFile
from eulerforge.data.token_files import index_of
from eulerforge.data.tokens import TokenStream
from eulerforge.errors import DataError, InputError
from eulerforge.files import write_json

_SMALL = 16 * 2**20
"""Bytes of a corpus for which further processes would take longer to start than to help."""

_POLL_SECONDS = 0.2


class CorpusEncoder(DocumentEncoder, Protocol):
    """What a cache needs of a tokenizer (`models.tokenizer.Tokenizer`)."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides which ids a text gets."""

    @property
    def largest_id(self) -> int:
        """The largest id it can give."""

    @property
    def serialized(self) -> str | None:
        """What another process can make it from (tokenizer.json), None if nothing can."""


@dataclass(frozen=True)
class CacheSpec:
    """What a cache is made from.

    Attributes:
        bos_id, eos_id: None where the policy adds none.
        separator: the tokenizer's EOS, which ends documents in token files.
        verify: what a file is known by.
        processes: that tokenise; None for as many as there are cores.
        key: what the preset calls the files, for messages; it does not matter to the cache.
        name: the preset's value, for `eulerforge cache ls`.
    """

    files: tuple[SourceFile, ...]
    text_column: str
    on_bad_line: Literal["error", "skip"]
    bos_id: int | None
    eos_id: int | None
    separator: int | None = None
    token_dtype: str | None = None
    verify: Literal["mtime", "content"] = "mtime"
    processes: int | None = None
    key: str = "data.path"
    name: str = ""
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True)
class Voice:
    """How a cache tells what it does.

    Attributes:
        say: prints a line.
        progress: told the bytes to read; makes what is told of progress.
    """

    say: Callable[[str], None]
    progress: Callable[[int], AbstractContextManager[Report]]


def open_or_build(
    spec: CacheSpec, encoder: CorpusEncoder, cache_dir: Path, check: Callable[[TokenStream], None], voice: Voice
) -> TokenCache:
    """Open the cache of `spec`, building it first if needed.

    Only one process builds a corpus at a time; others wait, without a time limit, and then read it.

    Args:
        check: called with the stream before a new cache is published, and for one that is reused; raises if the
            corpus cannot be used.

    Raises:
        DataError: bad input, no usable document, or a cache directory that cannot be written.
        PreparationError: a tokenising process died.
    """
    build = _Build(spec, encoder, cache_dir, check, voice)
    cache = build.open()
    if cache is None:
        cache = build.make()
    return cache


class _Build:
    """One call of `open_or_build`."""

    def __init__(
        self,
        spec: CacheSpec,
        encoder: CorpusEncoder,
        cache_dir: Path,
        check: Callable[[TokenStream], None],
        voice: Voice,
    ) -> None:
        self._spec, self._encoder, self._check, self._voice = spec, encoder, check, voice
        self._recipe = Recipe(
            encoder.fingerprint,
            encoder.largest_id,
            spec.text_column,
            spec.bos_id,
            spec.eos_id,
            spec.separator,
            spec.token_dtype,
        )
        identities = [_identity(file, spec.verify) for file in spec.files]
        self._tasks = list(plan_tasks(spec.files, identities, spec.shard_bytes))
        content = [FORMAT_VERSION, asdict(self._recipe), identities]
        self._key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
        self._root = cache_dir
        self._manifest = cache_dir / "corpora" / f"{self._key}.json"
        self._shards = cache_dir / "shards"
        self._workshop = cache_dir / "building" / self._key
        self._damaged = False

    def open(self) -> TokenCache | None:
        """The cache if it is complete; None if it has to be built. Needs no right to write."""
        if not self._manifest.exists():
            return None
        try:
            manifest = json.loads(self._manifest.read_bytes())
            cache = read_manifest(self._manifest, manifest, [file.path for file in self._spec.files])
            first_bad = manifest["first_bad"]
            if self._spec.verify == "content":
                for shard in cache.stream.shards:
                    ShardMeta.read(shard.folder).verify(shard.folder)
        except DAMAGE as error:
            self._voice.say(f"Token cache {self._manifest} is damaged ({error}): building again what is missing.")
            self._damaged = True
            return None
        if first_bad is not None and self._spec.on_bad_line == "error":
            raise DataError(f"{first_bad['place']}: {first_bad['what']}", first_bad["fix"])
        self._require_documents(cache.counts, cache.stream)
        self._check(cache.stream)
        with contextlib.suppress(OSError):  # a cache that we may only read keeps its time
            os.utime(self._manifest)
        return cache

    def make(self) -> TokenCache:
        """Build the cache, or wait for who builds it."""
        made = [path for path in (self._root, *self._root.parents) if not path.exists()]
        try:
            for folder in (self._manifest.parent, self._shards):
                _make_folder(folder)
            with self._locked() as waited:
                # Another process may have built it meanwhile.
                built = self.open() if waited or not self._damaged else None
                return built or self._build()
        except OSError as error:
            raise DataError(
                f"data.cache_dir: the token cache in {self._root} cannot be written: {error.strerror or error}",
                "free some space, or set data.cache_dir to a directory that you can write",
            ) from None
        finally:
            for path in (self._manifest.parent, *made):
                with contextlib.suppress(OSError):
                    path.rmdir()  # goes only if it is empty, that is when nothing was published

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        """Hold the corpus's lock; whether another process had it."""
        path = self._manifest.with_suffix(".lock")
        lock = FileLock(path)
        waits = False
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waits = True
            self._voice.say(f"Waiting for another process that builds the token cache {self._manifest}")
            while not lock.is_locked:
                # Who builds removes the folder if nothing was published.
                _make_folder(path.parent)
                with contextlib.suppress(FileNotFoundError):
                    lock.acquire(poll_interval=_POLL_SECONDS)
        except NotImplementedError:
            raise DataError(
                f"data.cache_dir: the file system of {self._root} has no file locks",
                "set data.cache_dir to another file system",
            ) from None
        try:
            yield waits
        finally:
            with contextlib.suppress(OSError):
                self._shards.rmdir()
            # Without the file a process that still waits may build beside a third one; both make the same shards.
            path.unlink(missing_ok=True)
            lock.release()

    def _build(self) -> TokenCache:
        _make_folder(self._shards)
        before = {path.name for path in self._shards.iterdir()}
        shutil.rmtree(self._workshop, ignore_errors=True)  # what a killed build has left
        self._workshop.mkdir(parents=True)
        start = time.monotonic()
        try:
            built = self._run_tasks()
            self._require_unchanged_files()
            files = [file.path for file in self._spec.files]
            manifest = describe(self._spec.name, self._recipe, files, self._tasks, built)
            cache = read_manifest(self._manifest, manifest, files, reused=False)
            try:
                self._require_documents(cache.counts, cache.stream)
                self._check(cache.stream)
            except InputError:
                # A corpus that is too small to use leaves nothing behind.
                for name in {name for task in built for name, _ in task} - before:
                    shutil.rmtree(self._shards / name)
                raise
            _make_folder(self._manifest.parent)
            write_json(self._manifest, manifest)
        finally:
            shutil.rmtree(self._workshop, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._workshop.parent.rmdir()
        documents, tokens = cache.stream.documents, cache.stream.tokens
        self._voice.say(f"Tokenized {documents:,} documents, {tokens:,} tokens in {time.monotonic() - start:.1f}s")
        return cache

    def _run_tasks(self) -> list[BuiltTask]:
        spec = self._spec
        place = Workplace(self._recipe, spec.on_bad_line, self._shards, self._workshop, spec.verify == "content")
        files = f"{len(self._spec.files)} file{'s' if len(self._spec.files) > 1 else ''}"
        processes, serialized = self._processes()
        shared = f" with {processes} processes" if processes > 1 else ""
        self._voice.say(f"Tokenizing {files} into {self._root}{shared}")
        with self._voice.progress(sum(task.size for task in self._tasks)) as report:
            if processes == 1 or serialized is None:
                return [build_task(task, place, self._encoder, report) for task in self._tasks]
            from eulerforge.data.workers import build_in_processes

            return build_in_processes(self._tasks, place, serialized, processes, report)

    def _require_unchanged_files(self) -> None:
        """Refuse a mixture of what a file was and what it became while it was read."""
        for file in self._spec.files:
            with contextlib.suppress(FileNotFoundError):
                status = file.path.stat()
                if (status.st_size, status.st_mtime_ns) == (file.size, file.mtime_ns):
                    continue
            raise DataError(
                f"{self._spec.key}: {file.path} was changed while it was read", "run it again when it is complete"
            )

    def _processes(self) -> tuple[int, str | None]:
        """How many processes tokenise, and what they make their encoder from."""
        wanted = self._spec.processes
        if wanted is None:
            wanted = 1 if sum(file.size for file in self._spec.files) < _SMALL else available_cores()
        wanted = min(wanted, len(self._tasks))
        serialized = self._encoder.serialized if wanted > 1 else None
        if wanted > 1 and serialized is None:
            self._voice.say("This tokenizer cannot be copied to other processes: tokenizing in one process")
            wanted = 1
        return wanted, serialized

    def _require_documents(self, counts: DocumentCounts, stream: TokenStream) -> None:
        if stream.documents:
            return
        skipped = ", ".join(f"{number} {kind}" for kind, number in counts.skipped.items())
        details = "; ".join(filter(None, [f"{counts.empty} empty texts" if counts.empty else "", skipped]))
        names = ", ".join(str(file.path) for file in self._spec.files[:3])
        raise DataError(
            f"{self._spec.key}: no usable document in {names}" + (f" ({details})" if details else ""),
            f"give lines with non-empty text under {self._spec.text_column!r} (data.text_column)",
        )


def _make_folder(path: Path) -> None:
    """Make a folder that a process whose build has failed may be removing at the same time."""
    for _ in range(100):
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            path.mkdir(parents=True, exist_ok=True)
            return
    path.mkdir(parents=True, exist_ok=True)


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _identity(file: SourceFile, verify: Literal["mtime", "content"]) -> str:
    """What a file is known by."""
    table = index_of(file.path) if file.holds_tokens else None
    if verify == "content":
        hashes = [_hash(path) for path in (file.path, table) if path is not None]
        return json.dumps([file.format, file.size, *hashes])
    parts: list[Any] = [str(file.path), file.size, file.mtime_ns]
    if table is not None:
        status = table.stat()
        parts += [status.st_size, status.st_mtime_ns]
    return json.dumps(parts)


def _hash(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
