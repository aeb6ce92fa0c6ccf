"""`python -m eulerforge`: the same as the `eulerforge` command (torchrun starts workers this way)."""

from __future__ import annotations

from eulerforge.cli import command

if __name__ == "__main__":
    command()
