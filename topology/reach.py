"""What keeps ssh from a host, by what it says, and what helps.  Pure."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .findings import Finding, grouped, named, wrong


@dataclass(frozen=True, slots=True)
class Obstacle:
    """`words`: any of them tells this one.  HOST in the advice stands for the host's name."""

    words: tuple[str, ...]
    advice: str


KNOWN = (
    Obstacle(
        ("Permission denied", "Too many authentication failures"),
        "put your public key into authorized_keys there (ssh-copy-id HOST), or name user and identity_file under [ssh]",
    ),
    Obstacle(
        ("Host key verification failed", "HOST IDENTIFICATION HAS CHANGED"),
        "check the host's key and accept it once: ssh HOST true",
    ),
    Obstacle(
        ("Could not resolve", "Name or service not known", "name resolution"),
        "correct the name in the hostfile, or make it known to the resolver (/etc/hosts, DNS)",
    ),
    Obstacle(
        ("No module named", "No such file", "not found"),
        "install hortator there under the same path, or name the interpreter (python in the fleet file, --python)",
    ),
    Obstacle(
        ("Connection refused",),
        "the host is up, but no sshd listens on that port: start it, or set port under [ssh]",
    ),
    Obstacle(
        ("timed out", "no answer within", "No route to host", "unreachable"),
        "is the host up (ping HOST)? Does a firewall stand between? If it is slow: connect_timeout_s under [ssh]",
    ),
)
UNKNOWN = Obstacle((), "try it by hand: ssh HOST true")


def obstacle(text: str) -> Obstacle:
    """Which one this complaint is about."""
    return next((one for one in KNOWN if any(words in text for words in one.words)), UNKNOWN)


def ssh_advice(text: str, host: str) -> str:
    """What helps against what ssh, or the shell behind it, says of this host."""
    return obstacle(text).advice.replace("HOST", host)


def unreached(problems: Mapping[str, str]) -> Iterator[Finding]:
    """One finding for each obstacle; hosts that say the same are named together.  `problems`: by host."""
    by_obstacle: dict[Obstacle, dict[str, str]] = {}
    for host, text in problems.items():
        by_obstacle.setdefault(obstacle(text), {})[host] = text
    for one, found in by_obstacle.items():
        alike = grouped({host: without_host(text, host) for host, text in found.items()})
        text = "; ".join(f"{named(hosts)}: {found[hosts[0]]}" for hosts in alike.values())
        yield wrong("ssh", text, one.advice.replace("HOST", next(iter(found))), found)


def without_host(text: str, host: str) -> str:
    """So that the same complaint of many hosts is one."""
    return re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", "HOST", text, flags=re.IGNORECASE)
