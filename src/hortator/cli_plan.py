"""`hortator plan`: a fleet on its hosts, before anything starts.  `hortator plan-memory`: one model on its GPUs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hortator.cli_errors import EXIT_OK
from hortator.cli_fleet_file import checked_fleet
from hortator.cli_store import AsJson, given

if TYPE_CHECKING:
    from hortator.topology.fleet import Fleet, ModelSpec
    from hortator.topology.hostfilter import HostSlots
    from hortator.topology.memory import MemoryFit
    from hortator.topology.modelshape import ModelShape
    from hortator.topology.plan import Plan

FEWEST_BYTES = 4096  # a smaller bare number has lost its unit

FleetFile = Annotated[Path, typer.Argument(metavar="FLEET", help="fleet file (TOML or YAML)")]
Hostfile = Annotated[Path | None, typer.Option("--hostfile", "-H", help="default: the fleet file's")]
Include = Annotated[str, typer.Option("--include", "-i", help="use only these: HOST[:GPU,GPU]@HOST...")]
Exclude = Annotated[str, typer.Option("--exclude", "-e", help="use all but these: HOST[:GPU,GPU]@HOST...")]
NumNodes = Annotated[int | None, typer.Option("--num_nodes", "--num-nodes", help="use the first hosts only")]
NumGpus = Annotated[int | None, typer.Option("--num_gpus", "--num-gpus", help="use so many GPUs of each host")]


def register(app: typer.Typer) -> None:
    app.command()(plan)
    app.command("plan-memory")(plan_memory)


def plan(
    fleet_file: FleetFile,
    *,
    hostfile: Hostfile = None,
    include: Include = "",
    exclude: Exclude = "",
    num_nodes: NumNodes = None,
    num_gpus: NumGpus = None,
    as_json: AsJson = False,
    as_mermaid: Annotated[bool, typer.Option("--mermaid", help="print a mermaid flowchart")] = False,
    svg: Annotated[Path | None, typer.Option("--svg", help="also write a picture to this file")] = None,
) -> int:
    """Show which rank of which group goes to which GPU, what it needs there and what travels.  Starts nothing."""
    from hortator.topology import picture
    from hortator.topology.mermaid import mermaid

    if as_json and as_mermaid:
        raise typer.BadParameter("--json and --mermaid cannot be given together")
    made = planned(fleet_file, hostfile, include=include, exclude=exclude, num_nodes=num_nodes, num_gpus=num_gpus)
    check_redis(fleet_file, made)
    if svg is not None:
        write(svg, picture.svg(made))
    if as_json:
        typer.echo(made.model_dump_json())
    elif as_mermaid:
        typer.echo(mermaid(made), nl=False)
    else:
        from hortator.cli_plan_tables import show_plan

        show_plan(made)
    return EXIT_OK


def check_redis(fleet_file: Path, made: "Plan") -> None:
    """A Redis that the file names, and that each leader's host would take for its own, is refused as `up` would."""
    from hortator.cli_fleet_file import checked_fleet
    from hortator.topology.identity import check_redis_is_reached

    fleet = checked_fleet(fleet_file)
    if "redis_url" in fleet.model_fields_set:
        check_redis_is_reached(fleet, (group.hosts[0].host for group in made.groups))


