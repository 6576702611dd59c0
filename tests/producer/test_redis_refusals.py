"""What a Redis says that wants a password, and what people are told of it."""

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest
import redis

from hortator.producer.embedded import EmbeddedRedis
from hortator.producer.errors import StoreForbidden
from hortator.producer.redis_store import AsyncRedisStore, RedisStore
from tests.conftest import REDIS_EXECUTABLES

PROTECTED = b"-DENIED Redis is running in protected mode because protected mode is enabled and no password is set.\r\n"


@pytest.fixture
def protected() -> Iterator[str]:
    """A server's end of protected mode, which real ones show only to other machines: this line, and it hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    link, _ = server.accept()
                except OSError:
                    return
                link.sendall(PROTECTED)
                link.shutdown(socket.SHUT_WR)
                link.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("version", REDIS_EXECUTABLES)
def test_a_redis_that_wants_a_password_is_told_with_how_to_write_it(version: str) -> None:
    with EmbeddedRedis(executable=REDIS_EXECUTABLES[version]) as server, redis.Redis.from_url(server.url) as raw:
        raw.config_set("requirepass", "right")
        with (
            RedisStore(server.url) as store,
            pytest.raises(StoreForbidden, match=r"wants a password.*redis://:PASSWORD@"),
        ):
            store.check()


def test_protected_mode_is_told_with_what_to_do(protected: str) -> None:
    async def ask() -> None:
        async with AsyncRedisStore(protected) as store:
            await store.check()

    with RedisStore(protected) as store, pytest.raises(StoreForbidden, match=r"protected mode.*requirepass"):
        store.check()
    with pytest.raises(StoreForbidden, match=r"protected mode.*requirepass"):
        asyncio.run(ask())
