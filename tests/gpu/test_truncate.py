"""What a truncated draw keeps on a GPU: exactly what the CPU keeps, whatever the row."""

import math
from typing import Any

import pytest
import torch
from cases import NUM_DRAW, PLAIN, Case, launcher_of, sample_tokens_case
from driver import draw_of, standin_gpu
from torch import Tensor

import mgt_kernels
from mgt_kernels import triton as kernels
from mgt_kernels.triton.rows import row_arguments
from mgt_kernels.triton.truncate import kept_from

INF, NAN = math.inf, math.nan
NUM_TOKENS = 530


def make_rows() -> Tensor:
    """Return rows (R, V) that are hard to cut: ties, values next to each other, of all sizes, few that weigh."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(6, NUM_TOKENS, generator=generator)
    steps = torch.arange(NUM_TOKENS).float()
    near = torch.full((NUM_TOKENS,), 3.0).view(torch.int32) + steps.int() % 97
    rows = [
        *(3 * normal[:2]), normal[2].round(), (normal[3] * 4).bfloat16().float(), 1e-4 * normal[4], 40 * normal[5],
        near.view(torch.float32), -0.04 * steps, steps * 0, -22.4 * steps / NUM_TOKENS, torch.exp(20 * normal[0]),
        torch.where(steps % 3 == 0, -INF, normal[1]), torch.where(steps == 7, 0.0, -21.5), 1e8 - 8 * steps,
        torch.where(steps == 7, 0.0, -INF), torch.where(steps % 2 == 0, 0.0, -0.0),
    ]  # fmt: skip
    return torch.stack(rows)


def kept_on_cpu(row: Tensor, **truncation: Any) -> Tensor:
    """Return which tokens (V,) the CPU keeps: of the others a known token has no probability."""
    num_tokens = len(row)
    drawn = mgt_kernels.sample_tokens(
        row.expand(1, num_tokens, -1).contiguous(), torch.arange(num_tokens)[None], mask_token_id=num_tokens, seed=0,
        step=0, rows="known", statistics=["known_logprob"], **truncation,
    )  # fmt: skip
    assert drawn.known_logprob is not None
    return drawn.known_logprob[0] > -INF


def bounds_of(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Return the bounds (R,) that the kernel finds of masked rows (1, R, V)."""
    tokens = torch.full(logits.shape[:2], logits.shape[2])
    draw = draw_of(logits, tokens, torch.tensor([1]), torch.tensor(0), logits.shape[2])
    bounds = kept_from(row_arguments(draw), "masked", top_k, top_p, min_p)
    assert bounds is not None
    return bounds[0]


SETTINGS = [
    (0, 0.5, 0.0), (0, 0.9, 0.0), (0, 1 - 2**-24, 0.0), (0, 0.37, 0.0), (1, 1.0, 0.0), (100, 1.0, 0.0),
    (529, 1.0, 0.0), (60, 0.8, 0.0), (0, 1.0, 0.1), (200, 0.95, 0.3),
]  # fmt: skip


def check_kept(settings: tuple[int, float, float], **changes: Any) -> None:
    rows = make_rows()
    top_k, top_p, min_p = settings
    # 16 bits and 17 positions: the groups of a position-major layout
    with standin_gpu(80, **changes):
        bounds = bounds_of(rows[None], *settings)
        by_position = bounds_of(rows.T.contiguous().T[None], *settings)
    assert torch.equal(bounds, by_position)
    for i, (row, bound) in enumerate(zip(rows, bounds, strict=True)):
        expected = kept_on_cpu(row, top_k=top_k or None, top_p=top_p, min_p=min_p)
        kept = (row >= bound) & (row > -INF)
        assert torch.equal(kept, expected), f"row {i}: {int(kept.sum())} kept, expected {int(expected.sum())}"


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_kept_tokens_are_the_cpus(settings):
    check_kept(settings)


