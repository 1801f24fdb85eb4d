"""Ahead-of-time export: the kernels as C sources with machine code embedded, for programs without Python and Triton.

The C launchers, aot/*.c and *.h, are copied as they are. What is written here are the variants that they choose from: a
table and its cubins per architecture, kernel and dtype.
"""

import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from mgt_kernels.packing import check_group_size
from mgt_kernels.triton.differential_sample import (
    MAX_REGISTERS,
    advance_history_step_kernel,
    compare_kernel,
    edit_history_kernel,
    select_kernel,
)
from mgt_kernels.triton.draws import LAUNCH_OPTIONS
from mgt_kernels.triton.launch import next_power_of_2
from mgt_kernels.triton.mask_by_confidence import mask_by_confidence_kernel
from mgt_kernels.triton.sample_tokens import MAX_SPLITS, combine_splits_kernel, sample_tokens_kernel
from mgt_kernels.triton.w4a8_linear import quantize_rows_kernel, w4a8_linear_kernel
from mgt_kernels.triton.w4a16_linear import w4a16_linear_kernel

# 10 major + minor
ARCHITECTURES = (80, 86, 89, 90, 100, 103, 120, 121)
DTYPES = ("fp32", "bf16", "fp16")
LAYOUTS = ("token-major", "position-major")
OPS = ("sample_tokens", "differential_sample", "mask_by_confidence", "w4a8_linear", "w4a16_linear")

_C_DTYPES = {"fp32": "MGT_CUDA_FLOAT32", "bf16": "MGT_CUDA_BFLOAT16", "fp16": "MGT_CUDA_FLOAT16"}
_AOT = Path(__file__).parent / "aot"

# types that the launchers in C pass, by the kernels' names for the arguments; sizes that are not here are i32
_KINDS = {
    "token_ids_ptr": "*i64", "logprob_ptr": "*fp32", "partials_ptr": "*fp32", "tokens_ptr": "*i64", "seed_ptr": "*i64",
    "step_ptr": "*i64", "stride_sample": "i64", "stride_position": "i64", "stride_token": "i64",
    "uncond_stride_sample": "i64", "uncond_stride_position": "i64", "uncond_stride_token": "i64",
    "guidance_scale": "fp32", "noise_scale": "fp32", "inverse_temperature": "fp32",
    "masked_tokens_ptr": "*i64", "mask_len_ptr": "*i64", "temperature": "fp32",
    "divergence_ptr": "*fp32", "keys_ptr": "*i64", "choice_ptr": "*i32", "choice_logprob_ptr": "*fp32",
    "softmax_ptr": "*fp32", "selected_ptr": "*u8", "history_ptr": "*i16", "written_ptr": "*u8",
    "history_seed_ptr": "*i64", "history_step_ptr": "*i64", "share": "fp64",
    "w_q_ptr": "*u8", "zero_point_ptr": "*u8", "bias_ptr": "*fp32", "x_q_ptr": "*i8", "x_sum_ptr": "*i32",
    "row_scale_ptr": "*fp32", "x_scale_ptr": "*fp32", "stride_row": "i64",
}  # fmt: skip
# arguments that the launchers in C have no door for
_ABSENT = {
    "argmax_ptr", "max_logprob_ptr", "margin_ptr", "entropy_ptr", "logsumexp_ptr", "known_logprob_ptr", "logit_ptr",
    "logit_inverse_temperature", "token_bias_ptr", "first_position_ptr", "kept_from_ptr", "second_uncond_ptr",
    "second_stride_sample", "second_stride_position", "second_stride_token", "second_guidance_scale", "softcap",
}  # fmt: skip


def _types(kernel: JITFunction, **kinds: str) -> dict[str, str]:
    """Return the arguments of a kernel that are not constexprs with their types; `kinds` has those that vary."""
    names = [parameter.name for parameter in kernel.params if not (parameter.is_constexpr or parameter.name in _ABSENT)]
    known = _KINDS | kinds
    return {name: known[name] if name.endswith("_ptr") else known.get(name, "i32") for name in names}


