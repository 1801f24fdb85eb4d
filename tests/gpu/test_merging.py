"""Token merging on the device: what the cases of merging.py do not say by themselves."""

import re

import pytest
import torch
from cases import CASES, Case
from driver import standin_gpu
from merging import check_bits, check_match
from torch import Tensor

from mgt_kernels.reference.match_tokens import destinations, similarities
from mgt_kernels.triton import select


def case_named(name: str) -> Case:
    (case,) = [case for case in CASES if case.name == name]
    return case


def of_sample(arguments: tuple, sample: int) -> tuple:
    """Return the arguments of one sample of a case."""
    return tuple(x[sample : sample + 1] if isinstance(x, Tensor) and x.ndim else x for x in arguments)


@pytest.mark.parametrize("name", ["match bf16, batch 3", "match fp32, threshold", "match bf16, bad tokens"])
def test_a_match_does_not_depend_on_the_batch(name: str, capability: int) -> None:
    case = case_named(name)
    arguments = case.make_arguments()
    with standin_gpu(capability):
        together = case.run(arguments)
        for sample in range(3):
            for of_all, of_one in zip(together, case.run(of_sample(arguments, sample)), strict=True):
                assert torch.equal(of_all[sample : sample + 1], of_one)


@pytest.mark.parametrize("name", ["merge bf16", "unmerge bf16"])
def test_a_mean_does_not_depend_on_the_batch(name: str, capability: int) -> None:
    case = case_named(name)
    arguments = case.make_arguments()
    with standin_gpu(capability):
        (together,) = case.run(arguments)
        for sample in range(3):
            (alone,) = case.run(of_sample(arguments, sample))
            assert torch.equal(together[sample : sample + 1], alone)


