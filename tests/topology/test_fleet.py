"""The fleet file: what it may say, and how it says no."""

import re
from pathlib import Path

import pytest

from hortator.producer.schema import Job
from hortator.producer.settings import RuleSettings
from hortator.topology.errors import BadFleet
from hortator.topology.fleet import ModelSpec, parse_fleet, read_fleet
from hortator.workers.settings import WorkerSettings

MODEL = '[[models]]\nname = "m"\npath = "/models/m"\n'
OWN_KEYS = {"name", "path", "replicas"}
PLACED_BY_THE_PLAN = {"group", "control_host", "control_port", "store_host", "store_port", "model", "model_path"}
SAID_BY_WHO_STARTS_IT = {
    *("hosts", "launcher", "front_ranks", "secret_file", "keeper_port", "remote_python"),
    *("ssh_user", "ssh_port", "ssh_identity_file", "ssh_known_hosts_file", "ssh_connect_timeout_s", "rank_variables"),
}
OF_THE_FLEET = {"redis_url", "namespace"}
OF_THE_NAMESPACE = set(RuleSettings.model_fields)  # the same for producers too: they go into `environment`


def refusal(text: str) -> str:
    with pytest.raises(BadFleet, match=r"^fleet\.toml") as problem:
        parse_fleet(text)
    return str(problem.value)


def test_a_rule_of_the_whole_namespace_is_told_its_place() -> None:
    for name in OF_THE_NAMESPACE - set(ModelSpec.model_fields):
        said = refusal(MODEL + f"{name} = 3")
        assert f"HORTATOR_{name.upper()} in [environment]" in said
        assert "did you mean" not in said


def test_a_model_may_have_every_setting_of_the_worker_with_the_workers_own_default() -> None:
    ours, theirs = ModelSpec.model_fields, WorkerSettings.model_fields
    assert (
        set(theirs) - PLACED_BY_THE_PLAN - SAID_BY_WHO_STARTS_IT - OF_THE_FLEET - OF_THE_NAMESPACE
        <= set(ours) - OWN_KEYS
    )
    for name in set(ours) & set(theirs):
        assert (name, ours[name].default) == (name, theirs[name].default)
        if name != "kv_cache_bytes":  # which the file may say in GiB
            assert (name, ours[name].metadata) == (name, theirs[name].metadata)


def test_the_workers_settings_take_what_the_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = parse_fleet(
        'redis_url = "redis://:secret@r:1/0"\nnamespace = "n"\n' + MODEL + "max_num_seqs = 7\nlease_s = 5\n"
        'dtype = "bfloat16"\nkv_cache_bytes = "1 GiB"\ntensor_parallel_size = 2\nreplicas = 3\n'
    )
    for name, value in fleet.worker_environment(fleet.models[0]).items():
        monkeypatch.setenv(name, value)
    settings = WorkerSettings()
    assert settings.model_dump(
        include={"redis_url", "namespace", "queue", "model_path", "max_num_seqs", "lease_s"}
    ) == {
        "redis_url": "redis://:secret@r:1/0",
        "namespace": "n",
        "model_path": Path("/models/m"),
        "max_num_seqs": 7,
        "lease_s": 5.0,
    }
    assert (settings.queue, settings.dtype, settings.kv_cache_bytes, settings.world_size) == ("m", "bfloat16", 2**30, 2)


def test_what_the_file_does_not_say_is_left_to_the_worker() -> None:
    fleet = parse_fleet(MODEL)
    assert fleet.worker_environment(fleet.models[0]) == {
        "HORTATOR_MODEL": "m",
        "HORTATOR_MODEL_PATH": "/models/m",
    }


def test_a_queue_has_the_same_names_in_the_file_as_on_the_wire() -> None:
    assert ModelSpec.model_fields["name"].metadata == Job.model_fields["model"].metadata


