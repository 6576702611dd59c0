"""Closing the doors through which the ranks have met: from then on nobody can reach the mesh's ports.

torch's store takes what anybody stores in it, without limit, and loses memory over garbage; gloo listens, too.  Once
every pair of ranks is connected neither needs another connection, but neither has a way to say so.  A filter of the
kernel's that drops every packet for the listening sockets does it; connections that stand are sockets of their own.
"""

import contextlib
import ctypes
import os
import socket
import struct

SO_ATTACH_FILTER = 26
_DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)  # BPF: return 0 bytes


def close_doors() -> int:
    """Drop whatever still comes for a listening TCP socket of this process; how many there are."""
    program = ctypes.create_string_buffer(_DROP_ALL)
    described = struct.pack("HL", 1, ctypes.addressof(program))
    num_closed = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as sock:
            if sock.family in (socket.AF_INET, socket.AF_INET6) and _listens(sock):
                sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, described)
                num_closed += 1
    return num_closed


def _listens(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
