"""What the library says is wrong with a structure, in terms of what the request had sent.

The library puts regexes and choices into a grammar of its own, `start: /.../`, and quotes that.  Line and column of it
would mislead.
"""

import re

from .step import Structure, StructureKind

_WRAPPER = re.compile(r"\Aat \d+\(\d+\): |\n\s*\d+ \| .*\Z", re.DOTALL)
_PARSE_ERROR = re.compile(r"regex parse error:\n {4}(?P<shown>[^\n]*)\n {4}(?P<before> *)\^+\nerror: (?P<what>[^\n]+)")
_WRITTEN = re.compile(r"\\.|.", re.DOTALL)


def complaint(structure: Structure, error: str) -> str:
    """One line."""
    if structure.kind in (StructureKind.REGEX, StructureKind.CHOICE):
        error = _WRAPPER.sub("", error)
    if structure.kind is StructureKind.REGEX and (found := _PARSE_ERROR.search(error)):
        place = _place(structure.definition, found["shown"], len(found["before"]))
        return f"regex: {found['what']}" + (f", at character {place}" if place else "")
    return " ".join(error.split())


def _place(pattern: str, shown: str, column: int) -> int | None:
    """Where in the pattern, from 1, what the library shows at `column` is: it escapes slashes and ends of lines."""
    origins: list[int] = []
    text = ""
    for piece in _WRITTEN.finditer(pattern):
        written = {"/": r"\/", "\n": r"\n"}.get(piece[0], piece[0])
        origins += [piece.start() + (at if len(piece[0]) > 1 else 0) for at in range(len(written))]
        text += written
    origins.append(len(pattern))
    return origins[column] + 1 if text == shown and column < len(origins) else None
