"""Safetensors files with a checksum: tensors are written from where they are and read to where they stay."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch import Tensor

from .files import whole_file

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CHECKSUM = re.compile(rb'"checksum":"([0-9a-f]{64})"')
_BLANK = "0" * 64
# the most that the format allows
_MAX_HEADER = 100_000_000
_PIECE = 1 << 22


@dataclass(frozen=True)
class TensorFile:
    """What a file holds, once its checksum was found right.

    Attributes:
        path: of the file.
        metadata: of its header, strings by name.
        tensors: by name; a tensor that was stored under several names is one object.
    """

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]

    def refuse(self, reason: str) -> NoReturn:
        """Raise the ValueError that names the file."""
        raise ValueError(f"{self.path}: {reason}")

    def facts(self, name: str, keys: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
        """An entry of the metadata as a JSON object that has just these keys, with values of these types.

        Raises:
            ValueError: it is missing or anything else; the message names the file.
        """
        try:
            facts = _from_json(self.metadata[name])
        except KeyError:
            self.refuse(f"its header has no {name}")
        except ValueError as error:
            self.refuse(f"damaged: {name} in its header: {error}")
        check_object(self, name, facts, keys)
        return facts


def check_object(file: TensorFile, what: str, value: Any, keys: Mapping[str, type | tuple[type, ...]]) -> None:
    """Check that a value of the header is an object with just these keys and types; bool is no int."""
    if not isinstance(value, dict) or value.keys() != keys.keys():
        found = ", ".join(sorted(value)) if isinstance(value, dict) else type(value).__name__
        file.refuse(f"damaged: expected {what} with {', '.join(keys)}, got {found[:200] or 'nothing'}")
    for key, kinds in keys.items():
        if type(value[key]) not in (kinds if isinstance(kinds, tuple) else (kinds,)):
            file.refuse(f"damaged: {what}: {key}: unexpected {type(value[key]).__name__}")


def write_tensor_file(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to a safetensors file that `read_tensor_file` and any safetensors reader take.

    They are written from where they are: no second copy is held, but of one at a time that is on another device or not
    contiguous. A tensor under several names is stored once. The header's `checksum` is the SHA-256 of the file with 64
    zeros in its place, its `aliases` say which names stand for a tensor of another name.

    Args:
        path: of the file, replaced at once when the new one is whole.
        tensors: by name.
        metadata: further strings for the header.

    Raises:
        TypeError: no tensor, or one of a dtype that the format does not have.
        ValueError: a tensor is on the meta device.
        OSError: the file cannot be written; the old one is then as before.
    """
    stored: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in _NAMES:
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: expected a tensor of a dtype that safetensors files have, got {found}")
        if tensor.is_meta:
            raise ValueError(f"{name}: is on the meta device (offloaded?); bring it back first")
        tensor = tensor.detach()
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        first = names.setdefault(place, name) if tensor.numel() else name
        if first == name:
            stored[name] = tensor
        else:
            aliases[name] = first

    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", **metadata, "aliases": json.dumps(aliases), "checksum": _BLANK}
    }
    offset = 0
    # wide ones first, so that each begins at a multiple of its width
    stored = dict(sorted(stored.items(), key=lambda item: -item[1].element_size()))
    for name, tensor in stored.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256(len(text).to_bytes(8, "little") + text)
    for tensor in stored.values():
        digest.update(_bytes_of(tensor))
    blank = f'"checksum":"{_BLANK}"'.encode()
    text = text.replace(blank, blank.replace(_BLANK.encode(), digest.hexdigest().encode()), 1)
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in stored.values():
            file.write(_bytes_of(tensor))


def read_tensor_file(path: str | Path) -> TensorFile:
    """Read a file that `write_tensor_file` wrote; every tensor has memory of its own, and no other copy is held.

    Args:
        path: of the file.

    Returns:
        Its contents, whole and as they were written.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, damaged, or of something else; the message names the file and the reason.
    """
    path = Path(path)
    with open(path, "rb") as file:
        return _read(path, file, os.fstat(file.fileno()).st_size)


