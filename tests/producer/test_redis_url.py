"""Where Redis is: every party refuses the same URLs, with what to write and without a password."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from hortator.producer import AsyncClient, Client, ConfigError
from hortator.producer.embedded import EmbeddedRedis
from hortator.producer.redis_store import AsyncRedisStore, RedisStore
from hortator.producer.redis_url import checked_redis_url, kombu_url
from hortator.producer.settings import StoreSettings
from hortator.workers.celery import App
from hortator.workers.fleet_control import FleetControl
from hortator.workers.settings import WorkerSettings
from tests.workers.real_worker import Client as CeleryClient
from tests.workers.real_worker import Worker

WRONG = {
    "": "begins with",
    "localhost:6379": "begins with",
    "http://localhost": "begins with",
    "redis://h:99999/0": "port",
    "redis://h:0/0": "port",
    "redis://h:port/0": "port",
    "redis://:pa#s3kret@h:6379/0": "port",
    "redis://[::1/0": "IPv6",
    "redis://[x]/0": "IPv6",
    "redis://h/0?foo=bar": "foo",
    "redis://h/0?password=s3kret": "password",
    "redis://me@h/0?username=x": "username",
    "redis://h/0?db=1": "db",
    "redis://h/0?ssl_cert_reqs=none": "ssl_cert_reqs",
    "redis://http://h:6379": "database",
    "redis://h/abc": "database",
    "redis://h/-1": "database",
    "redis://h/0#x": "#",
    "redis://h 1:6379/0": "space",
    "redis://h\n:6379/0": "space",
    "redis://h;x/0": "host",
    "redis://": "host",
    "redis://:s3kret@/0": "host",
    "unix://": "socket",
    "unix:///tmp/s?db=x": "db",
    "unix:///tmp/s?password=s3kret": "password",
    "unix://host/tmp/s": "///",
}


@pytest.mark.parametrize("url", WRONG)
def test_a_url_that_cannot_work_is_refused_with_what_is_wrong_and_no_password(url: str) -> None:
    with pytest.raises(ValueError, match=WRONG[url]) as refused:
        checked_redis_url(url)
    assert "redis://HOST:PORT/DB" in str(refused.value)
    assert "s3kret" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "redis://h:6379",
        "redis://10.0.0.1:6379/",
        "redis://me:p%40ss@my_redis-1.example:6379/15",
        "redis://:pw@[fd00::1]:6379/0",
        "rediss://h:6380/0?ssl_cert_reqs=required&ssl_ca_certs=%2Fetc%2Fca.pem",
        "unix:///run/redis.sock",
        "unix://:pw@/run/redis.sock?db=3",
    ],
)
def test_a_url_that_the_clients_read_is_taken_as_it_is(url: str) -> None:
    assert checked_redis_url(url) == url


@pytest.mark.parametrize(
    "party",
    [
        RedisStore,
        AsyncRedisStore,
        Client,
        AsyncClient,
        lambda url: StoreSettings(redis_url=url),
        lambda url: WorkerSettings(redis_url=url, model="m", engine="echo"),
    ],
)
def test_every_party_refuses_the_same_url(party: Callable[[str], object]) -> None:
    with pytest.raises((ConfigError, ValidationError), match="the URL of Redis has a port") as refused:
        party("redis://:s3kret@h:99999/0")
    assert "s3kret" not in str(refused.value)


def test_a_celery_worker_refuses_it_before_it_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HORTATOR_REDIS_URL", "redis://h:99999/0")
    with pytest.raises(ConfigError, match="port"):
        App()


@pytest.fixture(scope="module")
def unix_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory: Path = tmp_path_factory.mktemp("u")
    with EmbeddedRedis(unixsocket=directory / "r.sock"):
        yield f"unix://{directory}/r.sock?db=3"


def test_clients_work_over_a_unix_socket(unix_url: str) -> None:
    async def ask() -> int:
        async with AsyncRedisStore(unix_url, timeout_s=5.0) as store:
            await store.check(for_submits=True)
            return len(await store.queues())

    with Client(unix_url, require_known_model=False, timeout_s=5.0) as client:
        client.enqueue("hello", model="m")
    assert asyncio.run(ask()) == 1


def test_leader_celery_client_and_remote_control_meet_at_one_database_over_a_unix_socket(
    unix_url: str, tmp_path: Path
) -> None:
    """kombu takes the database from another parameter, and would without a word use the first one."""
    with Worker(unix_url, tmp_path) as worker:
        control = FleetControl(unix_url, "", worker.ready().store)
        job = CeleryClient(kombu_url(unix_url)).send(tokens=2)
        assert job.get(timeout=10)["finish_reason"] == "length"
        assert control.tell("look", [worker.name])[worker.name].state == "ready"
        control.close()
