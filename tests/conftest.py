"""What every test runs on: all CPU instruction sets of this machine, poisoned outputs, two threads."""

import pytest
import torch

from mgt_kernels import cpu


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", cpu.available_isas())
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["reference", *cpu.available_isas()])


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
