"""The ways in which the ranks of one group come to be on several machines (DeepSpeed's: test_operate.py)."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hortator.producer import Job, Sampling
from tests.together.fleet import REPOSITORY, Worker, wait_for
from tests.together.nodes.cluster import Cluster
from tests.together.nodes.faults import FAULTS, downs, readies, suffer, wait_ready
from tests.together.nodes.machines import Machine

KEEPER_PORT = 4700
DEMO: dict[str, Any] = {
    "engine": "paged",
    "model": "demo",
    "model_path": REPOSITORY / "demo" / "model",
    "max_model_len": 512,
}
ANSWERS = {"12+30=": "42", "count(3,12)=": "3 4 5 6 7 8 9 10 11 12"}


def answers(cluster: Cluster, prompts: list[str]) -> list[str]:
    jobs = [Job(model="demo", prompt=prompt, sampling=Sampling(max_tokens=60)) for prompt in prompts]
    ids = [handle.id for handle in cluster.client.enqueue_many(jobs)]
    done = cluster.finished(ids)
    return [status.result.text if status.result else str(status.failure) for status in map(done.get, ids) if status]


def test_two_stages_of_two_ranks_on_four_machines_answer_right(tmp_path: Path) -> None:
    with Cluster(tmp_path, ["nodeA", "nodeB", "nodeC", "nodeD"]) as four:
        worker = four.worker(tensor_parallel_size=2, pipeline_parallel_size=2, **DEMO)
        wait_ready(worker)
        assert [len(four.machines[name].ranks()) for name in four.names] == [1, 1, 1, 1]
        assert answers(four, list(ANSWERS)) == list(ANSWERS.values())


def test_a_machine_that_cannot_be_reached_is_named_within_ten_seconds(empty_pair: Cluster) -> None:
    empty_pair.machines["nodeB"].link_down()
    worker = empty_pair.worker(restart_backoff_s=30.0)
    wait_for("rank 0", empty_pair.ranks, 30.0)
    wait_for("the group to go down", lambda: downs(worker), 10.0)
    assert downs(worker)[0][1].startswith("ssh to nodeB (rank 1) ended: ssh: connect to host nodeb port 22: ")
    assert empty_pair.living() == []


@contextmanager
def started(machine: Machine, *argv: str) -> Iterator["subprocess.Popen[bytes]"]:
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = machine.popen(
        *argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def torchrun(secret: Path, node_rank: int) -> tuple[str, ...]:
    return (
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node_rank)),
        *("--nproc-per-node", "1", "--master-addr", "nodeA", "--master-port", "4711"),
        *("-m", "hortator.topology.keeper", "--join", f"nodeA:{KEEPER_PORT}", "--secret-file", str(secret)),
    )


def test_a_group_that_torchrun_starts_joins_and_joins_again_after_a_fault(empty_pair: Cluster) -> None:
    secret = empty_pair.directory / "secret"
    one, two = (empty_pair.machines[name] for name in empty_pair.names)
    with started(one, *torchrun(secret, 0)), started(two, *torchrun(secret, 1)):
        worker = external(empty_pair, collective_timeout_s=2.0)
        wait_ready(worker)
        time.sleep(4.0)  # longer than a collective may take
        assert (downs(worker), readies(worker)) == ([], [1])
        suffer(empty_pair, worker, FAULTS["rank killed"], "nodeB", lasting=True)
        prompt = "who started you?"
        (job_id,) = empty_pair.enqueue([prompt], max_tokens=len(prompt))
        result = empty_pair.finished([job_id])[job_id].result
        assert result is not None
        assert result.text == prompt


def external(cluster: Cluster, **settings: Any) -> Worker:
    return cluster.worker(
        launcher="external",
        hosts="",
        control_host="nodeA",
        keeper_port=KEEPER_PORT,
        secret_file=cluster.directory / "secret",
        **settings,
    )
