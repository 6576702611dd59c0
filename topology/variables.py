"""Which variables the front may set in the environment of a rank on another host.  Pure."""

import re
from collections.abc import Iterable

from .address import shown
from .errors import CannotStart

OWN_PREFIX = "HORTATOR_"
RANK_CONFIG = "HORTATOR_RANK_CONFIG"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_DECIDES_WHAT_RUNS = re.compile(r"LD_.*|PYTHON.*|PATH|HOME|IFS|ENV|BASH_ENV|GCONV_PATH")
_HARMLESS = frozenset({"LD_LIBRARY_PATH", "PYTHONUNBUFFERED", "PYTHONFAULTHANDLER", "PYTHONHASHSEED"})


def variable_problem(name: str, *, by_ssh: bool = False) -> str | None:
    """Why a rank on another host is not given this variable; None if it is.

    Of our own only a rank's configuration goes: the front's may hold the URL of Redis.  A keeper that somebody else
    started starts one program for the front and nothing else, so what would make another one of it stays behind; who
    has started a keeper over ssh could run anything there.
    """
    if not _NAME.fullmatch(name):
        return f"{shown(name)} is no variable's name"
    if name.startswith(OWN_PREFIX) and name != RANK_CONFIG:
        return f"{name} is the front's alone"
    if not by_ssh and _DECIDES_WHAT_RUNS.fullmatch(name) and name not in _HARMLESS:
        return f"{name} decides which code a rank runs: set it on the hosts themselves"
    return None


def check_variables(names: Iterable[str], *, launcher: str) -> None:
    """Raises CannotStart for what keepers of this launcher would refuse."""
    for name in names:
        if problem := variable_problem(name, by_ssh=launcher in ("local", "ssh")):
            raise CannotStart(f"launcher={launcher} cannot pass it on to other hosts: {problem}")
