"""What other launchers are given, and what a leader is started with."""

import json
import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from hortator.topology.errors import CannotStart
from hortator.topology.external import KEEPER_PORT, SECRET_FILE, Recipe, joined, object_name, recipes
from hortator.topology.fleet import Fleet, parse_fleet
from hortator.topology.hostfilter import HostSlots
from hortator.topology.orders import hosts_of_ranks, leader_order
from hortator.topology.plan import PlannedGroup, Seats, make_plan
from hortator.topology.road import Road
from hortator.workers.settings import WorkerSettings
from tests.containers.manifests import problems

PYTHON = Path("/opt/hortator/bin/python")
FLEET = """
redis_url = "redis://:sekret@10.0.0.9:6379/0"
environment = { NCCL_DEBUG = "INFO" }
[ssh]
user = "serve"
[[models]]
name = "org/llama"
path = "/models/llama"
tensor_parallel_size = 2
pipeline_parallel_size = 2
replicas = 2
max_num_seqs = 96
"""


@pytest.fixture
def fleet() -> Fleet:
    return parse_fleet(FLEET)


def planned(fleet: Fleet, slots: int = 2) -> PlannedGroup:
    hosts = [HostSlots(f"10.0.0.{n}", tuple(range(slots))) for n in range(1, 5)]
    return make_plan(fleet, hosts, {}).groups[0]


