"""A structure that would take all memory or time of a rank takes only the process in which it is tried."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from hortator.producer.errors import BadRequest
from hortator.workers.engine import structure as structures
from hortator.workers.engine import trials
from hortator.workers.engine.step import Structure, StructureKind
from hortator.workers.engine.structure import Grammars
from tests.workers.engine.byte_tokenizer import write_tokenizer
from tests.workers.engine.checkpoints import EOS, VOCAB


def schema(value: Any) -> Structure:
    return Structure(StructureKind.JSON_SCHEMA, json.dumps(value))


def innocent(number: int) -> Structure:
    return Structure(StructureKind.REGEX, f"[a-z]{{{number}}}")


def intersection(count: int) -> Structure:
    parts = " & ".join(f"/(.*a.{{{i}}}b.*)/" for i in range(count))
    return Structure(StructureKind.LARK, f"start: /x/ T\nT: {parts}")


PATTERNS = schema({"type": "string", "allOf": [{"pattern": f"(a|b)*a(a|b){{{i + 5}}}"} for i in range(20)]})
MULTIPLES = schema({"type": "integer", "multipleOf": 1000003})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def grammars(directory: Path) -> Iterator[Grammars]:
    made = Grammars.of(directory, vocab_size=VOCAB, eos_token_ids=(EOS,))
    assert made is not None
    made.compile(innocent(1)).result(30)
    yield made
    made.close()


def _refusal(grammars: Grammars, structure: Structure) -> str:
    error = grammars.compile(structure).exception(30)
    assert isinstance(error, BadRequest)
    return error.message


def test_what_would_take_all_memory_or_time_is_refused_and_the_rank_pays_nothing(grammars: Grammars) -> None:
    before, spent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    futures = [grammars.compile(structure) for structure in (intersection(40), PATTERNS, MULTIPLES)]
    assert grammars.compile(innocent(2)).result(30) is not None
    reasons = [str(future.exception(30)) for future in futures]
    assert all("it takes more than" in reason for reason in reasons), reasons
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
    assert time.process_time() - spent < 1


SMALL = """
import sys
from hortator.workers.engine import trial
trial.MAX_BYTES, trial._CUT_S = 4 << 20, 60.0
trial.main(sys.argv[1:])
"""


def test_the_memory_of_a_trial_is_limited_and_the_next_one_is_not_hurt(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "_PROGRAM", (sys.executable, "-c", SMALL))
    grammars = Grammars(directory / "tokenizer.json", vocab_size=VOCAB, eos_token_ids=(EOS,))
    assert "GiB of memory" in _refusal(grammars, intersection(40))
    assert grammars.compile(innocent(1)).result(30) is not None
    grammars.close()


def test_what_waits_too_long_behind_others_fails_by_itself(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structures, "_MAX_QUEUED_S", -1.0)
    assert "try again later" in _refusal(grammars, innocent(3))


def _below(grammars: Grammars) -> list[psutil.Process]:
    (process,) = grammars._trials._processes
    top = psutil.Process(process.pid)
    return [top, *top.children(recursive=True)]


def test_a_process_that_is_lost_is_replaced(directory: Path) -> None:
    grammars = Grammars(directory / "tokenizer.json", vocab_size=VOCAB, eos_token_ids=(EOS,))
    grammars.compile(innocent(1)).result(30)
    lost = _below(grammars)
    assert len(lost) >= 3, "one that starts, two lanes, and perhaps the last trial"
    for process in lost:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for number in range(2, 6):
        assert grammars.compile(innocent(number)).result(30) is not None
    grammars.close()


def test_all_of_them_end_when_they_are_no_longer_needed(directory: Path) -> None:
    grammars = Grammars(directory / "tokenizer.json", vocab_size=VOCAB, eos_token_ids=(EOS,))
    grammars.compile(innocent(1)).result(30)
    processes = _below(grammars)
    grammars.close()
    assert psutil.wait_procs(processes, timeout=10)[1] == []


KILLED = """
import sys
from pathlib import Path
from hortator.workers.engine.step import Structure, StructureKind
from hortator.workers.engine.structure import Grammars
grammars = Grammars(Path(sys.argv[1]), vocab_size=256, eos_token_ids=[0])
grammars.compile(Structure(StructureKind.REGEX, "a")).result()
print(grammars._trials._processes[0].pid, flush=True)
sys.stdin.read()
"""


def test_all_of_them_end_with_a_rank_that_is_killed(directory: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(directory / "tokenizer.json")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        top = psutil.Process(int(rank.stdout.readline()))
        processes = [top, *top.children(recursive=True)]
        rank.kill()
    assert len(processes) >= 3
    assert psutil.wait_procs(processes, timeout=10)[1] == []
