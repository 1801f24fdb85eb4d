"""merge_tokens and unmerge_tokens: means to the bit, rows of one token, layouts, and nothing of nothing."""

import pytest
import torch
from merging import DTYPES, ROUNDING, listed, same_bits, same_match, tokens_of

from mgt_kernels import Match, match_tokens, merge_tokens, reference, unmerge_tokens


def exact_means(x, match):
    """What the definition says, in float32 and in the order of the tokens; rows of one token are copied."""
    y = x.new_zeros(len(x), match.num_rows, x.shape[2])
    for b in range(len(x)):
        for m in range(match.num_rows):
            members = (match.row[b] == m).nonzero().flatten().tolist()
            if len(members) == 1:
                y[b, m] = x[b, members[0]]
            elif members:
                total = x[b, members[0]].float()
                for i in members[1:]:
                    total = total + x[b, i].float()
                y[b, m] = (total / len(members)).to(x.dtype)
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 7, 15, 16, 17, 100, 1024])
def test_means_are_exact(channels, dtype, backend):
    generator = torch.Generator().manual_seed(channels)
    x = tokens_of((2, (4, 6), channels), dtype, seed=channels)
    for most in (2, 9, 24):
        match = listed(torch.randint(0, most, (2, 24), generator=generator), num_rows=most)
        y = merge_tokens(x, match, backend=backend)
        assert y.dtype == dtype and y.shape == (2, most, channels) and y.is_contiguous()
        truth = reference.merge_tokens(x, match.row, most)
        # n - 1 additions and a division in float32, each within half a unit of what is at most the sum of the sizes
        size = reference.merge_tokens(x.abs(), match.row, most)
        allowed = 1.01 * 24 * ROUNDING * size
        if dtype != torch.float32:
            # half a unit of the last place, of denormals too
            info = torch.finfo(dtype)
            allowed += (
                torch.maximum(truth.abs(), torch.tensor(info.smallest_normal, dtype=torch.float64))
                * info.eps
                / 2
                * 1.01
            )
        assert ((y.double() - truth).abs() <= allowed).all()
        if backend != "reference":
            assert torch.equal(y, exact_means(x, match))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_one_token_keep_its_bits(dtype, backend):
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    # quiet and signalling NaN with a payload, infinities, zeros of both signs, denormals
    odd = {
        torch.float32: (0x7FA00001, 0x7FC12345, -0x3EDCBB, 0x7F800000, -0x800000, 0, -(2**31), 1, 0x007FFFFF),
        torch.bfloat16: (0x7FA1, 0x7FC3, -0x3D, 0x7F80, -0x80, 0, -(2**15), 1, 0x007F),
        torch.float16: (0x7D01, 0x7E11, -0x1F, 0x7C00, -0x400, 0, -(2**15), 1, 0x03FF),
    }[dtype]
    for channels in (9, 16, 25):
        token = torch.tensor((odd * 3)[:channels], dtype=kind).view(dtype)
        x = torch.stack([token, torch.ones_like(token), token.flip(0), torch.full_like(token, 3.0)])[None]
        match = listed(torch.tensor([[0, 1, 2, 1]]))
        y = merge_tokens(x, match, backend=backend)
        assert same_bits(y[0, 0], x[0, 0]) and same_bits(y[0, 2], x[0, 2]) and (y[0, 1] == 2).all()
        back = unmerge_tokens(y, match, backend=backend)
        assert same_bits(back[0, 0], x[0, 0]) and same_bits(back[0, 2], x[0, 2])
        # and among others they count
        y = merge_tokens(x, listed(torch.tensor([[0, 0, 1, 1]])), backend=backend)
        assert torch.equal(y[0, 0].isnan(), token.isnan()) and torch.equal(y[0, 0].isinf(), token.isinf())


def test_halves_are_rounded_once_and_to_even(backend):
    for dtype, unit in ((torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)):
        pairs = [(1, 1 + unit, 1), (1 + unit, 1 + 2 * unit, 1 + 2 * unit), (1 + 2 * unit, 1 + 3 * unit, 1 + 2 * unit)]
        # what is between two denormals goes to the even one, and the largest whose sum float32 holds stays
        most = torch.finfo(dtype).max / (2 if dtype == torch.bfloat16 else 1)
        least = torch.finfo(dtype).smallest_normal * unit
        pairs += [(most, most, most), (least, 0, 0), (3 * least, 0, 2 * least), (-3 * least, 0, -2 * least)]
        first, second, expected = (torch.tensor(values, dtype=dtype) for values in zip(*pairs, strict=True))
        x = torch.stack([first, second])[None]
        y = merge_tokens(x, listed(torch.zeros(1, 2, dtype=torch.int64)), backend=backend)
        assert torch.equal(y[0, 0], expected)
    # 2^-9 past the middle of two bfloat16 numbers, which rounding to float16 on the way would lose
    x = torch.tensor([1.0, 1.0, 1.0, 1.015625 + 2.0**-6]).bfloat16().view(1, 4, 1)
    y = merge_tokens(x, listed(torch.zeros(1, 4, dtype=torch.int64)), backend=backend)
    assert float(y) == float(torch.tensor((3 + 1.015625 + 2.0**-6) / 4).bfloat16())


