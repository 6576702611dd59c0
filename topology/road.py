"""How a command gets to a host: over ssh, or straight when the host is this one."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .fleet import Ssh
from .network import addresses_of, read_interfaces


@dataclass(frozen=True, slots=True)
class Road:
    """`program` is the ssh client.  `here`: addresses of this host."""

    ssh: Ssh
    program: str = "ssh"
    here: frozenset[str] = frozenset()

    def argv(self, host: str, command: Sequence[str]) -> tuple[str, ...]:
        """What to run here so that `command` runs there.  `host` has been checked (address.py): it begins with no '-'.

        sshd gives what it gets to the user's login shell, hence the quoting.
        """
        if host in self.here:
            return tuple(command)
        return (*self.client(host), shlex.join(command))

    def client(self, host: str) -> tuple[str, ...]:
        """ssh up to and with the host: never asks anything, and gives up on a silent host."""
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": str(self.ssh.connect_timeout_s),
            "ConnectionAttempts": "1",
            "ServerAliveInterval": "5",
            "ServerAliveCountMax": "3",
            "LogLevel": "ERROR",
            "ForwardX11": "no",
            "ForwardAgent": "no",
        }
        argv = [self.program, "-T", "-p", str(self.ssh.port)]
        for name, value in options.items():
            argv += ["-o", f"{name}={value}"]
        if self.ssh.identity_file is not None:
            argv += ["-i", str(self.ssh.identity_file)]
        return (*argv, "--", f"{self.ssh.user}@{host}" if self.ssh.user else host)


def road(ssh: Ssh, hosts: Iterable[str], *, program: str = "ssh") -> Road:
    """The road to these hosts; those that are this one need no ssh."""
    own = {address for interface in read_interfaces() for address in interface.addresses}
    return Road(ssh, program, frozenset(host for host in hosts if own & set(addresses_of(host))))
