"""`make demo`'s program as a process: it minds its own business, and Ctrl-C ends all of it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

DEMO = Path(__file__).parents[2] / "demo" / "demo.py"
ELSEWHERE = {"HORTATOR_REDIS_URL": "redis://127.0.0.1:1", "HORTATOR_NAMESPACE": "production:", "HORTATOR_DEVICE": "no"}


def begin(tmp_path: Path) -> subprocess.Popen[str]:
    env = os.environ | ELSEWHERE | {"TMPDIR": str(tmp_path)}
    argv = [sys.executable, str(DEMO), "--tp", "1"]
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Callable[[], bool], limit_s: float = 120) -> None:
    give_up = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_settings_of_the_users_shell_do_not_reach_the_demo(tmp_path: Path) -> None:
    output, _ = (demo := begin(tmp_path)).communicate(timeout=300)
    assert (demo.returncode, "answers are right" in output) == (0, True), output


@pytest.mark.parametrize("sign", ["hortator-demo-*/worker.log", "hortator-demo-*/api.log"])
def test_ctrl_c_leaves_no_process_no_folder_and_no_traceback(tmp_path: Path, sign: str) -> None:
    demo = begin(tmp_path)
    wait_for(lambda: any(tmp_path.glob(sign)))
    begun = psutil.Process(demo.pid).children(recursive=True)
    demo.send_signal(signal.SIGINT)
    demo.send_signal(signal.SIGINT)
    output, _ = demo.communicate(timeout=120)
    assert (demo.returncode, "Traceback" in output) == (130, False), output
    wait_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in begun))
    wait_for(lambda: not list(tmp_path.glob("hortator-*")))
