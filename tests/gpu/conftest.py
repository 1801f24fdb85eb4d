"""Which architectures a version of Triton is tested on, and which tests run with a version that is not the newest."""

from importlib.util import find_spec
from pathlib import Path

from versions import architecture_to_compile

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_generate_tests(metafunc):
    # tests that name their architectures keep them
    is_named = any("capability" in str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize"))
    if "capability" in metafunc.fixturenames and not is_named:
        every = metafunc.config.getoption("every_architecture")
        metafunc.parametrize("capability", [80, 90] if every else [architecture_to_compile()])


def pytest_collection_modifyitems(config, items):
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    if here and architecture_to_compile() == 90:
        # what does not depend on an architecture does not depend on the compiler either: the newest has shown it
        left_out = [item for item in here if "capability" not in item.fixturenames]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
