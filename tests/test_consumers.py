"""What links the library, from C to ExecuTorch, and what it exports."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from linking import CONSUMERS, ISAS, ROOT, check_c_program, compile_c, compile_cpp, run

import mgt_kernels

LANGUAGES = ["C", "C++", "NumPy", "JAX", "ExecuTorch"]

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("cmake", "cc", "c++", "nm"))), reason="needs cmake, a compiler and binutils"
)


def page_blocks():
    """The commands of docs/linking.md: installing it, and one for each of LANGUAGES."""
    return re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "linking.md").read_text(), flags=re.S)


def run_block(block, prefix, **variables):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # the package that is installed, not the folder of its sources
    environment = {**os.environ, "PREFIX": str(prefix), "PATH": path, "PYTHONSAFEPATH": "1", **variables}
    return run("bash", "-euo", "pipefail", "-c", block, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """The library, built and installed without Python, as the page says, and without a warning."""
    folder = tmp_path_factory.mktemp("prefix")
    run_block(page_blocks()[0], folder, CXXFLAGS="-Werror")
    # "lib64" on some systems
    (libraries,) = folder.glob("lib*")
    if libraries.name != "lib":
        (folder / "lib").symlink_to(libraries)
    return folder


def test_a_c_program_draws_the_same(prefix, tmp_path):
    shared = compile_c(
        prefix, tmp_path / "shared", f"-L{prefix / 'lib'}", "-lmgt_kernels", f"-Wl,-rpath,{prefix / 'lib'}"
    )
    check_c_program(run(shared))
    static = compile_c(prefix, tmp_path / "static", prefix / "lib" / "libmgt_kernels.a", "-lstdc++", "-lm", "-pthread")
    check_c_program(run(static))


@pytest.mark.skipif(shutil.which("pkg-config") is None, reason="needs pkg-config")
def test_pkg_config_knows_it(prefix, tmp_path):
    environment = {**os.environ, "PKG_CONFIG_PATH": str(prefix / "lib" / "pkgconfig")}
    flags = run("pkg-config", "--cflags", "--libs", "mgt_kernels", env=environment).split()
    check_c_program(run(compile_c(prefix, tmp_path / "main", *flags, f"-Wl,-rpath,{prefix / 'lib'}")))


@pytest.mark.skipif(shutil.which("pkg-config") is None, reason="needs pkg-config")
def test_pkg_config_links_the_archive_in_c(prefix, tmp_path):
    environment = {**os.environ, "PKG_CONFIG_PATH": str(prefix / "lib" / "pkgconfig")}
    flags = run("pkg-config", "--static", "--cflags", "--libs", "mgt_kernels", env=environment).split()
    check_c_program(run(compile_c(prefix, tmp_path / "static", "-static", *flags)))
    # a folder that has the archive alone
    lonely = tmp_path / "lib"
    lonely.mkdir()
    shutil.copy(prefix / "lib" / "libmgt_kernels.a", lonely)
    flags = [f"-L{lonely}", *(flag for flag in flags if not flag.startswith("-L"))]
    check_c_program(run(compile_c(prefix, tmp_path / "archive", *flags)))


@pytest.mark.parametrize("where", ["installed", "wheel"])
def test_a_cmake_project_of_c_alone_links_both_libraries(request, where, tmp_path):
    folder = request.getfixturevalue("prefix") if where == "installed" else mgt_kernels.include_dir().parent
    run("cmake", "-S", CONSUMERS / "c", "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={folder}")
    run("cmake", "--build", tmp_path)
    for name in ("with_kernels", "with_kernels_static"):
        check_c_program(run(tmp_path / name))


@pytest.mark.parametrize("where", ["installed", "wheel"])
def test_a_cpp_program_lends_its_openmp(request, where, tmp_path):
    folder = request.getfixturevalue("prefix") if where == "installed" else mgt_kernels.include_dir().parent
    run("cmake", "-S", CONSUMERS / "cpp", "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={folder}")
    run("cmake", "--build", tmp_path)
    printed = {run(tmp_path / name) for name in ("with_kernels", "with_kernels_static")}
    assert len(printed) == 1
    lines = printed.pop().split()
    logits, tokens = (torch.arange(200) % 7 * 0.5).view(1, 5, 40), torch.full((1, 5), 40)
    token_ids, *_ = mgt_kernels.sample_tokens(logits, tokens, mask_token_id=40, seed=7, step=0)
    assert list(map(int, lines[:5])) == token_ids[0].tolist()
    w_q = (torch.arange(64) * 37 % 256).to(torch.uint8).view(2, 32)
    scale, zero_point = torch.tensor([[0.5], [0.25]]), torch.tensor([[7], [8]], dtype=torch.uint8)
    weight = mgt_kernels.PackedInt4(w_q, scale, zero_point, (2, 64), 64)
    x = (torch.arange(3 * 64) % 11 - 5.0).view(3, 64)
    expected = [*mgt_kernels.w4a8_linear(x, weight).flatten(), *mgt_kernels.w4a16_linear(x, weight).flatten()]
    assert list(map(float.fromhex, lines[5:])) == [float(y) for y in expected]


def test_only_the_c_abi_is_exported(prefix):
    for library in (prefix / "lib" / "libmgt_kernels.so", mgt_kernels.library_path()):
        names = [line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()]
        assert names and all(re.fullmatch(r"mgt_[a-z0-9_]+@@MGT_0|MGT_0", name) for name in names), names
        header = re.sub(r"/\*.*?\*/", "", (ROOT / "csrc" / "mgt_kernels.h").read_text(), flags=re.S)
        declared = set(re.findall(r"\b(mgt_\w+)\(", header))
        assert {name.split("@")[0] for name in names} - {"MGT_0"} == declared


# what manylinux_2_28 has: https://peps.python.org/pep-0600/
OLDEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (8, 0, 0)}


def too_new(versions):
    found = re.findall(r"\b(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)\b", versions)
    return {f"{name}_{version}" for name, version in found if tuple(map(int, version.split("."))) > OLDEST[name]}


@pytest.mark.skipif(platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc", reason="manylinux on x86-64")
@pytest.mark.parametrize("library", [mgt_kernels.library_path(), Path(mgt_kernels._C.__file__)], ids=lambda p: p.name)
def test_it_loads_on_linux_of_2018(library):
    versions = run("objdump", "-p", library)
    assert "GLIBC_" in versions and not too_new(versions)


def test_a_newer_symbol_is_seen():
    assert too_new("0x06969194 0x00 05 GLIBC_2.28 GLIBC_2.34 CXXABI_1.3.11 GLIBCXX_3.4.29 GCC_3.0") == {
        "GLIBC_2.34", "GLIBCXX_3.4.29"
    }  # fmt: skip


@pytest.mark.parametrize("compiler, language, standard", [("cc", "c", "c99"), ("c++", "c++", "c++11")])
def test_the_header_is_c_and_cpp(compiler, language, standard):
    strict = [f"-std={standard}", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    run(compiler, *strict, "-x", language, mgt_kernels.include_dir() / "mgt_kernels.h")


def test_numpy_draws_without_torch():
    printed = run(sys.executable, CONSUMERS / "numpy_consumer.py", mgt_kernels.library_path())
    logits, tokens = (torch.arange(200) % 7 * 0.5).view(1, 5, 40), torch.full((1, 5), 40)
    token_ids, *_ = mgt_kernels.sample_tokens(logits, tokens, mask_token_id=40, seed=7, step=0)
    assert list(map(int, printed.split())) == token_ids[0].tolist()


@pytest.fixture(scope="module")
def jax_handlers(tmp_path_factory):
    """The library's handlers for jax.ffi."""
    jax_ffi = pytest.importorskip("jax.ffi", reason="needs jax")
    library = mgt_kernels.library_path()
    handlers = tmp_path_factory.mktemp("jax") / "handlers.so"
    run(
        "c++", "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{jax_ffi.include_dir()}", f"-I{mgt_kernels.include_dir()}",
        CONSUMERS / "jax" / "handlers.cpp", library, f"-Wl,-rpath,{library.parent}", "-o", handlers,
    )  # fmt: skip
    return handlers


