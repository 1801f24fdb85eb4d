"""The same call again and again, on two streams: a race would change a bit of a result now and then."""

import torch

from device import correctness
from device.results import DEVICE, REHEARSED

NUM_REPEATS = 2 if REHEARSED else 200

# of every kernel the case with the most programs, or the most that they exchange
_NAMES = (
    "sample_tokens: bf16 split over four programs",
    "sample_tokens: fp16 position-major, odd, noise",
    "sample_tokens: many peaked rows with noise",
    "mask_by_confidence: N=16384 temperature=1.3 digits=3",
    "mask_by_confidence: N=20000 temperature=1.3 digits=3",
    "commit_tokens: factor N=17000 temperature=0.0",
    "commit_tokens: entropy_bound N=17000 temperature=0.0",
    "differential_sample: many rows of differences",
    "differential_sample: more positions than registers hold",
    "differential_sample: paper bf16 position-major, odd",
    "differential_sample: official, aliased, bf16, noise",
    "match_tokens: match bf16, two blocks of destinations",
    "match_tokens: match fp32, ties",
    "merge_tokens: merge bf16",
    "unmerge_tokens: unmerge bf16",
    "w4a8_linear: w4a8 bf16, groups of 128",
    "w4a8_linear: w4a8 bf16, few rows",
    "w4a16_linear: w4a16 bf16, groups of 128",
    "w4a16_linear: w4a16 bf16, few rows, a short group",
    "w4a8_linear: w4a8 bf16, split",
    "w4a16_linear: w4a16 bf16, split",
    "w4a16_linear: w4a16 bf16, dequantized",
)


def names() -> list[str]:
    """Return the cases that are repeated."""
    return list(correctness.REHEARSED_CASES[-1:] if REHEARSED else _NAMES)


def work(name: str) -> dict[str, object]:
    """Repeat one; AssertionError says how often it came out otherwise."""
    case = correctness.case_of(name)
    arguments = correctness.to(DEVICE, case.make_arguments())
    first = list(map(_bits, correctness.run(case, arguments)))
    streams = [None] if REHEARSED else [None, torch.cuda.Stream()]
    num_other = 0
    for number in range(NUM_REPEATS):
        with torch.cuda.stream(streams[number % len(streams)]):
            outputs = correctness.run(case, arguments)
            num_other += not all(map(torch.equal, first, map(_bits, outputs)))
    assert not num_other, f"{num_other} of {NUM_REPEATS} repeats differ from the first call"
    return {"repeats": NUM_REPEATS}


def _bits(output: torch.Tensor) -> torch.Tensor:
    return output.reshape(-1).view(torch.uint8)
