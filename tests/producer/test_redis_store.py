"""What only Redis has: keys, expiry, memory, timeouts, lost replies, other processes."""

import asyncio
import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from hortator.producer.embedded import EmbeddedRedis
from hortator.producer.errors import ConfigError, StoreForbidden, StoreUnavailable, StoreUnsuitable
from hortator.producer.names import TABLE
from hortator.producer.redis_store import AsyncRedisStore, RedisStore
from hortator.producer.rules import Rules
from hortator.producer.schema import State
from hortator.producer.script import script
from hortator.producer.server import refuse_unsuitable
from hortator.producer.store import GroupBeat, Holder, Lease, Receipt, ReleaseReason, Signals, Verdict
from tests.conftest import REDIS_EXECUTABLES
from tests.producer.rig import MODEL, NAMESPACE, RedisRig, done, foreign, job, prompts_of, tokens

LUA = sorted(path.stem for path in Path("producer").glob("*.lua"))


@pytest.fixture(params=list(REDIS_EXECUTABLES))
def own_redis(request: pytest.FixtureRequest) -> Iterator[EmbeddedRedis]:
    """A server that the test may hurt."""
    with EmbeddedRedis(executable=REDIS_EXECUTABLES[request.param]) as server:
        yield server


def store_of(server: EmbeddedRedis, **rules: object) -> RedisStore:
    store = RedisStore(server.url, rules=Rules(**rules), timeout_s=5)  # type: ignore[arg-type]
    store.beat(GroupBeat("g", MODEL, 0, 8, 1, "ready"))
    return store


def busy(rig: RedisRig) -> None:
    """Something of everything."""
    rig.enqueue("a", "b", idempotency_key=None, deadline_s=100, metadata={"k": "v"}, priority="batch")
    rig.enqueue("c", idempotency_key="key", priority="interactive")
    rig.enqueue("d")
    rig.push(b"junk" * 200, step=9)
    rig.push(foreign(), step=9)
    leases = [one.lease for one in rig.claim(4).jobs]
    rig.store.append([tokens(lease, 0, 1) for lease in leases])
    rig.store.commit([done(leases[0])])
    rig.store.release(leases[1:3], reason=ReleaseReason.CRASHED)
    rig.claim(1, owner="busy", idle=False)
    rig.enqueue("e", priority="interactive")
    rig.push(foreign("more"), step=9)
    rig.store.beat(GroupBeat("group", MODEL, 0, 8, 1, "ready", room=8))


def pattern(key: str) -> re.Pattern[str]:
    parts = re.split(r"\{[a-z]+\}", key.replace("\\x06\\x16", "\x06\x16"))
    return re.compile("[^ \x06]+".join(map(re.escape, parts)))


def test_every_key_is_in_the_table_with_its_type_and_expiry(redis_rig: RedisRig) -> None:
    busy(redis_rig)
    redis_rig.store.issued("x", tenant="y")
    redis_rig.store.hold(Holder("g", "host", 1, "place", "born", "life"))
    seen = set()
    for name in redis_rig.all_keys():
        assert name.startswith(NAMESPACE)
        rows = [row for row in TABLE if pattern(row.pattern).fullmatch(name.removeprefix(NAMESPACE))]
        if not name.startswith(f"{NAMESPACE}{MODEL}"):
            rows = [row for row in rows if row.pattern[0] != "{"]
        assert len(rows) == 1, name
        [row] = rows
        seen.add(row.pattern)
        assert redis_rig.redis.type(name).decode() == row.type, name
        may_expire = row.expiry.endswith(("_ttl_s", "lease_s", "3 s after a beat"))
        assert may_expire or redis_rig.redis.pttl(name) == -1, name
        assert not (may_expire and row.expiry.startswith(("result", "idem", "lease")) and redis_rig.redis.ttl(name) < 0)
    assert seen == {row.pattern for row in TABLE}


def test_names_build_exactly_the_keys_that_the_scripts_use(redis_rig: RedisRig) -> None:
    names = redis_rig.names
    [job_id] = redis_rig.enqueue("x", idempotency_key="k")
    used = set(redis_rig.all_keys())
    assert {
        names.job(job_id),
        names.queue(MODEL, 3),
        names.depth(MODEL),
        names.deadlines,
        names.models,
        names.groups,
        names.secret,
        names.idempotency("default", "k"),
    } == used


