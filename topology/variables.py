"""Which variables the front may set in the environment of a rank on another host.  Pure."""

import re

from .address import shown

OWN_PREFIX = "HORTATOR_"
RANK_CONFIG = "HORTATOR_RANK_CONFIG"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_DECIDES_WHAT_RUNS = re.compile(r"LD_.*|PYTHON.*|PATH|HOME|IFS|ENV|BASH_ENV|GCONV_PATH")
_HARMLESS = frozenset({"LD_LIBRARY_PATH", "PYTHONUNBUFFERED", "PYTHONFAULTHANDLER", "PYTHONHASHSEED"})


def variable_problem(name: str) -> str | None:
    """Why a rank on another host is not given this variable; None if it is.

    A keeper starts one program and nothing else, so what would make another one of it stays behind; and of our own
    only a rank's configuration goes: the front's may hold the URL of Redis.
    """
    if not _NAME.fullmatch(name):
        return f"{shown(name)} is no variable's name"
    if name.startswith(OWN_PREFIX) and name != RANK_CONFIG:
        return f"{name} is the front's alone"
    if _DECIDES_WHAT_RUNS.fullmatch(name) and name not in _HARMLESS:
        return f"{name} decides which code a rank runs: set it on the hosts themselves"
    return None
