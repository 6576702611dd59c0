"""Two real processes that are one tensor-parallel group (gloo), each driving its engine through the same plans.

`run_pair` starts them; as a script this file is one rank:  python pair.py RANK FOLDER
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hortator.workers.engine.step import Fault, Finish
from tests.workers.engine.drive import TIGHT, Outcome, build, run

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class PairResult:
    """What one rank has to say, by name of the checkpoint."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    preemptions: dict[str, int] = field(default_factory=dict)
    elements_read: dict[str, int] = field(default_factory=dict)
    wrong_slices: dict[str, list[str]] = field(default_factory=dict)


def run_pair(paths: dict[str, Path], folder: Path, *, speaking: Path) -> tuple[PairResult, PairResult]:
    """Run all checkpoints in one pair of processes (starting them is what takes time), and every way of sampling on
    the one that is `speaking`: it has a tokenizer."""
    (folder / "speaking.json").write_text(json.dumps(str(speaking)))
    (folder / "paths.json").write_text(json.dumps({name: str(path) for name, path in paths.items()}))
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        logs = [process.communicate(timeout=90)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(logs)
    first, second = (_load(folder / f"rank{rank}.json") for rank in range(2))
    return first, second


def _load(file: Path) -> PairResult:
    raw = json.loads(file.read_text())
    outcomes = {name: _outcome(content) for name, content in raw.pop("outcomes").items()}
    return PairResult(outcomes, **raw)


def _outcome(raw: dict[str, Any]) -> Outcome:
    return Outcome(
        tokens={int(handle): tokens for handle, tokens in raw["tokens"].items()},
        finished={int(handle): Finish(finish) for handle, finish in raw["finished"].items()},
        faults={int(handle): Fault(**fault) for handle, fault in raw["faults"].items()},
        digests=raw["digests"],
    )


def main(rank: int, folder: Path) -> None:
    import torch

    from hortator.workers.engine.checkpoint import TensorEntry
    from hortator.workers.engine.parallel import Cut
    from hortator.workers.engine.weights import ShardReader
    from tests.workers.engine.checkpoints import mixed_requests
    from tests.workers.engine.ways import ways_of_sampling

    torch.set_num_threads(1)
    mesh = _mesh(rank, folder / "rendezvous")
    result, read = PairResult(), []
    read_part = ShardReader.read

    def counting(reader: ShardReader, entry: TensorEntry, cut: Cut, target: torch.Tensor) -> None:
        read.append(target.numel())
        read_part(reader, entry, cut, target)

    ShardReader.read = counting  # type: ignore[method-assign, assignment]
    for name, path in json.loads((folder / "paths.json").read_text()).items():
        read.clear()
        engine = build(Path(path), mesh, **TIGHT)  # each rank holds half of the heads: 80 blocks
        result.elements_read[name] = sum(read)
        result.wrong_slices[name] = _wrong_slices(engine._runner._model, Path(path), rank)
        result.outcomes[name] = run(engine, mixed_requests(), stagger=3)
        result.preemptions[name] = engine.stats().preemptions
    result.outcomes["bad row"] = _with_bad_row(engine, rank)
    speaking = Path(json.loads((folder / "speaking.json").read_text()))
    result.outcomes["sampling"] = run(build(speaking, mesh, **TIGHT), ways_of_sampling(greedy=True), stagger=4)
    (folder / f"rank{rank}.json").write_text(json.dumps(asdict(result)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _mesh(rank: int, rendezvous: Path) -> Any:
    from datetime import timedelta

    import torch
    from torch._C import _distributed_c10d as c10d

    from tests.workers.engine.meshes import TwoRanks

    store = c10d.FileStore(str(rendezvous), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    group = torch.distributed.new_group([0, 1])
    return TwoRanks(rank, rank, group, torch.distributed.group.WORLD)


def _wrong_slices(model: Any, path: Path, rank: int) -> list[str]:
    """Names of parameters that are not this rank's half of what transformers loads."""
    import transformers

    full = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32").model.state_dict()
    wrong = []
    for name, parameter in model.body.named_parameters():
        plain = name.replace(".experts.experts.", ".experts.")  # the layer that sums over the ranks
        if not parameter.equal(_half(plain, full[plain], tuple(parameter.shape), rank)):
            wrong.append(name)
    return wrong


def _half(name: str, whole: Any, shape: tuple[int, ...], rank: int) -> Any:
    """Fused matrices are taken apart first."""
    import torch

    dims = [dim for dim, size in enumerate(shape) if whole.shape[dim] != size]
    if not dims:
        return whole
    sizes = [whole.shape[dims[0]]]
    if "gate_up_proj" in name:
        sizes = [sizes[0] // 2] * 2
    if "qkv_proj" in name:  # 8 heads of queries, 4 of keys, 4 of values
        sizes = [sizes[0] // 2, sizes[0] // 4, sizes[0] // 4]
    return torch.cat([part.chunk(2, dims[0])[rank] for part in whole.split(sizes, dims[0])], dims[0])


def _with_bad_row(engine: Any, rank: int) -> Outcome:
    """Only the first rank's logits go bad, for one request: the other must hear of it."""
    import torch

    from hortator.workers.engine.sampler import Draw
    from hortator.workers.engine.step import Request, SamplingParams

    sampler = engine._runner._sampler
    choose = sampler.choose

    def spoiled(logits: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
        for row, draw in enumerate(draws):
            if draw.sampling.seed == 3 and draw.position == 2:
                logits[row, 5] = float("nan")
        chosen: torch.Tensor = choose(logits, draws)
        return chosen

    sampler.choose = spoiled
    sampling = [SamplingParams(max_tokens=5, seed=handle, ignore_eos=True) for handle in range(8)]
    outcome = run(engine, [Request(handle, (7, 8, 9), sampling[handle]) for handle in range(8)])
    sampler.choose = choose
    return outcome


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