@pytest.mark.parametrize("name", LUA)
def test_every_script_opens_with_a_table_of_the_keys_it_touches(name: str) -> None:
    text = Path(f"producer/{name}.lua").read_text()
    header = text[: text.index("\n\n") if name == "record" else re.search(r"^[^-]", text, re.M).start()]  # type: ignore[union-attr]
    assert text.startswith(f"-- {name}:")
    assert "| key" in header
    for key in re.findall(r"own \.\. '([a-z]+)", text):
        assert key == "nothing" or f"{key}" in header, f"{name}.lua touches {key}"


def test_finished_jobs_leave_only_keys_that_expire(redis_rig: RedisRig) -> None:
    [a, b, c] = redis_rig.enqueue("a", "b", "c", deadline_s=1000)
    lease = redis_rig.claim_one()
    redis_rig.store.append([tokens(lease, 0, 1)])
    redis_rig.store.commit([done(lease)])
    redis_rig.store.cancel([b, c])
    redis_rig.claim()
    for job_id in (a, b, c):
        keys = redis_rig.all_keys(f"*{job_id}*")
        assert len(keys) == 3
        assert all(redis_rig.redis.ttl(key) > 0 for key in keys)
    assert redis_rig.redis.zcard(redis_rig.names.deadlines) == 0
    assert redis_rig.redis.zcard(redis_rig.names.leases(MODEL)) == 0
    assert redis_rig.redis.exists(redis_rig.names.depth(MODEL)) == 0


def test_the_prompt_and_the_result_are_each_kept_once(redis_rig: RedisRig) -> None:
    def holding(text: bytes) -> list[str]:
        return [key for key in redis_rig.all_keys() if text in redis_rig.redis.dump(key)]

    import base64

    redis_rig.redis.config_set("rdbcompression", "no")  # or DUMP hides the text
    body = base64.b64encode(b"P" * 30)[3:-3]
    [job_id] = redis_rig.enqueue("P" * 50)
    names = redis_rig.names
    assert holding(body) == [names.queue(MODEL, 3)]
    lease = redis_rig.claim_one()
    assert holding(body) == [names.message(job_id)]
    redis_rig.store.commit([done(lease, "R" * 10 + "unlikely text")])
    assert holding(body) == []
    assert holding(b"unlikely text") == [names.result(job_id)]


def test_the_journal_ends_with_a_terminal_marker(redis_rig: RedisRig) -> None:
    [a, b] = redis_rig.enqueue("a", "b")
    lease = redis_rig.claim_one()
    redis_rig.store.append([tokens(lease, 0, 1, 2)])
    redis_rig.store.commit([done(lease)])
    redis_rig.store.cancel([b])
    entries = redis_rig.redis.xrange(redis_rig.names.journal(a))
    assert [entry[0] for entry in entries] == [b"2-0", b"2-1"]
    assert entries[1][1] == {b"state": b"succeeded"}
    assert redis_rig.redis.xrange(redis_rig.names.journal(b)) == [(b"0-1", {b"state": b"cancelled"})]


def test_two_namespaces_share_a_redis_and_nothing_else(redis_rig: RedisRig) -> None:
    with RedisStore(redis_rig.url, namespace="other.", timeout_s=5) as other:
        other.beat(GroupBeat("g", MODEL, 0, 8, 1, "ready"))
        [receipt] = other.enqueue([job("theirs")])
        redis_rig.enqueue("ours")
        assert prompts_of(redis_rig.claim()) == ["ours"]
        assert redis_rig.store.statuses([receipt.job_id]) == [None]
        assert not redis_rig.store.issued(receipt.job_id, tenant="default")
        assert other.queues()[0].depth == 1


def test_scripts_are_loaded_again_after_redis_forgot_them(redis_rig: RedisRig) -> None:
    redis_rig.redis.script_flush()
    [job_id] = redis_rig.enqueue("x")
    redis_rig.redis.script_flush()
    assert redis_rig.state(job_id) is State.QUEUED


