"""`hortator leader`: what runs on the host of a leader when a command of another host asks for it."""

import json
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hortator.cli_errors import EXIT_OK

if TYPE_CHECKING:
    from hortator.topology.leaders import StateDirectory

TAIL_ENDS = "\x1e"  # a record separator: what follows it is new


def register(app: typer.Typer) -> None:
    app.command(hidden=True)(leader)


def leader() -> int:
    """Start, find, stop or read the leaders of this host: an order as JSON on stdin."""
    from hortator.topology.leaders import Leaders, Order, StateDirectory
    from hortator.topology.neighbours import neighbours

    order = json.loads(sys.stdin.buffer.readline())
    state = StateDirectory(Path(order["directory"]), order["fleet"])
    match order["do"]:
        case "start":
            print_json(state.start(Order.model_validate(order["order"])).model_dump(mode="json"))
        case "check":
            state.check()
            print_json({})
        case "list":
            found = Leaders(leaders=tuple(state.leaders()), neighbours=tuple(neighbours(state.directory)))
            print_json(found.model_dump(mode="json"))
        case "stop":
            born = order.get("born", "")
            print_json({"ended": state.stop(order["group"], patience_s=float(order["patience_s"]), born=born)})
        case "left":
            print_json({"left": state.left(int(pid) for pid in order["pids"])})
        case "log":
            print_log(state, order["group"], int(order["lines"]), follow=bool(order["follow"]))
        case other:
            raise typer.BadParameter(f"{other!r} is nothing that a leader's host can do")
    return EXIT_OK


def print_log(state: "StateDirectory", group: str, num_lines: int, *, follow: bool) -> None:
    """The last lines, and with `follow` what comes, until whoever asked is gone: stdin ends then."""
    lines = state.follow(group) if follow else None
    if lines is not None:
        next(lines)  # it looks from here on
    for text in state.tail(group, num_lines):
        print_line(text)
    print_line(TAIL_ENDS)
    if lines is None:
        return
    gone = threading.Event()
    threading.Thread(target=wait_for_end, args=(gone,), daemon=True).start()
    for text in lines:
        if gone.is_set():
            return
        if text:
            print_line(text)


def wait_for_end(gone: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):  # nothing is expected
        pass
    gone.set()


def print_line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_json(value: Mapping[str, Any]) -> None:
    print_line(json.dumps(value))
