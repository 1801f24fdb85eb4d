"""How the launchers meet CUDA, as far as a stand-in for the device can tell."""

import re
import sys
from contextlib import contextmanager

import driver
import pytest
import torch
import triton
import triton.language as tl
from cases import CASES, PLAIN, launcher_of
from driver import draw_of, standin_gpu
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime import JITFunction

import mgt_kernels
from mgt_kernels import ops
from mgt_kernels.triton import (
    commit_tokens,
    differential_sample,
    mask_by_confidence,
    match_tokens,
    merge_tokens,
    sample_tokens,
    w4a8_linear,
    w4a16_linear,
)
from mgt_kernels.triton import launch as launching
from mgt_kernels.triton.truncate import kept_from

SPLIT = next(case for case in CASES if case.name == "bf16 split over four programs")
TRUNCATED = next(case for case in CASES if case.name == "top_k, top_p and min_p, position-major")
MASK = next(case for case in CASES if case.name == "N=256 temperature=1.3 digits=3")
COMMIT = next(case for case in CASES if case.name == "factor N=256 temperature=0.05")
DIFFERENCE = next(case for case in CASES if case.name == "official, aliased, bf16, noise")
LINEAR = next(case for case in CASES if case.name == "w4a8 bf16, two static scales, a short group")
LINEAR_16 = next(case for case in CASES if case.name == "w4a16 fp32, groups of 32")
SPLIT_LINEAR = next(case for case in CASES if case.name == "w4a8 bf16, split")
SPLIT_LINEAR_16 = next(case for case in CASES if case.name == "w4a16 bf16, split")
DEQUANTIZED = next(case for case in CASES if case.name == "w4a16 bf16, dequantized")
MATCH = next(case for case in CASES if case.name == "match bf16, batch 3")
MERGE = next(case for case in CASES if case.name == "merge bf16")
UNMERGE = next(case for case in CASES if case.name == "unmerge bf16")
# those that compute
ARITHMETIC = [
    SPLIT, TRUNCATED, MASK, COMMIT, DIFFERENCE, LINEAR, LINEAR_16, SPLIT_LINEAR, SPLIT_LINEAR_16, DEQUANTIZED, MATCH,
    MERGE,
]  # fmt: skip
ONE_OF_EACH = [*ARITHMETIC, UNMERGE]


MODULES = (
    sample_tokens, kept_from, mask_by_confidence, commit_tokens, differential_sample, w4a8_linear, w4a16_linear,
    match_tokens, merge_tokens,
)  # fmt: skip


def launches_of(*arguments, op="sample_tokens"):
    with standin_gpu(80, execute=False) as launches:
        launcher_of(op)(*arguments)
    return launches


