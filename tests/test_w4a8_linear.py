"""w4a8_linear: the integers exactly, the rest by the house rule, the same bits on every path and in every batch."""

import pytest
import torch
from compare import assert_no_worse_than_naive

import mgt_kernels
from mgt_kernels import PackedInt4, cpu, quantize_int4, reference

# around every count of lanes, rows of a tile and outputs of a panel; groups that end early
SHAPES = [(1, 1, 1), (2, 31, 15), (5, 32, 16), (7, 33, 17), (15, 64, 31), (17, 65, 63), (33, 100, 65), (50, 200, 130),
          (65, 384, 128), (97, 129, 64), (193, 192, 70)]  # fmt: skip


def make_case(num_rows, num_inputs, num_outputs, dtype=torch.float32, group_size=128, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(num_rows, num_inputs, generator=generator) * 2).to(dtype)
    weight = quantize_int4(torch.randn(num_outputs, num_inputs, generator=generator), group_size, **options)
    return x, weight, torch.randn(num_outputs, generator=generator)


def naive(x, weight, x_scale, bias):
    """What PyTorch's float32 chain makes of the same integers."""
    sums = reference.group_sums(reference.quantize_activations(x, x_scale), weight)
    return (torch.einsum("mng,ng->mn", sums.float(), weight.scale.float()) * x_scale + bias).to(x.dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_oracle(isa, shape, group_size, dtype):
    scale_dtype = torch.float32 if group_size == 64 else torch.float16
    x, weight, bias = make_case(*shape, dtype, group_size, scale_dtype=scale_dtype)
    y = mgt_kernels.w4a8_linear(x, weight, bias=bias, backend=isa)
    assert y.dtype == dtype and y.shape == (shape[0], shape[2])
    x_scale = reference.dynamic_scale(x)
    truth = reference.w4a8_linear(x, weight, x_scale, bias)
    if dtype == torch.bfloat16:
        # rounded once more: to the nearest, or the one beside it where float32 lies on the other side of the middle
        float_y = mgt_kernels.w4a8_linear(x.float(), weight, bias=bias, backend=isa)
        assert torch.equal(y, float_y.bfloat16())
        y = float_y
    assert_no_worse_than_naive(y, truth, naive(x.float(), weight, x_scale, bias))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 256])
def test_the_integer_sums_are_exact(isa, shape, group_size):
    # with scales of 1 the result is the sum of the groups, an integer that float32 holds
    x, weight, _ = make_case(*shape, group_size=group_size)
    weight = PackedInt4(weight.w_q, torch.ones_like(weight.scale), weight.zero_point, weight.shape, group_size)
    x_q = reference.quantize_activations(x, torch.tensor(0.03))
    y = mgt_kernels.w4a8_linear(x_q.float(), weight, 1.0, backend=isa)
    assert torch.equal(y, reference.group_sums(x_q, weight).sum(-1).float())


@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("w_q, zero_point", [(15, 0), (0, 15), (15, 15), (0, 0)])
def test_nothing_saturates(isa, value, w_q, zero_point):
    num_inputs, num_outputs = 1024, 80
    weight = PackedInt4(
        torch.full((num_outputs, 512), w_q * 17, dtype=torch.uint8),
        torch.ones(num_outputs, 1),
        torch.full((num_outputs, 1), zero_point, dtype=torch.uint8),
        (num_outputs, num_inputs),
        1024,
    )
    y = mgt_kernels.w4a8_linear(torch.full((9, num_inputs), float(value)), weight, 1.0, backend=isa)
    assert (y == value * (w_q - zero_point) * num_inputs).all()


def test_every_path_gives_the_same_bits():
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x, weight, bias = make_case(*shape, dtype)
            outputs = [mgt_kernels.w4a8_linear(x, weight, 0.05, bias, backend=isa) for isa in cpu.available_isas()]
            assert all(torch.equal(y, outputs[0]) for y in outputs)


