"""Filters over the hostfile, with DeepSpeed's as the oracle."""

import pytest
from deepspeed.launcher.runner import apply_num_nodes_and_gpus, parse_inclusion_exclusion
from hypothesis import given, settings
from hypothesis import strategies as st

from hortator.topology.errors import BadHostfile
from hortator.topology.hostfile import Host
from hortator.topology.hostfilter import HostSlots, filter_hosts

HOSTS = (Host("w0", 4), Host("w1", 2), Host("10.0.0.3", 8))
SLOTS = st.lists(st.integers(0, 8), min_size=1, max_size=4).map(lambda slots: ":" + ",".join(map(str, slots)))
PART = st.builds(lambda name, slots: name + slots, st.sampled_from(["w0", "w1", "10.0.0.3", "w9"]), st.just("") | SLOTS)
FILTER = st.lists(PART, min_size=1, max_size=4).map("@".join)


def we_keep(**filters: object) -> dict[str, list[int]] | None:
    try:
        kept = filter_hosts(HOSTS, **filters)  # type: ignore[arg-type]
    except BadHostfile:
        return None
    return {host.address: list(host.slots) for host in kept}


def deepspeed_keeps(include: str, exclude: str) -> dict[str, list[int]] | None:
    try:
        return dict(parse_inclusion_exclusion({host.address: host.slots for host in HOSTS}, include, exclude)) or None
    except ValueError:
        return None


def names_twice(text: str) -> bool:
    """A host whole and again: DeepSpeed takes the slots only, we ask."""
    names = [part.split(":")[0] for part in text.split("@")]
    whole = {part for part in text.split("@") if ":" not in part}
    return any(names.count(name) > 1 for name in whole)


@settings(max_examples=100)
@given(text=FILTER, leave_out=st.booleans())
def test_filters_keep_what_deepspeed_keeps(text: str, leave_out: bool) -> None:
    include, exclude = ("", text) if leave_out else (text, "")
    ours = we_keep(include=include, exclude=exclude)
    if names_twice(text):
        assert ours is None
    else:
        assert ours == deepspeed_keeps(include, exclude)


@settings(max_examples=100)
@given(num_nodes=st.none() | st.integers(1, 3), num_gpus=st.none() | st.integers(1, 2))
def test_counts_keep_what_deepspeed_keeps(num_nodes: int | None, num_gpus: int | None) -> None:
    active = {host.address: list(range(host.slots)) for host in HOSTS}
    theirs = apply_num_nodes_and_gpus(active, num_nodes or -1, num_gpus or -1)
    assert we_keep(num_nodes=num_nodes, num_gpus=num_gpus) == dict(theirs)


def test_the_order_is_the_hostfiles_not_the_filters() -> None:
    assert [host.address for host in filter_hosts(HOSTS, include="w1@w0:3,1")] == ["w0", "w1"]


def test_an_ipv6_host_with_slots_is_named_in_brackets_and_in_any_spelling() -> None:
    hosts = [Host("2001:db8::1", 4), Host("2001:db8::2", 4)]
    assert filter_hosts(hosts, include="[2001:DB8:0::1]:0,2") == (HostSlots("2001:db8::1", (0, 2)),)
    assert filter_hosts(hosts, exclude="2001:db8::1") == (HostSlots("2001:db8::2", (0, 1, 2, 3)),)


@pytest.mark.parametrize(
    ("filters", "problem"),
    [
        ({"include": "w0", "exclude": "w1"}, "--include and --exclude cannot be given together"),
        ({"include": "w0", "num_nodes": 1}, "cannot be given with --include"),
        ({"exclude": "w0", "num_gpus": 1}, "cannot be given with --include or --exclude"),
        ({"include": "w7"}, "host 'w7' of 'w7' is not in the hostfile"),
        ({"include": "w1:2"}, "host w1 has no slot 2: it has 0 to 1"),
        ({"include": "w1:"}, "'' is no slot of w1"),
        ({"include": "w1:+1"}, "'+1' is no slot of w1"),
        ({"include": "w1:0_1"}, "'0_1' is no slot of w1"),
        ({"include": "w1:-1"}, "'-1' is no slot of w1"),
        ({"include": "w1@w1:0"}, "host w1 is named whole and a second time"),
        ({"exclude": "w0@w1@10.0.0.3"}, "--exclude leaves no slot on any host"),
        ({"num_nodes": 4}, "the hostfile has 3 hosts; give 1 to 3"),
        ({"num_nodes": 0}, "give 1 to 3"),
        ({"num_gpus": 3}, "host w1 has 2 slots; give 1 to 2"),
        ({"num_nodes": 1, "num_gpus": 5}, "host w0 has 4 slots"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_refused(filters: dict[str, str | int], problem: str) -> None:
    with pytest.raises(BadHostfile) as refusal:
        filter_hosts(HOSTS, **filters)  # type: ignore[arg-type]
    assert problem in str(refusal.value)