def _read(path: Path, file: IO[bytes], size: int) -> TensorFile:
    def refuse(reason: str) -> NoReturn:
        raise ValueError(f"{path}: {reason}")

    start = file.read(8)
    header_end = 8 + int.from_bytes(start, "little")
    if len(start) < 8 or size < header_end or header_end > 8 + _MAX_HEADER:
        refuse("truncated, or no safetensors file: its header is not whole")
    text = file.read(header_end - 8)
    found = _CHECKSUM.search(text)
    try:
        header = _from_json(text)
    except ValueError as error:
        refuse(f"damaged: its header cannot be read: {error}")
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        refuse("damaged, or not of this package: its header has no metadata of strings")
    if found is None or metadata.get("checksum") != found[1].decode():
        refuse("damaged, or not of this package: its header has no checksum")
    entries = [(name, *_entry(header[name], refuse, name)) for name in header]
    end = 0
    # in the order of the header, which is how they are written
    for name, _, _, begin, stop in entries:
        if begin != end:
            refuse(f"damaged: {name}: begins at byte {begin:,}, expected {end:,}")
        end = stop
    if size < header_end + end:
        refuse(f"truncated: {size:,} bytes of {header_end + end:,}")
    if size > header_end + end:
        refuse(f"damaged: {size:,} bytes, expected {header_end + end:,}")

    digest = hashlib.sha256(start + text[: found.start(1)] + _BLANK.encode() + text[found.end(1) :])
    tensors: dict[str, Tensor] = {}
    for name, dtype, shape, begin, stop in entries:
        raw = torch.empty(stop - begin, dtype=torch.uint8, device="cpu")
        view = memoryview(raw.numpy())  # type: ignore[arg-type]
        for piece in range(0, len(view), _PIECE):
            if file.readinto(view[piece : piece + _PIECE]) != len(view[piece : piece + _PIECE]):  # type: ignore[attr-defined]
                refuse("truncated while it was read")
            digest.update(view[piece : piece + _PIECE])
        tensors[name] = raw.view(dtype).view(shape)
    if digest.hexdigest() != metadata["checksum"]:
        refuse("damaged: its checksum is another")

    file_of = TensorFile(path, metadata, tensors)
    if "aliases" not in metadata:
        refuse("damaged: its header has no aliases")
    try:
        aliases = _from_json(metadata["aliases"])
    except ValueError as error:
        refuse(f"damaged: aliases in its header: {error}")
    if not isinstance(aliases, dict):
        refuse("damaged: aliases in its header are no object")
    for name, first in aliases.items():
        if name in header or not isinstance(first, str) or first not in header:
            refuse(f"damaged: aliases in its header: {name} stands for no tensor of the file")
        tensors[name] = tensors[first]
    return file_of


def _entry(entry: Any, refuse: Any, name: str) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Dtype, shape and bytes of a tensor in the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        refuse(f"damaged: {name}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        refuse(f"damaged: {name}: unknown dtype {str(dtype)[:20]!r}")
    for values in (shape, offsets):
        if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 2**48 for value in values):
            refuse(f"damaged: {name}: expected sizes and offsets within 0 to 2^48")
    if len(offsets) != 2 or len(shape) > 64 or offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype].itemsize:
        refuse(f"damaged: {name}: its offsets do not fit its shape")
    # views of an empty tensor are limited by the product of the sizes that are not zero
    if math.prod(max(1, size) for size in shape) >= 2**48:
        refuse(f"damaged: {name}: a size out of range")
    return _DTYPES[dtype], tuple(shape), offsets[0], offsets[1]


def _from_json(text: str | bytes) -> Any:
    """JSON without repeated keys, NaN or depths that Python cannot follow; raises ValueError for all else."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise ValueError("a key twice")
        return value

    def no_number(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number of JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes in memory of the CPU: its own where it is there and contiguous."""
    return memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
