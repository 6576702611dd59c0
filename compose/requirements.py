"""Print what a set of extras needs, one requirement a line: `python requirements.py pyproject.toml api worker`.

The image installs these before the product, so that a new version of the product is a new layer of some hundred
kilobytes and not one with torch in it.
"""

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: str, extras: list[str]) -> list[str]:
    """The project's own requirements and those of `extras`.  Raises KeyError for an extra that is not there."""
    project = tomllib.loads(pyproject)["project"]
    optional = project["optional-dependencies"]
    return sorted({*project["dependencies"], *(line for extra in extras for line in optional[extra])})


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements(Path(sys.argv[1]).read_text(encoding="utf-8"), sys.argv[2:])) + "\n")