def test_jax_draws_under_jit_and_vmap(jax_handlers):
    jitted, vmapped = run(sys.executable, CONSUMERS / "jax" / "consumer.py", jax_handlers).splitlines()
    logits, tokens = (torch.arange(400) % 7 * 0.5).view(2, 5, 40), torch.full((2, 5), 40)
    token_ids, *_ = mgt_kernels.sample_tokens(logits, tokens, mask_token_id=40, seed=torch.tensor([7, 8]), step=3)
    assert list(map(int, jitted.split())) == list(map(int, vmapped.split())) == token_ids.flatten().tolist()


@pytest.fixture(scope="module")
def maskgit_decoders(jax_handlers):
    """`decode` of the original MaskGIT, and ours."""
    original = pytest.importorskip("maskgit.libml.parallel_decode", reason="needs maskgit and flax")
    sys.path.append(str(CONSUMERS / "maskgit"))
    import maskgit_decode

    maskgit_decode.register(jax_handlers)
    return original.decode, maskgit_decode.decode


@pytest.mark.parametrize("method", ["cosine", "pow2", "log"])
def test_maskgit_masks_the_same(maskgit_decoders, method):
    import jax
    import jax.numpy as jnp

    # one likely token at each position, so much likelier at some than at others that the original, which compares
    # probabilities, has no ties; it depends on the number of known tokens. With the key below, neither draws another
    best = jax.random.randint(jax.random.key(0), (2, 65), 0, 5)
    surest = 7.5 + 6 / 64 * jax.random.permutation(jax.random.key(1), jnp.arange(65))

    def tokens_to_logits(tokens):
        likely = (best + (tokens >= 0).sum(-1, keepdims=True)) % 5
        return jax.nn.one_hot(likely, 5) * surest[:, None]

    inputs = jnp.full((2, 65), -1).at[:, 0].set(8).at[1, 5:20].set(3)
    histories = [
        decode(
            inputs, jax.random.key(2), tokens_to_logits, num_iter=8, choice_temperature=0.0,
            mask_scheduling_method=method,
        )
        for decode in maskgit_decoders
    ]  # fmt: skip
    assert histories[0].shape == histories[1].shape == (2, 8, 65) and (histories[0] == histories[1]).all()
    assert (histories[1][:, -1] >= 0).all() and (histories[1][:, :, 0] == 8).all()


