"""How the launchers meet CUDA, as far as a stand-in for the device can tell."""

import re
import sys
from contextlib import contextmanager

import driver
import pytest
import torch
from cases import CASES
from driver import standin_gpu
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime import JITFunction

import mgt_kernels
from mgt_kernels import ops
from mgt_kernels import triton as kernels
from mgt_kernels.triton import differential_sample, mask_by_confidence, sample_tokens, w4a8_linear, w4a16_linear

SPLIT = next(case for case in CASES if case.name == "bf16 split over four programs")
MASK = next(case for case in CASES if case.name == "N=256 temperature=1.3 digits=3")
DIFFERENCE = next(case for case in CASES if case.name == "official, aliased, bf16, noise")
LINEAR = next(case for case in CASES if case.name == "w4a8 bf16, two static scales, a short group")
LINEAR_16 = next(case for case in CASES if case.name == "w4a16 fp32, groups of 32")
ONE_OF_EACH = [SPLIT, MASK, DIFFERENCE, LINEAR, LINEAR_16]


def launches_of(*arguments, op="sample_tokens"):
    with standin_gpu(80, execute=False) as launches:
        getattr(kernels, op)(*arguments)
    return launches


@pytest.mark.parametrize(
    "op", ["sample_tokens", "mask_by_confidence", "differential_sample", "w4a8_linear", "w4a16_linear"]
)
def test_ops_have_a_cuda_kernel(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mgt_kernels::{op}", "CUDA")


def test_public_ops_on_cuda_wait_for_nothing():
    # on fake tensors whatever needs a value from the device raises
    with FakeTensorMode():
        logits = torch.empty(2, 64, 1000, device="cuda")
        tokens = torch.empty(2, 64, dtype=torch.int64, device="cuda")
        step = torch.empty((), dtype=torch.int64, device="cuda")
        options = dict(mask_token_id=1000, seed=1)
        token_ids, logprob = mgt_kernels.sample_tokens(logits, tokens, step=step, **options)
        masked = mgt_kernels.mask_by_confidence(token_ids, logprob, 20, temperature=1.0, step=3, **options)
        assert token_ids.is_cuda and logprob.is_cuda and masked.is_cuda
        state = None
        for _ in range(2):
            _, _, state = mgt_kernels.differential_sample(logits, tokens, state, step=step, **options)
            assert state.divergence.is_cuda and state.step.is_cuda


@pytest.mark.parametrize("variant", ["paper", "official", "random"])
def test_re_masking_waits_for_nothing(variant):
    # it is made of other ops, so what it does itself counts too; a tensor without data has no value to wait for
    logits = torch.empty(2, 64, 1000, device="meta")
    tokens = torch.empty(2, 64, dtype=torch.int64, device="meta")
    step = torch.empty((), dtype=torch.int64, device="meta")
    counts, seed, keep = tokens[:, 0], tokens[:, 1], tokens == 3
    remasked, score = ops._remask_tokens(logits, tokens, counts, seed, step, 1000, variant, logits, 2.0, keep, "auto")
    assert remasked.shape == score.shape == (2, 64) and score.dtype == torch.float32


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_launchers_wait_for_nothing(case, monkeypatch):
    arguments = case.make_arguments()

    def wait(*_):
        raise AssertionError("a launcher reads a value from the device")

    for name in ("item", "tolist", "cpu", "nonzero", "numpy", "__int__", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    assert launches_of(*arguments, op=case.op)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_launches_are_on_the_device_of_the_tensors_and_on_its_stream(case, monkeypatch):
    counts = []
    first, *rest = case.make_arguments()

    @contextmanager
    def guard(index):
        assert index == "the index of the tensors' device"
        counts.append(len(launches))
        yield
        counts.append(len(launches))

    class Indexed(torch.Tensor):
        device = type("Device", (), {"index": "the index of the tensors' device"})

    monkeypatch.setattr(torch.accelerator, "device_index", guard)
    monkeypatch.setattr(driver.StandinDriver, "get_current_stream", lambda self, device: 7)
    monkeypatch.setattr(torch, "empty", lambda *size, device, **options: EMPTY(*size, **options))
    with standin_gpu(80, execute=False) as launches:
        getattr(kernels, case.op)(first.as_subclass(Indexed), *rest)
    # every launch is inside of a guard
    assert counts[0] == 0 and counts[1:-1:2] == counts[2::2] and counts[-1] == len(launches)
    assert {launch.stream for launch in launches} == {7}


EMPTY = torch.empty


def test_a_step_tensor_is_read_by_the_kernel():
    # what a replayed CUDA graph needs: the arguments stay, what they point to changes
    logits, tokens, seed, step, *rest = SPLIT.make_arguments()
    recorded = []
    with standin_gpu(80) as launches:
        for value in (0, 9):
            step.fill_(value)
            outputs = SPLIT.run((logits, tokens, seed, step, *rest))
            assert torch.equal(outputs[0], SPLIT.expected(logits, tokens, seed, step, *rest)[0])
            recorded.append([inputs_of(launch) for launch in launches])
            launches.clear()
    assert recorded[0] == recorded[1]


def inputs_of(launch):
    """Numbers, and addresses of tensors, but for those that a call allocates."""
    return {
        name: value.data_ptr() if isinstance(value, torch.Tensor) else value
        for name, value in launch.arguments.items()
        if name not in ("token_ids_ptr", "logprob_ptr", "partials_ptr")
    }


@pytest.mark.parametrize("num_positions, num_splits", [(1, 4), (256, 4), (1024, 2), (4096, 1)])
def test_programs_per_row_do_not_depend_on_the_batch(num_positions, num_splits):
    for batch in (1, 3):
        logits = torch.empty(batch, num_positions, 8192, dtype=torch.bfloat16)
        tokens = torch.full((batch, num_positions), 8192)
        seed, step = torch.zeros(batch, dtype=torch.int64), torch.tensor(0)
        launches = launches_of(logits, tokens, seed, step, 8192, None, 1.0, 0.0, 1.0)
        assert launches[0].grid == (batch * num_positions, num_splits, 1)
        assert len(launches) == (1 if num_splits == 1 else 2)


def test_settings_of_a_step_do_not_compile_anew():
    logits, tokens, seed, step, _, uncond, *_ = SPLIT.make_arguments()
    cubins = {
        launch.cubin
        for mask_token_id, guidance_scale, temperature in [(8192, 3.0, 1.0), (8255, 1.0, 0.5), (1, 0.0, 2.0)]
        for launch in launches_of(logits, tokens, seed, step, mask_token_id, uncond, guidance_scale, 0.0, temperature)
    }
    assert len(cubins) == 2


def test_nothing_is_tuned_at_run_time():
    found = [
        value
        for module in (sample_tokens, mask_by_confidence, differential_sample, w4a8_linear, w4a16_linear)
        for name, value in vars(sys.modules[module.__module__]).items()
        if name.endswith("_kernel")
    ]
    # a tuner would wrap it; what is launched is a function of dtype, layout and shape
    assert len(found) == 9 and all(type(kernel) is JITFunction for kernel in found)


def assert_exact_arithmetic(ptx: str) -> None:
    """Approximations are those that may be; mul.f32 could be contracted with a sum, mul.rn.f32 may not."""
    assert set(re.findall(r"\b(\w+)\.approx", ptx)) <= {"ex2", "lg2", "rsqrt"}
    assert not re.search(r"\b(mul|add|sub)\.f32\b", ptx)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_arithmetic_is_exact(case, monkeypatch):
    arguments = case.make_arguments()
    for launch in launches_of(*arguments, op=case.op):
        assert_exact_arithmetic(launch.ptx)
    # with fusion left on, the check is red
    for module in (sample_tokens, mask_by_confidence, differential_sample, w4a8_linear, w4a16_linear):
        monkeypatch.setitem(sys.modules[module.__module__].LAUNCH_OPTIONS, "enable_fp_fusion", True)
    with pytest.raises(AssertionError):
        for launch in launches_of(*arguments, op=case.op):
            assert_exact_arithmetic(launch.ptx)
