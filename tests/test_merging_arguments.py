"""What match_tokens, merge_tokens and unmerge_tokens refuse, and with which words."""

import math

import numpy as np
import pytest
import torch
from merging import DTYPES, listed, same_match, tokens_of

import mgt_kernels
from mgt_kernels import Match, match_tokens, merge_tokens, unmerge_tokens

GRID = (4, 6)
X = tokens_of((2, GRID, 5))
MATCH = match_tokens(X, GRID, ratio=0.5)
Y = merge_tokens(X, MATCH)
NUMBER = "expected a number"


def changed(**fields):
    """MATCH with other fields, or with a few elements of its own ones changed."""
    made = {}
    for name, change in fields.items():
        if isinstance(change, dict):
            made[name] = getattr(MATCH, name).clone()
            for index, value in change.items():
                made[name][index] = value
        else:
            made[name] = change
    return MATCH._replace(**made)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(x=[1.0]), TypeError, "x: expected a tensor, got list"),
        (
            dict(x=X.double()),
            TypeError,
            "x: expected dtype torch.float32 or torch.bfloat16 or torch.float16, got torch.fl",
        ),
        (dict(x=X[0]), ValueError, "x: expected 3 dimensions, got shape (24, 5)"),
        (dict(x=X.to_sparse()), TypeError, "x: expected a dense tensor"),
        (dict(x=X[..., :0]), ValueError, "x: expected at least one channel, got shape (2, 24, 0)"),
        (dict(grid=24), TypeError, "grid: expected (height, width), got 24"),
        (dict(grid=(2, 3, 4)), TypeError, "grid: expected (height, width), got (2, 3, 4)"),
        (dict(grid=(4.0, 6)), TypeError, "grid: expected an integer, got float"),
        (dict(grid=(True, 24)), TypeError, "grid: expected an integer, got a bool"),
        (dict(grid=(3, 8)), ValueError, "grid: expected even sides, which 2 x 2 cells tile, got (3, 8)"),
        (dict(grid=(8, 3)), ValueError, "grid: expected even sides, which 2 x 2 cells tile, got (8, 3)"),
        (dict(grid=(0, 6)), ValueError, "grid: expected even sides, which 2 x 2 cells tile, got (0, 6)"),
        (dict(grid=(-4, -6)), ValueError, "grid: expected even sides, which 2 x 2 cells tile, got (-4, -6)"),
        (dict(grid=(4, 8)), ValueError, "grid: expected sides whose product is the 24 tokens of x, got (4, 8)"),
        (dict(ratio=None), ValueError, "ratio, threshold: expected one of them, got neither"),
        (dict(threshold=0.5), ValueError, "ratio, threshold: expected one of them, got both"),
        *(
            (dict(ratio=value), ValueError, f"ratio: expected a number within [0, 0.75], got {value}")
            for value in (0.76, -0.1, -1e-9, 1, 3e38)
        ),
        *(
            (dict(ratio=value), ValueError, f"ratio: expected a finite number, got {value}")
            for value in (math.nan, math.inf, -math.inf, 1e39)
        ),
        *(
            (dict(ratio=None, threshold=value), ValueError, f"threshold: expected a number within [-1, 1], got {value}")
            for value in (1.01, -1.0000001, 3)
        ),
        (dict(ratio=None, threshold=math.nan), ValueError, "threshold: expected a finite number, got nan"),
        *(
            (dict(ratio=None) | {name: value}, TypeError, f"{name}: {NUMBER}, got {words}")
            for name in ("ratio", "threshold")
            for value, words in (
                (True, "bool"),
                ("0.5", "str"),
                (0.5j, "complex"),
                (np.ones(2), "ndarray"),
                (torch.tensor(0.5), "a tensor; it decides on sizes"),
            )
        ),
        (dict(seed=0.5), TypeError, "seed: expected an integer, got float"),
        (dict(seed=torch.zeros(3, dtype=torch.int64)), ValueError, "seed: expected shape (2,), got (3,)"),
        (dict(seed=torch.zeros(2)), TypeError, "seed: expected an integer dtype"),
        (dict(seed=2**63), ValueError, "seed: expected a 64-bit signed integer"),
        (dict(step=-1), ValueError, "step: expected a value within [0, 2^32), got -1"),
        (dict(step=torch.tensor(2**32)), ValueError, "step: expected a value within [0, 2^32), got 4294967296"),
        (dict(step=0.5), TypeError, "step: expected an integer, got float"),
        (dict(backend="gpu"), ValueError, "backend: expected one of"),
        (dict(backend="triton"), RuntimeError, "backend: 'triton' runs on CUDA tensors"),
    ],
)
@pytest.mark.parametrize("path", ["auto", "reference"])
def test_bad_arguments_of_a_match_are_named(change, error, words, path):
    with pytest.raises(error) as caught:
        match_tokens(**(dict(x=X, grid=GRID, ratio=0.5, backend=path) | change))
    assert words in str(caught.value)


