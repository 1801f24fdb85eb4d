"""The stand-in driver: unmodified launchers run, launches are recorded, the former driver comes back."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

import driver
import triton
import triton.language as tl
from driver import draw_of, standin_gpu
from ptx_emulator import PtxError

import mgt_kernels
from mgt_kernels import triton as kernels


@triton.jit
def _scale_kernel(x_ptr, y_ptr, bias_ptr, num_elements, stride, factor, BLOCK: tl.constexpr):  # noqa: N803
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_elements
    x = tl.load(x_ptr + offs * stride, mask=mask)
    if bias_ptr is not None:
        x += tl.load(bias_ptr)
    tl.store(y_ptr + offs, x * factor, mask=mask)


def scale(x: torch.Tensor, bias: torch.Tensor | None = None, num_elements: int | None = None) -> torch.Tensor:
    y = torch.empty(len(x))
    num_elements = len(x) if num_elements is None else num_elements
    _scale_kernel[(triton.cdiv(num_elements, 64),)](x, y, bias, num_elements, x.stride(0), 2.5, BLOCK=64, num_warps=2)
    return y


@pytest.mark.parametrize("capability", [80, 86, 89, 90])
@pytest.mark.parametrize("bias", [None, torch.tensor([3.0])])
def test_kernel_runs_on_cpu_tensors(capability: int, bias: torch.Tensor | None) -> None:
    x = torch.arange(100.0)
    with standin_gpu(capability) as launches:
        y = scale(x, bias)
    assert torch.equal(y, (x if bias is None else x + 3) * 2.5)
    (launch,) = launches
    assert (launch.kernel, launch.grid, launch.num_warps, launch.shared) == ("_scale_kernel", (2, 1, 1), 2, 0)
    assert launch.cubin.startswith(b"\x7fELF") and f".target sm_{capability}" in launch.ptx
    assert set(launch.arguments) == {"x_ptr", "y_ptr", "num_elements", "factor"} | (
        {"bias_ptr"} if bias is not None else set()
    )
    assert launch.constants["BLOCK"] == 64 and launch.constants["stride"] == 1
    assert launch.report is not None and launch.report.num_ctas == 2 and launch.report.lane_instructions > 0


def test_storage_is_what_bounds() -> None:
    storage = torch.arange(400.0)
    with standin_gpu(80):
        # a view with an offset and a stride: the whole storage may be read
        assert torch.equal(scale(storage[3::4]), storage[3::4] * 2.5)
        with pytest.raises(PtxError, match=r"out-of-bounds global load.*_load|out-of-bounds global"):
            scale(storage[3::4], num_elements=101)
        # an empty launch
        scale(storage[:0])


def test_nothing_runs_without_execute() -> None:
    x = torch.arange(100.0)
    with standin_gpu(100, execute=False) as launches:
        y = scale(x)
    assert launches[0].report is None and ".target sm_100" in launches[0].ptx
    # poisoned by conftest.py, and left so
    assert y.isnan().all()
    with pytest.raises(ValueError, match="execute must be False"), standin_gpu(100):
        pass
    with pytest.raises(ValueError, match="capability must be one of"), standin_gpu(70):
        pass


def test_former_driver_comes_back() -> None:
    before = triton.runtime.driver._active
    with standin_gpu(80) as outer:
        with standin_gpu(90, execute=False) as inner:
            scale(torch.ones(3))
        assert torch.equal(scale(torch.ones(3)), torch.full((3,), 2.5))
        assert (len(outer), len(inner)) == (1, 1)
        assert ".target sm_80" in outer[0].ptx and ".target sm_90" in inner[0].ptx
    assert triton.runtime.driver._active is before
    with pytest.raises(RuntimeError, match="as it comes"), standin_gpu(80):
        raise RuntimeError("as it comes")
    assert triton.runtime.driver._active is before


@triton.jit
def _reverse_kernel(x_ptr, BLOCK: tl.constexpr):  # noqa: N803
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(x_ptr + offs, tl.gather(x, BLOCK - 1 - offs, 0))


def drop_barriers(ptx: str) -> str:
    edited = ptx.replace("bar.sync \t0;", "")
    assert edited != ptx
    return edited


def test_race_raises_unless_the_report_is_asked_for() -> None:
    x = torch.arange(512)
    with standin_gpu(80):
        _reverse_kernel[(1,)](x, BLOCK=512)
    assert torch.equal(x, torch.arange(512).flip(0))
    with standin_gpu(80, edit_ptx=drop_barriers), pytest.raises(PtxError, match="races in _reverse_kernel"):
        _reverse_kernel[(1,)](x, BLOCK=512)
    with standin_gpu(80, edit_ptx=drop_barriers, check_races=False) as launches:
        _reverse_kernel[(1,)](x, BLOCK=512)
    assert launches[0].report is not None and launches[0].report.races


@triton.autotune(configs=[triton.Config({"BLOCK": 32}), triton.Config({"BLOCK": 64})], key=["num_elements"])
@triton.jit
def _tuned_kernel(x_ptr, num_elements, BLOCK: tl.constexpr):  # noqa: N803
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, offs, mask=offs < num_elements)


def test_first_configuration_of_autotune_wins() -> None:
    x = torch.zeros(100, dtype=torch.int32)
    with standin_gpu(80) as launches:
        _tuned_kernel[lambda meta: (triton.cdiv(100, meta["BLOCK"]),)](x, 100)
    assert torch.equal(x, torch.arange(100, dtype=torch.int32))
    assert [launch.constants["BLOCK"] for launch in launches] == [32]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("approx_ulp", [0, 2])
def test_launcher_runs_unmodified(capability: int, approx_ulp: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 1000)
    tokens, seed, step = torch.full((2, 5), 1000), torch.tensor([3, -4]), torch.tensor([2])
    expected = mgt_kernels.sample_tokens(logits, tokens, mask_token_id=1000, seed=seed, step=2, temperature=0.7)
    with standin_gpu(capability, approx_ulp=approx_ulp) as launches:
        draw = draw_of(logits, tokens, seed, step, 1000, temperature=0.7)
        token_ids, logprob, _ = kernels.sample_tokens(draw, "masked", "", 0, 1.0, 0.0, "kept")
    assert torch.equal(token_ids, expected[0])
    torch.testing.assert_close(logprob, expected[1], rtol=0, atol=2e-6)
    assert launches[0].kernel == "sample_tokens_kernel"


def test_storage_is_shared() -> None:
    x = torch.zeros(4, dtype=torch.int16)
    driver.storage_of(x[2:])[:] = 1
    assert (x == 257).all()


@triton.jit
def _exchange_kernel(x_ptr, BLOCK: tl.constexpr):  # noqa: N803
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.debug_barrier()
    tl.store(x_ptr + BLOCK - 1 - offs, x)
    tl.debug_barrier()
    tl.store(x_ptr + BLOCK + offs, tl.load(x_ptr + offs))


@pytest.mark.parametrize(
    ("barrier", "race"), [(0, "global write after read"), (1, "global read after write"), (2, None)]
)
def test_a_barrier_orders_global_memory(barrier: int, race: str | None) -> None:
    x = torch.arange(256.0)

    def drop(ptx: str) -> str:
        parts = re.split(r"bar\.sync\s+0;", ptx)
        assert len(parts) == 3
        kept = ["bar.sync 0;", "bar.sync 0;", ""]
        kept[barrier] = ""
        return "".join(part + between for part, between in zip(parts, kept, strict=True))

    with standin_gpu(80, edit_ptx=drop, check_races=False) as launches:
        _exchange_kernel[(1,)](x, BLOCK=128, num_warps=4)
    races = launches[0].report.races  # type: ignore[union-attr]
    assert all(text.startswith(race) for text in races) if race else not races
    assert bool(races) == bool(race)
    if race is None:
        assert torch.equal(x, torch.arange(127.0, -1, -1).repeat(2))


@triton.jit
def _same_place_kernel(x_ptr, y_ptr):
    tl.store(x_ptr + tl.load(y_ptr), tl.program_id(0))


def test_programs_that_write_the_same_place_race() -> None:
    x, y = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with standin_gpu(80, check_races=False) as launches:
        _same_place_kernel[(1,)](x, y)
        _same_place_kernel[(2,)](x, y)
    alone, together = (launch.report.races for launch in launches)  # type: ignore[union-attr]
    assert not alone and all(text.startswith("global write with write") for text in together) and together
