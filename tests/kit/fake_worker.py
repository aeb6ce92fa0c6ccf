"""A worker that does what a test tells it, in place of `eulerforge`: `python -m tests.kit.fake_worker FOLDER SCRIPT`.

SCRIPT is JSON: for each rank, or `all`, a list of steps. Without torch, so that it starts at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from launch.outcome import worker_status, write_outcome


def main(folder: Path, script: dict[str, list[list[object]]]) -> int:
    """Do the steps of this rank; 0 after the last one."""
    rank = os.environ["RANK"]

    def note(number: int, frame: object) -> None:
        with (folder / f"signals-{rank}").open("a") as file:
            file.write(signal.Signals(number).name + "\n")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, note)
    partial = folder / f".started-{rank}"
    partial.write_text(json.dumps({"pid": os.getpid(), "environment": dict(os.environ), "agent": os.getppid()}))
    partial.rename(folder / f"started-{rank}")
    for verb, *values in script.get(rank, script.get("all", [])):
        match verb:
            case "print":
                print(*values, flush=True)
            case "ignore":
                for name in values:
                    signal.signal(signal.Signals[str(name)], signal.SIG_IGN)
            case "die of":
                for name in values:
                    signal.signal(signal.Signals[str(name)], signal.SIG_DFL)
            case "wait for":
                while not all((folder / str(name)).exists() for name in values):
                    time.sleep(0.02)
            case "wait for signals":
                path = folder / f"signals-{rank}"
                while not path.exists() or len(path.read_text().split()) < int(str(values[0])):
                    time.sleep(0.02)
            case "outcome":
                code, message, secondary = values
                write_outcome(int(str(code)), str(message), secondary=bool(secondary))
            case "touch":
                (folder / str(values[0])).touch()
            case "end":
                code = int(str(values[0]))
                write_outcome(code, "", secondary=False)
                return worker_status(code)
            case "return":
                return int(str(values[0]))
            case "exit hard":
                os._exit(int(str(values[0])))
            case "kill itself":
                os.kill(os.getpid(), signal.Signals[str(values[0])])
            case "hang":
                while True:
                    time.sleep(60)
            case _:
                raise ValueError(verb)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
