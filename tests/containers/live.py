"""The compose project for real: `make test-containers`.

Containers are built, brought up, spoken to from outside, killed and cut off, and taken down again.  It takes a few
minutes, and Docker, so `make test` leaves it out (its name does not begin with test_).
"""

import json
import time
import uuid
from collections.abc import Iterator

import celery
import pytest

from tests.containers.base_image import base_images
from tests.containers.daemon import Daemon
from tests.containers.load import MODEL, Load, Outcome, questions
from tests.containers.stack import Stack

pytestmark = pytest.mark.timeout(2400)  # the first test waits for the images

BEFORE_FAULT_S, AFTER_FAULT_S = 2.0, 2.0
JOBS_END_S = 240.0  # jobs of a killed group run one after the other until they are cleared
MAX_PRODUCT_BYTES = 8 * 2**20
MAX_API_BYTES = 400 * 2**20


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as running:
        yield running


@pytest.fixture(scope="module")
def built(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    project = f"hortator-test-{uuid.uuid4().hex[:6]}"
    with Stack(daemon, tmp_path_factory.mktemp("stack"), project=project, images=base_images(daemon)) as stack:
        stack.build()
        yield stack


@pytest.fixture(scope="module")
def up(built: Stack) -> Stack:
    began = time.monotonic()
    built.up()
    print(f"\nup, and the group ready, in {time.monotonic() - began:.1f} s")
    return built


@pytest.fixture
def stack(up: Stack) -> Stack:
    """One group, ready."""
    up.wait_for_groups(1)
    return up


def load_of(stack: Stack) -> Load:
    return Load(str(stack.http.base_url))


def all_right(load: Load, what: str) -> Outcome:
    """Every job ended, with the right answer."""
    outcome = load.outcome(timeout_s=JOBS_END_S)
    print(
        f"\n{what}: {outcome.num_jobs} jobs, {outcome.num_second_attempts} of them more than once,"
        f" {outcome.num_refusals} submits repeated"
    )
    assert outcome.wrong == []
    assert outcome.num_jobs >= 5
    return outcome


# --- the images


def test_the_api_image_has_no_torch_and_is_small(built: Stack) -> None:
    image = built.images["HORTATOR_API_IMAGE"]
    size = int(built.daemon.docker("image", "inspect", "--format", "{{.Size}}", image))
    assert size < MAX_API_BYTES
    said = built.daemon.docker("run", "--rm", "--entrypoint", "python", image, "-c", "import torch", check=False)
    assert "No module named 'torch'" in said


def test_a_new_version_of_the_product_is_a_small_layer(built: Stack) -> None:
    for image in built.images.values():
        lines = built.daemon.docker("history", "--human=false", "--no-trunc", "--format", "{{json .}}", image)
        layers = [json.loads(line) for line in lines.splitlines()]
        commands = [layer["CreatedBy"] for layer in layers]
        packages = next(i for i, command in enumerate(commands) if int(layers[i]["Size"]) > MAX_PRODUCT_BYTES)
        assert any("/dist/*.whl" in command for command in commands[:packages]), "the product is below its packages"
        assert sum(int(layer["Size"]) for layer in layers[:packages]) < MAX_PRODUCT_BYTES


@pytest.mark.parametrize("service", ["api", "leader", "peer"])
def test_no_container_of_ours_runs_as_root(stack: Stack, service: str) -> None:
    assert stack.inside(service, "id", "-u").strip() == "10001"


# --- the line


def test_questions_from_outside_are_answered_right(stack: Stack) -> None:
    with load_of(stack) as load:
        time.sleep(BEFORE_FAULT_S)
    assert all_right(load, "no fault").num_second_attempts == 0


def test_a_plain_celery_client_outside_is_answered(stack: Stack) -> None:
    url = f"redis://127.0.0.1:{stack.redis_port}/0"
    app = celery.Celery(broker=url, backend=url)
    question = next(question for question in questions() if "prompt" in question)
    kwargs = {name: question[name] for name in ("prompt", "model", "sampling")}
    result = app.send_task("llm.generate", kwargs=kwargs, queue=MODEL).get(timeout=30)
    assert result["text"] == question["answer"]
    app.close()


def test_the_group_spans_two_containers(stack: Stack) -> None:
    assert "hortator.workers.rank" in processes(stack, "leader")
    assert "hortator.workers.rank" in processes(stack, "peer")
    assert "[rank 1]" in stack.compose("logs", "--no-color", "leader")


def test_docker_says_that_all_is_healthy(stack: Stack) -> None:
    until = time.monotonic() + 40
    while (found := {name: health(stack, name) for name in ("redis", "api", "leader")}) and time.monotonic() < until:
        if set(found.values()) == {"healthy"}:
            return
        time.sleep(1)
    raise AssertionError(f"{found}")


def test_an_operator_sees_queue_and_group_from_the_api_container(stack: Stack) -> None:
    said = stack.inside("api", "hortator", "status")
    assert f"{stack.project}" in said
    assert "ready" in said
    assert stack.inside("api", "hortator", "enqueue", "12+30=", "--model", MODEL, "--wait").strip() == "42"


# --- the faults


def test_a_killed_peer_costs_no_job(stack: Stack) -> None:
    before = stack.epochs()
    with load_of(stack) as load:
        time.sleep(BEFORE_FAULT_S)
        stack.crash("peer")
        time.sleep(AFTER_FAULT_S)
    all_right(load, "peer killed")
    stack.wait_for_groups(1)
    assert all(epoch > before[group] for group, epoch in stack.epochs().items())


def test_a_killed_leader_costs_no_job(stack: Stack) -> None:
    with load_of(stack) as load:
        time.sleep(BEFORE_FAULT_S)
        stack.crash("leader")
        time.sleep(AFTER_FAULT_S)
    all_right(load, "leader killed")


def test_a_killed_redis_costs_no_job_and_no_container(stack: Stack) -> None:
    before = {service: started(stack, service) for service in ("api", "leader", "peer")}
    redis = stack.container("redis")
    with load_of(stack) as load:
        time.sleep(BEFORE_FAULT_S)
        stack.daemon.docker("kill", redis)
        time.sleep(1.0)
        stack.daemon.docker("start", redis)
        time.sleep(AFTER_FAULT_S)
    assert all_right(load, "redis killed").num_refusals > 0
    assert {service: started(stack, service) for service in before} == before


@pytest.mark.parametrize(("service", "seconds"), [("peer", 2.0), ("peer", 10.0), ("leader", 10.0)])
def test_a_container_that_is_off_the_network_for_a_while_costs_no_job(
    stack: Stack, service: str, seconds: float
) -> None:
    with load_of(stack) as load:
        time.sleep(BEFORE_FAULT_S)
        stack.cut(service, seconds)
        time.sleep(AFTER_FAULT_S)
    all_right(load, f"{service} off the network for {seconds:g} s")


def test_a_second_group_comes_by_scaling_and_takes_over(stack: Stack) -> None:
    stack.up(groups=2)
    assert len(stack.epochs()) == 2
    with load_of(stack) as load:
        time.sleep(BEFORE_FAULT_S)
        stack.crash("leader", number=2)
        time.sleep(AFTER_FAULT_S)
    all_right(load, "one leader of two killed")
    stack.wait_for_groups(2)
    stack.up(groups=1)


def test_a_stopped_leader_hands_its_jobs_back(stack: Stack) -> None:
    with load_of(stack) as load:
        time.sleep(BEFORE_FAULT_S)
        stack.compose("restart", "leader")
        time.sleep(AFTER_FAULT_S)
    all_right(load, "leader restarted")


def test_stopping_all_lets_jobs_finish_and_hands_the_rest_back(stack: Stack) -> None:
    with load_of(stack) as load:
        time.sleep(BEFORE_FAULT_S)
    stack.compose("stop")
    said = stack.compose("logs", "--no-color", "--tail=20", "leader")
    assert "Warm shutdown" in said
    assert "is down" not in said, "the peer has to outlive the leader"
    stack.up()
    assert all_right(load, "all stopped and started").num_second_attempts == 0


def test_taking_it_down_leaves_nothing(stack: Stack) -> None:
    stack.compose("down", "--volumes", "--remove-orphans")
    label = f"label=com.docker.compose.project={stack.project}"
    for kind in ("container", "volume", "network"):
        every = ["--all"] if kind == "container" else []
        assert stack.daemon.docker(kind, "ls", *every, "--quiet", "--filter", label) == ""


# --- what Docker says


def processes(stack: Stack, service: str) -> str:
    return stack.daemon.docker("top", stack.container(service), "-eo", "pid,args")


def health(stack: Stack, service: str) -> str:
    return stack.daemon.docker("inspect", "--format", "{{.State.Health.Status}}", stack.container(service)).strip()


def started(stack: Stack, service: str) -> str:
    return stack.daemon.docker("inspect", "--format", "{{.State.StartedAt}}", stack.container(service)).strip()
