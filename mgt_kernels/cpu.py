"""The CPU backend: tensors to addresses for the C ABI, its statuses to exceptions."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mgt_kernels import _C
from mgt_kernels.draw import Draw

ISAS = ("auto", "scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
DIFFERENTIAL_VARIANTS = ("paper", "official")
ROWS = ("masked", "known", "all")
GUIDANCE = ("nested", "dual")
LOGPROB_OF = ("kept", "full")
# what sample_tokens gives of a row besides token_ids and logprob, and the dtypes
STATISTICS = {
    "argmax": torch.int64,
    "max_logprob": torch.float32,
    "margin": torch.float32,
    "entropy": torch.float32,
    "logsumexp": torch.float32,
    "known_logprob": torch.float32,
    "logit": torch.float32,
}
COMMIT_RULES = ("count", "threshold", "factor", "entropy_bound")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _DlInfo(ctypes.Structure):
    """Dl_info of dlfcn.h."""

    _fields_ = (
        ("dli_fname", ctypes.c_char_p),
        ("dli_fbase", ctypes.c_void_p),
        ("dli_sname", ctypes.c_char_p),
        ("dli_saddr", ctypes.c_void_p),
    )


@functools.cache
def torch_thread_pool() -> tuple[int, str]:
    """Find the OpenMP runtime that PyTorch runs on: the address of its GOMP_parallel and its file, or (0, "").

    Lending it to the kernels gives both one thread pool, so neither waits while the other's idle threads spin.
    """
    if _forked or not torch.backends.openmp.is_available():
        return 0, ""
    # as the dynamic linker bound it for PyTorch: first what all libraries see, which a preloaded runtime leads, then
    # what PyTorch's library brings
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for handle in (lambda: ctypes.CDLL(None), lambda: ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD)):
        try:
            parallel = ctypes.cast(handle().GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
        found = _DlInfo()
        named = ctypes.CDLL(None).dladdr(parallel, ctypes.byref(found)) and found.dli_fname
        return parallel.value or 0, os.fsdecode(named) if named else "a file without a name"
    return 0, ""


# more threads than this, and than there are processors, only wait for each other, and libgomp dies of many thousands
_MOST_THREADS = max(64, os.cpu_count() or 1)
_forked = False


def _after_fork_in_child() -> None:
    global _forked
    # the pool's threads stayed with the parent, and libgomp would wait for them for ever
    _forked = True
    if torch_thread_pool.cache_info().currsize:
        torch_thread_pool.cache_clear()
        # so would PyTorch's own ops, which the ops use beside the kernels
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork_in_child)


def num_threads() -> int:
    """Return how many threads a kernel runs on: PyTorch's number, but no absurd one."""
    return min(torch.get_num_threads(), _MOST_THREADS)


def resolve_isa(name: str = "auto") -> str:
    """Return the instruction set that `name` stands for here; "auto" honours the environment variable MGT_ISA.

    Raises:
        RuntimeError: if it is unknown or missing on this processor.
    """
    status, isa = _C.resolve_isa(ISAS.index(name))
    if status:
        _raise_unavailable(name)
    return ISAS[isa]


def available_isas() -> list[str]:
    """Return the instruction sets that run on this processor, slowest first."""
    return [name for name in ISAS[1:] if _C.resolve_isa(ISAS.index(name))[0] == 0]


def _raise_unavailable(name: str) -> None:
    asked = f"MGT_ISA={os.environ.get('MGT_ISA')}" if name == "auto" else f"backend={name!r}"
    raise RuntimeError(
        f"{asked} asks for an instruction set that is unknown or missing here; available: {available_isas()}"
    )


def _threads() -> tuple[int, int]:
    return num_threads(), torch_thread_pool()[0]


def _half(logits: Tensor | None) -> tuple[int, int, int, int]:
    if logits is None:
        return 0, 0, 0, 0
    _, num_positions, num_tokens = logits.shape
    stride_sample, stride_position, stride_token = logits.stride()
    # a dimension of size 1 is never stepped along; the kernels look for a stride of 1
    return (
        logits.data_ptr(),
        stride_sample,
        1 if num_positions == 1 else stride_position,
        1 if num_tokens == 1 else stride_token,
    )


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    # the default device may be another
    return torch.empty(shape, dtype=dtype, device="cpu")


