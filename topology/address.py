"""What may name a host, a user, an interpreter: all end up in the arguments of ssh, so nothing that ssh or the shell
behind it would read as something else passes."""

import re
from ipaddress import IPv4Address, IPv6Address, ip_address

MAX_NAME_CHARS = 253
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")
_PYTHON = re.compile(r"[A-Za-z0-9_./+][A-Za-z0-9_./+-]*")
_MAX_SHOWN_CHARS = 60


def address_problem(text: str) -> str | None:
    """Why `text` is no IPv4 or IPv6 address and no RFC 1123 host name; None if it is one."""
    if not text:
        return "a host's name is empty"
    if text.startswith("-"):
        return f"host {shown(text)} begins with '-', which ssh would take for an option"
    if "@" in text:
        return f"host {shown(text)} has a user before '@': give the user once, as ssh.user in the fleet file"
    if ":" in text:
        return None if _parses(IPv6Address, text) and "%" not in text else f"{shown(text)} is no IPv6 address"
    return _name_problem(text)


def _name_problem(text: str) -> str | None:
    if len(text) > MAX_NAME_CHARS:
        return f"host {shown(text)} has {len(text)} characters: a name has at most {MAX_NAME_CHARS}"
    labels = text.split(".")
    if labels[-1].isdecimal():  # RFC 1123, 2.1: no name ends in a numeric label, so this is meant to be an address
        return None if _parses(IPv4Address, text) else f"{shown(text)} is no IPv4 address"
    if not all(_LABEL.fullmatch(label) for label in labels):
        return f"{shown(text)} is no host name: its parts are of letters, digits and inner '-', up to 63 characters"
    return None


def canonical(address: str) -> str:
    """One spelling for what is the same host: names in lower case, IPv6 compressed."""
    return str(IPv6Address(address)) if ":" in address else address.lower()


def means_this_host(text: str) -> bool:
    """Whether it says, and not only happens to resolve to, the loopback interface."""
    return text.lower() == "localhost" or is_loopback(text)


def is_loopback(text: str) -> bool:
    """Whether this is an address of the loopback interface."""
    try:
        return ip_address(text).is_loopback
    except ValueError:
        return False


def user_problem(text: str) -> str | None:
    """Why `text` is no user's name, as useradd takes it; None if it is one."""
    return None if _USER.fullmatch(text) else f"{shown(text)} is not the name of a user (32 letters, digits and _.-)"


def python_problem(text: str) -> str | None:
    """Why this cannot be the interpreter on other hosts: it stands in a command of their shells; None if it can."""
    return None if _PYTHON.fullmatch(text) else f"{shown(text)}: a path of letters, digits and _./+- only"


def host_port(host: str, port: int) -> str:
    """One word for both; an IPv6 address goes in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def unbracketed(text: str) -> str:
    """`[2001:db8::1]` is 2001:db8::1; all else is what it is."""
    return text[1:-1] if text.startswith("[") and text.endswith("]") and ":" in text else text


def shown(text: str) -> str:
    """A piece of somebody's file for an error message: quoted, escaped, not too long."""
    return repr(text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "...")


def _parses(kind: type[IPv4Address] | type[IPv6Address], text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True