def test_ratios_and_grids_of_any_kind_are_taken(backend):
    for ratio in (np.float32(0.5), np.float64(0.5), np.array(0.5), np.float16(0.5)):
        assert same_match(match_tokens(X, GRID, ratio=ratio, backend=backend), MATCH)
    for grid in (list(GRID), torch.Size(GRID), tuple(map(np.int64, GRID))):
        assert same_match(match_tokens(X, grid, ratio=0.5, backend=backend), MATCH)
    whole = match_tokens(X, GRID, threshold=-1, backend=backend)
    assert same_match(whole, match_tokens(X, GRID, threshold=np.float32(-1), backend=backend)) and whole.num_rows == 6


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(x=X.double()), TypeError, "x: expected dtype torch.float32 or"),
        (dict(x=X[0]), ValueError, "x: expected 3 dimensions, got shape (24, 5)"),
        (dict(match=tuple(MATCH)), TypeError, "match: expected a Match, as match_tokens returns it, got tuple"),
        (dict(match=MATCH.row), TypeError, "match: expected a Match, as match_tokens returns it, got Tensor"),
        (
            dict(match=match_tokens(X[:1], GRID, ratio=0.5)),
            ValueError,
            "match.row: expected shape (2, 24), got (1, 24)",
        ),
        (dict(match=changed(row=MATCH.row.int())), TypeError, "match.row: expected dtype torch.int64, got torch.int32"),
        (dict(match=changed(row=MATCH.row[0])), ValueError, "match.row: expected 2 dimensions, got shape (24,)"),
        (dict(match=changed(row=MATCH.row.to("meta"))), ValueError, "match.row: expected device cpu like the first"),
        (dict(match=changed(row=None)), TypeError, "match.row: expected a tensor, got NoneType"),
        (dict(match=changed(members=MATCH.members.float())), TypeError, "match.members: expected dtype torch.int64"),
        (
            dict(match=changed(members=MATCH.members[:, 1:])),
            ValueError,
            "match.members: expected shape (2, 24), got (2, 23)",
        ),
        (dict(match=changed(members=MATCH.members.to("meta"))), ValueError, "match.members: expected device cpu"),
        (
            dict(match=changed(starts=MATCH.starts[:, 1:])),
            ValueError,
            "match.starts: expected shape (2, 25), got (2, 24)",
        ),
        (dict(match=changed(starts=MATCH.starts.int())), TypeError, "match.starts: expected dtype torch.int64"),
        (dict(match=changed(starts=MATCH.starts.to("meta"))), ValueError, "match.starts: expected device cpu"),
        *(
            (
                dict(match=changed(num_rows=value)),
                ValueError,
                f"match.num_rows: expected a value within [1, 24], the tokens, got {value}",
            )
            for value in (0, -1, 25, 2**62)
        ),
        (dict(match=changed(num_rows=12.0)), TypeError, "match.num_rows: expected an integer, got float"),
        (dict(backend="gpu"), ValueError, "backend: expected one of"),
    ],
)
@pytest.mark.parametrize("path", ["auto", "reference"])
@pytest.mark.parametrize("op", [merge_tokens, unmerge_tokens])
def test_bad_arguments_of_a_merge_are_named(op, change, error, words, path):
    good = dict(x=X if op is merge_tokens else Y, match=MATCH, backend=path)
    with pytest.raises(error) as caught:
        op(**(good | change))
    assert words in str(caught.value)


def test_tokens_and_rows_of_another_number_are_named(backend):
    with pytest.raises(ValueError) as caught:
        merge_tokens(X[:, :23], MATCH, backend=backend)
    assert str(caught.value) == "x: expected 24 tokens, as the match has, got shape (2, 23, 5)"
    with pytest.raises(ValueError) as caught:
        unmerge_tokens(X, MATCH, backend=backend)
    assert str(caught.value) == "x: expected 12 rows, as the match has, got shape (2, 24, 5)"
    # an empty batch has no rows only where all samples of it have none
    none = match_tokens(X[:0], GRID, threshold=0.5)
    with pytest.raises(ValueError, match=r"match.num_rows: expected a value within \[1, 24\], the tokens, got 25"):
        merge_tokens(X[:0], none._replace(num_rows=25), backend=backend)


