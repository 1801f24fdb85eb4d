"""The library as other builds make it: with sanitizers, which find nothing, and with clang, which draws the same."""

import os
import shutil
import subprocess

import pytest
from linking import ISAS, ROOT, check_c_program, compile_c, compile_cpp, run

import mgt_kernels

pytestmark = pytest.mark.skipif(not all(map(shutil.which, ("cmake", "cc", "c++"))), reason="needs cmake and a compiler")


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(tmp_path, sanitizer):
    sanitize = f"-fsanitize={sanitizer}"
    empty = "int main(void) { return 0; }"
    try:
        subprocess.run(["cc", sanitize, "-x", "c", "-", "-o", tmp_path / "empty"], input=empty, text=True, check=True)
        subprocess.run([tmp_path / "empty"], check=True)
    except subprocess.CalledProcessError:
        pytest.skip(f"no program with {sanitize} runs here")
    build = tmp_path / "build"
    # optimized, the kernels with checks take minutes to compile
    flags = f"{sanitize} -fno-sanitize-recover=all -g1 -O0"
    run(
        "cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DMGT_PYTHON=OFF", "-DCMAKE_BUILD_TYPE=Debug",
        f"-DCMAKE_CXX_FLAGS={flags}",
    )  # fmt: skip
    run("cmake", "--build", build, "--target", "kernels_static")
    library, folder = build / "libmgt_kernels.a", mgt_kernels.include_dir()
    program = compile_c(folder.parent, tmp_path / "draw", library, sanitize, "-lstdc++", "-lm", "-pthread")
    # without -fopenmp its pool is one thread
    single = ("-Wno-unknown-pragmas", "-Wno-unused-parameter")
    layers = compile_cpp("cpp", library, tmp_path / "layers", sanitize, *single)
    contract = compile_cpp("contract", library, tmp_path / "contract", sanitize)
    # the threads are the same on every instruction set
    for isa in ISAS if "address" in sanitizer else ISAS[-1:]:
        check_c_program(run(program, env={**os.environ, "MGT_ISA": isa}))
        run(layers, env={**os.environ, "MGT_ISA": isa})
        run(contract, env={**os.environ, "MGT_ISA": isa})


@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang")
def test_clang_builds_the_same(tmp_path):
    environment = {**os.environ, "CC": "clang", "CXX": "clang++", "CXXFLAGS": "-Werror"}
    run("cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DMGT_PYTHON=OFF", env=environment)
    run("cmake", "--build", tmp_path, "--target", "kernels_static")
    library = tmp_path / "libmgt_kernels.a"
    program = compile_c(mgt_kernels.include_dir().parent, tmp_path / "draw", library, "-lstdc++", "-lm", "-pthread")
    contract = compile_cpp("contract", library, tmp_path / "contract", compiler="clang++")
    for isa in ISAS:
        check_c_program(run(program, env={**os.environ, "MGT_ISA": isa}))
        run(contract, env={**os.environ, "MGT_ISA": isa})
