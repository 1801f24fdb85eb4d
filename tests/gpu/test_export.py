"""The exported C sources: built with gcc, run on a stand-in for libcuda, compared with the Python launchers."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from driver import draw_of, standin_gpu, storage_of
from ptx_emulator import Emulator, Program
from triton.runtime import JITFunction
from typer.testing import CliRunner

import mgt_kernels
from mgt_kernels import triton as kernels
from mgt_kernels.triton import export
from mgt_kernels.triton import launch as launching
from mgt_kernels.triton.export import Compiled, Variant, variants_of, write_sources
from mgt_sampler import cli

FAKE_CUDA = Path(__file__).parent / "fake_cuda"
INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
LAUNCHERS = {path.name for path in export._AOT.glob("*.[ch]")}
STRICT = ["-pedantic", "-Wall", "-Wextra", "-Wconversion", "-Werror"]

# values of CUresult
SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONTEXT, NO_BINARY_FOR_GPU = 0, 1, 2, 201, 209
NOT_FOUND, OUT_OF_RESOURCES, CAPTURE_UNSUPPORTED = 500, 701, 900

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None or shutil.which("g++") is None, reason="needs gcc and g++"),
    pytest.mark.skipif(not (INCLUDE / "cuda.h").exists(), reason="needs cuda.h, which comes with Triton"),
]


class CLogits(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *((f"stride_{name}", ctypes.c_int64) for name in ("sample", "position", "token")),
    )

    def __str__(self) -> str:
        return "-".join(str(getattr(self, field[0])) for field in self._fields_)


class CSampleTokens(ctypes.Structure):
    _fields_ = (
        *((f"num_{name}", ctypes.c_int64) for name in ("samples", "positions", "tokens")),
        ("dtype", ctypes.c_int),
        ("logits", CLogits),
        ("uncond_logits", CLogits),
        *((name, ctypes.c_void_p) for name in ("tokens", "seeds", "step")),
        ("mask_token_id", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("guidance_scale", "noise_scale", "temperature")),
    )


class CDifferentialSample(ctypes.Structure):
    _fields_ = (
        ("sample", CSampleTokens),
        ("variant", ctypes.c_int),
        *((name, ctypes.c_int32) for name in ("aliased_history", "has_history")),
        ("share", ctypes.c_double),
    )


class CDifferentialState(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("history", "written", "seeds", "step"))


class CMaskByConfidence(ctypes.Structure):
    _fields_ = (
        *((f"num_{name}", ctypes.c_int64) for name in ("samples", "positions")),
        *((name, ctypes.c_void_p) for name in ("token_ids", "logprob", "mask_len", "seeds", "step")),
        ("mask_token_id", ctypes.c_int64),
        ("temperature", ctypes.c_float),
    )


class CInt4Linear(ctypes.Structure):
    _fields_ = (
        *((f"num_{name}", ctypes.c_int64) for name in ("rows", "inputs", "outputs")),
        ("dtype", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("w_q", "scale")),
        ("scale_dtype", ctypes.c_int),
        ("zero_point", ctypes.c_void_p),
        ("group_size", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
    )


ON_LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_ubyte), ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint),
    ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip

C_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
READ: dict[str, Any] = {"fp64": ctypes.c_double, "i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


@dataclass
class Launch:
    variant: Variant
    compiled: Compiled
    architecture: int
    name: str
    grid: tuple[int, ...]

    block: tuple[int, ...]
    shared: int
    stream: int | None
    arguments: dict[str, Any]
    scratch: list[int]


class Library:
    """The exported sources and the stand-in for libcuda, as one shared library."""

    def __init__(self, path: Path, compiled: dict[str, tuple[Variant, int, Compiled]]) -> None:
        self.so = ctypes.CDLL(str(path))
        for op in ("sample_tokens", "differential_sample", "w4a8_linear"):
            getattr(self.so, f"mgt_cuda_{op}_workspace").restype = ctypes.c_size_t
        self.compiled = compiled
        self.launches: list[Launch] = []
        # kept alive as long as the library may call it
        self.callback = ON_LAUNCH(self._record)
        ctypes.c_void_p.in_dll(self.so, "fake_cuda_on_launch").value = ctypes.cast(self.callback, ctypes.c_void_p).value

    def _record(self, name, cubin, num_bytes, geometry, stream, arguments) -> None:  # type: ignore[no-untyped-def]
        variant, architecture, compiled = self.compiled[digest(bytes(cubin[:num_bytes]))]
        kinds = variant.parameters
        values = [
            READ.get(kind, ctypes.c_uint64).from_address(arguments[i]).value for i, kind in enumerate(kinds.values())
        ]
        scratch = [ctypes.c_uint64.from_address(arguments[len(kinds) + i]).value for i in range(2)]
        launch = Launch(
            variant, compiled, architecture, name.decode(), tuple(geometry[:3]), tuple(geometry[3:6]), geometry[6],
            stream, dict(zip(kinds, values, strict=True)), scratch,
        )  # fmt: skip
        self.launches.append(launch)

    def counter(self, name: str) -> int:
        return ctypes.c_int.in_dll(self.so, f"fake_cuda_{name}").value

    def call(self, function: str, *arguments: Any) -> int:
        return getattr(self.so, function)(*arguments)

    def sample_tokens(self, draw: Draw, stream: int = 7) -> int:
        args = ctypes.byref(draw.c_args)
        return self.call(
            "mgt_cuda_sample_tokens", args, *map(pointer, (draw.token_ids, draw.logprob, draw.workspace)),
            ctypes.c_size_t(draw.workspace.nbytes), ctypes.c_void_p(stream),
        )  # fmt: skip

    def differential_sample(self, draw: Differential, stream: int = 7) -> int:
        outputs = (draw.token_ids, draw.logprob, draw.divergence, draw.workspace)
        return self.call(
            "mgt_cuda_differential_sample", ctypes.byref(draw.c_differential), ctypes.byref(draw.c_state),
            *map(pointer, outputs), ctypes.c_size_t(draw.workspace.nbytes), ctypes.c_void_p(stream),
        )  # fmt: skip

    def mask_by_confidence(self, mask: Mask, stream: int = 7) -> int:
        args = ctypes.byref(mask.c_args)
        return self.call("mgt_cuda_mask_by_confidence", args, pointer(mask.tokens), ctypes.c_void_p(stream))

    def linear(self, layer: Layer, stream: int = 7) -> int:
        outputs: tuple[Any, ...] = (pointer(layer.y),)
        if layer.op == "w4a8_linear":
            x_scale = layer.x_scale
            scales = (None, 0) if x_scale is None else (pointer(x_scale), len(x_scale))
            num_bytes = ctypes.c_size_t(layer.workspace.nbytes)
            outputs = (scales[0], ctypes.c_int64(scales[1]), pointer(layer.y), pointer(layer.workspace), num_bytes)
        return self.call(f"mgt_cuda_{layer.op}", ctypes.byref(layer.c_args), *outputs, ctypes.c_void_p(stream))


def digest(cubin: bytes) -> str:
    return hashlib.sha256(cubin).hexdigest()


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def build(
    directory: Path, architectures: tuple[int, ...], variants: list[Variant], compile_for: Callable[..., Compiled]
) -> Library:
    compiled: dict[str, tuple[Variant, int, Compiled]] = {}

    def record(variant: Variant, architecture: int) -> Compiled:
        result = compile_for(variant, architecture)
        compiled[digest(result.cubin)] = (variant, architecture, result)
        return result

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(export, "compile_for", record)
        files = write_sources(directory, architectures, variants)
    assert len(compiled) == len(variants) * len(architectures)
    sources = [path for path in files if path.suffix == ".c"]
    gcc = ["gcc", "-std=c11", *STRICT, "-isystem", str(INCLUDE), "-shared", "-fPIC", "-Wl,-Bsymbolic"]
    library = directory / "library.so"
    subprocess.run([*gcc, *sources, FAKE_CUDA / "fake_cuda.c", "-o", library], check=True)
    return Library(library, compiled)


def stand_in(variant: Variant, architecture: int) -> Compiled:
    """An ELF header, the name of a section and the variant, in place of machine code."""
    name = variant.kernel.__name__
    body = f".text.{name}\0".encode() + json.dumps([variant.key, architecture]).encode() + b"\0"
    header = bytearray(64)
    header[:4] = b"\x7fELF"
    header[0x28:0x30] = struct.pack("<Q", 64 + len(body))
    # some need more shared memory than a kernel may have unasked
    shared = 60_000 if variant.constants.get("HAS_NOISE") else 16
    num_warps = variant.options["num_warps"]
    return Compiled(name, bytes(header) + body, "", num_warps, shared, architecture >= 90)


@pytest.fixture(scope="session")
def every_variant(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """All variants, none of which is really compiled."""
    variants = variants_of(export.DTYPES, export.LAYOUTS, group_sizes=(32, 96, 128, 256, 16384))
    return build(tmp_path_factory.mktemp("export"), (80, 86, 90), variants, stand_in)


@pytest.fixture
def library(every_variant: Library, monkeypatch: pytest.MonkeyPatch) -> Library:
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", "80")
    every_variant.launches.clear()
    return every_variant


def make_logits(
    batch: int, num_positions: int, num_tokens: int, dtype: torch.dtype, position_major: bool, offset: int
) -> torch.Tensor:
    sizes = (batch, num_tokens, num_positions) if position_major else (batch, num_positions, num_tokens)
    values = torch.empty(offset + batch * num_positions * num_tokens, dtype=dtype)
    logits = values[offset:].view(sizes)
    return logits.transpose(1, 2) if position_major else logits


@dataclass(eq=False)
class Draw:
    batch: int
    num_positions: int
    num_tokens: int
    dtype: torch.dtype = torch.bfloat16
    position_major: bool = False
    guided: bool = True
    noise_scale: float = 0.0
    temperature: float = 1.0
    # elements by which the first logit misses an aligned address
    offset: int = 0

    def __post_init__(self) -> None:
        shape = (self.batch, self.num_positions, self.num_tokens, self.dtype, self.position_major, self.offset)
        self.logits = make_logits(*shape)
        self.uncond = make_logits(*shape) if self.guided else None
        self.tokens = torch.full((self.batch, self.num_positions), self.num_tokens)
        self.token_ids = torch.empty_like(self.tokens)
        self.logprob = torch.empty(self.tokens.shape)
        self.seed, self.step = torch.arange(self.batch) - 1, torch.tensor(5)
        self.c_args = CSampleTokens(
            self.batch, self.num_positions, self.num_tokens,
            C_DTYPES.index(self.dtype),
            CLogits(self.logits.data_ptr(), *self.logits.stride()),
            CLogits() if self.uncond is None else CLogits(self.uncond.data_ptr(), *self.uncond.stride()),
            self.tokens.data_ptr(), self.seed.data_ptr(), self.step.data_ptr(), self.num_tokens, 3.1,
            self.noise_scale, self.temperature,
        )  # fmt: skip
        self.workspace = torch.empty(0)

    def allocate(self, library: Library) -> None:
        num_bytes = library.call("mgt_cuda_sample_tokens_workspace", ctypes.byref(self.c_args))
        self.workspace = torch.empty(num_bytes // 4)

    @property
    def record(self) -> mgt_kernels.draw.Draw:
        return draw_of(
            self.logits, self.tokens, self.seed, self.step, self.num_tokens, self.uncond, 3.1, self.noise_scale,
            self.temperature,
        )  # fmt: skip

    def unused_strides(self) -> set[str]:
        """Strides of dimensions of size 1."""
        sizes = {"sample": self.batch, "position": self.num_positions, "token": self.num_tokens}
        return {f"{half}stride_{name}" for name, size in sizes.items() for half in ("", "uncond_") if size == 1}

    def from_python(self) -> Any:
        return kernels.sample_tokens(self.record, "masked", "", 0, 1.0, 0.0, "kept")


@dataclass(eq=False)
class Differential(Draw):
    variant: str = "paper"
    aliased_history: bool = False
    has_history: bool = True
    share: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        self.history = torch.zeros(self.logits.shape, dtype=torch.int16)
        self.written = torch.zeros(self.tokens.shape, dtype=torch.bool)
        self.history_seed, self.history_step = self.seed.clone(), self.step - 1
        self.divergence = torch.empty(self.tokens.shape)
        self.c_differential = CDifferentialSample(
            self.c_args, ("paper", "official").index(self.variant), self.aliased_history, self.has_history, self.share
        )
        state = (self.history, self.written, self.history_seed, self.history_step)
        self.c_state = CDifferentialState(*(tensor.data_ptr() for tensor in state))

    def allocate(self, library: Library) -> None:
        num_bytes = library.call("mgt_cuda_differential_sample_workspace", ctypes.byref(self.c_differential))
        self.workspace = torch.empty(num_bytes, dtype=torch.uint8)

    def from_python(self) -> Any:
        return kernels.differential_sample(
            self.record, self.history, self.written, self.history_step, self.history_seed, self.has_history,
            self.share, self.variant, self.aliased_history,
        )  # fmt: skip


@dataclass(eq=False)
class Mask:
    batch: int
    num_positions: int
    temperature: float = 1.3

    def __post_init__(self) -> None:
        shape = (self.batch, self.num_positions)
        self.tokens, self.token_ids = torch.empty(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        self.logprob = torch.zeros(shape)
        self.mask_len = torch.full((self.batch,), self.num_positions // 3)
        self.seed, self.step = torch.arange(self.batch) - 1, torch.tensor(5)
        self.c_args = CMaskByConfidence(
            *shape, *(t.data_ptr() for t in (self.token_ids, self.logprob, self.mask_len, self.seed, self.step)),
            1024, self.temperature,
        )  # fmt: skip

    def from_python(self) -> Any:
        return kernels.mask_by_confidence(
            self.token_ids, self.logprob, self.mask_len, self.seed, self.step, 1024, self.temperature
        )


@dataclass(eq=False)
class Layer:
    op: str
    num_rows: int
    num_outputs: int
    num_inputs: int
    group_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    scale_dtype: torch.dtype = torch.float16
    has_bias: bool = True
    # static ones; 0: dynamic
    num_scales: int = 0
    # elements between two rows of x
    padding: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        x = torch.zeros(self.num_rows, self.num_inputs + self.padding)
        weight = torch.zeros(self.num_outputs, self.num_inputs)
        self.bias = torch.zeros(self.num_outputs) if self.has_bias else None
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed)
            for tensor in (x, weight, *([] if self.bias is None else [self.bias])):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        self.x = x.to(self.dtype)[:, : self.num_inputs]
        self.weight = mgt_kernels.quantize_int4(weight, self.group_size, scale_dtype=self.scale_dtype)
        self.x_scale = 0.03 * (1 + torch.arange(self.num_scales)) if self.num_scales else None
        self.y = torch.empty(self.num_rows, self.num_outputs, dtype=self.dtype)
        # as a caller in C has it
        self.c_x = self.x if self.op == "w4a8_linear" else self.x.bfloat16()
        self.tensors = (self.weight.w_q, self.weight.scale, self.weight.zero_point)
        w_q, scale, zero_point = (tensor.data_ptr() for tensor in self.tensors)
        self.c_args = CInt4Linear(
            self.num_rows, self.num_inputs, self.num_outputs, C_DTYPES.index(self.dtype), self.c_x.data_ptr(),
            self.c_x.stride(0), w_q, scale, C_DTYPES.index(self.scale_dtype), zero_point, self.group_size,
            None if self.bias is None else self.bias.data_ptr(),
        )  # fmt: skip
        self.workspace = torch.empty(0)

    def allocate(self, library: Library) -> None:
        if self.op == "w4a8_linear":
            num_bytes = library.call("mgt_cuda_w4a8_linear_workspace", ctypes.byref(self.c_args))
            self.workspace = torch.empty(num_bytes, dtype=torch.uint8)

    def from_python(self) -> Any:
        activations = (self.x_scale,) if self.op == "w4a8_linear" else ()
        return getattr(kernels, self.op)(self.x, *self.tensors, self.group_size, *activations, self.bias)


Call = Draw | Mask | Layer


def launches_from_python(call: Call, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple, dict]]:
    """Kernel, grid, and all arguments by name, of every launch; nothing is compiled."""
    recorded = []

    def record(kernel: JITFunction, *args: Any, grid: tuple, warmup: bool, **kwargs: Any) -> None:
        values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        recorded.append((kernel.__name__, (*grid, 1, 1)[:3], values))

    with monkeypatch.context() as patch, standin_gpu(80, execute=False):
        patch.setattr(JITFunction, "run", record)
        # what is loaded is launched past it
        patch.setattr(launching, "_LOADED", {})
        patch.setattr(launching, "_LOADED_FOR", {})
        # exported layers are not split, which does not change their bits
        for op in ("w4a8_linear", "w4a16_linear"):
            patch.setattr(sys.modules[f"mgt_kernels.triton.{op}"], "splits_for", lambda *_: 1)
        call.from_python()
    return recorded


# what a caller in C provides, where the launcher in Python makes a tensor
OURS = {
    "token_ids_ptr": "token_ids", "logprob_ptr": "logprob", "divergence_ptr": "divergence",
    "masked_tokens_ptr": "tokens", "x_ptr": "c_x", "y_ptr": "y",
}  # fmt: skip
WORKSPACE = {
    "partials_ptr", "keys_ptr", "choice_ptr", "choice_logprob_ptr", "softmax_ptr", "selected_ptr", "x_q_ptr",
    "x_sum_ptr", "row_scale_ptr",
}  # fmt: skip


def assert_same_launches(call: Call, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = launches_from_python(call, monkeypatch)
    assert [launch.name for launch in library.launches] == [name for name, _, _ in expected]
    # first and last byte of the parts of the workspace
    parts: dict[str, tuple[int, int]] = {}
    for launch, (_, grid, values) in zip(library.launches, expected, strict=True):
        assert launch.grid == grid
        assert launch.block == (32 * values["num_warps"], 1, 1)
        assert launch.shared == launch.compiled.shared_bytes and launch.stream == 7
        assert launch.scratch == [0, 0]
        assert launch.variant.options == {name: values[name] for name in launch.variant.options}
        for name in launch.variant.kernel.arg_names:
            if name in WORKSPACE & launch.arguments.keys():
                part = launch.arguments[name], launch.arguments[name] + values[name].nbytes
                assert parts.setdefault(name, part) == part
            else:
                assert_same_argument(name, values[name], launch, call)
        for name in launch.variant.multiples_of_16 & launch.arguments.keys():
            assert launch.arguments[name] % 16 == 0, name
    if parts:
        assert isinstance(call, Draw | Layer)
        start = call.workspace.data_ptr()
        bounds = [start, *(bound for part in sorted(parts.values()) for bound in part)]
        assert bounds == sorted(bounds) and bounds[-1] <= start + call.workspace.nbytes


def assert_same_argument(name: str, value: Any, launch: Launch, call: Call) -> None:
    if isinstance(call, Draw) and name in call.unused_strides():
        return
    if name == "MAY_FORBID":
        # exported code takes scales of either sign
        assert launch.variant.constants[name] >= value
        return
    if name == "GREEDY" and not launch.variant.constants.get("HAS_HISTORY", True):
        # nothing races
        return
    if name in launch.variant.constants:
        assert launch.variant.constants[name] == value, name
        return
    if name in export._ABSENT:
        # the op is not asked for it
        assert value is None or name == "logit_inverse_temperature"
        return
    if name in OURS and not (isinstance(call, Mask) and name != "masked_tokens_ptr"):
        value = getattr(call, OURS[name])
    if isinstance(value, torch.Tensor):
        value = value.data_ptr()
    if isinstance(value, float) and name != "share":
        value = ctypes.c_float(value).value
    assert launch.arguments[name] == value, name


# shapes, and of each the splits
SHAPES = [
    ((1, 1, 8192), 4),
    ((2, 1, 126464), 62),
    ((2, 256, 8192), 4),
    ((1, 256, 8256), 5),
    ((3, 256, 1025), 1),
    ((1, 1024, 8192), 2),
    ((1, 1300, 10240), 2),
    ((1, 4096, 8192), 1),
    ((1, 64, 126464), 31),
    ((2, 17, 4097), 3),
    ((1, 2, 524289), 52),
    ((2, 16, 1), 1),
]


@pytest.mark.parametrize("position_major", [False, True], ids=["token-major", "position-major"])
@pytest.mark.parametrize(("shape", "num_splits"), SHAPES, ids=str)
def test_sample_tokens_is_launched_as_from_python(shape, num_splits, position_major, library, monkeypatch):
    draw = Draw(*shape, position_major=position_major, temperature=0.7, guided=shape != (1, 4096, 8192))
    draw.allocate(library)
    assert library.sample_tokens(draw) == SUCCESS
    assert library.launches[0].grid[1] == num_splits
    assert len(library.launches) == (1 if num_splits == 1 else 2)
    assert draw.workspace.numel() == (0 if num_splits == 1 else 5 * draw.tokens.numel() * num_splits)
    assert_same_launches(draw, library, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_variant_is_chosen(dtype, library, monkeypatch):
    chosen = set()
    flags = itertools.product([False, True], [False, True], [0.0, 0.3], [0.0, 1.7], [0, 1], [1024, 2048])
    for position_major, guided, noise_scale, temperature, offset, num_positions in flags:
        draw = Draw(1, num_positions, 4096, dtype, position_major, guided, noise_scale, temperature, offset)
        draw.allocate(library)
        library.launches.clear()
        assert library.sample_tokens(draw) == SUCCESS
        assert_same_launches(draw, library, monkeypatch)
        chosen.add(library.launches[0].variant)
    group = library.launches[0].variant.group
    assert chosen == {v for v, architecture, _ in library.compiled.values() if (v.group, architecture) == (group, 80)}
    assert len(chosen) == 64


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("num_positions", [1, 16, 127, 256, 257, 1000, 1024, 4096, 16384, 16385, 20000])
def test_mask_by_confidence_is_launched_as_from_python(num_positions, temperature, library, monkeypatch):
    mask = Mask(3, num_positions, temperature)
    assert library.mask_by_confidence(mask) == SUCCESS
    assert bool(library.launches[0].variant.multiples_of_16) == (num_positions % 16 == 0)
    assert_same_launches(mask, library, monkeypatch)


@pytest.mark.parametrize("position_major", [False, True], ids=["token-major", "position-major"])
@pytest.mark.parametrize(
    ("shape", "num_launches"),
    [((1, 1, 8192), 6), ((2, 17, 4097), 6), ((3, 256, 1025), 5), ((1, 2048, 300), 5)],
    ids=str,
)
def test_differential_sample_is_launched_as_from_python(shape, num_launches, position_major, library, monkeypatch):
    draw = Differential(*shape, position_major=position_major, variant="official", aliased_history=True, share=0.3)
    draw.allocate(library)
    assert library.differential_sample(draw) == SUCCESS
    assert len(library.launches) == num_launches
    assert_same_launches(draw, library, monkeypatch)


@pytest.mark.parametrize("dtype", C_DTYPES, ids=str)
def test_every_variant_of_a_comparison_is_chosen(dtype, library, monkeypatch):
    chosen = set()
    options = itertools.product([False, True], [False, True], [0.0, 0.3], [0.0, 1.7], [0, 1])
    variants = [("paper", False), ("official", False), ("official", True)]
    for option, variant, has_history in itertools.product(options, variants, [False, True]):
        draw = Differential(1, 32, 32, dtype, *option, *variant, has_history)
        draw.allocate(library)
        library.launches.clear()
        assert library.differential_sample(draw) == SUCCESS
        assert_same_launches(draw, library, monkeypatch)
        chosen |= {launch.variant for launch in library.launches}
    group = f"differential_sample_{export.DTYPES[C_DTYPES.index(dtype)]}"
    exported = {v for v, architecture, _ in library.compiled.values() if (v.group, architecture) == (group, 80)}
    assert {v for v in chosen if v.group == group} == exported
    # comparisons, and edits of the history
    assert len(exported) == 64 + 16


@pytest.mark.parametrize("num_positions", [1, 128, 200, 256, 1000, 4096, 16384, 16385])
@pytest.mark.parametrize("variant", [("paper", False), ("official", False), ("official", True)], ids=str)
def test_positions_are_selected_as_from_python(num_positions, variant, library, monkeypatch):
    draw = Differential(1, num_positions, 1, torch.float32, False, False, 0.0, 1.0, 0, *variant)
    draw.allocate(library)
    assert library.differential_sample(draw) == SUCCESS
    (select,) = (launch.variant for launch in library.launches if launch.name == "select_kernel")
    assert ("num_positions" in select.multiples_of_16) == (num_positions % 16 == 0)
    assert_same_launches(draw, library, monkeypatch)


@pytest.mark.parametrize("offset", [0, 2])
def test_a_history_is_edited_in_wide_accesses_where_it_is_aligned(offset, library):
    draw = Differential(1, 32, 32, variant="official", aliased_history=True)
    draw.allocate(library)
    draw.c_state.history += offset
    assert library.differential_sample(draw) == SUCCESS
    (edit,) = (launch.variant for launch in library.launches if launch.name == "edit_history_kernel")
    assert ("history_ptr" in edit.multiples_of_16) == (offset == 0)


LAYER = dict(num_rows=70, num_outputs=48, num_inputs=256)


@pytest.mark.parametrize(
    "change",
    [
        {}, {"num_rows": 16}, {"num_rows": 17}, {"num_rows": 1}, {"num_rows": 128}, {"num_outputs": 130},
        {"num_inputs": 200}, {"num_inputs": 257}, {"num_inputs": 130, "num_rows": 1}, {"padding": 1}, {"padding": 16},
        {"num_scales": 1}, {"num_scales": 70}, {"group_size": 32}, {"group_size": 32, "num_inputs": 96},
        {"group_size": 96}, {"group_size": 256}, {"group_size": 16384, "num_inputs": 16390, "num_outputs": 2},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("op", ["w4a8_linear", "w4a16_linear"])
def test_linear_layers_are_launched_as_from_python(op, change, library, monkeypatch):
    layer = Layer(op, **{**LAYER, **change})
    layer.allocate(library)
    assert library.linear(layer) == SUCCESS
    assert_same_launches(layer, library, monkeypatch)
    wide = layer.num_inputs % 16 == 0 and layer.padding % 16 == 0
    assert ("x_ptr" in library.launches[0].variant.multiples_of_16) == wide


@pytest.mark.parametrize("op", ["w4a8_linear", "w4a16_linear"])
def test_every_variant_of_a_layer_is_chosen(op, library, monkeypatch):
    chosen = set()
    dtypes, scale_dtypes = C_DTYPES[:2], (torch.float16, torch.float32)
    for dtype, scale_dtype, has_bias, num_rows, num_inputs, num_scales in itertools.product(
        dtypes, scale_dtypes, [False, True], [16, 17], [64, 65], [0, 1]
    ):
        layer = Layer(op, num_rows, 8, num_inputs, 32, dtype, scale_dtype, has_bias, num_scales)
        layer.allocate(library)
        library.launches.clear()
        assert library.linear(layer) == SUCCESS
        assert_same_launches(layer, library, monkeypatch)
        chosen |= {launch.variant for launch in library.launches}
    exported = {v for v, architecture, _ in library.compiled.values() if architecture == 80}
    assert chosen == {v for v in exported if v.group.startswith(op) and v.constants["GROUP_SIZE"] == 32}
    assert len(chosen) == (24 if op == "w4a8_linear" else 32)


def test_a_group_longer_than_the_inputs_is_computed_whole(library):
    layer = Layer("w4a8_linear", 3, 8, 100, 256)
    layer.allocate(library)
    assert layer.workspace.nbytes == 16 * (256 + 4 + 4)
    assert library.linear(layer) == SUCCESS
    assert [launch.variant.constants["GROUP_SIZE"] for launch in library.launches] == [256, 256]


@pytest.mark.parametrize(
    ("change", "aligned"),
    [
        ({}, True),
        ({"offset": 8}, True),
        ({"offset": 1}, False),
        ({"num_tokens": 4104}, False),
        ({"num_positions": 15}, True),
        ({"num_positions": 15, "position_major": True}, False),
        ({"num_tokens": 4097, "position_major": True}, True),
    ],
    ids=str,
)
def test_wide_accesses_only_where_they_are_aligned(change, aligned, library):
    draw = Draw(**{"batch": 2, "num_positions": 16, "num_tokens": 4096, **change})
    draw.allocate(library)
    assert library.sample_tokens(draw) == SUCCESS
    assert ("logits_ptr" in library.launches[0].variant.multiples_of_16) == aligned


@pytest.mark.parametrize("half", ["logits", "uncond_logits"])
@pytest.mark.parametrize("field", ["data", "stride_sample", "stride_position"])
def test_one_misaligned_half_is_enough(half, field, library):
    draw = Draw(2, 16, 4096)
    draw.allocate(library)
    setattr(getattr(draw.c_args, half), field, getattr(getattr(draw.c_args, half), field) + 8)
    assert library.sample_tokens(draw) == SUCCESS
    assert "logits_ptr" not in library.launches[0].variant.multiples_of_16


@pytest.mark.parametrize(
    ("capability", "architecture"), [("80", 80), ("86", 86), ("89", 86), ("90", 90), ("70", None),
    ("75", None), ("91", None), ("100", None), ("120", None)],
)  # fmt: skip
def test_code_of_the_device_is_chosen(capability, architecture, library, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", capability)
    mask = Mask(1, 64)
    assert library.mask_by_confidence(mask) == (NO_BINARY_FOR_GPU if architecture is None else SUCCESS)
    assert [launch.architecture for launch in library.launches] == ([] if architecture is None else [architecture])


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_samples", -1), ("num_positions", -1), ("num_positions", 2**30 + 1), ("num_samples", 2**31 // 16),
     ("num_tokens", 0), ("num_tokens", 2**30 + 1), ("dtype", 3), ("dtype", -1), ("tokens", None), ("seeds", None),
     ("step", None), ("logits", CLogits(None, 16, 16, 1)), ("logits", CLogits(64, 65536, 4096, 2)),
     ("uncond_logits", CLogits(64, 65536, 1, 16)), ("mask_token_id", 2**31), ("mask_token_id", -(2**31) - 1),
     ("guidance_scale", NAN), ("guidance_scale", INF), ("noise_scale", -1.0), ("noise_scale", NAN),
     ("noise_scale", INF), ("temperature", -1.0), ("temperature", NAN), ("temperature", INF), ("temperature", 1e-39)],
    ids=str,
)  # fmt: skip
def test_bad_arguments_of_sample_tokens(name, value, library):
    draw = Draw(1, 16, 4096)
    draw.allocate(library)
    setattr(draw.c_args, name, value)
    assert library.sample_tokens(draw) == INVALID_VALUE and not library.launches


def test_bad_outputs_of_sample_tokens(library):
    draw = Draw(1, 16, 4096)
    # no workspace, then too small a one
    assert library.sample_tokens(draw) == INVALID_VALUE
    draw.allocate(library)
    draw.workspace = draw.workspace[:-1]
    assert library.sample_tokens(draw) == INVALID_VALUE
    draw.allocate(library)
    good = [pointer(draw.token_ids), pointer(draw.logprob), pointer(draw.workspace)]
    for i in range(3):
        outputs = [None if i == j else good[j] for j in range(3)]
        arguments = (ctypes.byref(draw.c_args), *outputs, ctypes.c_size_t(draw.workspace.nbytes), None)
        assert library.call("mgt_cuda_sample_tokens", *arguments) == INVALID_VALUE
    assert library.call("mgt_cuda_sample_tokens", None, *good, ctypes.c_size_t(0), None) == INVALID_VALUE
    assert library.call("mgt_cuda_sample_tokens_workspace", None) == 0
    assert not library.launches


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_samples", -1), ("num_samples", 2**31), ("num_positions", -1), ("num_positions", 2**30 + 1),
     ("token_ids", None), ("logprob", None), ("mask_len", None), ("seeds", None), ("step", None),
     ("mask_token_id", 2**31), ("temperature", -1.0), ("temperature", NAN), ("temperature", INF)],
)  # fmt: skip
def test_bad_arguments_of_mask_by_confidence(name, value, library):
    mask = Mask(1, 16)
    setattr(mask.c_args, name, value)
    assert library.mask_by_confidence(mask) == INVALID_VALUE
    assert library.call("mgt_cuda_mask_by_confidence", None, None, None) == INVALID_VALUE
    assert library.call("mgt_cuda_mask_by_confidence", ctypes.byref(Mask(1, 16).c_args), None, None) == INVALID_VALUE
    assert not library.launches


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("c_differential", "share", -0.1), ("c_differential", "share", 1.1), ("c_differential", "share", NAN),
     ("c_differential", "variant", 2), ("c_differential", "variant", -1), ("c_differential", "variant", 0),
     ("c_args", "num_tokens", 2**27 - 2047), ("c_args", "num_positions", -1), ("c_args", "temperature", -1.0),
     ("c_args", "tokens", None), ("c_state", "history", None), ("c_state", "written", None),
     ("c_state", "seeds", None), ("c_state", "step", None)],
    ids=str,
)  # fmt: skip
def test_bad_arguments_of_differential_sample(part, name, value, library):
    # variant 0 has no aliased history
    draw = Differential(2, 16, 4096, variant="official", aliased_history=True)
    draw.allocate(library)
    setattr(getattr(draw, part), name, value)
    draw.c_differential.sample = draw.c_args
    assert library.differential_sample(draw) == INVALID_VALUE and not library.launches


def test_bad_outputs_of_differential_sample(library):
    draw = Differential(2, 16, 4096)
    draw.allocate(library)
    # keys, choices and their log-probabilities, parts of the draw
    num_bytes = 32 * (8 + 4 + 4) + 32 * 2 * 5 * 4
    assert draw.workspace.nbytes == num_bytes
    args, state = ctypes.byref(draw.c_differential), ctypes.byref(draw.c_state)
    good: list[Any] = [args, state, *(ctypes.c_void_p(64) for _ in range(4)), ctypes.c_size_t(num_bytes)]
    bad = [(i, None) for i in range(6)] + [(5, ctypes.c_void_p(72)), (6, ctypes.c_size_t(num_bytes - 1))]
    for index, value in bad:
        arguments = [*good[:index], value, *good[index + 1 :]]
        assert library.call("mgt_cuda_differential_sample", *arguments, None) == INVALID_VALUE
    assert library.call("mgt_cuda_differential_sample_workspace", None) == 0
    assert not library.launches
    assert library.call("mgt_cuda_differential_sample", *good, None) == SUCCESS
    # a first step of many positions needs none
    first = Differential(1, 2048, 16, has_history=False)
    first.allocate(library)
    assert first.workspace.nbytes == 0 and library.differential_sample(first) == SUCCESS


def test_differences_that_were_not_exported_leave_no_draw_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", "80")
    library = build(tmp_path, (80,), variants_of(["fp32"], ["token-major"], ["sample_tokens"]), stand_in)
    draw = Differential(2, 16, 64, torch.float32)
    draw.allocate(library)
    assert library.differential_sample(draw) == NOT_FOUND and not library.launches
    assert library.sample_tokens(Draw(1, 2048, 64, torch.float32)) == SUCCESS


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_rows", -1), ("num_rows", 2**30 + 1), ("num_inputs", 0), ("num_inputs", 2**30 + 1), ("num_outputs", -1),
     ("num_outputs", 2**30 + 1), ("dtype", 2), ("dtype", 3), ("dtype", -1), ("scale_dtype", 1), ("scale_dtype", 3),
     ("x", None), ("x_stride", 255), ("w_q", None), ("w_q", 8), ("scale", None), ("zero_point", None),
     ("group_size", 0), ("group_size", 48), ("group_size", 16416), ("group_size", -32)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("op", ["w4a8_linear", "w4a16_linear"])
def test_bad_arguments_of_layers(op, name, value, library):
    layer = Layer(op, **LAYER)
    layer.allocate(library)
    setattr(layer.c_args, name, value)
    assert library.linear(layer) == INVALID_VALUE and not library.launches


def test_bad_outputs_and_scales_of_layers(library):
    args, stream = ctypes.byref(Layer("w4a16_linear", **LAYER).c_args), None
    y = ctypes.c_void_p(64)
    assert library.call("mgt_cuda_w4a16_linear", args, None, stream) == INVALID_VALUE
    assert library.call("mgt_cuda_w4a16_linear", None, y, stream) == INVALID_VALUE
    assert library.call("mgt_cuda_w4a8_linear_workspace", None) == 0

    num_bytes = library.call("mgt_cuda_w4a8_linear_workspace", args)
    assert num_bytes == 128 * (256 + 4 * 2 + 4)

    def w4a8(y=y, workspace=64, num_bytes=num_bytes, x_scale=64, num_scales=1, args=args):  # type: ignore[no-untyped-def]
        pointers = ctypes.c_void_p(x_scale), ctypes.c_int64(num_scales), y, ctypes.c_void_p(workspace)
        return library.call("mgt_cuda_w4a8_linear", args, *pointers, ctypes.c_size_t(num_bytes), stream)

    for bad in (
        dict(y=None), dict(workspace=None), dict(workspace=72), dict(num_bytes=num_bytes - 1), dict(x_scale=None),
        dict(num_scales=-1), dict(num_scales=3), dict(args=None),
    ):  # fmt: skip
        assert w4a8(**bad) == INVALID_VALUE and not library.launches
    assert w4a8() == SUCCESS and len(library.launches) == 2
    assert w4a8(x_scale=None, num_scales=0) == SUCCESS

    # more sums of groups than the kernels count
    layer = Layer("w4a8_linear", **LAYER)
    layer.c_args.num_rows, layer.c_args.num_inputs, layer.c_args.x_stride = 2**20, 2**18, 2**18
    assert library.call("mgt_cuda_w4a8_linear_workspace", ctypes.byref(layer.c_args)) == 0
    assert w4a8(num_bytes=2**62, args=ctypes.byref(layer.c_args)) == INVALID_VALUE


@pytest.mark.parametrize("change", [{"num_rows": 0}, {"num_outputs": 0}], ids=str)
@pytest.mark.parametrize("op", ["w4a8_linear", "w4a16_linear"])
def test_layers_with_nothing_to_do(op, change, library):
    layer = Layer(op, **LAYER)
    for name, value in change.items():
        setattr(layer.c_args, name, value)
    assert library.linear(layer) == SUCCESS and not library.launches


@pytest.mark.parametrize("shape", [(0, 16), (3, 0)])
def test_nothing_to_do(shape, library):
    assert library.sample_tokens(Draw(*shape, 4096)) == SUCCESS
    assert library.differential_sample(Differential(*shape, 4096)) == SUCCESS
    assert library.mask_by_confidence(Mask(*shape)) == SUCCESS
    assert not library.launches


def test_strides_of_dimensions_of_size_1_do_not_matter(library):
    for shape in ((2, 1, 4096), (2, 16, 1)):
        draw = Draw(*shape, guided=False)
        draw.allocate(library)
        draw.c_args.logits.stride_position = draw.c_args.logits.stride_token = 5
        assert library.sample_tokens(draw) == SUCCESS
        assert {launch.name for launch in library.launches} >= {"sample_tokens_kernel"}


def test_temperature_is_rounded_as_from_python(library, monkeypatch):
    for temperature in (0.0, 0.1, 0.3, 1.0, 1.1, 3.3, 1e-30, 3e38):
        draw = Draw(1, 2048, 64, temperature=temperature)
        library.launches.clear()
        assert library.sample_tokens(draw) == SUCCESS
        assert_same_launches(draw, library, monkeypatch)


@pytest.mark.parametrize(
    ("function", "status", "num_positions"),
    [("cuCtxGetDevice", INVALID_CONTEXT, 200), ("cuLibraryLoadData", OUT_OF_MEMORY, 300),
     ("cuLibraryGetKernel", NOT_FOUND, 600), ("cuLaunchKernel", OUT_OF_RESOURCES, 1100)],
)  # fmt: skip
def test_errors_of_the_driver_come_back_and_are_not_remembered(function, status, num_positions, library, monkeypatch):
    # kernels that no other test loads
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", "86")
    mask = Mask(1, num_positions)
    before = library.counter("loaded")
    monkeypatch.setenv("FAKE_CUDA_FAILS", function)
    assert library.mask_by_confidence(mask) == status
    assert library.counter("loaded") == before + (function == "cuLaunchKernel")
    monkeypatch.delenv("FAKE_CUDA_FAILS")
    assert library.mask_by_confidence(mask) == SUCCESS
    assert library.counter("loaded") == before + 1


def test_threads_load_a_kernel_once(library, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", "90")
    draws = [Draw(1, 2048, 64, torch.float16) for _ in range(64)]
    before = library.counter("loaded"), library.counter("loads")
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(library.sample_tokens, draws)) == {SUCCESS}
    assert len(library.launches) == 64
    assert library.counter("loaded") == before[0] + 1
    # losers of the race load too, and unload
    assert 1 <= library.counter("loads") - before[1] <= 8


def test_what_is_loaded_beforehand_is_launched_in_a_capture(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", "80")
    library = build(tmp_path, (80, 90), variants_of(["bf16"], ["token-major"]), stand_in)
    draw, num_variants = Draw(1, 2048, 64), len(library.compiled) // 2
    draw.allocate(library)
    monkeypatch.setenv("FAKE_CUDA_CAPTURES", "1")
    assert library.sample_tokens(draw) == library.call("mgt_cuda_load") == CAPTURE_UNSUPPORTED
    monkeypatch.delenv("FAKE_CUDA_CAPTURES")
    for function in ("cuLibraryLoadData", "cuKernelGetFunction"):
        monkeypatch.setenv("FAKE_CUDA_FAILS", function)
        assert library.call("mgt_cuda_load") == OUT_OF_MEMORY
    monkeypatch.delenv("FAKE_CUDA_FAILS")
    for _ in range(2):
        assert library.call("mgt_cuda_load") == SUCCESS
        assert library.counter("loaded") == library.counter("loads") == num_variants
    monkeypatch.setenv("FAKE_CUDA_CAPTURES", "1")
    assert library.sample_tokens(draw) == library.mask_by_confidence(Mask(2, 300)) == SUCCESS
    assert library.counter("loads") == num_variants
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", "70")
    assert library.call("mgt_cuda_load") == NO_BINARY_FOR_GPU


def test_what_was_not_exported_is_not_found(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", "80")
    library = build(tmp_path, (80,), variants_of(["bf16"], ["token-major"]), stand_in)
    for change, status in (({}, SUCCESS), ({"dtype": torch.float16}, NOT_FOUND), ({"position_major": True}, NOT_FOUND)):
        assert library.sample_tokens(Draw(1, 2048, 64, **change)) == status
    for group_size, status in ((128, SUCCESS), (64, NOT_FOUND)):
        assert library.linear(Layer("w4a16_linear", **LAYER, group_size=group_size)) == status


def is_sampled(variant: Variant) -> bool:
    """A few variants of every kernel, compiled in a second or two each."""
    constants = variant.constants
    if variant.kernel.__name__ == "combine_splits_kernel":
        return constants["BLOCK_SPLITS"] == 2
    if variant.group.startswith("differential_sample"):
        return False
    if variant.kernel.__name__ == "mask_by_confidence_kernel":
        return constants["BLOCK_POSITIONS"] == 128 and constants["HAS_NOISE"] and bool(variant.multiples_of_16)
    if "linear" in variant.group:
        # those of LAYERS
        return (
            variant.types.get("scale_ptr", "*fp16") == "*fp16"
            and variant.multiples_of_16 >= {"x_ptr"} & variant.types.keys()
            and all(constants.get(name, True) for name in ("HAS_BIAS", "IS_STATIC"))
            and constants.get("BLOCK_ROWS", 16) == 16
        )
    guided, split = "uncond_ptr" not in constants, "partials_ptr" not in constants
    aligned = "logits_ptr" in variant.multiples_of_16
    wanted = [(False, True, False, True, True), (True, True, False, True, False), (False, False, True, False, False)]
    options = (constants["BLOCK_POSITIONS"] > 1, guided, constants["GREEDY"], aligned, split)
    return not constants["HAS_NOISE"] and options in wanted


@pytest.fixture(scope="session")
def compiled_library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    variants = [variant for variant in variants_of(["bf16"], export.LAYOUTS) if is_sampled(variant)]
    assert len(variants) == 8
    return build(tmp_path_factory.mktemp("compiled"), (80,), variants, export.compile_for)


def run_in_emulator(library: Library, call: Call, *others: torch.Tensor) -> None:
    """Execute the launches of C on the memory that they point to: the tensors of the call, and others."""
    tensors = [value for value in (*vars(call).values(), *others) if isinstance(value, torch.Tensor) and value.numel()]
    # by address: the same memory twice is one buffer
    buffers = list({tensor.untyped_storage().data_ptr(): storage_of(tensor) for tensor in tensors}.values())
    for launch in library.launches:
        formats = {"fp32": "f", "fp64": "d"}
        kinds = [*launch.variant.parameters.values(), "*scratch", "*scratch"]
        values = (*launch.arguments.values(), *launch.scratch)
        bits = [
            int.from_bytes(struct.pack(f"<{formats[kind]}", value), "little") if kind in formats else value
            for kind, value in zip(kinds, values, strict=True)
        ]
        report = Emulator(Program(launch.compiled.ptx, 0), launch.shared).run(launch.grid, bits, buffers)
        assert not report.races


LAYERS = {
    "w4a8_linear": dict(num_rows=16, num_outputs=72, num_inputs=1024, num_scales=16),
    "w4a16_linear": dict(num_rows=16, num_outputs=72, num_inputs=576),
}


@pytest.mark.parametrize("op", LAYERS)
def test_exported_layers_are_those_of_the_emulated_launcher(op, compiled_library, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", "80")
    compiled_library.launches.clear()
    layer = Layer(op, **LAYERS[op], seed=1)
    layer.y.fill_(torch.nan)
    layer.allocate(compiled_library)
    assert compiled_library.linear(layer) == SUCCESS
    run_in_emulator(compiled_library, layer, *layer.tensors)
    with standin_gpu(80) as launches:
        expected = layer.from_python()
    assert torch.equal(layer.y, expected)
    for ours, theirs in zip(compiled_library.launches, launches, strict=True):
        assert (ours.name, ours.grid, ours.block[0], ours.shared) == (
            theirs.kernel, theirs.grid, 32 * theirs.num_warps, theirs.shared,
        )  # fmt: skip
    if op == "w4a8_linear":
        assert torch.equal(layer.y, mgt_kernels.w4a8_linear(layer.x, layer.weight, layer.x_scale, layer.bias))


DRAWS = {
    "split": dict(batch=2, num_positions=3, num_tokens=4096),
    "position-major": dict(batch=2, num_positions=16, num_tokens=515, position_major=True, temperature=0.8),
    "greedy, unaligned": dict(batch=1, num_positions=3, num_tokens=1025, guided=False, temperature=0.0),
}


@pytest.mark.parametrize("name", DRAWS)
def test_exported_code_draws_what_the_cpu_draws(name, compiled_library, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", "89")
    draw = Draw(**DRAWS[name])
    compiled_library.launches.clear()
    generator = torch.Generator().manual_seed(1)
    for half in (draw.logits, draw.uncond):
        if half is not None:
            half.copy_(3 * torch.randn(half.shape, generator=generator))
    draw.tokens[0, 1] = 7
    draw.allocate(compiled_library)
    assert compiled_library.sample_tokens(draw) == SUCCESS
    run_in_emulator(compiled_library, draw)
    expected = mgt_kernels.sample_tokens(
        draw.logits, draw.tokens, mask_token_id=draw.num_tokens, seed=draw.seed, step=draw.step,
        uncond_logits=draw.uncond, guidance_scale=draw.c_args.guidance_scale, temperature=draw.c_args.temperature,
    )  # fmt: skip
    assert torch.equal(draw.token_ids, expected[0])
    torch.testing.assert_close(draw.logprob, expected[1], rtol=0, atol=1e-5)

    with standin_gpu(80, execute=False) as launches:
        draw.from_python()
    for ours, theirs in zip(compiled_library.launches, launches, strict=True):
        assert (ours.name, ours.grid, ours.block[0], ours.shared) == (
            theirs.kernel, theirs.grid, 32 * theirs.num_warps, theirs.shared,
        )  # fmt: skip


def test_exported_differences_are_those_of_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", "80")
    # temperature 0 takes a third of the time to compile
    draw = Differential(2, 3, 304, temperature=0.0, variant="official", aliased_history=True)
    every = build(tmp_path / "every", (80,), variants_of(["bf16"], ["token-major"], ["differential_sample"]), stand_in)
    draw.allocate(every)
    assert every.differential_sample(draw) == SUCCESS
    library = build(tmp_path / "chosen", (80,), [launch.variant for launch in every.launches], export.compile_for)

    generator = torch.Generator().manual_seed(1)
    previous, change, uncond = 3 * torch.randn(3, *draw.logits.shape, generator=generator)
    draw.logits.copy_(previous + 0.3 * change)
    assert draw.uncond is not None
    draw.uncond.copy_(uncond)
    draw.tokens[0, 1] = 7
    options: dict[str, Any] = dict(
        mask_token_id=draw.num_tokens, seed=draw.seed, temperature=0.0, share=draw.share, variant=draw.variant,
        aliased_history=True, uncond_logits=draw.uncond, guidance_scale=draw.c_args.guidance_scale,
    )  # fmt: skip
    *_, state = mgt_kernels.differential_sample(previous.bfloat16(), draw.tokens, None, step=draw.step - 1, **options)
    draw.history.copy_(state.history)
    draw.written.copy_(state.written)
    assert library.differential_sample(draw) == SUCCESS
    run_in_emulator(library, draw)
    token_ids, logprob, state = mgt_kernels.differential_sample(
        draw.logits, draw.tokens, state, step=draw.step, **options
    )
    for ours, theirs in (
        (draw.token_ids, token_ids), (draw.divergence, state.divergence), (draw.history, state.history),
        (draw.written, state.written), (draw.history_step, state.step),
    ):  # fmt: skip
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(draw.logprob, logprob, rtol=0, atol=1e-5)

    # replayed with a step that is not the next one: nothing is drawn, and the state stays
    draw.step += 2
    run_in_emulator(library, draw)
    assert torch.equal(draw.token_ids, draw.tokens)
    assert torch.equal(draw.history, state.history) and torch.equal(draw.history_step, state.step)


def test_exported_code_masks_what_the_cpu_masks(compiled_library, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", "80")
    compiled_library.launches.clear()
    mask = Mask(2, 96)
    mask.logprob.copy_(-torch.rand(mask.logprob.shape, generator=torch.Generator().manual_seed(1)))
    assert compiled_library.mask_by_confidence(mask) == SUCCESS
    run_in_emulator(compiled_library, mask)
    expected = mgt_kernels.mask_by_confidence(
        mask.token_ids, mask.logprob, mask.mask_len, mask_token_id=1024, temperature=mask.c_args.temperature,
        seed=mask.seed, step=mask.step,
    )  # fmt: skip
    assert torch.equal(mask.tokens, expected)


def test_a_launcher_that_passes_other_types_is_refused():
    variant = next(v for v in variants_of(["bf16"], ["token-major"]) if v.group == "combine_splits")
    narrow = replace(variant, types=dict(variant.types, num_rows="i64"))
    with pytest.raises(RuntimeError, match="combine_splits_kernel: expected parameters of types"):
        export._check_interface(narrow, triton_compiled(variant))


def triton_compiled(variant: Variant) -> Any:
    """What `_check_interface` looks at."""
    ptx = export.compile_for(variant, 80).ptx
    metadata = type("Metadata", (), {"global_scratch_size": 0, "profile_scratch_size": 0, "num_ctas": 1})
    return type("CompiledKernel", (), {"metadata": metadata, "asm": {"ptx": ptx}})


@pytest.mark.parametrize("architecture", export.ARCHITECTURES)
def test_what_runs_on_later_minors(architecture):
    variant = next(v for v in variants_of(["bf16"], ["token-major"]) if v.group == "combine_splits")
    compiled = export.compile_for(variant, architecture)
    assert compiled.cubin.startswith(b"\x7fELF")
    # from 9.0 on Triton compiles for the one architecture, with its specific features
    assert compiled.exact == (architecture >= 90)


def test_the_output_depends_on_the_kernels_alone(compiled_library, tmp_path, monkeypatch):
    for _, _, compiled in compiled_library.compiled.values():
        assert b".py" not in compiled.cubin and b".debug_line" not in compiled.cubin
    (greedy,) = [v for v, _, _ in compiled_library.compiled.values() if v.constants.get("GREEDY")]
    texts = []
    for name in ("first", "second"):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / name))
        texts.append({path.name: path.read_text() for path in write_sources(tmp_path / name, [80], [greedy])})
    tables = {"mgt_kernels_cuda_sm80_sample_tokens_bf16.c", "mgt_kernels_cuda_tables.c"}
    assert texts[0] == texts[1] and texts[0].keys() == LAUNCHERS | tables
    assert not triton.knobs.compilation.disable_line_info


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(export, "compile_for", stand_in)


def mgt(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["export", *map(str, arguments)], catch_exceptions=False)


def test_the_command_writes_what_a_c_program_needs(uncompiled, tmp_path):
    out = tmp_path / "new" / "folder"
    result = mgt("--arch", 90, "--arch", 80, "--dtype", "bf16", "--layout", "token-major", "--out", out)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(path) for path in sorted(out.iterdir())]
    names = {path.name for path in out.iterdir()}
    assert {f"mgt_kernels_cuda_sm{a}_sample_tokens_bf16.c" for a in (80, 90)} | LAUNCHERS < names

    # the header is C99 and C++
    include = [f"-I{out}", "-isystem", INCLUDE]
    sources = [*out.glob("*.c"), FAKE_CUDA / "fake_cuda.c"]
    for compiler in (["gcc", "-std=c99"], ["g++", "-x", "c++"]):
        program = tmp_path / compiler[0]
        command = [*compiler, *include, *STRICT, "-Wno-missing-field-initializers", "-c", FAKE_CUDA / "main.c"]
        subprocess.run([*command, "-o", f"{program}.o"], check=True)
        subprocess.run(["gcc", "-std=c11", *STRICT, *include, *sources, f"{program}.o", "-o", program], check=True)
        environment = {**os.environ, "FAKE_CUDA_CAPABILITY": "80"}
        run = subprocess.run([program], check=True, capture_output=True, text=True, env=environment)
        assert run.stdout.splitlines() == [
            "workspace 40960",
            "sample_tokens_kernel grid 512 4 1 block 64 1 1",
            "combine_splits_kernel grid 16 1 1 block 128 1 1",
            "mask_by_confidence_kernel grid 2 1 1 block 32 1 1",
        ]


def test_the_command_leaves_out_what_is_not_asked_for(uncompiled, tmp_path):
    result = mgt("--arch", 90, "--op", "w4a16_linear", "--group-size", 64, "--group-size", 32, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    tables = [path for path in tmp_path.iterdir() if "_sm90_" in path.name]
    assert {path.name for path in tables} == {f"mgt_kernels_cuda_sm90_w4a16_linear_{t}.c" for t in ("fp32", "bf16")}
    sizes = re.findall(r"MGT_CUDA_W4A16_LINEAR\(MGT_CUDA_\w+, (\d+),", "".join(path.read_text() for path in tables))
    assert set(sizes) == {"32", "64"} and len(sizes) == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arch", 70), "architectures: expected some of 80, 86, 89, 90, 100, 103, 120, 121, got 70"),
        (("--dtype", "bf17"), "dtypes: expected some of fp32, bf16, fp16, got bf17"),
        (("--layout", "flat"), "layouts: expected some of token-major, position-major, got flat"),
        (("--op", "w4a4"), f"ops: expected some of {', '.join(export.OPS)}, got w4a4"),
        (("--group-size", 48), "group_size: expected a multiple of 32 within [32, 16384], got 48"),
        (
            ("--op", "w4a8_linear", "--dtype", "fp16"),
            "dtypes: expected fp32 or bf16 for the linear layers, got fp16",
        ),
    ],
)
def test_errors_are_one_kind_line(uncompiled, arguments, message, tmp_path):
    result = mgt(*arguments, "--out", tmp_path)
    assert result.exit_code == 2 and result.stderr.strip().endswith(message)


def test_without_triton_the_command_says_so(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("mgt_kernels.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(mgt_kernels, "triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    result = mgt("--out", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.strip().endswith("export needs Triton: pip install mgt-kernels[gpu]")
