"""Cases of token merging, against the same in PyTorch's ops and, where it is installed, tomesd's."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import mgt_kernels
from mgt_kernels import cpu, reference

from .case import AbsentError, Call, Case, Contestant, Job, Setting, Work
from .steps import device_of, gather_peers

RATIO = 0.5
# of the rows of a match that are to be the oracle's; two cosines may lie within their rounding
_EQUAL_ROWS = 0.999


def merging_case(
    op: str = "match_tokens",
    *,
    side: int = 32,
    num_channels: int = 1024,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    threads: int = 2,
) -> Case:
    """match_tokens, or merge_tokens of half of a square grid's tokens."""
    setting = Setting(
        op, f"ratio {RATIO}", f"{side} x {side} tokens", f"B={batch} N={side * side} C={num_channels}", dtype,
        backend=backend, threads=threads,
    )  # fmt: skip

    def prepare() -> Job:
        x = torch.randn(batch, side * side, num_channels, generator=torch.Generator().manual_seed(0))
        x = x.to(device_of(backend), dtype)
        options: dict[str, Any] = {"ratio": RATIO, "seed": 0, "backend": backend}
        match = mgt_kernels.match_tokens(x, (side, side), **options)
        run: Callable[[], Any]
        if op == "match_tokens":
            run = partial(mgt_kernels.match_tokens, x, (side, side), **options)
        else:
            run = partial(mgt_kernels.merge_tokens, x, match, backend=backend)

        def check() -> None:
            result: Any = run()
            if op == "match_tokens":
                oracle = mgt_kernels.match_tokens(x, (side, side), **{**options, "backend": "reference"})
                share = float((result.row == oracle.row).double().mean())
                if share < _EQUAL_ROWS:
                    raise AssertionError(f"{1 - share:.2%} of the rows differ from the oracle's")
            else:
                truth = reference.merge_tokens(x, match.row, match.num_rows)
                torch.testing.assert_close(
                    result.double(), truth, atol=1e-6 if dtype is torch.float32 else 0.02, rtol=0
                )

        peers, skipped = gather_peers({name: partial(make, op, x, match) for name, make in _PEERS.items()})
        num_destinations = side * side // 4
        kernel = cpu.kernel_isa(op, backend) if x.device.type == "cpu" else ""
        has_peak = op == "match_tokens" and kernel in ("avx2", "avx512")
        work = Work(
            bytes_moved=(x.numel() + (0 if op == "match_tokens" else batch * match.num_rows * num_channels))
            * x.element_size(),
            num_positions=batch * side * side,
            operations=2 * batch * 3 * num_destinations**2 * num_channels if has_peak else 0,
            arithmetic=(kernel, "float32") if has_peak else ("", ""),
        )
        return Job(work, Call(run), peers, check, skipped)

    return Case(setting, prepare, bytes_per_position=math.inf)


def _pytorch(op: str, x: Tensor, match: mgt_kernels.Match) -> Contestant:
    side = math.isqrt(x.shape[1])
    if op == "merge_tokens":
        index = match.row[..., None].expand_as(x)
        empty = x.new_zeros(len(x), match.num_rows, x.shape[2])
        return Call(lambda: empty.scatter_reduce(1, index, x, "mean", include_self=False))
    cells = torch.arange(side * side, device=x.device).view(side, side)
    to = cells[::2, ::2].flatten()
    is_source = torch.ones(side * side, dtype=torch.bool, device=x.device)
    is_source[to] = False
    source = is_source.nonzero().flatten()

    def matched() -> tuple[Tensor, Tensor]:
        unit = functional.normalize(x, dim=-1)
        cosine, nearest = (unit[:, source] @ unit[:, to].transpose(1, 2)).max(-1)
        return cosine.argsort(-1, descending=True)[:, : int(RATIO * side * side)], nearest

    return Call(matched)


def _tomesd(op: str, x: Tensor, match: mgt_kernels.Match) -> Contestant:
    try:
        from tomesd.merge import bipartite_soft_matching_random2d
    except ImportError:
        raise AbsentError("pip install tomesd") from None
    side = math.isqrt(x.shape[1])
    generator = torch.Generator(x.device).manual_seed(0)
    make = partial(bipartite_soft_matching_random2d, x, side, side, 2, 2, int(RATIO * side * side), generator=generator)
    if op == "match_tokens":
        return Call(make)
    merge, _ = make()
    return Call(partial(merge, x))


_PEERS = {"pytorch": _pytorch, "tomesd": _tomesd}
