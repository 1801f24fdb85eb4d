"""The CPU backend: tensors to addresses for the C ABI, its statuses to exceptions."""

import ctypes
import functools
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from mgt_kernels import _C

ISAS = ("auto", "scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
DIFFERENTIAL_VARIANTS = ("paper", "official")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def torch_thread_pool() -> tuple[int, str]:
    """Find the OpenMP runtime that PyTorch runs on: the address of its GOMP_parallel and its file, or (0, "").

    Lending it to the kernels gives both one thread pool, so neither waits while the other's idle threads spin.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return 0, ""
    runtimes = set(re.findall(r"(/\S*/lib(?:gomp|omp|iomp5)[^/\s]*\.so[^/\s]*)", maps))
    # other packages may bring a runtime of their own: PyTorch's lies beside its libraries, or is the system's
    home = str(Path(torch.__file__).parent)
    for path in sorted(runtimes, key=lambda path: (not path.startswith(home), "site-packages" in path, path)):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value or 0, path
        except (OSError, AttributeError):
            continue
    return 0, ""


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
    return torch.get_num_threads(), torch_thread_pool()[0]


def _half(logits: Tensor | None) -> tuple[int, int, int, int]:
    if logits is None:
        return 0, 0, 0, 0
    stride_sample, stride_position, stride_token = logits.stride()
    return logits.data_ptr(), stride_sample, stride_position, stride_token


def _where(index: int, num_positions: int) -> str:
    return f"sample {index // num_positions}, position {index % num_positions}"


def _check_draw(
    name: str, status: int, index: int, tokens: Tensor, num_tokens: int, mask_token_id: int, isa: str
) -> None:
    if status == 2:
        _raise_unavailable(isa)
    if status == 3:
        raise bad_logits(index, tokens.shape[1])
    if status == 4:
        raise bad_token(tokens, index, num_tokens, mask_token_id)
    if status:
        raise RuntimeError(f"{name} refused its arguments (status {status})")


def sample_tokens(
    logits: Tensor,
    tokens: Tensor,
    seed: Tensor,
    step: int,
    mask_token_id: int,
    uncond_logits: Tensor | None,
    guidance_scale: float,
    noise_scale: float,
    temperature: float,
    isa: str,
) -> tuple[Tensor, Tensor]:
    """Run the C kernel on checked arguments."""
    tokens, seed = tokens.contiguous(), seed.contiguous()
    token_ids = torch.empty_like(tokens)
    logprob = torch.empty(tokens.shape, dtype=torch.float32)
    status, index = _C.sample_tokens(
        ISAS.index(isa), *_threads(), tuple(logits.shape), _DTYPES[logits.dtype], _half(logits), _half(uncond_logits),
        tokens.data_ptr(), seed.data_ptr(), mask_token_id, step, guidance_scale, noise_scale, temperature,
        token_ids.data_ptr(), token_ids.numel(), logprob.data_ptr(), logprob.numel(),
    )  # fmt: skip
    _check_draw("mgt_sample_tokens", status, index, tokens, logits.shape[-1], mask_token_id, isa)
    return token_ids, logprob


def differential_sample(
    logits: Tensor,
    tokens: Tensor,
    history: Tensor,
    written: Tensor,
    has_history: bool,
    seed: Tensor,
    step: int,
    mask_token_id: int,
    uncond_logits: Tensor | None,
    guidance_scale: float,
    noise_scale: float,
    temperature: float,
    share: float,
    variant: str,
    aliased_history: bool,
    isa: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the C kernel on checked arguments; history and written are contiguous and updated in place."""
    tokens, seed = tokens.contiguous(), seed.contiguous()
    token_ids = torch.empty_like(tokens)
    logprob, divergence = (torch.empty(tokens.shape, dtype=torch.float32) for _ in range(2))
    status, index = _C.differential_sample(
        ISAS.index(isa), *_threads(), tuple(logits.shape), _DTYPES[logits.dtype], _half(logits), _half(uncond_logits),
        tokens.data_ptr(), seed.data_ptr(), mask_token_id, step, guidance_scale, noise_scale, temperature,
        DIFFERENTIAL_VARIANTS.index(variant), aliased_history, has_history, share,
        *((t.data_ptr(), t.numel()) for t in (history, written, token_ids, logprob, divergence)),
    )  # fmt: skip
    if status:
        # some rows were overwritten: none may be taken for the previous step's
        written.zero_()
    _check_draw("mgt_differential_sample", status, index, tokens, logits.shape[-1], mask_token_id, isa)
    return token_ids, logprob, divergence


def bad_logits(row: int, num_positions: int) -> ValueError:
    """Return the error for logits from which nothing can be drawn."""
    return ValueError(
        f"logits: {_where(row, num_positions)} holds NaN or +inf, or forbids every token; "
        "expected finite values or -inf, and at least one finite value"
    )


def bad_token(tokens: Tensor, row: int, num_tokens: int, mask_token_id: int) -> ValueError:
    """Return the error for a token id that is neither in the codebook nor the mask."""
    return ValueError(
        f"tokens: {_where(row, tokens.shape[1])} is {int(tokens.flatten()[row])}; "
        f"expected an id within [0, {num_tokens}) or mask_token_id {mask_token_id}"
    )


def mask_by_confidence(
    token_ids: Tensor,
    logprob: Tensor,
    mask_len: Tensor,
    seed: Tensor,
    step: int,
    mask_token_id: int,
    temperature: float,
    isa: str,
) -> Tensor:
    """Run the C kernel on checked arguments."""
    token_ids, logprob = token_ids.contiguous(), logprob.contiguous()
    mask_len, seed = mask_len.contiguous(), seed.contiguous()
    tokens = torch.empty_like(token_ids)
    num_samples, num_positions = token_ids.shape
    status, index = _C.mask_by_confidence(
        ISAS.index(isa), *_threads(), num_samples, num_positions, token_ids.data_ptr(), logprob.data_ptr(),
        mask_len.data_ptr(), seed.data_ptr(), mask_token_id, step, temperature, tokens.data_ptr(), tokens.numel(),
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


def bad_mask_len(mask_len: Tensor, logprob: Tensor, sample: int) -> ValueError:
    """Return the error for a sample that is asked to mask more positions than it has."""
    num_masked = int((logprob[sample] != torch.inf).sum())
    return ValueError(
        f"mask_len: sample {sample} is {int(mask_len[sample])}; "
        f"expected a value within [0, {num_masked}], the positions whose logprob is not +inf"
    )


def bad_logprob(row: int, num_positions: int) -> ValueError:
    """Return the error for a confidence that cannot be ranked."""
    return ValueError(f"logprob: {_where(row, num_positions)} is NaN; expected nats or +inf for a known position")


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
    y = torch.empty(num_rows, num_outputs, dtype=x.dtype)
    if num_rows == 0:
        return y
    shape, dtype, stride = (num_rows, num_inputs, num_outputs), _DTYPES[x.dtype], x.stride(0)
    if x_scale is not None:
        x_scale = x_scale.contiguous()
    weight = w_q.data_ptr(), scale.data_ptr(), _DTYPES[scale.dtype], zero_point.data_ptr(), group_size
    status, row = _C.int4_linear(
        a8, ISAS.index(isa), *_threads(), shape, dtype, x.data_ptr(), stride, weight,
        0 if bias is None else bias.data_ptr(), (0, 0) if x_scale is None else (x_scale.data_ptr(), len(x_scale)),
        (y.data_ptr(), y.numel()),
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


def philox(
    seed: int, position: int, step: int, stream: int, first_block: int, num_blocks: int, isa: str = "auto"
) -> Tensor:
    """Return the Philox4x32-7 words (4, num_blocks) of the counters (first_block + i, position, step, stream)."""
    words = torch.empty(4, num_blocks, dtype=torch.uint32)
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
    noise = torch.empty(num_tokens, dtype=torch.float32)
    status = _C.gaussian(ISAS.index(isa), seed, position, step, noise.data_ptr(), noise.numel())
    if status:
        raise RuntimeError(f"mgt_gaussian refused its arguments (status {status})")
    return noise