def test_maskgit_draws_from_the_same_distribution(maskgit_decoders):
    stats = pytest.importorskip("scipy.stats", reason="needs scipy")
    import jax
    import jax.numpy as jnp

    # a token's logits depend on its neighbour's, so that what is drawn depends on which of both comes first
    table = 2 * jax.random.normal(jax.random.key(5), (2, 5, 4))

    def histogram(decode, factor, seed):
        logits = lambda tokens: factor * table[jnp.arange(2), tokens[:, ::-1]]  # noqa: E731
        history = decode(jnp.full((8000, 2), 4), jax.random.key(seed), logits, mask_token_id=4, num_iter=2)
        return jnp.bincount(history[:, -1] @ jnp.array([4, 1]), length=16)

    original, decode = maskgit_decoders
    before, after, flatter = histogram(original, 1, 0), histogram(decode, 1, 1), histogram(decode, 0.9, 1)

    def pvalue(other):
        both = jnp.stack([before, other])
        return stats.chi2_contingency(both[:, both.sum(0) > 20]).pvalue

    assert (before > 20).sum() > 8
    assert pvalue(after) > 1e-3 and pvalue(flatter) < 1e-4


def test_maskgit_does_not_depend_on_the_batch(maskgit_decoders):
    import jax
    import jax.numpy as jnp

    _, decode = maskgit_decoders
    table = 2 * jax.random.normal(jax.random.key(5), (41, 40))
    inputs, rng = jnp.full((3, 9), 40), jax.random.key(3)
    together = decode(inputs, rng, table.__getitem__, mask_token_id=40, num_iter=4)
    assert (decode(inputs[:1], rng, table.__getitem__, mask_token_id=40, num_iter=4) == together[:1]).all()
    assert not (together[0] == together[1]).all()
    # nothing to draw, nothing to mask again
    assert (decode(inputs * 0, rng, table.__getitem__, mask_token_id=40, num_iter=4) == 0).all()
    seeds = [int(jax.random.bits(jax.random.fold_in(rng, i)).view(jnp.int32)) for i in range(3)]
    token_ids, *_ = mgt_kernels.sample_tokens(
        torch.tensor(table[inputs].tolist()), torch.full((3, 9), 40), mask_token_id=40, seed=torch.tensor(seeds), step=0
    )
    assert together[:, 0].tolist() == token_ids.tolist()


def test_the_page_of_frameworks_on_maskgit(maskgit_decoders, jax_handlers):
    import jax
    import jax.numpy as jnp

    page = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8").split("## MaskGIT")[1]
    table = jax.random.normal(jax.random.key(5), (41, 40))
    names = {"inputs": jnp.full((2, 9), -1), "rng": jax.random.key(0), "tokens_to_logits": table.__getitem__}
    for code in re.findall(r"```python\n(.*?)```", page, flags=re.S):
        exec(code, names)
        assert names.pop("history").shape == (2, 12, 9)
    (command,) = re.findall(r"```sh\n(.*?)```", page, flags=re.S)
    # the script's own folder has a module of it
    printed = run_block(
        "unset PYTHONSAFEPATH; " + command.strip() + " --batch 1 --codebook-size 40 --rounds 1", jax_handlers.parent
    )
    assert len(re.findall(r"^\| decode, .* \| [0-9.]+ \|$", printed, flags=re.M)) == 2


