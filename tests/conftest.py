"""What every test runs on: all CPU instruction sets of this machine, poisoned outputs, two threads."""

import pytest
import torch

from mgt_kernels import cpu
from mgt_kernels.info import OPS


def pytest_addoption(parser):
    parser.addoption(
        "--every-architecture",
        action="store_true",
        help="emulate every case of tests/gpu on sm_80 and sm_90, and count sm_89 and sm_100 too",
    )


def kernels_of(module: str) -> list[str]:
    """The instruction sets that have a kernel of their own for what a test file is about."""
    op = module.removeprefix("test_")
    op = op if op in OPS else "sample_tokens"
    return [isa for isa in cpu.available_isas() if cpu.kernel_isa(op, isa) == isa]


def pytest_generate_tests(metafunc):
    kernels = kernels_of(metafunc.module.__name__)
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", kernels)
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["reference", *kernels])


@pytest.fixture(autouse=True)
def poisoned_outputs():
    # fills what torch.empty returns with NaN and the largest integer
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(two_threads):
    # thousands of tiny ops, which a second thread only slows down
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
