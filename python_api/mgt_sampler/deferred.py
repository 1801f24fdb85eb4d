"""What stands for a transformer's logits between its call and the scheduler's step.

A pipeline of diffusers' shape writes

    uncond_logits, cond_logits = transformer(...).chunk(2)
    model_output = uncond_logits + guidance_scale * (cond_logits - uncond_logits)
    scheduler.step(model_output=model_output, ...)

Here these lines compute nothing: they leave the two halves and the scale for the step, which knows what is masked.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .state import Logits

if TYPE_CHECKING:
    from .head import Head


class DeferredLogits:
    """Logits that are not computed yet.

    Guidance is remembered. Whatever else is done with them, by a function of torch, a method, an operator or an
    attribute, is done with the tensor that they stand for, which is computed once; from then on they are that tensor,
    which somebody may have written to.
    """

    # a NumPy number on the left leaves the operator to us
    __array_ufunc__ = None

    def __init__(self) -> None:
        """Nothing is computed."""
        self._value: Tensor | None = None

    def tensor(self) -> Tensor:
        """The logits."""
        if self._value is None:
            # the transformer was called without gradients
            with torch.no_grad():
                self._value = self._compute()
        return self._value

    @property
    def was_read(self) -> bool:
        """Whether somebody has the tensor."""
        return self._value is not None

    def halves(self) -> tuple[DeferredLogits, DeferredLogits] | None:
        """The two halves of the batch; None where they have to be the tensor's."""
        return None

    def hidden(self) -> tuple[Head, Tensor] | None:
        """The head and the hidden states that it would be given; None where there are none, or the tensor was read."""
        return None

    def fold(self, sample: Tensor, mask_token_id: int) -> Logits | None:
        """The logits of the masked positions of tokens (B, ...) alone; None where they have to be the tensor's.

        Raises:
            ValueError: a sample of another shape or device than the logits have.
        """
        return _folded(self.hidden(), None, 1.0, sample, mask_token_id)

    def _compute(self) -> Tensor:
        raise NotImplementedError

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Any, ...]:
        """`torch.chunk`."""
        halves = self.halves() if chunks == 2 and dim == 0 else None
        return self.tensor().chunk(chunks, dim) if halves is None else halves

    def __sub__(self, other: Any) -> Any:
        """c - u, or a tensor's difference."""
        if isinstance(other, DeferredLogits):
            return Difference(self, other)
        return self.tensor() - other

    def __mul__(self, other: Any) -> Any:
        """A product, of a tensor."""
        return self.tensor() * _plain(other)

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Any:
        """u + s (c - u), or a tensor's sum."""
        if isinstance(other, Difference) and other.subtrahend is self:
            # of one half that stands for both, the other one was not computed
            return self if other.minuend is self else Guided(self, other)
        return self.tensor() + _plain(other)

    __radd__ = __add__

    def __getattr__(self, name: str) -> Any:
        """An attribute of the tensor."""
        if name.startswith("__") or name == "_value":
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle the tensor."""
        return self.tensor().__reduce_ex__(protocol)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """The tensor as an array of NumPy."""
        return self.tensor().__array__(*args, **kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """A function of torch, with the tensors."""
        kwargs = kwargs or {}
        if func is torch.chunk and args and isinstance(args[0], DeferredLogits):
            return args[0].chunk(*args[1:], **kwargs)
        args, kwargs = _plain((args, kwargs))
        return func(*args, **kwargs)


class HeadLogits(DeferredLogits):
    """What a head makes of hidden states."""

    def __init__(self, head: Head, hidden: Tensor) -> None:
        """Hold both."""
        super().__init__()
        self._head, self._hidden = head, hidden

    def halves(self) -> tuple[DeferredLogits, DeferredLogits] | None:
        """The hidden states' halves."""
        if self.was_read or len(self._hidden) % 2:
            return None
        return _Half(self, 0), _Half(self, 1)

    def hidden(self) -> tuple[Head, Tensor] | None:
        """What it holds."""
        return None if self.was_read else (self._head, self._hidden)

    def _compute(self) -> Tensor:
        return self._head.forward(self._hidden)


class _Half(DeferredLogits):
    """A half of the batch; its tensor is a view of the whole's, as `torch.chunk` has it."""

    def __init__(self, whole: HeadLogits, index: int) -> None:
        super().__init__()
        self._whole, self._index = whole, index

    @property
    def was_read(self) -> bool:
        return self._value is not None or self._whole.was_read

    def hidden(self) -> tuple[Head, Tensor] | None:
        found = None if self.was_read else self._whole.hidden()
        return None if found is None else (found[0], found[1].chunk(2)[self._index])

    def _compute(self) -> Tensor:
        return self._whole.tensor().chunk(2)[self._index]


