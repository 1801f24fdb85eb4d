"""w4a16_linear: every path against the oracle by the house rule, and rows that do not depend on their batch."""

import pytest
import torch
from compare import assert_no_worse_than_naive
from test_w4a8_linear import GOOD, SHAPES, make_case

import mgt_kernels
from mgt_kernels import PackedInt4, cpu, reference

ARGUMENTS = {name: value for name, value in GOOD.items() if name != "x_scale"}


def naive(x, weight, bias):
    """PyTorch's chain on the same bfloat16 operands: products in float32, added one by one."""
    w = weight.dequantize(torch.bfloat16).float()
    return (x.bfloat16().float()[:, None] * w).cumsum(-1)[..., -1] + bias


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [32, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_oracle(isa, shape, group_size, dtype):
    scale_dtype = torch.float32 if group_size == 96 else torch.float16
    x, weight, bias = make_case(*shape, dtype, group_size, scale_dtype=scale_dtype)
    y = mgt_kernels.w4a16_linear(x, weight, bias, backend=isa)
    assert y.dtype == dtype and y.shape == (shape[0], shape[2])
    truth = reference.w4a16_linear(x, weight, bias)
    if dtype == torch.bfloat16:
        float_y = mgt_kernels.w4a16_linear(x.float(), weight, bias, backend=isa)
        assert torch.equal(y, float_y.bfloat16())
        y = float_y
    assert_no_worse_than_naive(y, truth, naive(x, weight, bias))


def test_a_row_does_not_depend_on_its_batch(isa):
    x, weight, bias = make_case(450, 320, 200)
    y = mgt_kernels.w4a16_linear(x, weight, bias, backend=isa)
    for rows in (slice(0, 1), slice(3, 10), slice(17, 18), slice(100, 333), slice(449, 450)):
        assert torch.equal(mgt_kernels.w4a16_linear(x[rows], weight, bias, backend=isa), y[rows])
    torch.set_num_threads(1)
    assert torch.equal(mgt_kernels.w4a16_linear(x, weight, bias, backend=isa), y)


def test_operands_are_rounded_to_bfloat16(backend):
    x, weight, _ = make_case(4, 64, 20)
    assert torch.equal(
        mgt_kernels.w4a16_linear(x, weight, backend=backend),
        mgt_kernels.w4a16_linear(x.bfloat16().float(), weight, backend=backend),
    )


def test_edge_shapes_strides_and_inputs_kept(backend):
    x, weight, bias = make_case(12, 64, 20)
    assert mgt_kernels.w4a16_linear(x[:0], weight, backend=backend).shape == (0, 20)
    expected = mgt_kernels.w4a16_linear(x, weight, bias, backend=backend)
    wide = torch.full((12, 100), torch.nan)
    wide[:, 10:74] = x
    assert torch.equal(mgt_kernels.w4a16_linear(wide[:, 10:74], weight, bias, backend=backend), expected)
    assert torch.equal(
        mgt_kernels.w4a16_linear(x.view(3, 4, 64), weight, bias, backend=backend), expected.view(3, 4, 20)
    )
    assert torch.equal(mgt_kernels.w4a16_linear(torch.zeros(2, 64), weight, bias, backend=backend), bias.expand(2, 20))


def test_the_comparison_can_fail():
    x, weight, bias = make_case(33, 200, 70)
    expected = reference.w4a16_linear(x, weight, bias)
    one = weight.w_q.clone()
    one[69, 5] ^= 1
    changed = PackedInt4(one, weight.scale, weight.zero_point, weight.shape, 128)
    with pytest.raises(AssertionError, match="exceeds the naive chain"):
        assert_no_worse_than_naive(mgt_kernels.w4a16_linear(x, changed, bias), expected, naive(x, weight, bias))


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(x=ARGUMENTS["x"].half()), TypeError, "x: expected dtype torch.float32 or torch.bfloat16"),
        (dict(x=ARGUMENTS["x"][:, :60]), ValueError, "x: expected 64 inputs"),
        (dict(weight=None), TypeError, "weight: expected a PackedInt4"),
        (dict(bias=torch.zeros(1, 20)), ValueError, "bias: expected 1 dimensions"),
        (dict(backend="bf16"), ValueError, "backend: expected one of"),
        (dict(batch_invariant=0), TypeError, "batch_invariant: expected a bool, got int"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    with pytest.raises(error, match=words):
        mgt_kernels.w4a16_linear(**(ARGUMENTS | change))


# the smallest float32 that rounds to inf in bfloat16: 2^127 (2 - 2^-8)
ROUNDS_TO_INF = 2.0**128 - 2.0**119


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, ROUNDS_TO_INF])
def test_bad_activations_are_named(backend, value):
    x = ARGUMENTS["x"].clone()
    x[4, 63] = value
    with pytest.raises(ValueError, match="x: row 4 holds NaN, inf"):
        mgt_kernels.w4a16_linear(**(ARGUMENTS | dict(x=x, backend=backend)))


def test_the_largest_activation(backend):
    x, weight, _ = make_case(3, 64, 8)
    x[1] = 0
    x[1, 5] = torch.nextafter(torch.tensor(ROUNDS_TO_INF), torch.tensor(0.0))
    y = mgt_kernels.w4a16_linear(x, weight, backend=backend)
    expected = weight.dequantize()[:, 5].bfloat16().double() * x[1, 5].bfloat16().double()
    inside = expected.abs() < 2.0**127
    assert inside.any() and torch.equal(y[1].double()[inside], expected[inside])


def test_info_names_the_kernels():
    kernels = mgt_kernels.info()["kernels"]
    assert kernels["w4a16_linear"] == cpu.kernel_isa("w4a16_linear") in cpu.available_isas()
    assert kernels["sample_tokens"] in ("scalar", "avx2", "avx512")
    with pytest.raises(ValueError, match="op: 'softmax' has no CPU kernels"):
        cpu.kernel_isa("softmax")
