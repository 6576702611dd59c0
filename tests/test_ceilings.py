"""No number that a setting takes is more than what lies beneath it can bear."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from annotated_types import Le, Lt
from pydantic import BaseModel, ValidationError

from hortator.ceilings import MAX_COUNT, MAX_LIFETIME_S, MAX_PATIENCE_S, MAX_STRING_BYTES
from hortator.cli import run
from hortator.producer.api.settings import ApiSettings
from hortator.producer.errors import ConfigError
from hortator.producer.rules import Rules
from hortator.producer.schema import MAX_DEADLINE_S, State
from hortator.producer.settings import StoreSettings
from hortator.topology.fleet import ModelSpec
from hortator.workers.settings import WorkerSettings
from hortator.workers.supervisor import TICK_S
from hortator.workers.watch import Watch
from tests.producer.rig import RedisRig, done


@pytest.mark.parametrize("settings", [WorkerSettings, StoreSettings, ApiSettings, ModelSpec])
def test_every_number_has_a_ceiling(settings: type[BaseModel]) -> None:
    def is_number(annotation: object) -> bool:
        return annotation in (int, float, int | None, float | None)

    numbers = {name: field for name, field in settings.model_fields.items() if is_number(field.annotation)}
    assert len(numbers) > 3
    assert [
        name for name, field in numbers.items() if not any(isinstance(bound, Le | Lt) for bound in field.metadata)
    ] == []


@pytest.mark.parametrize("name", ["result_ttl_s", "idempotency_ttl_s", "connect_timeout_s", "timeout_s"])
@pytest.mark.parametrize("value", ["1e16", "1e300", "inf", "nan"])
def test_a_time_beyond_all_sense_is_refused_by_its_name(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"HORTATOR_{name.upper()}", value)
    code = run(["enqueue", "x", "--model", "m", "--redis-url", "redis://127.0.0.1:1/0"])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith(f"error: {name}: Input should be ")


def test_a_worker_says_it_in_one_line_before_it_starts() -> None:
    command = [sys.executable, "-m", "celery", "-A", "hortator.workers", "worker"]
    settings = {"HORTATOR_MODEL": "m", "HORTATOR_ENGINE": "echo", "HORTATOR_LEASE_S": "1e17"}
    celery = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=30, check=False)
    said = f"hortator: lease_s: Input should be less than or equal to {MAX_PATIENCE_S}\n"
    assert (celery.returncode, celery.stderr) == (78, said)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("result_ttl_s = 1e16", f"result_ttl_s: Input should be less than or equal to {MAX_LIFETIME_S}"),
        ("lease_s = 1e17", f"lease_s: Input should be less than or equal to {MAX_PATIENCE_S}"),
        ('[environment]\nHORTATOR_IDEMPOTENCY_TTL_S = "1e300"', f"less than or equal to {MAX_LIFETIME_S}"),
        ("heartbeat_s = 4", "heartbeat_s=4 leaves no time for a beat within heartbeat_timeout_s=3"),
    ],
)
def test_plan_refuses_it_in_one_line(line: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hosts").write_text("a slots=1\n")
    (tmp_path / "fleet.toml").write_text(f'hostfile = "hosts"\n[[models]]\nname = "m"\nengine = "echo"\n{line}\n')
    code = run(["plan", str(tmp_path / "fleet.toml")])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1), error
    assert says in error


@pytest.mark.parametrize("value", [1e16, float("inf"), float("nan"), -1.0])
def test_rules_that_code_makes_are_held_to_the_same_ceilings(value: float) -> None:
    with pytest.raises(ConfigError, match=r"beat_ttl_s=\S+: a rule is at least 0 and at most 315360000"):
        Rules(beat_ttl_s=value)


def test_what_settings_let_through_redis_takes_as_well(newest_redis_url: str) -> None:
    rig = RedisRig(newest_redis_url)
    times = {"result_ttl_s", "journal_ttl_s", "idempotency_ttl_s", "deadline_grace_s", "beat_ttl_s"}
    counts = {"max_queued_per_model", "max_queued_per_tenant", "max_letters", "max_attempts"}
    try:
        rig.rule(
            **dict.fromkeys(times | {"conviction_grace_s"}, MAX_LIFETIME_S),
            **dict.fromkeys(counts, MAX_COUNT),
            max_message_bytes=MAX_STRING_BYTES,
            default_deadline_s=MAX_DEADLINE_S,
        )
        rig.beat()
        [job_id] = rig.enqueue("x", idempotency_key="k")
        lease = rig.claim_one(lease_s=MAX_PATIENCE_S)
        rig.store.renew([lease], owner="a", lease_s=MAX_PATIENCE_S)
        rig.store.commit([done(lease)])
        rig.store.sweep()
        assert rig.state(job_id) is State.SUCCEEDED
        assert 0 < rig.redis.ttl(rig.names.job(job_id)) <= MAX_LIFETIME_S
    finally:
        rig.close()


@pytest.mark.parametrize(
    ("heartbeat_s", "timeout_s"), [(4.0, 3.0), (3.0, 3.0), (2.7, 3.0), (1.0, 1.3), (0.05, 3.0), (1e9, 1e17)]
)
def test_heartbeats_that_a_front_could_not_rely_on_are_refused(heartbeat_s: float, timeout_s: float) -> None:
    with pytest.raises(ValidationError, match=r"heartbeat_s"):
        WorkerSettings(model="m", engine="echo", heartbeat_s=heartbeat_s, heartbeat_timeout_s=timeout_s)


@pytest.mark.parametrize(("heartbeat_s", "timeout_s"), [(0.1, 0.5), (1.0, 1.4), (2.6, 3.0)])
def test_the_narrowest_heartbeats_that_settings_take_are_relied_on(heartbeat_s: float, timeout_s: float) -> None:
    settings = WorkerSettings(model="m", engine="echo", heartbeat_s=heartbeat_s, heartbeat_timeout_s=timeout_s)
    watch = Watch(settings.heartbeat_s, settings.heartbeat_timeout_s)
    looks = [number * 1.5 * TICK_S for number in range(100)]  # each comes somewhat late
    for now in looks:
        watch.look(now, heard=now - heartbeat_s, cpu_s=0.0)
    assert watch.steady(looks[-1] + TICK_S / 2)
