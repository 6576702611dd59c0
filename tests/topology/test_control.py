"""Control connections over real sockets; the ranks are threads of this process."""

import contextlib
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hortator.topology import tether as tether_module
from hortator.topology import wire as wire_module
from hortator.topology.control import MAX_STRANGERS, ControlServer
from hortator.topology.dial import probe
from hortator.topology.errors import LeaderLost, PortTaken, Refused
from hortator.topology.frames import Framer, Kind
from hortator.topology.tether import EXIT_LEADER_LOST, EXIT_STOPPED, ControlClient
from hortator.topology.vitals import Cause, Trouble

KEY = bytes(range(32))
EPOCH = 3


class Front:
    """A server that a thread polls, and the ranks that joined it."""

    def __init__(self, world_size: int, **timing: float) -> None:
        chosen = {"heartbeat_s": 0.1, "heartbeat_timeout_s": 0.6, "stall_timeout_s": 1.0} | timing
        self.server = ControlServer(**chosen)  # type: ignore[arg-type]
        self.server.begin(epoch=EPOCH, key=KEY, world_size=world_size)
        self.troubles: list[Trouble] = []
        self.ended: list[tuple[int, int, str]] = []
        self._clients: list[ControlClient] = []
        self._strangers: list[socket.socket] = []
        self.polling = threading.Event()
        self._turn = threading.Lock()
        self.polling.set()
        self._over = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over:
            if self.polling.is_set():
                with self._turn:
                    self.troubles += self.server.poll(0.05)
            else:
                time.sleep(0.01)

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[ControlServer]:
        """The server while nobody polls it: it belongs to one thread at a time."""
        self.polling.clear()
        with self._turn:
            yield self.server
        self.polling.set()

    def rank(self, number: int, *, key: bytes = KEY, epoch: int = EPOCH, **hello: Any) -> ControlClient:
        client = ControlClient(
            self.server.address,
            key=key,
            epoch=epoch,
            rank=number,
            heartbeat_s=0.1,
            timeout_s=0.6,
            stall_timeout_s=1.0,
            end=lambda code, reason: self.ended.append((number, code, reason)),
        )
        self._clients.append(client)
        client.hello(**({"fingerprint": {"weights": "a"}} | hello))
        return client

    def stranger(self, source: str = "127.0.0.1") -> socket.socket:
        self._strangers.append(socket.create_connection(self.server.address, timeout=5, source_address=(source, 0)))
        return self._strangers[-1]

    def wait(self, probe: Callable[[], Any], timeout_s: float = 5.0) -> float:
        """Until the probe holds; how long it took."""
        started = time.monotonic()
        while not probe():
            assert time.monotonic() - started < timeout_s, (self.troubles, self.server.rejected, self.ended)
            time.sleep(0.01)
        return time.monotonic() - started

    def trouble(self, cause: Cause, timeout_s: float = 5.0) -> Trouble:
        self.wait(lambda: any(t.cause is cause for t in self.troubles), timeout_s)
        return next(t for t in self.troubles if t.cause is cause)

    def close(self) -> None:
        self._over = True
        self._thread.join()
        self.server.close()
        for client in self._clients:
            client.close()
        for thread in threading.enumerate():
            if thread.name == "hortator-tether":
                thread.join()
        for stranger in self._strangers:
            stranger.close()


@pytest.fixture
def front() -> Iterator[Front]:
    front = Front(world_size=2)
    yield front
    front.close()


def is_closed(sock: socket.socket) -> bool:
    """The other end has dropped this connection (what it had sent before does not count)."""
    try:
        while sock.recv(4096):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


# --- joining


def test_ranks_are_welcomed_when_all_are_there_and_learn_where_to_meet(front: Front) -> None:
    peer = front.rank(1)
    with pytest.raises(LeaderLost, match="not complete"):
        peer.wait_welcome(0.2)
    leader = front.rank(0, store=["127.0.0.1", 4711])
    assert leader.wait_welcome(5)["store"] == peer.wait_welcome(5)["store"] == ["127.0.0.1", 4711]
    assert front.troubles == []


