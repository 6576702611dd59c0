"""Every command refuses the same fleet files."""

from pathlib import Path

import pytest

from hortator.cli import run


@pytest.mark.parametrize(
    "command",
    [
        ["plan"],
        ["doctor"],
        ["up"],
        ["up", "--launcher", "external"],
        ["logs"],
        ["down", "--fleet"],
        ["restart", "--fleet"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("url", ["redis://:s3kret@h:99999/0", "redis://h/0?password=s3kret"])
def test_a_redis_url_that_cannot_work_is_refused_without_its_password(
    command: list[str], url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    (tmp_path / "fleet.toml").write_text(
        f'redis_url = "{url}"\nhostfile = "hosts"\n[[models]]\nname = "m"\nengine = "echo"\n'
    )
    assert run([*command, str(tmp_path / "fleet.toml")]) == 2
    said = capsys.readouterr()
    assert "fleet.toml: redis_url: " in said.err
    assert said.err.count("\n") == 1
    assert "s3kret" not in said.out + said.err
