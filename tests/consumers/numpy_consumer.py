"""NumPy on the C library, without torch: `python numpy_consumer.py LIBRARY` draws tokens and prints them."""

import ctypes
import sys

import numpy as np


class Context(ctypes.Structure):
    """mgt_context."""

    _fields_ = (("isa", ctypes.c_int), ("num_threads", ctypes.c_int32), ("parallel", ctypes.c_void_p))


class Logits(ctypes.Structure):
    """mgt_logits."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((f"stride_{name}", ctypes.c_int64) for name in ("sample", "position", "token")),
    )


class SampleTokensArgs(ctypes.Structure):
    """mgt_sample_tokens_args."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("num_samples", "num_positions", "num_tokens")),
        ("logits", Logits),
        ("uncond_logits", Logits),
        ("second_uncond_logits", Logits),
        *((name, ctypes.c_void_p) for name in ("tokens", "seeds", "first_positions", "guidance_scales")),
        *((name, ctypes.c_void_p) for name in ("second_guidance_scales", "token_bias")),
        ("mask_token_id", ctypes.c_int64),
        ("step", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("guidance_scale", "noise_scale", "temperature")),
        ("rows", ctypes.c_int),
        ("second_guidance_scale", ctypes.c_float),
        ("guidance", ctypes.c_int),
        ("softcap", ctypes.c_float),
        ("logprob_of", ctypes.c_int),
        ("top_k", ctypes.c_int64),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
    )


class SampleTokensOutputs(ctypes.Structure):
    """mgt_sample_tokens_outputs."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        *((name, ctypes.c_void_p) for name in ("token_ids", "logprob", "argmax", "max_logprob", "margin", "entropy")),
        *((name, ctypes.c_void_p) for name in ("logsumexp", "known_logprob", "logit")),
    )


def sample_tokens(
    library: ctypes.CDLL, logits: np.ndarray, tokens: np.ndarray, seeds: np.ndarray, mask_token_id: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw token_ids (B, N) int64 and logprob (B, N) from logits (B, N, V) float32, without a copy.

    Positions or tokens lie side by side in memory; any strides will do for the other dimensions.
    """
    view = Logits(logits.ctypes.data, *(stride // logits.itemsize for stride in logits.strides))
    arguments = SampleTokensArgs(
        ctypes.sizeof(SampleTokensArgs), 0, *logits.shape, view, tokens=tokens.ctypes.data, seeds=seeds.ctypes.data,
        mask_token_id=mask_token_id, step=step, temperature=1.0,
    )  # fmt: skip
    token_ids, logprob = np.empty(tokens.shape, np.int64), np.empty(tokens.shape, np.float32)
    # the others are not asked for
    outputs = SampleTokensOutputs(ctypes.sizeof(SampleTokensOutputs), token_ids.ctypes.data, logprob.ctypes.data)
    context, bad_row = Context(0, 2, None), ctypes.c_int64(-1)
    library.mgt_sample_tokens_workspace.restype = ctypes.c_int64
    num_bytes = library.mgt_sample_tokens_workspace(ctypes.byref(context), ctypes.byref(arguments))
    if num_bytes < 0:
        raise ValueError("logits: expected positions or tokens side by side, and sizes and scalars within their ranges")
    workspace = np.empty(num_bytes, np.uint8)
    status = library.mgt_sample_tokens(
        ctypes.byref(context), ctypes.byref(arguments), ctypes.byref(outputs),
        workspace.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(num_bytes), ctypes.byref(bad_row),
    )  # fmt: skip
    if status:
        raise RuntimeError(f"mgt_sample_tokens: status {status}, row {bad_row.value}")
    return token_ids, logprob


if __name__ == "__main__":
    values = (np.arange(5 * 40, dtype=np.float32) % 7 * 0.5).reshape(1, 5, 40)
    ids, _ = sample_tokens(
        ctypes.CDLL(sys.argv[1]), values, np.full((1, 5), 40), np.array([7]), mask_token_id=40, step=0
    )
    print(*ids[0])
    if "torch" in sys.modules:
        raise AssertionError("torch was imported")
