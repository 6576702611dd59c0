"""Hosts as people write them, and the seats that follow."""

import pytest

from hortator.topology.errors import BadPlacement
from hortator.topology.placement import Node, Seat, check_host, read_nodes, seats, shares


def test_the_short_form_and_the_list_mean_the_same() -> None:
    nodes = (Node("nodeA", (0, 1)), Node("10.0.0.2", (0,)))
    assert read_nodes("nodeA:2, 10.0.0.2:1") == nodes
    assert read_nodes('[{"host": "nodeA", "devices": [0, 1]}, {"host": "10.0.0.2", "ranks": 1}]') == nodes
    assert read_nodes(list(nodes)) == nodes


def test_nothing_is_no_hosts() -> None:
    assert read_nodes("") == read_nodes([]) == ()


def test_an_address_with_colons_stands_in_brackets() -> None:
    assert read_nodes("[fd00::1]:2") == (Node("fd00::1", (0, 1)),)


def test_hosts_are_filled_in_order_so_stages_stay_together() -> None:
    nodes = read_nodes('[{"host": "a", "devices": [2, 3], "interface": "eth1"}, {"host": "b", "ranks": 2}]')
    assert seats(nodes) == (
        Seat(0, "a", 2, "eth1"),
        Seat(1, "a", 3, "eth1"),
        Seat(2, "b", 0, None),
        Seat(3, "b", 1, None),
    )
    assert [share.ranks for share in shares(nodes)] == [(0, 1), (2, 3)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nodeA", "write host:ranks"),
        ("nodeA:two", "write host:ranks"),
        ("nodeA:٢", "write host:ranks"),
        ("nodeA:0", "at least 1"),
        ("nodeA:1,nodeA:1", "host nodeA is named twice"),
        ("-oProxyCommand=x:1", "begins with '-'"),
        ("a b:1", "'a b' is no host name"),
        ("a_b.:1", "is no host name"),
        ("10.0.0.256:1", "is no IPv4 address"),
        ("[{", "not JSON"),
        ('[{"devices": [0]}]', "has no host"),
        ('[{"host": "a", "devices": [0, 0]}]', "hold one rank each"),
        ('[{"host": "a", "devices": [true]}]', "list of its devices"),
        ('[{"host": "a", "devices": [0], "slots": 1}]', "unknown entry 'slots'"),
        ('[{"host": "a", "ranks": 1, "interface": "eth0;reboot"}]', "not the name of a network interface"),
        ('[{"host": "a", "ranks": 1000000}]', "number of its ranks"),
    ],
)
def test_what_makes_no_sense_is_told(text: str, words: str) -> None:
    with pytest.raises(BadPlacement, match=words):
        read_nodes(text)


@pytest.mark.parametrize("host", ["", "-a", "a;b", "a/b", "a\n", "$(x)", "a" * 300, "user@host", "a_b", "1.2.3"])
def test_no_host_can_be_anything_but_a_name(host: str) -> None:
    with pytest.raises(BadPlacement):
        check_host(host)
