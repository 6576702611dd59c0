"""Which fleet is which, and whether its hosts mean the same Redis."""

from pathlib import Path

import pytest

from hortator.topology.errors import BadFleet
from hortator.topology.fleet import Fleet, ModelSpec
from hortator.topology.identity import check_redis_is_reached, identity_of, state_name


def fleet(redis_url: str, namespace: str = "") -> Fleet:
    return Fleet(redis_url=redis_url, namespace=namespace, models=(ModelSpec(name="m", path=Path("/m")),))


def test_the_password_is_no_part_of_a_fleets_identity_and_the_rest_is() -> None:
    same = {
        identity_of(fleet(f"redis://{who}Host{rest}")) for who in ("", ":old@", "u:new@") for rest in ("", ":6379/0")
    }
    assert same == {"redis://host:6379/0 namespace=none"}
    others = [fleet("redis://host/1"), fleet("redis://host?db=2"), fleet("redis://host", "x:"), fleet("unix:///s")]
    names = {state_name("fleet", identity_of(one)) for one in (*others, fleet("redis://host"))}
    assert len(names) == 5


@pytest.mark.parametrize(
    "url", ["redis://127.0.0.1/0", "redis://localhost:1/0", "redis://[::1]:1", "unix:///run/r.sock"]
)
def test_a_redis_that_every_host_takes_for_its_own_is_refused_where_leaders_have_several(url: str) -> None:
    with pytest.raises(BadFleet, match="is every host's own, but leaders run on a, b"):
        check_redis_is_reached(fleet(url), ["a", "b", "a"])
    with pytest.raises(BadFleet, match="leaders run on a"):
        check_redis_is_reached(fleet(url), ["a"], here=["b"])
    check_redis_is_reached(fleet(url), ["a", "a", "also-a"], here=["a", "also-a"])
    check_redis_is_reached(fleet(url), ["a", "a"])
    check_redis_is_reached(fleet("redis://10.0.0.1/0"), ["a", "b"])
