"""Which code this is: for ranks that must run the same, whatever their version says."""

from hashlib import blake2b
from pathlib import Path

import hortator.producer
import hortator.topology
import hortator.workers


def code_digest() -> str:
    """Over the names and bytes of all of hortator's Python files."""
    state = blake2b(digest_size=8)
    for package in (hortator.producer, hortator.topology, hortator.workers):
        (folder,) = package.__path__
        root = Path(folder).resolve()
        for path in sorted(root.rglob("*.py")):
            state.update(f"{package.__name__}/{path.relative_to(root)}\0".encode())
            state.update(blake2b(path.read_bytes()).digest())
    return state.hexdigest()
