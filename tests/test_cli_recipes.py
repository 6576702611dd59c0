"""What others need to start a fleet, printed or written."""

from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from hortator.cli_recipes import show_recipes
from hortator.producer.errors import ConfigError
from hortator.topology.errors import CannotStart
from hortator.topology.fleet import Fleet, parse_fleet
from hortator.topology.hostfilter import HostSlots
from hortator.topology.plan import Plan, make_plan

MODEL = '[[models]]\nname = "{name}"\npath = "/models/{name}"\ntensor_parallel_size = 2\nreplicas = 2\n'
FLEET = parse_fleet(MODEL.format(name="llama") + MODEL.format(name="small"))
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


def test_several_sbatch_files_are_not_printed_as_one() -> None:
    with pytest.raises(CannotStart, match="give --out DIR"):
        show("slurm")
