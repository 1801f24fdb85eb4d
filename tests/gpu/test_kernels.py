"""The Triton kernels against the CPU: the PTX that a GPU would be given, executed by the emulator."""

import re

import pytest
import torch
from cases import CASES, NUM_DRAW, PLAIN, Case, Linear
from driver import draw_of, standin_gpu
from ptx_emulator import PtxError

from mgt_kernels import ops
from mgt_kernels import triton as kernels
from mgt_kernels.draw import Draw
from mgt_kernels.reference.differential_sample import select_rows

EMPTY = torch.empty
MANY = [case for case in CASES if "many" in case.name]


def case_named(name: str) -> Case:
    (case,) = [case for case in CASES if case.name == name]
    return case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_cpu(case, capability, request):
    # draws take longest to compile, and have neighbours of other dtypes and layouts: each runs on one architecture
    is_draw = str(case).startswith(("sample_tokens", "differential_sample"))
    is_here = capability == (80, 90)[CASES.index(case) % 2] or request.config.getoption("every_architecture")
    if is_draw and not is_here:
        pytest.skip("runs on the other architecture; --every-architecture runs it on both")
    arguments = case.make_arguments()
    expected = case.expected(*arguments)
    # hardware may be off by 2 units in the last place where it approximates
    for approx_ulp in (0,) if case in MANY else (0, 2):
        with standin_gpu(capability, approx_ulp=approx_ulp) as launches:
            outputs = case.run(arguments)
        assert launches and all(launch.report for launch in launches)
        case.check(arguments, expected, outputs)
        if not any(".approx" in launch.ptx for launch in launches):
            break


def test_many_rows_are_many():
    assert sum(case.make_arguments()[1].numel() for case in MANY) >= 20_000


def test_a_sample_does_not_depend_on_its_batch(capability):
    case = case_named("bf16 split over four programs")
    logits, tokens, seed, step, mask_token_id, uncond, *options = case.make_arguments()
    with standin_gpu(capability):
        together = case.run((logits, tokens, seed, step, mask_token_id, uncond, *options))
        for i in range(2):
            alone = (logits[i : i + 1], tokens[i : i + 1], seed[i : i + 1], step, mask_token_id, uncond[i : i + 1])
            for of_both, of_one in zip(together, case.run((*alone, *options)), strict=True):
                assert torch.equal(of_both[i : i + 1], of_one)


@pytest.mark.parametrize("name", ["paper bf16 position-major, odd", "official, aliased, bf16, noise"])
def test_differences_of_a_sample_do_not_depend_on_its_batch(name):
    case = case_named(name)
    arguments = case.make_arguments()
    # logits, tokens, seeds and the unguided half; history, whether it is written, and its seeds
    of_samples = (0, 1, 2, 5, NUM_DRAW, NUM_DRAW + 1, NUM_DRAW + 3)
    with standin_gpu(80):
        together = case.run(arguments)
        for i in range(2):
            alone = case.run(tuple(x[i : i + 1] if k in of_samples else x for k, x in enumerate(arguments)))
            for of_both, of_one in zip(together[:-1], alone[:-1], strict=True):
                assert torch.equal(of_both[i : i + 1], of_one)


@pytest.mark.parametrize("name", ["paper share 0", "paper bf16"])
def test_what_is_not_selected_has_the_bits_of_sample_tokens(name):
    arguments = case_named(name).make_arguments()
    draw, (*_, share, variant, _) = Draw._make(arguments[:NUM_DRAW]), arguments[NUM_DRAW:]
    with standin_gpu(90):
        token_ids, logprob, divergence, *_ = case_named(name).run(arguments)
        plain = kernels.sample_tokens(draw, *PLAIN)
    masked = draw.tokens == draw.mask_token_id
    kept = ~(select_rows(divergence, masked, share=share, variant=variant) & masked)
    assert kept[masked].any()
    assert torch.equal(token_ids[kept], plain[0][kept]) and torch.equal(logprob[kept], plain[1][kept])


