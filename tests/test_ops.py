"""The ops as PyTorch sees them: opcheck, torch.compile without a graph break, the floors of the house."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mgt_kernels
from mgt_kernels import reference

ROOT = Path(__file__).parent.parent
SAMPLE = (torch.randn(2, 5, 40), torch.full((2, 5), 40), torch.tensor([1, 2]), torch.tensor(3), 40)
MASK = (
    torch.zeros(2, 5, dtype=torch.int64),
    torch.zeros(2, 5),
    torch.tensor([1, 2]),
    torch.tensor([3, 4]),
    torch.tensor(5),
    40,
)


@pytest.mark.parametrize("uncond", [None, torch.randn(2, 5, 40)])
def test_sample_tokens_passes_opcheck(uncond):
    torch.library.opcheck(torch.ops.mgt_kernels.sample_tokens, (*SAMPLE, uncond, 2.0, 0.5, 1.0, "auto"))


def test_mask_by_confidence_passes_opcheck():
    torch.library.opcheck(torch.ops.mgt_kernels.mask_by_confidence, (*MASK, 1.0, "auto"))


@pytest.mark.parametrize("variant", ["paper", "official", "random"])
def test_remask_tokens_passes_opcheck(variant, backend):
    logits = None if variant == "random" else torch.randn(2, 5, 40)
    arguments = (logits, torch.arange(10).view(2, 5), torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor(5), 40)
    uncond = None if logits is None else torch.randn(2, 5, 40)
    keep = torch.tensor([[True] + 4 * [False]]).expand(2, -1)
    torch.library.opcheck(torch.ops.mgt_kernels.remask_tokens, (*arguments, variant, uncond, 2.0, keep, backend))


@pytest.mark.parametrize("has_history, variant, aliased", [(False, "paper", False), (True, "official", True)])
def test_differential_sample_passes_opcheck(has_history, variant, aliased, backend):
    logits, tokens, seed, step, mask_token_id = SAMPLE
    history = reference.encode_history(torch.randn(2, 5, 40).log_softmax(-1))
    before = torch.tensor(2 if has_history else -1)
    arguments = (logits, tokens, history, torch.ones(2, 5, dtype=torch.bool), before, seed, has_history, seed, step)
    options = (mask_token_id, torch.randn(2, 5, 40), 2.0, 0.5, 1.0, 0.75, variant, aliased, backend)
    torch.library.opcheck(torch.ops.mgt_kernels.differential_sample, (*arguments, *options))


def test_a_generation_with_history_compiles_without_a_graph_break():
    def two_steps(logits, tokens, seed, step):
        state = None
        for i in range(2):
            token_ids, logprob, state = mgt_kernels.differential_sample(
                logits[i], tokens, state, mask_token_id=40, seed=seed, step=step + i
            )
        return token_ids, logprob, state.divergence, state.step

    inputs = (torch.randn(2, 2, 6, 40), torch.full((2, 6), 40), torch.tensor([5, 6]), torch.tensor(0))
    compiled = torch.compile(two_steps, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(*inputs), two_steps(*inputs)))


def test_a_re_masking_compiles_without_a_graph_break():
    def step(logits, tokens, remask_len):
        return mgt_kernels.remask_tokens(logits, tokens, remask_len, mask_token_id=40, seed=3, step=1)

    inputs = (torch.randn(2, 6, 40), torch.arange(12).view(2, 6), torch.tensor([2, 3]))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(*inputs), step(*inputs)))


def test_the_default_dtype_changes_nothing(backend):
    def results():
        logits, tokens = (
            torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float32),
            SAMPLE[1],
        )
        options = {"mask_token_id": 40, "seed": 3, "backend": backend}
        token_ids, logprob, state = mgt_kernels.differential_sample(logits, tokens, None, step=0, **options)
        second = mgt_kernels.differential_sample(logits.flip(0), tokens, state, step=1, **options)
        remasked = mgt_kernels.remask_tokens(logits, token_ids, 2, step=1, **options)
        masked = mgt_kernels.mask_by_confidence(token_ids, logprob, 2, temperature=1.0, step=1, **options)
        return token_ids, logprob, *second[:2], second[2].divergence, *remasked, masked

    expected = results()
    torch.set_default_dtype(torch.float64)
    try:
        assert all(map(torch.equal, results(), expected))
    finally:
        torch.set_default_dtype(torch.float32)


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


def test_a_step_may_be_a_tensor(backend):
    logits, tokens, token_ids = torch.randn(2, 5, 40), torch.full((2, 5), 40), torch.arange(10).view(2, 5)
    for step in (0, 7, 2**32 - 1):
        options = dict(mask_token_id=40, seed=3, backend=backend)
        drawn = mgt_kernels.sample_tokens(logits, tokens, step=step, **options)
        drawn_again = mgt_kernels.sample_tokens(logits, tokens, step=torch.tensor(step), **options)
        assert all(map(torch.equal, drawn, drawn_again))
        masked = mgt_kernels.mask_by_confidence(token_ids, torch.zeros(2, 5), 2, temperature=1.0, step=step, **options)
        assert torch.equal(
            masked,
            mgt_kernels.mask_by_confidence(
                token_ids, torch.zeros(2, 5), 2, temperature=1.0, step=torch.tensor(step), **options
            ),
        )


@pytest.mark.parametrize(
    "step, error, message",
    [
        (torch.tensor(2**32), ValueError, "step: expected a value within [0, 2^32), got 4294967296"),
        (torch.tensor(-1), ValueError, "step: expected a value within [0, 2^32), got -1"),
        (torch.tensor([1]), ValueError, "step: expected 0 dimensions, got shape (1,)"),
        (torch.tensor(1.0), TypeError, "step: expected dtype torch.int64, got torch.float32"),
        ("1", TypeError, "step: expected an int or a tensor, got str"),
    ],
)
def test_bad_steps_are_named(step, error, message):
    with pytest.raises(error) as caught:
        mgt_kernels.sample_tokens(torch.randn(1, 2, 4), torch.full((1, 2), 4), mask_token_id=4, seed=0, step=step)
    assert message in str(caught.value)


def test_logits_that_require_grad_are_sampled():
    logits = torch.randn(1, 4, 9, requires_grad=True)
    token_ids, _ = mgt_kernels.sample_tokens(logits, torch.full((1, 4), 9), mask_token_id=9, seed=0, step=0)
    assert (token_ids < 9).all()


def test_a_gradient_is_refused():
    weight = mgt_kernels.quantize_int4(torch.randn(8, 64))
    for linear in (mgt_kernels.w4a8_linear, mgt_kernels.w4a16_linear):
        y = linear(torch.randn(2, 64, requires_grad=True), weight)
        with pytest.raises(NotImplementedError, match=f"mgt_kernels.{linear.__name__} has no gradient"):
            y.sum().backward()
    logits, tokens = torch.randn(1, 4, 9, requires_grad=True), torch.full((1, 4), 9)
    _, logprob = mgt_kernels.sample_tokens(logits, tokens, mask_token_id=9, seed=0, step=0)
    with pytest.raises(NotImplementedError, match=r"mgt_kernels\.sample_tokens has no gradient"):
        logprob.sum().backward()
    _, logprob, _ = mgt_kernels.differential_sample(logits, tokens, None, mask_token_id=9, seed=0, step=0)
    assert not logprob.requires_grad


def test_what_is_written_to_has_a_new_version():
    logits, tokens = torch.randn(1, 4, 9), torch.full((1, 4), 9)
    _, _, state = mgt_kernels.differential_sample(logits, tokens, None, mask_token_id=9, seed=0, step=0)
    written = (state.history, state.written, state.step)
    before = [tensor._version for tensor in written]
    mgt_kernels.differential_sample(logits, tokens, state, mask_token_id=9, seed=0, step=1)
    assert all(tensor._version > version for tensor, version in zip(written, before, strict=True))


def test_the_compiler_stays_out_of_eager_calls():
    script = """
