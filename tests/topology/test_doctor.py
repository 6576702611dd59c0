"""The doctor's judgement: every check, on hosts that are made up."""

import dataclasses
from typing import Any

import pytest

from hortator.topology.doctor import Demand, examine, suggested_environment
from hortator.topology.findings import Finding, Grade
from hortator.topology.probe import HostReport
from tests.topology.reports import gpu, model, nic, rdma, report

HOSTS = tuple(f"10.0.0.{n}" for n in range(1, 6))
ODD = "10.0.0.3"
DEMAND = Demand(gpus=dict.fromkeys(HOSTS, (0, 1)), device="cuda", ports=(29500,), reach=("redis:6379",))


def reports(**changed: Any) -> dict[str, HostReport]:
    """Five hosts; the one in the middle is changed."""
    return {host: report(host, **(changed if host == ODD else {})) for host in HOSTS}


def judged(
    found: dict[str, HostReport],
    *,
    demand: Demand = DEMAND,
    problems: dict[str, str] | None = None,
    skews: dict[str, float] | None = None,
) -> dict[str, Finding]:
    """What is not fine, by check."""
    findings = list(examine(demand, found, problems or {}, skews or {}))
    return {one.check: one for one in findings if one.grade is not Grade.OK}


def test_equal_hosts_are_fit_to_run() -> None:
    assert judged(reports()) == {}


def test_one_host_is_not_counted() -> None:
    alone = {host: one for host, one in reports().items() if host == HOSTS[0]}
    demand = Demand(gpus={HOSTS[0]: (0, 1)}, device="cuda")
    said = {one.check: one.text for one in examine(demand, alone, {}, {})}
    assert said["ssh"] == "the host answers"
    assert [text for text in said.values() if "1 hosts" in text] == []


@pytest.mark.parametrize("check", ["ports", "redis"])
def test_what_was_not_looked_at_is_not_called_good(check: str) -> None:
    unasked = Demand(gpus=DEMAND.gpus, device="cuda")
    asked, not_asked = (
        {one.check: one.text for one in examine(demand, reports(), {}, {})}[check] for demand in (DEMAND, unasked)
    )
    assert asked.startswith(("29500 free", "every leader's host reaches redis:6379"))
    assert not_asked.startswith("not asked: ")


@pytest.mark.parametrize(
    ("changed", "check", "said"),
    [
        ({"python": "3.12.1"}, "python", "3.12 on 10.0.0.3"),
        ({"versions": {"torch": "2.11.0"}}, "torch", "2.13.0 on 4 of 5 hosts, but 2.11.0 on 10.0.0.3"),
        ({"versions": {"hortator": "0.2.0"}}, "hortator", "0.2.0 on 10.0.0.3"),
        ({"versions": {"code": "beef"}}, "code", "beef on 10.0.0.3"),
        ({"versions": {"nccl": "2.20.0"}}, "nccl", "2.20.0 on 10.0.0.3"),
        ({"versions": {"nccl": None}}, "nccl", "not installed on 10.0.0.3"),
        ({"versions": {"transformers": "4.9"}}, "transformers", "4.9 on 10.0.0.3"),
        ({"versions": {"deepspeed": None}}, "deepspeed", "not installed on 10.0.0.3"),
        ({"gpus": (gpu(0),)}, "gpus", "10.0.0.3: 1 of slots=2"),
        ({"gpus": (), "gpu_problem": "nvidia-smi fails: Driver/library mismatch"}, "gpus", "Driver/library mismatch"),
        ({"gpus": (gpu(0), gpu(1, free=79, pids=(4711,)))}, "gpus free", "pid 4711"),
        ({"gpus": (gpu(0), gpu(1, free=12))}, "gpus free", "GPU 1 has 12.0 of 80.0 GiB free"),
        ({"taken_ports": (29500,)}, "ports", "10.0.0.3: 29500 in use"),
        ({"models": (model(weights="0dd"),)}, "model /models/llama", "weights differs"),
        ({"models": (model(problem="it lacks the shard 2"),)}, "model /models/llama", "10.0.0.3: it lacks the shard 2"),
        ({"unreachable": {"redis:6379": "Connection refused"}}, "redis", "redis:6379: Connection refused"),
        ({"own_interface": None}, "network", "no interface there has the address"),
        ({"own_interface": "lo"}, "network", "loopback"),
    ],
)
def test_what_differs_on_one_host_fails_and_names_it(changed: dict[str, Any], check: str, said: str) -> None:
    found = judged(reports(**changed))
    assert list(found) == [check]
    assert found[check].grade is Grade.FAIL
    assert said in found[check].text
    assert found[check].hosts == (ODD,)
    assert found[check].advice


