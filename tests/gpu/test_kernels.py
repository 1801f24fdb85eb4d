"""The Triton kernels against the CPU: the PTX that a GPU would be given, executed by the emulator."""

import re

import pytest
import torch
from cases import CASES, Case
from driver import standin_gpu
from ptx_emulator import PtxError

CAPABILITIES = [80, 90]
MANY = [case for case in CASES if "many" in case.name]


def case_named(name: str) -> Case:
    (case,) = [case for case in CASES if case.name == name]
    return case


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_cpu(case, capability):
    arguments = case.make_arguments()
    expected = case.expected(*arguments)
    # hardware may be off by 2 units in the last place where it approximates
    for approx_ulp in (0,) if case in MANY else (0, 2):
        with standin_gpu(capability, approx_ulp=approx_ulp) as launches:
            outputs = case.run(arguments)
        assert launches and all(launch.report for launch in launches)
        case.check(arguments, expected, outputs)


def test_many_rows_are_many():
    assert sum(case.make_arguments()[1].numel() for case in MANY) >= 20_000


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_sample_does_not_depend_on_its_batch(capability):
    case = case_named("bf16 split over four programs")
    logits, tokens, seed, step, mask_token_id, uncond, *options = case.make_arguments()
    with standin_gpu(capability):
        together = case.run((logits, tokens, seed, step, mask_token_id, uncond, *options))
        for i in range(2):
            alone = (logits[i : i + 1], tokens[i : i + 1], seed[i : i + 1], step, mask_token_id, uncond[i : i + 1])
            for of_both, of_one in zip(together, case.run((*alone, *options)), strict=True):
                assert torch.equal(of_both[i : i + 1], of_one)


def test_logits_and_tokens_are_not_written():
    case = case_named("bf16 aligned")
    arguments, untouched = case.make_arguments(), case.make_arguments()
    with standin_gpu(80):
        case.run(arguments)
    for argument, before in zip(arguments, untouched, strict=True):
        assert torch.equal(argument, before) if isinstance(argument, torch.Tensor) else argument == before


# a constant of each file with kernels or what they share, as PTX writes it, and what to make of it
MUTATIONS = {
    "draws.py: Philox's multiplier": ("bf16 aligned", "-766435501", "-766435503"),
    "draws.py: a coefficient of the logarithm": ("N=16384 temperature=1.3 digits=3", "0f3EAAAAD2", "0fBEAAAAD2"),
    "draws.py: Box-Muller's first coefficient": (
        "fp16 position-major, odd, noise", "0f37CCF5CE", "0f47CCF5CE",
    ),
    "sample_tokens.py: the scale of the bounds": ("many flat rows", "0fBF317218", "0fBEB17218"),
    "sample_tokens.py: how near a rival may come": ("many peaked rows", "0f38D1B717", "0fCE6E6B28"),
    "sample_tokens.py: the base of exp": ("bf16 aligned", "0f3FB8AA3B", "0f3FB8AA5B"),
    "mask_by_confidence.py: the key of known positions": ("N=256 temperature=0.0 digits=0", "-8388608", "-1073741824"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_changed_constant_turns_it_red(mutation):
    name, constant, changed = MUTATIONS[mutation]
    case = case_named(name)
    arguments = case.make_arguments()
    expected = case.expected(*arguments)

    def edit(ptx: str) -> str:
        assert constant in ptx, f"{constant} is not in the kernel any more"
        return ptx.replace(constant, changed)

    with standin_gpu(80, edit_ptx=edit):
        outputs = case.run(arguments)
    with pytest.raises(AssertionError):
        case.check(arguments, expected, outputs)


def drop_barrier(ptx: str, which: int) -> str:
    barriers = list(re.finditer(r"bar\.sync\s+0;", ptx))
    assert which < len(barriers), "the kernel has fewer barriers now"
    return ptx[: barriers[which].start()] + ptx[barriers[which].end() :]


# barriers of a debug_barrier may order what one warp happens to do alone; these guard exchanges
@pytest.mark.parametrize("name, barrier", [("bf16 aligned", 0), ("N=4097 temperature=1.3 digits=3", 1)])
def test_a_dropped_barrier_turns_it_red(name, barrier):
    case = case_named(name)
    arguments = case.make_arguments()
    with standin_gpu(80, edit_ptx=lambda ptx: drop_barrier(ptx, barrier)), pytest.raises(PtxError, match="race"):
        case.run(arguments)
