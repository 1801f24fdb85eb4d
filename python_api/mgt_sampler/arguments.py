"""Numbers as callers have them: Python's, NumPy's, and arrays or tensors without dimensions."""

from __future__ import annotations

import operator
from numbers import Real


def integer(name: str, value: object, expected: str = "an int") -> int:
    """Return a whole number of any kind as an int.

    Args:
        name: the argument that an error names.
        value: an int, a NumPy integer, or an integer array or tensor without dimensions; no bool.
        expected: what an error says was expected.

    Raises:
        TypeError: value is none of these.
    """
    if not is_bool(value) and getattr(value, "ndim", 0) == 0:
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise TypeError(f"{name}: expected {expected}, got {kind(value)}")


def number(name: str, value: object, expected: str = "a number") -> float:
    """Return a real number of any kind as a float, infinities and NaN included.

    Args:
        name: the argument that an error names.
        value: a Python or NumPy number, or an array or tensor without dimensions; no bool.
        expected: what an error says was expected.

    Raises:
        TypeError: value is none of these.
        ValueError: an int too large for a float.
    """
    plain = value.tolist() if hasattr(value, "tolist") and getattr(value, "ndim", 0) == 0 else value
    if isinstance(plain, bool) or not isinstance(plain, Real):
        raise TypeError(f"{name}: expected {expected}, got {kind(value)}")
    try:
        return float(plain)
    except OverflowError:
        raise ValueError(f"{name}: expected {expected} below 1.8e308, got a larger one") from None


def kind(value: object) -> str:
    """What an error says of a value: its type, of arrays and tensors dtype and shape too."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{type(value).__name__} of {value.dtype}, shape {tuple(value.shape)}"
    return type(value).__name__


def is_bool(value: object) -> bool:
    """Whether this is a truth value, of Python's, NumPy's or PyTorch's."""
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