@dataclass(frozen=True, eq=False)
class Variant:
    """A kernel and what it is compiled for, but for the architecture."""

    # the file that it goes into
    group: str
    # a macro of mgt_kernels_cuda_variants.h
    key: str
    kernel: JITFunction
    # all arguments that the launcher in C passes, in the kernel's order, those that are compiled in included
    types: Mapping[str, str]
    # the constexprs, None for an absent pointer, a stride
    constants: Mapping[str, Any]
    # arguments that are multiples of 16
    multiples_of_16: frozenset[str]
    options: Mapping[str, Any]

    @property
    def parameters(self) -> dict[str, str]:
        """The arguments that are passed at run time, with their types."""
        return {name: kind for name, kind in self.types.items() if name not in self.constants}


class Compiled(NamedTuple):
    """A variant's machine code for one architecture."""

    name: str
    cubin: bytes
    # what the cubin was assembled from
    ptx: str
    num_warps: int
    shared_bytes: int
    # whether nothing but this very architecture runs it
    exact: bool


def export(
    directory: str | Path,
    architectures: Sequence[int] = (80, 90),
    dtypes: Sequence[str] = DTYPES,
    layouts: Sequence[str] = LAYOUTS,
    ops: Sequence[str] = OPS,
    group_sizes: Sequence[int] = (128,),
    *,
    progress: bool = False,
) -> list[Path]:
    """Compile the kernels and write C sources: compile all of them as C11 and link with -lcuda.

    Takes minutes: of `sample_tokens` there are 64 variants per architecture and dtype, of `differential_sample` 80, and
    each takes some seconds of a CPU. `mgt_kernels_cuda.h` describes the result.

    Args:
        directory: made if need be; files of an earlier export in it are overwritten, not removed.
        architectures: compute capabilities, 10 major + minor, of ARCHITECTURES. Code for 8.x runs on later 8.x, other
            code on its own architecture alone.
        dtypes: of the logits, and of what the linear layers return, of DTYPES; the layers know no fp16.
        layouts: of the logits, of LAYOUTS: which dimension has unit stride.
        ops: of OPS; `differential_sample` comes with `sample_tokens`, which it calls.
        group_sizes: of the linear layers' weights, multiples of 32 within [32, 16384].
        progress: show a progress bar.

    Returns:
        The files written.

    Raises:
        TypeError: if a group size is not an integer.
        ValueError: if an architecture, dtype, layout, op or group size is unknown, or none is given, or nothing is left
            of them: the linear layers alone, in fp16 alone.
    """
    for name, given, known in (
        ("architectures", architectures, ARCHITECTURES), ("dtypes", dtypes, DTYPES), ("layouts", layouts, LAYOUTS),
        ("ops", ops, OPS),
    ):  # fmt: skip
        unknown = [value for value in given if value not in known]
        if unknown or not given:
            got = unknown[0] if unknown else "none"
            raise ValueError(f"{name}: expected some of {', '.join(map(str, known))}, got {got}")
    if not group_sizes:
        raise ValueError("group_sizes: expected at least one, got none")
    for group_size in group_sizes:
        check_group_size(group_size)
    # in one order, whatever the order given
    dtypes, layouts, ops = (
        [value for value in known if value in given]
        for given, known in ((dtypes, DTYPES), (layouts, LAYOUTS), (ops, OPS))
    )
    variants = variants_of(dtypes, layouts, ops, sorted(set(group_sizes)))
    if not variants:
        raise ValueError("dtypes: expected fp32 or bf16 for the linear layers, got fp16")
    return write_sources(Path(directory), sorted(set(architectures)), variants, progress=progress)


