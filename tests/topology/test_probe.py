"""What a probe says of this host, and of machines that are played by files."""

import json
import os
import socket
import stat
from pathlib import Path

import pytest
from pydantic import ValidationError

from hortator.topology.gpus import parse_gpus, read_gpus
from hortator.topology.network import read_rdma
from hortator.topology.probe import Address, HostReport, ProbeRequest, probe
from tests.topology.reports import report


def sums(path: Path) -> dict[str, str]:
    """Stands in for the engine's checksum."""
    return {"files": ",".join(sorted(file.name for file in path.iterdir()))}


def look(**asked: object) -> HostReport:
    return probe(ProbeRequest.model_validate({"address": "127.0.0.1"} | asked), checksum=sums)


def test_a_probe_describes_this_host() -> None:
    found = look()
    assert found.versions["torch"]
    assert found.versions["hortator"]
    assert found.own_interface == "lo"
    assert found.machine
    assert found.machine == look(address="localhost").machine
    assert HostReport.model_validate_json(found.model_dump_json()) == found


def test_a_port_is_taken_while_somebody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert look(ports=[port]).taken_ports == (port,)
    assert look(ports=[port]).taken_ports == ()


def test_a_server_that_cannot_be_reached_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert look(reach=[Address(host="127.0.0.1", port=port)]).unreachable == {}
    assert "refused" in look(reach=[Address(host="127.0.0.1", port=port)]).unreachable[f"127.0.0.1:{port}"]


def test_a_model_directory_is_summed_up_or_its_problem_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    there, missing = look(models=[tmp_path, tmp_path / "not"]).models
    assert there.checksums == {"files": "config.json"}
    assert missing.problem == f"there is no directory {tmp_path / 'not'}"


def test_nvidia_smi_is_read_with_the_processes_on_each_gpu() -> None:
    gpus = "0, GPU-aa, NVIDIA H100 80GB HBM3, 81559, 81000\n1, GPU-bb, NVIDIA H100 80GB HBM3, 81559, 12\n"
    first, second = parse_gpus(gpus, "GPU-bb, 4711\nGPU-bb, 12\n")
    assert (first.pids, second.pids) == ((), (12, 4711))
    assert second.free_bytes == 12 << 20
    with pytest.raises(ValueError, match="columns"):
        parse_gpus("No devices were found", "")


@pytest.mark.parametrize(
    ("says", "exits"), [("Failed to initialize NVML: Driver/library version mismatch", 18), ("x", 0)]
)
def test_an_nvidia_smi_that_fails_is_a_problem_and_not_an_empty_host(
    says: str, exits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\necho '{says}'\nexit {exits}\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    gpus, problem = read_gpus()
    assert gpus == ()
    assert problem
    assert "nvidia-smi" in problem


def test_rdma_ports_are_read_as_the_kernel_lists_them(tmp_path: Path) -> None:
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (tmp_path / "mlx5_0" / "device" / "net" / "ib0").mkdir(parents=True)
    for name, text in {"state": "4: ACTIVE\n", "rate": "400 Gb/sec (4X NDR)\n", "link_layer": "InfiniBand\n"}.items():
        (port / name).write_text(text)
    [found] = read_rdma(tmp_path)
    assert (found.device, found.active, found.netdev, found.rate) == ("mlx5_0", True, "ib0", "400 Gb/sec (4X NDR)")
    assert read_rdma(tmp_path / "none") == ()


@pytest.mark.parametrize("name", ["eth0\x1b[2J", "eth0;reboot", "$(id)", ""])
def test_a_report_with_an_interface_that_no_shell_should_see_is_no_report(name: str) -> None:
    text = report("a").model_dump_json().replace('"name":"eth0"', f'"name":{json.dumps(name)}')
    with pytest.raises(ValidationError, match="name"):
        HostReport.model_validate_json(text)


@pytest.mark.parametrize("clock", ["NaN", "Infinity"])
def test_a_clock_that_is_no_time_is_no_report(clock: str) -> None:
    with pytest.raises(ValidationError, match="clock_s"):
        HostReport.model_validate_json(report("a").model_dump_json().replace('"clock_s":0.0', f'"clock_s":{clock}'))
