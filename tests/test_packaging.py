"""What gets installed, and what it drags in."""

import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
NOT_THE_PRODUCT = {"tests", "src", "docs", "benchmarks", "demo", "compose", "build", "dist"}
SERVER_SIDE = ("torch", "celery", "kombu", "transformers", "deepspeed", "tokenizers")


def folders() -> list[str]:
    """Every top-level folder that is a package."""
    found = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    return sorted(name for name in found if name not in NOT_THE_PRODUCT)


def python(code: str, *, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


def modules_after(imports: str) -> set[str]:
    done = python(f"{imports}\nimport sys\nprint(*sys.modules)")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree: building writes into the tree that it builds."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    rubbish = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
    for name in ("src", *folders()):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=rubbish)
    for name in ("pyproject.toml", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        ".",
    ]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    [built] = out.glob("*.whl")
    return built


def test_the_three_folders_are_the_product() -> None:
    assert folders() == ["producer", "topology", "workers"]


@pytest.mark.parametrize("name", folders())
def test_a_folder_is_importable_under_the_one_name(name: str) -> None:
    done = python(f"import hortator.{name} as m; print(m.__name__)", cwd=Path("/"))
    assert done.stdout.strip() == f"hortator.{name}", done.stderr


@pytest.mark.parametrize("name", folders())
def test_a_folder_refuses_to_be_imported_from_the_repository_root(name: str) -> None:
    done = python(f"import {name}", cwd=ROOT)
    assert done.returncode == 1
    assert f"ImportError: import this folder as hortator.{name}" in done.stderr


def test_the_wheel_holds_every_python_and_lua_file_of_the_tree(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"hortator/{path.relative_to(ROOT)}"
        for folder in folders()
        for suffix in ("py", "lua")
        for path in (ROOT / folder).rglob(f"*.{suffix}")
    }
    wanted |= {f"hortator/{path.name}" for path in (ROOT / "src/hortator").glob("*.py")} | {"hortator/py.typed"}
    assert wanted - held == set()


def test_the_wheel_holds_nothing_that_is_not_the_product(wheel: Path) -> None:
    held = zipfile.ZipFile(wheel).namelist()
    assert [name for name in held if not name.startswith(("hortator/", "hortator-"))] == []
    assert not [name for name in held if "__pycache__" in name or "/tests/" in name]


def test_a_plain_install_asks_for_no_torch_and_no_server(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    lines = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist") or []
    requirements = [Requirement(line) for line in lines]
    plain = {r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}
    assert plain == {"pydantic", "pydantic-settings", "pyyaml", "redis", "rich", "typer"}


def test_a_producer_loads_no_server_side_package() -> None:
    loaded = modules_after("from hortator.producer import Client, AsyncClient, Job, Sampling")
    assert loaded.isdisjoint({*SERVER_SIDE, "fastapi", "starlette", "uvicorn", "prometheus_client", "typer"})


def test_the_api_loads_neither_torch_nor_celery() -> None:
    assert modules_after("import hortator.producer.api.server").isdisjoint(SERVER_SIDE)


def test_the_command_line_loads_nothing_heavy_before_a_command_runs() -> None:
    heavy = {*SERVER_SIDE, "fastapi", "redis", "pydantic", "httpx", "hortator.workers", "hortator.producer.schema"}
    assert modules_after("import hortator.cli").isdisjoint(heavy)


def test_imports_inside_a_folder_are_relative() -> None:
    """Across folders they are absolute; ruff sees to it that nobody climbs up with two dots."""
    wrong = []
    for folder in folders():
        for path in (ROOT / folder).rglob("*.py"):
            package = ".".join(("hortator", *path.relative_to(ROOT).parts[:-1]))
            own = re.compile(rf"^\s*from {re.escape(package)}(\.\w+)* import", re.MULTILINE)
            wrong += [f"{path.relative_to(ROOT)}: {match[0].strip()}" for match in own.finditer(path.read_text())]
    assert not wrong