def variants_of(
    dtypes: Sequence[str],
    layouts: Sequence[str],
    ops: Sequence[str] = OPS,
    group_sizes: Sequence[int] = (128,),
) -> list[Variant]:
    """List all that the launchers in C choose from."""
    flags = (False, True)
    scale_dtypes = ("fp16", "fp32")
    logits = [(dtype, layout == "position-major") for dtype, layout in product(dtypes, layouts)]
    # the ops take no float16
    layers = [(dtype, group_size) for dtype in dtypes if dtype != "fp16" for group_size in group_sizes]
    # positions of a sample, as many as a program takes at a time, and whether that is all of them
    blocks = [*((2**i, True) for i in range(7, 15)), (2**14, False)]
    by_op = {
        "sample_tokens": [
            *(_sample_tokens(*half, *options) for half in logits for options in product(flags, repeat=5)),
            *(_combine_splits(2**i) for i in range(1, MAX_SPLITS.bit_length())),
        ],
        "differential_sample": [
            *(
                _compare(*half, guided, noise, comparison)
                for half, guided, noise, comparison in product(logits, flags, flags, _COMPARISONS)
            ),
            *(_select(*block, *options) for block in blocks for options in product(_SELECTIONS, flags)),
            *(_edit_history(*half, *options) for half in logits for options in product(flags, repeat=3)),
            *(_advance_history_step(has_history) for has_history in flags),
        ],
        "mask_by_confidence": [
            _mask_by_confidence(*block, *options) for block in blocks for options in product(flags, repeat=2)
        ],
        "w4a8_linear": [
            *(_quantize_rows(*layer, *options) for layer in layers for options in product(flags, repeat=2)),
            *(
                _w4a8_linear(*layer, scale_dtype, *options)
                for layer, scale_dtype, options in product(layers, scale_dtypes, product(flags, repeat=2))
            ),
        ],
        "w4a16_linear": [
            _w4a16_linear(*layer, scale_dtype, *options)
            for layer, scale_dtype, options in product(layers, scale_dtypes, product(flags, repeat=3))
        ],
    }
    # differential_sample begins with a plain draw
    drawn = {"sample_tokens"} if "differential_sample" in ops else set()
    return [variant for op in OPS if op in drawn.union(ops) for variant in by_op[op]]


def write_sources(
    directory: Path,
    architectures: Sequence[int],
    variants: Sequence[Variant],
    *,
    progress: bool = False,
) -> list[Path]:
    """Compile these variants, and write them and the launchers."""
    directory.mkdir(parents=True, exist_ok=True)
    jobs = list(product(variants, architectures))
    # most of the time goes to compilers that hold no lock of Python's
    with triton.knobs.compilation.scope(), ThreadPoolExecutor(os.cpu_count()) as pool:
        # line tables are large and name files of this machine
        triton.knobs.compilation.disable_line_info = True
        compiling = pool.map(lambda job: compile_for(*job), jobs)
        results = tqdm(compiling, "compiling", len(jobs), unit="kernel", disable=not progress, leave=False)
        compiled = dict(zip(jobs, results, strict=True))

    files = {path.name: path.read_text() for path in sorted(_AOT.glob("*.[ch]"))}
    tables = {}
    for architecture, group in product(architectures, dict.fromkeys(variant.group for variant in variants)):
        members = [(v, compiled[v, architecture]) for v in variants if v.group == group]
        table = f"mgt_cuda_sm{architecture}_{group}"
        tables[table] = f"{{{architecture}, {members[0][1].exact:d}, {table}, {len(members)}}}"
        files[f"mgt_kernels_cuda_sm{architecture}_{group}.c"] = _table_source(table, members)
    files["mgt_kernels_cuda_tables.c"] = _tables_source(tables)
    for name, text in files.items():
        (directory / name).write_text(text)
    return [directory / name for name in sorted(files)]


