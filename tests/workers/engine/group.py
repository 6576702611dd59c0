"""Real processes that are one model group (gloo), each driving its engine through the same plans.

`run_group` starts them; as a script this file is one rank:  python group.py RANK TP_SIZE PP_SIZE FOLDER
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
NUM_BLOCKS = 36  # few enough for preemption whatever a rank holds; the longest request needs 24


@dataclass
class RankResult:
    """What one rank has to say, by name of the checkpoint."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    preemptions: dict[str, int] = field(default_factory=dict)
    elements_read: dict[str, int] = field(default_factory=dict)
    elements_held: dict[str, int] = field(default_factory=dict)
    wrong_slices: dict[str, list[str]] = field(default_factory=dict)


def run_group(paths: dict[str, Path], folder: Path, *, tp_size: int, pp_size: int) -> list[RankResult]:
    """Run all checkpoints in one group of processes (starting them is what takes time)."""
    (folder / "paths.json").write_text(json.dumps({name: str(path) for name, path in paths.items()}))
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    world = range(tp_size * pp_size)
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tp_size), str(pp_size), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in world
    ]
    try:
        logs = [process.communicate(timeout=100)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0 for _ in world], "\n".join(logs)
    return [_load(folder / f"rank{rank}.json") for rank in world]


def _load(file: Path) -> RankResult:
    raw = json.loads(file.read_text())
    outcomes = {name: _outcome(content) for name, content in raw.pop("outcomes").items()}
    return RankResult(outcomes, **raw)


def _outcome(raw: dict[str, Any]) -> Outcome:
    return Outcome(
        tokens={int(handle): tokens for handle, tokens in raw["tokens"].items()},
        finished={int(handle): Finish(finish) for handle, finish in raw["finished"].items()},
        faults={int(handle): Fault(**fault) for handle, fault in raw["faults"].items()},
        digests=raw["digests"],
    )


def main(rank: int, tp_size: int, pp_size: int, folder: Path) -> None:
    import torch

    from tests.workers.engine.checkpoints import mixed_requests

    torch.set_num_threads(1)
    mesh = _mesh(rank, tp_size, pp_size, folder / "rendezvous")
    result, read = RankResult(), _count_reads()
    for name, path in json.loads((folder / "paths.json").read_text()).items():
        read.clear()
        engine = _engine(Path(path), mesh)
        model = engine._runner._model
        result.elements_read[name] = sum(read)
        result.elements_held[name] = sum({id(p): p.numel() for p in _parameters(model)}.values())
        result.wrong_slices[name] = _wrong_slices(model, Path(path), mesh)
        result.outcomes[name] = run(engine, mixed_requests(), stagger=3)
        result.preemptions[name] = engine.stats().preemptions
    result.outcomes["bad row"] = _with_bad_row(engine)
    (folder / f"rank{rank}.json").write_text(json.dumps(asdict(result)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _engine(path: Path, mesh: Any) -> Any:
    """With equally many blocks on every rank, whatever a token takes there."""
    from hortator.workers.engine.model import read_config

    token_bytes = read_config(path, dtype="float32").cache_shape(mesh).token_bytes
    return build(path, mesh, **TIGHT | {"kv_cache_bytes": NUM_BLOCKS * TIGHT["block_size"] * token_bytes})


def _count_reads() -> list[int]:
    """Elements of each part that is read from now on."""
    import torch

    from hortator.workers.engine.checkpoint import TensorEntry
    from hortator.workers.engine.parallel import Cut
    from hortator.workers.engine.weights import ShardReader

    read: list[int] = []
    read_part = ShardReader.read

    def counting(reader: ShardReader, entry: TensorEntry, cut: Cut, target: torch.Tensor) -> None:
        read.append(target.numel())
        read_part(reader, entry, cut, target)

    ShardReader.read = counting  # type: ignore[method-assign, assignment]
    return read


def _mesh(rank: int, tp_size: int, pp_size: int, rendezvous: Path) -> Any:
    from datetime import timedelta

    import torch
    from torch import distributed
    from torch._C import _distributed_c10d as c10d

    from hortator.topology.mesh import Mesh, _tp_group

    world_size, (pp_rank, tp_rank) = tp_size * pp_size, divmod(rank, tp_size)
    distributed.init_process_group(
        "gloo",
        store=c10d.FileStore(str(rendezvous), world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    return Mesh(
        rank=rank,
        world_size=world_size,
        tp_rank=tp_rank,
        tp_size=tp_size,
        tp_group=_tp_group(tp_size, pp_size, pp_rank),
        pp_rank=pp_rank,
        pp_size=pp_size,
        world_group=distributed.group.WORLD,
        device=torch.device("cpu"),
        backend="gloo",
    )


def _parameters(model: Any) -> list[Any]:
    return [p for module in (model.body, model.head) if module is not None for p in module.parameters()]


def _wrong_slices(model: Any, path: Path, mesh: Any) -> list[str]:
    """Names of parameters that are not this rank's part of what transformers loads."""
    import transformers

    full = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32").state_dict()
    held = {f"model.{name}": p for name, p in model.body.named_parameters()}
    if model.head is not None:
        held["lm_head.weight"] = model.head.weight
    wrong = []
    for name, parameter in held.items():
        whole = full[_plain(name, model.stage.start)]
        if not parameter.equal(_part(name, whole, tuple(parameter.shape), mesh)):
            wrong.append(name)
    return wrong


def _plain(name: str, first_layer: int) -> str:
    """As transformers calls it: layers by their own numbers, experts without the layer that sums over the ranks."""
    words = name.replace(".experts.experts.", ".experts.").split(".")
    if words[1] == "layers":
        words[2] = str(int(words[2]) + first_layer)
    return ".".join(words)


def _part(name: str, whole: Any, shape: tuple[int, ...], mesh: Any) -> Any:
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
    parts = [part.chunk(mesh.tp_size, dims[0])[mesh.tp_rank] for part in whole.split(sizes, dims[0])]
    return torch.cat(parts, dims[0])


def _with_bad_row(engine: Any) -> Outcome:
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
    rank_, tp_size_, pp_size_ = (int(word) for word in sys.argv[1:4])
    main(rank_, tp_size_, pp_size_, Path(sys.argv[4]))
