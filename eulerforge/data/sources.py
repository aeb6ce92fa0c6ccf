"""`data.path` of a preset -> the files it means, each with its format and compression.

    path               a file, a directory (recursive, hidden files left out), or a glob
    [path, path]       one corpus, in that order
    [{path, weight}]   a mixture: each source has its share of the tokens of every step

Compression is told by a file's first bytes, never by its name. The format is told by the first bytes where those say
it (Parquet, NumPy), else by the name without a compression suffix: `.txt` is one document, `.npy` and `.bin` are
token ids, anything else is JSON lines.
"""

from __future__ import annotations

import contextlib
import glob
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from eulerforge.config.paths import expand_path
from eulerforge.config.schema import MixtureSource
from eulerforge.errors import DataError

Format = Literal["jsonl", "text", "parquet", "npy", "bin"]
Compression = Literal["none", "gzip", "zstd"]

_COMPRESSED = (".gz", ".zst", ".zstd")
_RECORDS = (".jsonl", ".ndjson", ".json")
_KINDS = {
    **dict.fromkeys((*_RECORDS, ".parquet"), "records"),
    ".txt": "text",
    ".npy": "token",
    ".bin": "token",
}
"""What counts in a directory, by suffix."""

_HEAD = 4096
"""Bytes by which a file is told."""

_GZIP, _ZSTD, _PARQUET, _NUMPY = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1", b"\x93NUM"
_FOREIGN = {
    b"\xfd7zXZ\0": "xz",
    b"PK\3\4": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
}
"""First bytes of what is not read. Taken for JSON lines, its lines would be bad ones, to be skipped in silence."""

_TAR = 257
"""Where a tar archive says `ustar`."""