def compile_for(variant: Variant, architecture: int) -> Compiled:
    """Compile a variant; no GPU and no driver is needed."""
    kernel = variant.kernel
    signature = {name: variant.parameters.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name in variant.multiples_of_16 and name in variant.parameters
    }
    absent = {name: None for name in kernel.arg_names if name in _ABSENT}
    source = ASTSource(kernel, signature, {**variant.constants, **absent}, attributes)
    options = {**variant.options, **LAUNCH_OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    _check_interface(variant, compiled)
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    exact = re.search(rf"^\.target sm_{architecture}a\b", ptx, re.MULTILINE) is not None
    return Compiled(metadata.name, compiled.asm["cubin"], ptx, metadata.num_warps, metadata.shared, exact)


def _check_interface(variant: Variant, compiled: Any) -> None:
    """Make sure that the kernel takes what the launcher in C passes, and needs nothing else."""
    name, metadata = variant.kernel.__name__, compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1:
        raise RuntimeError(f"{name}: kernels with scratch memory or clusters are not exported")
    entry = re.search(r"\.entry \w+\((.*?)\)", compiled.asm["ptx"], re.DOTALL)
    parameters = re.findall(r"\.param \.([a-z]\d+)", entry[1] if entry else "")
    # behind the arguments two pointers to scratch memory
    expected = [*variant.parameters.values(), "*scratch", "*scratch"]
    if [int(kind[1:]) for kind in parameters] != [_num_bits(kind) for kind in expected]:
        raise RuntimeError(f"{name}: expected parameters of types {expected}, got {parameters}")


def _num_bits(kind: str) -> int:
    return 64 if kind.startswith("*") else int(kind.lstrip("ifp"))


def _layout_constants(position_major: bool, guided: bool) -> dict[str, Any]:
    """Return what is compiled in of the logits' halves."""
    unit = "position" if position_major else "token"
    constants: dict[str, Any] = {f"stride_{unit}": 1, f"uncond_stride_{unit}": 1}
    if not guided:
        constants["uncond_ptr"] = None
        constants |= {f"uncond_stride_{dimension}": 0 for dimension in ("sample", "position", "token")}
    # one variant for all guidance scales
    return {
        **constants,
        "MAY_FORBID": guided,
        "SCALE_PER_SAMPLE": False,
        "IS_DUAL": False,
        "SECOND_SCALE_PER_SAMPLE": False,
    }


def _aligned_logits(position_major: bool) -> set[str]:
    """Return the arguments that are multiples of 16 where logits are read 16 bytes at a time."""
    unit, other = ("position", "token") if position_major else ("token", "position")
    return {
        "logits_ptr", "uncond_ptr", f"num_{unit}s", "stride_sample", f"stride_{other}", "uncond_stride_sample",
        f"uncond_stride_{other}",
    }  # fmt: skip


def _sample_tokens(
    dtype: str, position_major: bool, guided: bool, noise: bool, greedy: bool, split: bool, aligned: bool
) -> Variant:
    constants = {
        **_layout_constants(position_major, guided),
        **({} if split else {"partials_ptr": None}),
        "FORBIDS_REST": False,
        "HAS_NOISE": noise,
        "GREEDY": greedy,
        "READS": "masked",
        "BLOCK_POSITIONS": 16 if position_major else 1,
        "BLOCK_COLUMNS": 32 if position_major else 512,
    }
    # as in the launcher in Python
    num_warps = 2 if not position_major and dtype != "fp32" and not noise else 4
    flags = (position_major, guided, noise, greedy, split, aligned)
    return Variant(
        group=f"sample_tokens_{dtype}",
        key=f"MGT_CUDA_SAMPLE_TOKENS({_C_DTYPES[dtype]}, {', '.join(f'{flag:d}' for flag in flags)})",
        kernel=sample_tokens_kernel,
        types=_types(sample_tokens_kernel, logits_ptr=f"*{dtype}", uncond_ptr=f"*{dtype}"),
        constants=constants,
        multiples_of_16=frozenset({"columns_per_split"} | (_aligned_logits(position_major) if aligned else set())),
        options={"num_warps": num_warps, "maxnreg": 168},
    )


def _combine_splits(block_splits: int) -> Variant:
    return Variant(
        group="combine_splits",
        key=f"MGT_CUDA_COMBINE_SPLITS({block_splits})",
        kernel=combine_splits_kernel,
        types=_types(combine_splits_kernel),
        constants={"READS": "masked", "BLOCK_ROWS": 32, "BLOCK_SPLITS": block_splits},
        multiples_of_16=frozenset(),
        options={"num_warps": 4},
    )


def _sample_constants(block_positions: int, in_registers: bool) -> tuple[dict[str, Any], int]:
    """Return what is compiled into a kernel with a program per sample, and its warps."""
    num_warps = min(max(block_positions // 256, 1), 16)
    return {
        "CHUNK_POSITIONS": min(block_positions, 128 * num_warps),
        "BLOCK_POSITIONS": block_positions,
        "IN_REGISTERS": in_registers,
    }, num_warps


def _mask_by_confidence(block_positions: int, in_registers: bool, noise: bool, aligned: bool) -> Variant:
    constants, num_warps = _sample_constants(block_positions, in_registers)
    multiples_of_16 = {"masked_tokens_ptr", "token_ids_ptr", "logprob_ptr", "num_positions"} if aligned else set()
    return Variant(
        group="mask_by_confidence",
        key=f"MGT_CUDA_MASK_BY_CONFIDENCE({block_positions}, {in_registers:d}, {noise:d}, {aligned:d})",
        kernel=mask_by_confidence_kernel,
        types=_types(mask_by_confidence_kernel),
        constants={"HAS_NOISE": noise, **constants},
        multiples_of_16=frozenset(multiples_of_16),
        options={"num_warps": num_warps},
    )


# greedy, has_history, is_paper, edits_history: without a history nothing races, and what is edited later is official
_COMPARISONS = (
    (False, False, False, False), (False, False, True, False), (False, True, False, False), (False, True, True, False),
    (False, True, False, True), (True, True, False, False), (True, True, True, False), (True, True, False, True),
)  # fmt: skip
# is_paper, edits_history
_SELECTIONS = ((True, False), (False, False), (False, True))


def _compare(
    dtype: str,
    position_major: bool,
    guided: bool,
    noise: bool,
    comparison: tuple[bool, bool, bool, bool],
) -> Variant:
    greedy, has_history, is_paper, edits_history = comparison
    absent = [] if edits_history else ["softmax_ptr"]
    if not has_history:
        absent += ["keys_ptr", "choice_ptr", "choice_logprob_ptr"]
    block_positions = 16 if position_major else 2
    flags = (position_major, guided, noise, *comparison)
    return Variant(
        group=f"differential_sample_{dtype}",
        key=f"MGT_CUDA_COMPARE({_C_DTYPES[dtype]}, {', '.join(f'{flag:d}' for flag in flags)})",
        kernel=compare_kernel,
        types=_types(compare_kernel, logits_ptr=f"*{dtype}", uncond_ptr=f"*{dtype}"),
        constants={
            **_layout_constants(position_major, guided),
            **dict.fromkeys(absent),
            "HAS_HISTORY": has_history,
            "IS_PAPER": is_paper,
            "HAS_NOISE": noise,
            "GREEDY": greedy,
            "BLOCK_POSITIONS": block_positions,
        },
        # a thread reads a column at a time
        multiples_of_16=frozenset(),
        options={"num_warps": block_positions // 2, "maxnreg": MAX_REGISTERS},
    )


def _select(block_positions: int, in_registers: bool, selection: tuple[bool, bool], aligned: bool) -> Variant:
    is_paper, edits_history = selection
    constants, num_warps = _sample_constants(block_positions, in_registers)
    # the rest is the workspace, which is aligned
    multiples_of_16 = {"selected_ptr", "keys_ptr", "choice_ptr", "choice_logprob_ptr"}
    if aligned:
        multiples_of_16 |= {"token_ids_ptr", "logprob_ptr", "tokens_ptr", "num_positions"}
    flags = f"{is_paper:d}, {edits_history:d}, {aligned:d}"
    return Variant(
        group="differential_sample",
        key=f"MGT_CUDA_SELECT({block_positions}, {in_registers:d}, {flags})",
        kernel=select_kernel,
        types=_types(select_kernel),
        constants={**({} if edits_history else {"selected_ptr": None}), "IS_PAPER": is_paper, **constants},
        multiples_of_16=frozenset(multiples_of_16),
        options={"num_warps": num_warps},
    )


def _edit_history(dtype: str, position_major: bool, guided: bool, noise: bool, aligned: bool) -> Variant:
    multiples_of_16 = {"softmax_ptr", "selected_ptr"}
    if aligned:
        multiples_of_16 |= {"history_ptr", "num_tokens"} | _aligned_logits(position_major)
    flags = (position_major, guided, noise, aligned)
    return Variant(
        group=f"differential_sample_{dtype}",
        key=f"MGT_CUDA_EDIT_HISTORY({_C_DTYPES[dtype]}, {', '.join(f'{flag:d}' for flag in flags)})",
        kernel=edit_history_kernel,
        types=_types(edit_history_kernel, logits_ptr=f"*{dtype}", uncond_ptr=f"*{dtype}"),
        constants={
            **_layout_constants(position_major, guided),
            "HAS_NOISE": noise,
            "BLOCK_POSITIONS": 16 if position_major else 1,
            "BLOCK_COLUMNS": 32 if position_major else 512,
        },
        multiples_of_16=frozenset(multiples_of_16),
        options={"num_warps": 4},
    )


def _advance_history_step(has_history: bool) -> Variant:
    return Variant(
        group="differential_sample",
        key=f"MGT_CUDA_ADVANCE_HISTORY_STEP({has_history:d})",
        kernel=advance_history_step_kernel,
        types=_types(advance_history_step_kernel),
        constants={"HAS_HISTORY": has_history},
        multiples_of_16=frozenset(),
        options={"num_warps": 1},
    )


def _quantize_rows(dtype: str, group_size: int, is_static: bool, aligned: bool) -> Variant:
    block_inputs = next_power_of_2(group_size)
    block_groups = max(1024 // block_inputs, 1)
    # the rest is the workspace, which is aligned
    multiples_of_16 = {"x_q_ptr", "x_sum_ptr", "row_scale_ptr", "stride_group", "plane_bytes"}
    if aligned:
        multiples_of_16 |= {"x_ptr", "stride_row", "num_inputs"}
    return Variant(
        group=f"w4a8_linear_{dtype}",
        key=f"MGT_CUDA_QUANTIZE_ROWS({_C_DTYPES[dtype]}, {group_size}, {is_static:d}, {aligned:d})",
        kernel=quantize_rows_kernel,
        types=_types(quantize_rows_kernel, x_ptr=f"*{dtype}"),
        constants={
            **({} if is_static else {"x_scale_ptr": None}),
            "IS_STATIC": is_static,
            "GROUP_SIZE": group_size,
            "BLOCK_GROUPS": block_groups,
            "BLOCK_INPUTS": block_inputs,
        },
        multiples_of_16=frozenset(multiples_of_16),
        options={"num_warps": min(max(block_groups * block_inputs // 256, 1), 16)},
    )


def _w4a8_linear(dtype: str, group_size: int, scale_dtype: str, has_bias: bool, few_rows: bool) -> Variant:
    block_outputs, block_rows, num_warps = (16, 16, 1) if few_rows else (128, 64, 4)
    flags = f"{_C_DTYPES[scale_dtype]}, {has_bias:d}, {few_rows:d}"
    return Variant(
        group=f"w4a8_linear_{dtype}",
        key=f"MGT_CUDA_W4A8_LINEAR({_C_DTYPES[dtype]}, {group_size}, {flags})",
        kernel=w4a8_linear_kernel,
        types=_types(w4a8_linear_kernel, y_ptr=f"*{dtype}", scale_ptr=f"*{scale_dtype}"),
        constants=_linear_constants(group_size, has_bias, block_outputs, block_rows),
        multiples_of_16=frozenset(
            {"x_q_ptr", "x_sum_ptr", "row_scale_ptr", "w_q_ptr", "stride_group", "row_bytes", "plane_bytes"}
        ),
        options={"num_warps": num_warps, "num_stages": 3},
    )


def _w4a16_linear(
    dtype: str, group_size: int, scale_dtype: str, has_bias: bool, few_rows: bool, aligned: bool
) -> Variant:
    block_outputs, block_rows, num_warps = (16, 16, 1) if few_rows else (128, 128, 8)
    multiples_of_16 = {"w_q_ptr", "row_bytes"}
    if aligned:
        multiples_of_16 |= {"x_ptr", "stride_row", "num_inputs"}
    flags = f"{_C_DTYPES[scale_dtype]}, {has_bias:d}, {few_rows:d}, {aligned:d}"
    return Variant(
        group=f"w4a16_linear_{dtype}",
        key=f"MGT_CUDA_W4A16_LINEAR({_C_DTYPES[dtype]}, {group_size}, {flags})",
        kernel=w4a16_linear_kernel,
        types=_types(w4a16_linear_kernel, y_ptr=f"*{dtype}", x_ptr="*bf16", scale_ptr=f"*{scale_dtype}"),
        constants=_linear_constants(group_size, has_bias, block_outputs, block_rows),
        multiples_of_16=frozenset(multiples_of_16),
        options={"num_warps": num_warps, "num_stages": 3},
    )


def _linear_constants(group_size: int, has_bias: bool, block_outputs: int, block_rows: int) -> dict[str, Any]:
    return {
        **({} if has_bias else {"bias_ptr": None}),
        "IS_SPLIT": False,
        "HAS_BIAS": has_bias,
        "GROUP_SIZE": group_size,
        "BLOCK_OUTPUTS": block_outputs,
        "BLOCK_ROWS": block_rows,
        "BLOCK_BYTES": 64 if group_size % 128 == 0 else 32,
    }


def _table_source(table: str, members: Iterable[tuple[Variant, Compiled]]) -> str:
    cubins, rows = [], []
    for index, (variant, compiled) in enumerate(members):
        cubins.append(f"static const uint64_t cubin_{index}[] = {{\n{_words(compiled.cubin)}}};\n")
        passed = sum(1 << i for i, name in enumerate(variant.types) if name in variant.parameters)
        rows.append(
            f'    {{{variant.key}, "{compiled.name}", cubin_{index}, {passed:#x}, {compiled.num_warps}, '
            f"{compiled.shared_bytes}, NULL}},\n"
        )
    return (
        f"/* made by `mgt export` with Triton {triton.__version__} */\n"
        '#include "mgt_kernels_cuda_variants.h"\n\n'
        f"extern mgt_cuda_variant {table}[];\n\n{''.join(cubins)}\n"
        f"mgt_cuda_variant {table}[] = {{\n{''.join(rows)}}};\n"
    )


def _tables_source(tables: Mapping[str, str]) -> str:
    return (
        f"/* made by `mgt export` with Triton {triton.__version__} */\n"
        '#include "mgt_kernels_cuda_variants.h"\n\n'
        + "".join(f"extern mgt_cuda_variant {table}[];\n" for table in tables)
        + "\nconst mgt_cuda_table mgt_cuda_tables[] = {\n"
        + "".join(f"    {row},\n" for row in tables.values())
        + "};\n"
        + f"const int mgt_cuda_num_tables = {len(tables)};\n"
    )


def _words(data: bytes) -> str:
    """Little-endian words, as all hosts of a GPU have them: a compiler reads them faster than bytes."""
    words = struct.unpack(f"<{-(-len(data) // 8)}Q", data + bytes(-len(data) % 8))
    lines = (words[i : i + 6] for i in range(0, len(words), 6))
    return "".join("  " + ", ".join(f"{word:#x}" for word in line) + ",\n" for line in lines)
