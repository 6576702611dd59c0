"""What others need to start a fleet, printed or written."""

from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from hortator.cli_recipes import show_recipes
from hortator.producer.errors import ConfigError
from hortator.topology.errors import BadFleet, CannotStart
from hortator.topology.fleet import Fleet, parse_fleet
from hortator.topology.hostfilter import HostSlots
from hortator.topology.plan import Plan, make_plan

MODEL = '[[models]]\nname = "{name}"\npath = "/models/{name}"\ntensor_parallel_size = 2\nreplicas = 2\n'
FLEET = parse_fleet('redis_url = "redis://r/0"\n' + MODEL.format(name="llama") + MODEL.format(name="small"))
PLAN = make_plan(FLEET, [HostSlots("a", (0, 1, 2, 3)), HostSlots("b", (0, 1, 2, 3))], {})


def show(style: str, out: Path | None = None, *, fleet: Fleet = FLEET, plan: Plan = PLAN) -> None:
    show_recipes(style, fleet, plan, plan.groups, python=Path("/opt/python"), out=out)


def test_manifests_are_printed_as_one_stream_of_documents(capsys: pytest.CaptureFixture[str]) -> None:
    show("kubernetes")
    assert [one["metadata"]["name"] for one in yaml.safe_load_all(capsys.readouterr().out)] == ["llama", "small"]


def test_a_file_for_each_is_written_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show("slurm", tmp_path / "new" / "folder")
    files = [tmp_path / "new" / "folder" / f"{group.name}.sbatch" for group in PLAN.groups]
    assert capsys.readouterr().out.splitlines() == list(map(str, files))
    assert all(file.read_text().startswith("#!/bin/bash\n") for file in files)
    with pytest.raises(ConfigError, match="cannot make the directory"):
        show("slurm", files[0])


@pytest.mark.parametrize(
    "url", ["", "redis://127.0.0.1:6379/0", "redis://:s3kret@localhost:6379/0", "unix:///run/redis.sock"]
)
def test_a_redis_that_each_host_would_take_for_its_own_is_refused_with_what_to_change(url: str) -> None:
    text = (f'redis_url = "{url}"\n' if url else "") + MODEL.format(name="llama")
    fleet = parse_fleet(text)
    plan = make_plan(fleet, [HostSlots("a", (0, 1)), HostSlots("b", (0, 1))], {})
    for style in ("torchrun", "slurm"):
        with pytest.raises(BadFleet, match=f"every host's own, but {style} is to use a, b: give an address") as problem:
            show(style, fleet=fleet, plan=plan)
        assert "s3kret" not in str(problem.value)
    alone = make_plan(fleet, [HostSlots("a", (0, 1, 2, 3))], {})
    show("torchrun", fleet=fleet, plan=alone)
    with pytest.raises(BadFleet, match="every pod's own: give the address of a Redis that all pods reach"):
        show("kubernetes", fleet=fleet, plan=alone)


def test_a_recipe_that_there_is_not_is_said_before_anything_else() -> None:
    with pytest.raises(CannotStart, match="no recipe for 'pbs': there are torchrun, slurm, kubernetes"):
        show("pbs", fleet=parse_fleet(MODEL.format(name="llama")))


def test_several_sbatch_files_are_not_printed_as_one() -> None:
    with pytest.raises(CannotStart, match="give --out DIR"):
        show("slurm")
