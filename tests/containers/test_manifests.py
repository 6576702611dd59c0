"""The Kubernetes manifests, as far as they can be judged without a cluster."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from hortator.workers.settings import WorkerSettings
from tests.containers.kustomize import built, sources
from tests.containers.manifests import problems
from tests.containers.stack import ROOT

KUBERNETES = ROOT / "compose" / "kubernetes"
FOLDER = KUBERNETES / "base"
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


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_each_kind_of_group_is_built_from_the_same_base(kind: str) -> None:
    made = built(KUBERNETES / kind)
    assert [found for document in made for found in problems(document)] == []
    assert {(d["kind"], d["metadata"]["name"]) for d in made} == {(d["kind"], d["metadata"]["name"]) for d in DOCUMENTS}
    [group] = [d["spec"]["leaderWorkerTemplate"] for d in made if d["kind"] == "LeaderWorkerSet"]
    for role in ("leaderTemplate", "workerTemplate"):
        [container] = group[role]["spec"]["containers"]
        assert container["resources"]["limits"].get("nvidia.com/gpu") == (1 if kind == "gpu" else None)


def test_a_folder_that_is_its_own_part_and_a_file_that_is_not_there_are_found_out(tmp_path: Path) -> None:
    (tmp_path / "gpu").mkdir()
    (tmp_path / "kustomization.yaml").write_text("resources: [gone.yaml]\n")
    (tmp_path / "gpu" / "kustomization.yaml").write_text("resources: ['..']\n")
    with pytest.raises(ValueError, match="cycle detected"):
        list(sources(tmp_path / "gpu"))
    with pytest.raises(ValueError, match=r"gone\.yaml is not there"):
        list(sources(tmp_path))


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
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["spec"]["containers"]:
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_services_and_policies_select_pods_that_exist() -> None:
    labels = [pod["metadata"]["labels"] for pod in pods().values()]
    for service in (d for d in DOCUMENTS if d["kind"] == "Service"):
        assert any(service["spec"]["selector"].items() <= found.items() for found in labels)


def test_applying_the_manifests_again_does_not_undo_what_scaling_did() -> None:
    assert "replicas" not in named("LeaderWorkerSet", "demo")["spec"]


def test_scaling_looks_at_the_queue_of_the_model_that_it_scales() -> None:
    spec = named("ScaledObject", "demo")["spec"]
    assert named(spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"])
    model = environment("leader")["HORTATOR_MODEL"]
    assert all(f'{{model="{model}"}}' in trigger["metadata"]["valueLocation"] for trigger in spec["triggers"])
    namespace = KUSTOMIZATION["namespace"]
    assert all(f"//api.{namespace}.svc" in trigger["metadata"]["url"] for trigger in spec["triggers"])
