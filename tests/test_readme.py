"""The README's Python blocks run, in order, in one namespace."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_python_blocks_run():
    pytest.importorskip("diffusers")
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["output"].images.shape == (3, 1, 28, 28)
    assert (namespace["tokens"] == 8255).sum() == 240
    assert namespace["scheduler"].config.mask_token_id == 8255


def test_the_files_it_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert target.startswith("http") or (README.parent / target).exists(), target
