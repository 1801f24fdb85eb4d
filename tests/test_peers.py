"""The comparison with other libraries: what is compared computes the layer, and failures are told."""

import sys
from pathlib import Path

import pytest
import typer

from benchmarks import peers


@pytest.mark.parametrize(
    "name, error", [("float32", 1e-6), ("bfloat16", 0.01), ("mgt-kernels", 0.12), ("mgt-kernels bfloat16", 0.12)]
)
def test_a_layer_is_timed_in_a_process_of_its_own(name, error):
    measured = peers.measure(name, Path(sys.executable), peers.TINY[0], threads=1, calls=2)
    assert measured["seconds"] > 0 and 0 < measured["error"] < error


def test_what_fails_says_so():
    with pytest.raises(RuntimeError, match=r"zentorch failed at layer \(33, 256, 128, 64\)"):
        peers.measure("zentorch", Path("/bin/false"), peers.TINY[0], threads=1, calls=2)
    with pytest.raises(typer.BadParameter, match=r"expected some of \('zentorch', 'openvino'\), got 'onednn'"):
        peers.main(["onednn"])
