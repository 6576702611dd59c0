"""A few seeds of fuzz.py: every layout gives random workloads the tokens that one rank with all the room gives them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
SEEDS = "2,3,4"
"""Many are preempted; fused layers, and digests that must be those of one rank; soft-caps, windows and structures."""

pytestmark = pytest.mark.timeout(240)  # nine processes on a machine that may be busy


@pytest.fixture(scope="module")
def said() -> list[dict[str, Any]]:
    """Findings, and the summary."""
    argv = [sys.executable, "-m", "tests.workers.engine.fuzz", "--seeds", SEEDS]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=230, check=False)
    assert done.stdout, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_random_workloads_get_in_every_layout_what_one_rank_gives_them(said: list[dict[str, Any]]) -> None:
    assert said[:-1] == []


def test_they_were_worth_the_while(said: list[dict[str, Any]]) -> None:
    """Preempted, refused and resumed ones were among them, and hardly any were near a tie."""
    summary = said[-1]
    assert summary["seeds"] == 3
    assert min(summary[name] for name in ("preemptions", "faults", "returns")) > 5
    assert summary["ties"] < 5
