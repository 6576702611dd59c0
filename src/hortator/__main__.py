"""`hortator` and `python -m hortator`."""

import sys

from hortator.interrupts import EXIT_INTERRUPTED, interrupts, leave_at_once


def main() -> None:
    """Run the command line; what can go wrong as expected ends in one line on stderr and an exit code."""
    leave_at_once()
    from hortator.cli import run
    from hortator.cli_output import open_streams

    open_streams()
    try:
        interrupts.watch()
        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # in the moment between
        code = EXIT_INTERRUPTED
    interrupts.rest()
    sys.exit(code)


if __name__ == "__main__":
    main()
