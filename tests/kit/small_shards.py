"""The command line with small shards, so that a small corpus has many: `python -m tests.kit.small_shards ARGUMENTS`.

$SHARD_BYTES is the size. The ranks of a run are started with this module too; tokenising processes get the size with
their tasks.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from eulerforge import corpus
from eulerforge.cli import command
from eulerforge.data.cache import CacheSpec
from launch import torchrun

if __name__ == "__main__":
    small: Any = partial(CacheSpec, shard_bytes=int(os.environ["SHARD_BYTES"]))
    corpus.CacheSpec = small  # type: ignore[misc]
    torchrun.run = partial(torchrun.run, module="tests.kit.small_shards")
    command()
