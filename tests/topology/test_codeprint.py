"""The digest of the code that hosts and ranks compare."""

import shutil
from pathlib import Path

import pytest

import hortator
from hortator.topology.codeprint import code_digest

INSTALLED = Path(hortator.__path__[0])


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package as a wheel would have it: without links."""
    return Path(shutil.copytree(INSTALLED, tmp_path / "hortator", ignore=shutil.ignore_patterns("__pycache__")))


def test_the_same_code_has_the_same_digest_wherever_it_lies(copy: Path) -> None:
    assert code_digest(copy) == code_digest()


@pytest.mark.parametrize("file", ["cli.py", "producer/claim.lua", "workers/engine/scheduler.py", "topology/plan.py"])
def test_a_change_in_any_file_of_the_package_is_seen(copy: Path, file: str) -> None:
    with (copy / file).open("a") as opened:
        opened.write("\n")
    assert code_digest(copy) != code_digest()