BIG = 2**62
# of the second sample, so that all are looked at
BROKEN = {
    "a row that is not there": (unmerge_tokens, dict(row={(1, 23): 12})),
    "a negative row": (unmerge_tokens, dict(row={(1, 0): -1})),
    "a huge row": (unmerge_tokens, dict(row={(1, 7): BIG})),
    "a member that is no token": (merge_tokens, dict(members={(1, 23): 24})),
    "a negative member": (merge_tokens, dict(members={(1, 0): -1})),
    "a huge member": (merge_tokens, dict(members={(1, 0): -BIG})),
    "a member of no row": (merge_tokens, dict(starts={(1, 0): 1})),
    "a negative start": (merge_tokens, dict(starts={(1, 0): -1})),
    "members before the first": (merge_tokens, dict(starts={(1, 5): -1})),
    "members past the last": (merge_tokens, dict(starts={(1, 5): 25})),
    "huge starts": (merge_tokens, dict(starts={(1, 5): BIG, (1, 6): BIG})),
    "starts that fall": (merge_tokens, dict(starts={(1, 3): 0})),
    "an end before the last token": (merge_tokens, dict(starts={(1, 12): 23})),
    "fewer rows than there are": (merge_tokens, dict(num_rows=11)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_match_is_named(case, backend):
    op, fields = BROKEN[case]
    match = changed(**fields)
    for channels in (5, 0):
        x = (X if op is merge_tokens else Y)[..., :channels]
        with pytest.raises(ValueError) as caught:
            op(x, match, backend=backend)
        sample = 0 if "num_rows" in fields else 1
        assert str(caught.value) == (
            f"match: sample {sample} has rows or members out of range; expected one that match_tokens returned"
        )


def test_rows_past_the_last_are_zeros(backend):
    match = MATCH._replace(num_rows=15)
    y = merge_tokens(X, match, backend=backend)
    assert torch.equal(y[:, :12], merge_tokens(X, MATCH, backend=backend)) and not y[:, 12:].any()
    assert torch.equal(unmerge_tokens(y, match, backend=backend), unmerge_tokens(y[:, :12], MATCH, backend=backend))
    match = listed(torch.tensor([[3, 3, 1, 3]]))
    y = merge_tokens(torch.ones(1, 4, 3), match, backend=backend)
    assert y[0, :, 0].tolist() == [0, 1, 0, 1] and match.sizes.tolist() == [[0, 1, 0, 3]]


def test_only_the_parts_that_are_read_count(backend):
    # what the one op reads of a match the other does not
    wrong = torch.full_like(MATCH.row, -7)
    found = merge_tokens(X, MATCH._replace(row=wrong), backend=backend)
    assert torch.equal(found, merge_tokens(X, MATCH, backend=backend))
    match = Match(MATCH.row, wrong, torch.full_like(MATCH.starts, -7), 12)
    assert torch.equal(unmerge_tokens(Y, match, backend=backend), unmerge_tokens(Y, MATCH, backend=backend))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "too large"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_bad_token_is_named(dtype, value, backend):
    if value == "too large":
        if dtype == torch.float16:
            pytest.skip("their squares fit into float32")
        value = 1.9e19
    words = "holds NaN or inf, or values whose squares float32 cannot sum; expected finite values"
    grid, seed = (10, 14), torch.tensor([4, 5, 6])
    clean = tokens_of((3, grid, 20)).to(dtype)
    # destinations and sources, below and above the first panel and the first tile
    for sample, first in ((0, 0), (0, 1), (1, 17), (2, 73), (2, 138), (2, 139)):
        x = clean.clone()
        for position in {first, min(first + 1, 139), 139}:
            x[sample, position, first % 20] = value
        x[sample + 1 :, :3] = value
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            with pytest.raises(ValueError) as caught:
                match_tokens(x, grid, ratio=0.5, seed=seed, backend=backend)
            assert str(caught.value) == f"x: sample {sample}, position {first} {words}"


def test_sums_of_squares_may_reach_the_largest_float(backend):
    # 16 squares of 2^62 are 2^128, one less than that is a float
    x = torch.full((1, 4, 16), 2.0**62)
    x[..., -1] = 0
    match = match_tokens(x, (2, 2), ratio=0.5, backend=backend)
    assert match.row.tolist() == [[0, 0, 0, 1]]
    x[0, 2, -1] = 2.0**62
    with pytest.raises(ValueError, match="x: sample 0, position 2 holds NaN or inf, or values whose squares"):
        match_tokens(x, (2, 2), ratio=0.5, backend=backend)


def test_an_instruction_set_that_is_missing_is_named():
    missing = {"avx512", "avx512_vnni", "avx512_bf16", "amx"} - set(mgt_kernels.info()["isas"])
    for isa in sorted(missing):
        for call in (
            lambda isa: match_tokens(X, GRID, ratio=0.5, backend=isa),
            lambda isa: merge_tokens(X, MATCH, backend=isa),
            lambda isa: unmerge_tokens(Y, MATCH, backend=isa),
        ):
            with pytest.raises(RuntimeError, match=isa):
                call(isa)
