"""results.jsonl: one JSON object a line, appended as it comes, so that a run which is killed leaves what it had."""

import json
import os
from pathlib import Path

# a rehearsal runs every part without a GPU, on tiny inputs; its lines say so and hold no time
REHEARSED = os.environ.get("DEVICE_REHEARSAL") == "1"
# where the tensors are
DEVICE = "cpu" if REHEARSED else "cuda"


class AbsentError(Exception):
    """What was asked for is not there, on this machine or for these sizes; the message says why."""


def folder() -> Path:
    """Return the folder of what a reader wants: results.jsonl, the report, what programs printed."""
    return Path(os.environ["OUT"])


def scratch() -> Path:
    """Return the folder of what can be made again: the installed package, compiled kernels, exported sources."""
    return Path(os.environ["SCRATCH"])


def append(part: str, name: str, status: str, **facts: object) -> None:
    """Append what came of one item of a part, or, where `name` is empty, of the part.

    Args:
        part: of the timetable.
        name: of the item.
        status: "begun" or "ended" of a part; "ok", "failed" (`why`), "absent" (`why`), "crashed" or "timed out".
        facts: what else is known; JSON takes it.
    """
    line = {"part": part, "name": name, "status": status, **facts}
    if REHEARSED:
        line["rehearsed"] = True
        # of whatever computer this is
        line.pop("seconds", None)
    path = folder() / "results.jsonl"
    with path.open("ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        # a line that was cut off spoils no other
        begin = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(begin + json.dumps(line, allow_nan=False).encode() + b"\n")
