"""Which rank sits where, what it needs, what travels, and what is said when it does not fit."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hortator.topology.errors import BadFleet, BadModel, DoesNotFit
from hortator.topology.fleet import Fleet, parse_fleet
from hortator.topology.hostfile import Host, parse_hostfile
from hortator.topology.hostfilter import HostSlots, filter_hosts
from hortator.topology.modelshape import ModelShape
from hortator.topology.plan import Plan, PlannedGroup, check_hosts, make_plan
from hortator.topology.traffic import PLAN_HEADER_BYTES
from hortator.workers.engine.step import StepPlan
from hortator.workers.lockstep import encode_plan
from tests.topology.test_memory import GIB, llama_8b


def model(name: str, tp: int = 1, pp: int = 1, replicas: int = 1, **more: Any) -> dict[str, Any]:
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "replicas": replicas}
    return {"name": name, "path": f"/models/{name}", **sizes, **more}


def fleet_of(*models: dict[str, Any], **more: Any) -> Fleet:
    return Fleet.model_validate({"models": models, **more})


def planned(hostfile: str, *models: dict[str, Any], shapes: dict[str, ModelShape] | None = None, **more: Any) -> Plan:
    hosts = filter_hosts(parse_hostfile(hostfile.replace(", ", "\n")))
    return make_plan(fleet_of(*models, **more), hosts, shapes or {})


def seats(group: PlannedGroup) -> list[tuple[str, tuple[int, ...]]]:
    return [(seat.host, seat.devices) for seat in group.hosts]


def refusal(*arguments: Any, **more: Any) -> str:
    with pytest.raises(DoesNotFit) as problem:
        planned(*arguments, **more)
    return str(problem.value)


MODELS = st.lists(
    st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=4
).map(lambda sizes: [model(f"m{n}", *size) for n, size in enumerate(sizes)])
HOSTS = st.lists(st.sets(st.integers(0, 7), min_size=1).map(sorted), min_size=1, max_size=6).map(
    lambda hosts: [HostSlots(f"h{n}", tuple(slots)) for n, slots in enumerate(hosts)]
)


@settings(max_examples=60)
@given(models=MODELS, hosts=HOSTS)
def test_every_plan_gives_each_rank_a_slot_of_its_own_and_says_what_is_left(
    models: list[dict[str, Any]], hosts: list[HostSlots]
) -> None:
    fleet = fleet_of(*models)
    try:
        plan = make_plan(fleet, hosts, {})
    except DoesNotFit:
        return
    widest = max(len(host.slots) for host in hosts)
    taken = [(rank.host, rank.slot) for group in plan.groups for rank in group.ranks]
    free = [(host.address, slot) for host in plan.hosts for slot in host.free]
    assert sorted(taken + free) == sorted((host.address, slot) for host in hosts for slot in host.slots)
    assert plan.num_free == len(free)
    for group in plan.groups:
        assert [rank.rank for rank in group.ranks] == list(range(len(group.ranks)))
        by_seat = [(seat.host, device) for seat in group.hosts for device in seat.devices]
        assert by_seat == [(rank.host, rank.slot) for rank in group.ranks]
        assert len({seat.host for seat in group.hosts}) == len(group.hosts)
        for stage in range(group.pipeline_parallel_size):
            on = {rank.host for rank in group.ranks if rank.pp_rank == stage}
            assert len(on) == 1 or group.tensor_parallel_size > widest


@settings(max_examples=60)
@given(models=MODELS, hosts=HOSTS)
def test_what_a_refusal_says_would_fit_does_fit(models: list[dict[str, Any]], hosts: list[HostSlots]) -> None:
    try:
        make_plan(fleet_of(*models), hosts, {})
    except DoesNotFit as problem:
        _, _, offers = str(problem).partition("what fits: ")
        for offer in filter(None, offers.split(", or ")):
            changed = [dict(model) for model in models]
            name = ""
            for part in offer.split(" and "):
                name, _, change = part.rpartition(" with ") if " with " in part else (name, "", part)
                key, _, value = change.partition("=")
                changed[int(name[1:])][key] = int(value)
            make_plan(fleet_of(*changed), hosts, {})


def test_stages_stay_on_a_host_and_pipelines_cross_hosts() -> None:
    plan = planned("a 4, b 4", model("m", tp=4, pp=2))
    (group,) = plan.groups
    assert seats(group) == [("a", (0, 1, 2, 3)), ("b", (0, 1, 2, 3))]
    assert [(rank.pp_rank, rank.tp_rank) for rank in group.ranks] == [(s, t) for s in (0, 1) for t in range(4)]
    crossing = {(link.kind, link.ranks[0]): link.crosses_hosts for link in group.links}
    assert crossing == {
        ("plan", 0): True,
        ("all_reduce", 0): False,
        ("all_reduce", 4): False,
        ("hidden", 0): True,
        ("tokens", 4): True,
    }


def test_models_and_replicas_share_hosts() -> None:
    plan = planned("a 8, b 8", model("small", replicas=3), model("large", tp=4, pp=2), model("mid", tp=4))
    assert {group.name: seats(group) for group in plan.groups} == {
        "small-0": [("b", (0,))],
        "small-1": [("b", (1,))],
        "small-2": [("b", (2,))],
        "large-0": [("a", tuple(range(8)))],
        "mid-0": [("b", (3, 4, 5, 6))],
    }
    assert [(host.address, host.free) for host in plan.hosts] == [("a", ()), ("b", (7,))]


def test_only_the_slots_that_a_filter_left_are_used() -> None:
    hosts = filter_hosts([Host("a", 8), Host("b", 8)], include="b:5,2,7")
    plan = make_plan(fleet_of(model("m", tp=2)), hosts, {})
    assert seats(plan.groups[0]) == [("b", (2, 5))]
    assert plan.hosts[0].free == (7,)


def test_tensor_parallel_crosses_hosts_only_where_none_is_large_enough_and_the_plan_says_so() -> None:
    plan = planned("a 4, b 4", model("m", tp=8))
    assert len(plan.groups[0].hosts) == 2
    assert "tensor parallel ranks talk across hosts in every layer" in plan.notes[1]
    assert "no host has 8 GPUs" in plan.notes[1]


def test_each_rank_has_its_memory_and_each_group_its_room() -> None:
    plan = planned("a 2, b 2", model("m", tp=2, pp=2), shapes={"m": llama_8b()}, gpu_memory_bytes=80 * GIB)
    (group,) = plan.groups
    assert group.kv_tokens is not None
    assert group.max_sequences == group.kv_tokens // 131072
    for rank in group.ranks:
        assert rank.needed_bytes == (rank.weight_bytes or 0) + (rank.workspace_bytes or 0) + (rank.kv_bytes or 0)
        assert rank.available_bytes == int(80 * GIB * 0.9)
        assert rank.needed_bytes <= rank.available_bytes
    assert [(rank.first_layer, rank.last_layer) for rank in group.ranks[::2]] == [(0, 17), (18, 31)]
    assert plan.notes == ()


def test_what_travels_is_counted_for_a_token() -> None:
    plan = planned("a 2, b 2", model("m", tp=2, pp=2), shapes={"m": llama_8b()})
    hidden = 4096 * 2
    sizes = [(link.kind, link.ranks, link.size_bytes, link.per) for link in plan.groups[0].links]
    assert sizes == [
        ("plan", (0, 1, 2, 3), PLAN_HEADER_BYTES, "step"),
        ("all_reduce", (0, 1), 2 * 18 * hidden, "token"),
        ("all_reduce", (2, 3), 2 * 14 * hidden, "token"),
        ("hidden", (0, 1, 2, 3), hidden, "token"),
        ("tokens", (2, 0, 1, 3), 8, "sequence"),
    ]


def test_a_plan_of_a_step_is_as_long_as_the_lockstep_makes_it() -> None:
    assert len(encode_plan(StepPlan(1), epoch=1, digest=0)) == PLAN_HEADER_BYTES


def test_a_group_goes_where_its_gpus_are_large_enough() -> None:
    plan = planned(
        "a 1, b 1",
        model("m"),
        shapes={"m": llama_8b()},
        gpu_memory_bytes="80 GiB",
        hosts={"a": {"gpu_memory_bytes": "16 GiB"}},
    )
    assert seats(plan.groups[0]) == [("b", (0,))]


def test_a_gpu_of_unknown_size_is_trusted_before_one_that_is_too_small() -> None:
    plan = planned("a 1, b 1", model("m"), shapes={"m": llama_8b()}, hosts={"a": {"gpu_memory_bytes": "16 GiB"}})
    assert seats(plan.groups[0]) == [("b", (0,))]
    assert "the GPU memory of 1 of 2 hosts is not known" in plan.notes[0]


def test_a_model_on_cpus_is_not_held_against_the_memory_of_gpus() -> None:
    plan = planned("a 1", model("m", device="cpu"), shapes={"m": llama_8b()}, gpu_memory_bytes="1 GiB")
    assert plan.groups[0].ranks[0].available_bytes is None


def test_what_is_not_known_is_said() -> None:
    plan = planned("a 1, b 1", model("m"), hosts={"a": {"gpu_memory_bytes": GIB}})
    assert plan.notes == (
        "m: its sizes are not known here: memory and traffic were not checked",
        "the GPU memory of 1 of 2 hosts is not known: set gpu_memory_bytes in the fleet file to have it checked",
    )


@pytest.mark.parametrize(
    ("hostfile", "models", "message"),
    [
        (
            "a 8, b 8",
            [model("llama", 4, 2, 3), model("q")],
            "the fleet needs 25 GPUs (llama 3 x tp 4 x pp 2, q 1 x tp 1 x pp 1), but there are 16 (a: 8, b: 8): "
            "what fits: llama with replicas=1, or llama with pipeline_parallel_size=1",
        ),
        (
            "a 3, b 3, c 3",
            [model("llama", 2, 1, 4)],
            "a group of llama needs 2 GPUs on one host, but beside the others 3 are left (a: 1, b: 1, c: 1); "
            "the fleet needs 8 of 9 GPUs (llama 4 x tp 2 x pp 1): "
            "what fits: llama with replicas=3, or llama with tensor_parallel_size=1",
        ),
        (
            "a 1",
            [model("x"), model("y", device="cpu")],
            "the fleet needs 2 GPUs (x 1 x tp 1 x pp 1, y 1 x tp 1 x pp 1), but there are 1 (a: 1): "
            "use more hosts, or fewer models",
        ),
        (
            ", ".join(f"h{n} 8" for n in range(10)),
            [model("m", 8, 2, 9)],
            "the fleet needs 144 GPUs (m 9 x tp 8 x pp 2), but there are 80 (10 hosts with 8): "
            "what fits: m with replicas=5, or m with pipeline_parallel_size=1",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers_and_the_nearest_plan(
    hostfile: str, models: list[dict[str, Any]], message: str
) -> None:
    assert refusal(hostfile, *models) == message


def test_gpus_that_are_too_small_are_refused_with_what_would_fit() -> None:
    message = refusal("a 8", model("m"), shapes={"m": llama_8b()}, gpu_memory_bytes="24 GiB")
    assert message.endswith(": what fits: max_model_len=38160, or tensor_parallel_size=2")


def test_too_few_large_gpus_are_refused_although_there_are_slots() -> None:
    hosts = {"a": {"gpu_memory_bytes": 80 * GIB}}
    message = refusal(
        "a 2, b 8", model("m", replicas=3), shapes={"m": llama_8b()}, gpu_memory_bytes="16 GiB", hosts=hosts
    )
    assert "beside the others 0 with enough memory are left (none on any host)" in message
    assert "what fits: m with replicas=2" in message


def test_a_model_that_cannot_be_cut_is_refused_before_it_is_placed() -> None:
    with pytest.raises(BadModel, match="tensor_parallel_size=3 does not divide"):
        planned("a 8", model("m", tp=3), shapes={"m": llama_8b()})


def test_a_hosts_table_for_no_host_is_a_mistake() -> None:
    fleet = parse_fleet('[hosts.aa]\ngpu_memory_bytes = 1\n[[models]]\nname = "m"\npath = "p"\n')
    check_hosts(fleet, [Host("AA", 1)])
    with pytest.raises(BadFleet, match=r"hosts\.aa: the hostfile has no such host"):
        check_hosts(fleet, [Host("a", 1)])


def test_a_plan_is_read_back_as_it_was_written() -> None:
    plan = planned("a 2, b 2", model("m", tp=2, pp=2), shapes={"m": llama_8b()})
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
