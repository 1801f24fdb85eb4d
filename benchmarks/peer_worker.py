"""One int4 linear layer of one library, timed in that library's own environment; benchmarks/peers.py runs this file.

Needs numpy and the library alone, so it imports nothing of ours unless ours is what is timed.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

Run = Callable[[], Any]


def symmetric_int4(weight: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return w_q (N, groups, group_size) in -8..7 and scale (N, groups, 1), the largest magnitude of a group over 8."""
    groups = weight.reshape(len(weight), -1, group_size)
    scale = np.abs(groups).max(-1, keepdims=True) / 8
    return np.clip(np.rint(groups / scale), -8, 7).astype(np.int8), scale.astype(np.float32)


def float32(x: np.ndarray, weight: np.ndarray, group_size: int, threads: int) -> Run:
    """PyTorch in float32: what all are compared with."""
    import torch

    torch.set_num_threads(threads)
    x_t, w_t = torch.from_numpy(x), torch.from_numpy(weight)
    return lambda: torch.nn.functional.linear(x_t, w_t)


def bfloat16(x: np.ndarray, weight: np.ndarray, group_size: int, threads: int) -> Run:
    """PyTorch in bfloat16."""
    import torch

    torch.set_num_threads(threads)
    x_t, w_t = torch.from_numpy(x).bfloat16(), torch.from_numpy(weight).bfloat16()
    return lambda: torch.nn.functional.linear(x_t, w_t)


def ours(bf16: bool, x: np.ndarray, weight: np.ndarray, group_size: int, threads: int) -> Run:
    """w4a8_linear with dynamic scales."""
    import torch

    import mgt_kernels

    torch.set_num_threads(threads)
    w_q = mgt_kernels.quantize_int4(torch.from_numpy(weight), group_size)
    x_t = torch.from_numpy(x).to(torch.bfloat16 if bf16 else torch.float32)
    return lambda: mgt_kernels.w4a8_linear(x_t, w_q)


def zentorch(x: np.ndarray, weight: np.ndarray, group_size: int, threads: int) -> Run:
    """W4A8 of AMD's zentorch: bfloat16 in and out, no zero points."""
    import torch
    import zentorch  # noqa: F401

    torch.set_num_threads(threads)
    values, scale = symmetric_int4(weight, group_size)
    w_q = torch.from_numpy(values.reshape(weight.shape))
    packed = torch.ops.zentorch.zentorch_woq_repack_weight(w_q).view(torch.int8)
    scales = torch.from_numpy(scale[..., 0].T.copy())
    x_t = torch.from_numpy(x).bfloat16()
    return lambda: torch.ops.zentorch.zentorch_dynamic_qlinear(x_t, packed, scales, None)


def openvino(x: np.ndarray, weight: np.ndarray, group_size: int, threads: int) -> Run:
    """W4A8 of Intel's OpenVINO: float32 in and out, activations quantized in groups as long as the weights'."""
    import openvino as ov
    from openvino import opset13 as op

    values, scale = symmetric_int4(weight, group_size)
    nibbles = (values.reshape(-1, 2) & 15).astype(np.uint8)
    packed = nibbles[:, 0] | nibbles[:, 1] << 4
    w_q = op.constant(ov.Tensor(packed, ov.Shape(values.shape), ov.Type.i4))
    dequantized = op.multiply(op.convert(w_q, np.float16), op.constant(scale.astype(np.float16)))
    matrix = op.convert(op.reshape(dequantized, np.array(weight.shape), False), np.float32)
    rows = op.parameter(x.shape, np.float32)
    model = ov.Model([op.matmul(rows, matrix, False, True)], [rows])
    options = {
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group_size,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
    request.set_input_tensor(ov.Tensor(x, shared_memory=True))

    def run() -> np.ndarray:
        request.infer()
        return request.get_output_tensor().data

    return run


LAYERS: dict[str, Callable[[np.ndarray, np.ndarray, int, int], Run]] = {
    "float32": float32,
    "bfloat16": bfloat16,
    "mgt-kernels": partial(ours, False),
    "mgt-kernels bfloat16": partial(ours, True),
    "zentorch": zentorch,
    "openvino": openvino,
}


def main(name: str, layer: tuple[int, int, int, int], threads: int) -> None:
    """Answer "seconds" with those of a call, and "error" with that of the results, of the Frobenius norms."""
    num_rows, num_inputs, num_outputs, group_size = layer
    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_rows, num_inputs), dtype=np.float32)
    weight = rng.standard_normal((num_outputs, num_inputs), dtype=np.float32)
    run = LAYERS[name](x, weight, group_size, threads)
    for line in sys.stdin:
        if line.strip() == "seconds":
            start = time.perf_counter()
            run()
            answer = time.perf_counter() - start
        else:
            # last: NumPy has threads of its own
            y = run()
            y = np.array(y if isinstance(y, np.ndarray) else y.float().numpy(), dtype=np.float64)
            exact = x[:64].astype(np.float64) @ weight.T.astype(np.float64)
            answer = float(np.linalg.norm(y[:64] - exact) / np.linalg.norm(exact))
        print(f"answer {json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
