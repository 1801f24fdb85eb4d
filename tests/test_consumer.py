"""The C door: the library builds without Python, and a C99 program draws what the op draws."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import mgt_kernels

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("cc") is None, reason="needs cmake and a C compiler")
def test_a_c_program_draws_the_same(tmp_path):
    subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path / "build", "-DMGT_PYTHON=OFF"], check=True)
    subprocess.run(["cmake", "--build", tmp_path / "build", "--parallel", "2"], check=True)
    strict = ["-std=c99", "-pedantic", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}"]
    source = ROOT / "tests" / "consumer" / "main.c"
    subprocess.run(["cc", *strict, "-c", source, "-o", tmp_path / "main.o"], check=True)
    library = tmp_path / "build" / "libmgt_kernels.a"
    subprocess.run(["c++", tmp_path / "main.o", library, "-pthread", "-o", tmp_path / "main"], check=True)
    run = subprocess.run([tmp_path / "main"], check=True, capture_output=True, text=True)
    token_ids, logprob = zip(*(line.split() for line in run.stdout.splitlines()), strict=True)

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
