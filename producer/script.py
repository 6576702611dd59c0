"""The Lua scripts, and one call of one as a value."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Script:
    """One Lua file behind the part that all share."""

    def __init__(self, name: str) -> None:
        folder = Path(__file__).parent
        self.text = (folder / "record.lua").read_bytes() + b"\n" + (folder / f"{name}.lua").read_bytes()
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest()


script = functools.cache(Script)


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One round trip."""

    script: str
    args: Sequence[Any]
    parse: Callable[[Any], T]
