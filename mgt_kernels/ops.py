"""The public ops: arguments are checked here, once, and handed to the backend asked for."""

import math

import torch
from torch import Tensor

from mgt_kernels import cpu, reference

BACKENDS = ("auto", "reference", "scalar", "avx2", "avx512", "triton")

_LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT32_MAX = torch.finfo(torch.float32).max
# its inverse is still far from the largest float32
_SMALLEST_TEMPERATURE = 1e-30


def sample_tokens(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask_token_id: int,
    seed: int | Tensor,
    step: int | Tensor,
    uncond_logits: Tensor | None = None,
    guidance_scale: float = 1.0,
    noise_scale: float = 0.0,
    temperature: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Draw a token for every masked position from guided, noisy logits, with its log-probability, in one read.

    With c = logits, u = uncond_logits, eps ~ N(0, 1) and g ~ Gumbel(0, 1), for each masked position and token j::

        guided_j = u_j + guidance_scale (c_j - u_j)        (c_j where uncond_logits is None)
        l_j      = (guided_j + noise_scale eps_j) / temperature
        token    = argmax_j (l_j + g_j)                    ties: the lowest id
        logprob  = l_token - logsumexp(l)                  nats

    eps and g are functions of (seed, step, position, token id) alone: a sample's result does not depend on the batch it
    is in, on threads, instruction set or backend. Temperature 0 takes the argmax without g, and logprob is that of
    temperature 1. A logit of -inf (in either half) forbids its token; mask_token_id is never drawn. On CUDA, where
    raising would wait for the device, a bad row gives mask_token_id and logprob NaN, and known tokens go unchecked.

    Args:
        logits: (B, N, V) float32, bfloat16 or float16, with unit stride over V or over N (then read without a copy).
        tokens: (B, N) int64; positions that hold mask_token_id are drawn, the others are known and cost nothing.
        mask_token_id: marks masked positions; may lie outside [0, V).
        seed: one seed for the whole batch, or (B,) int64, a seed per sample.
        step: index of the decoding step, within [0, 2^32); an int, or a 0-dimensional int64 tensor on the device of
            logits, which a CUDA graph reads anew at each replay.
        uncond_logits: (B, N, V) of the same dtype and device, or None for no guidance.
        guidance_scale: finite.
        noise_scale: standard deviation of the Gaussian logit noise, >= 0 (arXiv 2411.10781, noise regularization).
        temperature: 0, or at least 1e-30.
        backend: "auto" (CPU: the best instruction set, or MGT_ISA; CUDA: Triton), or one of "reference", "scalar",
            "avx2", "avx512", "triton".

    Returns:
        token_ids (B, N) int64, and logprob (B, N) float32; known positions keep their token and get logprob +inf.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape, stride, device or range is wrong, a known token is outside [0, V), or the logits of a
            masked position hold NaN or +inf or forbid every token (the message names sample and position).
        RuntimeError: if the backend asked for is not available.
    """
    _check_tensor("logits", logits, 3, _LOGITS_DTYPES)
    _check_tensor("tokens", tokens, 2, (torch.int64,), logits.device)
    batch, num_positions, num_tokens = logits.shape
    _check_shape("tokens", tokens, (batch, num_positions))
    if num_tokens < 1:
        raise ValueError(f"logits: expected at least one token in the last dimension, got shape {tuple(logits.shape)}")
    if uncond_logits is not None:
        _check_tensor("uncond_logits", uncond_logits, 3, (logits.dtype,), logits.device)
        _check_shape("uncond_logits", uncond_logits, tuple(logits.shape))
    _check_strides(logits, uncond_logits)
    _check_range("guidance_scale", guidance_scale, -math.inf)
    _check_range("noise_scale", noise_scale, 0)
    _check_temperature(temperature)
    seed = _check_seed(seed, batch, logits.device)
    step = _check_step(step, logits.device)
    return torch.ops.mgt_kernels.sample_tokens(
        logits, tokens, seed, step, mask_token_id, uncond_logits, guidance_scale, noise_scale, temperature,
        _check_backend(backend, logits.device),
    )  # fmt: skip


def mask_by_confidence(
    token_ids: Tensor,
    logprob: Tensor,
    mask_len: int | Tensor,
    *,
    mask_token_id: int,
    temperature: float,
    seed: int | Tensor,
    step: int | Tensor,
    backend: str = "auto",
) -> Tensor:
    r"""Mask again the mask_len least confident of the positions that were drawn in this step.

    With g ~ Gumbel(0, 1), a function of (seed, step, position) alone::

        confidence_i = logprob_i + temperature g_i          known positions: +inf, never masked

    and the mask_len lowest become mask_token_id; among ties lower positions are masked first. Exactly mask_len, always.

    Args:
        token_ids: (B, N) int64, as `sample_tokens` returns them.
        logprob: (B, N) float32 in nats, +inf at known positions.
        mask_len: how many positions stay masked, within [0, positions whose logprob is not +inf]; an int for all
            samples or (B,) int64. (On CUDA, where checking would wait for the device, a larger value masks every such
            position and NaN ranks lowest.)
        mask_token_id: what masked positions hold.
        temperature: of the confidence noise, >= 0.
        seed: one seed for the whole batch, or (B,) int64.
        step: index of the decoding step, within [0, 2^32); an int or a 0-dimensional int64 tensor.
        backend: as for `sample_tokens`.

    Returns:
        tokens (B, N) int64.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape, device or range is wrong, mask_len is out of range, or logprob holds NaN.
        RuntimeError: if the backend asked for is not available.

    Source: the re-masking of MaskGIT (arXiv 2202.04200, section 3.2) with the annealed Gumbel noise of its code.
    """
    _check_tensor("token_ids", token_ids, 2, (torch.int64,))
    _check_tensor("logprob", logprob, 2, (torch.float32,), token_ids.device)
    _check_shape("logprob", logprob, tuple(token_ids.shape))
    batch = token_ids.shape[0]
    _check_range("temperature", temperature, 0)
    mask_len = _per_sample("mask_len", mask_len, batch, token_ids.device)
    seed = _check_seed(seed, batch, token_ids.device)
    step = _check_step(step, token_ids.device)
    return torch.ops.mgt_kernels.mask_by_confidence(
        token_ids,
        logprob,
        mask_len,
        seed,
        step,
        mask_token_id,
        temperature,
        _check_backend(backend, token_ids.device),
    )


def _check_tensor(
    name: str, value: Tensor, ndim: int, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {value.dtype}")
    if value.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device} like the first argument, got {value.device}")


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")


def _check_strides(logits: Tensor, uncond_logits: Tensor | None) -> None:
    halves = [logits] if uncond_logits is None else [logits, uncond_logits]
    # a dimension of size 1 is never stepped along, so any stride of it will do
    by_token = all(half.shape[2] == 1 or half.stride(2) == 1 for half in halves)
    by_position = all(half.shape[1] == 1 or half.stride(1) == 1 for half in halves)
    if not (by_token or by_position or logits.numel() == 0):
        strides = " and ".join(str(tuple(half.stride())) for half in halves)
        raise ValueError(
            "logits and uncond_logits: expected unit stride over tokens (last dimension) or over positions (middle "
            f"dimension), the same for both, got strides {strides}"
        )


def _check_range(name: str, value: float, low: float) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    # the kernels compute in float32; comparisons, unlike math.isfinite, are traced by torch.compile
    if not (low <= value <= _FLOAT32_MAX and value >= -_FLOAT32_MAX):
        wanted = "a finite number" if low == -math.inf else f"a finite number >= {low:g}"
        raise ValueError(f"{name}: expected {wanted}, got {value}")


def _check_temperature(temperature: float) -> None:
    _check_range("temperature", temperature, 0)
    if 0 < temperature < _SMALLEST_TEMPERATURE:
        raise ValueError(f"temperature: expected 0 or at least {_SMALLEST_TEMPERATURE}, got {temperature}")


def _per_sample(name: str, value: int | Tensor, batch: int, device: torch.device) -> Tensor:
    if isinstance(value, int):
        return torch.full((batch,), value, dtype=torch.int64, device=device)
    _check_tensor(name, value, 1, (torch.int64,), device)
    _check_shape(name, value, (batch,))
    return value


def _check_seed(seed: int | Tensor, batch: int, device: torch.device) -> Tensor:
    if isinstance(seed, int) and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected a 64-bit signed integer, got {seed}")
    return _per_sample("seed", seed, batch, device)


def _check_step(step: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(step, Tensor):
        _check_tensor("step", step, 0, (torch.int64,), device)
        # to look at its value here would wait for the device
        return step
    if not isinstance(step, int):
        raise TypeError(f"step: expected an int or a tensor, got {type(step).__name__}")
    _check_step_range(step)
    return torch.full((), step, dtype=torch.int64, device=device)


def _check_step_range(step: int) -> None:
    if not 0 <= step < 2**32:
        raise ValueError(f"step: expected a value within [0, 2^32), got {step}")


def _step_value(step: Tensor) -> int:
    value = int(step)
    _check_step_range(value)
    return value


def _check_backend(backend: str, device: torch.device) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "auto" and device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"backend: no kernels for device {device}; use backend='reference'")
    if backend in cpu.ISAS[1:] and device.type not in ("cpu", "meta"):
        raise RuntimeError(f"backend: {backend!r} runs on CPU tensors, got tensors on {device}")
    if backend == "triton" and device.type not in ("cuda", "meta"):
        raise RuntimeError(f"backend: 'triton' runs on CUDA tensors, got tensors on {device}")
    return backend


def _reference_sample_tokens(
    logits: Tensor,
    tokens: Tensor,
    seed: Tensor,
    step: Tensor,
    mask_token_id: int,
    uncond_logits: Tensor | None,
    guidance_scale: float,
    noise_scale: float,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    token_ids, logprob, bad_row = reference.sample_tokens(
        logits, tokens, mask_token_id=mask_token_id, seed=seed, step=_step_value(step), uncond_logits=uncond_logits,
        guidance_scale=guidance_scale, noise_scale=noise_scale, temperature=temperature,
    )  # fmt: skip
    known = tokens != mask_token_id
    outside = (known & ((tokens < 0) | (tokens >= logits.shape[-1]))).flatten().nonzero()
    if len(outside):
        raise cpu.bad_token(tokens, int(outside[0]), logits.shape[-1], mask_token_id)
    if bad_row >= 0:
        raise cpu.bad_logits(bad_row, tokens.shape[1])
    return token_ids.contiguous(), logprob.float().contiguous()


def _reference_mask_by_confidence(
    token_ids: Tensor,
    logprob: Tensor,
    mask_len: Tensor,
    seed: Tensor,
    step: Tensor,
    mask_token_id: int,
    temperature: float,
    backend: str,
) -> Tensor:
    outside = (mask_len < 0) | (mask_len > (logprob != torch.inf).sum(-1))
    if outside.any():
        raise cpu.bad_mask_len(mask_len, logprob, int(outside.nonzero()[0]))
    if logprob.isnan().any():
        raise cpu.bad_logprob(int(logprob.flatten().isnan().nonzero()[0]), logprob.shape[1])
    return reference.mask_by_confidence(
        token_ids, logprob, mask_len, mask_token_id=mask_token_id, temperature=temperature, seed=seed,
        step=_step_value(step),
    )  # fmt: skip


# any device runs the reference; what is registered below are the kernels of a device
_sample_tokens = torch.library.custom_op("mgt_kernels::sample_tokens", _reference_sample_tokens, mutates_args=())
_mask_by_confidence = torch.library.custom_op(
    "mgt_kernels::mask_by_confidence", _reference_mask_by_confidence, mutates_args=()
)


@_sample_tokens.register_fake
def _(logits, tokens, *_):  # type: ignore[no-untyped-def]
    return tokens.new_empty(tokens.shape), tokens.new_empty(tokens.shape, dtype=torch.float32)


@_sample_tokens.register_kernel("cpu")
def _(logits, tokens, seed, step, *options):  # type: ignore[no-untyped-def]
    if options[-1] == "reference":
        return _reference_sample_tokens(logits, tokens, seed, step, *options)
    return cpu.sample_tokens(logits, tokens, seed, _step_value(step), *options)


@_sample_tokens.register_kernel("cuda")
def _(*arguments):  # type: ignore[no-untyped-def]
    if arguments[-1] == "reference":
        return _reference_sample_tokens(*arguments)
    from mgt_kernels import triton

    return triton.sample_tokens(*arguments[:-1])


@_mask_by_confidence.register_fake
def _(token_ids, *_):  # type: ignore[no-untyped-def]
    return token_ids.new_empty(token_ids.shape)


@_mask_by_confidence.register_kernel("cpu")
def _(token_ids, logprob, mask_len, seed, step, *options):  # type: ignore[no-untyped-def]
    if options[-1] == "reference":
        return _reference_mask_by_confidence(token_ids, logprob, mask_len, seed, step, *options)
    return cpu.mask_by_confidence(token_ids, logprob, mask_len, seed, _step_value(step), *options)


@_mask_by_confidence.register_kernel("cuda")
def _(*arguments):  # type: ignore[no-untyped-def]
    if arguments[-1] == "reference":
        return _reference_mask_by_confidence(*arguments)
    from mgt_kernels import triton

    return triton.mask_by_confidence(*arguments[:-1])
