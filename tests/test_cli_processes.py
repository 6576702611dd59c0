"""Commands as processes: servers that start, stop and say why they cannot; installs without the extras."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from hortator.producer.embedded import EmbeddedRedis
from hortator.producer.redis_store import RedisStore
from hortator.workers.celery import EX_CONFIG
from tests.producer.api_process import Worker, job, wait_for
from tests.topology.test_memory import LLAMA_8B

SIGINT_IGNORED = ("bash", "-c", 'trap "" INT; exec "$@"', "bash")
"""How a shell starts what runs in its background."""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "hortator", *arguments]


def hortator(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=os.environ | environment, capture_output=True, text=True, timeout=30, check=False
    )


@contextmanager
def running(*arguments: str, before: tuple[str, ...] = (), **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A server in the foreground; killed at the end if the test did not stop it."""
    process = subprocess.Popen(
        [*before, *command(*arguments)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def serving(process: subprocess.Popen[str]) -> str:
    """The address that a starting API prints."""
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith("hortator API on http://"), line
    return line.split()[3]


def test_redis_prints_its_url_serves_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    with running("redis", "--port", "0", "--dir", str(tmp_path)) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with RedisStore(url, timeout_s=5.0) as store:
            store.check()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        host, port = url.removeprefix("redis://").removesuffix("/0").split(":")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)))


def test_ctrl_c_ends_redis_although_it_was_started_with_sigint_ignored(tmp_path: Path) -> None:
    with running("redis", "--port", "0", "--dir", str(tmp_path), before=SIGINT_IGNORED) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


def test_redis_ends_with_sigterm_and_leaves_no_server(tmp_path: Path) -> None:
    with running("redis", "--port", "0") as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().strip().removesuffix("/0").rpartition(":")[2])
        process.terminate()
        assert process.wait(10) == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def test_redis_on_a_taken_port_is_one_line() -> None:
    with taken_port() as port:
        done = hortator("redis", "--port", str(port))
    assert done.returncode == 1
    assert f"port {port} is already in use" in done.stderr
    assert done.stderr.count("\n") == 1


def test_serve_on_a_taken_port_is_one_line_that_names_it(newest_redis_url: str) -> None:
    with taken_port() as port:
        done = hortator("serve", "--port", str(port), HORTATOR_REDIS_URL=newest_redis_url)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot listen on 127.0.0.1:{port}: Address already in use; choose another")
    assert done.stderr.count("\n") == 1


def test_serve_accepts_jobs_and_ends_with_sigterm(newest_redis_url: str) -> None:
    with (
        RedisStore(newest_redis_url, timeout_s=5.0) as store,
        running("serve", "--port", "0", HORTATOR_REDIS_URL=newest_redis_url) as process,
    ):
        url = serving(process)
        worker = Worker(store)
        worker.beat()
        job_id = httpx.post(f"{url}/v1/jobs", json=job()).json()["id"]
        worker.run_one()
        assert httpx.get(f"{url}/v1/jobs/{job_id}", params={"wait_s": 5}).json()["result"]["text"] == "42"
        process.terminate()
        assert process.wait(5) in (0, -signal.SIGTERM)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_a_stopping_serve_answers_who_waits(newest_redis_url: str) -> None:
    with (
        RedisStore(newest_redis_url, timeout_s=5.0) as store,
        running("serve", "--port", "0", HORTATOR_REDIS_URL=newest_redis_url) as process,
    ):
        url = serving(process)
        Worker(store).beat()
        job_id = httpx.post(f"{url}/v1/jobs", json=job()).json()["id"]
        with httpx.stream("GET", f"{url}/v1/jobs/{job_id}/tokens", timeout=20) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("retry:")
            process.terminate()
            began = time.monotonic()
            assert "event: done" not in list(lines)
            assert time.monotonic() - began < 3
        assert process.wait(5) in (0, -signal.SIGTERM)


