"""One fleet per test; it ends everything it started."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.together.fleet import Fleet


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path) as running:
        yield running
