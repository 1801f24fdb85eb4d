"""What the tests of token merging share: tokens, matches by hand, and whether a match is the exact one."""

import torch

from mgt_kernels import Match

# of float32 and its sums
ROUNDING = 2.0**-24
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tokens_of(shape, dtype=torch.float32, seed=0):
    batch, (height, width), channels = shape
    generator = torch.Generator().manual_seed(seed)
    # what they share, as the states of a model do
    common = torch.randn(batch, 1, channels, generator=generator)
    x = torch.randn(batch, height * width, channels, generator=generator) + common
    return (x * torch.rand(batch, height * width, 1, generator=generator).mul(9).exp2()).to(dtype)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def same_bits(first, second):
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(bits(first), bits(second))


def same_match(first, second):
    return first.num_rows == second.num_rows and all(map(torch.equal, first[:3], second[:3]))


def decisions(match, to):
    """Which tokens are merged and what into, (B, N) each, from the rows; checks all that a match says of itself."""
    batch, num_tokens = match.row.shape
    merged, chosen = torch.zeros(batch, num_tokens, dtype=torch.bool), torch.zeros(batch, num_tokens, dtype=torch.int64)
    for b in range(batch):
        row, num_rows = match.row[b], int(match.row[b].max()) + 1
        assert num_rows <= match.num_rows
        owner = torch.full((num_rows,), -1)
        owner[row[to[b]]] = to[b]
        # a row without a destination has one token, which is kept
        merged[b] = owner[row] >= 0
        merged[b, to[b]] = False
        chosen[b] = owner[row]
        assert torch.equal(row[~merged[b]], torch.arange(num_rows))
        members = [i for m in range(num_rows) for i in (row == m).nonzero().flatten().tolist()]
        starts = [int((row < m).sum()) for m in range(num_tokens + 1)]
        assert match.members[b].tolist() == members and match.starts[b].tolist() == starts
        sizes = [int((row == m).sum()) for m in range(match.num_rows)]
        assert match.sizes[b].tolist() == sizes and sum(sizes) == num_tokens
    return merged, chosen


def listed(row, num_rows=None):
    """The match of any rows."""
    num_tokens = row.shape[1]
    starts = torch.stack([(row < m).sum(-1) for m in range(num_tokens + 1)], dim=1)
    return Match(row, row.argsort(dim=-1, stable=True), starts, num_rows or int(row.max()) + 1)


def rounding_bound(channels):
    """How far a cosine of float32 may be from the exact one, where nothing underflows.

    With u = 2^-24 and g = C u / (1 - C u): the product of two tokens of length 1 is summed with an error of at most g;
    each sum of squares has a relative error of g, half as much under the root, and the root, its inverse and the
    multiplication by it round once more each. 1 % covers the products of these errors and float64's own.
    """
    summing = channels * ROUNDING / (1 - channels * ROUNDING)
    return 1.01 * (2 * summing + 6 * ROUNDING)


def check_match(x, match, to, *, num_merged=None, threshold=None):
    """A match is the exact one but where cosines are within the rounding; returns how many decisions differ."""
    merged, chosen = decisions(match, to)
    y = x.double()
    norm = y.norm(dim=-1, keepdim=True)
    # float32 squares neither under- nor overflow
    assert ((norm == 0) | ((norm > 1e-15) & (norm < 1e15))).all()
    unit = torch.where(norm > 0, y / norm, 0.0)
    cosine = unit @ unit.gather(1, to[..., None].expand(-1, -1, x.shape[2])).mT
    best = cosine.amax(-1)
    bound, num_different = rounding_bound(x.shape[2]), 0
    for b in range(len(x)):
        is_source = torch.ones(x.shape[1], dtype=torch.bool)
        is_source[to[b]] = False
        index = torch.zeros(x.shape[1], dtype=torch.int64)
        index[to[b]] = torch.arange(to.shape[1])
        joined = merged[b].nonzero().flatten()
        similarity = cosine[b, joined, index[chosen[b, joined]]]
        assert (similarity >= best[b, joined] - 2 * bound).all()
        left = is_source & ~merged[b]
        if num_merged is not None:
            assert len(joined) == num_merged
            if 0 < num_merged:
                last = best[b][is_source].sort(descending=True).values[num_merged - 1]
                assert (best[b, joined] >= last - 2 * bound).all() and (best[b, left] <= last + 2 * bound).all()
        else:
            assert (best[b, joined] >= threshold - bound).all() and (best[b, left] < threshold + bound).all()
        num_different += int((similarity < best[b, joined]).sum())
    return num_different
