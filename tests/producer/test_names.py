"""Names, settings and what the package shows."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
from pydantic import ValidationError

import hortator.producer
from hortator.producer.errors import ConfigError
from hortator.producer.ids import Mint
from hortator.producer.names import TABLE, Names
from hortator.producer.rules import Rules
from hortator.producer.settings import StoreSettings


def test_queue_names_are_kombus() -> None:
    names = Names("app:")
    assert names.queues("org/model") == (
        "app:org/model",
        "app:org/model\x06\x163",
        "app:org/model\x06\x166",
        "app:org/model\x06\x169",
    )
    assert names.result("x") == "app:celery-task-meta-x"


@pytest.mark.parametrize("namespace", ["", "a:", "a.b-", "fleet_1_", ":"])
def test_a_namespace_ends_as_celery_wants_it(namespace: str) -> None:
    assert Names(namespace).queue("m") == f"{namespace}m"


@pytest.mark.parametrize("namespace", ["a", "a b:", "{x}:", "é:", "a" * 64 + ":", "a\n:"])
def test_a_namespace_that_celery_would_change_is_refused(namespace: str) -> None:
    with pytest.raises(ConfigError, match="namespace"):
        Names(namespace)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HORTATOR_REDIS_URL", "redis://elsewhere:1/2")
    monkeypatch.setenv("HORTATOR_NAMESPACE", "n:")
    monkeypatch.setenv("HORTATOR_RESULT_TTL_S", "77")
    monkeypatch.setenv("HORTATOR_REQUIRE_KNOWN_MODEL", "false")
    settings = StoreSettings(namespace="given:")
    assert (settings.redis_url, settings.namespace) == ("redis://elsewhere:1/2", "given:")
    assert settings.rules() == Rules(result_ttl_s=77, require_known_model=False)


def test_a_client_of_a_url_takes_the_rest_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HORTATOR_NAMESPACE", "n:")
    with hortator.producer.Client("redis://127.0.0.1:1/0", require_known_model=False) as client:
        store = client.store
        assert isinstance(store, hortator.producer.redis_store.RedisStore)
        assert store.names.namespace == "n:"
        assert not store.rules.require_known_model


@pytest.mark.parametrize(
    "wrong", [{"timeout_s": 0}, {"max_attempts": 0}, {"memory_headroom": 1}, {"result_ttl_s": "x"}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        StoreSettings.model_validate(wrong)


def test_all_is_what_is_visible() -> None:
    shown = {
        name
        for name, value in vars(hortator.producer).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert shown == set(hortator.producer.__all__)
    assert list(hortator.producer.__all__) == sorted(hortator.producer.__all__)


def test_importing_the_producer_pulls_in_nothing_heavy() -> None:
    code = (
        "import sys, hortator.producer; print(*(set(sys.modules) & {'torch', 'celery', 'kombu', 'fastapi', 'typer'}))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == ""


def test_ids_are_uuids_that_prove_their_issuer_and_tenant() -> None:
    mint = Mint(b"secret")
    ids = [mint.issue("acme") for _ in range(1000)]
    import uuid

    assert len(set(ids)) == 1000
    assert all(uuid.UUID(one).version == 8 and uuid.UUID(one).variant == uuid.RFC_4122 for one in ids)
    assert all(mint.issued(one, "acme") for one in ids)
    assert not any(mint.issued(one, "other") for one in ids)
    assert not any(Mint(b"another").issued(one, "acme") for one in ids)
    assert not mint.issued(str(uuid.uuid4()), "acme")


def test_the_documentation_lists_exactly_the_keys_of_the_table() -> None:
    text = Path("docs/02-wire-and-keys.md").read_text()
    listed = text.partition("<!-- keys")[2].partition("<!-- /keys")[0].splitlines()[3:]
    assert listed == [f"| `{row.pattern}` | {row.type} | {row.meaning} | {row.expiry} |" for row in TABLE]
