"""How tests compile what links the library, and what the program in C prints."""

import subprocess
from pathlib import Path

import torch

import mgt_kernels

ROOT = Path(__file__).parent.parent
CONSUMERS = ROOT / "tests" / "consumers"
ISAS = mgt_kernels.info()["isas"]


def run(*command, **options):
    """Run a command; what it prints on either stream, with the error of one that fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def compile_c(prefix, program, *libraries):
    run(
        "cc", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{prefix / 'include'}",
        CONSUMERS / "c" / "main.c", "-o", program, *libraries,
    )  # fmt: skip
    return program


def check_c_program(printed):
    token_ids, logprob = zip(*(line.split() for line in printed.splitlines()), strict=True)
    tokens = torch.tensor([[40, 40, 11, 40, 40]])
    plain, first, second = ((torch.arange(200) % every * 0.5).view(1, 5, 40) for every in (7, 7, 6))
    draws = [mgt_kernels.sample_tokens(plain, tokens, mask_token_id=40, seed=7, step=3)]
    state = None
    for step, logits in enumerate((first, second)):
        *draw, state = mgt_kernels.differential_sample(logits, tokens, state, mask_token_id=40, seed=7, step=step)
        draws.append(draw)
    expected_ids, expected_logprob = (torch.cat([draw[i][0] for draw in draws]).tolist() for i in range(2))
    assert [int(token) for token in token_ids] == expected_ids
    assert [float.fromhex(value) if value != "inf" else torch.inf for value in logprob] == expected_logprob


def compile_cpp(name, library, program, *options, compiler="c++"):
    source, include = CONSUMERS / name / "main.cpp", mgt_kernels.include_dir()
    strict = ["-Wall", "-Wextra", "-Werror"]
    run(compiler, "-std=c++17", *strict, f"-I{include}", source, library, *options, "-pthread", "-o", program)
    return program