def test_paths_are_taken_from_the_files_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "f.toml").write_text(
        'hostfile = "hosts"\n[ssh]\nidentity_file = "~/key"\n[[models]]\nname = "m"\npath = "a/../b"\n'
    )
    fleet = read_fleet(tmp_path / "f.toml")
    assert fleet.hostfile == tmp_path / "hosts"
    assert fleet.ssh.identity_file == Path("/home/me/key")
    assert fleet.models[0].path == tmp_path / "b"


def test_a_host_may_have_other_gpus_than_the_rest() -> None:
    fleet = parse_fleet('gpu_memory_bytes = "80 GiB"\n[hosts."FE80::01"]\ngpu_memory_bytes = 5\n' + MODEL)
    assert (fleet.gpu_memory("fe80::1"), fleet.gpu_memory("other")) == (5, 80 * 2**30)
    assert parse_fleet(MODEL).gpu_memory("other") is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "models: there are none: add at least one [[models]] table"),
        ("models = []", "models: there are none"),
        ("models = 3", "models: Input should be a valid tuple (got '3')"),
        ('[[models]]\nname = "m"', "models['m'].path: is missing: give the model's directory"),
        ('[[models]]\npath = "p"', "models[number 1].name: is missing: add it"),
        ("x =", "not valid TOML: Invalid value (at end of document)"),
        ('redis_ur = "x"\n' + MODEL, "redis_ur: there is no such key; did you mean redis_url?"),
        (MODEL + "tensor_paralel_size = 2", "models['m'].tensor_paralel_size: there is no such key; did you mean"),
        (MODEL + 'model_path = "x"', "models['m'].model_path: a model's directory is its 'path'"),
        (MODEL + 'group = "x"', "models['m'].group: groups are named by model and replica: leave it out"),
        (MODEL + "max_attempt_s = 1", "models['m'].max_attempt_s: there is no such key; known here: name"),
        (MODEL + "zzz = 1", "models['m'].zzz: there is no such key; known here: name, path, replicas"),
        (MODEL + "replicas = 0", "models['m'].replicas: Input should be greater than or equal to 1 (got '0')"),
        (MODEL + 'device = "gpu"', "models['m'].device: Input should be 'auto', 'cpu' or 'cuda' (got 'gpu')"),
        (MODEL + 'kv_cache_bytes = "lots"', "models['m'].kv_cache_bytes: could not parse value and unit"),
        (MODEL + "lease_s = nan", "models['m'].lease_s: Input should be a finite number"),
        (MODEL + '[ssh]\nuser = "-oProxyCommand=x"', "ssh.user: '-oProxyCommand=x' is not the name of a user"),
        (MODEL + f'[ssh]\nuser = "{"u" * 42}"', "is not the name of a user (32 letters, digits and _.-)"),
        (
            'python = "/opt/my venv/bin/python"\n' + MODEL,
            "python: '/opt/my venv/bin/python': a path of letters, digits",
        ),
        (MODEL + "[ssh]\nport = 0", "ssh.port: Input should be greater than or equal to 1"),
        (MODEL + "[hosts.-x]", "hosts.-x: host '-x' begins with '-'"),
        (
            MODEL + "[hosts.x]\ngpu_memory = 2",
            "hosts.x.gpu_memory: there is no such key; did you mean gpu_memory_bytes?",
        ),
        (MODEL + '[environment]\n"A B" = "x"', "environment.A B: 'A B' is no variable's name"),
        ('hostfile = "a\\u0000b"\n' + MODEL, "hostfile: has a control character: remove it"),
        ('hostfile = "~nobody-here/h"\n' + MODEL, "hostfile: there is no such user"),
        (MODEL + MODEL, "'m' stands twice: rename one, or use replicas"),
        (MODEL + MODEL.replace('"m"', '"m/x"') + MODEL.replace('"m"', '"m.x"'), "groups of the same names as 'm/x'"),
    ],
)
def test_what_is_wrong_is_said_with_its_key_and_what_to_do(text: str, problem: str) -> None:
    assert problem in refusal(text)


