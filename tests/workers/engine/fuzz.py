"""Attacks the engine with random workloads in every layout, and compares each with one rank that has all the room there
is.  `test_fuzz.py` plays a few seeds; this is for as many as one likes:

    python -m tests.workers.engine.fuzz --seeds 100:200 [--shapes 2x1,1x2,2x2] [--batch 3] [--seconds 170]

Every seed (workloads.py) is played (playing.py) by
  reference   one rank, a large pool, everything at once, nobody cancelled, no prefix cache
  alone       one rank with the workload's tight limits and its clients
  other       the same with other limits
  fused       the same with the GPU's fused layers, whose kernels have a twin in torch, and a step in flight
  2x1 ...     a group of real processes over gloo: tensor x pipeline parallel ranks, plans by the lock-step channel
and everybody must give each request the reference's tokens, end, fault and log-probabilities; a part of the tokens to
one that was cancelled, and the rest when it comes back with its journal.  On the way every rank keeps the books of its
pool after each step, compares digests, and is empty at the end.  Where no structure decides about steps, two tensor
parallel ranks must have the digests of one.  A token may differ only if the reference itself chooses it when its logits
are disturbed by what float32 rounds (comparing.py): such ties are counted.

It prints a line of JSON for each fault, and a summary; the exit status is 1 if there was any.
"""

import argparse
import faulthandler
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from socket import socket
from typing import Any

os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}  # or DeepSpeed says on stdout that it found none

import deepspeed  # noqa: F401 - once, before the ranks are forked
import torch
import transformers
from torch import distributed

from hortator.topology.control import listen
from hortator.topology.mesh import Mesh, join
from hortator.workers.engine.cuda import body, reference
from hortator.workers.engine.cuda.runner import CudaRunner
from hortator.workers.engine.engine import Limits, PagedEngine
from hortator.workers.engine.model import LoadedModel, load_model, read_config
from hortator.workers.engine.runner import Runner, TorchRunner
from hortator.workers.engine.structure import Grammars
from hortator.workers.lockstep import DistributedChannel, InProcessChannel
from tests.workers.engine.byte_tokenizer import write_tokenizer
from tests.workers.engine.checkpoints import ARCHITECTURES, EOS, VOCAB, make_checkpoint
from tests.workers.engine.comparing import SHAPES, Comparison, Judge, Tally, file_of
from tests.workers.engine.playing import Log, follow, lead, play
from tests.workers.engine.workloads import Entry, Workload, workload

ALONE = ("alone", "other", "fused")
ROOMY = Limits(num_blocks=4000, block_size=16, max_num_seqs=64, max_model_len=0, max_num_batched_tokens=2048)
FUSED = ("llama", "qwen2", "qwen3", "mistral")
PATIENCE_S = 120.0  # for one seed in one layout, on a machine that is busy


class Rank:
    """A process's place, its part of each model, and the tokenizer where it samples."""

    def __init__(self, root: Path, mesh: Mesh) -> None:
        self._root, self.mesh = root, mesh
        self._models: dict[str, LoadedModel] = {}
        self._grammars: Grammars | None = None
        if mesh.pp_rank == mesh.pp_size - 1 and mesh.tp_rank == 0:
            self._grammars = Grammars.of(root / ARCHITECTURES[0], vocab_size=VOCAB, eos_token_ids=(EOS,))
            assert self._grammars is not None
            self._grammars.wait()

    def engine(self, architecture: str, limits: Limits, *, fused: bool = False) -> PagedEngine:
        """The fused layers take a model apart, so they get one of their own."""
        model = self._load(architecture) if fused else self.model(architecture)
        runner = self._fused_runner(model, limits) if fused else self._runner(model, limits)
        return PagedEngine(model.config, runner, ranks=self.mesh, limits=limits)

    def model(self, architecture: str) -> LoadedModel:
        if architecture not in self._models:
            self._models[architecture] = self._load(architecture)
        return self._models[architecture]

    def _load(self, architecture: str) -> LoadedModel:
        return load_model(read_config(self._root / architecture, dtype="float32"), self.mesh)

    def _runner(self, model: LoadedModel, limits: Limits) -> Runner:
        sizes = {"num_blocks": limits.num_blocks, "block_size": limits.block_size}
        return TorchRunner(model, self.mesh, grammars=self._grammars, **sizes)

    def _fused_runner(self, model: LoadedModel, limits: Limits) -> Runner:
        return CudaRunner(model, self.mesh, limits, operations=reference, grammars=self._grammars)


def play_reference(rank: Rank, work: Workload) -> list[Log]:
    """Nobody is cancelled, so nobody comes back."""
    limits = replace(ROOMY, max_model_len=work.limits.max_model_len, prefix_cache=False)
    engine = rank.engine(work.architecture, limits)
    return [
        lead(engine, InProcessChannel(), [Entry(entry.request, 0) for entry in entries], number)
        for number, entries in enumerate(work.phases, 1)
    ]