def test_executorch_draws_in_a_program(tmp_path):
    executorch = Path(pytest.importorskip("executorch.version", reason="needs executorch").__file__).parent
    include, library = executorch / "include", mgt_kernels.library_path()
    kernels = tmp_path / "kernels.so"
    run(
        "c++", "-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror",
        "-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_EVENT_TRACER_ENABLED", "-isystem", include,
        "-isystem", include / "executorch" / "runtime" / "core" / "portable_type" / "c10",
        f"-I{mgt_kernels.include_dir()}", CONSUMERS / "executorch" / "kernels.cpp", library,
        f"-L{executorch / 'lib'}", "-lexecutorch", f"-Wl,-rpath,{library.parent}:{executorch / 'lib'}", "-o", kernels,
    )  # fmt: skip
    printed = run(sys.executable, CONSUMERS / "executorch" / "consumer.py", kernels).splitlines()
    tokens = torch.tensor([[40, 40, 11, 40, 40]]).expand(2, 5)
    logits = (torch.arange(41 * 40) % 7 * 0.5).view(41, 40)[tokens]
    drawn = mgt_kernels.sample_tokens(
        logits, tokens.contiguous(), uncond_logits=0.5 * logits, guidance_scale=3.0, mask_token_id=40,
        seed=torch.tensor([7, 8]), step=3,
    )  # fmt: skip
    for size, line in zip((2, 1), printed, strict=True):
        token_ids, logprob = (result[:size].flatten().tolist() for result in drawn[:2])
        values = line.split()
        assert list(map(int, values[: 5 * size])) == token_ids
        assert list(map(float.fromhex, values[5 * size :])) == logprob


def test_the_library_keeps_its_contract(prefix, tmp_path):
    library = prefix / "lib" / "libmgt_kernels.a"
    program = compile_cpp("contract", library, tmp_path / "contract", "-DCOUNT_ALLOCATIONS")
    for isa in ISAS:
        done = subprocess.run([program], env={**os.environ, "MGT_ISA": isa}, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        # its own threads do allocate, so the counter counts
        expected = r"lent pool: 0 allocations\nown threads: [1-9]\d* allocations\n"
        assert re.fullmatch(expected, done.stdout), done.stdout


def test_stacks_of_64_kib_suffice(prefix, tmp_path):
    library = prefix / "lib" / "libmgt_kernels.a"
    program = compile_cpp("contract", library, tmp_path / "contract", "-DSTACK_BYTES=65536")
    for isa in ISAS:
        run(program, env={**os.environ, "MGT_ISA": isa})


OMP_STACKS = """
import torch, mgt_kernels as m
torch.set_num_threads(2)
logits, tokens = torch.randn(2, 2, 2100, 70).transpose(2, 3), torch.full((2, 70), 2100)
weight, x = m.quantize_int4(torch.randn(512, 1024)), torch.randn(500, 1024)
for isa in m.info()["isas"]:
    draw = dict(uncond_logits=logits[1], guidance_scale=3.0, noise_scale=1.0, mask_token_id=2100, seed=1, backend=isa)
    m.sample_tokens(logits[0], tokens, step=0, **draw)
    state = None
    for step in range(2):
        *_, state = m.differential_sample(logits[0], tokens, state, step=step, **draw)
    ids, logprob = torch.zeros(900, 70, dtype=torch.int64), torch.zeros(900, 70)
    m.mask_by_confidence(ids, logprob, 9, mask_token_id=1, temperature=1.0, seed=0, step=0, backend=isa)
    m.w4a8_linear(x, weight, backend=isa), m.w4a16_linear(x, weight, backend=isa)
"""


def test_openmp_threads_of_64_kib_suffice():
    # PyTorch's own, which it lends
    run(sys.executable, "-c", OMP_STACKS, env={**os.environ, "OMP_STACKSIZE": "64k"})


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_does_what_it_says(prefix, language):
    if language == "C" and shutil.which("pkg-config") is None:
        pytest.skip("needs pkg-config")
    if language == "JAX":
        pytest.importorskip("jax", reason="needs jax")
    if language == "ExecuTorch":
        pytest.importorskip("executorch.version", reason="needs executorch")
    _, *blocks = page_blocks()
    printed = run_block(dict(zip(LANGUAGES, blocks, strict=True))[language], prefix)
    if language == "C":
        check_c_program(printed)
    else:
        assert len(printed.split()) >= 5
