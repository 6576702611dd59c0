"""What README and docs tell people to type works as it stands there."""

import re
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from prometheus_client import Metric
from pydantic import TypeAdapter
from typer.core import TyperGroup

from hortator.cli import app
from hortator.producer.api.app import HTTP_CODES
from hortator.producer.api.failures import STATUS, ApiError
from hortator.producer.api.metrics import Metrics, Queues
from hortator.producer.redis_store import RedisStore
from hortator.producer.schema import MAX_PROMPT_CHARS
from hortator.workers.settings import WorkerSettings
from tests.producer.api_process import MODEL, Worker

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "demo" / "README.md"]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`(hortator [^`]+)`")
OURS = "redis://127.0.0.1:6379/0"


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page: Path) -> Iterator[str]:
    """Lines of the shell, and what stands in backquotes, that begin with `hortator`."""
    typed = blocks(page, "sh") + [re.sub(r"^(?!\$ ).*$", "", text, flags=re.M) for text in blocks(page, "console")]
    for line in "".join(typed).splitlines():
        if match := re.search(r"(?:^|&& |exec api )(hortator .*)$", line.removeprefix("$ ")):
            yield match[1]
    yield from SPAN.findall(page.read_text(encoding="utf-8"))


def problems(line: str) -> Iterator[str]:
    """Commands and options of one line that there are not."""
    words = shlex.split(re.split(r" (?:>>|&&|\||#) ?", line)[0], comments=True)[1:]
    command = typer.main.get_command(app)
    for word in words:
        if isinstance(command, TyperGroup) and not word.startswith("["):
            if word not in command.commands:
                yield f"{line}: no command {word}"
                return
            command = command.commands[word]
        elif word == "--":
            return
        elif option := re.match(r"\[?(--?[A-Za-z][\w-]*)", word):
            known = {"--help"}.union(*(parameter.opts + parameter.secondary_opts for parameter in command.params))
            if option[1] not in known:
                yield f"{line}: no option {option[1]}"


def dead_links(page: Path) -> Iterator[str]:
    text = page.read_text(encoding="utf-8")
    for target, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", text):
        file = page.parent / target if target else page
        if not file.exists() or (heading and heading not in headings(file)):
            yield f"{target}#{heading}"


def headings(page: Path) -> set[str]:
    """As links spell them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def families() -> Iterator[Metric]:
    yield from Metrics().registry.collect()
    yield from Queues([], 0).collect()


@pytest.fixture
def answering(newest_redis_url: str) -> Iterator[str]:
    """The URL of a Redis on which somebody answers every job with 42."""
    over = threading.Event()
    with RedisStore(newest_redis_url, timeout_s=5.0) as store:
        worker = Worker(store)
        worker.beat()

        def answer() -> None:
            while not over.is_set():
                for claimed in worker.claim(64):
                    worker.succeed(claimed, ["4", "2"])
                over.wait(0.01)

        thread = threading.Thread(target=answer)
        thread.start()
        yield newest_redis_url
        over.set()
        thread.join()


def test_every_command_and_option_that_the_pages_name_is_there() -> None:
    found = [(page.name, line) for page in PAGES for line in commands(page)]
    assert len(found) > 60
    assert [(name, problem) for name, line in found for problem in problems(line)] == []


def test_every_link_of_the_pages_leads_to_a_file_and_its_heading() -> None:
    assert [f"{page.name}: {link}" for page in PAGES for link in dead_links(page)] == []


def test_the_longest_prompt_stands_where_the_largest_message_does() -> None:
    for page in ("02-wire-and-keys", "06-polling-api"):
        assert f"{MAX_PROMPT_CHARS:,} characters" in (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["hosts", "rank_variables"])
def test_a_list_is_read_in_the_form_that_the_page_of_launchers_gives(name: str) -> None:
    page = (ROOT / "docs" / "09-launching.md").read_text(encoding="utf-8")
    [form] = re.findall(rf"^\| `{name}` \| `([^`]+)`", page, re.MULTILINE)
    field = WorkerSettings.model_fields[name]
    adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
    assert len(adapter.validate_python(form)) == 2


def test_every_test_that_the_promises_name_is_there() -> None:
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "07-promises.md").read_text(encoding="utf-8"))
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    assert len(named) > 30
    assert [name for name in named if f"def {name}(" not in written] == []


@pytest.mark.parametrize(
    "line", ["hortator frob", "hortator up --frob", "hortator keys frob", "hortator result X --wat"]
)
def test_a_command_that_is_not_there_would_be_found(line: str) -> None:
    assert list(problems(line))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: Path, answering: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program = "\n".join(blocks(page, "python"))
    assert MODEL in program
    assert OURS in program
    exec(compile(program.replace(OURS, answering), str(page), "exec"), {"__name__": "page"})
    assert "42" in capsys.readouterr().out


def test_every_metric_and_every_error_of_the_api_stands_on_its_page() -> None:
    page = (ROOT / "docs" / "06-polling-api.md").read_text(encoding="utf-8")
    metrics = {f"{family.name}_total" if family.type == "counter" else family.name for family in families()}
    errors = {error.code for error in [*STATUS, *ApiError.__subclasses__()]} | set(HTTP_CODES.values())
    assert {name for name in metrics | errors if f"`{name}`" not in page} == set()
