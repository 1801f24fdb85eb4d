"""Reading Fashion-MNIST, or any data set in its IDX format."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

_UINT8_TYPE_CODE = 0x08
# as many as NumPy's arrays of every version have
_MOST_DIMENSIONS = 32
_PREFIX = {"train": "train", "test": "t10k"}


def read_idx(path: str | Path) -> Tensor:
    """Read one IDX file of unsigned bytes, compressed by gzip or not.

    The header is two zero bytes, a type code (8 for unsigned bytes), the number of dimensions and each
    dimension as a big-endian 32-bit integer; the values follow in row-major order.

    Args:
        path: the file; gzip is recognised by its first two bytes, not by its name.

    Returns:
        A uint8 tensor of the shape that the header states.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an IDX file of unsigned bytes, or its length is not what its header states.
    """
    path = Path(path)
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: the gzip stream is damaged or truncated ({error})") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UINT8_TYPE_CODE:
        raise ValueError(
            f"{path}: expected an IDX file of unsigned bytes, which starts with 00 00 08; got {content[:4].hex(' ')!r}"
        )
    num_dimensions = content[3]
    if num_dimensions > _MOST_DIMENSIONS:
        raise ValueError(f"{path}: expected at most {_MOST_DIMENSIONS} dimensions, got {num_dimensions}")
    header_bytes = 4 + 4 * num_dimensions
    if len(content) < header_bytes:
        raise ValueError(f"{path}: truncated inside its header: {len(content)} bytes of {header_bytes}")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", num_dimensions, offset=4))
    expected_bytes = header_bytes + math.prod(shape)
    if len(content) != expected_bytes:
        raise ValueError(f"{path}: shape {shape} needs {expected_bytes} bytes, the file holds {len(content)}")
    # a copy, for the bytes object is read-only and torch wants memory it may write to
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape).copy())


def load_fashion_mnist(folder: str | Path, split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Read the images and labels of one split of Fashion-MNIST.

    Args:
        folder: holds the four standard files, such as `train-images-idx3-ubyte`, each with or without `.gz`.
        split: "train" (60,000 images) or "test" (10,000).

    Returns:
        Images, uint8 of shape (num_images, 28, 28), 0 is black; labels, int64 of shape (num_images,), 0 to 9.

    Raises:
        FileNotFoundError: a file is missing; the message says where data can be had.
        ValueError: an unknown split, a damaged file, or images and labels that do not match.
    """
    if split not in _PREFIX:
        raise ValueError(f"split: expected one of {sorted(_PREFIX)}, got {split!r}")
    images = read_idx(_find(Path(folder), f"{_PREFIX[split]}-images-idx3-ubyte"))
    labels = read_idx(_find(Path(folder), f"{_PREFIX[split]}-labels-idx1-ubyte"))
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise ValueError(f"{folder}: expected images (num_images, 28, 28), got {tuple(images.shape)}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{folder}: {images.shape[0]} images, but labels of shape {tuple(labels.shape)}")
    if labels.numel() and int(labels.max()) > 9:
        raise ValueError(f"{folder}: labels must be 0 to 9, got {int(labels.max())}")
    return images, labels.long()


def to_float_images(images: Tensor) -> Tensor:
    """Turn grey uint8 images (num_images, H, W) into float32 (num_images, 1, H, W) in [0, 1]."""
    return images.unsqueeze(1).float() / 255


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"no {name} or {name}.gz in {folder}; Debian's package dataset-fashion-mnist or "
        "https://github.com/zalandoresearch/fashion-mnist has it"
    )
