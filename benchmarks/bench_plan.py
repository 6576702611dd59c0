"""How long a plan takes as the fleet grows, and its hostfile's parsing against DeepSpeed's own parser.

    python benchmarks/bench_plan.py [--json PATH]

Hosts of 8 GPUs, nine in ten of them used by four models of 1 to 32 GPUs a group.  Nothing is started.  The two parsers
read the same text in turns; each checks what it reads, ours more.  Shown are medians, in milliseconds.
"""

import argparse
import gc
import json
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hortator.topology.errors import DoesNotFit
from hortator.topology.fleet import Fleet, parse_fleet
from hortator.topology.hostfile import parse_hostfile
from hortator.topology.hostfilter import filter_hosts
from hortator.topology.mermaid import mermaid
from hortator.topology.modelshape import ModelShape, model_shape
from hortator.topology.picture import svg
from hortator.topology.plan import Plan, make_plan

HOSTS = (10, 100, 1000)
ROUNDS = 7
GPUS = 8
# (tp, pp, share of the hosts)
MODELS = ((8, 4, 0.4), (4, 1, 0.25), (2, 1, 0.05), (1, 1, 0.2))
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


def hostfile(count: int) -> str:
    return "".join(f"node-{number:05d} slots={GPUS}\n" for number in range(count))


def fleet_text(count: int, *, too_many: bool = False) -> str:
    """The models' groups fill their shares of the hosts; or nearly three times as much as there is."""
    lines = ['gpu_memory_bytes = "80 GiB"']
    for number, (tp, pp, share) in enumerate(MODELS):
        replicas = max(1, int(count * GPUS * share * (3 if too_many else 1) / (tp * pp)))
        lines.append(f'[[models]]\nname = "m{number}"\npath = "/models/m{number}"\nreplicas = {replicas}')
        lines.append(f"tensor_parallel_size = {tp}\npipeline_parallel_size = {pp}")
    return "\n".join(lines)


def milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def medians(arms: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The arms take turns, so that a slow moment of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for work in arms.values():
        work()
    for _ in range(ROUNDS):
        for name, work in arms.items():
            times[name].append(milliseconds(work))
    return {name: statistics.median(values) for name, values in times.items()}


def refused(fleet: Fleet, text: str, shapes: dict[str, ModelShape]) -> str:
    try:
        planned(fleet, text, shapes)
    except DoesNotFit as problem:
        return str(problem)
    raise AssertionError("this fleet should not fit")


def planned(fleet: Fleet, text: str, shapes: dict[str, ModelShape]) -> Plan:
    return make_plan(fleet, filter_hosts(parse_hostfile(text)), shapes)


def measure(count: int) -> dict[str, float]:
    """One row of the table."""
    from deepspeed.launcher.runner import _parse_hostfile

    text, toml = hostfile(count), fleet_text(count)
    lines = text.splitlines(keepends=True)
    fleet, large = parse_fleet(toml), parse_fleet(fleet_text(count, too_many=True))
    shape = model_shape(LLAMA_8B, source="/models/llama-8b")
    shapes = {model.name: shape for model in fleet.models}
    plan = planned(fleet, text, shapes)
    assert [host.address for host in plan.hosts] == list(_parse_hostfile(lines))
    figures = medians(
        {
            "hostfile, ours": lambda: parse_hostfile(text),
            "hostfile, DeepSpeed": lambda: _parse_hostfile(lines),
            "plan, sizes known": lambda: planned(parse_fleet(toml), text, shapes),
            "plan, sizes unknown": lambda: planned(parse_fleet(toml), text, {}),
            "refusal with advice": lambda: refused(large, text, shapes),
            "to JSON": plan.model_dump_json,
            "to SVG": lambda: svg(plan),
            "to mermaid": lambda: mermaid(plan),
        }
    )
    ranks = sum(len(group.ranks) for group in plan.groups)
    return {"hosts": count, "groups": len(plan.groups), "ranks": ranks, **figures}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="milliseconds, median")
    table.add_column("")
    for row in rows:
        table.add_column(f"{row['hosts']:,} hosts", justify="right")
    for name in rows[0]:
        table.add_row(
            name, *(f"{row[name]:,.2f}" if isinstance(row[name], float) else f"{row[name]:,}" for row in rows)
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    import deepspeed.launcher.runner  # noqa: F401

    logging.disable(logging.INFO)
    gc.collect()
    gc.freeze()  # `hortator plan` imports no torch: it has not all these objects to walk through
    rows = [measure(count) for count in HOSTS]
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
