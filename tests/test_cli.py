"""The command line on a real Redis; what only a process can show is in test_cli_processes."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hortator.cli import run
from hortator.producer.embedded import EmbeddedRedis
from hortator.producer.redis_store import RedisStore
from hortator.producer.store import Claimed
from hortator.workers.envelope import job_of, open_envelope
from tests.producer.api_process import Worker

MODEL = ["--model", "demo"]


@pytest.fixture
def worker(newest_redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """The environment of a user who has a Redis, and a model group that the test plays."""
    monkeypatch.setenv("HORTATOR_REDIS_URL", newest_redis_url)
    monkeypatch.setenv("HORTATOR_TIMEOUT_S", "5")
    with RedisStore(newest_redis_url, timeout_s=5.0) as store:
        played = Worker(store)
        played.beat()
        yield played


class Shell:
    """Runs commands and keeps what they printed."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self._capture.readouterr()
        code = run(arguments)
        return (code, *self._capture.readouterr())

    def out(self, *arguments: str) -> str:
        code, out, err = self(*arguments)
        assert (code, err) == (0, "")
        return out.strip()

    def error(self, *arguments: str) -> tuple[int, str]:
        """The exit code, and the one line on stderr."""
        code, out, err = self(*arguments)
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return code, err.removeprefix("error: ").strip()


@pytest.fixture
def sh(capsys: pytest.CaptureFixture[str], worker: Worker) -> Shell:
    return Shell(capsys)


def test_enqueue_prints_the_id_and_result_the_answer(sh: Shell, worker: Worker) -> None:
    job_id = sh.out("enqueue", "12+30=", *MODEL, "--max-tokens", "8")
    assert worker.run_one(["4", "2"]) == job_id
    assert sh.out("result", job_id) == "42"


def test_result_of_a_job_that_is_not_done_says_so(sh: Shell) -> None:
    job_id = sh.out("enqueue", "x", *MODEL)
    assert sh.error("result", job_id) == (75, f"job {job_id} is queued; wait for it with --wait-s")
    code, out, _ = sh("result", job_id, "--json", "--wait-s", "0.05")
    assert (code, json.loads(out)["state"]) == (75, "queued")
    sh.out("cancel", job_id)
    assert sh.error("result", job_id) == (1, f"job {job_id} was cancelled")
    assert sh("result", job_id, "--json")[0] == 1


def test_result_waits_when_told_to(sh: Shell, worker: Worker) -> None:
    job_id = sh.out("enqueue", "x", *MODEL)
    later = threading.Timer(0.2, worker.run_one)
    later.start()
    assert sh.out("result", job_id, "--wait-s", "10") == "42"
    later.join()


def test_enqueue_takes_every_sampling_parameter_as_json_and_its_own_options_win(sh: Shell, worker: Worker) -> None:
    sh.out("enqueue", "x", *MODEL, "--sampling", '{"min_p": 0.05, "max_tokens": 9}', "--n", "2", "--max-tokens", "5")
    [claimed] = worker.claim()
    sampling = job_of(open_envelope(claimed.message), model="demo").sampling
    assert (sampling.min_p, sampling.max_tokens, sampling.n) == (0.05, 5, 2)


def test_enqueue_can_wait_for_the_answer(sh: Shell, worker: Worker) -> None:
    later = threading.Timer(0.1, worker.run_one, args=(["forty", "-two"],))
    later.start()
    assert sh.out("enqueue", "x", *MODEL, "--wait") == "forty-two"
    later.join()


def test_the_result_of_a_failed_job_is_its_reason(sh: Shell, worker: Worker) -> None:
    job_id = sh.out("enqueue", "x", *MODEL)
    [claimed] = worker.claim()
    worker.fail(claimed, "prompt_too_long", "too long")
    code, line = sh.error("result", job_id)
    assert code == 1
    assert "prompt_too_long" in line
    code, out, _ = sh("result", job_id, "--json")
    assert (code, json.loads(out)["failure"]["code"]) == (1, "prompt_too_long")


def test_an_unknown_id_is_said(sh: Shell) -> None:
    for command in (["result", "nope"], ["tail", "nope"], ["cancel", "nope"]):
        code, line = sh.error(*command)
        assert code == 1
        assert "nope" in line


def test_tail_prints_all_tokens(sh: Shell, worker: Worker) -> None:
    job_id = sh.out("enqueue", "x", *MODEL)
    worker.run_one(["a ", "b ", "c"])
    assert sh.out("tail", job_id) == "a b c"
    assert sh.out("tail", job_id, "--after", "1") == "b c"
    assert [json.loads(line)["index"] for line in sh.out("tail", job_id, "--json").splitlines()] == [0, 1, 2]


