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


def onnxruntime(x: np.ndarray, weight: np.ndarray, group_size: int, threads: int) -> Run:
    """W4A8 of ONNX Runtime: float32 in and out, activations quantized in groups as long as the weights'."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    values, scale = symmetric_int4(weight, group_size)
    # a zero point that is not given is 8
    nibbles = (values + 8).astype(np.uint8)
    tensors = {"w_q": nibbles[..., ::2] | nibbles[..., 1::2] << 4, "scale": scale[..., 0]}
    y = np.empty((len(x), len(weight)), dtype=np.float32)
    # accuracy level 4: int8 activations
    node = helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft",
        K=x.shape[1], N=len(weight), bits=4, block_size=group_size, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y.shape)],
        [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    # in place: neither x nor y is copied
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, x.shape, x.ctypes.data)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)

    def run() -> np.ndarray:
        session.run_with_iobinding(binding)
        return y

    return run


def ggml(x: np.ndarray, weight: np.ndarray, group_size: int, threads: int) -> Run:
    """W4A8 of llama.cpp's ggml, Q4_0: float32 in and out, activations quantized in groups of 32 too."""
    import ctypes
    from importlib.util import find_spec
    from itertools import takewhile
    from pathlib import Path

    class InitParams(ctypes.Structure):
        _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))

    spec = find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None
    library = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libggml-cpu.so"))

    # integers and addresses alike: both are passed in 64 bits
    def call(function: str, *arguments: Any) -> Any:
        called = library[function]
        called.restype = ctypes.c_void_p
        return called(*(ctypes.c_int64(a) if isinstance(a, int) else a for a in arguments))

    f32, q4_0 = 0, 2
    (num_rows, num_inputs), num_outputs = x.shape, len(weight)
    w_q = np.empty(num_outputs * call("ggml_row_size", q4_0, num_inputs), dtype=np.uint8)
    call("ggml_quantize_chunk", q4_0, weight.ctypes.data, w_q.ctypes.data, 0, num_outputs, num_inputs, None)
    backend = call("ggml_backend_cpu_init")
    call("ggml_backend_cpu_set_n_threads", backend, threads)

    # as llama.cpp does, in the first of this processor's layouts of weights that there is a product for
    device = call("ggml_backend_get_device", backend)
    registry = call("ggml_backend_dev_backend_reg", device)
    address = call("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
    list_layouts = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
    for layout in (*takewhile(bool, list_layouts(device)), call("ggml_backend_cpu_buffer_type")):
        weights, others = (call("ggml_init", InitParams(2**20, None, True)) for _ in range(2))
        matrix = call("ggml_new_tensor_2d", weights, q4_0, num_inputs, num_outputs)
        call("ggml_backend_alloc_ctx_tensors_from_buft", weights, layout)
        rows = call("ggml_new_tensor_2d", others, f32, num_inputs, num_rows)
        product = call("ggml_mul_mat", others, matrix, rows)
        # only the lowest byte of a returned bool is set
        if call("ggml_backend_supports_op", backend, product) & 255:
            break
    graph = call("ggml_new_graph", others)
    call("ggml_build_forward_expand", graph, product)
    call("ggml_backend_alloc_ctx_tensors", others, backend)
    call("ggml_backend_tensor_set", matrix, w_q.ctypes.data, 0, w_q.nbytes)
    call("ggml_backend_tensor_set", rows, x.ctypes.data, 0, x.nbytes)
    values = (ctypes.c_float * (num_rows * num_outputs)).from_address(call("ggml_get_data", product))
    y = np.frombuffer(values, dtype=np.float32).reshape(num_rows, num_outputs)

    def run() -> np.ndarray:
        call("ggml_backend_graph_compute", backend, graph)
        return y

    return run


LAYERS: dict[str, Callable[[np.ndarray, np.ndarray, int, int], Run]] = {
    "float32": float32,
    "bfloat16": bfloat16,
    "mgt-kernels": partial(ours, False),
    "mgt-kernels bfloat16": partial(ours, True),
    "zentorch": zentorch,
    "openvino": openvino,
    "onnxruntime": onnxruntime,
    "ggml": ggml,
}
# group sizes of a library whose format has no others
GROUP_SIZES = {"ggml": (32,)}


def has_group_size(name: str, group_size: int) -> bool:
    """Return whether the library has weights in groups of this size."""
    return group_size in GROUP_SIZES.get(name, (group_size,))


def main(name: str, layer: tuple[int, int, int, int], threads: int) -> None:
    """Answer "seconds" with those of the second of two calls, and "error" with that of the results.

    The error is relative to the float64 product, of the Frobenius norms.
    """
    num_rows, num_inputs, num_outputs, group_size = layer
    if not has_group_size(name, group_size):
        raise ValueError(f"group size: expected one of {GROUP_SIZES[name]} for {name}, got {group_size}")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_rows, num_inputs), dtype=np.float32)
    weight = rng.standard_normal((num_outputs, num_inputs), dtype=np.float32)
    run = LAYERS[name](x, weight, group_size, threads)
    for line in sys.stdin:
        if line.strip() == "seconds":
            # awake, and its caches its own again
            run()
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
