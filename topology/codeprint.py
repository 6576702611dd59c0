"""Which code this is: for hosts and ranks that must run the same, whatever their version says."""

import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path


def code_digest(package: Path | None = None) -> str:
    """Over the names and bytes of all Python and Lua files of a package; default: of all of hortator."""
    top = package or Path(__file__).parent.parent
    state = blake2b(digest_size=8)
    for file in sorted(_sources(top)):
        state.update(f"{file.relative_to(top)}\0".encode())
        state.update(blake2b(file.read_bytes()).digest())
    return state.hexdigest()


def _sources(top: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(top, followlinks=True):  # in a checkout the folders of the package are links
        yield from (Path(folder, name) for name in names if name.endswith((".py", ".lua")))
