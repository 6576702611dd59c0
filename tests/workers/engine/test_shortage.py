"""Too little memory: allocations that really fail, in a process that may not have more, and who notices."""

import json
import os
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from hortator.workers.engine.rescue import Lost, rescue
from hortator.workers.engine.runner import Runner
from hortator.workers.engine.scheduler import Batch, Row, Scheduler, Sequence
from hortator.workers.engine.shortage import OutOfMemory, lacking, memory_for
from hortator.workers.engine.step import Request, SamplingParams
from tests.workers.engine import cramped
from tests.workers.engine.checkpoints import make_checkpoint
from tests.workers.engine.cramped import COLOSSAL, ENGINES, ENVIRONMENT, GIANT, GIANT_REQUEST, SCENES, WIDE
from tests.workers.engine.drive import run


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("wide"), **WIDE).path


@pytest.fixture(scope="module")
def said(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    colossus = tmp_path_factory.mktemp("colossus")
    config = json.loads((wide / "config.json").read_text()) | COLOSSAL
    (colossus / "config.json").write_text(json.dumps(config))
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, cramped.__file__, wide, colossus],
        env=os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"} | ENVIRONMENT,
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return cast(dict[str, Any], json.loads(done.stdout))


def tokens_of(outcome: dict[str, Any]) -> dict[int, list[int]]:
    return {int(handle): tokens for handle, tokens in outcome["tokens"].items()}


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("scene", ["a giant among others", "readers of a giant's prompt"])
def test_who_is_too_large_alone_fails_alone(kind: str, scene: str, wide: Path, said: dict[str, Any]) -> None:
    outcome = said[f"{kind}: {scene}"]
    unbounded = cramped.play(ENGINES[kind](wide), SCENES[scene])
    del unbounded.tokens[GIANT]
    assert tokens_of(outcome) == unbounded.tokens
    [fault] = outcome["faults"].values()
    assert (fault["handle"], fault["code"]) == (GIANT, "out_of_memory")
    assert "1200 tokens of this request behind 0 others" in fault["message"]
    assert "could not be allocated): shorten the prompt, or lower the group's max_num_batched" in fault["message"]
    assert outcome["shortages"] == 1


@pytest.mark.parametrize("kind", ENGINES)
def test_a_step_that_is_only_too_large_together_is_computed_in_parts(
    kind: str, wide: Path, said: dict[str, Any]
) -> None:
    outcome = said[f"{kind}: a crowd"]
    assert tokens_of(outcome) == cramped.play(ENGINES[kind](wide), SCENES["a crowd"]).tokens
    assert outcome["faults"] == {}
    assert outcome["shortages"] == 1


@pytest.mark.parametrize("kind", ENGINES)
def test_an_engine_that_lacked_memory_is_as_good_as_new(kind: str, wide: Path, said: dict[str, Any]) -> None:
    assert tokens_of(said[f"{kind}: with more room"]) == run(ENGINES[kind](wide), [GIANT_REQUEST]).tokens


def test_a_start_without_the_memory_names_what_makes_it_smaller(said: dict[str, Any]) -> None:
    assert said["pool"].startswith("out of memory for the KV pool of 256.0 MiB beside the weights (268451840")
    assert said["pool"].endswith(" bytes could not be allocated): lower kv_cache_bytes=268435456")
    assert said["weights"].startswith("out of memory for this rank's part of ")
    assert said["weights"].endswith(
        "(67108864 bytes could not be allocated): use more ranks than tensor_parallel_size=1 x "
        "pipeline_parallel_size=1, or dtype=bfloat16"
    )


# --- the order in which things are tried


class Device:
    """Has memory for so many tokens at once, and writes down what was launched."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.done: list[tuple[list[int], tuple[int, ...]]] = []
        self.frees = 0

    def free(self) -> None:
        self.frees += 1

    def launch(self, batch: Batch) -> None:
        if batch.num_tokens > self.memory:
            raise MemoryError(f"Unable to allocate {batch.num_tokens} KiB")
        self.done.append(([row.sequence.handle for row in batch.rows], batch.fresh_blocks))

    def rescue(self, batch: Batch) -> list[Lost]:
        parts = list(rescue(batch, cast(Runner, self), cast(Scheduler, None)))
        return [part for part in parts if isinstance(part, Lost)]


def batch_of(*counts: int) -> Batch:
    return Batch(tuple(Row(sequence(h, count), 0, count, samples=True) for h, count in enumerate(counts)), (7, 8))


def sequence(handle: int, count: int) -> Sequence:
    tokens = array("i", [1] * count)
    request = Request(handle, tuple(tokens), SamplingParams(max_tokens=1))
    return Sequence(request, 99, frozenset(), tokens, blocks=array("i", [handle]))


def test_halves_are_tried_in_order_and_fresh_blocks_are_wiped_once() -> None:
    device = Device(4)
    lost = device.rescue(batch_of(3, 9, 1, 1, 2, 5))
    assert device.done == [([0], (7, 8)), ([2], ()), ([3, 4], ())]
    assert [part.row.sequence.handle for part in lost] == [1, 5]
    assert "(9 KiB could not be allocated)" in lost[0].fault.message


def test_everything_is_freed_before_each_try() -> None:
    device = Device(1)
    device.rescue(batch_of(1, 1, 1))
    assert device.frees == len([[0, 1], [0], [1], [2]])


def test_rows_of_requests_that_have_ended_are_not_computed() -> None:
    batch, device = batch_of(1, 1), Device(9)
    batch.rows[0].sequence.ended = True
    assert device.rescue(batch) == []
    assert [handles for handles, _ in device.done] == [[1]]


def test_a_device_that_can_compute_none_of_several_is_to_blame_itself() -> None:
    with pytest.raises(OutOfMemory, match=r"no memory for any of 2 requests, even alone \(1 KiB could not"):
        Device(0).rescue(batch_of(1, 1))


# --- how such errors are known


def test_what_numpy_python_and_torch_raise_is_known() -> None:
    for allocate in (lambda: np.ones(1 << 50), lambda: torch.ones(1 << 50), lambda: bytearray(1 << 50)):
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            allocate()
        assert lacking(caught.value), caught.value


CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.25 GiB is "
    "free. Process 1 has 77.8 GiB memory in use. See documentation for Memory Management"
)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError(CUDA), "2.00 GiB could not be allocated, 1.25 GiB were free"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "CUBLAS_STATUS"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "Triton Error"),
        (MemoryError(), "no more could be allocated"),
        (RuntimeError("Connection closed by peer"), None),
        (OutOfMemory("out of memory"), None),
    ],
)
def test_an_error_is_about_memory_or_not(error: Exception, words: str | None) -> None:
    found = lacking(error)
    assert (found is None) if words is None else (found is not None and words in found)


def test_what_a_capture_that_ran_out_of_memory_leads_to_is_said_to_be_that() -> None:
    """Ending a capture after an error raises another one."""
    with pytest.raises(OutOfMemory, match=r"for the graphs \(2.00 GiB .* were free\): lower it"):
        capture()


def capture() -> None:
    with memory_for("the graphs", "lower it"):
        try:
            raise torch.OutOfMemoryError(CUDA)
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(ValueError, match=r"^wrong$"), memory_for("it", "lower it"):
        raise ValueError("wrong")
