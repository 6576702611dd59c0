"""`hortator plan` and `hortator plan-memory`, as a user types them."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hortator.cli import run
from hortator.topology.plan import Plan
from tests.topology.test_memory import LLAMA_8B

FLEET = """\
hostfile = "hosts"
gpu_memory_bytes = "80 GiB"

[[models]]
name = "llama"
path = "llama"
tensor_parallel_size = 2
pipeline_parallel_size = 2

[[models]]
name = "elsewhere"
path = "/models/that/only/the/hosts/have"
replicas = 2
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(LLAMA_8B))
    (tmp_path / "hosts").write_text("node-a slots=4\n10.0.0.2 4\n")
    (tmp_path / "fleet.toml").write_text(FLEET)
    return tmp_path / "fleet.toml"


def test_a_model_is_called_by_its_directory(sh: "Shell", tmp_path: Path) -> None:
    (tmp_path / "llama-3.1-8b").mkdir()
    (tmp_path / "llama-3.1-8b" / "config.json").write_text(json.dumps(LLAMA_8B))
    said = sh.error("plan-memory", "--model", tmp_path / "llama-3.1-8b", "--gpu-memory", "24 GiB")
    assert said.startswith("llama-3.1-8b: rank 0 needs ")


class Shell:
    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def out(self, *arguments: str | Path) -> str:
        code = run([str(argument) for argument in arguments])
        out, err = self._capture.readouterr()
        assert (code, err) == (0, "")
        return out

    def error(self, *arguments: str | Path) -> str:
        """The one line on stderr, of a command whose settings are wrong."""
        code = run([str(argument) for argument in arguments])
        out, err = self._capture.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err.removeprefix("error: ").strip()