def _empty_like(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(tokens, dtype=dtype, memory_format=torch.contiguous_format)


def _per_sample(value: int | Tensor, batch: int) -> Tensor | array[int]:
    return array("q", (value,)) * batch if isinstance(value, int) else value.contiguous()


def _address(values: Tensor | array[int] | None) -> int:
    if values is None:
        return 0
    return values.data_ptr() if isinstance(values, Tensor) else values.buffer_info()[0]


# mgt_sample_tokens_args: struct_size, dtype; sizes; logits; uncond_logits; second_uncond_logits; tokens, seeds,
# first_positions, guidance_scales, second_guidance_scales, token_bias; mask_token_id, step; guidance_scale,
# noise_scale, temperature, rows; second_guidance_scale, guidance, softcap, logprob_of; top_k; top_p, min_p
_SAMPLE_TOKENS_ARGS = struct.Struct("@Ii 3q P3q P3q P3q 6P 2q 3fi fifi q 2f")
# mgt_sample_tokens_outputs: struct_size; token_ids, logprob, then STATISTICS
_SAMPLE_TOKENS_OUTPUTS = struct.Struct("@I 9P")
# mgt_mask_by_confidence_args: struct_size, temperature; sizes; token_ids, logprob, mask_len, seeds; mask_token_id, step
_MASK_BY_CONFIDENCE_ARGS = struct.Struct("@If 2q 4P 2q")
# mgt_int4_linear_args: struct_size, dtype; sizes; x, x_stride; w_q, scale, zero_point, bias; group_size, scale_dtype
_INT4_LINEAR_ARGS = struct.Struct("@Ii 3q Pq 4P qi0q")
# mgt_differential_sample_args: struct_size, variant; sample, which the binding fills in; aliased_history, has_history,
# share
_DIFFERENTIAL_SAMPLE_ARGS = struct.Struct("@Ii P 2i d")


def _scale(scale: float | Tensor) -> tuple[float, Tensor | None]:
    """Return a scale for all samples, or (B,) float32 of one for each."""
    return (0.0, scale.float().contiguous()) if isinstance(scale, Tensor) else (scale, None)


# float32 would round them to what keeps everything, or to what is refused
_SMALLEST_TOP_P, _LARGEST_MIN_P = 2.0**-149, 1 - 2.0**-24


class _Record:
    """mgt_sample_tokens_args of a draw, packed, and what it points to, which must outlive the call."""

    def __init__(
        self, draw: Draw, rows: str = "masked", top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
        logprob_of: str = "kept",
    ) -> None:  # fmt: skip
        logits = draw.logits
        shape = logits.shape
        check_samples(draw)
        check_token_bias(draw.token_bias)
        self.tokens, seeds = draw.tokens.contiguous(), _per_sample(draw.seed, shape[0])
        firsts = None if draw.first_position is None else _per_sample(draw.first_position, shape[0])
        bias = None if draw.token_bias is None else draw.token_bias.contiguous()
        scale, scales = _scale(draw.guidance_scale)
        second_scale, second_scales = _scale(draw.second_guidance_scale)
        pointers = (self.tokens, seeds, firsts, scales, second_scales, bias)
        self._pointers = pointers
        self.packed = _SAMPLE_TOKENS_ARGS.pack(
            _SAMPLE_TOKENS_ARGS.size, _DTYPES[logits.dtype], *shape, *_half(logits), *_half(draw.uncond_logits),
            *_half(draw.second_uncond_logits), *map(_address, pointers), draw.mask_token_id, draw.step, scale,
            draw.noise_scale, draw.temperature, ROWS.index(rows), second_scale, GUIDANCE.index(draw.guidance),
            0.0 if draw.softcap == math.inf else draw.softcap, LOGPROB_OF.index(logprob_of), top_k,
            max(top_p, _SMALLEST_TOP_P), min(min_p, _LARGEST_MIN_P),
        )  # fmt: skip


def check_samples(draw: Draw) -> None:
    """Check the values of what may differ between samples; the device's are read."""
    for name in ("guidance_scale", "second_guidance_scale"):
        scale = getattr(draw, name)
        if isinstance(scale, Tensor):
            # 16 bits would take the limit for inf
            sample = first_index(~(scale.double().abs() <= torch.finfo(torch.float32).max))
            if sample >= 0:
                raise ValueError(f"{name}: expected finite numbers, got {float(scale[sample])} for sample {sample}")
    first_position = draw.first_position
    if first_position is None:
        return
    positions = [first_position] if isinstance(first_position, int) else first_position.tolist()
    last = 2**32 - draw.logits.shape[1]
    for sample, first in enumerate(positions):
        if not 0 <= first <= last:
            raise ValueError(f"first_position: expected a value within [0, {last}], got {first} for sample {sample}")


def check_token_bias(token_bias: Tensor | None) -> None:
    """Check that something may be drawn; the device's values are read."""
    if token_bias is not None and not (token_bias > -torch.inf).any():
        raise ValueError("allowed: expected at least one token that is allowed, got none")


def _where(index: int, num_positions: int) -> str:
    return f"sample {index // num_positions}, position {index % num_positions}"


def _check_draw(name: str, status: int, index: int, tokens: Tensor, num_tokens: int, isa: str) -> None:
    if status == 2:
        _raise_unavailable(isa)
    if status == 3:
        raise bad_logits(index, tokens.shape[1])
    if status == 4:
        raise bad_token(tokens, index, num_tokens)
    if status:
        raise RuntimeError(f"{name} refused its arguments (status {status})")


def sample_tokens(
    draw: Draw, rows: str, statistics: str, top_k: int, top_p: float, min_p: float, logprob_of: str, isa: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run the C kernel on checked arguments."""
    record = _Record(draw, rows, top_k, top_p, min_p, logprob_of)
    tokens = record.tokens
    token_ids, logprob = _empty_like(tokens, torch.int64), _empty_like(tokens, torch.float32)
    asked = {name: _empty_like(tokens, STATISTICS[name]) for name in statistics.split(",") if name}
    status, index = _C.sample_tokens(
        ISAS.index(isa), *_threads(), record.packed,
        _SAMPLE_TOKENS_OUTPUTS.pack(
            _SAMPLE_TOKENS_OUTPUTS.size, token_ids.data_ptr(), logprob.data_ptr(),
            *[asked[name].data_ptr() if name in asked else 0 for name in STATISTICS],
        ),
    )  # fmt: skip
    _check_draw("mgt_sample_tokens", status, index, tokens, draw.logits.shape[-1], isa)
    return token_ids, logprob, list(asked.values())


def differential_sample(
    draw: Draw,
    history: Tensor,
    written: Tensor,
    has_history: bool,
    share: float,
    variant: str,
    aliased_history: bool,
    isa: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the C kernel on checked arguments; history and written are contiguous and updated in place."""
    record = _Record(draw)
    tokens = record.tokens
    token_ids = _empty_like(tokens, torch.int64)
    logprob, divergence = (_empty_like(tokens, torch.float32) for _ in range(2))
    status, index = _C.differential_sample(
        ISAS.index(isa), *_threads(), record.packed,
        _DIFFERENTIAL_SAMPLE_ARGS.pack(
            _DIFFERENTIAL_SAMPLE_ARGS.size, DIFFERENTIAL_VARIANTS.index(variant), 0, aliased_history, has_history, share
        ),
        *(tensor.data_ptr() for tensor in (history, written, token_ids, logprob, divergence)),
    )  # fmt: skip
    if status:
        # some rows were overwritten: none may be taken for the previous step's
        overwrite(written, False)
    _check_draw("mgt_differential_sample", status, index, tokens, draw.logits.shape[-1], isa)
    return token_ids, logprob, divergence


def first_index(flags: Tensor) -> int:
    """Return the index, in the flattened tensor, of the first that is true, or -1."""
    # nonzero is slow, and takes memory per thread
    return int(flags.flatten().nonzero()[0]) if flags.any() else -1


def overwrite(target: Tensor, source: int | bool | Tensor) -> None:
    """Write to a tensor of a state that may have been begun in inference mode, which alone may write to it then."""
    if target.is_inference() and not torch.is_inference_mode_enabled():
        with torch.inference_mode():
            return overwrite(target, source)
    if isinstance(source, Tensor):
        target.copy_(source)
    else:
        target.fill_(source)


def bad_logits(row: int, num_positions: int) -> ValueError:
    """Return the error for logits from which nothing can be drawn."""
    return ValueError(
        f"logits: {_where(row, num_positions)} holds NaN or +inf, or forbids every token; "
        "expected finite values or -inf, and at least one finite value"
    )


def bad_token(tokens: Tensor, row: int, num_tokens: int) -> ValueError:
    """Return the error for a known token that has no logit."""
    return ValueError(
        f"tokens: {_where(row, tokens.shape[1])} is {int(tokens.flatten()[row])}; "
        f"expected an id within [0, {num_tokens}), whose log-probability is asked for"
    )


def mask_by_confidence(
    token_ids: Tensor,
    logprob: Tensor,
    mask_len: int | Tensor,
    seed: int | Tensor,
    step: int,
    mask_token_id: int,
    temperature: float,
    isa: str,
) -> Tensor:
    """Run the C kernel on checked arguments."""
    token_ids, logprob = token_ids.contiguous(), logprob.contiguous()
    num_samples, num_positions = token_ids.shape
    counts, seeds = _per_sample(mask_len, num_samples), _per_sample(seed, num_samples)
    tokens = _empty_like(token_ids, torch.int64)
    status, index = _C.mask_by_confidence(
        ISAS.index(isa), *_threads(),
        _MASK_BY_CONFIDENCE_ARGS.pack(
            _MASK_BY_CONFIDENCE_ARGS.size, temperature, num_samples, num_positions, token_ids.data_ptr(),
            logprob.data_ptr(), _address(counts), _address(seeds), mask_token_id, step,
        ),
        tokens.data_ptr(),
    )  # fmt: skip
    if status == 2:
        _raise_unavailable(isa)
    if status == 5:
        raise bad_mask_len(mask_len, logprob, index)
    if status == 6:
        raise bad_logprob(index, logprob.shape[1])
    if status:
        raise RuntimeError(f"mgt_mask_by_confidence refused its arguments (status {status})")
    return tokens


def bad_mask_len(mask_len: int | Tensor, logprob: Tensor, sample: int) -> ValueError:
    """Return the error for a sample that is asked to mask more positions than it has."""
    num_masked = int((logprob[sample] != torch.inf).sum())
    return ValueError(
        f"mask_len: sample {sample} is {mask_len if isinstance(mask_len, int) else int(mask_len[sample])}; "
        f"expected a value within [0, {num_masked}], the positions whose logprob is not +inf"
    )


def bad_logprob(row: int, num_positions: int) -> ValueError:
    """Return the error for a confidence that cannot be ranked."""
    return ValueError(f"logprob: {_where(row, num_positions)} is NaN; expected nats or +inf for a known position")


# mgt_commit_tokens_args and mgt_commit_tokens_outputs of mgt_kernels.h, laid out as C does
_COMMIT_TOKENS_ARGS = struct.Struct(
    "@I"  # struct_size
    "i"  # rule
    "2q"  # num_samples, num_positions
    "3P"  # token_ids, score, tokens
    "4P"  # counts, starts, ends, seeds
    "2q"  # mask_token_id, step
    "2f"  # value, temperature
    "3P"  # argmax, max_logprob, known_logprob
    "2f"  # replace_above, mask_below
)
_COMMIT_TOKENS_OUTPUTS = struct.Struct(
    "@I"  # struct_size
    "2P"  # tokens, done
)


def commit_tokens(
    token_ids: Tensor,
    score: Tensor,
    tokens: Tensor,
    count: int | Tensor,
    seed: int | Tensor,
    step: int,
    mask_token_id: int,
    rule: str,
    value: float,
    temperature: float,
    start: int | Tensor | None,
    end: int | Tensor | None,
    argmax: Tensor | None,
    max_logprob: Tensor | None,
    replace_above: float,
    known_logprob: Tensor | None,
    mask_below: float,
    isa: str,
) -> tuple[Tensor, Tensor]:
    """Run the C kernel on checked arguments."""
    num_samples, num_positions = tokens.shape
    rows = [
        None if x is None else x.contiguous() for x in (token_ids, score, tokens, argmax, max_logprob, known_logprob)
    ]
    samples = [None if x is None else _per_sample(x, num_samples) for x in (count, start, end, seed)]
    after, done = _empty_like(tokens, torch.int64), _empty((num_samples,), torch.bool)
    status, index = _C.commit_tokens(
        ISAS.index(isa), *_threads(),
        _COMMIT_TOKENS_ARGS.pack(
            _COMMIT_TOKENS_ARGS.size, COMMIT_RULES.index(rule), num_samples, num_positions,
            *map(_address_or_null, rows[:3]), *map(_address_or_null, samples), mask_token_id, step, value, temperature,
            *map(_address_or_null, rows[3:]), replace_above, mask_below,
        ),
        _COMMIT_TOKENS_OUTPUTS.pack(_COMMIT_TOKENS_OUTPUTS.size, after.data_ptr(), done.data_ptr()),
    )  # fmt: skip
    if status == 2:
        _raise_unavailable(isa)
    if status == 8:
        raise bad_count(count, tokens, mask_token_id, rule, start, end, index)
    if status == 9:
        raise bad_score(index, num_positions)
    if status == 10:
        raise bad_window(start, end, num_positions, index)
    if status:
        raise RuntimeError(f"mgt_commit_tokens refused its arguments (status {status})")
    return after, done


def _address_or_null(values: Tensor | array[int] | None) -> int:
    return 0 if values is None else _address(values)


def _of_sample(values: int | Tensor, sample: int) -> int:
    return values if isinstance(values, int) else int(values[sample])


def bad_count(
    count: int | Tensor, tokens: Tensor, mask_token_id: int, rule: str, start: int | Tensor | None,
    end: int | Tensor | None, sample: int,
) -> ValueError:  # fmt: skip
    """Return the error for a sample that is asked to commit more positions than compete, or less than none."""
    window = slice(0 if start is None else _of_sample(start, sample), None if end is None else _of_sample(end, sample))
    num_competing = int((tokens[sample, window] == mask_token_id).sum())
    wanted = f"a value within [0, {num_competing}], the positions that compete" if rule == "count" else "at least 0"
    return ValueError(f"count: sample {sample} is {_of_sample(count, sample)}; expected {wanted}")


def bad_score(row: int, num_positions: int) -> ValueError:
    """Return the error for a score that cannot be ranked."""
    return ValueError(f"score: {_where(row, num_positions)} is NaN; expected a number where a masked position competes")


def bad_window(start: int | Tensor | None, end: int | Tensor | None, num_positions: int, sample: int) -> ValueError:
    """Return the error for a window that lies outside the row or ends before it starts."""
    first = 0 if start is None else _of_sample(start, sample)
    last = num_positions if end is None else _of_sample(end, sample)
    return ValueError(
        f"within: sample {sample} is ({first}, {last}); expected 0 <= start <= end <= {num_positions}, the positions"
    )


def kernel_isa(op: str, isa: str = "auto") -> str:
    """Return the kernel that an op ("w4a8_linear", "sample_tokens", ...) runs where `isa` may be used.

    Raises:
        ValueError: if there is no such op.
        RuntimeError: if the instruction set is unknown or missing on this processor.
    """
    status, kernel = _C.kernel_isa(op, ISAS.index(resolve_isa(isa)))
    if status:
        raise ValueError(f"op: {op!r} has no CPU kernels")
    return ISAS[kernel]


def rows_apart(x: Tensor) -> Tensor:
    """Return x, or a copy if the inputs of its rows (M, K) are not side by side or its rows overlap."""
    num_rows, num_inputs = x.shape
    if (x.stride(1) != 1 and num_inputs > 1) or (x.stride(0) < num_inputs and num_rows > 1):
        return x.contiguous()
    return x


def int4_linear(
    a8: bool,
    x: Tensor,
    w_q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    x_scale: Tensor | None,
    bias: Tensor | None,
    isa: str,
) -> Tensor:
    """Run the C kernel of w4a8_linear, or of w4a16_linear, on checked arguments."""
    (num_rows, num_inputs), num_outputs = x.shape, w_q.shape[0]
    y = _empty((num_rows, num_outputs), x.dtype)
    if num_rows == 0:
        return y
    x = rows_apart(x)
    stride = num_inputs if num_rows == 1 else x.stride(0)
    if x_scale is not None:
        x_scale = x_scale.contiguous()
    if bias is not None:
        bias = bias.float()
    status, row = _C.int4_linear(
        a8, ISAS.index(isa), *_threads(),
        _INT4_LINEAR_ARGS.pack(
            _INT4_LINEAR_ARGS.size, _DTYPES[x.dtype], num_rows, num_inputs, num_outputs, x.data_ptr(), stride,
            w_q.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), 0 if bias is None else bias.data_ptr(),
            group_size, _DTYPES[scale.dtype],
        ),
        *((0, 0) if x_scale is None else (x_scale.data_ptr(), len(x_scale))), y.data_ptr(),
    )  # fmt: skip
    if status == 2:
        _raise_unavailable(isa)
    if status == 7:
        raise bad_activations(row)
    if status:
        raise RuntimeError(f"the int4 linear layer refused its arguments (status {status})")
    return y


def bad_activations(row: int) -> ValueError:
    """Return the error for a row that cannot be multiplied."""
    return ValueError(
        f"x: row {row} holds NaN, inf or a value that the computing dtype cannot hold; expected finite values"
    )


# mgt_match_tokens_args: struct_size, dtype; num_samples, height, width, num_channels; x; stride_sample, stride_token,
# num_merged; seeds; step; threshold
_MATCH_TOKENS_ARGS = struct.Struct("@Ii 4q P 3q P q f0q")
# mgt_match_tokens_outputs: struct_size; rows, members, starts, num_rows
_MATCH_TOKENS_OUTPUTS = struct.Struct("@I 4P")
# mgt_merge_tokens_args: struct_size, dtype; num_samples, num_tokens, num_rows, num_channels; x; stride_sample,
# stride_token; members, starts
_MERGE_TOKENS_ARGS = struct.Struct("@Ii 4q P 2q 2P")
# mgt_unmerge_tokens_args: the same, but for rows in the place of members and starts
_UNMERGE_TOKENS_ARGS = struct.Struct("@Ii 4q P 2q P")


def match_tokens(
    x: Tensor,
    height: int,
    width: int,
    num_merged: int,
    threshold: float,
    seed: int | Tensor | None,
    step: int,
    isa: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the C kernel on checked arguments."""
    batch, num_tokens, num_channels = x.shape
    rows, members = (_empty((batch, num_tokens), torch.int64) for _ in range(2))
    starts, num_rows = _empty((batch, num_tokens + 1), torch.int64), _empty((batch,), torch.int64)
    seeds = None if seed is None else _per_sample(seed, batch)
    status, index = _C.match_tokens(
        ISAS.index(isa), *_threads(),
        _MATCH_TOKENS_ARGS.pack(
            _MATCH_TOKENS_ARGS.size, _DTYPES[x.dtype], batch, height, width, num_channels, x.data_ptr(),
            *x.stride()[:2], num_merged, _address_or_null(seeds), step, threshold,
        ),
        _MATCH_TOKENS_OUTPUTS.pack(
            _MATCH_TOKENS_OUTPUTS.size, *(tensor.data_ptr() for tensor in (rows, members, starts, num_rows))
        ),
    )  # fmt: skip
    if status == 2:
        _raise_unavailable(isa)
    if status == 7:
        raise bad_token_state(index, num_tokens)
    if status:
        raise RuntimeError(f"mgt_match_tokens refused its arguments (status {status})")
    return rows, members, starts, num_rows


def bad_token_state(token: int, num_tokens: int) -> ValueError:
    """Return the error for a token that has no cosine to others."""
    return ValueError(
        f"x: {_where(token, num_tokens)} holds NaN or inf, or values whose squares float32 cannot sum; expected finite "
        "values"
    )


def merge_tokens(x: Tensor, row: Tensor, members: Tensor, starts: Tensor, num_rows: int, isa: str) -> Tensor:
    """Run the C kernel on checked arguments."""
    batch, num_tokens, num_channels = x.shape
    y = _empty((batch, num_rows, num_channels), x.dtype)
    members, starts = members.contiguous(), starts.contiguous()
    status, sample = _C.merge_tokens(
        ISAS.index(isa), *_threads(),
        _MERGE_TOKENS_ARGS.pack(
            _MERGE_TOKENS_ARGS.size, _DTYPES[x.dtype], batch, num_tokens, num_rows, num_channels, x.data_ptr(),
            *x.stride()[:2], members.data_ptr(), starts.data_ptr(),
        ),
        y.data_ptr(),
    )  # fmt: skip
    _check_match_status("mgt_merge_tokens", status, sample, isa)
    return y


def unmerge_tokens(x: Tensor, row: Tensor, isa: str) -> Tensor:
    """Run the C kernel on checked arguments."""
    (batch, num_rows, num_channels), num_tokens = x.shape, row.shape[1]
    y = _empty((batch, num_tokens, num_channels), x.dtype)
    row = row.contiguous()
    status, sample = _C.unmerge_tokens(
        ISAS.index(isa), *_threads(),
        _UNMERGE_TOKENS_ARGS.pack(
            _UNMERGE_TOKENS_ARGS.size, _DTYPES[x.dtype], batch, num_tokens, num_rows, num_channels, x.data_ptr(),
            *x.stride()[:2], row.data_ptr(),
        ),
        y.data_ptr(),
    )  # fmt: skip
    _check_match_status("mgt_unmerge_tokens", status, sample, isa)
    return y


def _check_match_status(name: str, status: int, sample: int, isa: str) -> None:
    if status == 2:
        _raise_unavailable(isa)
    if status == 11:
        raise bad_match(sample)
    if status:
        raise RuntimeError(f"{name} refused its arguments (status {status})")


def bad_match(sample: int) -> ValueError:
    """Return the error for a match that was not made by match_tokens, or was changed since."""
    return ValueError(
        f"match: sample {sample} has rows or members out of range; expected one that match_tokens returned"
    )


def philox(
    seed: int, position: int, step: int, stream: int, first_block: int, num_blocks: int, isa: str = "auto"
) -> Tensor:
    """Return the Philox4x32-7 words (4, num_blocks) of the counters (first_block + i, position, step, stream)."""
    words = _empty((4, num_blocks), torch.uint32)
    status = _C.philox(
        ISAS.index(isa),
        seed,
        position,
        step,
        stream,
        first_block,
        num_blocks,
        words.data_ptr(),
        words.numel(),
    )
    if status:
        raise RuntimeError(f"mgt_philox refused its arguments (status {status})")
    return words


def gaussian(seed: int, position: int, step: int, num_tokens: int, isa: str = "auto") -> Tensor:
    """Return the N(0, 1) noise (num_tokens,) that sample_tokens adds at one position."""
    noise = _empty((num_tokens,), torch.float32)
    status = _C.gaussian(ISAS.index(isa), seed, position, step, noise.data_ptr(), noise.numel())
    if status:
        raise RuntimeError(f"mgt_gaussian refused its arguments (status {status})")
    return noise