def test_scripts_recognise_a_repetition_whose_first_reply_was_lost(redis_rig: RedisRig) -> None:
    """claim is the one call whose repetition would otherwise strand jobs until their leases end."""
    [a, b, c] = redis_rig.enqueue("a", "b", "c")
    store = redis_rig.another()
    call = store._calls.claim(MODEL, "a", 2, 60, True)
    redis_rig.redis.eval(script("claim").text.decode(), 0, *call.args)  # taken, and nobody hears of it
    claim = store.claim(MODEL, owner="a", limit=5, lease_s=60, idle=True)
    assert [one.lease.job_id for one in claim.jobs] == [a, b]
    assert [one.lease.attempt for one in claim.jobs] == [1, 1]
    assert prompts_of(claim) == ["a", "b"]
    assert [one.lease.job_id for one in store.claim(MODEL, owner="a", limit=5, lease_s=60, idle=True).jobs] == [c]
    assert store.claim(MODEL, owner="a", limit=5, lease_s=60, idle=True).jobs == ()


def test_a_reply_that_an_outage_of_some_leases_swallowed_is_told_after_it(redis_rig: RedisRig) -> None:
    [job_id] = redis_rig.enqueue("a")
    store = redis_rig.another()
    call = store._calls.claim(MODEL, "a", 2, 0.02, True)
    redis_rig.redis.eval(script("claim").text.decode(), 0, *call.args)
    redis_rig.wait(0.1)
    [claimed] = store.claim(MODEL, owner="a", limit=5, lease_s=60, idle=True).jobs
    assert claimed.lease == Lease(job_id, 1)
    assert store.sweep().requeued == ()


def test_a_lost_reply_is_not_told_to_a_restarted_leader_of_the_same_name(redis_rig: RedisRig) -> None:
    redis_rig.enqueue("a")
    call = redis_rig.another()._calls.claim(MODEL, "a", 2, 60, True)
    redis_rig.redis.eval(script("claim").text.decode(), 0, *call.args)
    assert redis_rig.another().claim(MODEL, owner="a", limit=5, lease_s=60, idle=True).jobs == ()


def test_a_lost_reply_leaves_out_what_ended_meanwhile(redis_rig: RedisRig) -> None:
    [a, b] = redis_rig.enqueue("a", "b")
    store = redis_rig.another()
    call = store._calls.claim(MODEL, "a", 2, 60, True)
    redis_rig.redis.eval(script("claim").text.decode(), 0, *call.args)
    store.commit([done(Lease(a, 1))])
    claim = store.claim(MODEL, owner="a", limit=5, lease_s=60, idle=True)
    assert [one.lease.job_id for one in claim.jobs] == [b]