@pytest.fixture
def sh(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def lines(text: str) -> list[str]:
    """Without the spaces that align columns."""
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_plan_is_shown_as_tables(sh: Shell, fleet: Path) -> None:
    found = lines(sh.out("plan", fleet))
    assert found[0] == "3 groups on 6 of 8 GPUs of 2 hosts, 2 free"
    assert "llama-0 llama auto 2 x 2 node-a node-a 1,906,816 14 x 131,072" in found
    assert "node-a 3 llama-0 3 1 1 18-31 2.8 GiB 55.7 GiB 72.0 GiB" in found
    assert "10.0.0.2 3 free" in found
    assert "llama-0 hidden states 0-1 to 2-3 8.0 KiB a token no" in found
    assert "note: elsewhere: its sizes are not known here: memory and traffic were not checked" in found


def test_a_fleet_of_cpus_has_slots_and_the_device_is_said(sh: Shell, fleet: Path) -> None:
    fleet.write_text(FLEET.replace("[[models]]", '[environment]\nHORTATOR_DEVICE = "cpu"\n[[models]]', 1))
    said = sh.out("plan", fleet)
    assert lines(said)[0] == "3 groups on 6 of 8 slots of 2 hosts, 2 free"
    assert "elsewhere-0 elsewhere cpu 1 x 1 10.0.0.2 10.0.0.2 - -" in lines(said)
    assert "GPU" not in said
    assert "GPU" not in sh.out("plan", fleet, "--mermaid")
    plan = Plan.model_validate_json(sh.out("plan", fleet, "--json"))
    assert {group.device for group in plan.groups} == {"cpu"}
    fleet.write_text(fleet.read_text().replace("replicas", 'device = "cuda"\nreplicas'))
    assert lines(sh.out("plan", fleet))[0].startswith("3 groups on 6 of 8 GPUs")


def test_the_plan_reckons_with_the_settings_that_stand_in_the_environment(sh: Shell, fleet: Path) -> None:
    said = '[environment]\nHORTATOR_PIPELINE_PARALLEL_SIZE = "1"\nHORTATOR_TENSOR_PARALLEL_SIZE = "2"\n'
    fleet.write_text(said + FLEET.replace("hostfile =", "", 1).replace('"hosts"\n', "", 1))
    plan = Plan.model_validate_json(sh.out("plan", fleet, "--json", "-H", fleet.parent / "hosts"))
    assert [(g.name, g.tensor_parallel_size, g.pipeline_parallel_size) for g in plan.groups] == [
        ("llama-0", 2, 2),
        ("elsewhere-0", 2, 1),
        ("elsewhere-1", 2, 1),
    ]


def test_json_is_the_whole_plan_in_one_line(sh: Shell, fleet: Path) -> None:
    (line,) = sh.out("plan", fleet, "--json").splitlines()
    plan = Plan.model_validate_json(line)
    assert [group.name for group in plan.groups] == ["llama-0", "elsewhere-0", "elsewhere-1"]
    assert plan.groups[0].hosts[0].devices == (0, 1, 2, 3)


def test_pictures_come_as_mermaid_and_as_svg(sh: Shell, fleet: Path, tmp_path: Path) -> None:
    assert sh.out("plan", fleet, "--mermaid", "--svg", tmp_path / "plan.svg").startswith("flowchart LR\n")
    assert ElementTree.parse(tmp_path / "plan.svg").getroot().tag.endswith("svg")
    assert "cannot write" in sh.error("plan", fleet, "--svg", tmp_path / "no" / "plan.svg")


@pytest.mark.parametrize(
    ("options", "slots"),
    [
        (["--include", "10.0.0.2@node-a:0,1"], {"node-a": (0, 1), "10.0.0.2": (0, 1, 2, 3)}),
        (["--exclude", "node-a:3"], {"node-a": (0, 1, 2), "10.0.0.2": (0, 1, 2, 3)}),
        (["--num_gpus", "3"], {"node-a": (0, 1, 2), "10.0.0.2": (0, 1, 2)}),
    ],
)
def test_filters_are_deepspeeds(sh: Shell, fleet: Path, options: list[str], slots: dict[str, tuple[int, ...]]) -> None:
    plan = Plan.model_validate_json(sh.out("plan", fleet, "--json", *options))
    assert {host.address: host.slots for host in plan.hosts} == slots


def test_another_hostfile_may_be_given(sh: Shell, fleet: Path, tmp_path: Path) -> None:
    (tmp_path / "others").write_text("x 6\n")
    assert Plan.model_validate_json(sh.out("plan", fleet, "--json", "-H", tmp_path / "others")).num_slots == 6


def test_many_ranks_are_shown_by_hosts_that_are_alike(sh: Shell, fleet: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("".join(f"h{n} 8\n" for n in range(20)))
    fleet.write_text(FLEET.replace("replicas = 2", "replicas = 100"))
    found = lines(sh.out("plan", fleet))
    assert "12 h1, h2, h3 and 9 more 8 0 elsewhere: 8 - 80.0 GiB" in found
    assert len(found) < 40


def test_what_crosses_hosts_in_any_group_of_a_model_is_shown(sh: Shell, fleet: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a 4\nb 4\nc 2\nd 2\n")
    fleet.write_text(FLEET.split('[[models]]\nname = "elsewhere', maxsplit=1)[0] + "replicas = 3\n")
    found = lines(sh.out("plan", fleet))
    assert "llama-0 and 1 more hidden states 0-1 to 2-3 8.0 KiB a token no" in found
    assert "llama-2 hidden states 0-1 to 2-3 8.0 KiB a token yes" in found


@pytest.mark.parametrize(
    ("change", "options", "problem"),
    [
        (("", ""), ["--num_nodes", "1"], "the fleet needs 6 GPUs (llama 1 x tp 2 x pp 2, elsewhere 2 x tp 1 x pp 1), "
         "but there are 4 (node-a: 4): what fits: llama with pipeline_parallel_size=1"),
        (("", ""), ["--num_gpus", "5"], "--num_gpus 5: host node-a has 4 slots"),
        (("", ""), ["--include", "node-a", "--num_nodes", "1"], "cannot be given with --include or --exclude"),
        (("", ""), ["--json", "--mermaid"], "--json and --mermaid cannot be given together"),
        (('"hosts"', '"nowhere"'), [], "cannot read the hostfile"),
        (('hostfile = "hosts"', ""), [], "hostfile: is missing: add hostfile"),
        (("replicas", "replicsa"), [], "models['elsewhere'].replicsa: there is no such key; did you mean replicas?"),
        (('"80 GiB"', '"4 GiB"'), [], "llama: rank 0 needs 11.0 GiB"),
        (("[[models]]", "[hosts.node-x]\n[[models]]"), [], "hosts.node-x: the hostfile has no such host"),
        (("hostfile", 'redis_url = "http://foo"\nhostfile'), [], "redis_url: the URL of Redis begins with none of redis://"),
        (("[[models]]", '[environment]\nHORTATOR_MAX_NUM_SEQZ = "8"\n[[models]]'), [],
         "environment: HORTATOR_MAX_NUM_SEQZ is no setting: is HORTATOR_MAX_NUM_SEQS meant?"),
        (("[[models]]", '[environment]\nHORTATOR_MAX_ATTEMPTS = "many"\n[[models]]'), [],
         "environment.HORTATOR_MAX_ATTEMPTS: Input should be a valid integer"),
        (("[[models]]", '[environment]\nHORTATOR_HEARTBEAT_S = "5"\n[[models]]'), [],
         "fleet.toml: models['llama'] with [environment]: heartbeat_s=5 leaves no time for a beat"),
        (("[[models]]", '[environment]\nHORTATOR_LEASE_S = "long"\n[[models]]'), [],
         "fleet.toml: environment.HORTATOR_LEASE_S: Input should be a valid number"),
        (("[[models]]", '[environment]\nHORTATOR_KEEPER_PORT = "99999"\n[[models]]'), [],
         "fleet.toml: environment.HORTATOR_KEEPER_PORT: Input should be less than or equal to 65535"),
        (("[[models]]", '[environment]\nHORTATOR_REDIS_URL = "redis://h/0"\n[[models]]'), [],
         "fleet.toml: environment.HORTATOR_REDIS_URL: it is the same for all models: put it at the top of the file"),
        (("[[models]]", '[environment]\nHORTATOR_SSH_USER = "me"\n[[models]]'), [],
         "environment.HORTATOR_SSH_USER: how hosts are reached is said under [ssh], as user"),
        (("[[models]]", '[environment]\nHORTATOR_CONTROL_PORT = "7500"\n[[models]]'), [],
         "environment.HORTATOR_CONTROL_PORT: elsewhere-0, elsewhere-1 have their leaders on 10.0.0.2, and one port"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(
    sh: Shell, fleet: Path, change: tuple[str, str], options: list[str], problem: str
) -> None:
    fleet.write_text(fleet.read_text().replace(*change, 1) if change[0] else fleet.read_text())
    assert problem in sh.error("plan", fleet, *options)


def test_a_models_memory_is_shown_for_each_rank(sh: Shell, fleet: Path) -> None:
    model = fleet.parent / "llama"
    found = lines(sh.out("plan-memory", "--model", model, "--tp", "2", "--pp", "2", "--gpu-memory", "24 GiB"))
    assert "3 1 1 18-31 2.8 GiB 1.9 GiB 28.0 KiB 11.7 GiB 16.5 GiB 21.6 GiB" in found
    assert "fits: 438,816 KV tokens, 3 sequences of 131,072 tokens at once" in found


def test_a_models_memory_as_json_has_every_number(sh: Shell, fleet: Path) -> None:
    found = json.loads(sh.out("plan-memory", "--model", fleet.parent / "llama", "--json"))
    assert found["kv_tokens"] is None
    (rank,) = found["ranks"]
    assert rank["needed_bytes"] == rank["weight_bytes"] + rank["workspace_bytes"] + (131072 + 16) * rank["token_bytes"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--gpu-memory", "24 GiB"], "what fits: max_model_len=38160, or tensor_parallel_size=2"),
        (["--gpu-memory", "24"], '--gpu-memory 24 would be so many bytes: write the unit, as "24 GiB"'),
        (["--gpu-memory", "3x"], "--gpu-memory '3x' is no size: give one as \"80 GiB\" or in bytes"),
        (["--tp", "3"], "tensor_parallel_size=3 does not divide"),
        (["--dtype", "int8"], "dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16' (got 'int8')"),
    ],
)
def test_memory_that_does_not_fit_is_refused_in_one_line(
    sh: Shell, fleet: Path, options: list[str], problem: str
) -> None:
    assert problem in sh.error("plan-memory", "--model", fleet.parent / "llama", *options)


@pytest.mark.parametrize("rest", [LLAMA_8B, {}], ids=["sizes of a llama", "no sizes"])
def test_an_architecture_that_the_engine_refuses_is_refused_by_its_name(
    sh: Shell, fleet: Path, rest: dict[str, object]
) -> None:
    config = fleet.parent / "llama" / "config.json"
    config.write_text(json.dumps(rest | {"architectures": ["OPTForCausalLM"]}))
    for command in (["plan-memory", "--model", str(config.parent)], ["plan", str(fleet)]):
        assert "architecture OPTForCausalLM is not supported; supported: LlamaForCausalLM" in sh.error(*command)


def test_the_documentations_example_is_a_plan(sh: Shell, tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "08-many-nodes.md").read_text()
    hosts, fleet = (page.split(f"```{kind}\n")[1].split("```")[0] for kind in ("text", "toml"))
    (tmp_path / "hosts").write_text(hosts)
    (tmp_path / "fleet.toml").write_text(fleet)
    plan = Plan.model_validate_json(sh.out("plan", tmp_path / "fleet.toml", "--json"))
    assert [(host.address, len(host.free)) for host in plan.hosts] == [("node-a", 0), ("node-b", 5), ("10.0.0.17", 0)]


def test_the_demonstration_fleet_is_planned_as_it_stands_and_found_fit_with_a_redis(
    sh: Shell, tmp_path: Path, newest_redis_url: str
) -> None:
    file = Path(__file__).parents[1] / "demo" / "fleet.toml"
    plan = Plan.model_validate_json(sh.out("plan", file, "--json"))
    assert [(group.name, group.tensor_parallel_size, group.hosts[0].host) for group in plan.groups] == [
        ("demo-0", 2, "localhost")
    ]
    assert (plan.num_free, plan.notes) == (0, ())
    with_redis = tmp_path / "demo"
    shutil.copytree(file.parent, with_redis)
    (with_redis / "fleet.toml").write_text(f'redis_url = "{newest_redis_url}"\n{file.read_text()}')
    assert "fit to run" in sh.out("doctor", with_redis / "fleet.toml", "--no-links")