def test_a_row_does_not_depend_on_its_batch(isa):
    x, weight, bias = make_case(450, 320, 200)
    y = mgt_kernels.w4a8_linear(x, weight, 0.04, bias, backend=isa)
    for rows in (slice(0, 1), slice(3, 10), slice(17, 18), slice(100, 333), slice(449, 450)):
        assert torch.equal(mgt_kernels.w4a8_linear(x[rows], weight, 0.04, bias, backend=isa), y[rows])
    torch.set_num_threads(1)
    assert torch.equal(mgt_kernels.w4a8_linear(x, weight, 0.04, bias, backend=isa), y)


# results of more than two megabytes, which are written past the caches; rows on cache lines, and not
@pytest.mark.parametrize("num_outputs", [1024, 1001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [mgt_kernels.w4a8_linear, mgt_kernels.w4a16_linear])
def test_large_results_are_those_of_their_parts(op, dtype, num_outputs, isa):
    x, weight, bias = make_case(1100, 64, num_outputs, dtype)
    y = op(x, weight, bias=bias, backend=isa)
    assert y.nbytes > 2**21
    assert torch.equal(y, torch.cat([op(part, weight, bias=bias, backend=isa) for part in x.split(100)]))


def test_scales_for_tensor_halves_and_rows(backend):
    x, weight, bias = make_case(6, 64, 20)
    one = mgt_kernels.w4a8_linear(x, weight, 0.03, bias, backend=backend)
    assert torch.equal(one, mgt_kernels.w4a8_linear(x, weight, torch.tensor(0.03), bias, backend=backend))
    assert torch.equal(one, mgt_kernels.w4a8_linear(x, weight, torch.full((6,), 0.03), bias, backend=backend))
    halves = mgt_kernels.w4a8_linear(x, weight, torch.tensor([0.03, 0.07]), bias, backend=backend)
    assert torch.equal(halves[:3], one[:3])
    assert torch.equal(halves[3:], mgt_kernels.w4a8_linear(x[3:], weight, 0.07, bias, backend=backend))
    dynamic = mgt_kernels.w4a8_linear(x, weight, None, bias, backend=backend)
    by_hand = (x.abs().amax(-1) / 127).contiguous()
    assert torch.equal(dynamic, mgt_kernels.w4a8_linear(x, weight, by_hand, bias, backend=backend))


def test_rounding_is_half_to_even_and_clamped(isa):
    # a weight of 1 at one input shows x_q
    num_inputs = 64
    weight = torch.eye(num_inputs)
    packed = quantize_int4(weight, 32, scale_dtype=torch.float32)
    ones = PackedInt4(packed.w_q // 15, torch.ones(64, 2), torch.zeros(64, 2, dtype=torch.uint8), (64, 64), 32)
    x = torch.zeros(1, 64)
    x[0, :8] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 1e30, -1e30])
    y = mgt_kernels.w4a8_linear(x, ones, 1.0, backend=isa)
    assert y[0, :8].tolist() == [0, 2, 2, 0, -2, 126, 127, -128]


def test_zero_rows_and_zero_activations(backend):
    x, weight, bias = make_case(4, 64, 20)
    assert mgt_kernels.w4a8_linear(x[:0], weight, backend=backend).shape == (0, 20)
    assert mgt_kernels.w4a8_linear(torch.zeros(2, 3, 64), weight, bias=bias, backend=backend).equal(
        bias.expand(2, 3, 20)
    )


def test_strides_and_inputs_kept(backend):
    x, weight, bias = make_case(12, 64, 20)
    wide = torch.full((12, 100), torch.nan)
    wide[:, 10:74] = x
    expected = mgt_kernels.w4a8_linear(x, weight, 0.05, bias, backend=backend)
    view = wide[:, 10:74]
    assert torch.equal(mgt_kernels.w4a8_linear(view, weight, 0.05, bias, backend=backend), expected)
    assert torch.equal(mgt_kernels.w4a8_linear(x.T.contiguous().T, weight, 0.05, bias, backend=backend), expected)
    shared = x[:1].expand(12, 64)
    assert torch.equal(
        mgt_kernels.w4a8_linear(shared, weight, 0.05, bias, backend=backend), expected[:1].expand(12, 20)
    )
    assert torch.equal(view, x)


