"""The key ring, without a server."""

import hmac
from pathlib import Path

import pytest

from hortator.producer.api.keys import Caller, KeyRing, new_key
from hortator.producer.api.settings import ApiSettings
from hortator.producer.errors import ConfigError


def test_a_new_key_opens_as_its_tenant() -> None:
    key, line = new_key("acme")
    assert KeyRing.read([line]).caller(key) == Caller("acme", operator=False)


def test_an_operators_key_says_so() -> None:
    key, line = new_key("ops", operator=True)
    assert KeyRing.read([line]).caller(key) == Caller("ops", operator=True)


def test_the_line_does_not_hold_the_key() -> None:
    key, line = new_key("acme")
    assert key not in line
    assert key.removeprefix("hk_") not in line


@pytest.mark.parametrize("presented", [None, "", "hk_wrong", "hk_\udcff"])
def test_no_key_and_wrong_keys_open_nothing(presented: str | None) -> None:
    _, line = new_key("acme")
    assert KeyRing.read([line]).caller(presented) is None


def test_the_hash_itself_is_no_key() -> None:
    _, line = new_key("acme")
    assert KeyRing.read([line]).caller(line.split()[0]) is None


def test_without_keys_everybody_is_an_operator_of_no_tenant() -> None:
    assert KeyRing().caller(None) == Caller(None, operator=True)


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [new_key(f"t{n}") for n in range(3)]
    compared: list[bytes] = []
    real = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    assert KeyRing.read([line for _, line in pairs]).caller(pairs[0][0]) == Caller("t0", operator=False)
    assert len(compared) == 3


def test_blank_lines_and_comments_do_not_count(tmp_path: Path) -> None:
    key, line = new_key("acme")
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n  {line}  \n")
    assert ApiSettings(keys_file=file).key_ring().caller(key) == Caller("acme", operator=False)


@pytest.mark.parametrize("line", ["hk_secretkeyinclear acme", "zz acme", "acme", "a b c d"])
def test_a_wrong_line_is_named_and_not_repeated(line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        KeyRing.read([line])
    assert "HORTATOR_API_KEYS, entry 1" in refused.value.message
    assert "secretkey" not in refused.value.message


def test_a_tenant_name_with_odd_characters_is_refused() -> None:
    with pytest.raises(ConfigError, match="no tenant name"):
        new_key("a b")


def test_a_missing_key_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the key file"):
        ApiSettings(keys_file=tmp_path / "none").key_ring()


def test_an_empty_key_file_is_refused_because_it_would_open_the_api(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# nobody yet\n")
    with pytest.raises(ConfigError, match="would be open"):
        ApiSettings(keys_file=file).key_ring()
