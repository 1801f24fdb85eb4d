"""The parts in their order and with their time: python -m device.timetable [PART ...], as device.sh calls it."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from device import build
from device.isolation import CONTEXT, Part, run
from device.results import REHEARSED, append

# seconds that all parts may take together, so that with the report ten minutes are enough
SECONDS = 570
# a rehearsal shares two processors with everything else
MANY, SOME = (1, 1) if REHEARSED else (max(1, (os.cpu_count() or 1) - 1), 4)

PARTS = (
    Part("environment", "device.environment", 30),
    Part("precompile", "device.precompile", 75, processes=MANY),
    Part("ceilings", "device.ceilings", 30),
    Part("timings", "device.timings", 180),
    Part("correctness", "device.correctness", 100, processes=SOME),
    Part("repeats", "device.repeats", 40, processes=SOME),
    Part("sanitizer", "device.sanitizer", 100, processes=SOME),
    Part("exported", "device.exported", 50),
    Part("second ptxas", "device.second_ptxas", 30, processes=SOME),
)


def main() -> None:
    """Run the environment and the parts that are named, or all, until their time is over.

    Exits with 1 where the package or the GPU is not there, or an item came to something else than a result.
    """
    parts = {part.name: part for part in PARTS}
    names = sys.argv[1:] or list(parts)
    unknown = [name for name in names if name not in parts]
    if unknown:
        sys.exit(f"expected parts of {', '.join(parts)}, got {unknown[0]}")
    began = time.monotonic()
    append("build", "", "begun", names=list(build.NAMES))
    is_built = build.build()
    _end("build", began)
    CONTEXT.set_forkserver_preload(["torch", "triton", "mgt_kernels", "mgt_benchmarks.steps", "cases"])
    bad = 0 if is_built else 1
    for name in dict.fromkeys(["environment", *(names if is_built else [])]):
        left = began + SECONDS - time.monotonic()
        if left < 5:
            append(name, "", "absent", why="no time was left")
            continue
        part, began_part = parts[name], time.monotonic()
        statuses = run(replace(part, seconds=min(part.seconds, left)))
        _end(name, began_part)
        bad += sum(status not in ("ok", "absent") for status in statuses.values())
        if name == "environment" and not REHEARSED and statuses.get("card") != "ok":
            sys.exit("expected a CUDA device, and a build of PyTorch that sees it")
    sys.exit(f"{bad} items failed, crashed or timed out" if bad else 0)


def _end(name: str, began: float) -> None:
    seconds = time.monotonic() - began
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    # what a later part adds to it, the precompilation has missed
    num_compiled = sum(1 for _ in cache.glob("*/*.cubin"))
    append(name, "", "ended", seconds=round(seconds, 3), cached_kernels=num_compiled)
    print(f"{name}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
