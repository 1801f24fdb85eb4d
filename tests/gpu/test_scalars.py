"""Scalars that the kernels read from tensors: the results of numbers, whatever the tensors hold at each replay."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cases import CASES, SCALARS, Case, with_numbers
from driver import standin_gpu

from mgt_kernels.triton.draws import LAUNCH_OPTIONS
from mgt_kernels.triton.scalars import inverse_of, load_inverse_temperature, load_scalar

INF, NAN = math.inf, math.nan
FP32, FP64 = torch.float32, torch.float64
# guidance, noise, temperature of each step
SCHEDULE = ((3.0, 0.5, 0.7), (0.0, 0.0, 1.0), (-1.5, 0.0, 0.0), (1.0, 1.5, 0.0))


def case_named(name: str) -> Case:
    (case,) = [case for case in CASES if case.name == name]
    return case


@triton.jit
def _load_kernel(y_ptr, x_ptr):
    x_ptr += tl.program_id(0)
    y_ptr += 3 * tl.program_id(0)
    inverse, is_greedy = load_inverse_temperature(x_ptr)
    tl.store(y_ptr, load_scalar(x_ptr, 0.0, float("nan")))
    tl.store(y_ptr + 1, inverse)
    tl.store(y_ptr + 2, is_greedy.to(tl.float32))


@pytest.mark.parametrize("dtype", [FP64, FP32, torch.bfloat16, torch.float16])
def test_a_tensor_is_rounded_as_a_number(dtype, capability):
    numbers = [0.0, -0.0, 1.0, 0.7, 1 / 3, 2.5, 65504.0, 1e-30, 1e-38, 1e-40, 1e-300, 3e38, 1e39, -1e-300, -2.0, INF,
               -INF, NAN, 0.1 + 2**-29]  # fmt: skip
    x, y = torch.tensor(numbers, dtype=dtype), torch.full((len(numbers), 3), 7.0)
    with standin_gpu(capability):
        _load_kernel[(len(numbers),)](y, x, **LAUNCH_OPTIONS)
    for value, (scalar, inverse, is_greedy) in zip(x.tolist(), y.tolist(), strict=True):
        with np.errstate(over="ignore"):
            rounded = float(np.float32(value))
        valid = value >= 0 and rounded < INF
        assert scalar == rounded if valid else math.isnan(scalar)
        assert is_greedy == (value == 0)
        # the smallest temperature as float32
        valid = value == 0 or float(np.float32(1e-30)) <= rounded < INF
        assert inverse == inverse_of(value) if valid else math.isnan(inverse)


def replay(case: Case, capability: int, schedule: tuple) -> None:
    """Compare launches whose arguments stay while the tensors' values change with launches of the numbers."""
    positions = SCALARS[case.op]
    arguments = list(case.make_arguments())
    # unaligned, as an element of a schedule is
    tensors = torch.zeros(3, 3)[1, 3 - len(positions) :]
    for i, k in enumerate(positions):
        arguments[k] = tensors[i]
    launched = set()
    for values in schedule:
        tensors.copy_(torch.tensor(values))
        with standin_gpu(capability) as launches:
            outputs = case.run(tuple(arguments))
        launched.add(tuple((x.cubin, x.arguments["guidance_scale"].data_ptr()) for x in launches
                           if "guidance_scale" in x.arguments))  # fmt: skip
        with standin_gpu(capability):
            expected = case.run(with_numbers(tuple(arguments)))
        for i, (ours, theirs) in enumerate(zip(outputs, expected, strict=True)):
            if i == 1 and case.op != "mask_by_confidence" and arguments[0].dtype != FP32 and values[1] == 0:
                # without noise two warps add up what four do with it
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-6, equal_nan=True)
            else:
                assert torch.equal(bits(ours), bits(theirs)), (i, values)
    assert len(launched) == 1


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32) if x.dtype == FP32 else x


# ties, zeros of both signs, the unguided half
def test_a_replayed_draw_follows_the_schedule():
    replay(case_named("fp32 greedy with ties"), 90, SCHEDULE)


def test_a_replayed_draw_without_guidance():
    replay(case_named("fp32 unguided, warm"), 80, ((NAN, 0.0, 2.5), (1.0, 0.0, 0.0)))


def test_a_replayed_draw_of_16_bits():
    replay(case_named("bf16 noise, -inf, the mask in the vocabulary"), 80, ((3.1, 2.0, 0.8), (3.1, 0.0, 1.0)))


def test_replayed_masks_follow_the_schedule(capability):
    replay(case_named("N=256 temperature=1.3 digits=3"), capability, ((0.0,), (1.3,), (3e38,)))


def test_replayed_differences_follow_the_schedule(request):
    if not request.config.getoption("every_architecture"):
        pytest.skip("the aliased history's replay runs the same kernels; --every-architecture runs this one too")
    replay(case_named("paper greedy"), 90, ((2.5, 0.0, 0.0), (1.5, 0.0, 1.0)))


def test_replayed_differences_of_an_aliased_history():
    replay(case_named("official, aliased, bf16, noise"), 80, ((2.5, 0.5, 1.0),))


@pytest.mark.parametrize(
    "values", [(NAN, 0, 1), (INF, 0, 1), (3, -1, 1), (3, NAN, 1), (3, 0, NAN), (3, 0, -1), (3, 0, INF), (3, 0, 1e-31)]
)
def test_a_scalar_out_of_range_makes_every_row_a_bad_one(values):
    case = case_named("fp32 greedy with ties")
    arguments = list(case.make_arguments())
    for i, value in zip(SCALARS[case.op], values, strict=True):
        arguments[i] = torch.tensor(value, dtype=FP32)
    with standin_gpu(80):
        token_ids, logprob = case.run(tuple(arguments))
    masked = arguments[1] == arguments[4]
    assert torch.equal(token_ids, arguments[1])
    assert logprob[masked].isnan().all() and (logprob[~masked] == INF).all()


@pytest.mark.parametrize("value", [NAN, INF, -1.0])
def test_a_temperature_of_masks_that_is_out_of_range_counts_as_0(value):
    case = case_named("N=256 temperature=1.3 digits=3")
    *arguments, _ = case.make_arguments()
    with standin_gpu(80):
        outputs = case.run((*arguments, torch.tensor(value)))
    case.check((*arguments, 0.0), case.expected(*arguments, 0.0), outputs)
