"""The compose files and what belongs to them, as far as they can be judged without Docker."""

import json
import os
import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from hortator.producer.api.metrics import Metrics
from hortator.producer.api.settings import ApiSettings
from hortator.producer.settings import StoreSettings
from hortator.producer.store import GroupBeat, QueueInfo
from hortator.topology.join import place_of
from hortator.workers.settings import WorkerSettings
from tests.containers.stack import ROOT

FOLDER = ROOT / "compose"
VARIABLE = re.compile(r"\$\{([A-Z_]+)(?::?-([^}]*))?\}")
METRIC = re.compile(r"hortator_[a-z_]+")


def interpolated(file: str) -> Any:
    """As compose reads it when no variable is set."""
    return yaml.safe_load(VARIABLE.sub(lambda match: match[2] or "", (FOLDER / file).read_text()))


SERVICES: dict[str, dict[str, Any]] = interpolated("docker-compose.yml")["services"]
GPU_SERVICES: dict[str, dict[str, Any]] = interpolated("docker-compose.gpu.yml")["services"]
OURS = ("api", "leader", "peer")
SETTINGS = {
    f"{settings.model_config['env_prefix']}{name.upper()}"
    for settings in (WorkerSettings, ApiSettings, StoreSettings)
    for name in settings.model_fields
}


def mentioned_metrics() -> set[str]:
    """In the dashboard, the alerts and what Kubernetes scales by."""
    files = ("grafana/dashboards/hortator.json", "prometheus/rules.yml", "kubernetes/base/scaling.yaml")
    return {name for file in files for name in METRIC.findall((FOLDER / file).read_text())}


def test_the_gpu_file_changes_only_services_that_exist() -> None:
    assert GPU_SERVICES.keys() <= SERVICES.keys()


@pytest.mark.parametrize("name", OURS)
def test_a_service_sets_only_settings_that_exist(name: str) -> None:
    given = SERVICES[name]["environment"] | GPU_SERVICES.get(name, {}).get("environment", {})
    ours = {variable for variable in given if variable.startswith("HORTATOR_")}
    assert ours
    assert ours <= SETTINGS


def test_the_settings_of_the_leader_are_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in SERVICES["leader"]["environment"].items():
        monkeypatch.setenv(variable, str(value))
    settings = WorkerSettings()
    assert settings.launcher == "external"
    assert settings.front_ranks == 1


def test_the_peer_takes_the_rank_that_the_leader_lacks() -> None:
    leader, peer = SERVICES["leader"]["environment"], SERVICES["peer"]["environment"]
    place = place_of(peer)
    assert place.ranks == (1,)
    assert str(place.world_size) == leader["HORTATOR_TENSOR_PARALLEL_SIZE"]
    for name in ("HORTATOR_KEEPER_PORT", "HORTATOR_SECRET_FILE"):
        assert leader[name] == peer[name]


def test_the_settings_of_the_api_are_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in SERVICES["api"]["environment"].items():
        monkeypatch.setenv(variable, str(value))
    assert ApiSettings().open_paths == {"/metrics"}


def test_redis_keeps_what_it_accepted() -> None:
    command = SERVICES["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"
    assert any(volume.endswith(f":{options['--dir']}") for volume in SERVICES["redis"]["volumes"])


def test_a_stopped_leader_has_the_time_to_finish() -> None:
    grace_s = int(SERVICES["leader"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > WorkerSettings.model_fields["grace_s"].default


def test_a_peer_is_stopped_only_after_its_leader() -> None:
    assert "peer" in SERVICES["leader"]["depends_on"]
    assert "depends_on" not in SERVICES["peer"]


def test_every_first_process_collects_what_health_checks_leave() -> None:
    assert all(SERVICES[name].get("init") for name in ("redis", *OURS))


def test_nothing_is_published_beyond_this_machine() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_file_that_the_services_mount_exists() -> None:
    volumes = interpolated("docker-compose.yml")["volumes"]
    for service in SERVICES.values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert source in volumes or (FOLDER / source).exists(), mount


def test_what_the_image_copies_is_in_the_tree_and_in_the_context() -> None:
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from" not in line]
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source in (source for sources in copied for source in sources):
        assert (ROOT / source).exists(), source
        assert source in allowed, f"{source} is not in .dockerignore"


def test_the_image_installs_what_the_project_asks_for() -> None:
    requirements = runpy.run_path(str(FOLDER / "requirements.py"))["requirements"]
    text = (ROOT / "pyproject.toml").read_text()
    found = requirements(text, ["api", "worker"])
    optional = tomllib.loads(text)["project"]["optional-dependencies"]
    assert {*optional["api"], *optional["worker"]} <= set(found)
    assert not any(line.startswith("pytest") for line in found)


def test_the_scripts_of_the_image_can_be_run() -> None:
    assert os.access(FOLDER / "member.sh", os.X_OK)


def test_every_metric_that_is_looked_at_exists() -> None:
    beat = GroupBeat(group="g", model="demo", running=1, capacity=64, epoch=1, state="ready")
    queue = QueueInfo(model="demo", depth=2, oldest_age_s=1.0, running=1, suspects=0, groups=(beat,))
    metrics = Metrics()
    metrics.requests.labels("POST", "/v1/jobs", 202).inc()
    metrics.duration_s.labels("/v1/jobs").observe(0.1)
    page = metrics.page([queue], num_letters=1).decode()
    samples = {s.name for family in text_string_to_metric_families(page) for s in family.samples}
    assert mentioned_metrics()
    assert mentioned_metrics() <= samples


def test_the_dashboard_is_the_one_that_grafana_shows_first() -> None:
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    board = json.loads((FOLDER / "grafana" / "dashboards" / home.name).read_text())
    [source] = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
