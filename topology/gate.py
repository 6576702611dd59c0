"""A program that is not begun before it is recorded.

Started as a plain script (`python -I -S gate.py FD COMMAND ...`), never imported: it waits for a byte on FD and becomes
the command, as the same process.  If the other end goes without a word, so does it.
"""

import os
import sys


def main() -> int:
    fd, command = int(sys.argv[1]), sys.argv[2:]
    told = os.read(fd, 1)
    os.close(fd)
    if not told:
        return 0
    try:
        os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        sys.stderr.write(f"hortator: cannot start {command[0]}: {error.strerror}\n")
        return 127


if __name__ == "__main__":
    sys.exit(main())