# as PTX writes them: the half of a unit that rounds a weight, the units, a key that is a pivot, log(2)
@pytest.mark.parametrize(
    "settings, old, new",
    [
        ((0, 1 - 2**-24, 0.0), "0f3F000000", "0f3F7FFFFF"),
        ((0, 1 - 2**-24, 0.0), "0f4F000000", "0f4B000000"),
        ((100, 1.0, 0.0), "setp.ge.u32", "setp.gt.u32"),
        ((0, 1.0, 0.1), "0f3F317218", "0f3F517218"),
    ],
)
def test_a_change_turns_it_red(settings, old, new):
    found = []

    def edit(ptx: str) -> str:
        found.append(old in ptx)
        return ptx.replace(old, new)

    with pytest.raises(AssertionError, match="kept, expected"):
        check_kept(settings, edit_ptx=edit)
    assert all(found)


CASE = sample_tokens_case("what keeps all", 600, dtype=torch.float32, num_positions=2)


def changed(case: Case, **truncation: Any) -> tuple:
    """Return the arguments of a case with other settings of what is kept."""
    settings = dict(top_k=0, top_p=1.0, min_p=0.0, logprob_of="kept") | truncation
    return (*case.make_arguments()[: NUM_DRAW + 2], *settings.values())


@pytest.mark.parametrize("truncation", [dict(top_k=600), dict(top_p=1 - 2**-26, logprob_of="full"), dict(min_p=1e-50)])
def test_what_keeps_all_is_the_plain_draw(truncation):
    with standin_gpu(80, execute=False) as plain:
        launcher_of("sample_tokens")(*CASE.make_arguments())
    with standin_gpu(80, execute=False) as launches:
        launcher_of("sample_tokens")(*changed(CASE, **truncation))
    assert [launch.cubin for launch in launches] == [launch.cubin for launch in plain]


@pytest.mark.parametrize("logprob_of", ["kept", "full"])
def test_tensors_that_keep_all_give_the_bits_of_the_plain_draw(logprob_of):
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros(())
    with standin_gpu(80):
        plain = CASE.run(CASE.make_arguments())
        ours = CASE.run(changed(CASE, top_p=one, min_p=zero, logprob_of=logprob_of))
        # a softcap that is inf caps nothing, either
        draw, options = list(CASE.make_arguments()[:NUM_DRAW]), CASE.make_arguments()[NUM_DRAW:]
        draw[draw_of(*draw)._fields.index("softcap")] = torch.tensor(INF)
        uncapped = CASE.run((*draw, *options))
    for outputs in (ours, uncapped):
        assert all(torch.equal(x, y) for x, y in zip(outputs, plain, strict=True))


@pytest.mark.parametrize(
    "name, values",
    [("top_p", (0.0, -1.0, 1.0 + 1e-9, NAN)), ("min_p", (-0.1, 1.0, NAN)), ("softcap", (0.0, -3.0, NAN))],
)
def test_a_scalar_out_of_range_makes_every_row_a_bad_one(name, values):
    given = torch.zeros((), dtype=torch.float64)
    if name == "softcap":
        arguments = (*draw_of(*CASE.make_arguments()[: NUM_DRAW - 1], given), *PLAIN)
    else:
        arguments = changed(CASE, **{name: given, "logprob_of": "full"})
    masked = arguments[1] == arguments[4]
    for value in values:
        given.fill_(value)
        with standin_gpu(80):
            token_ids, logprob = CASE.run(arguments)
        assert torch.equal(token_ids, arguments[1])
        assert logprob[masked].isnan().all() and (logprob[~masked] == INF).all()


def test_infinity_in_any_half_is_bad_whatever_the_scales():
    logits = torch.zeros(3, 1, 2, 40)
    tokens, seed = torch.full((1, 2), 40), torch.tensor([3])
    for half in range(3):
        for guidance, scale, second_scale in (("nested", -1.5, -2.0), ("nested", 2.0, -0.5), ("dual", -1.0, -1.0)):
            cond, uncond, second = (x.clone() for x in logits)
            (cond, uncond, second)[half][0, 1, 5] = INF
            draw = draw_of(
                cond, tokens, seed, torch.tensor(0), 40, uncond, scale, second_uncond_logits=second,
                second_guidance_scale=second_scale, guidance=guidance, softcap=7.0,
            )  # fmt: skip
            with standin_gpu(80):
                _, logprob, _ = kernels.sample_tokens(draw, *PLAIN)
            assert logprob.isnan().tolist() == [[False, True]], (half, guidance)