def test_one_machine_under_two_names_is_named_with_both() -> None:
    boots = dict(zip(HOSTS, ("a", "b", "c", "b", "d"), strict=True))
    found = judged({host: report(host, machine=boot) for host, boot in boots.items()})
    assert list(found) == ["machines"]
    assert found["machines"].text == "10.0.0.2, 10.0.0.4 are one machine: its slots are counted twice"
    assert found["machines"].hosts == (HOSTS[1], HOSTS[3])


@pytest.mark.parametrize(
    ("changed", "check"),
    [
        ({"interfaces": (nic(ODD, speed=1000),)}, "network speed"),
        ({"interfaces": (nic(ODD, mtu=9000),)}, "mtu"),
        ({"shm_bytes": 64 << 20}, "shm"),
    ],
)
def test_what_only_slows_a_group_down_is_a_warning(changed: dict[str, Any], check: str) -> None:
    found = judged(reports(**changed))
    assert [(one.check, one.grade, one.hosts) for one in found.values()] == [(check, Grade.WARN, (ODD,))]


def test_a_host_without_its_infiniband_link_is_named() -> None:
    found = {host: report(host, rdma=(rdma(active=host != ODD),)) for host in HOSTS}
    assert judged(found)["rdma"].hosts == (ODD,)


def test_a_clock_that_is_wrong_is_named_with_its_direction() -> None:
    found = judged(reports(), skews={HOSTS[0]: 0.3, ODD: -75.0})
    assert "10.0.0.3 75.0 s behind" in found["clock"].text


def test_hosts_that_do_not_answer_are_grouped_by_why_and_the_others_still_examined() -> None:
    silent = {
        HOSTS[0]: "ssh: connect to host 10.0.0.1 port 22: timed out",
        ODD: "ssh: connect to host 10.0.0.3 port 22: timed out",
    }
    left = {host: one for host, one in reports(taken_ports=(1,)).items() if host not in silent}
    found = judged(left, problems=silent)
    assert found["ssh"].text.startswith("10.0.0.1, 10.0.0.3: ")
    assert found["ssh"].hosts == (HOSTS[0], ODD)
    assert list(found) == ["ssh"]


@pytest.mark.parametrize(
    ("complaint", "advice"),
    [
        ("root@h: Permission denied (publickey).", "ssh-copy-id"),
        ("Host key verification failed.", "accept it once"),
        ("ssh: Could not resolve hostname h: Name or service not known", "hostfile"),
        ("/usr/bin/python3: No module named hortator", "install hortator"),
        ("no answer within 30 s", "ping 10.0.0.1"),
        ("kex_exchange_identification: read: Connection reset", "try it by hand: ssh 10.0.0.1 true"),
        ("ssh: connect to host h port 22: Connection refused", "no sshd listens on that port"),
    ],
)
def test_every_complaint_of_ssh_has_its_own_advice(complaint: str, advice: str) -> None:
    assert advice in judged({}, problems=dict.fromkeys(HOSTS, complaint))["ssh"].advice


def test_a_thousand_differences_are_said_in_one_line() -> None:
    many = {f"h{n}": report(f"h{n}", versions={"torch": "2.13.0" if n < 600 else "2.11.0"}) for n in range(1000)}
    demand = dataclasses.replace(DEMAND, gpus=dict.fromkeys(many, (0, 1)))
    assert judged(many, demand=demand)["torch"].text == (
        "2.13.0 on 600 of 1000 hosts, but 2.11.0 on h600, h601, h602, h603 and 396 more"
    )


def test_no_gpu_anywhere_is_doubted_unless_the_fleet_is_for_cpus() -> None:
    bare = {host: report(host, gpus=()) for host in HOSTS}
    assert judged(bare, demand=dataclasses.replace(DEMAND, device="auto"))["gpus"].grade is Grade.WARN
    assert judged(bare, demand=dataclasses.replace(DEMAND, device="cpu")) == {}
    assert judged(bare)["gpus"].grade is Grade.FAIL


def test_settings_are_suggested_from_the_interfaces_that_were_seen() -> None:
    plain = report("10.0.0.1", interfaces=(nic("10.0.0.1", name="ens5"),), own_interface="ens5")
    fabric = report("10.0.0.2", rdma=(rdma(),))
    dark = report("10.0.0.4", rdma=(rdma(active=False),))
    assert suggested_environment([plain, fabric, dark]) == {
        "10.0.0.1": {"GLOO_SOCKET_IFNAME": "ens5", "NCCL_SOCKET_IFNAME": "=ens5"},
        "10.0.0.2": {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0", "NCCL_IB_HCA": "=mlx5_0:1"},
        "10.0.0.4": {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0", "NCCL_IB_DISABLE": "1"},
    }
