"""The Kubernetes manifests, as far as they can be judged without a cluster."""

from copy import deepcopy
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from hortator.workers.settings import WorkerSettings
from tests.containers.manifests import problems
from tests.containers.stack import ROOT

FOLDER = ROOT / "compose" / "kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
DOCUMENTS: list[dict[str, Any]] = [
    document for file in KUSTOMIZATION["resources"] for document in yaml.safe_load_all((FOLDER / file).read_text())
]


def named(kind: str, name: str) -> dict[str, Any]:
    [found] = [d for d in DOCUMENTS if d["kind"] == kind and d["metadata"]["name"] == name]
    return found


def pods() -> dict[str, dict[str, Any]]:
    """Every pod template, by the component that it labels."""
    template = named("LeaderWorkerSet", "demo")["spec"]["leaderWorkerTemplate"]
    templates = [template["leaderTemplate"], template["workerTemplate"]]
    templates += [d["spec"]["template"] for d in DOCUMENTS if d["kind"] in ("Deployment", "StatefulSet")]
    return {t["metadata"]["labels"]["app.kubernetes.io/component"]: t for t in templates}


def environment(component: str) -> dict[str, str]:
    [container] = pods()[component]["spec"]["containers"]
    return {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: f"{d['kind']} {d['metadata']['name']}")
def test_a_manifest_has_the_fields_of_its_kind_and_no_others(document: dict[str, Any]) -> None:
    assert problems(document) == []


def test_a_wrong_manifest_is_found_out() -> None:
    wrong = deepcopy(named("LeaderWorkerSet", "demo"))
    template = wrong["spec"]["leaderWorkerTemplate"]
    template["restartPolicy"] = "Always"
    del template["workerTemplate"]["spec"]["containers"][0]["name"]
    template["leaderTemplate"]["spec"]["containers"][0]["images"] = "x"
    wrong["spec"]["replicas"] = "1"
    assert len(problems(wrong)) == 4


def test_every_manifest_of_the_folder_is_applied() -> None:
    files = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == set(KUSTOMIZATION["resources"])


def test_a_leader_pod_has_the_settings_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    given = environment("leader")
    fields = {f"HORTATOR_{name.upper()}" for name in WorkerSettings.model_fields}
    assert given.keys() <= fields
    for name, value in (given | {"HORTATOR_CONTROL_HOST": "10.0.0.1", "HORTATOR_GROUP": "demo-0"}).items():
        monkeypatch.setenv(name, value)
    size = named("LeaderWorkerSet", "demo")["spec"]["leaderWorkerTemplate"]["size"]
    settings = WorkerSettings()
    assert settings.front_ranks * size == settings.world_size


def test_the_pods_of_a_group_have_the_time_to_finish() -> None:
    for component in ("leader", "peer"):
        grace_s = pods()[component]["spec"]["terminationGracePeriodSeconds"]
        assert grace_s > WorkerSettings.model_fields["grace_s"].default


def test_nothing_of_ours_runs_as_root_or_may_become_it() -> None:
    for pod in pods().values():
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        for container in pod["spec"]["containers"]:
            assert not container["securityContext"]["allowPrivilegeEscalation"]


def test_services_and_policies_select_pods_that_exist() -> None:
    labels = [pod["metadata"]["labels"] for pod in pods().values()]
    for service in (d for d in DOCUMENTS if d["kind"] == "Service"):
        assert any(service["spec"]["selector"].items() <= found.items() for found in labels)


def test_scaling_looks_at_the_queue_of_the_model_that_it_scales() -> None:
    spec = named("ScaledObject", "demo")["spec"]
    assert named(spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"])
    model = environment("leader")["HORTATOR_MODEL"]
    assert all(f'{{model="{model}"}}' in trigger["metadata"]["valueLocation"] for trigger in spec["triggers"])
    namespace = KUSTOMIZATION["namespace"]
    assert all(f"//api.{namespace}.svc" in trigger["metadata"]["url"] for trigger in spec["triggers"])
