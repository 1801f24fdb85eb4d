"""Packed 4-bit weights: rounding, layout, files, bad input."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import mgt_kernels
from mgt_kernels import PackedInt4, quantize_int4


def make_weight(num_outputs=70, num_inputs=200, dtype=torch.float32, seed=0):
    return torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (16, 64), (7, 65), (70, 200), (33, 384)])
@pytest.mark.parametrize("group_size", [32, 96, 128, 256])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_is_within_half_a_step(shape, group_size, scale_dtype, dtype):
    weight = make_weight(*shape, dtype)
    packed = quantize_int4(weight, group_size, scale_dtype=scale_dtype)
    step = packed.per_input(packed.scale).double()
    error = (packed.dequantize().double() - weight.double()).abs()
    # the zero point is rounded too, so the ends of the range may lie another half step away
    assert (error <= step * 1.001).all() and (error <= step * 0.501).double().mean() > 0.8
    assert packed.unpack().shape == shape and packed.unpack().max() <= 15


def test_the_layout_is_what_the_docstring_says():
    packed = quantize_int4(make_weight(5, 130), 32)
    w_q = packed.unpack()
    assert packed.w_q.shape == (5, 96)
    for k in range(130):
        chunk, j = divmod(k, 64)
        byte = packed.w_q[:, 32 * chunk + j % 32]
        assert torch.equal(w_q[:, k], byte & 15 if j < 32 else byte >> 4)
    w = (w_q.float() - packed.per_input(packed.zero_point).float()) * packed.per_input(packed.scale).float()
    assert torch.equal(packed.dequantize(), w)
    assert torch.equal(packed.dequantize(torch.bfloat16), w.bfloat16())


def test_bytes_per_weight():
    weight = make_weight(256, 1024)
    assert quantize_int4(weight).nbytes / weight.numel() <= 0.524
    assert quantize_int4(weight, scale_dtype=torch.float32).nbytes / weight.numel() <= 0.54


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(4, 64), torch.full((4, 64), 3.0), torch.full((4, 64), -2.0), torch.full((4, 64), 1e-9)],
    ids=["zeros", "positive", "negative", "tiny"],
)
def test_degenerate_groups(weight):
    packed = quantize_int4(weight, 32)
    assert (packed.dequantize() - weight).abs().max() <= float(packed.scale.max())
    assert torch.equal(quantize_int4(packed.dequantize(), 32).dequantize(), packed.dequantize())


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
def test_files_give_back_the_same_bits(tmp_path, scale_dtype):
    packed = quantize_int4(make_weight(), 64, scale_dtype=scale_dtype)
    save_file(packed.to_tensors(), tmp_path / "layer.safetensors")
    again = PackedInt4.from_tensors(load_file(tmp_path / "layer.safetensors"))
    assert again.shape == (70, 200) and again.group_size == 64
    assert all(torch.equal(getattr(packed, name), getattr(again, name)) for name in ("w_q", "scale", "zero_point"))
    x = torch.randn(3, 200)
    assert torch.equal(mgt_kernels.w4a8_linear(x, packed), mgt_kernels.w4a8_linear(x, again))


def test_inputs_are_kept_and_need_no_order():
    weight = make_weight(200, 70)
    copy = weight.clone()
    packed = quantize_int4(weight.T, 32)
    assert torch.equal(weight, copy)
    assert torch.equal(packed.w_q, quantize_int4(weight.T.contiguous(), 32).w_q)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(weight=[1.0]), TypeError, "weight: expected a tensor"),
        (dict(weight=torch.zeros(2, 2, dtype=torch.int8)), TypeError, "weight: expected dtype"),
        (dict(weight=torch.zeros(4)), ValueError, "weight: expected 2 dimensions"),
        (dict(weight=torch.zeros(0, 4)), ValueError, "weight: expected at least one output"),
        (dict(weight=torch.tensor([[0.0, torch.nan]])), ValueError, "weight: output 0, input 1 is nan"),
        (dict(weight=torch.tensor([[0.0], [torch.inf]])), ValueError, "weight: output 1, input 0 is inf"),
        (dict(weight=torch.full((1, 4), 3e38)), ValueError, "weight: a range of .* is too large for scale_dtype"),
        (dict(group_size=0), ValueError, r"group_size: expected a multiple of 32 within \[32, 16384\], got 0"),
        (dict(group_size=48), ValueError, "group_size: expected a multiple of 32"),
        (dict(group_size=64.0), TypeError, "group_size: expected an int, got float"),
        (dict(scale_dtype=torch.bfloat16), TypeError, "scale_dtype: expected"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    with pytest.raises(error, match=words):
        quantize_int4(**(dict(weight=make_weight()) | change))


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(scale=None), KeyError, "scale missing"),
        (dict(w_q=torch.zeros(70, 100, dtype=torch.uint8)), ValueError, r"w_q: expected shape \(70, 128\)"),
        (dict(scale=torch.ones(70, 3, dtype=torch.float16)), ValueError, r"scale: expected shape \(70, 2\)"),
        (dict(scale=torch.ones(70, 2, dtype=torch.float64)), TypeError, "scale: expected dtype"),
        (dict(scale=torch.zeros(70, 2)), ValueError, "scale: expected positive"),
        (dict(scale=-torch.ones(70, 2)), ValueError, "scale: expected positive"),
        (dict(scale=torch.full((70, 2), torch.nan)), ValueError, "scale: expected positive"),
        (dict(zero_point=torch.full((70, 2), 16, dtype=torch.uint8)), ValueError, "zero_point: expected values within"),
        (dict(layout=torch.tensor([70, 200])), ValueError, r"layout: expected shape \(3,\)"),
        (dict(layout=torch.tensor([70, 200, 7])), ValueError, "group_size: expected"),
    ],
)
def test_bad_files_are_named(change, error, words):
    tensors = quantize_int4(make_weight()).to_tensors() | change
    with pytest.raises(error, match=words):
        PackedInt4.from_tensors({name: tensor for name, tensor in tensors.items() if tensor is not None})
