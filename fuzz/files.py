"""`python fuzz/files.py --seconds N [--seed S]`: broken files for both readers, of quantized models and of networks.

Each file is a valid one with bits flipped, cut short, or with a header that lies under a checksum that fits. A reader
may refuse it by a ValueError that names the file, or take it; one forward of what it took must then work. The first
file that does anything else is kept, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mgt_sampler import load_quantized, quantize, save_quantized
from mgt_sampler.models.fashion import (
    Classifier,
    ClassifierConfig,
    Tokenizer,
    TokenizerConfig,
    Transformer,
    TransformerConfig,
    load_network,
    save_network,
)

# what a field may be set to: wrong types, ranges, and values that strain a parser
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 33, 2**12, 2**31, 2**48, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, "", "a8",
    "a16", "F64", "F16", "I8", "0" * 64, "\ud800", "\0", [], [0], [1, 1], [[]], [2**62, 2**62], {}, {"": {}}, "x" * 999,
)  # fmt: skip
Loader = Callable[[Path], Callable[[], torch.Tensor]]


class Net(nn.Module):
    """Every kind of layer that a file tells apart: W4A8, W4A16, float, tied."""

    def __init__(self) -> None:
        """Make it with random weights."""
        super().__init__()
        self.embedding = nn.Embedding(9, 32)
        self.layers = nn.Sequential(nn.Linear(32, 40), nn.Linear(40, 72, bias=False), nn.Linear(72, 32))
        self.norm = nn.LayerNorm(32)
        self.register_buffer("steps", torch.arange(3))
        self.head = nn.Linear(32, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, N) to logits (B, N, 9)."""
        return self.head(self.norm(self.layers(self.embedding(tokens))))


def main() -> None:
    """Fuzz for a time, or for a number of files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first file: of a failure, to see it again")
    parser.add_argument("--files", type=int, help="as many, however long they take")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    end = time.monotonic() + options.seconds
    outcomes = {"refused": 0, "taken": 0}
    number = options.first
    with tempfile.TemporaryDirectory() as folder:
        valid = make_files(Path(folder))
        while time.monotonic() < end if options.files is None else number < options.first + options.files:
            chance = random.Random(f"{options.seed}:{number}")
            source, load = valid[number % len(valid)]
            data, what = broken(source, chance)
            path = Path(folder) / "broken.safetensors"
            path.write_bytes(data)
            failure = judge(path, load, outcomes)
            if failure:
                kept = Path(f"fuzz-file-{options.seed}-{number}.safetensors").absolute()
                kept.write_bytes(data)
                print(
                    f"{failure}\n{what}\n{kept}\npython fuzz/files.py --seed {options.seed} --first {number} --files 1"
                )
                sys.exit(1)
            number += 1
    count = number - options.first
    print(f"{count:,} files: {outcomes['refused']:,} refused by name, {outcomes['taken']:,} taken and working")


def make_files(folder: Path) -> list[tuple[bytes, Loader]]:
    """Valid files, and what reads each and gives back a forward of it."""
    valid: list[tuple[bytes, Loader]] = []
    path = folder / "valid.safetensors"
    tokens = torch.arange(8).view(2, 4)
    for options in (dict(share=0.5), dict(share=1, guidance_halves=True, mask_token_id=8)):
        quantized, _ = quantize(Net(), [(tokens[:1].expand(2, 4),)], group_size=32, exclude=("head",), **options)
        save_quantized(quantized, path)

        def load(path: Path) -> Callable[[], torch.Tensor]:
            model = load_quantized(Net(), path)
            return lambda: model(tokens[:1].expand(2, 4))

        valid.append((path.read_bytes(), load))
    networks: list[tuple[nn.Module, Callable[[Any], torch.Tensor]]] = [
        (Transformer(TransformerConfig(2, 8, 3, 32, 1, 2, 2)), draw_logits),
        (Tokenizer(TokenizerConfig(8, 8, 4, 8)), encode_and_decode),
        (Classifier(ClassifierConfig(3, 4, 8)), lambda network: network(torch.zeros(1, 1, 28, 28))),
    ]
    for network, call in networks:
        save_network(network, path)
        kind = type(network)

        def load_again(path: Path, kind: Any = kind, call: Any = call) -> Callable[[], torch.Tensor]:
            network = load_network(kind, path)
            return lambda: call(network)

        valid.append((path.read_bytes(), load_again))
    return valid


def draw_logits(network: Any) -> torch.Tensor:
    """A forward of a transformer."""
    return network(torch.zeros(1, network.config.grid_size**2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


def encode_and_decode(network: Any) -> torch.Tensor:
    """A forward of a tokenizer, in the size that its file asks for; nothing else in the file depends on that."""
    side = network.config.image_size
    return network.decode(network.encode(torch.zeros(1, 1, side, side))) if side < 100 else torch.zeros(1)


def judge(path: Path, load: Loader, outcomes: dict[str, int]) -> str:
    """What is wrong with how a reader took a file; "" where nothing is."""
    try:
        with torch.no_grad():
            forward = load(path)
            forward()
    except ValueError as error:
        if str(path) in str(error):
            outcomes["refused"] += 1
            return ""
        return traceback.format_exc()
    except Exception:
        return traceback.format_exc()
    outcomes["taken"] += 1
    return ""


def broken(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """A file broken in one way or a few, and what was done to it."""
    way = chance.choice((flipped, cut, lying, lying, lying, lying, garbled, deep, swapped, wrong_values))
    result = way(data, chance)
    return result, way.__name__


def flipped(data: bytes, chance: random.Random) -> bytes:
    """Some bits are others, half of the time in the header."""
    changed = bytearray(data)
    size = len(data) if chance.random() < 0.5 else header_end(data)
    for _ in range(chance.randint(1, 8)):
        changed[chance.randrange(size)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(data: bytes, chance: random.Random) -> bytes:
    """Shorter, or longer."""
    if chance.random() < 0.2:
        return data + bytes(chance.randrange(1, 100))
    return data[: chance.randrange(len(data))]


def lying(data: bytes, chance: random.Random) -> bytes:
    """Some fields of the header are others."""
    header = header_of(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        inner = [key for key in ("mgt_quantized", "config", "aliases") if key in header["__metadata__"]]
        if chance.random() < 0.6 and inner:
            key = chance.choice(inner)
            try:
                facts = json.loads(header["__metadata__"][key])
            except (TypeError, ValueError):
                continue
            header["__metadata__"][key] = json.dumps(lie(facts, chance))
        else:
            header = lie(header, chance)
            if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
                break
    return packed(header, data)


def lie(tree: Any, chance: random.Random) -> Any:
    """A JSON value with one place changed, removed, added, or exchanged with another."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node.keys() if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(tree)
    if not places or chance.random() < 0.02:
        return chance.choice(HOSTILE)
    node, key = chance.choice(places)
    way = chance.randrange(5)
    if way == 0:
        del node[key]
    elif way == 1 and isinstance(node, dict):
        node[chance.choice(("", "extra", "layers.0", "norm.weight", "version", "config"))] = node[key]
    elif way == 2 and isinstance(node[key], int):
        node[key] += chance.choice((-64, -32, -1, 1, 2, 32, 64))
    elif way == 3:
        other, place = chance.choice(places)
        if key in node and place in other if isinstance(node, dict) and isinstance(other, dict) else False:
            node[key], other[place] = other[place], node[key]
    else:
        node[key] = chance.choice(HOSTILE)
    return tree


