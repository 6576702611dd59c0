"""How a command gets to a host: over ssh, or straight when the host is this one."""

import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .fleet import Ssh
from .network import addresses_of, read_interfaces
from .placement import check_host
from .ssh import SshOptions


@dataclass(frozen=True, slots=True)
class Road:
    """`program` is the ssh client.  `here`: those of the hosts that are this one."""

    ssh: Ssh
    program: str = "ssh"
    here: frozenset[str] = frozenset()

    def argv(self, host: str, command: Sequence[str]) -> tuple[str, ...]:
        """What to run here so that `command` runs there.  sshd hands it to a login shell, hence the quoting."""
        if host in self.here:
            return tuple(command)
        options = ssh_options(self.ssh).arguments()
        return (self.program, "-T", *options, "--", check_host(host), shlex.join(command))


def ssh_options(ssh: Ssh, *, python: str = sys.executable) -> SshOptions:
    """The fleet file's [ssh] as launchers want it."""
    return SshOptions(
        ssh.user, ssh.port, ssh.identity_file, ssh.known_hosts_file, python, connect_timeout_s=ssh.connect_timeout_s
    )


def road(ssh: Ssh, hosts: Iterable[str], *, program: str = "ssh") -> Road:
    """The road to these hosts; those that are this one need no ssh."""
    own = {address for interface in read_interfaces() for address in interface.addresses}
    return Road(ssh, program, frozenset(host for host in hosts if own & set(addresses_of(host))))
