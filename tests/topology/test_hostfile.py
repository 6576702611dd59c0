"""The hostfile: DeepSpeed's own parser is the oracle wherever it means what it reads."""

import re
from pathlib import Path

import pytest
from deepspeed.launcher.runner import _parse_hostfile  # the dev extra brings it
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hortator.topology.errors import BadHostfile
from hortator.topology.hostfile import MAX_SLOTS, Host, parse_hostfile, read_hostfile

LABEL = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9-]{0,8}[A-Za-z0-9])?", fullmatch=True)
NAME = st.builds(lambda labels, last: ".".join([*labels, "n" + last]), st.lists(LABEL, max_size=2), LABEL)
ADDRESS = st.one_of(NAME, st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(str))
GAP = st.text(" \t", min_size=1, max_size=3)
PADDING = st.text(" \t", max_size=2)
ENTRY = st.builds(
    lambda before, host, gap, slots, after: f"{before}{host}{gap}slots={slots}{after}",
    PADDING,
    ADDRESS,
    GAP,
    st.one_of(st.integers(1, MAX_SLOTS).map(str), st.just("007")),
    PADDING,
)
SILENT = st.one_of(st.just(""), PADDING, st.text("# slots=12", max_size=9).map(lambda text: "#" + text))
SOUND = st.lists(st.one_of(ENTRY, SILENT), max_size=8)
NOISE = st.lists(
    st.one_of(ENTRY, SILENT, st.text("ab1.-:@#=slot \t\xa0", max_size=16), st.text(max_size=12)), min_size=1, max_size=4
)
SHORT = re.compile(r"\s*\S+\s+[0-9]+(\s+#.*)?\s*")
ENDS = st.sampled_from(["\n", "\r\n", "\r"])


def deepspeed_reads(text: str) -> list[tuple[str, int]] | None:
    """Its hosts in order; None if it refuses."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")  # open() in text mode
    try:
        return list(_parse_hostfile(lines).items())
    except ValueError:
        return None


def we_read(text: str) -> list[tuple[str, int]] | None:
    try:
        return [(host.address, host.slots) for host in parse_hostfile(text)]
    except BadHostfile:
        return None


@settings(max_examples=100)
@given(lines=SOUND, end=ENDS)
@example(lines=["a slots=1", "A slots=1"], end="\n")
def test_what_deepspeed_reads_from_a_sound_file_is_what_we_read(lines: list[str], end: str) -> None:
    text = end.join(lines)
    ours, theirs = we_read(text), deepspeed_reads(text)
    names = [line.split()[0].lower() for line in lines if line.strip() and not line.strip().startswith("#")]
    if len(set(names)) == len(names):  # one host under two spellings is a difference on purpose
        assert ours == theirs
    else:
        assert ours is None


@settings(max_examples=100)
@given(lines=NOISE, end=ENDS)
def test_what_we_read_of_any_text_deepspeed_reads_alike(lines: list[str], end: str) -> None:
    """But for the short form, which it does not know."""
    text = end.join(line for line in lines if not SHORT.fullmatch(line))
    ours = we_read(text)
    assert ours is None or ours == deepspeed_reads(text)


def test_the_short_form_is_an_address_and_a_number() -> None:
    assert parse_hostfile("10.0.0.1 8\n\n10.0.0.2\t4\n") == (Host("10.0.0.1", 8), Host("10.0.0.2", 4))


def test_the_order_of_the_lines_is_the_order_of_the_hosts() -> None:
    assert [host.address for host in parse_hostfile("z slots=1\na slots=1\nm slots=1")] == ["z", "a", "m"]


def test_a_comment_may_follow_the_slots() -> None:
    assert parse_hostfile("a slots=2  # rack 3") == (Host("a", 2),)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("a slots=2abc", "'abc' after the number of slots"),
        ("a slots=2 max_slots=4", "'max_slots=4' after the number of slots"),
        ("a slots=0", "host a has no slots"),
        (f"a slots={MAX_SLOTS + 1}", f"the limit is {MAX_SLOTS}"),
        ("a slots=" + "9" * 99, f"the limit is {MAX_SLOTS}"),
        ("a slots=٣", "is no host with its slots"),
        ("-oProxyCommand=x slots=1", "begins with '-'"),
        ("root@a slots=1", "a user before '@'"),
        ("10.0.0.256 slots=1", "is no IPv4 address"),
        ("fe80::1%eth0 slots=1", "is no IPv6 address"),
        ("a_b slots=1", "is no host name"),
        ("a;reboot slots=1", "is no host name"),
        ("höst slots=1", "is no host name"),
        ("a" * 64 + " slots=1", "is no host name"),
        ("a." * 130 + "b slots=1", "at most 253"),
    ],
)
def test_what_deepspeed_would_pass_on_is_refused_with_line_and_reason(line: str, problem: str) -> None:
    assert deepspeed_reads(line) is not None
    with pytest.raises(BadHostfile, match=r"^hosts\.txt, line 3: ") as refusal:
        parse_hostfile(f"# the fleet\nfirst slots=1\n{line}\n", source="hosts.txt")
    assert problem in str(refusal.value)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("a", "has no number of slots: write 'ADDRESS slots=NUMBER_OF_GPUS'"),
        ("a slots=", "is no host with its slots"),
        ("a 0", "host a has no slots"),
        ("a slots=" + "9" * 5000, f"the limit is {MAX_SLOTS}"),
        ("a slots = 4", "is no host with its slots"),
        ("a slots=-1", "is no host with its slots"),
        ("slots=4", "has no number of slots"),
        ("first slots=2", "stands in line 2 already"),
        ("FIRST slots=2", "stands in line 2 already"),
    ],
)
def test_what_nobody_can_read_is_refused_with_line_and_reason(line: str, problem: str) -> None:
    with pytest.raises(BadHostfile, match=r"^hostfile, line 3: ") as refusal:
        parse_hostfile(f"# the fleet\nfirst slots=1\n{line}\n")
    assert problem in str(refusal.value)


def test_one_ipv6_host_under_two_spellings_is_refused() -> None:
    with pytest.raises(BadHostfile, match="stands in line 1 already"):
        parse_hostfile("2001:db8::1 slots=1\n2001:DB8:0::1 slots=1")


@pytest.mark.parametrize("text", ["", "\n \n", "# nothing\n"])
def test_a_file_without_hosts_is_refused(text: str) -> None:
    with pytest.raises(BadHostfile, match="lists no host"):
        parse_hostfile(text)


def test_a_file_of_the_wrong_kind_is_refused_before_it_is_read() -> None:
    with pytest.raises(BadHostfile, match="are no hostfile"):
        parse_hostfile("a slots=1\n" * 1_000_000)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"a slots=1\n\xff")
    with pytest.raises(BadHostfile, match="hosts is not UTF-8 at byte 10"):
        read_hostfile(tmp_path / "hosts")
    with pytest.raises(BadHostfile, match=r"cannot read the hostfile .*none: No such file"):
        read_hostfile(tmp_path / "none")
    (tmp_path / "hosts").write_text("a 2\r\n")
    assert read_hostfile(tmp_path / "hosts") == (Host("a", 2),)


def test_an_ipv6_address_may_stand_in_brackets_as_filters_want_it() -> None:
    assert parse_hostfile("[2001:db8::4] 8\n") == parse_hostfile("2001:db8::4 slots=8\n")
    with pytest.raises(BadHostfile, match="stands in line 1 already"):
        parse_hostfile("[2001:db8::4] 8\n2001:db8:0::4 8\n")
    with pytest.raises(BadHostfile, match="no host name"):
        parse_hostfile("[a] 8\n")