def garbled(data: bytes, chance: random.Random) -> bytes:
    """Some characters of the header's text are others, gone or repeated."""
    text = bytearray(data[8 : header_end(data)])
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(text))
        text[place : place + chance.choice((0, 1, 9))] = chance.choice(
            (b"", b'"', b"{", b"]", b"\\", b"0", b"NaN", b"1e999", b"\xff")
        )
    return signed(bytes(text), data[header_end(data) :])


def deep(data: bytes, chance: random.Random) -> bytes:
    """Nested deeper than a parser can follow, in the header or in a field of it."""
    header = header_of(data)
    levels = chance.choice((50, 900, 3000, 100_000))
    nest = chance.choice(("[", '{"a":')) * levels
    key = chance.choice(sorted(header["__metadata__"]))
    if chance.random() < 0.5:
        header["__metadata__"][key] = nest
        return packed(header, data)
    text = json.dumps(header, separators=(",", ":")).encode()
    return signed(text[:-1] + b',"deep":' + nest.encode() + text[-1:], data[header_end(data) :])


def swapped(data: bytes, chance: random.Random) -> bytes:
    """Two tensors have each other's entry or name, or one is of another dtype."""
    header = header_of(data)
    names = [name for name in header if name != "__metadata__"]
    one, two = chance.sample(names, 2)
    way = chance.randrange(3)
    if way == 0:
        header[one], header[two] = header[two], header[one]
    elif way == 1:
        header = {{one: two, two: one}.get(name, name): entry for name, entry in header.items()}
    else:
        header[one]["dtype"] = chance.choice(
            ("BOOL", "U8", "I8", "I32", "F16", "BF16", "F32", "F64", "I64", "F8_E4M3", "C64")
        )
        if chance.random() < 0.5:
            header[one]["shape"] = [sum(x * y for x, y in zip(header[one]["data_offsets"], (-1, 1), strict=True))]
    return packed(header, data)


def wrong_values(data: bytes, chance: random.Random) -> bytes:
    """Scales that are not positive or not finite, zero points out of range, weights that are no numbers."""
    header, body = header_of(data), bytearray(data[header_end(data) :])
    names = [name for name in header if name.endswith(("scale", "zero_point", "bias"))]
    begin, end = header[chance.choice(names)]["data_offsets"] if names else (0, len(body))
    if end - begin >= 4:
        place = chance.randrange(begin, end - 3, 4)
        body[place : place + 4] = chance.choice(
            (b"\xff" * 4, bytes(4), b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\0\x7c\0\x7c", b"\x01\0\0\0")
        )
    return signed(data[8 : header_end(data)], bytes(body))


def header_end(data: bytes) -> int:
    """Where the tensors begin."""
    return 8 + int.from_bytes(data[:8], "little")


def header_of(data: bytes) -> dict[str, Any]:
    """The header of a valid file."""
    return json.loads(data[8 : header_end(data)])


def packed(header: Any, data: bytes) -> bytes:
    """A file with another header."""
    return signed(json.dumps(header, separators=(",", ":")).encode(), data[header_end(data) :])


def signed(text: bytes, body: bytes) -> bytes:
    """A file whose checksum fits, where its header has one."""
    text += b" " * (-len(text) % 8)
    blank, found = re.subn(rb'"checksum":"[0-9a-f]{64}"', b'"checksum":"' + b"0" * 64 + b'"', text, count=1)
    start = len(text).to_bytes(8, "little")
    digest = hashlib.sha256(start + blank + body).hexdigest().encode()
    return start + (blank.replace(b"0" * 64, digest, 1) if found else text) + body


if __name__ == "__main__":
    main()
