"""Where a group's settings come from, and what is said when they cannot be read."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from hortator.producer.errors import ConfigError
from hortator.producer.rules import Rules
from hortator.workers.celery import App
from hortator.workers.settings import WorkerSettings


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that HORTATOR_CONFIG names."""
    file = tmp_path / "group.toml"
    monkeypatch.setenv("HORTATOR_CONFIG", str(file))
    return file


def test_the_environment_goes_before_the_file(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml.write_text('model = "m"\nengine = "echo"\nmax_num_seqs = 3\nlease_s = 7.0\n')
    monkeypatch.setenv("HORTATOR_LEASE_S", "9")
    settings = WorkerSettings()
    assert (settings.model, settings.max_num_seqs, settings.lease_s) == ("m", 3, 9.0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no such file"),
        (b"model = m", "line 1"),
        (b"model = '\xff'", "utf-8"),
        (b'modell = "m"', "no such settings: modell"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_what_is_wrong(toml: Path, content: bytes | None, says: str) -> None:
    if content is not None:
        toml.write_bytes(content)
    with pytest.raises(ConfigError, match=f"HORTATOR_CONFIG={toml}: .*{says}"):
        WorkerSettings()


@pytest.mark.parametrize("said", ['{"FOO": "1"}', '["FOO"]', "FOO=1,BAR=2"])
def test_names_of_variables_that_are_none_are_told_the_right_form(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HORTATOR_RANK_VARIABLES", said)
    with pytest.raises(ValidationError, match="is no variable's name; write names alone, as NAME,NAME"):
        WorkerSettings(engine="echo", model="m")


def test_celery_says_it_in_one_line(toml: Path) -> None:
    command = [sys.executable, "-m", "celery", "-A", "hortator.workers", "report"]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (78, f"hortator: HORTATOR_CONFIG={toml}: there is no such file\n")


def test_a_leader_keeps_to_the_rules_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"default_deadline_s": 60.0, "journal_ttl_s": 70.0, "max_letters": 3, "max_message_bytes": 5000}
    said |= {"max_attempts": 2, "result_ttl_s": 90.0}
    for name, value in ({"engine": "echo", "model": "m"} | said).items():
        monkeypatch.setenv(f"HORTATOR_{name.upper()}", str(value))
    with App(WorkerSettings()).make_store() as store:
        assert store.rules == replace(Rules(), **said)  # type: ignore[arg-type]


def test_a_process_without_a_model_finds_its_redis_where_a_worker_does(
    toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml.write_text('redis_url = "redis://file:1/0"\nnamespace = "file:"\nlease_s = 7.0\n')
    monkeypatch.setenv("HORTATOR_NAMESPACE", "env:")
    conf = App().conf
    assert conf.broker_url == "redis://file:1/0"
    assert conf.broker_transport_options["global_keyprefix"] == "env:"
