"""Packed 4-bit weights: what the int4 linear layers read, on every device the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mgt_kernels.checks import check_shape, check_tensor

# inputs that share a run of CHUNK / 2 bytes: the first half in the low nibbles, the second in the high ones
CHUNK = 64
MAX_GROUP_SIZE = 16384
SCALE_DTYPES = (torch.float16, torch.float32)
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# smallest positive float16, smallest normal float32: in float32 no product with a scale is denormal
_SMALLEST_SCALE = {torch.float16: 2.0**-24, torch.float32: 2.0**-126}


@dataclass(frozen=True)
class PackedInt4:
    r"""A weight matrix (N, K) in 4 bits: w[n, k] = (w_q[n, k] - zero_point[n, g]) * scale[n, g], g = k // group_size.

    Attributes:
        w_q: (N, 32 ceil(K / 64)) uint8. Byte 32 c + j of a row holds input 64 c + j in its low nibble and 64 c + 32 + j
            in its high one; inputs past K hold 0.
        scale: (N, ceil(K / group_size)) float16 or float32, positive.
        zero_point: (N, ceil(K / group_size)) uint8 within [0, 15].
        shape: (N, K), outputs and inputs of the linear layer.
        group_size: inputs that share a scale, a multiple of 32; the last group may be shorter.
    """

    w_q: Tensor
    scale: Tensor
    zero_point: Tensor
    shape: tuple[int, int]
    group_size: int

    def __post_init__(self) -> None:
        """Check that the tensors belong together; see `from_tensors` for their values."""
        num_outputs, num_inputs = self.shape
        if num_outputs < 1 or num_inputs < 1:
            raise ValueError(f"shape: expected at least one output and one input, got {tuple(self.shape)}")
        check_group_size(self.group_size)
        check_tensor("w_q", self.w_q, 2, (torch.uint8,))
        check_tensor("scale", self.scale, 2, SCALE_DTYPES, self.w_q.device)
        check_tensor("zero_point", self.zero_point, 2, (torch.uint8,), self.w_q.device)
        check_shape("w_q", self.w_q, (num_outputs, packed_bytes(num_inputs)))
        num_groups = -(-num_inputs // self.group_size)
        check_shape("scale", self.scale, (num_outputs, num_groups))
        check_shape("zero_point", self.zero_point, (num_outputs, num_groups))
        for name in ("w_q", "scale", "zero_point"):
            if not getattr(self, name).is_contiguous():
                raise ValueError(f"{name}: expected a contiguous tensor, got strides {getattr(self, name).stride()}")

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.w_q.device

    @property
    def nbytes(self) -> int:
        """Bytes of all three tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.w_q, self.scale, self.zero_point))

    def unpack(self) -> Tensor:
        """Return the integers w_q, (N, K) uint8 within [0, 15]."""
        num_outputs, num_inputs = self.shape
        run = self.w_q.view(num_outputs, -1, 1, CHUNK // 2)
        return torch.cat([run & 15, run >> 4], dim=2).view(num_outputs, -1)[:, :num_inputs]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights (N, K): the equation above in float32, then rounded to `dtype`."""
        w_q, scale, zero_point = self.unpack(), *(self.per_input(t) for t in (self.scale, self.zero_point))
        return ((w_q.float() - zero_point.float()) * scale.float()).to(dtype)

    def per_input(self, per_group: Tensor) -> Tensor:
        """Repeat what each group has, (N, groups), for each of its inputs, (N, K)."""
        return per_group.repeat_interleave(self.group_size, dim=1)[:, : self.shape[1]]

    def to(self, device: torch.device | str) -> PackedInt4:
        """Return the same weights on a device."""
        w_q, scale, zero_point = (tensor.to(device) for tensor in (self.w_q, self.scale, self.zero_point))
        return PackedInt4(w_q, scale, zero_point, self.shape, self.group_size)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return what a safetensors file holds of it: w_q, scale, zero_point, and layout (N, K, group_size) int64."""
        layout = torch.tensor([*self.shape, self.group_size], dtype=torch.int64, device=self.device)
        return dict(w_q=self.w_q, scale=self.scale, zero_point=self.zero_point, layout=layout)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> PackedInt4:
        """Return the weights that `to_tensors` gave, bit for bit.

        Raises:
            KeyError: if a tensor is missing.
            TypeError: if a tensor has another dtype.
            ValueError: if sizes do not fit together, a scale is not positive and finite, or a zero point
                is above 15.
        """
        missing = {"w_q", "scale", "zero_point", "layout"} - set(tensors)
        if missing:
            raise KeyError(f"tensors: expected w_q, scale, zero_point and layout, {', '.join(sorted(missing))} missing")
        check_tensor("layout", tensors["layout"], 1, (torch.int64,))
        check_shape("layout", tensors["layout"], (3,))
        num_outputs, num_inputs, group_size = tensors["layout"].tolist()
        packed = cls(tensors["w_q"], tensors["scale"], tensors["zero_point"], (num_outputs, num_inputs), group_size)
        scale = packed.scale
        if not (scale.isfinite() & (scale >= _SMALLEST_SCALE[scale.dtype])).all():
            raise ValueError("scale: expected positive, finite numbers, normal in float32")
        if (packed.zero_point > 15).any():
            raise ValueError(f"zero_point: expected values within [0, 15], got {int(packed.zero_point.max())}")
        return packed


def packed_bytes(num_inputs: int) -> int:
    """Return the bytes of a row of w_q."""
    return -(-num_inputs // CHUNK) * (CHUNK // 2)


def check_group_size(group_size: int) -> None:
    """Check that the kernels can sum a group in 32 bits, in whole runs of 32 inputs."""
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise TypeError(f"group_size: expected an int, got {type(group_size).__name__}")
    if group_size < 32 or group_size % 32 or group_size > MAX_GROUP_SIZE:
        raise ValueError(f"group_size: expected a multiple of 32 within [32, {MAX_GROUP_SIZE}], got {group_size}")


def quantize_int4(weight: Tensor, group_size: int = 128, *, scale_dtype: torch.dtype = torch.float16) -> PackedInt4:
    r"""Round a weight matrix to 4 bits, asymmetric, with a scale and a zero point per output and group of inputs.

    With lo = min(0, min w) and hi = max(0, max w) over a group::

        scale      = (hi - lo) / 15                         rounded to scale_dtype, at least 2^-24 or 2^-126
        zero_point = clamp(round(-lo / scale), 0, 15)
        w_q        = clamp(round(w / scale) + zero_point, 0, 15)     halves to even, in float32

    Args:
        weight: (N, K) float32, bfloat16 or float16, any N and K >= 1, finite; as of `torch.nn.Linear`.
        group_size: inputs that share a scale, a multiple of 32 within [32, 16384]; the last group may be shorter.
        scale_dtype: torch.float16 (0.523 bytes per weight at group 128) or torch.float32 (0.539).

    Returns:
        The packed weights, on the device of `weight`.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if the shape or group size is wrong, or a weight is not finite or too large for a float16 scale.

    Source: arXiv 2411.10781, secondary calibration quantization (4-bit weights in groups of 128).
    """
    check_tensor("weight", weight, 2, _WEIGHT_DTYPES)
    num_outputs, num_inputs = weight.shape
    if num_outputs < 1 or num_inputs < 1:
        raise ValueError(f"weight: expected at least one output and one input, got shape {tuple(weight.shape)}")
    check_group_size(group_size)
    if scale_dtype not in SCALE_DTYPES:
        raise TypeError(f"scale_dtype: expected torch.float16 or torch.float32, got {scale_dtype}")
    if not weight.isfinite().all():
        row, column = (int(i[0]) for i in (~weight.isfinite()).nonzero(as_tuple=True))
        raise ValueError(
            f"weight: output {row}, input {column} is {float(weight[row, column])}; expected finite values"
        )

    # inputs past K are zeros, which every group's range holds anyway
    num_groups = -(-num_inputs // group_size)
    padded = torch.zeros(num_outputs, num_groups * group_size, dtype=torch.float32, device=weight.device)
    padded[:, :num_inputs] = weight.detach()
    grouped = padded.view(num_outputs, num_groups, group_size)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    # in two parts, or the range of the largest floats would overflow
    scale = (high / 15 - low / 15).clamp(min=_SMALLEST_SCALE[scale_dtype]).to(scale_dtype)
    if not scale.isfinite().all():
        raise ValueError(f"weight: a range of {float((high - low).max()):g} is too large for scale_dtype {scale_dtype}")
    zero_point = (-low / scale.float()).round().clamp(0, 15)
    w_q = ((grouped / scale.float()[..., None]).round() + zero_point[..., None]).clamp(0, 15).to(torch.uint8)
    # what lies past K is never read as a weight; zeros make the bytes a function of the weights alone
    w_q = w_q.view(num_outputs, -1)[:, :num_inputs]
    w_q = torch.nn.functional.pad(w_q, (0, -num_inputs % CHUNK)).view(num_outputs, -1, 2, CHUNK // 2)
    nibbles = (w_q[:, :, 0] | w_q[:, :, 1] << 4).reshape(num_outputs, -1)
    return PackedInt4(nibbles, scale, zero_point.to(torch.uint8), (num_outputs, num_inputs), group_size)
