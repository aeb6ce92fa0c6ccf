"""`eulerforge cache ls|rm`: what the token cache holds, and making room."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from typing import Any

from eulerforge.config.paths import default_cache_dir, expand_path
from eulerforge.errors import DataError, UsageError
from eulerforge.metrics.meters import binary_size

_KEY_DIGITS = 12


def add(commands: Any) -> None:
    """Add the command's parsers."""
    parser = commands.add_parser("cache", help="list or remove token caches")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = actions.add_parser("ls", help="list the corpora in the cache")
    listing.set_defaults(run=_list)
    removal = actions.add_parser(
        "rm", help="remove corpora", description="Remove corpora and the shards that no other corpus uses."
    )
    removal.add_argument("keys", nargs="*", metavar="KEY", help="beginning of a key that `cache ls` shows")
    removal.add_argument("--unfinished", action="store_true", help="shards of builds that have not been finished")
    removal.add_argument("--all", action="store_true", help="everything")
    removal.set_defaults(run=_remove)
    for action in (listing, removal):
        action.add_argument("--cache-dir", metavar="DIR", help="default: the user's cache directory")


def _list(arguments: argparse.Namespace) -> int:
    from eulerforge.data.housekeeping import entries, unfinished

    root = _root(arguments)
    found = entries(root)
    if found:
        print(f"{'KEY':<{_KEY_DIGITS}}  {'LAST USED':<16}  {'SIZE':>10}  {'DOCUMENTS':>12}  {'TOKENS':>15}  PATH")
    for entry in found:
        used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        print(
            f"{entry.key[:_KEY_DIGITS]}  {used}  {binary_size(entry.size):>10}  {entry.documents:>12,}  "
            f"{entry.tokens:>15,}  {entry.name}"
        )
    loose = unfinished(root)
    if loose.shards:
        print(f"unfinished: {loose.shards} shards, {binary_size(loose.size)} (`eulerforge cache rm --unfinished`)")
    if not found and not loose.shards:
        print(f"{root} holds no token cache")
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    from eulerforge.data.housekeeping import entries, remove, remove_unfinished

    if not (arguments.keys or arguments.all or arguments.unfinished):
        raise UsageError("nothing to remove", "name a key of `eulerforge cache ls`, or --unfinished, or --all")
    root = _root(arguments)
    known = [entry.key for entry in entries(root)]
    chosen = list(known) if arguments.all else [_one(key, known, root) for key in arguments.keys]
    freed = sum(remove(root, key) for key in dict.fromkeys(chosen))
    if arguments.all or arguments.unfinished:
        freed += remove_unfinished(root)
    print(f"Removed {len(dict.fromkeys(chosen))} corpora, {binary_size(freed)} freed")
    return 0


def _one(beginning: str, known: list[str], root: Path) -> str:
    """The key that begins so."""
    matches = [key for key in known if key.startswith(beginning)]
    if len(matches) != 1:
        what = "no key" if not matches else f"{len(matches)} keys"
        raise UsageError(
            f"{what} in {root} begins with {beginning!r}", "see `eulerforge cache ls`", see="docs/data.md"
        )
    return matches[0]


def _root(arguments: argparse.Namespace) -> Path:
    if arguments.cache_dir is None:
        return default_cache_dir()
    root = expand_path(arguments.cache_dir, "--cache-dir", DataError)
    if not root.is_dir():
        raise UsageError(f"--cache-dir: {root} is not a directory", "give the data.cache_dir of a preset")
    return root