def test_the_comparison_can_fail():
    x, weight, bias = make_case(33, 200, 70)
    expected = mgt_kernels.w4a8_linear(x, weight, 0.05, bias, backend="reference")
    one = weight.w_q.clone()
    one[69, 5] ^= 1
    changed = PackedInt4(one, weight.scale, weight.zero_point, weight.shape, 128)
    assert not torch.equal(mgt_kernels.w4a8_linear(x, changed, 0.05, bias), expected)
    assert (mgt_kernels.w4a8_linear(x, weight, 0.051, bias) - expected).abs().max() > 1e-3


GOOD = dict(zip(("x", "weight", "bias"), make_case(6, 64, 20), strict=True), x_scale=0.1)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(x=3.0), TypeError, "x: expected a tensor"),
        (dict(x=GOOD["x"].double()), TypeError, "x: expected dtype torch.float32 or torch.bfloat16"),
        (dict(x=GOOD["x"][:, :60]), ValueError, r"x: expected 64 inputs in the last dimension, got shape \(6, 60\)"),
        (dict(x=torch.tensor(1.0)), ValueError, "x: expected at least one dimension"),
        (dict(weight=torch.zeros(20, 64)), TypeError, "weight: expected a PackedInt4"),
        (dict(bias=torch.zeros(19)), ValueError, r"bias: expected shape \(20,\)"),
        (dict(bias=torch.zeros(20, dtype=torch.int64)), TypeError, "bias: expected dtype"),
        (dict(x_scale=0.0), ValueError, "x_scale: expected a finite number"),
        (dict(x_scale=-1.0), ValueError, "x_scale: expected a finite number"),
        (dict(x_scale=float("nan")), ValueError, "x_scale: expected a finite number"),
        (dict(x_scale=torch.tensor([1.0, 0.0])), ValueError, "x_scale: value 1 is 0.0"),
        (dict(x_scale=torch.tensor([torch.inf])), ValueError, "x_scale: value 0 is inf"),
        (dict(x_scale=torch.ones(4)), ValueError, "x_scale: expected as many values as divide the 6 rows of x, got 4"),
        (dict(x_scale=torch.ones(6).double()), TypeError, "x_scale: expected dtype torch.float32"),
        (dict(backend="vnni"), ValueError, "backend: expected one of"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    with pytest.raises(error, match=words):
        mgt_kernels.w4a8_linear(**(GOOD | change))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bad_activations_are_named(backend, value):
    for row, column in ((4, 63), (0, 0)):
        x = GOOD["x"].clone()
        x[row, column] = value
        with pytest.raises(ValueError, match=f"x: row {row} holds NaN, inf"):
            mgt_kernels.w4a8_linear(**(GOOD | dict(x=x, backend=backend)))
        with pytest.raises(ValueError, match=f"x: row {row} holds NaN, inf"):
            mgt_kernels.w4a8_linear(**(GOOD | dict(x=x, x_scale=None, backend=backend)))


def test_compiles_without_a_graph_break():
    x, weight, bias = make_case(6, 64, 20)
    layer = torch.compile(lambda x: mgt_kernels.w4a8_linear(x, weight, 0.05, bias), fullgraph=True, backend="eager")
    assert torch.equal(layer(x), mgt_kernels.w4a8_linear(x, weight, 0.05, bias))
    torch.library.opcheck(
        torch.ops.mgt_kernels.w4a8_linear,
        (x, weight.w_q, weight.scale, weight.zero_point, 128, torch.tensor([0.05]), bias, "auto"),
    )