class Proxy:
    """Passes bytes on to Redis; when armed it swallows the next reply and cuts that connection."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self.armed = False
        self.swallowed = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                redis_end = socket.create_connection(("127.0.0.1", self._upstream))
                for pair in ((client, redis_end, False), (redis_end, client, True)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, is_reply: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if is_reply and self.armed:
                    self.armed = False
                    self.swallowed += 1
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def test_a_reply_that_is_cut_off_is_asked_for_again_and_nothing_happens_twice(redis_rig: RedisRig) -> None:
    proxy = Proxy(int(redis_rig.url.rpartition(":")[2].partition("/")[0]))
    with RedisStore(f"redis://127.0.0.1:{proxy.port}/0", namespace=NAMESPACE, timeout_s=5) as store:
        store.queues()  # connected

        def cut(call: Callable[[], Any]) -> Any:
            proxy.armed = True
            return call()

        receipts = cut(lambda: store.enqueue([job("a"), job("b")], job_ids=["a", "b"]))
        assert [receipt.job_id for receipt in receipts] == ["a", "b"]
        assert redis_rig.depth() == 2
        claim = cut(lambda: store.claim(MODEL, owner="o", limit=5, lease_s=60, idle=True))
        leases = [one.lease for one in claim.jobs]
        assert leases == [Lease("a", 1), Lease("b", 1)]
        assert cut(lambda: store.append([tokens(lease, 0, 7) for lease in leases])) == Signals()
        assert redis_rig.status("a").num_tokens == 1
        assert cut(lambda: store.renew(leases, owner="o", lease_s=60)) == Signals()
        assert cut(lambda: store.commit([done(leases[0])])) == [Verdict.COMMITTED]
        cut(lambda: store.release(leases[1:], reason=ReleaseReason.CRASHED))
        assert redis_rig.store.queues()[0].suspects == 1
        assert redis_rig.claim().jobs[0].lease == Lease("b", 2)
        assert cut(lambda: store.cancel(["a", "b"])) == [State.SUCCEEDED, State.RUNNING]
        assert proxy.swallowed == 7
    proxy.close()


def test_killed_connections_are_only_a_reconnect(redis_rig: RedisRig) -> None:
    redis_rig.enqueue("a")
    for _ in range(5):
        redis_rig.redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        redis_rig.enqueue("b")
    assert redis_rig.depth() == 6


def test_a_restarted_redis_has_everything_that_was_accepted(own_redis: EmbeddedRedis) -> None:
    with store_of(own_redis) as store:
        ids = [receipt.job_id for receipt in store.enqueue([job(str(i)) for i in range(50)])]
        claimed = store.claim(MODEL, owner="a", limit=10, lease_s=60, idle=True).jobs
        store.append([tokens(one.lease, 0, 1) for one in claimed])
        own_redis.kill()
        with pytest.raises(StoreUnavailable):
            store.statuses(ids)
        own_redis.restart()
        states = [status.state for status in store.statuses(ids) if status]
        assert states.count(State.RUNNING) == 10
        assert states.count(State.QUEUED) == 40
        assert store.commit([done(claimed[0].lease)]) == [Verdict.COMMITTED]


@pytest.mark.parametrize("how", ["refused", "stopped", "stopped, connected before"])
def test_a_submit_fails_fast_when_redis_is_away(own_redis: EmbeddedRedis, how: str) -> None:
    store_of(own_redis).close()
    with RedisStore(own_redis.url) as store:
        if how != "stopped":
            store.enqueue([job()])
        own_redis.kill() if how == "refused" else own_redis.pause()
        try:
            took = []
            for _ in range(3):
                started = time.monotonic()
                with pytest.raises(StoreUnavailable):
                    store.enqueue([job()])
                took.append(time.monotonic() - started)
            assert min(took) < 0.3
        finally:
            own_redis.resume() if how != "refused" else None


def test_submits_are_refused_before_redis_is_full_and_results_still_commit(own_redis: EmbeddedRedis) -> None:
    client: Any = redis.Redis.from_url(own_redis.url)
    with client, store_of(own_redis) as store:
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 3_000_000)
        accepted: list[Receipt] = []

        def fill() -> None:
            while len(accepted) < 10_000:
                accepted.extend(store.enqueue([job("x" * 20_000)]))

        with pytest.raises(StoreUnavailable, match="full"):
            fill()
        info = client.info("memory")
        assert info["used_memory"] < info["maxmemory"]
        assert len(accepted) == store.queues()[0].depth > 10
        client.config_set("maxmemory", 1_000_000)  # now it is over its limit
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.set("k", "v")
        claim = store.claim(MODEL, owner="a", limit=5, lease_s=60, idle=True)
        leases = [one.lease for one in claim.jobs]
        store.append([tokens(lease, 0, 1) for lease in leases])
        store.renew(leases, owner="a", lease_s=60)
        assert store.commit([done(lease) for lease in leases[:3]]) == [Verdict.COMMITTED] * 3
        store.release(leases[3:4], reason=ReleaseReason.CRASHED)
        store.release(leases[4:], reason=ReleaseReason.DRAINED)
        store.beat(GroupBeat("g2", MODEL, 0, 8, 1, "ready"))
        store.bury(MODEL, b"x", reason="test")
        store.sweep()
        assert store.cancel([leases[4].job_id]) == [State.CANCELLED]
        assert len(store.claim(MODEL, owner="a", limit=5, lease_s=60, idle=True).jobs) == 1


def test_a_write_that_redis_itself_refuses_leaves_nothing_half_written(own_redis: EmbeddedRedis) -> None:
    client: Any = redis.Redis.from_url(own_redis.url)
    with client, store_of(own_redis, memory_headroom=-100.0) as store:  # our own check is out of the way
        store.enqueue([job()])
        before = set(client.keys())
        client.config_set("maxmemory", 1_000_000)
        with pytest.raises(StoreUnavailable, match="takes no writes"):
            store.enqueue([job(str(i), deadline_s=9, idempotency_key=str(i)) for i in range(20)])
        assert set(client.keys()) == before
        assert store.queues()[0].depth == 1


def test_a_redis_that_evicts_is_refused_with_the_remedy(own_redis: EmbeddedRedis) -> None:
    with store_of(own_redis) as store, redis.Redis.from_url(own_redis.url) as client:
        store.check()
        client.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(StoreUnsuitable, match=r"CONFIG SET maxmemory-policy noeviction"):
            store.check()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"redis_version": "6.0.16"}, "too old"),
        ({"redis_version": "5.0"}, "too old"),
        ({"cluster_enabled": 1}, "Cluster"),
        ({"role": "slave"}, "replica"),
        ({"maxmemory_policy": "volatile-ttl"}, "volatile-ttl"),
    ],
)
def test_an_unsuitable_server_is_refused_with_the_reason(change: dict[str, object], reason: str) -> None:
    good = {"redis_version": "6.2.0", "cluster_enabled": 0, "role": "master", "maxmemory_policy": "noeviction"}
    refuse_unsuitable(good)
    with pytest.raises(StoreUnsuitable, match=reason):
        refuse_unsuitable(good | change)


def test_a_check_of_an_absent_redis_says_where_it_looked() -> None:
    with RedisStore("redis://127.0.0.1:1/0") as store, pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1"):
        store.check()


@pytest.mark.parametrize("url", ["", "localhost:6379", "http://localhost", "redis://localhost:port/0"])
def test_a_wrong_url_is_a_clear_error(url: str) -> None:
    with pytest.raises(ConfigError, match="redis://HOST:PORT/DB"):
        RedisStore(url)


def test_a_wrong_password_is_a_clear_error_and_is_not_repeated(own_redis: EmbeddedRedis) -> None:
    with redis.Redis.from_url(own_redis.url) as client:
        client.config_set("requirepass", "right")
    with (
        RedisStore(own_redis.url.replace("//", "//:wr0ng@")) as store,
        pytest.raises(ConfigError, match="credentials") as caught,
    ):
        store.check()
    assert "wr0ng" not in str(caught.value)


@pytest.mark.parametrize("rights", ["+@all -evalsha -eval", "+@all -lpush", "+@all -del"])
def test_missing_rights_are_told_from_a_redis_that_is_away(redis_rig: RedisRig, rights: str) -> None:
    redis_rig.redis.execute_command("ACL", "SETUSER", "limited", "on", ">pw", "~*", "&*", *rights.split())
    try:
        with (
            RedisStore(redis_rig.url.replace("//", "//limited:pw@"), namespace=NAMESPACE) as store,
            pytest.raises(StoreForbidden, match="credentials"),
        ):
            _ask_for_all(store)
    finally:
        redis_rig.redis.execute_command("ACL", "DELUSER", "limited")


def _ask_for_all(store: RedisStore) -> None:
    store.enqueue([job()], job_ids=["id-1"])
    store.check(for_submits=True)


def test_a_check_for_submits_sees_what_a_submit_would_meet(own_redis: EmbeddedRedis) -> None:
    with redis.Redis.from_url(own_redis.url) as admin, RedisStore(own_redis.url, timeout_s=5) as store:
        store.check(for_submits=True)
        admin.config_set("maxmemory", "1mb")
        store.check()  # leaders may start: they are the ones that make room
        with pytest.raises(StoreUnavailable, match="nearly full"):
            store.check(for_submits=True)
        admin.config_set("maxmemory", "0")
        admin.config_set("min-replicas-to-write", 1)
        with pytest.raises(StoreUnavailable, match="takes no writes"):
            store.check(for_submits=True)


def test_the_asyncio_store_keeps_the_same_promises(redis_rig: RedisRig) -> None:
    async def scenario() -> None:
        async with AsyncRedisStore(redis_rig.url, namespace=NAMESPACE, timeout_s=5) as store:
            await store.check(for_submits=True)
            receipts = await store.enqueue([job(str(i)) for i in range(600)])
            ids = [receipt.job_id for receipt in receipts]
            running = [redis_rig.claim_one() for _ in range(2)]
            redis_rig.store.append([tokens(lease, 0, 1, 2) for lease in running])
            assert (await store.cancel(ids[1:3])) == [State.RUNNING, State.CANCELLED]
            statuses = await store.statuses(ids)
            assert [status.state.value for status in statuses[:4] if status] == [
                "running",
                "running",
                "cancelled",
                "queued",
            ]
            assert await store.ended(ids) == [ids[2]]
            assert len(await store.chunks(ids[0], after=1)) == 1
            assert (await store.queues())[0].depth == 597
            letter_id = redis_rig.store.bury(MODEL, b"x", reason="test")
            assert [letter.letter_id for letter in await store.dead_letters()] == [letter_id]
            assert (await store.sweep()).requeued == ()
            assert await store.issued(ids[0], tenant="default")

    asyncio.run(scenario())


def test_the_asyncio_store_fails_as_fast(own_redis: EmbeddedRedis) -> None:
    async def scenario() -> None:
        async with AsyncRedisStore(own_redis.url) as store:
            await store.queues()
            own_redis.pause()
            took = []
            for _ in range(3):
                started = time.monotonic()
                with pytest.raises(StoreUnavailable):
                    await store.enqueue([job()])
                took.append(time.monotonic() - started)
            assert min(took) < 0.3
            own_redis.resume()

    asyncio.run(scenario())


def test_a_redis_that_evicts_takes_no_submits_and_says_what_to_set(own_redis: EmbeddedRedis) -> None:
    raw: Any = redis.Redis.from_url(own_redis.url)
    with raw, store_of(own_redis) as store:
        raw.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(StoreUnsuitable, match=r"allkeys-lru.*CONFIG SET maxmemory-policy noeviction"):
            store.enqueue([job()])
        assert [queue.depth for queue in store.queues()] == [0]
        raw.config_set("maxmemory-policy", "noeviction")
        assert store.enqueue([job()])


@pytest.mark.parametrize("kind", ["string", "a longer journal"])
def test_what_lies_under_a_job_s_keys_cannot_stop_its_end(redis_rig: RedisRig, kind: str) -> None:
    [queued, running] = redis_rig.enqueue("a", "b")
    redis_rig.store.cancel([queued])
    lease = redis_rig.claim_one()
    for job_id in (queued, running):
        if kind == "string":
            redis_rig.redis.set(redis_rig.names.journal(job_id), "x")
        else:
            redis_rig.redis.xadd(redis_rig.names.journal(job_id), {"c": "x"}, id="99-0")
    assert redis_rig.store.commit([done(lease)]) == [Verdict.COMMITTED]
    assert redis_rig.state(running) is State.SUCCEEDED
    assert [entry[0] for entry in redis_rig.redis.xrange(redis_rig.names.journal(running))] == [b"0-1"]


def test_nothing_of_an_earlier_life_of_an_id_is_left(redis_rig: RedisRig) -> None:
    for job_id in ("own", "foreign", "malformed"):
        redis_rig.redis.xadd(redis_rig.names.journal(job_id), {"c": '[0,[1],"old",null]'}, id="1-0")
        redis_rig.redis.set(redis_rig.names.result(job_id), "old")
    redis_rig.store.enqueue([job()], job_ids=["own"])
    redis_rig.push(foreign("foreign"))
    redis_rig.push(foreign("malformed", properties=None))
    redis_rig.claim()
    for job_id in ("own", "foreign"):
        assert redis_rig.store.chunks(job_id) == []
        assert b'"STARTED"' in redis_rig.redis.get(redis_rig.names.result(job_id))
    assert redis_rig.state("malformed") is State.FAILED
