"""`hortator` and `python -m hortator`."""

import sys


def main() -> None:
    """Run the command line; what can go wrong as expected ends in one line on stderr and an exit code."""
    from hortator.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
