"""How a process that somebody else started learns its place, and what makes a secret file acceptable."""

from pathlib import Path

import pytest

from hortator.topology.errors import BadPlacement, BadSecret
from hortator.topology.join import Place, place_of, read_secret


@pytest.mark.parametrize(
    ("environment", "options", "place"),
    [
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, {}, Place((3,), (1,), 4)),
        ({"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}, {}, Place((2,), (0,), 4)),
        ({"RANK": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, {}, Place((1,), (0,))),
        ({"LWS_WORKER_INDEX": "1"}, {"ranks_per_node": 2}, Place((2, 3), (0, 1))),
        ({"RANK": "9"}, {"ranks": "2,3"}, Place((2, 3), (0, 1))),
    ],
)
def test_a_place_is_what_the_options_or_else_the_starter_say(
    environment: dict[str, str], options: dict[str, object], place: Place
) -> None:
    assert place_of(environment, **options) == place  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("environment", "options", "words"),
    [
        ({}, {}, "None of RANK, SLURM_PROCID"),
        ({"RANK": "one"}, {}, "RANK is 'one', not a number"),
        ({"RANK": "-1"}, {}, "not a number"),
        ({}, {"ranks_per_node": 2}, "set one of LWS_WORKER_INDEX"),
        ({}, {"ranks": "1,"}, "--ranks is ''"),
    ],
)
def test_a_place_that_cannot_be_found_is_an_error(
    environment: dict[str, str], options: dict[str, object], words: str
) -> None:
    with pytest.raises(BadPlacement, match=words):
        place_of(environment, **options)  # type: ignore[arg-type]


def secret(path: Path, content: str = "s" * 32, mode: int = 0o600) -> Path:
    path.write_text(content)
    path.chmod(mode)
    return path


def test_a_secret_is_its_content_whatever_the_white_space(tmp_path: Path) -> None:
    one, two = secret(tmp_path / "one"), secret(tmp_path / "two", "s" * 32 + "\n", 0o400)
    assert read_secret(one) == read_secret(two)
    assert len(read_secret(one)) == 32
    assert read_secret(one) != read_secret(secret(tmp_path / "other", "t" * 32))


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o604])
def test_a_secret_that_others_can_reach_is_refused_with_the_cure(tmp_path: Path, mode: int) -> None:
    path = secret(tmp_path / "open", mode=mode)
    with pytest.raises(BadSecret, match=f"chmod 600 {path}"):
        read_secret(path)


def test_a_secret_that_is_short_or_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSecret, match="holds 5 characters"):
        read_secret(secret(tmp_path / "short", "short"))
    with pytest.raises(BadSecret, match="No such file"):
        read_secret(tmp_path / "none")
