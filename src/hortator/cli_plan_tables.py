"""A plan, and a model's memory, as tables for people."""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from hortator.producer.hindrance import counted
from hortator.topology.memory import human, usable_bytes

if TYPE_CHECKING:
    from hortator.topology.fleet import ModelSpec
    from hortator.topology.memory import MemoryFit
    from hortator.topology.plan import Link, Plan, PlannedGroup, PlannedRank

MAX_RANK_ROWS = 64
MAX_GROUP_ROWS = 32
_PIPE_WIDTH = 200  # of a file or a pipe, so that no line is cut for the width of a terminal that is not there


def show_plan(plan: "Plan") -> None:
    """Groups, GPUs, traffic, notes."""
    console = _console()
    used = plan.num_slots - plan.num_free
    groups, gpus, hosts = len(plan.groups), counted(plan.num_slots, plan.slot_noun), counted(len(plan.hosts), "host")
    console.print(f"{counted(groups, 'group')} on {used} of {gpus} of {hosts}, {plan.num_free} free")
    console.print(_groups(plan))
    many = sum(len(group.ranks) for group in plan.groups) > MAX_RANK_ROWS
    console.print(_hosts(plan) if many else _ranks(plan))
    links = _links(plan)
    if links.row_count:
        console.print(links)
    for note in plan.notes:
        console.print(f"note: {note}")


def show_memory(found: "MemoryFit", spec: "ModelSpec", gpu_bytes: int | None) -> None:
    """One row a rank, and what fits."""
    console = _console()
    table = _table("RANK", "TP", "PP", "LAYERS", "WEIGHTS", "WORKSPACE", "KV A TOKEN", "KV CACHE", "NEEDS", "MAY USE")
    for rank in found.ranks:
        kv = found.kv_bytes(rank)
        table.add_row(
            str(rank.rank),
            str(rank.tp_rank),
            str(rank.pp_rank),
            _span(rank.layers.start, rank.layers.stop - 1),
            human(rank.weight_bytes),
            human(rank.workspace_bytes),
            human(rank.token_bytes),
            "-" if kv is None else human(kv),
            human(found.needed_bytes(rank)),
            "-" if gpu_bytes is None else human(usable_bytes(gpu_bytes, spec)),
        )
    console.print(table)
    if found.kv_tokens is None:
        console.print(
            f"NEEDS has room for one sequence of {found.max_model_len:,} tokens; give --gpu-memory to see what fits"
        )
    else:
        console.print(
            f"fits: {found.kv_tokens:,} KV tokens, "
            f"{found.max_sequences:,} sequences of {found.max_model_len:,} tokens at once"
        )


def _groups(plan: "Plan") -> Table:
    """One row a group, or a model where there are many."""
    table = _table("GROUP", "MODEL", "DEVICE", "TP x PP", "LEADER", "HOSTS", "KV TOKENS", "SEQUENCES")
    counts = Counter(group.model for group in plan.groups)
    summary = len(plan.groups) > MAX_GROUP_ROWS
    shown = {group.model: group for group in reversed(plan.groups)} if summary else {g.name: g for g in plan.groups}
    for group in sorted(shown.values(), key=plan.groups.index):
        table.add_row(
            f"{group.name} and {counts[group.model] - 1} more" if summary and counts[group.model] > 1 else group.name,
            group.model,
            group.device,
            f"{group.tensor_parallel_size} x {group.pipeline_parallel_size}",
            group.hosts[0].host,
            _few([seat.host for seat in group.hosts]),
            "-" if group.kv_tokens is None else f"{group.kv_tokens:,}",
            "-" if group.max_sequences is None else f"{group.max_sequences:,} x {group.max_model_len:,}",
        )
    return table


def _ranks(plan: "Plan") -> Table:
    """One row a GPU, in the order of the hosts."""
    table = _table("HOST", plan.slot_noun.upper(), "GROUP", "RANK", "TP", "PP", "LAYERS", "WEIGHTS", "NEEDS", "MAY USE")
    seats = {(rank.host, rank.slot): (group, rank) for group in plan.groups for rank in group.ranks}
    for host in plan.hosts:
        for slot in host.slots:
            seat = seats.get((host.address, slot))
            table.add_row(host.address, str(slot), *(_seat(*seat) if seat else ("free",)))
    return table


def _seat(group: "PlannedGroup", rank: "PlannedRank") -> Iterable[str]:
    return (
        group.name,
        str(rank.rank),
        str(rank.tp_rank),
        str(rank.pp_rank),
        _span(rank.first_layer, rank.last_layer),
        *(_size(size) for size in (rank.weight_bytes, rank.needed_bytes, rank.available_bytes)),
    )


def _hosts(plan: "Plan") -> Table:
    """One row for hosts that are alike; `--json` has every rank."""
    table = _table("HOSTS", "", f"{plan.slot_noun}s".upper(), "FREE", "RANKS OF", "MOST NEEDED", "OF")
    ranks: dict[str, list[tuple[str, int | None]]] = {host.address: [] for host in plan.hosts}
    for group in plan.groups:
        for rank in group.ranks:
            ranks[rank.host].append((group.model, rank.needed_bytes))
    alike: dict[tuple[str, ...], list[str]] = {}
    for host in plan.hosts:
        models = Counter(model for model, _ in ranks[host.address])
        sizes = [size for _, size in ranks[host.address] if size is not None]
        row = (
            str(len(host.slots)),
            str(len(host.free)),
            ", ".join(f"{model}: {count}" for model, count in models.items()),
            _size(max(sizes, default=None)),
            _size(host.gpu_memory_bytes),
        )
        alike.setdefault(row, []).append(host.address)
    for cells, addresses in alike.items():
        table.add_row(str(len(addresses)), _few(addresses), *cells)
    return table


def _links(plan: "Plan") -> Table:
    """What travels, once for the groups of a model in which the same of it crosses hosts."""
    table = _table("GROUP", "WHAT TRAVELS", "BETWEEN RANKS", "BYTES", "CROSSES HOSTS")
    alike: dict[tuple[str, tuple[bool, ...]], list[PlannedGroup]] = {}
    for group in plan.groups:
        alike.setdefault((group.model, tuple(link.crosses_hosts for link in group.links)), []).append(group)
    for groups in alike.values():
        name = groups[0].name + (f" and {len(groups) - 1} more" if len(groups) > 1 else "")
        for link in groups[0].links:
            size = "-" if link.size_bytes is None else f"{human(link.size_bytes)} a {link.per}"
            crossing = "yes" if link.crosses_hosts else "no"
            table.add_row(name, _WORDS[link.kind], _between(link), size, crossing)
    return table


_WORDS = {
    "plan": "step plan",
    "all_reduce": "all-reduce",
    "hidden": "hidden states",
    "tokens": "sampled tokens",
}


def _between(link: "Link") -> str:
    if link.kind == "all_reduce":
        return _numbers(link.ranks)
    if link.kind == "hidden":
        half = len(link.ranks) // 2
        return f"{_numbers(link.ranks[:half])} to {_numbers(link.ranks[half:])}"
    return f"{link.ranks[0]} to all"


def _numbers(ranks: tuple[int, ...]) -> str:
    return _span(ranks[0], ranks[-1])


def _span(first: int | None, last: int | None) -> str:
    if first is None or last is None:
        return "-"
    return str(first) if first == last else f"{first}-{last}"


def _size(size: int | None) -> str:
    return "-" if size is None else human(size)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _console() -> Console:
    console = Console(markup=False, highlight=False, emoji=False)
    return console if console.is_terminal else Console(markup=False, highlight=False, emoji=False, width=_PIPE_WIDTH)
