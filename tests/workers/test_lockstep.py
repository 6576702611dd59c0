"""Step plans: the codec, the peers' checks, and the channels."""

import struct
import subprocess
import sys
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hortator.workers import lockstep
from hortator.workers.engine.step import Request, SamplingParams, StepPlan
from hortator.workers.lockstep import (
    MAX_PLAN_BYTES,
    PLAN_TOKENS,
    Follower,
    Header,
    Inbox,
    InProcessChannel,
    LockstepError,
    decode_plan,
    encode_park,
    encode_plan,
)
from tests.workers.test_pipe import requests

plans = st.builds(
    StepPlan,
    step=st.integers(0, 2**63),
    admit=st.lists(requests, max_size=3).map(tuple),
    cancel=st.lists(st.integers(0, 2**40), max_size=3).map(tuple),
)
digests = st.integers(-(2**63), 2**64 - 1)
PLAN = StepPlan(1, (Request(7, (1, 2, 3), SamplingParams(max_tokens=4, stop_token_ids=(2,)), (9,)),), (5, 6))


@given(plans, st.integers(0, 2**32 - 1), digests)
def test_plans_arrive_as_sent(plan: StepPlan, epoch: int, digest: int) -> None:
    header, arrived = decode_plan(encode_plan(plan, epoch=epoch, digest=digest))
    assert arrived == plan
    assert (header.epoch, header.step, header.digest) == (epoch, plan.step, digest % 2**64)
    assert not header.park


def test_a_plan_without_news_is_a_bare_header() -> None:
    assert len(encode_plan(StepPlan(1), epoch=1, digest=0)) == 40


def test_a_token_costs_four_bytes() -> None:
    def size(num_tokens: int) -> int:
        request = Request(1, (100_000,) * num_tokens, SamplingParams(max_tokens=1))
        return len(encode_plan(StepPlan(1, (request,)), epoch=1, digest=0))

    assert size(2000) - size(1000) == 4000


@given(plans, st.data())
def test_a_cut_plan_is_refused(plan: StepPlan, data: st.DataObject) -> None:
    frame = encode_plan(plan, epoch=1, digest=0)
    with pytest.raises(LockstepError):
        decode_plan(frame[: data.draw(st.integers(0, len(frame) - 1))])


@given(plans, st.data())
def test_a_garbled_plan_is_refused(plan: StepPlan, data: st.DataObject) -> None:
    frame = bytearray(encode_plan(plan, epoch=1, digest=0))
    places = st.sets(st.integers(0, len(frame) - 1), min_size=1, max_size=4)
    for at in data.draw(places):
        frame[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(LockstepError):
        decode_plan(bytes(frame))


@given(plans, st.data())
def test_a_plan_whose_checksums_are_right_is_refused_or_is_a_plan_but_never_anything_else(
    plan: StepPlan, data: st.DataObject
) -> None:
    payload = bytearray(encode_plan(plan, epoch=1, digest=0)[40:])
    for _ in range(data.draw(st.integers(1, 4)) if payload else 0):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        _, arrived = decode_plan(sealed(bytes(payload)))
    except LockstepError:
        return
    assert isinstance(arrived, StepPlan)


def sealed(payload: bytes, *, length: int | None = None) -> bytes:
    """A frame of this payload with checksums that are right."""
    size = len(payload) if length is None else length
    fields = struct.pack("<4sHHIQIQI", b"HRTP", 2, 0, 1, 1, size, 0, crc32(payload))
    return fields + struct.pack("<I", crc32(fields)) + payload


@given(st.binary(max_size=200))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(LockstepError):
        decode_plan(garbage)


@pytest.mark.parametrize("surplus", [-4, 4, 2])
def test_tokens_that_do_not_add_up_are_refused(surplus: int) -> None:
    payload = encode_plan(PLAN, epoch=1, digest=0)[40:]
    payload = payload[:surplus] if surplus < 0 else payload + bytes(surplus)
    with pytest.raises(LockstepError, match="cannot be read"):
        decode_plan(sealed(payload))


def test_an_announced_size_beyond_the_bound_is_refused() -> None:
    with pytest.raises(LockstepError, match="limit"):
        Header.read(sealed(b"", length=MAX_PLAN_BYTES + 1))


def test_a_plan_beyond_the_bound_is_refused_by_its_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockstep, "MAX_PLAN_BYTES", 20)
    with pytest.raises(LockstepError, match="limit"):
        encode_plan(PLAN, epoch=1, digest=0)


