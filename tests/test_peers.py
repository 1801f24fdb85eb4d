"""The comparison with other libraries: what is compared computes the layer, and failures are told."""

import sys
from pathlib import Path

import pytest
import torch
import typer

from mgt_benchmarks import peers, samplers
from mgt_benchmarks.case import AbsentError


@pytest.mark.parametrize(
    "name, error", [("float32", 1e-6), ("bfloat16", 0.01), ("mgt-kernels", 0.12), ("mgt-kernels bfloat16", 0.12)]
)
def test_a_layer_is_timed_in_a_process_of_its_own(name, error):
    measured = peers.measure(name, Path(sys.executable), peers.TINY[0], threads=1, calls=2)
    assert measured["seconds"] > 0 and 0 < measured["error"] < error


@pytest.mark.parametrize("name", peers.REQUIREMENTS)
def test_a_library_computes_the_layer(name):
    folder = Path(__file__).parent.parent / peers.FOLDER
    if not (folder / name / "finished").exists():
        pytest.skip(f"{peers.FOLDER / name} is missing: python -m mgt_benchmarks.peers {name} makes it")
    measured = peers.measure(name, peers.interpreter(name, folder), peers.TINY[0], threads=1, calls=2)
    assert measured["seconds"] > 0 and 0 < measured["error"] < 0.12


def test_a_library_leaves_the_tokens_of_a_draw():
    folder = Path(__file__).parent.parent / peers.FOLDER
    if not (folder / "vllm" / "finished").exists():
        pytest.skip(f"{peers.FOLDER / 'vllm'} is missing: python -m mgt_benchmarks.peers vllm makes it")
    for truncation in (samplers.Truncation(0.7, 20), samplers.Truncation(1.3, 20, 0.8), samplers.Truncation(1.0)):
        draw = (3, 500, truncation.temperature, truncation.top_k, truncation.top_p)
        worker = peers.Worker.start_draw("vllm", folder, draw, threads=1)
        logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)).mul_(2)
        expected = samplers.sorted_filter(logits, truncation).logsumexp(-1)
        torch.testing.assert_close(torch.tensor(worker.ask("logsumexp")), expected, atol=1e-5, rtol=1e-5)
        assert worker.seconds() > 0


def test_what_fails_says_so():
    with pytest.raises(RuntimeError, match=r"zentorch failed at layer \(33, 256, 128, 32\)"):
        peers.measure("zentorch", Path("/bin/false"), peers.TINY[0], threads=1, calls=2)
    with pytest.raises(
        typer.BadParameter,
        match=r"expected some of \('zentorch', 'openvino', 'onnxruntime', 'ggml', 'vllm'\), got 'onednn'",
    ):
        peers.main(["onednn"])
    with pytest.raises(RuntimeError, match=r"group size: expected one of \(32,\) for ggml, got 64"):
        peers.measure("ggml", Path(sys.executable), (33, 256, 128, 64), threads=1, calls=2)
    with pytest.raises(RuntimeError, match=r"vllm failed at draw \(2, 9, 1.0, None, 0.5\)"):
        peers.Worker("vllm", Path("/bin/false"), (2, 9, 1.0, None, 0.5), 1, "draw").seconds()
    with pytest.raises(AbsentError, match=r"not installed \(python -m mgt_benchmarks.peers vllm\)"):
        peers.Worker.start_draw("vllm", Path("nowhere"), (2, 9, 1.0, None, 0.5), threads=1)
    with pytest.raises(AbsentError, match="has groups of 32 only"):
        peers.Worker.start("ggml", peers.FOLDER, (33, 256, 128, 64), threads=1)


def test_a_worker_is_a_contestant():
    worker = peers.Worker.start("float32", Path("nowhere"), peers.TINY[0], threads=1)
    assert worker.seconds() > 0 and worker.error() < 1e-6


def test_an_absent_library_says_how_to_install_it(tmp_path):
    with pytest.raises(AbsentError, match=r"not installed \(python -m mgt_benchmarks.peers openvino\)"):
        peers.Worker.start("openvino", tmp_path, peers.TINY[0], threads=1)
    # installed, but broken: no reason to stop
    python = tmp_path / "openvino" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho ImportError: no openvino >&2\nexit 1\n")
    python.chmod(0o755)
    (tmp_path / "openvino" / "finished").touch()
    with pytest.raises(AbsentError, match="ImportError: no openvino"):
        peers.Worker.start("openvino", tmp_path, peers.TINY[0], threads=1)
