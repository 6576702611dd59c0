"""The store under test: the memory twin, and Redis of every version on this machine."""

from collections.abc import Iterator

import pytest

from hortator.producer.embedded import EmbeddedRedis
from tests.conftest import REDIS_EXECUTABLES, flushed
from tests.producer.rig import MemoryRig, RedisRig, Rig


@pytest.fixture(params=["memory", *REDIS_EXECUTABLES])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """Every promise of the seam is tested on all of them."""
    if request.param == "memory":
        yield MemoryRig()
        return
    servers: dict[str, EmbeddedRedis] = request.getfixturevalue("redis_servers")
    redis_rig = RedisRig(flushed(servers[request.param]))
    yield redis_rig
    redis_rig.close()


@pytest.fixture
def redis_rig(redis_url: str) -> Iterator[RedisRig]:
    """Redis only, every version: for what only Redis has."""
    rig = RedisRig(redis_url)
    yield rig
    rig.close()
