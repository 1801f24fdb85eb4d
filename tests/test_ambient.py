"""State that is no argument of a call: the same bits under any of it, and no hang or crash in an odd process."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ambient import default_device, default_dtype, flush_denormals
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mgt_kernels
from mgt_kernels import PackedInt4, quantize_int4, reference

CPU = torch.device("cpu")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device=CPU)


LOGITS, UNCOND, TOKENS = randn(2, 5, 40), randn(2, 5, 40, seed=1), torch.full((2, 5), 40, device=CPU)
SEED, KNOWN = torch.tensor([3, 4]), torch.arange(10).view(2, 5)
WEIGHT, X, BIAS = randn(9, 70, seed=2), randn(4, 70, seed=3), randn(9, seed=4)


def results(backend):
    """Every op, and everything that makes or reads packed weights, as a flat list of tensors."""
    draw = dict(mask_token_id=40, seed=3, backend=backend)
    guided = dict(uncond_logits=UNCOND, guidance_scale=2.0, noise_scale=0.5, temperature=0.9)
    token_ids, logprob, *_ = mgt_kernels.sample_tokens(LOGITS, TOKENS, step=0, **guided, **draw)
    outputs = [token_ids, logprob]
    _, _, state = mgt_kernels.differential_sample(LOGITS, TOKENS, None, step=0, **draw)
    *second, state = mgt_kernels.differential_sample(UNCOND, TOKENS, state, step=1, **guided, **draw)
    outputs += [*second, state.divergence, state.step, state.history, state.written]
    outputs.append(mgt_kernels.mask_by_confidence(token_ids, logprob, 2, temperature=1.0, step=1, **draw))
    for variant in mgt_kernels.REMASK_VARIANTS:
        options = dict(variant=variant, uncond_logits=UNCOND, guidance_scale=3.0)
        outputs += mgt_kernels.remask_tokens(LOGITS, KNOWN, 2, step=1, **options, **draw)
    grid = LOGITS[:, :4]
    for rule in (dict(ratio=0.5), dict(threshold=0.01)):
        match = mgt_kernels.match_tokens(grid, (2, 2), **rule, seed=SEED, step=1, backend=backend)
        merged = mgt_kernels.merge_tokens(grid, match, backend=backend)
        outputs += [*match[:3], match.sizes, merged, mgt_kernels.unmerge_tokens(merged, match, backend=backend)]
    packed = quantize_int4(WEIGHT, 32)
    packed = PackedInt4.from_tensors(packed.to_tensors())
    outputs += [*packed.to_tensors().values(), packed.unpack(), packed.dequantize(), packed.to("cpu").w_q]
    for x in (X, X.bfloat16()):
        outputs.append(mgt_kernels.w4a8_linear(x, packed, 0.05, BIAS, backend=backend))
        outputs.append(mgt_kernels.w4a8_linear(x, packed, backend=backend))
        outputs.append(mgt_kernels.w4a16_linear(x, packed, BIAS, backend=backend))
    outputs += [reference.token_gumbel(SEED, 3, 2100, 7), reference.gaussian(SEED, 3, 2100, 7)]
    outputs += [reference.confidence_gumbel(SEED, 3, 7), reference.remask_gumbel(SEED, 3, 7)]
    outputs += [reference.merge_corner(SEED, 3, 7)]
    codes = reference.encode_history(LOGITS.log_softmax(-1))
    return [*outputs, codes, reference.decode_history(codes)]


@contextlib.contextmanager
def not_deterministic():
    torch.use_deterministic_algorithms(False)
    yield


class PassingFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class PassingOps(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


AMBIENT = {
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default device meta": lambda: default_device("meta"),
    "with device meta": lambda: torch.device("meta"),
    "flushed denormals": flush_denormals,
    "not deterministic": not_deterministic,
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "function mode": PassingFunctions,
    "dispatch mode": PassingOps,
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
}


@pytest.fixture(scope="module")
def expected():
    return {backend: results(backend) for backend in ("auto", "reference")}


@pytest.mark.parametrize("ambient", AMBIENT)
@pytest.mark.parametrize("path", ["auto", "reference"])
def test_no_result_depends_on(ambient, path, expected):
    with AMBIENT[ambient]():
        found = results(path)
    for result, right in zip(found, expected[path], strict=True):
        # a comparison outside of inference mode reads them too
        assert result.dtype == right.dtype and result.device == CPU
        assert torch.equal(*(t.clone().flatten().view(torch.uint8) for t in (result, right)))


def test_a_state_begun_in_inference_mode_goes_on_outside(backend):
    draw = dict(mask_token_id=40, seed=3, backend=backend)
    with torch.inference_mode():
        _, _, state = mgt_kernels.differential_sample(LOGITS, TOKENS, None, step=0, **draw)
    outside = mgt_kernels.differential_sample(UNCOND, TOKENS, state, step=1, **draw)
    with torch.inference_mode():
        _, _, state = mgt_kernels.differential_sample(LOGITS, TOKENS, None, step=0, **draw)
        inside = mgt_kernels.differential_sample(UNCOND, TOKENS, state, step=1, **draw)
    assert torch.equal(outside[1], inside[1].clone()) and int(outside[2].step) == 1
    # the tensors of the state may not be written to outside, but by the op
    with torch.inference_mode():
        _, _, state = mgt_kernels.differential_sample(LOGITS, TOKENS, None, step=0, **draw)
    with pytest.raises(ValueError, match="logits: sample 0, position 0 holds NaN"):
        mgt_kernels.differential_sample(UNCOND * torch.nan, TOKENS, state, step=1, **draw)
    assert not state.written.any()


def run_python(script, *arguments, timeout=600, **variables):
    environment = {**os.environ, **variables}
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=timeout, env=environment
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


CALLS = """
import os, sys, torch, mgt_kernels
def inputs(num_samples=8):
    logits, tokens = torch.zeros(num_samples, 256, 1024), torch.full((num_samples, 256), 1024)
    return logits, tokens, torch.ones(64, 256), mgt_kernels.quantize_int4(torch.ones(256, 256))
