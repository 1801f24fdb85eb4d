"""What is counted: launches of the ops as a caller makes them, compiled for a GPU that is not there.

The tensors are on the CPU and never read; their addresses and strides decide what Triton specialises on, and so which
machine code comes out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import driver
import sass
import torch
from driver import draw_of
from sass import Pipe
from torch import Tensor

from mgt_kernels import triton as kernels

# sm_86 has the PTX, the limits and nearly the counts of sm_89
CAPABILITIES = (80, 89, 90, 100)

# token and drawn token as int64, log-probability as float32
_BYTES_PER_POSITION = 8 + 8 + 4
# maximum, sum, score, logit and token of a split, 32 bits each
_BYTES_PER_SPLIT = 5 * 4
# token, key, choice, its log-probability, divergence and whether the history is written
_BYTES_PER_DIFFERENCE = 8 + 8 + 4 + 4 + 4 + 1

_GROUP_SIZE = 128

# of a row of normally distributed logits with guidance, for each of top_k and top_p
_PASSES = 8

# from a loop's counts, the elements that a warp goes through and the warps of a program: how often the loop runs
Iterations = Callable[[sass.Counts, float, int], float]


def loads(bytes_per_element: float) -> Iterations:
    """Describe a loop over the elements by what it loads of each, so that unrolling does not matter."""
    return lambda counts, elements, num_warps: elements * bytes_per_element / counts.global_load_bytes


def reductions(times: int) -> Iterations:
    """Describe a loop by its sums over a program: one over each warp, and one over these where there are several."""
    return lambda counts, elements, num_warps: times * (1 if num_warps == 1 else 2) / counts.pipes[Pipe.REDUCE]


def tiles(counts: sass.Counts, elements: float, num_warps: int) -> float:
    """Describe the loop over the tiles of two rows, 2048 columns each."""
    return elements / 4096


def times(number: int) -> Iterations:
    """Describe a loop by how often it runs."""
    return lambda counts, elements, num_warps: number


def never(counts: sass.Counts, elements: float, num_warps: int) -> float:
    """Describe a loop that hardly ever runs."""
    return 0.0


@dataclass(frozen=True)
class Case:
    """One launch of a configuration: what its code does not tell."""

    kernel: str
    # in program order
    loops: tuple[Iterations, ...]
    # from the launches of the configuration the bytes that this one has to move
    dram_bytes: Callable[[list[driver.Launch]], int]
    # why the static lower bound is above what memory allows
    reason: str = ""


@dataclass(frozen=True)
class Configuration:
    op: str
    name: str
    launch: Callable[[], object]
    # elements that all programs go through together, and the bytes of each that the main loop loads
    num_elements: int
    bytes_per_element: int
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Counted:
    """A compiled launch together with how often its loops run."""

    configuration: Configuration
    case: Case
    launch: driver.Launch
    kernel: sass.Kernel
    num_ctas: int
    trips: tuple[int, ...]
    dram_bytes: int

    @property
    def name(self) -> str:
        return f"{self.case.kernel.strip('_').removesuffix('_kernel')}, {self.configuration.name}"

    @property
    def elements_per_iteration(self) -> float:
        """Elements that a warp consumes in an iteration of the main loop; 0 without one."""
        if self.kernel.main_loop is None:
            return 0.0
        return self.kernel.main.global_load_bytes / self.configuration.bytes_per_element


@functools.cache
def compile_for(configuration: Configuration, capability: int) -> tuple[Counted, ...]:
    """Run the launcher on a stand-in GPU and analyse what it would have launched."""
    with driver.standin_gpu(capability, execute=False) as launches:
        configuration.launch()
    names = [launch.kernel for launch in launches]
    expected = [case.kernel for case in configuration.cases]
    if names != expected:
        raise ValueError(f"{configuration.op}, {configuration.name}: expected the launches {expected}, got {names}")
    return tuple(_count(configuration, number, launches) for number in range(len(launches)))


def _count(configuration: Configuration, number: int, launches: list[driver.Launch]) -> Counted:
    case, launch = configuration.cases[number], launches[number]
    kernel = sass.analyse(launch.cubin, launch.num_warps, launch.shared)
    if len(kernel.loops) != len(case.loops):
        raise ValueError(
            f"{configuration.op}, {configuration.name}, sm_{kernel.capability}: {case.kernel} was expected to have"
            f" {len(case.loops)} loops, got {len(kernel.loops)}"
        )
    num_ctas = math.prod(launch.grid)
    elements = configuration.num_elements / (num_ctas * launch.num_warps)
    # rounded down: what ptxas peels off an unrolled loop is straight code
    trips = tuple(
        math.floor(iterations(counts, elements, launch.num_warps) + 1e-9)
        for iterations, counts in zip(case.loops, kernel.loop_counts, strict=True)
    )
    return Counted(configuration, case, launch, kernel, num_ctas, trips, case.dram_bytes(launches))


def _logits(num_positions: int, num_tokens: int, dtype: torch.dtype, position_major: bool) -> Tensor:
    if position_major:
        return torch.empty(1, num_tokens, num_positions, dtype=dtype).transpose(1, 2)
    return torch.empty(1, num_positions, num_tokens, dtype=dtype)


def _sample_tokens(
    name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    num_positions: int = 4096,
    guided: bool = True,
    noise_scale: float = 0.0,
    position_major: bool = False,
    truncated: bool = False,
    combine: Case | None = None,
    reason: str = "",
) -> Configuration:
    """Describe a draw of num_positions tokens, a batch of one; truncated by top_k and top_p."""
    num_tokens = 8192
    bytes_per_element = dtype.itemsize * (2 if guided else 1)

    def launch() -> None:
        halves = [_logits(num_positions, num_tokens, dtype, position_major) for _ in range(2 if guided else 1)]
        seed, step = torch.zeros(1, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
        tokens = torch.full((1, num_positions), num_tokens)
        uncond_logits = halves[1] if guided else None
        draw = draw_of(halves[0], tokens, seed, step, num_tokens, uncond_logits, 3.0, noise_scale)
        kernels.sample_tokens(draw, "masked", "", *((50, 0.9) if truncated else (0, 1.0)), 0.0, "kept")

    def dram_bytes(launches: list[driver.Launch]) -> int:
        per_position = _BYTES_PER_SPLIT * launches[0].grid[1] if combine else _BYTES_PER_POSITION
        return num_positions * (num_tokens * bytes_per_element + per_position)

    # past the main loop: the race of all exact scores, for the rare row that the bounds do not decide
    loops: tuple[Iterations, ...] = (loads(bytes_per_element), never)
    if position_major:
        # an outer loop over the tiles around both; in between the tail of a row
        loops = (never, loads(bytes_per_element), never, never, never)
    case = Case("sample_tokens_kernel", loops, dram_bytes, reason)
    cases = (case, combine) if combine else (case,)
    if truncated:
        # the largest logit, the passes for top_k, the sum of all weights and the passes for top_p; these, but for the
        # first, find a row in the caches
        once, of_passes = loads(bytes_per_element), (times(_PASSES), loads(bytes_per_element * _PASSES))
        passes = (once, *of_passes, once, *of_passes)
        cases = (Case("kept_from_kernel", passes, dram_bytes, _SEARCH), *cases)
    return Configuration("sample_tokens", name, launch, num_positions * num_tokens, bytes_per_element, cases)


def _combine_splits(num_positions: int) -> Case:
    return Case(
        "combine_splits_kernel",
        (),
        lambda launches: num_positions * (_BYTES_PER_POSITION + _BYTES_PER_SPLIT * launches[0].grid[1]),
        reason="a few kilobytes: the launch itself takes longer than either",
    )


def _mask_by_confidence(num_positions: int) -> Configuration:
    # the keys, the bits of the threshold, the choice from the keys and the tokens
    case = Case(
        "mask_by_confidence_kernel",
        (loads(4), reductions(32), loads(8 + 8)),
        lambda launches: num_positions * _BYTES_PER_POSITION,
        reason=_PER_SAMPLE,
    )

    def launch() -> None:
        seed, step = torch.zeros(1, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
        token_ids, logprob = torch.empty(1, num_positions, dtype=torch.int64), torch.empty(1, num_positions)
        kernels.mask_by_confidence(token_ids, logprob, torch.ones_like(seed), seed, step, num_positions, 1.3)

    return Configuration("mask_by_confidence", f"{num_positions} positions, noise", launch, num_positions, 4, (case,))


def _differential_sample(
    name: str, *, variant: str = "paper", aliased_history: bool = False, position_major: bool = False
) -> Configuration:
    """Describe a step with a history of 4096 positions, a batch of one."""
    num_positions, num_tokens = 4096, 8192
    # both halves' logits; a code of the history takes as many bytes as a logit
    bytes_per_element, bytes_of_code = 4, 2
    (sample,) = _sample_tokens("", position_major=position_major).cases

    def launch() -> None:
        halves = [_logits(num_positions, num_tokens, torch.bfloat16, position_major) for _ in range(2)]
        history = torch.empty(halves[0].shape, dtype=torch.int16)
        seed, step = torch.zeros(1, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
        tokens = torch.full((1, num_positions), num_tokens)
        draw = draw_of(halves[0], tokens, seed, step, num_tokens, halves[1], 3.0)
        written = torch.empty(tokens.shape, dtype=torch.bool)
        kernels.differential_sample(
            draw, history, written, step.clone(), seed.clone(), True, 0.75, variant, aliased_history
        )

    def dram_bytes(accesses_of_code: int) -> Callable[[list[driver.Launch]], int]:
        per_row = num_tokens * (bytes_per_element + accesses_of_code * bytes_of_code)
        return lambda launches: num_positions * (per_row + _BYTES_PER_DIFFERENCE)

    read_both = loads(bytes_per_element)
    # the tiles, in each their maximum and their sum; the tiles again, in each the comparison
    loops = (tiles, read_both, read_both, tiles, loads(bytes_per_element + bytes_of_code))
    # bytes per position, not per element: token, key, choice and its log-probability
    bytes_of_choice = 8 + 8 + 4 + 4
    count_of_masked = (loads(8 / num_tokens),)
    cases = [
        sample,
        Case("compare_kernel", loops, dram_bytes(1 if aliased_history else 2), _ORDER_OF_THE_CPU),
        Case(
            "select_kernel",
            (*(count_of_masked if variant == "paper" else ()), reductions(32), loads(bytes_of_choice / num_tokens)),
            lambda launches: num_positions * bytes_of_choice,
            _PER_SAMPLE,
        ),
    ]
    if aliased_history:
        cases.append(Case("edit_history_kernel", (), dram_bytes(2)))
    cases.append(Case("advance_history_step_kernel", (), lambda launches: 3 * 8, _ONE_NUMBER))
    return Configuration(
        "differential_sample", name, launch, num_positions * num_tokens, bytes_per_element, tuple(cases)
    )


def _w4a8_linear(
    num_rows: int, num_inputs: int = 1024, num_outputs: int = 4096, *, num_splits: int = 1, reason: str = ""
) -> Configuration:
    """Describe a layer; an element is a byte that a kernel's main loop loads."""
    num_groups = num_inputs // _GROUP_SIZE

    def launch() -> None:
        x, w_q, scale, zero_point, bias = _linear_layer(num_rows, num_inputs, num_outputs)
        kernels.w4a8_linear(x, w_q, scale, zero_point, _GROUP_SIZE, None, bias)

    def quantized_bytes(launches: list[driver.Launch]) -> int:
        return num_rows * num_inputs * (2 + 1)

    # of all groups, float32; they stay in the L2
    sum_bytes = num_rows * num_groups * num_outputs * 4

    def linear_bytes(launches: list[driver.Launch]) -> int:
        # activations, their sums, their scales, outputs
        activations = num_rows * (num_inputs + num_groups * 4 + 4)
        outputs = num_rows * num_outputs * 2 if num_splits == 1 else sum_bytes
        return _weight_bytes(num_inputs, num_outputs) + activations + outputs

    quantize = Case("quantize_rows_kernel", (loads(2), loads(2)), quantized_bytes, _FEW_ROWS)
    linear = Case("w4a8_linear_kernel", (times(num_groups // num_splits),), linear_bytes, reason)
    cases = [quantize, linear]
    if num_splits > 1:
        # four groups at a time, then the others
        loops = (times(num_groups // 4), never)
        cases.append(Case("add_groups_kernel", loops, lambda launches: sum_bytes))
    name = _rows(num_rows) + (", split" if num_splits > 1 else "")
    return Configuration("w4a8_linear", name, launch, num_rows * num_inputs, 1, tuple(cases))


def _w4a16_linear(
    num_rows: int, num_inputs: int = 1024, num_outputs: int = 4096, *, num_splits: int = 1, reason: str = ""
) -> Configuration:
    """Describe a layer, one that need not be batch-invariant where it is split; elements as in a W4A8 one."""

    def launch() -> None:
        x, w_q, scale, zero_point, bias = _linear_layer(num_rows, num_inputs, num_outputs)
        kernels.w4a16_linear(x, w_q, scale, zero_point, _GROUP_SIZE, bias, num_splits == 1)

    sum_bytes = num_splits * num_rows * num_outputs * 4

    def dram_bytes(launches: list[driver.Launch]) -> int:
        outputs = num_rows * num_outputs * 2 if num_splits == 1 else sum_bytes
        return _weight_bytes(num_inputs, num_outputs) + num_rows * num_inputs * 2 + outputs

    cases = [Case("w4a16_linear_kernel", (times(num_inputs // _GROUP_SIZE // num_splits),), dram_bytes, reason)]
    if num_splits > 1:
        cases.append(Case("add_splits_kernel", (), lambda launches: sum_bytes, _FEW_ROWS))
    name = _rows(num_rows) + (", split" if num_splits > 1 else "")
    return Configuration("w4a16_linear", name, launch, num_rows * num_inputs, 1, tuple(cases))


def _dequantize(num_inputs: int = 1024, num_outputs: int = 4096) -> Configuration:
    """Describe what a layer of many rows does before PyTorch multiplies; an element is a byte of nibbles."""

    def launch() -> None:
        x, w_q, scale, zero_point, _ = _linear_layer(4096, num_inputs, num_outputs)
        kernels.w4a16_linear(x, w_q, scale, zero_point, _GROUP_SIZE, None, False)

    def dram_bytes(launches: list[driver.Launch]) -> int:
        return _weight_bytes(num_inputs, num_outputs) + num_outputs * num_inputs * 2

    case = Case("dequantize_kernel", (), dram_bytes)
    return Configuration("w4a16_linear", "dequantized", launch, num_outputs * num_inputs // 2, 1, (case,))


def _merging(name: str, num_tokens: int, dtype: torch.dtype, num_channels: int = 1024) -> tuple[Configuration, ...]:
    """Describe the ops of token merging on a square grid, half of whose tokens merge, a batch of one."""
    side = math.isqrt(num_tokens)
    num_rows = num_tokens // 2
    num_sources, num_destinations = num_tokens // 4 * 3, num_tokens // 4
    token_bytes = num_channels * dtype.itemsize
    # of an index
    index_bytes = 8

    def match() -> None:
        x, seed = torch.empty(1, num_tokens, num_channels, dtype=dtype), torch.zeros(1, dtype=torch.int64)
        kernels.match_tokens(x, side, side, num_rows, 0.0, seed, torch.zeros((), dtype=torch.int64))

    def match_of() -> tuple[Tensor, Tensor, Tensor]:
        row, members = torch.empty(2, 1, num_tokens, dtype=torch.int64)
        return row, members, torch.empty(1, num_tokens + 1, dtype=torch.int64)

    def merge() -> None:
        kernels.merge_tokens(torch.empty(1, num_tokens, num_channels, dtype=dtype), *match_of(), num_rows)

    def unmerge() -> None:
        kernels.unmerge_tokens(torch.empty(1, num_rows, num_channels, dtype=dtype), match_of()[0])

    # the program that lists destinations runs short
    measure = Case(
        "measure_tokens_kernel", (loads(dtype.itemsize), never, never),
        lambda launches: num_tokens * (token_bytes + 4 + 8 + 4) + num_destinations * 8, _SHORT_PROGRAMS,
    )  # fmt: skip
    block_channels = 16 if dtype == torch.float32 else 64
    multiply = Case(
        "match_sources_kernel", (times(num_channels // block_channels),),
        lambda launches: num_tokens * (token_bytes + 4) + num_sources * 8, _PRODUCTS,
    )  # fmt: skip
    select = Case(
        "select_merged_kernel",
        # keys from corners, products and norms; the bits of the threshold; the choice from the keys; rows and sizes
        (loads((4 + 8 + 4 + 4) / num_channels), reductions(32), loads(8 / num_channels),
         loads((8 + 8 + 4) / num_channels)),
        lambda launches: num_tokens * (8 + 4 + 8 + 4) + num_destinations * 8, _PER_SAMPLE,
    )  # fmt: skip
    # on average half of the others lie before
    members = Case(
        "list_members_kernel", (times(num_tokens // 128 // 2),),
        lambda launches: num_tokens * 3 * index_bytes, _PAIRS,
    )  # fmt: skip
    # the rows of a block go through as many tokens as the largest has: two where half of them merge
    average = Case(
        "merge_tokens_kernel", (times(1),),
        lambda launches: num_tokens * (token_bytes + index_bytes) + num_rows * (token_bytes + index_bytes), _FEW_TOKENS,
    )  # fmt: skip
    copy = Case(
        "unmerge_tokens_kernel", (),
        lambda launches: num_rows * token_bytes + num_tokens * (token_bytes + index_bytes), _FEW_TOKENS,
    )  # fmt: skip
    num_elements = num_tokens * num_channels
    matching = Configuration(
        "match_tokens", name, match, num_elements, dtype.itemsize, (measure, multiply, select, members)
    )
    return (
        matching,
        Configuration("merge_tokens", name, merge, num_elements, dtype.itemsize, (average,)),
        Configuration("unmerge_tokens", name, unmerge, num_elements, dtype.itemsize, (copy,)),
    )


def _rows(num_rows: int) -> str:
    return f"bf16, {num_rows} rows"


def _weight_bytes(num_inputs: int, num_outputs: int) -> int:
    """Count nibbles, scales in float16, zero points and a bias in float32."""
    return num_outputs * (num_inputs // 2 + num_inputs // _GROUP_SIZE * (2 + 1) + 4)


def _linear_layer(num_rows: int, num_inputs: int, num_outputs: int) -> tuple[Tensor, ...]:
    return (
        torch.empty(num_rows, num_inputs, dtype=torch.bfloat16),
        torch.empty(num_outputs, num_inputs // 2, dtype=torch.uint8),
        torch.empty(num_outputs, num_inputs // _GROUP_SIZE, dtype=torch.float16),
        torch.empty(num_outputs, num_inputs // _GROUP_SIZE, dtype=torch.uint8),
        torch.empty(num_outputs),
    )


_UNGUIDED = "issue: each element takes a draw and an exponential as it does with guidance, for half the bytes"
_NOISE = "issue: a Gaussian per element on top of the draw, and the Philox words for both"
_PER_SAMPLE = "one program per sample, and so one multiprocessor at batch 1: a matter of latency, not of bandwidth"
_ORDER_OF_THE_CPU = (
    "issue: sums in the CPU's order take a thread for each of 16 lanes, a column at a time, in three readings"
)
_SHORT_PROGRAMS = "issue: the beginning and the end of a program around one iteration of its main loop"
_FEW_ROWS = "a few kilobytes: the launch itself takes longer"
_GROUPS = (
    "issue: each group of 128 inputs ends in three instructions for each output, to add it in float32 and in order"
)
_SEARCH = "issue: each token is weighed, and compared with six keys, in each of sixteen passes"
_ONE_NUMBER = "three numbers: the launch itself takes longer"
_PRODUCTS = "each token meets a quarter of the others, from the caches"
_PAIRS = "issue: each token is compared with all that lie before it"
_FEW_TOKENS = "issue: a program begins and ends around two vectors of each thread"
_UNSHARED = "issue: four instructions make a weight a bfloat16, which only 16 rows share"

CONFIGURATIONS = (
    _sample_tokens("bf16 guided"),
    _sample_tokens("bf16 guided, noise", noise_scale=1.0, reason=_NOISE),
    _sample_tokens("bf16", guided=False, reason=_UNGUIDED),
    _sample_tokens("fp32 guided", dtype=torch.float32),
    _sample_tokens("bf16 guided, position-major", position_major=True),
    _sample_tokens("bf16 guided, top_k and top_p", truncated=True),
    _sample_tokens(
        "bf16 guided, 256 positions", num_positions=256, combine=_combine_splits(256), reason=_SHORT_PROGRAMS
    ),
    _differential_sample("bf16 guided, differences"),
    _differential_sample("bf16 guided, position-major, differences", position_major=True),
    _differential_sample("bf16 guided, aliased differences", variant="official", aliased_history=True),
    _mask_by_confidence(256),
    _mask_by_confidence(4096),
    _mask_by_confidence(16384),
    _w4a8_linear(4096, reason=_GROUPS),
    _w4a8_linear(16),
    _w4a8_linear(16, 4096, 1024, num_splits=4),
    _w4a16_linear(4096),
    _w4a16_linear(16, reason=_UNSHARED),
    _w4a16_linear(16, 4096, 1024, num_splits=4, reason=_UNSHARED),
    _dequantize(),
    *_merging("bf16, 4096 tokens", 4096, torch.bfloat16),
    *_merging("fp32, 1024 tokens", 1024, torch.float32),
)
