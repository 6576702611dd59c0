"""A plan as a mermaid flowchart, for READMEs and issues.  Pure.

Each host is a box.  In it each stage of a group is a node with its ranks and GPUs; where there are many, each group is.
"""

from collections.abc import Iterator
from itertools import groupby

from .memory import human
from .palette import colours
from .plan import Block, Link, Plan, PlannedGroup, PlannedHost, blocks_by_host

MAX_BLOCKS_SHOWN = 200  # mermaid itself gives up at 50,000 characters


def mermaid(plan: Plan) -> str:
    """The flowchart's text, with a line end."""
    return "\n".join(_lines(plan)) + "\n"


def _lines(plan: Plan) -> Iterator[str]:
    blocks = blocks_by_host(plan)
    numbers = {group.name: number for number, group in enumerate(plan.groups)}
    yield "flowchart LR"
    if sum(map(len, blocks.values())) > MAX_BLOCKS_SHOWN:
        yield from _summary(plan)
        return
    for number, host in enumerate(plan.hosts):
        yield f'  subgraph h{number}["{_host_label(host)}"]'
        for block in blocks[host.address]:
            yield f'    {_node(numbers, block)}["{_block_label(block)}"]:::g{numbers[block.group.name]}'
        if host.free:
            yield f'    h{number}free["{len(host.free)} free"]:::free'
        yield "  end"
    where = {(block.group.name, block.pp_rank): _node(numbers, block) for host in blocks.values() for block in host}
    for group in plan.groups:
        for stage, link in enumerate(link for link in group.links if link.kind == "hidden"):
            yield f"  {where[group.name, stage]} {_arrow(link)} {where[group.name, stage + 1]}"
    yield "  classDef free fill:#ffffff,stroke:#999999,stroke-dasharray:4 3,color:#777777"
    for name, colour in colours(plan).items():
        yield f"  classDef g{numbers[name]} fill:{colour.fill},stroke:{colour.line},color:#111111"


def _summary(plan: Plan) -> Iterator[str]:
    """A node for each model: how many groups on how many hosts."""
    for number, (model, some) in enumerate(groupby(plan.groups, key=lambda group: group.model)):
        groups = list(some)
        hosts = {seat.host for group in groups for seat in group.hosts}
        size = _size(groups[0])
        yield f'  m{number}["{model}<br>{len(groups)} x {size}<br>on {len(hosts)} hosts"]'
    yield f'  free["{plan.num_free} of {plan.num_slots} slots free on {len(plan.hosts)} hosts"]'


def _size(group: PlannedGroup) -> str:
    return f"tp {group.tensor_parallel_size} x pp {group.pipeline_parallel_size}"


def _node(numbers: dict[str, int], block: Block) -> str:
    return f"g{numbers[block.group.name]}s{block.pp_rank}r{block.ranks[0].rank}"


def _host_label(host: PlannedHost) -> str:
    memory = "" if host.gpu_memory_bytes is None else f" x {human(host.gpu_memory_bytes)}"
    return f"{host.address}: {len(host.slots)}{memory}"


def _block_label(block: Block) -> str:
    first, last = block.ranks[0], block.ranks[-1]
    lines = [
        f"<b>{block.group.name}</b>" + (f" stage {block.pp_rank}" if block.group.pipeline_parallel_size > 1 else "")
    ]
    lines.append(f"rank {first.rank}" if first is last else f"ranks {first.rank}-{last.rank}")
    lines.append(f"{block.group.slot_noun} {','.join(str(rank.slot) for rank in block.ranks)}")
    if first.first_layer is not None and block.group.pipeline_parallel_size > 1:
        lines.append(f"layers {first.first_layer}-{first.last_layer}")
    if first.needed_bytes is not None:
        lines.append(f"{human(first.needed_bytes)} each")
    return "<br>".join(lines)


def _arrow(link: Link) -> str:
    """Thick where it crosses hosts."""
    line = "==>" if link.crosses_hosts else "-->"
    return line if link.size_bytes is None else f'{line}|"{human(link.size_bytes)} a token"|'