_PACKAGES = {"zstd": "zstandard", "parquet": "pyarrow"}


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus.

    Attributes:
        size: bytes on disk.
        mtime_ns: when it was last modified.
    """

    path: Path
    format: Format
    compression: Compression
    size: int
    mtime_ns: int

    @property
    def holds_tokens(self) -> bool:
        """Whether it holds token ids, not text."""
        return self.format in ("npy", "bin")


@dataclass(frozen=True)
class CorpusPart:
    """One source of a mixture, or the whole corpus.

    Attributes:
        name: as the preset has it.
        weight: its part of the tokens, relative to the other weights; 1 for a corpus that is no mixture.
    """

    name: str
    weight: Fraction
    files: tuple[SourceFile, ...]


@dataclass(frozen=True)
class CorpusFiles:
    """Where the text of a run comes from, as far as it is known without reading it.

    Attributes:
        parts: one, or the sources of a mixture.
        validation: held-out text of its own, empty if there is none.
        cache_dir: where token caches lie.
        tokenizer: directory or hub name to load.
    """

    parts: tuple[CorpusPart, ...]
    validation: tuple[CorpusPart, ...]
    cache_dir: Path
    tokenizer: str


def resolve_corpus(
    value: str | Sequence[str] | Sequence[MixtureSource], key: str = "data.path"
) -> tuple[CorpusPart, ...]:
    """The parts that a preset's value means; more than one for a mixture only.

    Args:
        key: what the preset calls it, for messages.

    Raises:
        DataError: as `resolve_files`, or a file named twice.
    """
    if isinstance(value, str):
        return (CorpusPart(value, Fraction(1), resolve_files(value, key)),)
    parts = []
    texts: list[SourceFile] = []
    for source in value:
        if isinstance(source, MixtureSource):
            files = resolve_files(source.path, key)
            # Through text, so that 0.7 is seven tenths and not the binary fraction next to it.
            parts.append(CorpusPart(source.path, Fraction(str(source.weight)), files))
        else:
            texts += resolve_files(source, key)
    if parts:
        return tuple(parts)
    _require_once(texts, key)
    return (CorpusPart(", ".join(map(str, value)), Fraction(1), tuple(texts)),)


def _require_once(files: Sequence[SourceFile], key: str) -> None:
    seen: set[Path] = set()
    for file in files:
        real = file.path.resolve()
        if real in seen:
            raise DataError(
                f"{key}: {file.path} is named twice",
                "name it once; to see a source more often, give it a weight: [{path: ..., weight: ...}]",
            )
        seen.add(real)


def resolve_files(path: str, key: str = "data.path") -> tuple[SourceFile, ...]:
    """The files that one path of the preset means, absolute and in a fixed order.

    Args:
        path: a file, a directory or a glob.
        key: what the preset calls it, for messages.

    Raises:
        DataError: nothing there, an empty file, a format that cannot be read, or a directory of several kinds.
    """
    given = expand_path(path, key, DataError)
    if given.is_dir():
        files = _files_of_directory(given, key)
    elif given.exists() or not glob.has_magic(path):
        files = [given]
    else:
        files = sorted({Path(name).absolute() for name in glob.glob(_pattern(path), recursive=True)})  # noqa: PTH207
        # A pipe is kept, so that it is refused; the token files' own index is no source.
        files = [file for file in files if not file.is_dir() and not _is_index_of_tokens(file)]
        if not files:
            raise DataError(f"{key}: the glob {path} matches no file", "correct the pattern or the directory")
    found = tuple(_look_at(file.absolute(), key) for file in files)
    if all(file.size == 0 for file in found):
        raise DataError(f"{key}: {found[0].path} is empty", "give a file with at least one JSON line")
    return found


def _pattern(path: str) -> str:
    """The glob that was given, with only what the user has written taken for a pattern."""
    if not path.startswith("~"):
        return path
    user, _, rest = path.partition("/")
    return f"{glob.escape(str(Path(user).expanduser()))}/{rest}"


def _files_of_directory(folder: Path, key: str) -> list[Path]:
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        kind = _KINDS.get(_name_suffix(file))
        if kind is not None and not hidden and not file.is_dir():
            found.setdefault(kind, []).append(file)
    if not found:
        raise DataError(
            f"{key}: the directory {folder} holds no {', '.join(_RECORDS)} (plain, .gz or .zst), .parquet, .txt, "
            ".npy or .bin file",
            f"point {key} at a file, or at a directory that holds some",
        )
    if len(found) > 1:
        # Which of them are the corpus is not ours to guess: a README.txt is none, notes in .txt may be one.
        counts = ", ".join(f"{len(files)} {kind} ({files[0].name})" for kind, files in sorted(found.items()))
        most = max(found, key=lambda kind: (len(found[kind]), kind == "records"))
        example = _name_suffix(found[most][0])
        raise DataError(
            f"{key}: the directory {folder} holds files of several kinds: {counts}",
            f"say which are meant with a glob, for example {folder}/**/*{example}*",
        )
    return next(iter(found.values()))


def _name_suffix(path: Path) -> str:
    """The suffix below compression suffixes, in lower case: `.jsonl` of `a.jsonl.gz`."""
    name = path.name.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    dot = name.rfind(".")
    return name[dot:] if dot >= 0 else ""


def _is_index_of_tokens(path: Path) -> bool:
    return path.name.endswith(".csv.gz") and path.with_name(path.name.removesuffix(".csv.gz") + ".npy").exists()


def _look_at(path: Path, key: str) -> SourceFile:
    if path.exists() and not path.is_file():
        # A pipe can be read once only, and opening one may wait for ever.
        raise DataError(f"{key}: {path} is not a regular file (a pipe or device)", "give a JSONL file on disk")
    try:
        with path.open("rb") as handle:
            head = handle.read(_HEAD)
            status = path.stat()
    except FileNotFoundError:
        raise DataError(f"{key}: {path} does not exist", f"set {key} to an existing JSONL file") from None
    except OSError as error:
        raise DataError(f"{key}: {path} cannot be read: {error.strerror}", "check the file's permissions") from None
    compression, format_ = _compression(head), _format(path, head)
    for feature in (compression, format_):
        package = _PACKAGES.get(feature)
        if package is not None and find_spec(package) is None:
            raise DataError(
                f"{key}: {path} is a {feature} file, and the package {package} is not installed",
                f"pip install {package} (or eulerforge[data])",
            )
    _refuse_foreign(path, head, key)
    if compression == "none" and 0 < len(head) < 4 and path.name.lower().endswith(_COMPRESSED):
        raise DataError(f"{key}: {path} is a cut-off compressed file", "copy or download the file again")
    if compression != "none" and format_ in ("npy", "bin"):
        raise DataError(f"{key}: {path} holds compressed token ids, which cannot be read in place", "unpack it")
    return SourceFile(path, format_, compression, status.st_size, status.st_mtime_ns)


def _refuse_foreign(path: Path, head: bytes, key: str) -> None:
    """Refuse archives and other compressions, also inside gzip."""
    content = head
    if head[:2] == _GZIP:
        with contextlib.suppress(zlib.error):  # a damaged file is named when it is read
            content = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, _HEAD)
    kinds = [name for magic, name in _FOREIGN.items() if content.startswith(magic)]
    if content[:3] == b"BZh" and content[4:10] == b"1AY&SY":
        kinds.append("bzip2")
    if content[_TAR : _TAR + 5] == b"ustar":
        kinds.append("tar")
    if content is not head and content[:4] in (_PARQUET, _NUMPY):
        kinds.append("compressed binary")
    if kinds:
        raise DataError(
            f"{key}: {path} is a {kinds[0]} file, which is not read", "unpack it, or pack it with gzip or zstd"
        )


def _compression(head: bytes) -> Compression:
    if head[:2] == _GZIP:
        return "gzip"
    # Files of several frames may begin with one to be skipped (0x184D2A5?), which holds a table.
    skippable = head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F
    return "zstd" if head[:4] == _ZSTD or skippable else "none"


def _format(path: Path, head: bytes) -> Format:
    if head[:4] == _PARQUET:
        return "parquet"
    suffix = _name_suffix(path)
    if head[:4] == _NUMPY or suffix == ".npy":
        return "npy"
    if suffix == ".bin":
        return "bin"
    return "text" if suffix == ".txt" else "jsonl"