@pytest.mark.parametrize("name", ["bf16 aligned", "paper bf16"])
def test_logits_and_tokens_are_not_written(name):
    case = case_named(name)
    arguments, untouched = case.make_arguments(), case.make_arguments()
    with standin_gpu(80):
        case.run(arguments)
    for argument, before in zip(arguments, untouched, strict=True):
        assert torch.equal(argument, before) if isinstance(argument, torch.Tensor) else argument == before


def apart(x):
    """Return the same values, no two of them side by side."""
    return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]


@pytest.mark.parametrize(
    "name, laid_out, apart_too",
    [
        ("fp32 odd", (0, 5), (1, 2, 3)),
        ("N=256 temperature=1.3 digits=3", (), (0, 1, 2, 3, 4)),
        ("w4a8 fp32, few rows, groups of 64, odd", (), (0, 1, 2, 3, 5, 6)),
        ("w4a16 fp32, few rows, groups of 64, odd", (), (0, 1, 2, 3, 5)),
    ],
)
def test_strides_do_not_matter(name, laid_out, apart_too):
    case = case_named(name)
    arguments = case.make_arguments()
    # one sample, whose stride is any number
    has_samples = name.startswith(("fp32", "N="))
    strided = [x[:1] if isinstance(x, torch.Tensor) and x.ndim > 1 and has_samples else x for x in arguments]
    strided = [
        x.as_strided(x.shape, (12345, *x.stride()[1:])) if i in laid_out else apart(x) if i in apart_too else x
        for i, x in enumerate(strided)
    ]
    if has_samples:
        strided = [x[:1] if i in apart_too and x.ndim == 1 else x for i, x in enumerate(strided)]
    with standin_gpu(90):
        for ours, expected in zip(case.run(tuple(strided)), case.run(arguments), strict=True):
            assert ours.is_contiguous() and torch.equal(ours, expected[: len(ours)])


@pytest.mark.parametrize("shape", [(0, 3, 31), (2, 0, 31)])
def test_nothing_is_launched_for_no_positions(shape):
    logits, tokens = torch.empty(shape), torch.empty(shape[:2], dtype=torch.int64)
    seed, step = torch.zeros(shape[0], dtype=torch.int64), torch.tensor(3)
    state = torch.empty(shape, dtype=torch.int16), tokens == 1, torch.tensor(2), seed
    with standin_gpu(90) as launches:
        draw = draw_of(logits, tokens, seed, step, 31, logits, 2.0)
        token_ids, logprob, _ = kernels.sample_tokens(draw, *PLAIN[:3], 0.9, *PLAIN[4:])
        assert token_ids.shape == logprob.shape == shape[:2]
        assert kernels.mask_by_confidence(tokens, logprob, seed, seed, step, 31, 1.0).shape == shape[:2]
        outputs = kernels.differential_sample(draw, *state, True, 0.5, "paper", False)
        assert all(x.shape == shape[:2] for x in outputs) and int(state[2]) == 3
    assert not launches


@pytest.mark.parametrize("scale", [-3.0, torch.tensor(-3.0)], ids=["number", "tensor"])
def test_infinity_is_bad_whatever_the_sign_of_guidance(scale):
    draw = Draw._make(case_named("fp32 odd").make_arguments()[:NUM_DRAW])
    draw.tokens[:] = draw.mask_token_id
    draw.logits[0, 1, 7] = torch.inf
    with standin_gpu(80):
        token_ids, logprob, _ = kernels.sample_tokens(draw._replace(guidance_scale=scale), *PLAIN)
    assert torch.equal(logprob.isnan().nonzero(), torch.tensor([[0, 1]])) and token_ids[0, 1] == draw.mask_token_id


