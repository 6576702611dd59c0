"""A group's name has one leader, with real leaders that compete for it."""

import signal
from pathlib import Path

from tests.together.fleet import Fleet, wait_for

START_S = 90.0  # three leaders import and start, one after the other, on whatever else the machine does


def test_a_second_leader_of_a_name_ends_and_names_the_first_and_one_that_was_killed_is_replaced(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        first = fleet.worker(tensor_parallel_size=1).ready(timeout_s=START_S)
        second = fleet.worker(tensor_parallel_size=1)
        assert second.wait(START_S) != 0
        assert f"group one is led by pid {first.pid} on " in second.tail()
        beat = first.beat()
        assert beat is not None
        assert (beat.state, beat.info["pid"]) == ("ready", first.pid), "the second one took no leave in its name"
        first.signal(signal.SIGKILL)
        third = fleet.worker(tensor_parallel_size=1)

        def leads() -> bool:
            now = third.beat()
            return now is not None and now.info["pid"] == third.pid and now.state == "ready"

        wait_for("the third one leads", leads, START_S)