@pytest.mark.parametrize("name", ["match bf16, two blocks of destinations", "match fp32, ties"])
def test_keys_that_registers_do_not_hold(name: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_named(name)
    arguments = case.make_arguments()
    monkeypatch.setattr(select, "MAX_BLOCK", 128)
    with standin_gpu(capability) as launches:
        outputs = case.run(arguments)
    assert [launch.constants.get("IN_REGISTERS") for launch in launches] == [None, None, False, None]
    case.check(arguments, case.expected(*arguments), outputs)


# Triton may give a product of float32 to the tensor cores, which round to tf32, whatever precision is asked for
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_products_of_float32_are_float32s(capability: int) -> None:
    case = case_named("match fp32, two blocks of destinations")
    with standin_gpu(capability, execute=False) as launches:
        case.run(case.make_arguments())
    (ptx,) = [launch.ptx for launch in launches if launch.kernel == "match_sources_kernel"]
    assert "tf32" not in ptx and not re.search(r"\b(mma|wgmma|tcgen05)\b", ptx) and "fma.rn.f32" in ptx


@pytest.mark.parametrize(
    ("capability", "product"), [(80, "mma.sync.aligned.m16n8k16.row.col.f32"), (90, "wgmma.mma_async.sync.aligned.m64")]
)
def test_products_of_16_bits_are_those_of_the_tensor_cores(capability: int, product: str) -> None:
    case = case_named("match bf16, two blocks of destinations")
    with standin_gpu(capability, execute=False) as launches:
        case.run(case.make_arguments())
    assert product in launches[1].ptx


def test_offsets_take_64_bits() -> None:
    # tokens of 4 GiB as addresses go; what lies between them is never touched
    case = case_named("match bf16, batch 3")
    x, height, width, num_merged, threshold, seed, step = of_sample(case.make_arguments(), 0)
    far = torch.empty(2**31 + 2**26, dtype=x.dtype).as_strided(x.shape, (0, 2**31 // (x.shape[1] - 2), 1))
    far.copy_(x)
    with standin_gpu(80):
        match = case.run((far, height, width, num_merged, threshold, seed, step))
        for ours, theirs in zip(match, case.run((x, height, width, num_merged, threshold, seed, step)), strict=True):
            assert torch.equal(ours, theirs)
        for name, arguments in (("merge bf16", (*match[:3], int(match[3]))), ("unmerge bf16", match[:1])):
            merging = case_named(name)
            assert torch.equal(merging.run((far, *arguments))[0], merging.run((x, *arguments))[0])


def test_nothing_is_launched_for_no_samples() -> None:
    arguments = [of_sample(case_named(name).make_arguments(), 3) for name in ("match bf16, batch 3", "merge bf16")]
    with standin_gpu(90) as launches:
        assert [x.shape[0] for x in case_named("match bf16, batch 3").run(arguments[0])] == [0] * 4
        assert case_named("merge bf16").run(arguments[1])[0].shape == (0, 41, 256)
    assert not launches


@pytest.mark.parametrize("name", ["match bf16, batch 3", "match fp32, threshold"])
def test_a_wrong_match_turns_it_red(name: str) -> None:
    case = case_named(name)
    arguments = case.make_arguments()
    expected = case.expected(*arguments)
    check_match(arguments, expected, expected)
    # the members of two rows exchanged, and a token merged into another destination
    row, members, starts, num_rows = (x.clone() for x in expected)
    members[1, [0, 40]] = members[1, [40, 0]]
    with pytest.raises(AssertionError, match="members"):
        check_match(arguments, expected, (row, members, starts, num_rows))
    _, height, width, _, _, seed, step = arguments
    to = destinations(height, width, seed, int(step), True)
    merged = ~torch.zeros_like(row, dtype=torch.bool).scatter_(1, to, True) & row.eq(row.gather(1, to)[:, :1])
    assert merged.any()
    sample, token = merged.nonzero()[0].tolist()
    row[sample, token] = row[sample, to[sample, 1]]
    order = row.argsort(dim=-1, stable=True)
    sizes = torch.zeros_like(row).scatter_add_(1, row, torch.ones_like(row))
    starts = torch.cat([torch.zeros_like(num_rows)[:, None], sizes.cumsum(-1)], dim=1)
    with pytest.raises(AssertionError, match="not most like"):
        check_match(arguments, expected, (row, order, starts, num_rows))


def test_near_ties_are_allowed_and_shown() -> None:
    # two destinations that a source is equally like, but for less than float32 tells
    x = torch.zeros(1, 32, 2)
    x[..., 0] = -1.0
    x[0, 0] = torch.tensor([1.0, 1e-9])
    x[0, 2] = torch.tensor([1.0, 0.0])
    x[0, 1] = torch.tensor([1.0, 1e-9])
    arguments = (x, 4, 8, 1, 0.0, None, torch.tensor(0))
    case = case_named("match fp32, threshold")
    expected = case.expected(*arguments)
    best, nearest = similarities(x, destinations(4, 8, torch.zeros(1, dtype=torch.int64), 0, False))
    assert float(best[0, 1]) == pytest.approx(1.0) and int(nearest[0, 1]) in (0, 2)
    row, _, starts, num_rows = (y.clone() for y in expected)
    other = 2 if int(nearest[0, 1]) == 0 else 0
    row[0, 1] = row[0, other]
    sizes = torch.zeros_like(row).scatter_add_(1, row, torch.ones_like(row))
    changed = (row, row.argsort(dim=-1, stable=True), torch.cat([starts[:, :1], sizes.cumsum(-1)], 1), num_rows)
    check_match(arguments, expected, changed)
    x[0, 2] = torch.tensor([1.0, 0.1])
    with pytest.raises(AssertionError):
        check_match(arguments, case.expected(*arguments), changed)


def test_a_mean_that_is_rounded_twice_turns_it_red() -> None:
    case = case_named("merge bf16")
    arguments = case.make_arguments()
    x, row, _, starts, num_rows = arguments
    expected = case.expected(*arguments)
    sizes = (starts[:, 1 : num_rows + 1] - starts[:, :num_rows]).clamp(min=1)
    total = torch.zeros_like(expected[0]).scatter_add_(1, row[..., None].expand_as(x), x)
    with pytest.raises(AssertionError, match="values differ"):
        check_bits(arguments, expected, (total / sizes[..., None].to(x.dtype),))


@pytest.mark.parametrize(
    ("name", "kernel", "before", "after"),
    [
        # the norm
        ("match bf16, batch 3", "measure_tokens_kernel", "sqrt.rn.f32", "abs.f32"),
        # of equally similar sources one fewer
        ("match fp32, ties", "select_merged_kernel", "setp.le.s32", "setp.lt.s32"),
        # the similarity of what has no norm
        ("match bf16, bad tokens", "select_merged_kernel", "0fFF800000", "0f3F800000"),
    ],
)
def test_changed_code_turns_it_red(name: str, kernel: str, before: str, after: str) -> None:
    case = case_named(name)
    arguments = case.make_arguments()
    found = []

    def edit(ptx: str) -> str:
        if f".entry {kernel}(" not in ptx:
            return ptx
        found.append(before in ptx)
        return ptx.replace(before, after)

    with standin_gpu(80, edit_ptx=edit, check_races=False):
        outputs = case.run(arguments)
    assert found == [True], f"{before} is not in {kernel} any more"
    with pytest.raises(AssertionError):
        case.check(arguments, case.expected(*arguments), outputs)
