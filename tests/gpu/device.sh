#!/usr/bin/env bash
# Check and time everything on one GPU, in at most ten minutes and without a network; docs/gpu.md says what it writes.
#
#     bash tests/gpu/device.sh [--rehearse] [PART ...]
#
# OUT is the folder of the results and SCRATCH that of what can be made again (both build/device), PYTHON the interpreter
# (python3), WHEEL a wheel of the package to install in the place of a build. --rehearse runs every part without a GPU, on
# tiny inputs, and times nothing.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p "${OUT:=$root/build/device}" "${SCRATCH:=$root/build/device}"
OUT=$(cd "$OUT" && pwd)
SCRATCH=$(cd "$SCRATCH" && pwd)
export OUT SCRATCH
if [ "${1:-}" = --rehearse ]; then
  shift
  export DEVICE_REHEARSAL=1
fi
python=${PYTHON:-python3}
export PYTHONPATH=$root/tests/gpu:$root/tests:$SCRATCH/site${PYTHONPATH:+:$PYTHONPATH}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$SCRATCH/triton}
status=0
"$python" -m device.timetable "$@" || status=$?
"$python" -m mgt_benchmarks.device_report "$OUT/results.jsonl" || status=$?
exit "$status"