@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_with_another_fingerprint_is_refused_by_name(front: Front, first: int) -> None:
    fingerprints = [{"weights": "aaa", "dtype": "f"}, {"weights": "bbb", "dtype": "f"}]
    clients = {n: front.rank(n, fingerprint=fingerprints[n]) for n in (first, 1 - first)}
    with pytest.raises(Refused, match="weights is 'bbb', on rank 0 it is 'aaa'"):
        clients[1].wait_welcome(5)
    trouble = front.trouble(Cause.REFUSED)
    assert trouble.ranks == (1,)
    assert trouble.message.startswith("rank 1 (pid ")


def test_an_entry_that_only_one_rank_has_is_a_difference(front: Front) -> None:
    front.rank(0, fingerprint={"weights": "a"})
    front.rank(1, fingerprint={"weights": "a", "quantized": "yes"})
    assert "quantized is 'yes', on rank 0 it is None" in front.trouble(Cause.REFUSED).message


def test_limits_that_differ_after_loading_are_refused(front: Front) -> None:
    clients = [front.rank(0), front.rank(1)]
    clients[0].ready({"limits": {"kv_tokens": 64}, "details": {"host": "x"}})
    clients[1].ready({"limits": {"kv_tokens": 32}, "details": {"host": "y"}})
    assert "kv_tokens is 32, on rank 0 it is 64" in front.trouble(Cause.REFUSED).message


def test_the_group_is_ready_when_every_rank_is(front: Front) -> None:
    clients = [front.rank(0), front.rank(1)]
    clients[0].ready({"limits": {"a": 1}})
    time.sleep(0.2)
    assert front.server.info is None
    clients[1].ready({"limits": {"a": 1}})
    front.wait(lambda: front.server.info == {"limits": {"a": 1}})


def test_a_rank_that_fails_before_it_can_say_hello_is_heard(front: Front) -> None:
    client = ControlClient(front.server.address, key=KEY, epoch=EPOCH, rank=1)
    client.fail("config_error", "no such directory: /models/x")
    client._sock.close()
    trouble = front.trouble(Cause.FAILED)
    assert (trouble.ranks, trouble.code, trouble.message) == ((1,), "config_error", "no such directory: /models/x")


# --- waking


def test_wake_of_rank_0_reaches_every_peer_and_is_not_lost_if_it_comes_early(front: Front) -> None:
    leader, peer = front.rank(0), front.rank(1)
    leader.wake()
    time.sleep(0.1)
    peer.wait_wake()
    leader.wake()
    peer.wait_wake()


def test_wake_of_a_peer_is_not_relayed(front: Front) -> None:
    front.rank(0)
    front.rank(1).wake()
    assert "unexpected WAKE" in front.trouble(Cause.GONE).message


# --- dying


def test_a_rank_whose_process_ends_is_noticed_within_a_second(front: Front) -> None:
    front.rank(0)
    peer = front.rank(1)
    front.wait(lambda: len(front.server.vitals) == 2)
    peer.close()
    assert front.wait(lambda: front.troubles) < 1.0
    assert front.troubles[0].ranks == (1,)
    assert front.troubles[0].cause is Cause.GONE