class Known(DeferredLogits):
    """Logits that are there, of the conditional half, which stands for both."""

    def __init__(self, value: Tensor) -> None:
        """Hold the tensor."""
        super().__init__()
        self._value = value


class Difference(DeferredLogits):
    """s (c - u)."""

    def __init__(self, minuend: DeferredLogits, subtrahend: DeferredLogits, scale: float | None = None) -> None:
        """Hold c, u and s; None: 1, not multiplied yet."""
        super().__init__()
        self.minuend, self.subtrahend, self.scale = minuend, subtrahend, scale

    def __mul__(self, other: Any) -> Any:
        """Take a number for s."""
        if isinstance(other, Real) and self.scale is None and not self.was_read:
            return Difference(self.minuend, self.subtrahend, float(other))
        return super().__mul__(other)

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Any:
        """s (c - u) + u, too."""
        return other + self if other is self.subtrahend else super().__add__(other)

    def _compute(self) -> Tensor:
        difference = self.minuend.tensor() - self.subtrahend.tensor()
        return difference if self.scale is None else self.scale * difference


class Guided(DeferredLogits):
    """u + s (c - u)."""

    def __init__(self, unconditional: DeferredLogits, difference: Difference) -> None:
        """Hold the parts."""
        super().__init__()
        self._unconditional, self._difference = unconditional, difference

    def fold(self, sample: Tensor, mask_token_id: int) -> Logits | None:
        """Guided hidden states, through the head."""
        conditional, unconditional = self._difference.minuend.hidden(), self._unconditional.hidden()
        if self.was_read or self._difference.was_read or unconditional is None:
            return None
        scale = 1.0 if self._difference.scale is None else self._difference.scale
        return _folded(conditional, unconditional, scale, sample, mask_token_id)

    def _compute(self) -> Tensor:
        return self._unconditional.tensor() + self._difference.tensor()


def _folded(
    conditional: tuple[Head, Tensor] | None,
    unconditional: tuple[Head, Tensor] | None,
    scale: float,
    sample: Tensor,
    mask_token_id: int,
) -> Logits | None:
    # head.py needs this module
    from .head import folded_logits

    if conditional is None or (unconditional is not None and unconditional[0] is not conditional[0]):
        return None
    head, hidden = conditional
    grid = head.grid(hidden)
    if sample.device != hidden.device:
        raise ValueError(f"sample: expected device {hidden.device} as of the logits, got {sample.device}")
    if tuple(sample.shape) != grid:
        raise ValueError(f"sample: expected shape {grid} as of the logits, got {tuple(sample.shape)}")
    return folded_logits(
        head,
        hidden,
        sample == mask_token_id,
        uncond_hidden=None if unconditional is None else unconditional[1],
        guidance_scale=scale,
    )


def tensor_of(output: Tensor | DeferredLogits) -> Tensor:
    """The logits, computed where they are not yet."""
    return output.tensor() if isinstance(output, DeferredLogits) else output


def _plain(tree: Any) -> Any:
    return tree_map_only(DeferredLogits, DeferredLogits.tensor, tree)


def _of_the_tensor(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: DeferredLogits, *args: Any) -> Any:
        return function(self.tensor(), *_plain(args))

    return method


# Python looks these up on the class
for _name in (
    "getitem", "setitem", "neg", "pos", "abs", "invert", "truediv", "floordiv", "mod", "matmul", "pow", "and_", "or_",
    "xor", "eq", "ne", "lt", "le", "gt", "ge",
):  # fmt: skip
    setattr(DeferredLogits, f"__{_name.rstrip('_')}__", _of_the_tensor(getattr(operator, _name)))
for _name in (
    "rsub", "rtruediv", "rfloordiv", "rmatmul", "rpow", "len", "iter", "bool", "float", "int", "repr", "format",
    "contains",
):  # fmt: skip
    setattr(DeferredLogits, f"__{_name}__", _of_the_tensor(getattr(torch.Tensor, f"__{_name}__")))
# two of them are equal where their tensors are, element by element; as a key each is itself, like a tensor
DeferredLogits.__hash__ = object.__hash__  # type: ignore[method-assign]