@pytest.mark.parametrize("command", [["tail", "x"], ["result", "x", "--wait-s", "30"], ["result", "x", "--json"]])
def test_a_redis_that_is_away_when_a_command_begins_is_said_at_once(
    command: list[str], sh: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HORTATOR_REDIS_URL", "redis://127.0.0.1:1")
    monkeypatch.delenv("HORTATOR_TIMEOUT_S")
    begun = time.monotonic()
    code, line = sh.error(*command)
    assert (code, line[:43]) == (1, "Redis at 127.0.0.1:1 does not answer: Error")
    assert time.monotonic() - begun < 5


def test_a_tail_says_that_redis_is_away_and_bears_with_its_restart(sh: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedRedis() as server, RedisStore(server.url, timeout_s=5.0) as store:
        monkeypatch.setenv("HORTATOR_REDIS_URL", server.url)
        monkeypatch.delenv("HORTATOR_TIMEOUT_S")
        worker = Worker(store)
        worker.beat()
        job_id = sh.out("enqueue", "x", *MODEL)
        [claimed] = worker.claim()
        worker.say(claimed, 0, ["a "])

        def outage() -> None:
            server.kill()
            time.sleep(0.3)
            server.restart()
            worker.say(claimed, 1, ["b"])
            worker.succeed(claimed, ["a ", "b"])

        later = threading.Timer(0.3, outage)
        later.start()
        code, out, err = sh("tail", job_id)
        later.join()
        assert (code, out.strip()) == (0, "a b")
        assert err.startswith("waiting up to 30 s: Redis at 127.0.0.1:")
        assert err.count("\n") == 1


def test_a_misspelt_variable_is_told_before_another_redis_is_asked(sh: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HORTATOR_NAMSPACE", "mine:")
    code, out, err = sh("status")
    assert code == 0
    assert out.startswith("MODEL")
    assert err == "warning: HORTATOR_NAMSPACE is no setting and is ignored: is HORTATOR_NAMESPACE meant?\n"


def test_each_of_several_answers_is_printed_the_first_before_the_others(sh: Shell, worker: Worker) -> None:
    job_id = sh.out("enqueue", "x", *MODEL, "--n", "3")
    [claimed] = worker.claim()
    worker.succeed_with(claimed, ["one", "two", "three"])
    for command in ("result", "tail"):
        assert sh.out(command, job_id).splitlines() == ["one", "two", "three"]


def test_tail_of_a_job_that_ends_badly_ends_its_line_before_the_reason(sh: Shell, worker: Worker) -> None:
    job_id = sh.out("enqueue", "x", *MODEL)
    [claimed] = worker.claim()
    worker.say(claimed, 0, ["a ", "b"])
    worker.fail(claimed, "crashed", "the group died")
    code, out, err = sh("tail", job_id)
    assert (code, out) == (1, "a b\n")
    assert "the group died" in err


def test_cancel_prints_the_state_of_each_job(sh: Shell, worker: Worker) -> None:
    done, queued = sh.out("enqueue", "x", *MODEL), sh.out("enqueue", "y", *MODEL)
    worker.run_one()
    assert sh.out("cancel", done, queued).splitlines() == [f"{done} succeeded", f"{queued} cancelled"]


def test_options_become_the_jobs_fields(sh: Shell, worker: Worker) -> None:
    options = "--temperature 0.5 --top-p 0.9 --top-k 3 --seed 7 --stop A --stop B --priority batch --deadline-s 60"
    sh.out("enqueue", "x", *MODEL, *options.split(), "--idempotency-key", "k")
    [claimed] = worker.claim()
    assert b"llm.generate" in claimed.message
    assert claimed.deadline_ms is not None
    assert json.loads(sh.out("enqueue", "x", *MODEL, *options.split(), "--idempotency-key", "k", "--json"))["duplicate"]


def test_a_file_has_a_job_or_a_prompt_on_each_line(sh: Shell, worker: Worker, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '"1+1="\n\n{"prompt": "2+2=", "sampling": {"max_tokens": 4}}\n{"model": "demo", "token_ids": [1]}\n'
    )
    ids = sh.out("enqueue", "--file", str(file), *MODEL).splitlines()
    assert [claimed.lease.job_id for claimed in worker.claim()] == ids
    assert len(ids) == 3


def test_columns_that_no_job_has_are_left_out_and_said(sh: Shell, worker: Worker, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    code, out, err = sh("enqueue", "--file", str(file), *MODEL)
    assert (code, err) == (0, "note: left out of the jobs, which have no such field: answer\n")
    assert worker.run_one() == out.strip()


def test_answers_of_a_file_come_in_its_order(sh: Shell, worker: Worker, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"first"\n"second"\n')

    def backwards() -> None:
        jobs: list[Claimed] = []
        while len(jobs) < 2:
            jobs += worker.claim()
        for number, job in reversed(list(enumerate(jobs))):
            worker.succeed(job, [f"answer {number}"])

    later = threading.Thread(target=backwards)
    later.start()
    assert sh.out("enqueue", "--file", str(file), *MODEL, "--wait").splitlines() == ['"answer 0"', '"answer 1"']
    later.join()


def test_a_failed_job_of_a_file_leaves_an_empty_place_and_says_why(sh: Shell, worker: Worker, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"first"\n\n"second"\n"third"\n')

    def play() -> None:
        jobs: list[Claimed] = []
        while len(jobs) < 3:
            jobs += worker.claim()
        worker.succeed(jobs[0], ["two\nlines"])
        worker.fail(jobs[1], "prompt_too_long", "too long")
        worker.succeed(jobs[2], ["last"])

    later = threading.Thread(target=play)
    later.start()
    code, out, err = sh("enqueue", "--file", str(file), *MODEL, "--wait")
    later.join()
    assert (code, [json.loads(line) for line in out.splitlines()]) == (1, ["two\nlines", None, "last"])
    assert err.startswith(f"error: {file}:3: job ")
    assert "failed (prompt_too_long)" in err


def test_a_file_that_is_refused_half_way_tells_the_line_and_what_is_in(
    sh: Shell, worker: Worker, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"first"\n' * 300 + '{"prompt": "x", "model": "never-served"}\n')
    for wait in (False, True):
        code, out, err = sh("enqueue", "--file", str(file), *MODEL, *(["--wait"] if wait else []))
        assert code == 1
        assert f"{file}:301: " in err
        ids = {claimed.lease.job_id for _ in range(40) for claimed in worker.claim()}
        assert ids
        assert ids <= set((err if wait else out).splitlines())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", ":2: not JSON"),
        ("7", ":2: neither a job"),
        ('{"prompt": "x", "max_tokens": 5}', ":2: max_tokens: write it inside sampling"),
        ('{"prompt": "x", "sampling": {"temprature": 1}}', ":2: unknown field sampling.temprature"),
        ('{"prompt": "x", "sampling": {"max_tokens": 0}}', ":2: sampling.max_tokens"),
        ('{"prompt": "x", "sampling": 7}', ":2: sampling"),
        ('{"prompt": "x", "tenant": "\\u0000"}', ":2: tenant"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_enqueued(
    sh: Shell, worker: Worker, tmp_path: Path, line: str, reason: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"fine"\n{line}\n')
    code, said = sh.error("enqueue", "--file", str(file), *MODEL)
    assert code == 2
    assert reason in said
    assert worker.claim() == ()


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["enqueue"], 2, "PROMPT or --file"),
        (["enqueue", "x", "--file", "y"], 2, "PROMPT or --file"),
        (["enqueue", "--file", "/nope.jsonl", "--model", "demo"], 2, "cannot read /nope.jsonl"),
        (["enqueue", "x", "--model", "m", "--sampling", '{"minp": 1}'], 2, "unknown field minp; there are max_tokens"),
        (["enqueue", "x", "--model", "m", "--sampling", "[1]"], 2, "--sampling: not an object"),
        (["enqueue", "x", "--model", "m", "--sampling", "{"], 2, "--sampling: not JSON"),
        (["enqueue", "x"], 2, "which model"),
        (["enqueue", "x", "--model", "a b"], 2, "model"),
        (["enqueue", "x", "--model", "never-served"], 1, "never-served"),
        (["enqueue", "", "--model", "demo"], 2, "prompt"),
        (["enqueue", "x", "--model", "demo", "--max-tokens", "-1"], 2, "sampling.max_tokens"),
        (["enqueue", "x", "--model", "demo", "--max-tokens", "many"], 2, "--max-tokens"),
        (["enqueue", "x", "--model", "demo", "--temperature", "nan"], 2, "sampling.temperature"),
        (["frobnicate"], 2, "frobnicate"),
        (["result"], 2, "ID"),
        (["keys", "new", "a b"], 2, "tenant"),
        (["dead-letters", "show", "1-1"], 1, "1-1"),
        (["dead-letters", "replay", "1-1"], 1, "1-1"),
        (["dead-letters", "replay", "x y"], 1, "x y"),
        (["worker", "--model", "/no/such/model"], 2, "/no/such/model: there is no such directory"),
        (["worker", "--model", "/", "--tp", "0"], 2, "tensor_parallel_size"),
        (["worker", "--model", "/"], 2, "no config.json"),
        (["worker"], 2, "model_path is not set"),
        (["worker", "--modle", "/x"], 2, "No such option: --modle (Possible options: "),
        (["worker", "/x"], 2, "/x: a model goes behind --model"),
        (["worker", "--model", "/x", "-E"], 2, "No such option: -E"),
        (["serve", "--port", "70000"], 2, "port"),
        (["status", "--redis-url", "http://u:sekret@h/"], 2, "redis://"),
        (["status", "--redis-url", "redis://u:sekret@127.0.0.1:1/"], 1, "127.0.0.1:1"),
        (["status", "--redis-url", "redis://u:sekret@127.0.0.1:x/"], 2, "the URL of Redis"),
        (["status", "--namespace", "no end"], 2, "namespace"),
    ],
)
def test_a_mistake_is_one_line_and_its_exit_code(sh: Shell, arguments: list[str], code: int, reason: str) -> None:
    got, line = sh.error(*arguments)
    assert reason in line
    assert got == code
    assert "sekret" not in line


def test_settings_in_the_environment_are_checked_by_name(sh: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HORTATOR_MAX_QUEUED_PER_MODEL", "minus one")
    code, line = sh.error("status")
    assert code == 2
    assert "max_queued_per_model" in line


def test_a_namespace_is_a_world_of_its_own(sh: Shell, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = sh.out("enqueue", "x", *MODEL)
    assert sh.error("result", job_id, "--namespace", "other:")[0] == 1
    monkeypatch.setenv("HORTATOR_NAMESPACE", "other:")
    assert sh.out("status") == "no model is known yet: start a worker"


def test_a_tenant_does_not_see_anothers_job(sh: Shell) -> None:
    job_id = sh.out("enqueue", "x", *MODEL, "--tenant", "acme")
    assert sh.error("result", job_id, "--tenant", "beta")[0] == 1
    assert sh.error("result", job_id, "--tenant", "acme")[1].startswith(f"job {job_id} is queued")


def test_status_shows_queues_and_groups(sh: Shell) -> None:
    sh.out("enqueue", "x", *MODEL)
    lines = [line.split() for line in sh.out("status").splitlines() if line]
    assert lines[0] == ["MODEL", "QUEUED", "OLDEST", "RUNNING", "SUSPECT", "GROUPS"]
    assert lines[1][:2] == ["demo", "1"]
    assert lines[3] == ["test-worker", "demo", "ready", "-", "1", "0/8", "-", "-", "-", "-", "-"]
    assert json.loads(sh.out("status", "--json"))["groups"][0]["group"] == "test-worker"


def test_dead_letters_are_listed_shown_harmless_and_replayed(sh: Shell, worker: Worker) -> None:
    sh.out("enqueue", "12+30=", *MODEL)
    [claimed] = worker.claim()
    worker.fail(claimed, "poison", "it took two groups down")
    letter = worker.store.bury("demo", claimed.message, reason="poison\x1b[31m", job_id=claimed.lease.job_id)
    worker.store.bury("demo", b"\x1b]0;evil\x07\xff", reason="not JSON")
    assert sh.out("status").splitlines()[-1] == "2 dead letters: hortator dead-letters list"
    assert json.loads(sh.out("status", "--json").splitlines()[-1]) == {"dead_letters": 2}
    listed = sh.out("dead-letters", "list")
    assert letter in listed
    assert "not JSON" in listed
    assert "\x1b" not in listed
    newest = json.loads(sh.out("dead-letters", "list", "--json").splitlines()[0])["letter_id"]
    shown = sh.out("dead-letters", "show", newest)
    assert r"\x1b]0;evil\x07\xff" in shown
    assert "\x1b" not in shown
    assert "its body:" not in shown
    assert '"prompt":"12+30="' in sh.out("dead-letters", "show", letter).partition("its body:\n")[2]
    assert sh.out("dead-letters", "replay", letter) == claimed.lease.job_id
    assert [again.lease.job_id for again in worker.claim()] == [claimed.lease.job_id]


def test_a_new_key_opens_the_api(sh: Shell) -> None:
    from hortator.producer.api.keys import KeyRing

    code, line, said = sh("keys", "new", "acme", "--operator")
    key = said.strip().removeprefix("key (shown once): ")
    assert code == 0
    caller = KeyRing.read([line]).caller(key)
    assert caller is not None
    assert (caller.tenant, caller.operator) == ("acme", True)