def play_alone(rank: Rank, work: Workload, name: str) -> list[Log] | None:
    """None where there are no fused layers."""
    if name == "reference":
        return play_reference(rank, work)
    if name == "fused" and not body.fits(rank.model(work.architecture)):
        return None
    limits = work.others if name == "other" else work.limits
    return play(rank.engine(work.architecture, limits, fused=name == "fused"), InProcessChannel(), work)


# --- processes


def one_rank(root: Path, seeds: Sequence[int]) -> None:
    """All that one process can play by itself."""
    rank = Rank(root, join(rank=0, tp_size=1, device="cpu"))
    for seed in seeds:
        for name in ("reference", *ALONE):
            faulthandler.dump_traceback_later(PATIENCE_S, exit=True)
            try:
                if logs := play_alone(rank, workload(seed), name):
                    write(root, name, 0, seed, logs)
            except Exception:
                write_crash(root, name, 0, seed)


def one_of_several(root: Path, shape: str, rank: int, listener: socket, seeds: Sequence[int]) -> None:
    """One process of a group; whatever goes wrong ends it, as it would end a rank."""
    tp_size, pp_size = SHAPES[shape]
    mesh = join(
        rank=rank,
        tp_size=tp_size,
        pp_size=pp_size,
        store=listener.getsockname(),
        listener=None if rank else listener,
        device="cpu",
        collective_timeout_s=PATIENCE_S,
    )
    assert mesh.world_group is not None
    channel = DistributedChannel(mesh.world_group, mesh.device, ahead=pp_size - 1)
    place = Rank(root, mesh)
    for seed in seeds:
        faulthandler.dump_traceback_later(PATIENCE_S, exit=True)
        work = workload(seed)
        try:
            engine = place.engine(work.architecture, work.limits)
            write(root, shape, rank, seed, list(play_together(engine, channel, rank, work)))
            distributed.barrier()  # what the engine still sends is lost with it
        except Exception:
            write_crash(root, shape, rank, seed)
            raise


def play_together(engine: PagedEngine, channel: DistributedChannel, rank: int, work: Workload) -> Iterator[Log]:
    if rank == 0:
        yield from play(engine, channel, work)
    else:
        yield from (follow(engine, channel, rank, number) for number in range(1, len(work.phases) + 1))


def write(root: Path, name: str, rank: int, seed: int, logs: list[Log]) -> None:
    file_of(root, name, rank, seed).write_text(json.dumps({"logs": [asdict(log) for log in logs]}))


def write_crash(root: Path, name: str, rank: int, seed: int) -> None:
    file_of(root, name, rank, seed).write_text(json.dumps({"crash": traceback.format_exc()}))


def in_process(task: Callable[[], None]) -> int:
    """Fork, which spares each rank the seconds that its imports take; this process has a single thread."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        task()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def sail(root: Path, seeds: Sequence[int], shapes: Sequence[str]) -> None:
    """Every layout plays all seeds, at the same time as the others."""
    pids = [in_process(partial(one_rank, root, seeds))]
    for shape in shapes:
        tp_size, pp_size = SHAPES[shape]
        with listen("127.0.0.1", 0) as listener:
            for rank in range(tp_size * pp_size):
                pids.append(in_process(partial(one_of_several, root, shape, rank, listener, seeds)))
    for pid in pids:
        os.waitpid(pid, 0)


# --- the tool


def make_checkpoints(root: Path) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ARCHITECTURES:
        changes: dict[str, Any] = {"head_dim": 16} if name in FUSED else {}  # what the fused layers can do
        if name == "llama":
            changes["attention_bias"] = False
        make_checkpoint(name, root / name, **changes)
        write_tokenizer(root / name)


def parse_seeds(text: str) -> list[int]:
    """`3,7` or `100:200`, of which the last one is excluded."""
    first, colon, last = text.partition(":")
    return list(range(int(first), int(last))) if colon else [int(seed) for seed in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--seeds", type=parse_seeds, default=parse_seeds("0:9"), help="3,7 or 100:200")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of the groups, tensor x pipeline parallel")
    parser.add_argument("--batch", type=int, default=3, help="seeds for which processes are started once")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no batch after so long")
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    shapes = [shape for shape in chosen.shapes.split(",") if shape]
    torch.set_num_threads(1)
    started, tally, num_findings = time.monotonic(), Tally(), 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_checkpoints(root)
        judge = Judge(root)
        for begin in range(0, len(chosen.seeds), chosen.batch):
            if time.monotonic() - started > chosen.seconds:
                break
            seeds = chosen.seeds[begin : begin + chosen.batch]
            sail(root, seeds, shapes)
            for seed in seeds:
                for finding in Comparison(root, seed, tally, judge).run(ALONE, shapes):
                    print(json.dumps(asdict(finding)), flush=True)
                    num_findings += 1
    print(json.dumps({"findings": num_findings, "seconds": round(time.monotonic() - started, 1), **asdict(tally)}))
    return int(num_findings > 0)


if __name__ == "__main__":
    sys.exit(main())