def test_a_leader_is_told_its_group_and_where_its_ranks_are(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    order = leader_order(fleet, planned(fleet), python=PYTHON)
    assert "sekret" not in " ".join(order.argv)
    for name, value in order.environment.items():
        monkeypatch.setenv(name, value)
    settings = WorkerSettings()
    assert (settings.group, settings.queue, settings.max_num_seqs) == ("org.llama-0", "org/llama", 96)
    assert [(node.host, node.devices) for node in settings.hosts] == [("10.0.0.1", (0, 1)), ("10.0.0.2", (0, 1))]
    assert (settings.launcher, settings.ssh_user, settings.remote_python) == ("ssh", "serve", str(PYTHON))
    assert order.environment["NCCL_DEBUG"] == "INFO"
    assert hosts_of_ranks(planned(fleet)) == ("10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.2")


def test_a_leader_uses_the_redis_of_its_fleet_whatever_its_host_names(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = parse_fleet('[[models]]\nname = "m"\npath = "/m"\n')
    monkeypatch.setenv("HORTATOR_REDIS_URL", "redis://elsewhere:1/0")
    monkeypatch.setenv("HORTATOR_NAMESPACE", "elsewhere:")
    for name, value in leader_order(fleet, planned(fleet), python=PYTHON).environment.items():
        monkeypatch.setenv(name, value)
    settings = WorkerSettings()
    assert (settings.redis_url, settings.namespace) == (fleet.redis_url, "")


def test_what_the_file_does_not_say_of_ssh_is_left_to_sshs_own_configuration(fleet: Fleet) -> None:
    order = leader_order(fleet, planned(fleet), python=PYTHON)
    assert "HORTATOR_SSH_PORT" not in order.environment
    assert "-p" not in Road(fleet.ssh).argv("a", ["true"])


def test_the_time_to_connect_is_the_same_for_us_and_for_the_leaders_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = parse_fleet(FLEET.replace("[ssh]", "[ssh]\nconnect_timeout_s = 45"))
    for name, value in leader_order(slow, planned(slow), python=PYTHON).environment.items():
        monkeypatch.setenv(name, value)
    assert WorkerSettings().ssh_connect_timeout_s == 45
    assert "ConnectTimeout=45" in Road(slow.ssh).argv("a", ["true"])


def test_deepspeed_is_refused_before_anything_starts_where_a_host_has_an_ipv6_address(fleet: Fleet) -> None:
    hosts = [HostSlots(f"fd00::{n}", (0, 1)) for n in range(1, 5)]
    group = make_plan(fleet, hosts, {}).groups[0]
    assert leader_order(fleet, group, python=PYTHON).environment["HORTATOR_LAUNCHER"] == "ssh"
    with pytest.raises(CannotStart, match="launcher=deepspeed cannot reach fd00::1"):
        leader_order(fleet, group, python=PYTHON, launcher="deepspeed")


def test_every_variable_of_the_fleets_environment_is_one_that_all_ranks_get(monkeypatch: pytest.MonkeyPatch) -> None:
    said = 'environment = { FOO_MARK = "1", NCCL_SOCKET_IFNAME = "eth9", HORTATOR_MAX_ATTEMPTS = "3" }'
    fleet = parse_fleet(FLEET.replace('environment = { NCCL_DEBUG = "INFO" }', said))
    for name, value in leader_order(fleet, planned(fleet), python=PYTHON).environment.items():
        monkeypatch.setenv(name, value)
    settings = WorkerSettings()
    assert (settings.rank_variables, settings.max_attempts) == (("FOO_MARK", "NCCL_SOCKET_IFNAME"), 3)


def test_what_decides_which_code_runs_is_passed_on_over_ssh_alone(fleet: Fleet) -> None:
    fleet = parse_fleet(FLEET.replace("NCCL_DEBUG =", "PYTHONPATH ="))
    group = planned(fleet)
    assert leader_order(fleet, group, python=PYTHON).environment["HORTATOR_RANK_VARIABLES"] == "PYTHONPATH"
    said = "cannot pass it on to other hosts: PYTHONPATH decides which code a rank runs: set it on the hosts"
    with pytest.raises(CannotStart, match=f"launcher=deepspeed {said}"):
        leader_order(fleet, group, python=PYTHON, launcher="deepspeed")
    with pytest.raises(CannotStart, match=f"launcher=external {said}"):
        made("torchrun", fleet)


def test_deepspeeds_keepers_need_a_secret_before_anything_starts(fleet: Fleet) -> None:
    with pytest.raises(
        CannotStart, match=r"environment.HORTATOR_SECRET_FILE is missing in the fleet file: make a file"
    ):
        leader_order(fleet, planned(fleet), python=PYTHON, launcher="deepspeed")
    named = parse_fleet(FLEET.replace('NCCL_DEBUG = "INFO"', 'HORTATOR_SECRET_FILE = "/s"'))
    told = leader_order(named, planned(named), python=PYTHON, launcher="deepspeed").environment
    assert (told["HORTATOR_LAUNCHER"], told["HORTATOR_SECRET_FILE"]) == ("deepspeed", "/s")
    leader_order(fleet, planned(fleet, slots=4), python=PYTHON, launcher="deepspeed")


def test_a_group_on_one_host_needs_no_launcher(fleet: Fleet) -> None:
    assert leader_order(fleet, planned(fleet, slots=4), python=PYTHON).environment["HORTATOR_LAUNCHER"] == "local"


# --- recipes


def made(style: str, fleet: Fleet, *, slots: int = 2, groups: slice = slice(None)) -> tuple[Recipe, ...]:
    plan = make_plan(fleet, [HostSlots(f"10.0.0.{n}", tuple(range(slots))) for n in range(1, 5)], {})
    return recipes(style, fleet, plan.groups, plan.groups[groups], python=PYTHON)


def exports(text: str) -> dict[str, str]:
    return dict(shlex.split(line)[1].split("=", 1) for line in text.splitlines() if line.startswith("export"))


def commands(text: str) -> list[dict[str, str]]:
    """Of each command its assignments and its options with values."""
    found = []
    for command in text.replace("\\\n", " ").splitlines():
        if command and not command.startswith("#"):
            words = shlex.split(command)
            given = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("-"))
            found.append(given | {a: b for a, b in pairwise(words) if a.startswith("--")})
    return found


def test_torchrun_starts_a_keeper_for_every_rank(fleet: Fleet) -> None:
    text = made("torchrun", fleet)[0].text
    leader, *keepers = commands(text)
    assert ": 2 hosts of 2 ranks." in text
    assert leader["HORTATOR_CONTROL_HOST"] == "10.0.0.1"
    assert [(k["--nnodes"], k["--nproc-per-node"], k["--node-rank"]) for k in keepers] == [
        ("2", "2", "0"),
        ("2", "2", "1"),
    ]
    assert {keeper["--join"] for keeper in keepers} == {f"10.0.0.1:{KEEPER_PORT}"}
    assert "sekret" not in text


def test_torchrun_uses_the_planned_gpus_and_groups_of_one_host_have_ports_of_their_own(fleet: Fleet) -> None:
    """Four groups' worth of slots on each host: both groups lie on the first two hosts."""
    plan = make_plan(fleet, [HostSlots("a", (0, 1, 2, 3)), HostSlots("b", (0, 1, 2, 3))], {})
    spread = (
        plan.groups[0].model_copy(update={"hosts": tuple(Seats(host=host, devices=(0, 1)) for host in "ab")}),
        plan.groups[1].model_copy(update={"hosts": tuple(Seats(host=host, devices=(2, 3)) for host in "ab")}),
    )
    plan = plan.model_copy(update={"groups": spread})
    first, second = (commands(one.text) for one in recipes("torchrun", fleet, plan.groups, plan.groups, python=PYTHON))
    assert [command["CUDA_VISIBLE_DEVICES"] for command in first] == ["0,1"] * 3
    assert [command["CUDA_VISIBLE_DEVICES"] for command in second] == ["2,3"] * 3
    assert first[0]["HORTATOR_KEEPER_PORT"] != second[0]["HORTATOR_KEEPER_PORT"]
    assert second[1]["--join"] == f"a:{second[0]['HORTATOR_KEEPER_PORT']}"
    assert first[1]["--master-port"] != second[1]["--master-port"]


def test_groups_whose_leaders_are_on_different_hosts_may_have_the_same_ports(fleet: Fleet) -> None:
    one, other = (commands(recipe.text)[0] for recipe in made("torchrun", fleet))
    assert one["HORTATOR_KEEPER_PORT"] == other["HORTATOR_KEEPER_PORT"] == str(KEEPER_PORT)


def test_on_cpus_and_on_one_host_nothing_is_said_of_gpus_and_keepers(fleet: Fleet) -> None:
    on_cpus = parse_fleet(FLEET + 'device = "cpu"\n')
    assert "CUDA" not in made("torchrun", on_cpus)[0].text + made("slurm", on_cpus)[0].text
    for style in ("torchrun", "slurm"):
        assert "hortator.topology.keeper" not in made(style, fleet, slots=4)[0].text


def test_an_sbatch_file_is_a_shell_script_with_the_numbers_of_the_group(fleet: Fleet) -> None:
    text = made("slurm", fleet)[0].text
    asked = {line for line in text.splitlines() if line.startswith("#SBATCH")}
    assert asked >= {
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks=4",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --gpus-per-node=2",
    }
    told = exports(text)
    assert told["HORTATOR_LAUNCHER"] == "external"
    assert told["HORTATOR_FRONT_RANKS"] == "2"
    assert told["HORTATOR_MODEL"] == "org/llama"
    assert "sekret" not in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_several_groups_are_an_sbatch_file_each_with_ports_of_their_own_and_never_one_text(fleet: Fleet) -> None:
    found = made("slurm", fleet)
    assert [recipe.file for recipe in found] == ["org.llama-0.sbatch", "org.llama-1.sbatch"]
    assert len({exports(recipe.text)["HORTATOR_KEEPER_PORT"] for recipe in found}) == 2
    for recipe in found:
        assert f':{exports(recipe.text)["HORTATOR_KEEPER_PORT"]}"' in recipe.text
    with pytest.raises(CannotStart, match="starts one group, but these are 2: give --out DIR"):
        joined(found)
    assert joined(found[1:]) == found[1].text


def test_a_manifest_is_a_leader_worker_set_of_the_groups_size(fleet: Fleet) -> None:
    [recipe] = made("kubernetes", fleet)
    manifest = yaml.safe_load(recipe.text)
    assert recipe.file == "org-llama.yaml"
    assert (manifest["metadata"]["name"], manifest["spec"]["replicas"]) == ("org-llama", 2)
    template = manifest["spec"]["leaderWorkerTemplate"]
    assert template["size"] == 2
    [leader] = template["leaderTemplate"]["spec"]["containers"]
    [peer] = template["workerTemplate"]["spec"]["containers"]
    told = {one["name"]: one.get("value", one.get("valueFrom")) for one in leader["env"]}
    assert told["HORTATOR_TENSOR_PARALLEL_SIZE"] == "2"
    assert told["HORTATOR_REDIS_URL"] == {"secretKeyRef": {"name": "hortator-redis", "key": "url"}}
    assert peer["args"][-1] == "--ranks-per-node=2"
    assert leader["resources"] == peer["resources"] == {"limits": {"nvidia.com/gpu": 2}}
    assert "sekret" not in json.dumps(manifest)


def test_manifests_are_one_for_each_model_and_have_the_fields_of_their_kind(fleet: Fleet) -> None:
    more = parse_fleet(FLEET + '[[models]]\nname = "q.small"\npath = "/models/q"\ndevice = "cpu"\nreplicas = 3\n')
    plan = make_plan(more, [HostSlots(f"h{n}", (0, 1, 2, 3)) for n in range(4)], {})
    text = joined(recipes("kubernetes", more, plan.groups, plan.groups, python=PYTHON))
    documents = list(yaml.safe_load_all(text))
    assert [problem for document in documents for problem in problems(document)] == []
    assert [(d["metadata"]["name"], d["spec"]["replicas"]) for d in documents] == [("org-llama", 2), ("q-small", 3)]
    [one] = recipes("kubernetes", more, plan.groups, plan.groups[:1], python=PYTHON)
    assert yaml.safe_load(one.text)["spec"]["replicas"] == 1


@pytest.mark.parametrize(
    ("names", "words"),
    [(["a.b", "a-B"], "'a.b' and 'a-B' are both called a-b on Kubernetes"), (["x" * 41], "is too long for Kubernetes")],
)
def test_models_that_kubernetes_would_confuse_or_refuse_are_named(names: list[str], words: str) -> None:
    fleet = parse_fleet(
        'redis_url = "redis://r/0"\n' + "".join(f'[[models]]\nname = "{name}"\npath = "/m"\n' for name in names)
    )
    with pytest.raises(CannotStart, match=words):
        made("kubernetes", fleet)
    assert object_name("7b") == "m-7b"


def test_pods_are_what_those_of_the_shipped_manifest_are(fleet: Fleet) -> None:
    """Above all: the secret is root's with mode 0440, so only a pod with that group that is not root can read it."""
    shipped = yaml.safe_load((Path(__file__).parents[2] / "compose/kubernetes/base/group.yaml").read_text())
    ours = yaml.safe_load(made("kubernetes", fleet)[0].text)
    for role in ("leaderTemplate", "workerTemplate"):
        pods = [one["spec"]["leaderWorkerTemplate"][role] for one in (ours, shipped)]
        mine, theirs = pods
        for field in ("securityContext", "automountServiceAccountToken", "volumes", "terminationGracePeriodSeconds"):
            assert mine["spec"][field] == theirs["spec"][field], field
        [own], [other] = (pod["spec"]["containers"] for pod in pods)
        for field in ("image", "securityContext", "volumeMounts", "readinessProbe", "ports"):
            assert own.get(field) == other.get(field), field
        assert mine["metadata"]["labels"].keys() == theirs["metadata"]["labels"].keys()
        assert ours["spec"]["startupPolicy"] == shipped["spec"]["startupPolicy"]


def test_uneven_hosts_and_unknown_launchers_are_refused_with_what_to_do(fleet: Fleet) -> None:
    plan = make_plan(fleet, [HostSlots("a", (0, 1)), HostSlots("b", (0, 1)), HostSlots("c", (0, 1, 2, 3))], {})
    group = plan.groups[0]
    first, second = Seats(host="a", devices=(0, 1)), Seats(host="b", devices=(0,))
    uneven = group.model_copy(update={"hosts": (first, second)})
    for style in ("torchrun", "slurm", "kubernetes"):
        with pytest.raises(CannotStart, match="as many on each"):
            recipes(style, fleet, plan.groups, [uneven], python=PYTHON)
    with pytest.raises(CannotStart, match="torchrun, slurm, kubernetes"):
        recipes("mesos", fleet, plan.groups, plan.groups, python=PYTHON)


ROOT = Path(__file__).parents[2]
WRITTEN = re.compile(
    r"HORTATOR_KEEPER_PORT[=:, {}a-z]*\"?(?P<port>[0-9]+)"
    r"|--join[= ][$(){}\"A-Za-z_.-]+:(?P<join>[0-9]+)"
    r"|containerPort: (?P<container>[0-9]+)"
    r"|HORTATOR_SECRET_FILE[=:, {}a-z]*(?P<secret>/[\w/]+)"
    r"|--secret-file[= ](?P<file>/[\w/]+)"
    r"|keeper ports from (?P<first>[0-9]+)|The secret is `(?P<path>/[\w/]+)`"
)


@pytest.mark.parametrize(
    "page", ["docs/08-many-nodes.md", "docs/09-launching.md", "compose/kubernetes/base/group.yaml"]
)
def test_ports_and_the_secrets_place_are_everywhere_the_ones_that_recipes_print(page: str) -> None:
    found = [match.groupdict() for match in WRITTEN.finditer((ROOT / page).read_text())]
    values = {value for one in found for value in one.values() if value}
    assert values == {str(KEEPER_PORT), SECRET_FILE}


def test_the_secret_is_made_in_a_directory_that_is_made_too(fleet: Fleet) -> None:
    for style in ("torchrun", "slurm"):
        text = made(style, fleet)[0].text
        assert f"mkdir -p {Path(SECRET_FILE).parent} && (umask 077; openssl rand -hex 32 > {SECRET_FILE})" in text
        assert f"--secret-file {SECRET_FILE}" in text