def test_a_rank_that_stops_beating_is_noticed(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    front.rank(0)
    peer = front.rank(1)
    peer.ready({})
    monkeypatch.setattr(peer, "_send", lambda *_: None)
    took_s = front.wait(lambda: front.troubles)
    assert front.troubles[0].ranks == (1,)
    assert front.troubles[0].cause is Cause.SILENT
    assert 0.5 < took_s < 1.5


def test_a_busy_rank_without_progress_is_noticed_although_it_beats(front: Front) -> None:
    leader, peer = front.rank(0), front.rank(1)
    for client in (leader, peer):
        client.ready({})
        client.busy = True
    leader.step, peer.step = 4, 3
    took_s = front.wait(lambda: front.troubles)
    assert front.troubles[0].ranks == (1,)
    assert front.troubles[0].cause is Cause.STALLED
    assert 0.9 < took_s < 2.2


def test_progress_keeps_a_busy_rank_alive(front: Front) -> None:
    counter = iter(range(10**9))
    for client in (front.rank(0), front.rank(1)):
        client.ready({})
        client.busy = True
        client.progress = lambda: next(counter)
    time.sleep(1.6)
    assert front.troubles == []


def test_a_rank_ends_when_the_front_closes_the_connection() -> None:
    front = Front(world_size=1)
    front.rank(0).wait_welcome(5)
    front.close()
    assert front.wait(lambda: front.ended) < 1.0
    assert front.ended[0][:2] == (0, EXIT_LEADER_LOST)


def test_a_rank_ends_when_the_front_is_silent(front: Front) -> None:
    """The connection stays open: the front is stopped, or the network is cut."""
    client = front.rank(0)
    front.rank(1)
    client.wait_welcome(5)
    client.ready({})
    front.polling.clear()
    took_s = front.wait(lambda: [e for e in front.ended if e[0] == 0])
    assert "silent" in front.ended[0][2]
    assert 0.4 < took_s < 1.7
    front.polling.set()


def test_nobody_is_blamed_when_the_whole_machine_was_paused(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither beats nor polls for longer than silence is borne."""
    clients = [front.rank(0), front.rank(1)]
    for client in clients:
        client.ready({})
        client._silence_s = 60.0
    front.wait(lambda: front.server.info is not None)
    with monkeypatch.context() as pause:
        for client in clients:
            pause.setattr(client, "_send", lambda *_: None)
        front.polling.clear()
        time.sleep(1.0)
        front.polling.set()
        time.sleep(0.1)
    time.sleep(0.3)
    assert front.troubles == []


def test_stop_ends_every_rank(front: Front) -> None:
    front.rank(0)
    front.rank(1).wait_welcome(5)
    with front.at_rest() as server:
        server.stop()
    front.wait(lambda: len(front.ended) == 2)
    assert {code for _, code, _ in front.ended} == {EXIT_STOPPED}


def test_a_new_epoch_drops_the_ranks_of_the_old_one(front: Front) -> None:
    front.rank(0)
    front.rank(1).wait_welcome(5)
    front.polling.clear()
    time.sleep(0.2)
    with front.at_rest() as server:
        server.begin(epoch=EPOCH + 1, key=KEY, world_size=2)
    front.polling.set()
    front.wait(lambda: len(front.ended) == 2)
    assert front.troubles == []


# --- strangers


def rejected_for(front: Front, reason: str) -> Callable[[], bool]:
    return lambda: any(reason in text for text in front.server.rejected)


def test_garbage_costs_the_stranger_its_connection(front: Front) -> None:
    stranger = front.stranger()
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert is_closed(stranger)
    front.wait(rejected_for(front, "bad magic"))


def test_a_rank_of_an_old_epoch_is_turned_away(front: Front) -> None:
    with pytest.raises(LeaderLost, match=f"epoch {EPOCH}, not {EPOCH - 1}"):
        front.rank(0, epoch=EPOCH - 1)
    stranger = front.stranger()
    stranger.sendall(Framer(KEY, epoch=EPOCH - 1, front=False).seal(Kind.HELLO, rank=0))
    assert is_closed(stranger)
    front.wait(rejected_for(front, f"epoch {EPOCH - 1}, not {EPOCH}"))


def test_hello_with_a_wrong_key_is_turned_away(front: Front) -> None:
    stranger = front.stranger()
    framer = Framer(bytes(32), epoch=EPOCH, front=False)
    stranger.sendall(framer.seal(Kind.HELLO, rank=0))
    assert is_closed(stranger)
    front.wait(rejected_for(front, "wrong HMAC"))
    assert front.server.vitals == {}


@pytest.mark.parametrize(("number", "reason"), [(2, "unknown rank"), (1, "duplicate rank")])
def test_a_rank_that_is_not_expected_is_turned_away(front: Front, number: int, reason: str) -> None:
    first = front.rank(1)
    front.wait(lambda: 1 in front.server.vitals)
    front.rank(number)
    front.wait(rejected_for(front, reason))
    front.rank(0)
    first.wait_welcome(5)
    assert front.troubles == []


def test_half_a_frame_is_dropped_after_a_while(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_module, "HELLO_TIMEOUT_S", 0.3)
    stranger = front.stranger()
    with contextlib.suppress(ConnectionError):  # the front may have dropped it before the last byte
        for byte in Framer(KEY, epoch=EPOCH, front=False).seal(Kind.HELLO, rank=0)[:12]:
            stranger.sendall(bytes([byte]))
            time.sleep(0.02)
    assert is_closed(stranger)
    front.wait(rejected_for(front, "no HELLO in time"))


class Canary:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._path,))


def test_a_pickle_is_not_opened(front: Front, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    stranger = front.stranger()
    stranger.sendall(pickle.dumps(Canary(canary)))
    assert is_closed(stranger)
    pickle.loads(pickle.dumps(Canary(tmp_path / "proof")))
    assert (tmp_path / "proof").exists()
    assert not canary.exists()


def test_a_crowd_of_strangers_does_not_keep_ranks_out(front: Front) -> None:
    for _ in range(3 * MAX_STRANGERS):
        front.stranger()
    front.wait(lambda: front.server.rejected["too many strangers"] >= MAX_STRANGERS)
    leader = front.rank(0)
    front.rank(1)
    leader.wait_welcome(5)
    assert front.troubles == []


def test_a_host_that_sends_a_crowd_crowds_out_its_own(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_module, "HELLO_TIMEOUT_S", 60.0)
    quiet = front.stranger()
    for _ in range(3 * MAX_STRANGERS):
        front.stranger(source="127.0.0.2")
    front.wait(lambda: front.server.rejected["too many strangers"] >= MAX_STRANGERS)
    quiet.settimeout(0.3)
    assert not is_closed(quiet)


def test_a_stranger_that_announces_much_is_turned_away_at_once(front: Front) -> None:
    long = Framer(KEY, epoch=EPOCH, front=False).seal(Kind.HELLO, rank=0, payload={"x": "x" * (1 << 17)})
    stranger = front.stranger()
    stranger.sendall(long[:100])
    assert is_closed(stranger)
    front.wait(rejected_for(front, "bytes announced"))


def test_reasons_that_strangers_make_up_are_not_all_kept(front: Front) -> None:
    for epoch in range(100, 300):
        with front.stranger() as stranger:
            stranger.sendall(Framer(KEY, epoch=epoch, front=False).seal(Kind.HELLO, rank=0))
            assert is_closed(stranger)
    front.wait(lambda: sum(front.server.rejected.values()) == 200)
    assert len(front.server.rejected) <= wire_module.MAX_REASONS + 1


def test_strangers_do_not_slow_the_ranks_down(front: Front) -> None:
    leader, peer = front.rank(0), front.rank(1)
    leader.wait_welcome(5)
    over = threading.Event()

    def pester() -> None:
        while not over.is_set():
            with front.stranger() as stranger:
                stranger.sendall(b"HRTC" + bytes(200))

    thread = threading.Thread(target=pester)
    thread.start()
    try:
        started = time.monotonic()
        for _ in range(50):
            leader.wake()
            peer.wait_wake()
        assert time.monotonic() - started < 3.0
    finally:
        over.set()
        thread.join()
    assert front.troubles == []
    assert sum(front.server.rejected.values()) > 0


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(PortTaken, match=f"127.0.0.1:{port}: Address already in use"):
            ControlServer("127.0.0.1", port)


# --- a link that was cut for a moment


def test_a_rank_whose_connection_is_stuck_is_kept_by_its_probes(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tether_module, "TICK_S", 0.05)
    front.rank(0)
    front.rank(1).ready({})
    front.wait(lambda: front.server.vitals.get(1) and front.server.vitals[1].ready)
    wire = front.server._wire
    for end in ("_serve", "_flush"):
        monkeypatch.setattr(wire, end, except_for(1, getattr(wire, end)))
    time.sleep(2.0)
    assert (front.troubles, front.ended) == ([], [])


def except_for(member: int, method: Callable[..., None]) -> Callable[..., None]:
    def instead(connection: Any, *arguments: Any) -> None:
        if connection.member != member:
            method(connection, *arguments)

    return instead


def test_nobody_can_probe_for_a_rank_that_has_not_joined_or_in_another_epoch(front: Front) -> None:
    front.rank(0)
    front.wait(lambda: 0 in front.server.vitals)
    address = front.server.address
    assert probe(address, key=KEY, epoch=EPOCH, rank=0, payload={})
    assert not probe(address, key=KEY, epoch=EPOCH, rank=1, payload={})
    assert not probe(address, key=KEY, epoch=EPOCH - 1, rank=0, payload={})
    assert not probe(address, key=bytes(32), epoch=EPOCH, rank=0, payload={})
