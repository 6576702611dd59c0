"""A plan as an SVG picture: hosts as cards, GPUs as cells, the ranks of a stage in one frame in their group's colour,
arrows where hidden states travel.

Pure.  Many hosts are drawn small, without words in the cells; titles (what a browser shows at the pointer) have all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from .memory import human
from .palette import Colour, colours
from .plan import Block, Plan, PlannedGroup, PlannedHost, PlannedRank, blocks_by_host

MAX_HOSTS_LARGE = 48
MAX_LEGEND = 24
_WIDTH = 1400
_MARGIN = 28
_GAP = 20
_HEADER = 84
_CAPTION = 19  # height of a frame's upper edge, which holds its words
_FONT = "ui-sans-serif, system-ui, 'Helvetica Neue', Arial, sans-serif"
_LETTER = 0.6  # width of a letter, on average, as part of the font's size
_INK, _DIM, _EDGE, _CARD = "#1c2330", "#5b6472", "#c9ced6", "#f6f7f9"


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes in pixels; `columns` cells stand beside each other."""

    columns: int
    cell: int
    height: int
    gap: int
    title: int
    padding: int
    words: bool

    def card(self, slots: int) -> tuple[int, int]:
        """Width and height of a host with this many GPUs."""
        rows = -(-slots // self.columns)
        width = 2 * self.padding + self.columns * (self.cell + self.gap) - self.gap
        return width, self.title + self.padding + rows * self.row - (self.row - self.height)

    def place(self, index: int) -> tuple[int, int]:
        """Where the index-th GPU is in its card."""
        row, column = divmod(index, self.columns)
        return self.padding + column * (self.cell + self.gap), self.title + row * self.row

    @property
    def row(self) -> int:
        """From one row of cells to the next."""
        return self.height + self.gap + (_CAPTION if self.words else 0)


def svg(plan: Plan) -> str:
    """The picture as a document of its own."""
    return _Drawing(plan, _scale(plan)).document()


def _scale(plan: Plan) -> Scale:
    widest = max(len(host.slots) for host in plan.hosts)
    if len(plan.hosts) > MAX_HOSTS_LARGE:
        return Scale(min(widest, 16), cell=11, height=11, gap=2, title=18, padding=6, words=False)
    return Scale(min(widest, 8), cell=66, height=66, gap=13, title=62, padding=16, words=True)


@dataclass
class _Drawing:
    plan: Plan
    scale: Scale
    root: Element = field(default_factory=lambda: Element("svg", {"xmlns": "http://www.w3.org/2000/svg"}))
    seats: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    """The upper left corner of each GPU's cell, by host and slot."""
    right: float = 0.0  # where the drawing ends

    def document(self) -> str:
        colour = colours(self.plan)
        SubElement(self.root, "rect", {"width": "100%", "height": "100%", "fill": "#ffffff"})
        self._heading()
        bottom = self._hosts(colour)
        if self.scale.words:
            self._arrows(colour)
        bottom = self._legend(bottom + _GAP, colour)
        width = min(_WIDTH, int(self.right) + _MARGIN)
        self.root.set("viewBox", f"0 0 {width} {bottom}")
        self.root.set("width", str(width))
        self.root.set("height", str(bottom))
        self.root.set("font-family", _FONT)
        indent(self.root, " ")
        return tostring(self.root, encoding="unicode") + "\n"

    # --- parts

    def _heading(self) -> None:
        plan = self.plan
        used = plan.num_slots - plan.num_free
        self._text(_MARGIN, 42, "Fleet plan", size=22, weight="600")
        what = f"{_count(len(plan.groups), 'group')} on {used} of {_count(plan.num_slots, plan.slot_noun)}"
        self._text(_MARGIN, 66, f"{what}, {_count(len(plan.hosts), 'host')}, {plan.num_free} free", size=14, fill=_DIM)

    def _hosts(self, colour: dict[str, Colour]) -> int:
        """Cards from left to right, then down; where the last one ends."""
        blocks = blocks_by_host(self.plan)
        x, y, row = _MARGIN, _HEADER, 0
        for host in self.plan.hosts:
            width, height = self.scale.card(len(host.slots))
            if x > _MARGIN and x + width > _WIDTH - _MARGIN:
                x, y, row = _MARGIN, y + row + self._between, 0
            self._host(host, blocks[host.address], (x, y), colour)
            x, row = x + width + self._between, max(row, height)
        return y + row

    @property
    def _between(self) -> int:
        return _GAP if self.scale.words else 8

    def _host(
        self, host: PlannedHost, blocks: Sequence[Block], corner: tuple[int, int], colour: dict[str, Colour]
    ) -> None:
        x, y = corner
        width, height = self.scale.card(len(host.slots))
        self._box(x, y, width, height, fill=_CARD, stroke=_EDGE, radius=10 if self.scale.words else 4)
        self._host_title(host, x, y, width)
        for index, slot in enumerate(host.slots):
            dx, dy = self.scale.place(index)
            self.seats[host.address, slot] = (x + dx, y + dy)
        for slot in host.free:
            self._free(host, slot)
        for block in blocks:
            self._block(block, colour[block.group.name])

    def _host_title(self, host: PlannedHost, x: int, y: int, width: int) -> None:
        if not self.scale.words:
            name = self._text(x + 6, y + 12, _cut(host.address, width // 6), size=9, fill=_DIM)
            _title(name, host.address)
            return
        memory = "" if host.gpu_memory_bytes is None else f" x {human(host.gpu_memory_bytes)}"
        room = f"{_count(len(host.slots), self.plan.slot_noun)}{memory}"
        self._text(x + 14, y + 25, _cut(host.address, (width - 28) // 9), size=14, weight="600")
        width_left = width - 36 - 9 * len(host.address)
        if width_left >= 7 * len(room):
            self._text(x + width - 14, y + 25, room, size=11, fill=_DIM, anchor="end")

    def _free(self, host: PlannedHost, slot: int) -> None:
        x, y = self.seats[host.address, slot]
        box = self._box(x, y, self.scale.cell, self.scale.height, fill="#ffffff", stroke="#b4bac4", radius=self._radius)
        box.set("stroke-dasharray", "4 3" if self.scale.words else "2 1")
        _title(box, f"{host.address}, {self.plan.slot_noun} {slot}: free")
        if self.scale.words:
            self._text(
                x + self.scale.cell // 2,
                y + 37,
                f"{self.plan.slot_noun} {slot}",
                size=11,
                fill="#8a92a0",
                anchor="middle",
            )

    @property
    def _radius(self) -> int:
        return 6 if self.scale.words else 2

    def _block(self, block: Block, colour: Colour) -> None:
        if self.scale.words:
            self._bands(block, colour)
        for rank in block.ranks:
            self._rank(block.group, rank, colour)

    def _bands(self, block: Block, colour: Colour) -> None:
        """A frame around the ranks of one stage, which all-reduce with each other: one in each row of cells."""
        rows: dict[int, list[int]] = {}
        for rank in block.ranks:
            x, y = self.seats[rank.host, rank.slot]
            rows.setdefault(y, []).append(x)
        for y, columns in rows.items():
            left, right = min(columns) - 3, max(columns) + self.scale.cell + 3
            height = self.scale.height + _CAPTION + 3
            frame = self._box(left, y - _CAPTION, right - left, height, fill=colour.line, stroke="none", radius=8)
            captions = _captions(block)
            _title(frame, captions[0])
            room = int((right - left - 12) / (_LETTER * 11))
            caption = next((text for text in captions if len(text) <= room), _cut(captions[-1], room))
            self._text(left + 7, y - 6, caption, size=11, weight="600", fill="#ffffff")

    def _rank(self, group: PlannedGroup, rank: PlannedRank, colour: Colour) -> None:
        x, y = self.seats[rank.host, rank.slot]
        stroke = "none" if self.scale.words else colour.line
        box = self._box(x, y, self.scale.cell, self.scale.height, fill=colour.fill, stroke=stroke, radius=self._radius)
        _title(box, _describe(group, rank))
        if not self.scale.words:
            return
        middle = x + self.scale.cell // 2
        self._text(middle, y + 24, f"rank {rank.rank}", size=13, weight="600", anchor="middle")
        self._text(middle, y + 41, f"{group.slot_noun} {rank.slot}", size=11, fill=_DIM, anchor="middle")
        self._gauge(rank, x + 8, y + 52, self.scale.cell - 16, colour)

    def _gauge(self, rank: PlannedRank, x: int, y: int, width: int, colour: Colour) -> None:
        """Weights (dark) and cache (light) as parts of the memory that the rank may use."""
        if rank.available_bytes is None or rank.needed_bytes is None or rank.weight_bytes is None:
            return
        whole = max(rank.available_bytes, rank.needed_bytes)
        self._box(x, y, width, 7, fill="#ffffff", stroke="none", radius=2)
        self._box(x, y, width * rank.needed_bytes / whole, 7, fill=colour.line, stroke="none", radius=2).set(
            "opacity", "0.45"
        )
        self._box(x, y, width * rank.weight_bytes / whole, 7, fill=colour.line, stroke="none", radius=2)

    def _arrows(self, colour: dict[str, Colour]) -> None:
        """From the last rank of each stage to the next stage."""
        for group in self.plan.groups:
            for link in group.links:
                if link.kind == "hidden":
                    half = len(link.ranks) // 2
                    *_, source = (self._corner(group.ranks[rank]) for rank in link.ranks[:half])
                    targets = [self._corner(group.ranks[rank]) for rank in link.ranks[half:]]
                    self._arrow(source, _facing(source, targets), colour[group.name])

    def _corner(self, rank: PlannedRank) -> tuple[int, int]:
        return self.seats[rank.host, rank.slot]

    def _arrow(self, source: tuple[int, int], target: tuple[int, int], colour: Colour) -> None:
        """To the right where the target is there, in a bow if something may be between; else from below to above."""
        (x1, y1), (x2, y2) = source, target
        cell, height = self.scale.cell, self.scale.height
        across = x2 > x1
        if across:
            x1, y1, x2, y2 = x1 + cell + 3, y1 + height // 2, x2 - 6, y2 + height // 2
            lift = 0 if x2 - x1 < cell else height
            bend = (x2 - x1) // 3
            path = f"M{x1},{y1} C{x1 + bend},{y1 - lift} {x2 - bend},{y2 - lift} {x2},{y2}"
        else:
            x1, y1, x2, y2 = x1 + cell // 2, y1 + height + 3, x2 + cell // 2, y2 - _CAPTION - 4
            bend = max(24, abs(y2 - y1) // 2)
            path = f"M{x1},{y1} C{x1},{y1 + bend} {x2},{y2 - bend} {x2},{y2}"
        SubElement(self.root, "path", {"d": path, "fill": "none", "stroke": colour.line, "stroke-width": "2.5"})
        self._head(x2, y2, across=across, colour=colour)

    def _head(self, x: int, y: int, *, across: bool, colour: Colour) -> None:
        tips = ((-5, -5), (-5, 5), (4, 0)) if across else ((-5, -4), (5, -4), (0, 5))
        points = " ".join(f"{x + dx},{y + dy}" for dx, dy in tips)
        SubElement(self.root, "polygon", {"points": points, "fill": colour.line})

    def _legend(self, top: int, colour: dict[str, Colour]) -> int:
        """One line for each group, or for each model where there are many; where it ends."""
        y = top + 8
        shown = self.plan.groups
        if len(shown) > MAX_LEGEND:
            shown = tuple({group.model: group for group in reversed(self.plan.groups)}.values())[::-1]
        for group in shown[:MAX_LEGEND]:
            self._box(_MARGIN, y, 16, 16, fill=colour[group.name].fill, stroke=colour[group.name].line, radius=4)
            count = sum(other.model == group.model for other in self.plan.groups)
            name = group.name if len(shown) == len(self.plan.groups) else f"{group.model} ({_count(count, 'group')})"
            self._text(_MARGIN + 26, y + 13, name, size=13, weight="600")
            self._text(_MARGIN + 250, y + 13, _cut(_legend_text(group), 170), size=13, fill=_DIM)
            y += 26
        if self.scale.words and any(rank.available_bytes for group in self.plan.groups for rank in group.ranks):
            bars = "Bars: weights (dark), KV cache and workspace, of the memory that the rank may use"
            self._text(_MARGIN, y + 16, bars, size=12, fill=_DIM)
            y += 22
        for note in self.plan.notes:
            self._text(_MARGIN, y + 16, f"Note: {_cut(note, 180)}", size=12, fill="#8a4b00")
            y += 22
        return y + 20

    # --- strokes

    def _box(self, x: float, y: float, width: float, height: float, *, fill: str, stroke: str, radius: int) -> Element:
        self.right = max(self.right, x + width)
        place = {"x": _number(x), "y": _number(y), "width": _number(width), "height": _number(height)}
        return SubElement(self.root, "rect", {**place, "rx": str(radius), "fill": fill, "stroke": stroke})

    def _text(
        self, x: float, y: float, text: str, *, size: int, weight: str = "400", fill: str = _INK, anchor: str = "start"
    ) -> Element:
        if anchor == "start":
            self.right = max(self.right, x + _LETTER * size * len(text))
        look = {"font-size": str(size), "font-weight": weight, "fill": fill, "text-anchor": anchor}
        element = SubElement(self.root, "text", {"x": _number(x), "y": _number(y), **look})
        element.text = text
        return element


def _facing(source: tuple[int, int], targets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Where an arrow arrives: the first of the targets if it is to the right, else the nearest in its row."""
    first = targets[0]
    if first[0] > source[0]:
        return first
    return min((target for target in targets if target[1] == first[1]), key=lambda target: abs(target[0] - source[0]))


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _title(element: Element, text: str) -> None:
    SubElement(element, "title").text = text


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(1, length - 1)] + "…"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _captions(block: Block) -> list[str]:
    """What to write over a stage, longest first."""
    group, first = block.group, block.ranks[0]
    if group.pipeline_parallel_size == 1:
        return [group.name]
    stage = f"{group.name}, stage {block.pp_rank}"
    short = [stage, f"{group.name} s{block.pp_rank}"]
    return short if first.first_layer is None else [f"{stage}, {_layers(first)}", *short]


def _layers(rank: PlannedRank) -> str:
    one = rank.first_layer == rank.last_layer
    return f"layer {rank.first_layer}" if one else f"layers {rank.first_layer} to {rank.last_layer}"


def _describe(group: PlannedGroup, rank: PlannedRank) -> str:
    lines = [
        f"{group.name}, rank {rank.rank} (tp {rank.tp_rank}, pp {rank.pp_rank})",
        f"{rank.host}, {group.slot_noun} {rank.slot}",
    ]
    if rank.first_layer is not None:
        lines.append(_layers(rank))
    if rank.needed_bytes is not None and rank.weight_bytes is not None:
        lines.append(f"needs {human(rank.needed_bytes)}, weights {human(rank.weight_bytes)}")
    if rank.available_bytes is not None:
        lines.append(f"may use {human(rank.available_bytes)}")
    return "\n".join(lines)


def _legend_text(group: PlannedGroup) -> str:
    parts = [f"tp {group.tensor_parallel_size} x pp {group.pipeline_parallel_size}"]
    if group.kv_tokens is not None:
        parts.append(
            f"{group.kv_tokens:,} KV tokens: {_count(group.max_sequences or 0, 'sequence')} of {group.max_model_len:,}"
        )
    reduced = [link.size_bytes for link in group.links if link.kind == "all_reduce" and link.size_bytes is not None]
    if reduced:
        parts.append(f"all-reduce {human(max(reduced))} a token in a stage")
    hidden = next((link for link in group.links if link.kind == "hidden" and link.size_bytes is not None), None)
    if hidden is not None:
        crossing = any(link.crosses_hosts for link in group.links if link.kind == "hidden")
        parts.append(f"{human(hidden.size_bytes or 0)} a token between stages{', across hosts' if crossing else ''}")
    return " · ".join(parts)
