"""What the launchers share."""

from typing import Any

from torch import Tensor


# Triton's own functions for both take microseconds to tell numbers from constants
def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


def laid_out(x: Tensor, *others: Tensor | None) -> list[Any]:
    """Return the tensors of a linear layer as its kernels assume them: each row of x dense, the others contiguous."""
    rows = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    return [rows, *(None if tensor is None else tensor.contiguous() for tensor in others)]
