"""Probes over links that are slow."""

import socket
import threading
import time

from hortator.topology.dial import probe
from hortator.topology.frames import FRONT, Framer, Kind

KEY = bytes(range(32))
DELAY_S = 0.18


def slow_front(listener: socket.socket) -> None:
    """Greets and answers one probe; each word takes a while."""
    sock, _ = listener.accept()
    with sock:
        framer = Framer(KEY, epoch=1, front=True)
        nonce = bytes(16)
        time.sleep(DELAY_S)
        sock.sendall(framer.seal(Kind.CHALLENGE, rank=FRONT, payload={"nonce": nonce.hex()}))
        framer.rekey(nonce)
        (frame,) = framer.feed(sock.recv(4096))
        assert frame.kind is Kind.PROBE
        time.sleep(DELAY_S)
        sock.sendall(framer.seal(Kind.BEAT, rank=FRONT))


def test_a_probe_gets_through_where_each_answer_takes_most_of_a_fifth_of_a_second() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        front = threading.Thread(target=slow_front, args=(listener,))
        front.start()
        host, port = listener.getsockname()
        assert probe((host, port), key=KEY, epoch=1, rank=1, payload={})
        front.join()