def test_a_crowd_that_asks_nothing_takes_serve_no_descriptor_that_it_needs(newest_redis_url: str) -> None:
    few = ("sh", "-c", 'ulimit -n 64; exec "$@"', "sh")
    with running("serve", "--port", "0", before=few, HORTATOR_REDIS_URL=newest_redis_url) as process:
        url = serving(process)
        crowd = [socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5) for _ in range(200)]
        refused = httpx.get(f"{url}/readyz")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_connections")
        for silent in crowd:
            silent.close()
        wait_for("readyz", lambda: httpx.get(f"{url}/readyz").status_code == 200)
        process.terminate()
        process.wait(5)
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_word_in_the_log(newest_redis_url: str) -> None:
    head = "POST /v1/jobs HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"
    with running("serve", "--port", "0", HORTATOR_REDIS_URL=newest_redis_url) as process:
        url = serving(process)
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5) as leaver:
            leaver.sendall(head.encode() + b'{"model": "demo", "prompt": "12+30=", "x"')
        left = 'method="POST",route="/v1/jobs",status="499"'
        wait_for("the leaver to be counted", lambda: left in httpx.get(f"{url}/metrics").text)
        process.terminate()
        process.wait(5)
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_serve_without_redis_starts_says_so_and_recovers(tmp_path: Path) -> None:
    redis = EmbeddedRedis(tmp_path)
    redis.start()
    redis.kill()
    try:
        with running("serve", "--port", "0", "--redis-url", redis.url) as process:
            assert process.stderr is not None
            assert "warning: Redis at 127.0.0.1" in process.stderr.readline()
            url = serving(process)
            assert httpx.get(f"{url}/readyz").status_code == 503
            redis.restart()
            wait_for("readyz", lambda: httpx.get(f"{url}/readyz").status_code == 200)
    finally:
        redis.stop()


def test_serve_refuses_a_redis_that_evicts(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as redis:
        from redis import Redis

        with Redis.from_url(redis.url) as raw:
            raw.config_set("maxmemory-policy", "allkeys-lru")
        done = hortator("serve", "--port", "0", "--redis-url", redis.url)
    assert done.returncode == 1
    assert "allkeys-lru" in done.stderr
    assert done.stderr.count("\n") == 1


def test_serve_never_prints_the_redis_password() -> None:
    with running("serve", "--port", "0", "--redis-url", "redis://me:sekret@127.0.0.1:1/0") as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(2)]
        assert "redis://me:***@127.0.0.1:1/0" in lines[1]
        assert "sekret" not in "".join(lines)


def test_serve_refuses_a_key_file_that_holds_no_key(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("hk_a-key-in-clear acme\n")
    done = hortator("serve", HORTATOR_API_KEYS_FILE=str(tmp_path / "keys"))
    assert done.returncode == 2
    assert f"{tmp_path / 'keys'}:1" in done.stderr
    assert "in-clear" not in done.stderr


def test_worker_becomes_a_celery_worker_with_the_settings_of_its_flags(tmp_path: Path) -> None:
    """A stand-in for celery shows what it was started with."""
    stand_in = tmp_path / "celery"
    stand_in.mkdir()
    (stand_in / "__init__.py").touch()
    show = "import json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))"
    (stand_in / "__main__.py").write_text(show)
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA_8B))
    flags = f"--model {model} --tp 2 --device cpu --max-num-seqs 8 --group g1".split()
    flags += ["--kv-cache-bytes", "2GiB", "--block-size", "32", "--", "--pidfile", "p"]
    done = hortator("worker", *flags, PYTHONPATH=str(tmp_path), HORTATOR_REDIS_URL="redis://:sekret@h/0")
    assert done.returncode == 0, done.stderr
    arguments, environment = json.loads(done.stdout)
    assert arguments == [
        *("-A", "hortator.workers", "worker", "-Q", "tiny", "-l", "INFO", "-n", "g1@%h", "--pidfile", "p")
    ]
    assert environment["HORTATOR_MODEL_PATH"] == str(model)
    assert environment["HORTATOR_TENSOR_PARALLEL_SIZE"] == "2"
    assert environment["HORTATOR_MAX_NUM_SEQS"] == "8"
    assert (environment["HORTATOR_KV_CACHE_BYTES"], environment["HORTATOR_BLOCK_SIZE"]) == (str(2 << 30), "32")
    assert "sekret" not in " ".join(arguments)


