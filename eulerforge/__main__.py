"""`python -m eulerforge`: the same as the `eulerforge` command (torchrun starts workers this way)."""

from __future__ import annotations

import sys

from eulerforge.cli import main

if __name__ == "__main__":
    sys.exit(main())