VIEWS = {
    "contiguous": lambda x: x,
    "stepped tokens": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "stepped samples": lambda x: x.repeat_interleave(3, dim=0)[1::3],
    "part of the channels": lambda x: torch.cat([x, x + 1, x], dim=2)[..., : x.shape[2]],
    "tokens before samples": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda x: x.mT.contiguous().mT,
    "stepped channels": lambda x: x.repeat_interleave(2, dim=2)[..., ::2],
    "offset": lambda x: torch.cat([x.new_ones(3), x.flatten()])[3:].view(x.shape),
    "negated": lambda x: torch._neg_view(-x),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_do_not_matter(view, dtype, backend):
    for channels in (1, 7, 16, 33):
        x = tokens_of((3, (4, 6), channels), dtype)
        odd = VIEWS[view](x)
        assert torch.equal(odd, x)
        match = match_tokens(x, (4, 6), ratio=0.4, seed=1, backend=backend)
        assert same_match(match_tokens(odd, (4, 6), ratio=0.4, seed=1, backend=backend), match)
        y = merge_tokens(x, match, backend=backend)
        assert same_bits(merge_tokens(odd, match, backend=backend), y)
        assert same_bits(unmerge_tokens(VIEWS[view](y), match, backend=backend), unmerge_tokens(y, match))
        # the match's own tensors too
        other = Match(*(t.T.contiguous().T for t in match[:3]), match.num_rows)
        assert same_bits(merge_tokens(x, other, backend=backend), y)
        assert same_bits(unmerge_tokens(y, other, backend=backend), unmerge_tokens(y, match))


def test_what_is_expanded_is_read_in_place(backend):
    x = tokens_of((3, (4, 6), 16))
    match = match_tokens(x, (4, 6), ratio=0.5, seed=torch.arange(3), backend=backend)
    # a rotary table, of which all samples have the same rows, and one token for all
    for table in (torch.randn(24, 10)[None].expand(3, -1, -1), torch.randn(10).expand(3, 24, -1)):
        assert same_bits(
            merge_tokens(table, match, backend=backend), merge_tokens(table.contiguous(), match, backend=backend)
        )
        few = table[:, :12]
        assert same_bits(unmerge_tokens(few, match, backend=backend), unmerge_tokens(few.contiguous(), match))
        expanded = match_tokens(table, (4, 6), ratio=0.5, backend=backend)
        assert same_match(expanded, match_tokens(table.contiguous(), (4, 6), ratio=0.5, backend=backend))
    # one channel in the place of all
    wide = torch.randn(3, 24, 1).expand(-1, -1, 5)
    assert same_bits(
        merge_tokens(wide, match, backend=backend), merge_tokens(wide.contiguous(), match, backend=backend)
    )


def test_nothing_is_merged_of_no_samples_or_no_channels(backend):
    empty = torch.empty(0, 24, 5)
    match = match_tokens(empty, (4, 6), ratio=0.5, seed=torch.empty(0, dtype=torch.int64), backend=backend)
    assert match.num_rows == 12 and match.row.shape == match.members.shape == (0, 24) and match.starts.shape == (0, 25)
    assert merge_tokens(empty, match, backend=backend).shape == (0, 12, 5) and match.sizes.shape == (0, 12)
    assert unmerge_tokens(empty[:, :12], match, backend=backend).shape == (0, 24, 5)
    match = match_tokens(empty, (4, 6), threshold=0.5, backend=backend)
    assert match.num_rows == 0 and merge_tokens(empty, match, backend=backend).shape == (0, 0, 5)
    assert unmerge_tokens(empty[:, :0], match, backend=backend).shape == (0, 24, 5)
    match = match_tokens(torch.ones(2, 24, 1), (4, 6), ratio=0.5, backend=backend)
    assert merge_tokens(torch.ones(2, 24, 0), match, backend=backend).shape == (2, 12, 0)
    assert unmerge_tokens(torch.ones(2, 12, 0), match, backend=backend).shape == (2, 24, 0)


def test_inputs_are_kept(backend):
    x = tokens_of((2, (4, 6), 9))
    copy = x.clone()
    match = match_tokens(x, (4, 6), ratio=0.5, backend=backend)
    copies = [t.clone() for t in match[:3]]
    unmerge_tokens(merge_tokens(x, match, backend=backend), match, backend=backend)
    assert same_bits(x, copy) and all(map(torch.equal, match[:3], copies))


def test_the_comparison_can_fail(monkeypatch):
    oracle = reference.merge_tokens

    def total(x, row, num_rows):
        sizes = torch.zeros(len(x), num_rows).scatter_add_(1, row, torch.ones(row.shape))
        return oracle(x, row, num_rows) * sizes[..., None]

    monkeypatch.setattr(reference, "merge_tokens", total)
    with pytest.raises(AssertionError):
        test_means_are_exact(16, torch.float32, "auto")
