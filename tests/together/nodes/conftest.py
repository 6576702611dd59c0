"""Groups across machines.  Where machines cannot be made, the tests fail and say why."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.together.nodes.cluster import Cluster, secret_in
from tests.together.nodes.faults import wait_ready
from tests.together.nodes.machines import missing


@pytest.fixture(scope="session", autouse=True)
def machines_can_be_made() -> None:
    if reason := missing():
        pytest.fail(reason)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two machines, and a group of two ranks that ssh has started: one on each."""
    with Cluster(tmp_path_factory.mktemp("pair"), ["nodeA", "nodeB"]) as cluster:
        wait_ready(cluster.worker())
        yield cluster


@pytest.fixture
def empty_pair(tmp_path: Path) -> Iterator[Cluster]:
    """Two machines, and no group yet."""
    with Cluster(tmp_path, ["nodeA", "nodeB"]) as cluster:
        secret_in(tmp_path)
        yield cluster
