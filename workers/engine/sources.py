"""Where each parameter of a rank's model lies in the checkpoint, and which part of it the rank needs.  No tensors."""

from collections.abc import Container
from dataclasses import dataclass

from hortator.producer.errors import ConfigError

from .architectures import Architecture, Experts
from .checkpoint import TensorEntry
from .parallel import Cut, Ranks, cut_of

_LAYERS = "model.layers."
_EXPERTS = ".mlp.experts."
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the checkpoint, the part of it that is read, and where that goes in the rank's parameter."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    cut: Cut
    place: tuple[int | slice, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """One parameter of the rank: its shape here, and the sources that fill it."""

    shape: tuple[int, ...]
    sources: tuple[Source, ...]


def placements(
    parameters: dict[str, tuple[int, ...]],
    *,
    architecture: Architecture,
    stage: range,
    head_sizes: tuple[int, int, int],
    names: Container[str],
    ranks: Ranks,
) -> dict[str, Placement]:
    """By the parameter's name in the rank's model, whose layers are numbered from the stage's first.

    `parameters` gives whole shapes, `head_sizes` the rows of queries, keys and values, `names` what the checkpoint has.
    """
    found = {}
    for local, shape in parameters.items():
        name = EMBEDDING if local == HEAD and HEAD not in names else _global_name(local, stage)
        cut = cut_of(name, shape, head_sizes, ranks)
        sources = _sources(name, shape, cut, architecture.experts, names)
        found[local] = Placement(cut.shape(shape), sources)
    return found


def check_sources(placed: dict[str, Placement], entries: dict[str, TensorEntry]) -> None:
    """Every source is there, with the shape that the config gives it."""
    sources = [source for placement in placed.values() for source in placement.sources]
    if missing := sorted({source.name for source in sources} - set(entries)):
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise ConfigError(f"the checkpoint lacks {shown}: it is incomplete or of another model than its config.json")
    for source in sources:
        entry = entries[source.name]
        if entry.shape != source.shape:
            raise ConfigError(
                f"{source.name} in {entry.file} is {list(entry.shape)}, but config.json makes it "
                f"{list(source.shape)}: weights and config are of different models"
            )


def _global_name(local: str, stage: range) -> str:
    if not local.startswith(_LAYERS):
        return local
    index, _, rest = local.removeprefix(_LAYERS).partition(".")
    return f"{_LAYERS}{int(index) + stage.start}.{rest}"


def _sources(
    name: str, shape: tuple[int, ...], cut: Cut, experts: Experts | None, names: Container[str]
) -> tuple[Source, ...]:
    """The tensor of that name, or what older checkpoints have instead: one tensor for each expert and matrix."""
    if experts is None or name in names:
        return (Source(name, shape, cut),)
    older = name.replace(".mlp.", f".{experts.block}.")
    if _EXPERTS not in name:
        return (Source(older, shape, cut),)
    stem, _, matrix = older.rpartition(".")
    split = _split_down if matrix == "down_proj" else _split_gate_up
    return tuple(source for expert in range(shape[0]) for source in split(f"{stem}.{expert}", shape, cut, experts))


# Both take the name of one expert, and shape and cut of the parameter [experts, rows, columns] that stacks them.


def _split_down(stem: str, shape: tuple[int, ...], cut: Cut, experts: Experts) -> list[Source]:
    own = Cut(1, cut.ranges) if cut.ranges else cut
    return [Source(f"{stem}.{experts.down}.weight", shape[1:], own, (_expert(stem),))]


def _split_gate_up(stem: str, shape: tuple[int, ...], cut: Cut, experts: Experts) -> list[Source]:
    own = Cut(0, cut.ranges[:1]) if cut.ranges else cut
    rows, part = shape[1] // 2, cut.shape(shape)[1] // 2
    return [
        Source(f"{stem}.{name}.weight", (rows, shape[2]), own, (_expert(stem), slice(begin, begin + part)))
        for name, begin in ((experts.gate, 0), (experts.up, part))
    ]


def _expert(stem: str) -> int:
    return int(stem.rpartition(".")[2])