def every_op(logits, tokens, x, weight):
    draw = dict(mask_token_id=1024, seed=0)
    token_ids, logprob, *_ = mgt_kernels.sample_tokens(logits, tokens, step=0, **draw)
    _, _, state = mgt_kernels.differential_sample(logits, tokens, None, step=0, **draw)
    found = [token_ids, *mgt_kernels.differential_sample(logits, tokens, state, step=1, **draw)[:2]]
    found.append(mgt_kernels.mask_by_confidence(token_ids, logprob, 9, temperature=1.0, step=1, **draw))
    found += mgt_kernels.remask_tokens(logits, token_ids, 9, step=1, **draw)
    match = mgt_kernels.match_tokens(logits[..., :64], (16, 16), ratio=0.5, seed=0)
    # few enough for PyTorch to compare on one thread
    merged = mgt_kernels.merge_tokens(logits[..., :8], match)
    found += [*match[:3], merged, mgt_kernels.unmerge_tokens(merged, match)]
    return found + [mgt_kernels.w4a8_linear(x, weight), mgt_kernels.w4a16_linear(x, weight)]
"""


def test_absurd_numbers_of_threads_and_forked_children():
    """Rows set_num_threads(1000), set_num_threads(2**29) and "a child forked after the kernels ran with 2 threads"."""
    script = """
import multiprocessing, signal, time
torch.set_num_threads(2)
# PyTorch's own ops, which may not survive such numbers, made the inputs before
made = inputs()
expected = every_op(*made)
def same():
    return all(torch.equal(a, b) for a, b in zip(every_op(*made), expected))
for number in (1000, 2**20, 2**29):
    torch.set_num_threads(number)
    assert mgt_kernels.info()["num_threads"] == max(64, os.cpu_count())
    assert same()
torch.set_num_threads(2)
assert same()
# children of a thread whose pool is at work
torch.ones(1 << 22).exp()
children = []
for threads in (None, 2):
    child = os.fork()
    if child == 0:
        if threads:
            # PyTorch's pool is gone for good; the kernels start threads of their own
            torch.set_num_threads(threads)
        os._exit(0 if same() and mgt_kernels.info()["thread_pool"] == "own threads per call" else 1)
    children.append(child)
