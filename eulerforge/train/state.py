"""How far a run has come: while it trains, and as a checkpoint keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eulerforge.errors import ResumeError
from eulerforge.files import write_json
from eulerforge.train.manifest import STATE_FOLDER

FORMAT = 2
STATE_FILE = "state.json"


@dataclass
class TrainState:
    """Progress of a run, the only thing the loop changes besides weights and optimiser.

    Attributes:
        step: finished optimiser steps.
        tokens: tokens trained on (padding not counted), over all ranks.
        elapsed: seconds of training, those before a resume included.
        skipped: steps whose update was left out because gradients overflowed in float16; their rows are used up.
        stopped: the run ended early because a process was asked to stop.
    """

    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0
    skipped: int = 0
    stopped: bool = False

    def advance(self, tokens: int, elapsed: float) -> None:
        """One more step is done."""
        self.step += 1
        self.tokens += tokens
        self.elapsed = elapsed

    def skip(self, tokens: int, elapsed: float) -> None:
        """The rows of a step are used up, and nothing was updated."""
        self.skipped += 1
        self.tokens += tokens
        self.elapsed = elapsed


@dataclass(frozen=True)
class Progress:
    """`state.json`.

    Attributes:
        run: identity of the run that wrote the checkpoint.
        step: finished optimiser steps.
        tokens: tokens trained on.
        elapsed: seconds of training.
        world_size, strategy: of the run that wrote it.
        stored: dtype of parameters and optimiser state.
        masters: whether weights lie in the shards too, because the saved ones are less precise.
        skipped: as in `TrainState`.
        loss_scale: value and good steps of the loss scale, None where there is none.
        fixed: what a resume must not change, by name.
        settings: the preset's values, by dotted key.
    """

    run: str
    step: int
    tokens: int
    elapsed: float
    world_size: int
    strategy: str
    stored: str
    masters: bool
    skipped: int
    loss_scale: tuple[float, int] | None
    fixed: Mapping[str, Any]
    settings: Mapping[str, Any]

    def write(self, checkpoint: Path) -> None:
        """Write `state.json`."""
        write_json(checkpoint / STATE_FOLDER / STATE_FILE, {"format": FORMAT, **asdict(self)})

    @classmethod
    def read(cls, checkpoint: Path) -> Progress:
        """Read `state.json` of a complete checkpoint.

        Raises:
            ResumeError: it is not what this version writes.
        """
        path = checkpoint / STATE_FOLDER / STATE_FILE
        try:
            values = json.loads(path.read_bytes())
            if values.pop("format") != FORMAT:
                raise ValueError("another format")
            if values["loss_scale"] is not None:
                values["loss_scale"] = tuple(values["loss_scale"])
            return cls(**values)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ResumeError(
                f"{path} cannot be read ({error})", "resume with the version of eulerforge that wrote it"
            ) from None
