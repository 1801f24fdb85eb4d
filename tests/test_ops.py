"""The ops as PyTorch sees them: opcheck, torch.compile without a graph break, the floors of the house."""

import ast
from pathlib import Path

import pytest
import torch

import mgt_kernels

ROOT = Path(__file__).parent.parent
SAMPLE = (torch.randn(2, 5, 40), torch.full((2, 5), 40), torch.tensor([1, 2]), 3, 40)
MASK = (
    torch.zeros(2, 5, dtype=torch.int64),
    torch.zeros(2, 5),
    torch.tensor([1, 2]),
    torch.tensor([3, 4]),
    5,
    40,
)


@pytest.mark.parametrize("uncond", [None, torch.randn(2, 5, 40)])
def test_sample_tokens_passes_opcheck(uncond):
    torch.library.opcheck(torch.ops.mgt_kernels.sample_tokens, (*SAMPLE, uncond, 2.0, 0.5, 1.0, "auto"))


def test_mask_by_confidence_passes_opcheck():
    torch.library.opcheck(torch.ops.mgt_kernels.mask_by_confidence, (*MASK, 1.0, "auto"))


def test_a_step_compiles_without_a_graph_break():
    def step(logits, tokens, seed, mask_len):
        token_ids, logprob = mgt_kernels.sample_tokens(
            logits.permute(0, 2, 1), tokens, mask_token_id=40, seed=seed, step=3, temperature=0.8
        )
        return mgt_kernels.mask_by_confidence(
            token_ids, logprob, mask_len, mask_token_id=40, temperature=1.0, seed=seed, step=3
        )

    inputs = (torch.randn(2, 40, 6), torch.full((2, 6), 40), torch.tensor([5, 6]), torch.tensor([2, 3]))
    # the eager backend runs what was captured; no C++ compiler has to be there
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), step(*inputs))
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)(*inputs), step(*inputs))


def test_logits_that_require_grad_are_sampled():
    logits = torch.randn(1, 4, 9, requires_grad=True)
    token_ids, _ = mgt_kernels.sample_tokens(logits, torch.full((1, 4), 9), mask_token_id=9, seed=0, step=0)
    assert (token_ids < 9).all()


def test_info_names_what_runs():
    info = mgt_kernels.info()
    assert info["version"] == mgt_kernels.__version__ and info["isa"] in info["isas"]
    assert info["num_threads"] == torch.get_num_threads()


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_only_point_down():
    """Oracles and Triton kernels know nothing of the ops, the ops nothing of the sampler."""
    for path in (ROOT / "mgt_kernels").rglob("*.py"):
        names = imported_modules(path)
        assert not any(name.split(".")[0] == "mgt_sampler" for name in names), path
        if path.parent.name in ("reference", "triton"):
            allowed = f"mgt_kernels.{path.parent.name}"
            for name in names:
                assert not name.startswith("mgt_kernels") or name.startswith(allowed), (path, name)
    for path in (ROOT / "python_api/mgt_sampler").glob("*.py"):
        if path.stem in ("schedules", "sampling"):
            upper = ("mgt_sampler.scheduler", "mgt_sampler.cli", "mgt_sampler.evaluate")
            assert not any(name.startswith(upper) for name in imported_modules(path)), path


def test_kernels_know_neither_python_nor_torch():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and path.name != "bindings.cpp":
            text = path.read_text()
            assert "Python.h" not in text and "pybind11/" not in text and "torch/" not in text, path