def test_a_password_in_the_redis_url_is_not_repeated() -> None:
    assert "secret" not in refusal('redis_url = "redis://:secret@\\u0001"\n' + MODEL)


IN_YAML = """
redis_url: redis://r/0
gpu_memory_bytes: 80 GiB
hosts:
  10.0.0.17: {gpu_memory_bytes: 48 GiB}
environment: {NCCL_DEBUG: no, NCCL_SOCKET_IFNAME: "eth1"}
ssh:
  port: 2222
models:
  - name: m
    path: /models/m
    max_model_len: ~
    gpu_memory_utilization: 0.5
    prefix_caching: false
"""
IN_TOML = """
redis_url = "redis://r/0"
gpu_memory_bytes = "80 GiB"
hosts."10.0.0.17" = { gpu_memory_bytes = "48 GiB" }
environment = { NCCL_DEBUG = "no", NCCL_SOCKET_IFNAME = "eth1" }
[ssh]
port = 2222
[[models]]
name = "m"
path = "/models/m"
gpu_memory_utilization = 0.5
prefix_caching = false
"""


@pytest.mark.parametrize("name", ["fleet.yaml", "fleet.YML"])
def test_a_fleet_may_be_written_in_yaml_with_the_same_keys(name: str) -> None:
    assert parse_fleet(IN_YAML, source=Path(name)) == parse_fleet(IN_TOML)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "models: there are none"),
        ("- a", "is no table of keys"),
        ("a: [", "is not valid YAML: while parsing"),
        ("models: []\nmodels: []", "is not valid YAML: line 2: key 'models' stands twice"),
        ("models:\n  - name: m\n    'name': n", "line 3: key 'name' stands twice"),
        ("a: &x 1", "line 1: anchors (&) and aliases (*) are not read"),
        ("a: *x", "line 1: anchors (&) and aliases (*) are not read"),
        ("a: !!python/object/apply:os.system [id]", "line 1: tags (!) are not read"),
        ("? [a]\n: 1", "line 1: a key must be a word"),
        ("a: 1\n---\na: 2", "expected a single document"),
        ("redis_ur: x", "redis_ur: there is no such key; did you mean redis_url?"),
        (
            "models: [{name: m, engine: echo, prefix_caching: yes please}]",
            "models['m'].prefix_caching: Input should be",
        ),
        ("models: [{name: m, engine: echo, max_num_seqs: 1:30}]", "max_num_seqs: Input should be a valid integer"),
        ("models: [{name: 2026-01-01, engine: echo, grace_s: -1}]", "models['2026-01-01'].grace_s: "),
        ("a: " + "[" * 3000, "nested too deeply"),
    ],
)
def test_what_is_wrong_in_yaml_is_said_with_its_place(text: str, problem: str) -> None:
    with pytest.raises(BadFleet, match=r"^fleet\.yaml") as caught:
        parse_fleet(text, source=Path("fleet.yaml"))
    assert problem in str(caught.value)


@pytest.mark.parametrize("name", ["fleet.json", "fleet", "fleet.conf"])
def test_a_file_of_another_kind_is_told_what_is_read(name: str) -> None:
    with pytest.raises(BadFleet, match=r"ends in \.toml, \.yaml, \.yml: rename it"):
        parse_fleet(IN_TOML, source=Path(name))


@pytest.mark.parametrize(("content", "problem"), [(b"\xff", "not UTF-8 at byte 0"), (b"#" * (1 << 21), "larger than")])
def test_a_file_that_is_no_text_of_ours_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "f.toml").write_bytes(content)
    with pytest.raises(BadFleet, match=problem):
        read_fleet(tmp_path / "f.toml")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadFleet, match=re.escape(f"cannot read the fleet file {tmp_path / 'f.toml'}: No such file")):
        read_fleet(tmp_path / "f.toml")