def plan_memory(
    model: Annotated[Path, typer.Option("--model", help="directory in the Hugging Face format")],
    *,
    tp: Annotated[int, typer.Option("--tp", help="tensor parallel ranks")] = 1,
    pp: Annotated[int, typer.Option("--pp", help="pipeline parallel ranks")] = 1,
    gpu_memory: Annotated[
        str | None, typer.Option(help='of each GPU, as "80 GiB"; without it nothing is refused')
    ] = None,
    gpu_memory_utilization: Annotated[float | None, typer.Option(help="part of it that may be used")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto | float32 | bfloat16 | float16")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="jobs at a time")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="tokens; default: the model's own")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="token budget of one step")] = None,
    block_size: Annotated[int | None, typer.Option(help="tokens in one KV block")] = None,
    kv_cache_bytes: Annotated[
        str | None, typer.Option(help='per rank, as "20 GiB"; default: what is left of the memory')
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Show what each rank of a model needs of its GPU's memory, and how many tokens and sequences fit."""
    from hortator.topology.ground import checked_fit

    chosen = given(
        gpu_memory_utilization=gpu_memory_utilization,
        dtype=dtype,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        kv_cache_bytes=None if kv_cache_bytes is None else parse_bytes(kv_cache_bytes, "--kv-cache-bytes"),
    )
    spec = spec_of(model, tensor_parallel_size=tp, pipeline_parallel_size=pp, **chosen)
    shape = read_shape(model)
    gpu_bytes = None if gpu_memory is None else parse_bytes(gpu_memory, "--gpu-memory")
    found = checked_fit(shape, spec, gpu_bytes, max_tp=max(8, tp))
    if as_json:
        typer.echo(memory_json(found, shape))
    else:
        from hortator.cli_plan_tables import show_memory

        show_memory(found, spec, gpu_bytes)
    return EXIT_OK


def planned(
    fleet_file: Path,
    hostfile: Path | None = None,
    *,
    include: str = "",
    exclude: str = "",
    num_nodes: int | None = None,
    num_gpus: int | None = None,
) -> "Plan":
    """The plan of this fleet on the hosts that the options leave."""
    fleet = checked_fleet(fleet_file)
    source = hostfile or fleet.hostfile
    return plan_of(
        fleet,
        hosts_of(fleet, source, include=include, exclude=exclude, num_nodes=num_nodes, num_gpus=num_gpus),
    )


def hosts_of(
    fleet: "Fleet",
    hostfile: Path | None,
    *,
    include: str = "",
    exclude: str = "",
    num_nodes: int | None = None,
    num_gpus: int | None = None,
) -> "tuple[HostSlots, ...]":
    """What the filters leave of the hostfile, in which every host of the fleet file stands."""
    from hortator.topology.errors import BadFleet
    from hortator.topology.hostfile import read_hostfile
    from hortator.topology.hostfilter import filter_hosts
    from hortator.topology.plan import check_hosts

    if hostfile is None:
        raise BadFleet('fleet file: hostfile: is missing: add hostfile = "..." or give --hostfile')
    hosts = read_hostfile(hostfile)
    check_hosts(fleet, hosts)
    return filter_hosts(hosts, include=include, exclude=exclude, num_nodes=num_nodes, num_gpus=num_gpus)


def plan_of(fleet: "Fleet", hosts: "Sequence[HostSlots]") -> "Plan":
    """The plan, with the sizes of those models that are on this host too."""
    from hortator.topology.plan import make_plan

    return make_plan(fleet, hosts, read_shapes(fleet))


def read_shapes(fleet: "Fleet") -> dict[str, "ModelShape"]:
    """The sizes of those models whose directories are on this host too."""
    return {
        spec.name: read_shape(spec.path)
        for spec in fleet.models
        if spec.engine == "paged" and spec.path is not None and (spec.path / "config.json").is_file()
    }


def read_shape(path: Path) -> "ModelShape":
    """The sizes of the model in this directory, which must be one that the engine serves."""
    from hortator.topology.modelshape import model_shape
    from hortator.workers.engine.architectures import architecture_of
    from hortator.workers.engine.checkpoint import read_json

    raw = read_json(path / "config.json")
    architecture_of(raw, path)
    return model_shape(raw, source=str(path))


def spec_of(path: Path, **settings: Any) -> "ModelSpec":
    """A model as a fleet file would have it, named by its directory as far as that is a name."""
    from pydantic import TypeAdapter, ValidationError

    from hortator.topology.fleet import ModelSpec, QueueName

    name = path.resolve().name
    try:
        TypeAdapter(QueueName).validate_python(name)
    except ValidationError:
        name = "model"
    return ModelSpec.model_validate({"name": name, "path": path, **settings})


def parse_bytes(text: str, option: str) -> int:
    """`80 GiB` or a number of bytes."""
    from pydantic import TypeAdapter, ValidationError

    from hortator.topology.fleet import Bytes

    if text.strip().isdecimal() and int(text) < FEWEST_BYTES:
        raise typer.BadParameter(f'{option} {text} would be so many bytes: write the unit, as "{text.strip()} GiB"')
    try:
        return int(TypeAdapter(Bytes).validate_python(text))
    except ValidationError:
        raise typer.BadParameter(f'{option} {text!r} is no size: give one as "80 GiB" or in bytes') from None


def memory_json(found: "MemoryFit", shape: "ModelShape") -> str:
    import json

    ranks = [
        {
            "rank": rank.rank,
            "tp_rank": rank.tp_rank,
            "pp_rank": rank.pp_rank,
            "first_layer": rank.layers.start,
            "last_layer": rank.layers.stop - 1,
            "weight_bytes": rank.weight_bytes,
            "workspace_bytes": rank.workspace_bytes,
            "token_bytes": rank.token_bytes,
            "kv_bytes": found.kv_bytes(rank),
            "needed_bytes": found.needed_bytes(rank),
        }
        for rank in found.ranks
    ]
    whole = {
        "architecture": shape.architecture,
        "max_model_len": found.max_model_len,
        "kv_tokens": found.kv_tokens,
        "max_sequences": found.max_sequences,
    }
    return json.dumps({**whole, "ranks": ranks})


def write(file: Path, text: str) -> None:
    from hortator.producer.errors import ConfigError

    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}: give a file in a directory that is there") from error
