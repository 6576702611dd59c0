"""The benchmarks say what they take and measure what they claim; how fast anything is is not tested."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from hortator.topology.traffic import PLAN_HEADER_BYTES
from hortator.workers.engine.build import build_engine
from hortator.workers.engine.parallel import SingleRank
from tests.workers.engine.checkpoints import VOCAB, make_checkpoint

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if "def main()" in path.read_text())


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A script of that folder as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_benchmark_says_what_it_takes(
    script: str,
    benchmark: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit, match="0"):
        benchmark(script).main()
    assert "usage:" in capsys.readouterr().out


def test_the_cost_of_the_step_plan_is_measured_on_real_ranks(tmp_path: Path) -> None:
    options = ["--parts", "plan", "--layouts", "2x1", "--sequences", "1", "8", "--rounds", "1", "--steps", "16"]
    script, found = str(FOLDER / "bench_lockstep.py"), tmp_path / "found.json"
    subprocess.run([sys.executable, script, *options, "--json", str(found)], check=True, capture_output=True)
    one, eight = json.loads(found.read_text())["plan"]
    assert one["bytes"] == PLAN_HEADER_BYTES  # nobody ends so soon: every plan is a bare header
    assert eight["bytes"] > PLAN_HEADER_BYTES
    assert 0 < one["encode_us"] < one["plan_us"] < one["step_us"]


def test_scheduling_is_measured_on_a_whole_engine(benchmark: Callable[[str], Any]) -> None:
    found = benchmark("bench_lockstep").scheduling_us(4, 8)
    assert found["schedule"] > 0
    assert found["account"] > 0


def test_all_arms_of_the_mixed_load_give_the_same_answers(benchmark: Callable[[str], Any], tmp_path: Path) -> None:
    mixed, model = benchmark("mixed_load"), make_checkpoint("llama", tmp_path, eos_token_id=None)
    engine = build_engine(model_path=tmp_path, mesh=SingleRank(), dtype="float32", kv_cache_bytes=8 << 20)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    wanted = mixed.draw(1, count=6, vocabulary=VOCAB, prompts=(2, 40), outputs=(1, 12))
    answers = mixed.hortator(engine, wanted)
    assert [len(answer) for answer in answers] == [one.output for one in wanted]
    assert mixed.generate(theirs, 4, wanted) == answers
    assert answers == [list(model.expected(tuple(one.prompt), one.output)) for one in wanted]


def test_a_layout_that_gives_other_tokens_or_logits_than_one_rank_is_named(benchmark: Callable[[str], Any]) -> None:
    verdict = benchmark("gpu_multi").verdict
    line = {"requests": 9, "same_tokens": 9, "bfloat16": {"mean": 0.02}, "rounding": {"mean": 0.011}}
    assert verdict(line) == "agrees"
    assert verdict(line | {"same_tokens": 8}) == "TOKENS DIFFER"
    assert verdict(line | {"bfloat16": {"mean": 0.03}}) == "LOGITS DIFFER"


def test_every_promise_that_a_fault_broke_is_named(benchmark: Callable[[str], Any]) -> None:
    faults = benchmark("gpu_faults")
    trial = faults.Trial("decode", "killed", 1, 0.2, 0.3, 0.4, 5.0, 6.0, 0, 4, 4, 4, 4, 9, "rank 1 was killed")
    broken: dict[str, Any] = {
        "noticed_s": 1.2,
        "memory_s": None,
        "orphans": 1,
        "succeeded": 3,
        "prefix_kept": 3,
        "same_as_undisturbed": 3,
    }
    args = SimpleNamespace(dtype="float32")
    assert faults.faults_of([trial], args) == []
    for name, value in broken.items():
        assert len(faults.faults_of([replace(trial, **{name: value})], args)) == 1, name