deadline = time.monotonic() + 30
codes = []
for child in children:
    while (code := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    if code[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    codes.append(code)
print([code[1] for code in codes], all(code[0] for code in codes))
"""
    assert run_python(CALLS + script).strip() == "[0, 0] True"


RUNTIME = """
#include <stdatomic.h>
static atomic_int calls;
int counted(void) { return calls; }
void GOMP_parallel(void (*body)(void *), void *data, unsigned num_threads, unsigned flags) {
  atomic_fetch_add(&calls, 1);
  body(data);
}
"""


@pytest.fixture
def preloaded(tmp_path):
    """An OpenMP runtime of our own, in a folder whose name has a byte that is no UTF-8."""
    folder = tmp_path / os.fsdecode(b"r\xffntimes")
    folder.mkdir()
    (folder / "runtime.c").write_text(RUNTIME)
    library = folder / "libmine.so"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, folder / "runtime.c"], check=True)
    except FileNotFoundError:
        pytest.skip("no C compiler")
    return library


def test_the_pool_is_the_one_that_pytorch_runs_on(tmp_path):
    """Rows "a file mapped whose name is no UTF-8" and "an environment whose path has a space"."""
    script = """
import mmap
path = os.path.join(os.fsencode(sys.argv[1]), b"no \\xff utf-8")
with open(path, "wb+") as file:
    file.write(b"x")
    file.flush()
    kept = mmap.mmap(file.fileno(), 1)
torch.set_num_threads(2)
every_op(*inputs())
assert " " in torch.__file__
from mgt_kernels.cpu import torch_thread_pool
address, file = torch_thread_pool()
assert address and os.path.exists(file), file
print(file)
"""
    packages = tmp_path / "my packages"
    packages.symlink_to(Path(torch.__file__).parent.parent)
    found = Path(run_python(CALLS + script, str(tmp_path), PYTHONPATH=str(packages)).strip())
    # PyTorch's wheels bring one, a system's build uses the system's
    beside = list((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*"))
    beside += list((Path(torch.__file__).parent.parent / "torch.libs").glob("lib*omp*.so*"))
    assert not beside or found.resolve() in [path.resolve() for path in beside]


def test_a_preloaded_runtime_is_the_pool(preloaded):
    """Row "libiomp5 preloaded": the kernels run where PyTorch runs."""
    script = """
import ctypes
counted = ctypes.CDLL(None).counted
torch.set_num_threads(2)
before = counted()
logits, tokens = torch.zeros(8, 256, 1024), torch.full((8, 256), 1024)
assert counted() > before, "PyTorch itself does not run on it"
before = counted()
mgt_kernels.sample_tokens(logits, tokens, mask_token_id=1024, seed=0, step=0)
assert counted() == before + 1, counted() - before
from mgt_kernels.cpu import torch_thread_pool
sys.stdout.buffer.write(os.fsencode(torch_thread_pool()[1]) + b"\\n" + os.fsencode(mgt_kernels.info()["thread_pool"]))
"""
    environment = {**os.environ, "LD_PRELOAD": str(preloaded)}
    run = subprocess.run([sys.executable, "-c", CALLS + script], capture_output=True, timeout=600, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [os.fsencode(preloaded), b"PyTorch's (" + os.fsencode(preloaded) + b")"]


def test_intels_runtime_preloaded_is_the_pool():
    """Row "libiomp5 preloaded", with libiomp5 itself where `pip install intel-openmp` put it."""
    library = Path(sys.prefix, "lib", "libiomp5.so").resolve()
    if not library.exists():
        pytest.skip("intel-openmp is not installed")
    script = """
torch.set_num_threads(2)
every_op(*inputs())
print(mgt_kernels.info()["thread_pool"])
"""
    assert run_python(CALLS + script, LD_PRELOAD=str(library)).strip() == f"PyTorch's ({library})"


def test_without_openmp_the_kernels_start_their_own_threads(monkeypatch):
    from mgt_kernels import cpu

    cpu.torch_thread_pool.cache_clear()
    monkeypatch.setattr(torch.backends.openmp, "is_available", lambda: False)
    assert cpu.torch_thread_pool() == (0, "")
    assert mgt_kernels.info()["thread_pool"] == "own threads per call"
    logits, tokens = randn(8, 256, 64), torch.full((8, 256), 64)
    own = mgt_kernels.sample_tokens(logits, tokens, mask_token_id=64, seed=0, step=0)
    cpu.torch_thread_pool.cache_clear()
    monkeypatch.undo()
    lent = mgt_kernels.sample_tokens(logits, tokens, mask_token_id=64, seed=0, step=0)
    assert cpu.torch_thread_pool()[0] and all(map(torch.equal, own[:2], lent[:2]))


def test_modules_may_be_imported_again():
    """Row "modules deleted from sys.modules and imported again", and reload."""
    script = """
import importlib
made = inputs(1)
before, first = every_op(*made), mgt_kernels
compiled = torch.compile(lambda logits, tokens: first.sample_tokens(logits, tokens, mask_token_id=8, seed=0, step=0),
                         backend="eager", fullgraph=True)
small = torch.zeros(1, 4, 8), torch.full((1, 4), 8)
expected = compiled(*small)
for name in [name for name in sys.modules if name.split(".")[0] == "mgt_kernels"]:
    del sys.modules[name]
import mgt_kernels
assert mgt_kernels is not first
# weights of before serve after
assert all(map(torch.equal, every_op(*made), before))
for name in ("registration", "checks", "cpu", "packing", "ops", "linear", "merging"):
    importlib.reload(sys.modules["mgt_kernels." + name])
importlib.reload(mgt_kernels)
assert all(map(torch.equal, every_op(*made), before))
# those who hold on to the old ones are served too
assert all(map(torch.equal, compiled(*small)[:2], expected[:2]))
with torch.profiler.profile():
    assert torch.equal(first.sample_tokens(*small, mask_token_id=8, seed=0, step=0)[0], expected[0])
# an op whose arguments were edited meanwhile
from mgt_kernels import registration
def reference(x: torch.Tensor, backend: str) -> torch.Tensor: return x + 1
def edited(x: torch.Tensor, y: torch.Tensor, backend: str) -> torch.Tensor: return x + y
registration.register("edited", reference, lambda x, *_: x.new_empty(x.shape))
call = registration.register("edited", edited, lambda x, *_: x.new_empty(x.shape))
arguments = torch.ones(1), torch.ones(1), "auto"
assert torch.ops.mgt_kernels.edited(*arguments) == call(*arguments) == 2
print("again")
"""
    assert run_python(CALLS + script).strip() == "again"
