"""Real processes that are model groups (gloo), each driving its engine through the same plans.

Starting processes is what takes time, so four of them are two groups of two at first, and then one of four.
`run_groups` starts them; as a script this file is one:  python group.py INDEX FOLDER
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
NUM_REQUESTS = 32
NUM_PROCESSES = 4
WAYS = "every way of sampling"  # instead of a checkpoint's name: of the one with a tokenizer
# Tensor x pipeline parallel sizes, and the processes that are such a group.
SHAPES = {"2x1": (2, 1, (0, 1)), "1x2": (1, 2, (2, 3)), "2x2": (2, 2, (0, 1, 2, 3))}


@dataclass
class RankResult:
    """What one rank has to say, by name of the checkpoint."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    preemptions: dict[str, int] = field(default_factory=dict)
    elements_read: dict[str, int] = field(default_factory=dict)
    elements_held: dict[str, int] = field(default_factory=dict)
    wrong_slices: dict[str, list[str]] = field(default_factory=dict)
    arrived: dict[str, list[float]] = field(default_factory=dict)  # by what travelled in a pipeline


def run_groups(paths: dict[str, dict[str, Path]], folder: Path) -> dict[str, list[RankResult]]:
    """Run checkpoints, by name, in a group of each shape."""
    (folder / "paths.json").write_text(json.dumps(paths, default=str))
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(index), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(NUM_PROCESSES)
    ]
    try:
        logs = [process.communicate(timeout=230)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0] * NUM_PROCESSES, "\n".join(logs)
    return {shape: [_load(folder / f"{shape}.{i}.json") for i in members] for shape, (_, _, members) in SHAPES.items()}


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


def main(index: int, folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    read = _count_reads()
    for shape, (tp_size, pp_size, members) in SHAPES.items():
        if index not in members:
            continue
        mesh = _mesh(members.index(index), tp_size, pp_size, folder / f"{shape}.store")
        result = RankResult()
        for name, path in json.loads((folder / "paths.json").read_text())[shape].items():
            if name == WAYS:
                result.outcomes[name] = _sample(Path(path), mesh)
            else:
                _run(result, name, Path(path), mesh, read)
        if pp_size > 1:
            result.arrived = _overwrite_what_is_sent(mesh)
        (folder / f"{shape}.{index}.json").write_text(json.dumps(asdict(result)))
        torch.distributed.destroy_process_group()


def _run(result: RankResult, name: str, path: Path, mesh: Any, read: list[int]) -> None:
    from torch import distributed

    from tests.workers.engine.checkpoints import mixed_requests

    read.clear()
    engine = _engine(path, mesh)
    model = engine._runner._model
    result.elements_read[name] = sum(read)
    result.elements_held[name] = sum({id(p): p.numel() for p in _parameters(model)}.values())
    result.wrong_slices[name] = _wrong_slices(model, path, mesh)
    result.outcomes[name] = run(engine, mixed_requests()[:NUM_REQUESTS], stagger=3)
    result.preemptions[name] = engine.stats().preemptions
    if "bad row" not in result.outcomes:
        result.outcomes["bad row"] = _with_bad_row(engine)
    distributed.barrier()  # what the engine still sends is lost with it


def _sample(path: Path, mesh: Any) -> Outcome:
    from torch import distributed

    from tests.workers.engine.ways import ways_of_sampling

    engine = _engine(path, mesh)
    outcome = run(engine, ways_of_sampling(greedy=True), stagger=4)
    distributed.barrier()  # what the engine still sends is lost with it
    del engine
    return outcome


def _overwrite_what_is_sent(mesh: Any) -> dict[str, list[float]]:
    """Hidden states and ids that are overwritten, as a CUDA graph's are, before anybody receives them."""
    import torch
    from torch import distributed

    from hortator.workers.engine.pipeline import make_link

    link = make_link(mesh, hidden_size=2, dtype=torch.float32)
    last = mesh.pp_rank == mesh.pp_size - 1
    sent, arrived = torch.tensor([[1.0, 2.0]]), {}
    if not last:
        link.send(sent)
        sent.zero_()
    distributed.barrier()
    if mesh.pp_rank:
        arrived["hidden"] = link.receive(1)[0].tolist()
    ids = torch.tensor([5, 6, 7]) if last and mesh.tp_rank == 0 else None
    if ids is None:
        distributed.barrier()
    arrival = link.share(ids, 3)
    if ids is not None:
        ids.zero_()
        distributed.barrier()
    arrived["ids"] = arrival.wait().tolist()
    distributed.barrier()
    return arrived


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
        timeout=timedelta(seconds=120),
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
    main(int(sys.argv[1]), Path(sys.argv[2]))