# --- the peers' checks


def follower() -> Follower:
    return Follower(rank=3, epoch=2)


def test_a_peer_follows_step_by_step_and_parks_in_between() -> None:
    peer = follower()
    assert not peer.read(encode_plan(StepPlan(1), epoch=2, digest=0))[0].park
    assert peer.read(encode_park(epoch=2, step=2))[0].park
    assert peer.read(encode_plan(StepPlan(2), epoch=2, digest=0))[1].step == 2


def test_a_plan_of_another_epoch_is_refused_naming_the_rank() -> None:
    with pytest.raises(LockstepError, match="rank 3 is in epoch 2 and got a plan of epoch 1"):
        follower().read(encode_plan(StepPlan(1), epoch=1, digest=0))


@pytest.mark.parametrize("step", [0, 2])
def test_a_step_out_of_sequence_is_refused_naming_the_rank(step: int) -> None:
    with pytest.raises(LockstepError, match=f"rank 3 expected step 1 and got step {step}"):
        follower().read(encode_plan(StepPlan(step), epoch=2, digest=0))


def test_another_digest_is_refused_naming_rank_and_step() -> None:
    peer = follower()
    header, _ = peer.read(encode_plan(StepPlan(1), epoch=2, digest=-1))
    peer.check(header, 2**64 - 1)
    with pytest.raises(LockstepError, match="rank 3 disagrees with the leader at step 1"):
        peer.check(header, 1)


def test_bytes_that_are_no_plan_are_refused_naming_rank_and_step() -> None:
    with pytest.raises(LockstepError, match="rank 3 at step 1: not a plan"):
        follower().read(bytes(40))


@pytest.mark.parametrize(
    "frame",
    [encode_plan(PLAN, epoch=2, digest=5), encode_plan(StepPlan(1), epoch=2, digest=5), encode_park(epoch=2, step=1)],
    ids=["with news", "without", "park"],
)
def test_a_bit_that_flips_on_the_way_is_noticed_naming_the_rank_wherever_it_is(frame: bytes) -> None:
    follower().read(frame)
    for bit in range(8 * len(frame)):
        damaged = (int.from_bytes(frame, "little") ^ (1 << bit)).to_bytes(len(frame), "little")
        with pytest.raises(LockstepError, match=r"rank 3 at step 1: .*(damaged|not a plan)"):
            follower().read(damaged)


# --- what goes into a plan


def request(handle: int, num_tokens: int = 1) -> Request:
    return Request(handle, (1,) * num_tokens, SamplingParams(max_tokens=1))


def test_a_cancel_never_overtakes_its_admission() -> None:
    inbox = Inbox()
    inbox.put([request(1, PLAN_TOKENS), request(2, PLAN_TOKENS)], [2])
    first, second, third = (inbox.take(step) for step in (1, 2, 3))
    assert ([r.handle for r in first.admit], first.cancel) == ([1], ())
    assert ([r.handle for r in second.admit], second.cancel) == ([2], ())
    assert (third.admit, third.cancel) == ((), (2,))
    assert not inbox


def test_everything_that_fits_goes_into_one_plan() -> None:
    inbox = Inbox()
    inbox.put([request(1)], [])
    inbox.put([request(2)], [9])
    assert inbox.take(4) == StepPlan(4, (request(1), request(2)), (9,))


def test_a_request_that_is_cancelled_before_it_left_never_leaves() -> None:
    inbox = Inbox()
    inbox.put([request(1), request(2)], [1])
    assert inbox.take(4) == StepPlan(4, (request(2),))


# --- channels


def test_the_in_process_channel_carries_frames_to_all_peers_in_order() -> None:
    leader = InProcessChannel()
    peers = [leader.peer(), leader.peer()]
    frames = [encode_plan(StepPlan(step), epoch=1, digest=step) for step in (1, 2)]
    for frame in frames:
        leader.broadcast_plan(frame)
    assert [[peer.wait(), peer.wait()] for peer in peers] == [frames, frames]


def test_real_ranks_get_short_and_long_plans_bit_by_bit_and_notice_a_dead_leader() -> None:
    script = Path(__file__).with_name("channel_ranks.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["same", "CollectiveFailed"], done.stderr


def test_a_leader_goes_ahead_of_peers_that_are_at_work_as_far_as_it_may() -> None:
    script = Path(__file__).with_name("channel_ranks.py")
    argv = [sys.executable, str(script), "--ahead"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert sorted(done.stdout.split()) == ["same", "waited"], done.stderr