@pytest.mark.parametrize(
    "op",
    [
        "sample_tokens", "mask_by_confidence", "commit_tokens", "differential_sample", "w4a8_linear", "w4a16_linear",
        "match_tokens", "merge_tokens", "unmerge_tokens",
    ],
)  # fmt: skip
def test_ops_have_a_cuda_kernel(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mgt_kernels::{op}", "CUDA")


def test_public_ops_on_cuda_wait_for_nothing():
    # on fake tensors whatever needs a value from the device raises
    with FakeTensorMode():
        logits = torch.empty(2, 64, 1000, device="cuda")
        tokens = torch.empty(2, 64, dtype=torch.int64, device="cuda")
        step = torch.empty((), dtype=torch.int64, device="cuda")
        options = dict(mask_token_id=1000, seed=1)
        token_ids, logprob, *_ = mgt_kernels.sample_tokens(logits, tokens, step=step, **options)
        masked = mgt_kernels.mask_by_confidence(token_ids, logprob, 20, temperature=1.0, step=3, **options)
        edit = mgt_kernels.TokenEdit(token_ids, logprob, -0.1)
        end = torch.empty(2, dtype=torch.int64, device="cuda")
        after, done = mgt_kernels.commit_tokens(
            token_ids, logprob, tokens, threshold=-0.1, within=(4, end), edit=edit, step=step, **options
        )
        hidden = torch.empty(2, 64, 32, device="cuda")
        match = mgt_kernels.match_tokens(hidden, (8, 8), ratio=0.5, seed=1, step=step)
        assert all(x.is_cuda for x in (token_ids, logprob, masked, after, done, match.row))
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
        launcher_of(case.op)(first.as_subclass(Indexed), *rest)
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
        launches = launches_of(*draw_of(logits, tokens, seed, step, 8192), *PLAIN)
        assert launches[0].grid == (batch * num_positions, num_splits, 1)
        assert len(launches) == (1 if num_splits == 1 else 2)


@pytest.mark.parametrize("case", [LINEAR, LINEAR_16], ids=str)
def test_layers_with_many_outputs_fit_into_a_grid(case):
    # 65,535 programs are the most there may be in any dimension but the first
    num_outputs = 16 * 65_535 + 1
    x, w_q, scale, zero_point, group_size, *_ = case.make_arguments()
    wide = [torch.empty(num_outputs, tensor.shape[1], dtype=tensor.dtype) for tensor in (w_q, scale, zero_point)]
    x_scale = (None,) if case is LINEAR else ()
    for launch in launches_of(x[:3], *wide, group_size, *x_scale, None, op=case.op):
        assert launch.grid[0] >= 1 and max(launch.grid[1:]) <= 65_535


def test_settings_of_a_step_do_not_compile_anew():
    logits, tokens, seed, step, _, uncond, *_ = SPLIT.make_arguments()
    cubins = {
        launch.cubin
        for mask_token_id, guidance_scale, temperature in [(8192, 3.0, 1.0), (8255, 1.0, 0.5), (1, 0.0, 2.0)]
        for launch in launches_of(
            *draw_of(logits, tokens, seed, step, mask_token_id, uncond, guidance_scale, temperature=temperature), *PLAIN
        )
    }
    assert len(cubins) == 2


def test_nothing_is_tuned_at_run_time():
    found = [
        value
        for module in MODULES
        for name, value in vars(sys.modules[module.__module__]).items()
        if name.endswith("_kernel")
    ]
    # a tuner would wrap it; what is launched is a function of dtype, layout and shape
    assert len(found) == 21 and all(type(kernel) is JITFunction for kernel in found)


def assert_exact_arithmetic(ptx: str) -> None:
    """Approximations are those that may be; mul.f32 could be contracted with a sum, mul.rn.f32 may not."""
    assert set(re.findall(r"\b(\w+)\.approx", ptx)) <= {"ex2", "lg2", "rsqrt"}
    assert not re.search(r"\b(mul|add|sub)\.f32\b", ptx)


@pytest.mark.parametrize("case", ARITHMETIC, ids=str)
def test_arithmetic_is_exact(case, monkeypatch):
    arguments = case.make_arguments()
    for launch in launches_of(*arguments, op=case.op):
        assert_exact_arithmetic(launch.ptx)
    # with fusion left on, the check is red
    for module in MODULES:
        monkeypatch.setitem(sys.modules[module.__module__].LAUNCH_OPTIONS, "enable_fp_fusion", True)
    with pytest.raises(AssertionError):
        for launch in launches_of(*arguments, op=case.op):
            assert_exact_arithmetic(launch.ptx)


EXACT = {"enable_fp_fusion": False}


@triton.jit(do_not_specialize=["offset", "offset_ptr"])
def _shift_kernel(y_ptr, x_ptr, bias_ptr, offset_ptr, num_elements, stride, offset, factor, BLOCK: tl.constexpr):  # noqa: N803
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_elements
    x = tl.load(x_ptr + offs * stride, mask=mask)
    if bias_ptr is not None:
        x += tl.load(bias_ptr)
    tl.store(y_ptr + offs, x * factor + offset + tl.load(offset_ptr), mask=mask)


def variants() -> list[tuple[tuple, dict]]:
    """Launches that differ from the first in one thing: in what a variant depends on, or in a value alone."""
    x, y, one = torch.arange(80.0), torch.zeros(80), torch.ones(5)
    plain = dict(y=y, x=x, bias=None, at=one, num=16, stride=1, offset=0, factor=2.0, BLOCK=256, num_warps=1)
    changes: tuple[dict, ...] = (
        {}, dict(x=x[4:]), dict(x=x[1:]), dict(y=y[1:]), dict(x=x.half()), dict(bias=one), dict(bias=one[1:]),
        dict(at=one[1:]), dict(at=one.double()), dict(num=32), dict(num=17), dict(num=1), dict(stride=2),
        dict(stride=16), dict(num=0), dict(offset=1), dict(offset=16), dict(offset=-5), dict(offset=2**31 - 1),
        dict(offset=2**31), dict(offset=-(2**31)), dict(offset=-(2**31) - 1), dict(factor=-1.0), dict(BLOCK=128),
        dict(num_warps=2), dict(num_warps=2, BLOCK=128),
    )  # fmt: skip
    launches = []
    for change in changes:
        *arguments, block, num_warps = (plain | change).values()
        launches.append((tuple(arguments), dict(num_warps=num_warps, BLOCK=block, **EXACT)))
    return launches


@pytest.mark.parametrize("most_sizes", [4096, 1])
def test_a_launch_is_tritons(most_sizes, monkeypatch):
    monkeypatch.setattr(launching, "_LOADED_FOR", {})
    monkeypatch.setattr(launching, "_MOST_LOADED_FOR", most_sizes)
    with standin_gpu(80, execute=False) as launches:
        for arguments, settings in variants():
            _shift_kernel[(3,)](*arguments, **settings)
        expected = list(launches)
        # the first meets every variant anew, the second none
        for _ in range(2):
            launches.clear()
            for arguments, settings in variants():
                launching.launch(_shift_kernel, (3,), *arguments, **settings)
            for ours, theirs in zip(launches, expected, strict=True):
                assert ours.cubin == theirs.cubin and ours.grid == theirs.grid == (3, 1, 1)
                assert ours.num_warps == theirs.num_warps and ours.stream == theirs.stream
                for of_ours, of_theirs in ((ours.arguments, theirs.arguments), (ours.constants, theirs.constants)):
                    assert of_ours.keys() == of_theirs.keys()
                    for name, value in of_ours.items():
                        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
                        assert same(value, of_theirs[name])
    assert 1 <= len(launching._LOADED_FOR) <= most_sizes


def test_a_loaded_variant_runs():
    x, y = torch.arange(64.0), torch.zeros(64)
    for offset in (3, 5):
        with standin_gpu(80):
            launching.launch(
                _shift_kernel, (2,), y, x, None, torch.ones(1), 64, 1, offset, 2.0, BLOCK=32, num_warps=1, **EXACT
            )
        assert torch.equal(y, 2 * x + 1 + offset)


def test_profilers_see_a_launch():
    seen = []
    x, y = torch.arange(64.0), torch.zeros(64)
    hook = triton.knobs.runtime.launch_enter_hook

    def enter(metadata):
        seen.append(metadata.get()["name"])

    original = driver._Launcher.__call__

    def call(self, *arguments):
        # as the launcher in C does it
        if arguments[7] is not None:
            arguments[7](arguments[6])
        return original(self, *arguments)

    driver._Launcher.__call__ = call
    hook.add(enter)
    try:
        with standin_gpu(80, execute=False):
            for _ in range(2):
                launching.launch(_shift_kernel, (2,), y, x, None, x, 64, 1, 3, 2.0, BLOCK=32, num_warps=1, **EXACT)
    finally:
        hook.remove(enter)
        driver._Launcher.__call__ = original
    assert seen == ["_shift_kernel"] * 2


def test_a_capture_loads_nothing(monkeypatch):
    for loaded in ("_LOADED", "_LOADED_FOR"):
        monkeypatch.setattr(launching, loaded, {})
    arguments = SPLIT.make_arguments()
    launches_of(*arguments)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert len(launches_of(*arguments)) == 2
    noisy = (*arguments[:7], 1.25, *arguments[8:])
    with pytest.raises(RuntimeError, match=r"sample_tokens_kernel: expected a variant .* mgt_kernels\.warm_up"):
        launches_of(*noisy)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert len(launches_of(*noisy)) == 2