def test_a_wrong_setting_is_one_line_before_anything_starts(tmp_path: Path) -> None:
    """The same of `hortator worker` and of celery's own command, each with the exit code that it has for that."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | {"architectures": ["OPTForCausalLM"]}))
    said = "architecture OPTForCausalLM is not supported; supported: LlamaForCausalLM"
    done = hortator("worker", "--model", str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert said in done.stderr
    celery = [sys.executable, "-m", "celery", "-A", "hortator.workers", "worker"]
    environment = os.environ | {"HORTATOR_MODEL_PATH": str(tmp_path)}
    plain = subprocess.run(celery, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert (plain.returncode, plain.stderr.count("\n")) == (EX_CONFIG, 1)
    assert said in plain.stderr


BLOCK = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {extra!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from hortator.__main__ import main
main()
"""
API_EXTRA = {"fastapi", "starlette", "uvicorn", "prometheus_client"}
WORKER_EXTRA = {"torch", "celery", "kombu", "transformers", "deepspeed", "tokenizers", "safetensors", "psutil"}


def without_extras(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`hortator` as in a plain `pip install hortator`."""
    code = BLOCK.format(extra=API_EXTRA | WORKER_EXTRA)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "extra"), [(["serve"], "api"), (["worker", "--model", "/x"], "worker"), (["drain", "g"], "worker")]
)
def test_a_missing_extra_is_one_line_that_says_what_to_install(arguments: list[str], extra: str) -> None:
    done = without_extras(*arguments)
    assert done.returncode == 1
    assert f"pip install 'hortator[{extra}]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_producers_commands_need_no_extra(newest_redis_url: str) -> None:
    with RedisStore(newest_redis_url, timeout_s=5.0) as store:
        Worker(store).beat()
    done = without_extras("enqueue", "x", "--model", "demo", HORTATOR_REDIS_URL=newest_redis_url)
    assert done.returncode == 0, done.stderr
    assert without_extras("--help").returncode == 0


def test_a_reader_of_the_output_may_leave() -> None:
    done = subprocess.run(
        f"{sys.executable} -m hortator --help | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_python_imports_is_one_line(newest_redis_url: str) -> None:
    for wait_s in (0.05, 0.1, 0.15, 0.2, 0.3):
        with running("status", HORTATOR_REDIS_URL=newest_redis_url) as process:
            time.sleep(wait_s)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
        if "hortator/__main__.py" not in said and "Traceback" in said:
            continue  # Python itself had not begun with us yet
        assert process.returncode in (0, 130, -signal.SIGINT)
        assert said in ("", "interrupted\n")


def test_ctrl_c_in_a_wait_tells_the_ids(newest_redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "two.jsonl").write_text('"a"\n"b"\n')
    with RedisStore(newest_redis_url, timeout_s=5.0) as store:
        worker = Worker(store)
        worker.beat()
        wait = ("enqueue", "--file", str(tmp_path / "two.jsonl"), "--model", "demo", "--wait")
        with running(*wait, HORTATOR_REDIS_URL=newest_redis_url) as process:
            ids: list[str] = []

            def both() -> bool:
                ids.extend(claimed.lease.job_id for claimed in worker.claim())
                return len(ids) == 2

            wait_for("both jobs", both)
            process.send_signal(signal.SIGINT)
            out, said = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert said.splitlines()[1:] == [*ids, "interrupted"]


@pytest.mark.parametrize("where", [">/dev/full", ">&-"])
def test_output_that_cannot_be_written_is_one_line_and_loses_no_id(where: str, newest_redis_url: str) -> None:
    with RedisStore(newest_redis_url, timeout_s=5.0) as store:
        worker = Worker(store)
        worker.beat()
        done = subprocess.run(
            f"{sys.executable} -m hortator enqueue x --model demo {where}",
            env=os.environ | {"HORTATOR_REDIS_URL": newest_redis_url},
            shell=True,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
            check=False,
        )
        [claimed] = worker.claim()
    assert done.returncode == 74
    assert claimed.lease.job_id in done.stderr.splitlines()
    assert done.stderr.splitlines()[-1].startswith("error: standard output cannot be written: ")
    assert "Traceback" not in done.stderr
