"""`Int4Linear`: a linear layer with 4-bit weights that is a `torch.nn.Linear` to whatever holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mgt_kernels import PackedInt4, cpu, w4a8_linear, w4a16_linear

# the kernels take the first two; float16 is exact in float32, and results are rounded back to it
ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# what a layer holds itself, in float or in 4 bits
OWN_TENSORS = frozenset(("weight", "weight_like", "bias", "w_q", "scale", "zero_point", "x_scale"))


class Int4Linear(nn.Linear):
    """A frozen linear layer with 4-bit weights: `mgt_kernels.w4a8_linear` with x_scale, `w4a16_linear` without.

    It maps x (..., K) float32, bfloat16 or float16 to (..., N) of the same dtype, or of autocast's where that is on.
    The gradient of x is that of the float layer with these weights: rounding activations passes it straight through.
    The weights have none. Moving the layer to a dtype changes its bias and the dtype that `weight` reports, as it would
    a `Linear`'s, but neither weights nor scales.

    Attributes:
        w_q, scale, zero_point: buffers, of the weights, as in `mgt_kernels.PackedInt4`.
        weight: (N, K), an `Int4Weight`: it has a Linear's shape, dtype and device, and values where they are read.
        bias: (N,), or None.
        x_scale: float32 (buckets, halves), positive: of the quantized activations, for each timestep bucket and
            guidance half, one or two halves. Where there are several, `activation_scales` chooses for each sample.
            None: activations are rounded to bfloat16.
        backend: of the kernels.
        batch_invariant: of `w4a16_linear`; W4A8 always is. It may be set at any time.
        layer_name: in its model, for messages.
    """

    w_q: Tensor
    scale: Tensor
    zero_point: Tensor
    x_scale: Tensor | None

    def __init__(
        self,
        weight: PackedInt4,
        bias: Tensor | None = None,
        x_scale: Tensor | None = None,
        *,
        backend: str = "auto",
        batch_invariant: bool = True,
        dtype: torch.dtype = torch.float32,
        layer_name: str = "",
    ) -> None:
        """Hold the tensors; `dtype` is the one that `weight` reports."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.group_size = weight.group_size
        self.backend = backend
        self.batch_invariant = batch_invariant
        self.layer_name = layer_name
        if x_scale is not None and (x_scale.ndim != 2 or x_scale.shape[1] not in (1, 2) or not len(x_scale)):
            raise ValueError(f"x_scale: expected shape (buckets, 1 or 2), got {tuple(x_scale.shape)}")
        # hosts ask a layer's first parameter for dtype and device; it has one value, for it is no weight
        like = torch.zeros(1, dtype=dtype, device=weight.device)
        self.weight_like = nn.Parameter(like, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        for tensor in ("w_q", "scale", "zero_point"):
            self.register_buffer(tensor, getattr(weight, tensor))
        self.register_buffer("x_scale", x_scale)
        # the chosen scale of each sample, or one for all, and the thread that chose
        self._scale_index: Tensor | None = None
        self._chooser: int | None = None

    @property
    def activation(self) -> str:
        """The path: "a8" or "a16"."""
        return "a16" if self.x_scale is None else "a8"

    @property
    def kernel(self) -> str:
        """What runs the path here: an instruction set, "triton", "reference", or "none" where nothing can.

        Where many rows get another product than few: "triton, torch.mm from 1024 rows".
        """
        if self.backend != "reference" and self.w_q.is_cuda and self.x_scale is None and not self.batch_invariant:
            # Triton is not there for everybody
            try:
                from mgt_kernels.triton.w4a16_linear import dequantized_from
            except RuntimeError:
                return "none"
            major, minor = torch.cuda.get_device_capability(self.w_q.device)
            limit = dequantized_from(10 * major + minor)
            return "triton" if limit is None else f"triton, torch.mm from {limit} rows"
        if self.backend in ("reference", "triton"):
            return self.backend
        if self.w_q.device.type != "cpu":
            return "none" if self.w_q.is_meta else "triton"
        try:
            return cpu.kernel_isa(f"w4{self.activation}_linear", self.backend)
        except RuntimeError:
            return "none"

    @property
    def packed(self) -> PackedInt4:
        """The weights."""
        shape = (self.out_features, self.in_features)
        return PackedInt4(self.w_q, self.scale, self.zero_point, shape, self.group_size)

    @property
    def num_scales(self) -> int:
        """Of the activations: timestep buckets times guidance halves; 0 for "a16"."""
        return 0 if self.x_scale is None else self.x_scale.numel()

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights as a tensor (N, K) that takes no memory until its values are read."""
        if torch.compiler.is_compiling():
            return self.packed.dequantize(self.weight_like.dtype)
        return Int4Weight(self)

    def chosen_scales(self, num_rows: int) -> Tensor:
        """The scales in use: float32 (S,), each of num_rows / S consecutive rows.

        Raises:
            RuntimeError: there are several, and nobody chose.
            ValueError: the rows are not as many for every sample.
        """
        x_scale = self.x_scale
        assert x_scale is not None
        if x_scale.numel() == 1:
            return x_scale.view(1)
        if self._scale_index is None:
            raise RuntimeError(
                f"{self.layer_name or 'layer'}: has scales for {len(x_scale)} timestep buckets and "
                f"{x_scale.shape[1]} guidance halves, and nobody chose among them; call the model inside "
                "mgt_sampler.activation_scales(model, ...) or, for generate, in a ScaledModel, or quantize it with "
                "mask_token_id"
            )
        index = self._scale_index.to(x_scale.device)
        if not len(index):
            # a batch without samples
            return x_scale.view(-1)[:1]
        if num_rows % len(index):
            raise ValueError(
                f"{self.layer_name or 'layer'}: expected as many rows for each of {len(index)} samples or guidance "
                f"halves, got {num_rows} rows; exclude a layer whose rows are no samples"
            )
        return x_scale.flatten()[index]

    def activations(self, x: Tensor) -> Tensor:
        """What the layer computes with: its input in the dtype of autocast where that is on.

        Raises:
            TypeError: no tensor, or of another dtype than the layer takes.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"{self.layer_name or 'layer'}: expected a tensor of activations, got {type(x).__name__}")
        device_type = x.device.type
        if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        if x.dtype not in ACTIVATION_DTYPES:
            raise TypeError(
                f"{self.layer_name or 'layer'}: expected activations in float32, bfloat16 or float16, got {x.dtype}"
            )
        return x

    def forward(self, input: Tensor) -> Tensor:
        """Map x (..., K) to (..., N)."""
        x = self.activations(input)
        bias, x_scale = self.bias, self.x_scale
        scales = None if x_scale is None else self.chosen_scales(x.numel() // max(1, x.shape[-1]))
        is_half = x.dtype == torch.float16
        if is_half:
            x = x.float()
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            y = _Int4Function.apply(x, bias, self.packed, scales, self.batch_invariant, self.backend)
        else:
            y = _multiply(x, bias, self.packed, scales, self.batch_invariant, self.backend)
        return y.half() if is_half else y

    def extra_repr(self) -> str:
        """Sizes, path and kernel."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, w4{self.activation}, group_size={self.group_size}, kernel={self.kernel}"

    def reset_parameters(self) -> None:
        """Refuse: 4-bit weights are made by `quantize` alone."""
        self._refuse("reset_parameters")

    def _refuse(self, what: str) -> NoReturn:
        # no TypeError: += would take it for a sign to try + instead
        raise RuntimeError(
            f"{self.layer_name or 'layer'}: {what}: its weights have 4 bits and cannot be written; write to the float "
            "model's (merge adapters there, too) and quantize that, or keep this layer in float by `exclude`"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int4Linear:
        frozen = {id(tensor) for tensor in (self.w_q, self.scale, self.zero_point, self.x_scale)}

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) not in frozen or result.dtype == tensor.dtype:
                return result
            # a model's dtype is that of its activations: rounded scales would be other weights
            return tensor.to(result.device)

        return super()._apply(moved, recurse)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, but not `weight`."""
        if name == "weight":
            self._refuse("weight")
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: all but the scales that a caller chose for now."""
        state = super().__getstate__() if hasattr(nn.Module, "__getstate__") else self.__dict__
        return {**state, "_scale_index": None, "_chooser": None}


def _multiply(
    x: Tensor,
    bias: Tensor | None,
    packed: PackedInt4,
    scales: Tensor | None,
    batch_invariant: bool,
    backend: str,
) -> Tensor:
    if scales is None:
        return w4a16_linear(x, packed, bias, batch_invariant=batch_invariant, backend=backend)
    return w4a8_linear(x, packed, scales, bias, backend=backend)


class _Int4Function(torch.autograd.Function):
    """The kernels with the gradients of a linear layer with the dequantized weights."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        packed: PackedInt4,
        scales: Tensor | None,
        batch_invariant: bool,
        backend: str,
    ) -> Tensor:
        ctx.packed, ctx.bias_dtype = packed, None if bias is None else bias.dtype
        return _multiply(x, bias, packed, scales, batch_invariant, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_x = grad @ ctx.packed.dequantize(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None, None


class Int4Weight(Tensor):
    """The `weight` of an `Int4Linear` as its host sees it: a tensor without memory, dequantized when it is used.

    Reading gives (w_q - zero_point) scale, rounded to the dtype; whatever would write to it raises RuntimeError.
    """

    _layer: Int4Linear
    # keeps transformers from giving it random values when it loads a model
    _is_hf_initialized = True

    @staticmethod
    def __new__(cls, layer: Int4Linear) -> Int4Weight:
        """Stand for the weights of a layer."""
        like = layer.weight_like
        weight = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, (layer.out_features, layer.in_features), dtype=like.dtype, device=like.device, requires_grad=False
        )
        weight._layer = layer
        # what a Linear holds is one
        weight._is_param = True
        return weight

    def dequantize(self) -> Tensor:  # type: ignore[override]
        """The values, (N, K)."""
        return self._layer.packed.dequantize(self._layer.weight_like.dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        """What it is, without the values."""
        return f"Int4Weight({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Dequantize for functions that look into a tensor's memory, refuse those that put another in its place."""
        kwargs = kwargs or {}
        if func is Tensor.requires_grad_:
            wanted = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
            if not wanted:
                return args[0]
            args[0]._layer._refuse("requires_grad_")
        if func is Tensor.__setitem__ and isinstance(args[0], Int4Weight):
            args[0]._layer._refuse("weight[...]")
        if getattr(func, "__name__", "") == "__set__" and isinstance(args[0], Int4Weight):
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            # what it is already
            if attribute in ("grad", "requires_grad") and not isinstance(args[1], Tensor) and not args[1]:
                return None
            args[0]._layer._refuse(f"weight.{attribute}")
        if func in _READS_MEMORY:
            args, kwargs = _dequantized((args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute with the dequantized weights."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return Int4Weight(args[0]._layer)
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Int4Weight):
                value._layer._refuse(str(func._schema.name).removeprefix("aten::"))
        args, kwargs = _dequantized((args, kwargs))
        return func(*args, **kwargs)


_READS_MEMORY = {
    Tensor.__array__,
    Tensor.__deepcopy__,
    Tensor.__reduce_ex__,
    Tensor.data_ptr,
    Tensor.numpy,
    Tensor.storage,
    Tensor.tolist,
    Tensor.untyped_storage,
}


def _dequantized(tree: Any) -> Any:
    return tree_map_only(Int4Weight, Int4Weight.dequantize, tree)
