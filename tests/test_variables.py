"""Misspelt variables are told."""

import os
import subprocess
import sys

import pytest

from hortator.producer.api import ApiSettings
from hortator.variables import strange_to_api, strange_to_worker


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("HORTATOR_MAX_NUM_SEQ", "HORTATOR_MAX_NUM_SEQ is no setting and is ignored: is HORTATOR_MAX_NUM_SEQS meant?"),
        ("HORTATOR_REDISURL", "HORTATOR_REDISURL is no setting and is ignored: is HORTATOR_REDIS_URL meant?"),
        ("HORTATOR_XYZZY", "HORTATOR_XYZZY is no setting and is ignored"),
    ],
)
def test_a_misspelt_variable_is_told_with_the_nearest_known_one(name: str, said: str) -> None:
    assert list(strange_to_worker([name])) == [said]


@pytest.mark.parametrize(
    "name",
    ["HORTATOR_CONFIG", "HORTATOR_MAX_ATTEMPTS", "hortator_redis_url", "HORTATOR_MODEL_DIR", "HORTATOR_API_X", "PATH"],
)
def test_known_variables_and_those_of_others_are_not_told(name: str) -> None:
    assert list(strange_to_worker([name])) == []


def test_the_api_tells_its_own() -> None:
    names = ["HORTATOR_API_KEYFILE", "HORTATOR_API_HOST", "HORTATOR_API_IMAGE", "HORTATOR_MODLE"]
    said = "HORTATOR_API_KEYFILE is no setting and is ignored: is HORTATOR_API_KEYS_FILE meant?"
    assert list(strange_to_api(names, ApiSettings)) == [said]


def test_a_worker_says_it_once_in_its_log_and_never_the_value() -> None:
    settings = {
        "HORTATOR_REDIS_URL": "redis://127.0.0.1:1/0",
        "HORTATOR_MODEL": "m",
        "HORTATOR_ENGINE": "no.such.module:engine",
        "HORTATOR_SECRETFILE": "sekret",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "hortator.workers", "worker", "-Q", "m", "-l", "INFO"],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = next(line for line in process.stdout if "is no setting" in line)
        process.kill()
    assert "WARNING" in said
    assert "HORTATOR_SECRETFILE is no setting and is ignored: is HORTATOR_SECRET_FILE meant?" in said
    assert "sekret" not in said