import sys, torch, mgt_kernels
logits, tokens, draw = torch.randn(1, 4, 9), torch.full((1, 4), 9), dict(mask_token_id=9, seed=0, step=0)
token_ids, logprob = mgt_kernels.sample_tokens(logits, tokens, **draw)
mgt_kernels.differential_sample(logits, tokens, None, **draw)
mgt_kernels.mask_by_confidence(token_ids, logprob, 2, temperature=1.0, **draw)
mgt_kernels.remask_tokens(logits, token_ids, 2, **draw)
weight = mgt_kernels.quantize_int4(torch.randn(8, 64))
mgt_kernels.w4a8_linear(torch.randn(2, 64), weight)
mgt_kernels.w4a16_linear(torch.randn(2, 64), weight)
print([name for name in ("torch._dynamo", "sympy", "triton") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_info_names_what_runs():
    info = mgt_kernels.info()
    assert info["version"] == mgt_kernels.__version__ and info["isa"] in info["isas"]
    assert info["num_threads"] == torch.get_num_threads()


# lower floors know nothing of higher ones
FLOORS = {
    "mgt_kernels._C": 0,
    "mgt_kernels.cpu": 1,
    "mgt_kernels.checks": 2,
    "mgt_kernels.packing": 3,
    "mgt_kernels.reference": 4,
    "mgt_kernels.triton": 4,
    "mgt_kernels": 5,
    "mgt_sampler.schedules": 6,
    "mgt_sampler.tables": 6,
    "mgt_sampler.tensor_file": 7,
    "mgt_sampler.techniques": 7,
    "mgt_sampler.sampling": 8,
    "mgt_sampler.models": 9,
    "mgt_sampler.scheduler": 9,
    "mgt_sampler.quantization": 9,
    "mgt_sampler.images": 9,
    "mgt_sampler.pipelines": 10,
    "mgt_sampler.evaluation": 10,
    "mgt_sampler.cli": 11,
    "mgt_sampler.models.train_fashion": 11,
}


def floor_of(module: str) -> tuple[str, int] | None:
    """The longest entry of FLOORS that the module is, or lies in."""
    entries = [name for name in FLOORS if module == name or module.startswith(name + ".")]
    return (max(entries, key=len), FLOORS[max(entries, key=len)]) if entries else None


def imported_modules(path: Path, package: str) -> set[str]:
    """What a file imports when it runs, relative imports spelled out."""
    names = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names.update(f"{module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return names


def test_imports_only_point_down():
    checked = 0
    for root in (ROOT / "mgt_kernels", ROOT / "python_api" / "mgt_sampler"):
        for path in root.rglob("*.py"):
            package = ".".join(path.parent.relative_to(root.parent).parts)
            module = package if path.stem == "__init__" else f"{package}.{path.stem}"
            here = floor_of(module)
            # the door of the sampler opens on all its floors; the dispatcher of the ops on their backends
            if here is None:
                continue
            for name in imported_modules(path, package):
                there = floor_of(name)
                if there is not None and there[0] != here[0]:
                    assert there[1] < here[1], f"{module} imports {name}"
                    checked += 1
    assert checked > 10


def test_kernels_know_neither_python_nor_torch():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and path.name != "bindings.cpp":
            text = path.read_text()
            assert "Python.h" not in text and "pybind11/" not in text and "torch/" not in text, path