@pytest.mark.parametrize("variant", ["paper", "official", "random"])
def test_re_masking_is_made_of_these_kernels(capability, variant, monkeypatch):
    logits, _, seed, step, mask, uncond, scale, *_ = case_named("bf16 aligned").make_arguments()
    batch, num_positions, num_tokens = logits.shape
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(num_tokens, (batch, num_positions), generator=generator)
    tokens[:, 0] = mask
    remask_len = torch.arange(batch) + 1
    arguments = (logits, tokens, remask_len, seed, step, mask, variant, uncond, scale, None, "auto")
    expected, expected_score = ops._remask_tokens(*arguments)

    def sample_tokens(logits, tokens, *, mask_token_id, seed, step, uncond_logits, guidance_scale, temperature, rows,
                      statistics, backend):  # fmt: skip
        (name,) = statistics
        draw = draw_of(logits, tokens, seed, step, mask_token_id, uncond_logits, guidance_scale, 0.0, temperature)
        token_ids, logprob, (statistic,) = kernels.sample_tokens(draw, rows, name, *PLAIN[2:])
        return ops.Sampled(token_ids, logprob)._replace(**{name: statistic})

    def mask_by_confidence(token_ids, logprob, mask_len, *, mask_token_id, temperature, seed, step, backend):
        return kernels.mask_by_confidence(token_ids, logprob, mask_len, seed, step, mask_token_id, temperature)

    monkeypatch.setattr(ops, "sample_tokens", sample_tokens)
    monkeypatch.setattr(ops, "mask_by_confidence", mask_by_confidence)
    with standin_gpu(capability):
        remasked, score = ops._remask_tokens(*arguments)
    assert torch.equal(remasked, expected)
    torch.testing.assert_close(score, expected_score, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(
    "name", ["w4a8 bf16, groups of 128", "w4a8 fp32, few rows, groups of 64, odd", "w4a8 bf16, groups of 96"]
)
def test_activations_and_their_sums_are_the_references(name, capability, monkeypatch):
    arguments = case_named(name).make_arguments()
    monkeypatch.setattr(torch, "empty", lambda *size, **options: EMPTY(*size, **options).fill_(99))
    with standin_gpu(capability) as launches:
        case_named(name).run(arguments)
    linear, (num_rows, num_inputs) = Linear(*arguments), arguments[0].shape
    x_q, x_sum, row_scale = (launches[0].arguments[key] for key in ("x_q_ptr", "x_sum_ptr", "row_scale_ptr"))
    # what pads the rows is read by the next kernel
    assert not x_q[num_rows:].any() and not x_sum[:, num_rows:].any() and not (row_scale[num_rows:] == 99).any()
    # from the planes of the nibbles to the order of the inputs
    x_q = x_q[:num_rows].view(num_rows, 2, -1, 32).transpose(1, 2).reshape(num_rows, -1)
    assert torch.equal(x_q[:, :num_inputs], linear.x_q) and not x_q[:, num_inputs:].any()
    for group, in_group in enumerate(linear.x_q.int().split(linear.group_size, dim=1)):
        assert torch.equal(x_sum[group, :num_rows].long(), in_group.sum(1))


@pytest.mark.parametrize("name", ["w4a8 bf16, groups of 128", "w4a16 bf16, groups of 128"])
def test_a_row_does_not_depend_on_the_others(name, capability):
    case = case_named(name)
    x, *rest = case.make_arguments()
    with standin_gpu(capability) as launches:
        (together,) = case.run((x, *rest))
        for rows in (slice(0, 1), slice(3, 19), slice(60, 130)):
            assert torch.equal(case.run((x[rows].clone(), *rest))[0], together[rows])
    assert len({launch.constants.get("BLOCK_ROWS") for launch in launches} - {None}) == 2


@pytest.mark.parametrize(
    "name, capability, product",
    [
        ("w4a8 bf16, groups of 128", 80, "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"),
        ("w4a8 bf16, few rows", 80, "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"),
        ("w4a8 bf16, groups of 128", 90, "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8"),
        ("w4a8 bf16, few rows", 90, "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"),
        ("w4a16 bf16, groups of 128", 80, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"),
        ("w4a16 bf16, groups of 128", 90, "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"),
    ],
)
def test_products_are_those_of_the_tensor_cores(name, capability, product):
    with standin_gpu(capability, execute=False) as launches:
        case_named(name).run(case_named(name).make_arguments())
    ptx = launches[-1].ptx
    assert set(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)[\w.]*", ptx)) == {product}
    # the weights come from registers: {...} after the sums
    assert all("{" in line.split("}", 1)[1] for line in ptx.splitlines() if product in line)


def test_a_product_that_tensor_cores_would_not_make_turns_it_red():
    case = case_named("w4a16 fp32, a row, odd")
    arguments = case.make_arguments()
    linear = Linear(*arguments[:5], None, arguments[5])
    x, weight = linear.x.bfloat16().double(), linear.weight.dequantize(torch.bfloat16).double()
    expected = case.expected(*arguments)
    of_float32_weights = x @ linear.weight.dequantize(torch.float32).double().T
    without_an_input = x[:, 1:] @ weight[:, 1:].T
    sums_of_16_bits = (x @ weight.T).half()
    for y in (of_float32_weights, without_an_input, sums_of_16_bits):
        with pytest.raises(AssertionError, match="exceeds the naive chain's"):
            case.check(arguments, expected, ((y + linear.bias).float(),))
    case.check(arguments, expected, ((x @ weight.T + linear.bias).float(),))


@pytest.mark.parametrize(
    "name",
    [
        "w4a16 bf16, dequantized",
        "w4a16 bf16, dequantized, groups of 96, a bias of float32",
        "w4a16 fp32, dequantized, groups of 32, odd",
    ],
)
def test_dequantized_weights_are_the_references(name):
    arguments = case_named(name).make_arguments()
    expected = Linear(*arguments[:5], None, None).weight.dequantize(torch.bfloat16)
    with standin_gpu(80) as launches:
        case_named(name).run(arguments)
    assert torch.equal(launches[0].arguments["weight_ptr"][:, : expected.shape[1]], expected)


@pytest.mark.parametrize("capability, limit", [(80, 512), (90, 1024)])
def test_rows_choose_the_product_where_that_is_allowed(capability, limit):
    x, *rest, _ = case_named("w4a16 bf16, groups of 128").make_arguments()
    x = x[:1].expand(limit + 1, -1).contiguous()
    with standin_gpu(capability, execute=False) as launches:
        for num_rows, batch_invariant in ((limit - 1, False), (limit, False), (limit + 1, True)):
            kernels.w4a16_linear(x[:num_rows], *rest, batch_invariant)
    linear = "w4a16_linear_kernel"
    assert [launch.kernel for launch in launches] == [linear, "dequantize_kernel", linear]


def test_inputs_are_split_where_that_is_allowed():
    *arguments, batch_invariant = case_named("w4a16 bf16, split").make_arguments()
    assert batch_invariant is False
    with standin_gpu(80, execute=False) as launches:
        kernels.w4a16_linear(*arguments, True)
        kernels.w4a16_linear(*arguments, False)
    assert [launch.kernel for launch in launches] == ["w4a16_linear_kernel"] * 2 + ["add_splits_kernel"]
    assert [launch.grid[1] for launch in launches[:2]] == [1, 2]


# a constant of each file with kernels or what they share, as PTX writes it, and what to make of it
MUTATIONS = {
    "draws.py: Philox's multiplier": ("bf16 aligned", "-766435501", "-766435503"),
    "draws.py: a coefficient of the logarithm": ("N=16384 temperature=1.3 digits=3", "0f3EAAAAD2", "0fBEAAAAD2"),
    "draws.py: Box-Muller's first coefficient": (
        "fp16 position-major, odd, noise", "0f37CCF5CE", "0f47CCF5CE",
    ),
    "rows.py: twice the inverse of a softcap": ("softcap", "0f40000000", "0f40100000"),
    "sample_tokens.py: the scale of the bounds": ("many flat rows", "0fBF317218", "0fBEB17218"),
    "sample_tokens.py: how near a rival may come": ("many peaked rows", "0f38D1B717", "0fCE6E6B28"),
    "sample_tokens.py: the base of exp": ("bf16 aligned", "0f3FB8AA3B", "0f3FB8AA5B"),
    "select.py: the key of known positions": ("N=256 temperature=0.0 digits=0", "-8388608", "-1073741824"),
    "commit_tokens.py: the largest entropy": ("entropy_bound N=300 temperature=0.0", "0f42800000", "0f3C000000"),
    "draws.py: a coefficient of the exponential": ("paper bf16", "0f3E75FCDE", "0f3E75FEDE"),
    "differential_sample.py: the codes of a nat": ("first step", "0f45000000", "0f45000100"),
    "differential_sample.py: the clipped difference": ("official fp16", "0f358637BD", "0f368637BD"),
    "differential_sample.py: what is left out of the softmax": (
        "paper share 1, peaked", "0fC1E00000", "0fC0E00000",
    ),
    "w4a16_linear.py: the bits of a nibble": ("w4a16 bf16, few rows, a short group", "0x0F0F0F0F", "0x070F0F0F"),
    "w4a16_linear.py: the order of the nibbles": ("w4a16 bf16, few rows, a short group", "0x7441", "0x7442"),
    "w4a16_linear.py: 2^23": ("w4a16 bf16, few rows, a short group", "0f4B000000", "0f4B000001"),
    "w4a8_linear.py: the bits of a nibble": ("w4a8 bf16, few rows", "0xF0F0F0F0", "0x70F0F0F0"),
    "w4a8_linear.py: the sign of a nibble": ("w4a8 bf16, few rows", "0x80808080", "0x80808000"),
    "w4a8_linear.py: the bits of 1.5 * 2^23": ("w4a8 bf16, few rows", "1262485504", "1262485505"),
    "w4a8_linear.py: 1.5 * 2^19": ("w4a8 bf16, few rows", "0fC9400000", "0fC9400001"),
    "w4a8_linear.py: the smallest scale": ("w4a8 fp32, extreme rows", "0f00800000", "0f3F800000"),
    "differential_sample.py: p = q": ("extreme rows, paper", "0f3A000000", "0f00000000"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_changed_constant_turns_it_red(mutation):
    name, constant, changed = MUTATIONS[mutation]
    case = case_named(name)
    arguments = case.make_arguments()
    expected = case.expected(*arguments)

    found = []

    def edit(ptx: str) -> str:
        found.append(constant in ptx)
        return ptx.replace(constant, changed)

    with standin_gpu(80, edit_ptx=edit):
        outputs = case.run(arguments)
    assert any(found), f"{constant} is not in the kernels any more"
    with pytest.raises(AssertionError):
        case.check(arguments, expected, outputs)


def drop_barrier(ptx: str, kernel: str, which: int) -> str:
    if f".entry {kernel}(" not in ptx:
        return ptx
    barriers = list(re.finditer(r"bar\.sync\s+0;", ptx))
    assert which < len(barriers), "the kernel has fewer barriers now"
    return ptx[: barriers[which].start()] + ptx[barriers[which].end() :]


# barriers of a debug_barrier may order what one warp happens to do alone; these guard exchanges
@pytest.mark.parametrize(
    "name, kernel, barrier",
    [
        ("bf16 aligned", "sample_tokens_kernel", 0),
        ("N=4097 temperature=1.3 digits=3", "mask_by_confidence_kernel", 1),
        ("more positions than registers hold", "select_kernel", 1),
        ("w4a8 bf16, groups of 128", "quantize_rows_kernel", 0),
        ("w4a8 bf16, groups of 128", "w4a8_linear_kernel", 0),
        ("w4a16 bf16, groups of 128", "w4a16_linear_kernel", 0),
        ("w4a16 bf16, dequantized", "dequantize_kernel", 0),
    ],
)
def test_a_dropped_barrier_turns_it_red(name, kernel, barrier):
    case = case_named(name)
    arguments = case.make_arguments()
    with (
        standin_gpu(80, edit_ptx=lambda ptx: drop_barrier(ptx, kernel, barrier)),
        pytest.raises(PtxError, match="race"),
    ):
        case.run(arguments)


@pytest.mark.parametrize("name", ["w4a8 bf16, groups of 128", "w4a16 bf16, groups of 128", "w4a8 bf16, few rows"])
def test_a_wait_for_copies_that_waits_for_too_few_turns_it_red(name):
    case = case_named(name)
    arguments = case.make_arguments()
    expected = case.expected(*arguments)
    found = []

    def edit(ptx: str) -> str:
        ptx, edits = re.subn(r"cp\.async\.wait_group\s+[1-9]\d*;", "cp.async.wait_group 9;", ptx)
        found.append(edits)
        return ptx

    # besides, the copies land while wgmma reads
    with standin_gpu(90, edit_ptx=edit, check_races=False):
        outputs = case.run(arguments)
    assert any(found), "the kernel waits for all copies now"
    with pytest.raises(AssertionError):
        case.check(arguments, expected, outputs)
