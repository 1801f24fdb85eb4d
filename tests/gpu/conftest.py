"""Which architectures a version of Triton is tested on, and which tests a version that is not the newest runs."""

import pytest

ARCHITECTURES = (80, 90)


def oldest_triton() -> bool:
    """Tell whether Triton is of the oldest version that the package allows, which PyTorch 2.10 and 2.11 install."""
    triton = pytest.importorskip("triton")
    return triton.__version__.startswith("3.6.")


def pytest_generate_tests(metafunc):
    # tests that name their architectures keep them
    is_named = any("capability" in str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize"))
    if "capability" in metafunc.fixturenames and not is_named:
        every = metafunc.config.getoption("every_architecture")
        metafunc.parametrize("capability", ARCHITECTURES if every else [90 if oldest_triton() else 80])


def pytest_collection_modifyitems(config, items):
    if oldest_triton():
        # what does not depend on an architecture does not depend on the compiler either: the newest has shown it
        config.hook.pytest_deselected(items=[item for item in items if "capability" not in item.fixturenames])
        items[:] = [item for item in items if "capability" in item.fixturenames]
