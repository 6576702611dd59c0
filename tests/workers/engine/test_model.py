"""Loading a directory: what is refused and why, and what makes two ranks' models the same."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hortator.producer.errors import ConfigError
from hortator.workers.engine.fingerprint import fingerprint
from hortator.workers.engine.model import load_model, read_config
from hortator.workers.engine.parallel import check_divides
from hortator.workers.engine.step import Request, SamplingParams
from tests.workers.engine.checkpoints import Checkpoint, make_checkpoint
from tests.workers.engine.drive import build, run
from tests.workers.engine.meshes import TwoRanks


@pytest.fixture
def copy(llama: Checkpoint, tmp_path: Path) -> Path:
    """A directory that the test may spoil."""
    return Path(shutil.copytree(llama.path, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def to_pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def truncate(path: Path, keep: float) -> None:
    shard = path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[: int(keep * shard.stat().st_size)])


def lose_shard(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part-2.safetensors"}}))


def outside(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))


def scramble_header(path: Path) -> None:
    shard = path / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[8:12] = b"\xff{[,"
    shard.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shutil.rmtree, "is no directory"),
        (lambda p: (p / "config.json").unlink(), "no config.json"),
        (lambda p: (p / "config.json").write_text("{"), "not valid JSON"),
        (lambda p: (p / "config.json").write_text("[]"), "no JSON object"),
        (lambda p: (p / "config.json").write_text("[" * 100_000), "not valid JSON"),
        (lambda p: edit(p / "config.json", auto_map={"AutoModel": "evil.Model"}), "auto_map"),
        (
            lambda p: edit(p / "config.json", architectures=["GPT2LMHeadModel"]),
            "GPT2LMHeadModel is not supported.*Qwen3",
        ),
        (lambda p: edit(p / "config.json", architectures=None), "none is not supported"),
        (lambda p: edit(p / "config.json", quantization_config={"bits": 4}), "quantised"),
        (lambda p: edit(p / "config.json", hidden_size="many"), "cannot read"),
        (lambda p: edit(p / "config.json", num_hidden_layers=3), "lacks layers: .* names 3, it has 2"),
        (lambda p: edit(p / "config.json", num_hidden_layers=10_000), "names 10000, it has 2"),
        (lambda p: edit(p / "config.json", num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
        (lambda p: edit(p / "config.json", vocab_size=10**12), "vocab_size is 1000000000000"),
        (lambda p: edit(p / "config.json", intermediate_size=256), "different models"),
        (
            lambda p: edit(
                p / "config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
            ),
            "depend on what else",
        ),
        (to_pickled, "only pickled weights.*save_pretrained"),
        (lambda p: (p / "model.safetensors").unlink(), "has no weights"),
        (lambda p: truncate(p, 0.7), "truncated"),
        (lambda p: truncate(p, 0.001), "truncated"),
        (lambda p: (p / "model.safetensors").write_bytes(b""), "truncated"),
        (scramble_header, "damaged header"),
        (lose_shard, "lacks the shard part-2"),
        (outside, "outside the directory"),
    ],
)
def test_a_directory_that_cannot_be_served_is_refused(spoil: Callable[[Path], None], words: str, copy: Path) -> None:
    spoil(copy)
    with pytest.raises(ConfigError, match=words):
        build(copy)


def _odd(**changes: Any) -> Any:
    return pytest.param(changes, id=str(changes))


@pytest.mark.parametrize(
    "changes",
    [
        *(_odd(architectures=value) for value in ([["x"]], {"a": 1}, 5, "LlamaForCausalLM", [None])),
        *(_odd(num_key_value_heads=value) for value in (0, -4)),
        *(_odd(head_dim=value) for value in (0, -8)),
        _odd(num_attention_heads=-8),
        _odd(vocab_size=-5),
        _odd(intermediate_size=-3),
        _odd(hidden_size=0),
        _odd(max_position_embeddings=10**12),
        _odd(pad_token_id=9999),
        _odd(hidden_act="nope"),
        _odd(rope_parameters={"rope_type": "zzz", "rope_theta": 1e4}),
        _odd(rope_parameters={"rope_type": "default", "rope_theta": "x"}),
        _odd(dtype="int8"),
        _odd(eos_token_id=256),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_and_named(changes: dict[str, Any], copy: Path) -> None:
    (copy / "generation_config.json").unlink(missing_ok=True)
    edit(copy / "config.json", **changes)
    with pytest.raises(ConfigError, match=re.escape(str(copy))):
        build(copy, dtype="auto")


@pytest.mark.parametrize("ids", [[[1]], {"a": 1}, [None], -1, 1.5, 256, True, "x"])
def test_only_tokens_of_the_vocabulary_end_an_output(ids: object, copy: Path) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id"):
        read_config(copy)


def test_code_in_the_directory_is_never_run(copy: Path) -> None:
    canary = copy / "canary"
    (copy / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    edit(copy / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(ConfigError):
        build(copy)
    assert not canary.exists()


def test_shards_are_read_through_their_index(llama: Checkpoint, tmp_path: Path) -> None:
    llama.reference().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    requests = [Request(1, (3, 4, 5), SamplingParams(max_tokens=8))]
    assert run(build(tmp_path), requests).tokens == run(build(llama.path), requests).tokens


@pytest.mark.parametrize(
    ("sizes", "tp_size", "words"),
    [
        ({"heads": 8, "kv": 2, "mlp": 128}, 3, "heads=8, kv=2, mlp=128: the nearest that works is 2"),
        ({"heads": 8, "kv": 2, "mlp": 128}, 4, "does not divide kv=2: the nearest that works is 2"),
        ({"heads": 12, "kv": 12, "mlp": 96}, 5, "the nearest that works is 4"),
    ],
)
def test_a_world_size_that_does_not_divide_is_refused(sizes: dict[str, int], tp_size: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_divides(sizes, tp_size)


def test_the_refusal_reaches_whoever_starts_the_rank(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    odd = make_checkpoint("llama", tmp_path / "odd", num_attention_heads=4, num_key_value_heads=1)
    with pytest.raises(ConfigError, match="num_key_value_heads=1: the nearest that works is 1"):
        build(odd.path, TwoRanks(0, 0))


@pytest.mark.parametrize(
    "option", [{"return_dict": False}, {"output_hidden_states": True}, {"output_attentions": True}]
)
def test_what_the_config_says_about_outputs_does_not_matter(option: dict[str, bool], copy: Path) -> None:
    edit(copy / "config.json", **option)
    assert run(build(copy), [Request(1, (3, 4), SamplingParams(max_tokens=2))]).finished


def test_eos_ids_come_from_the_generation_config_first(copy: Path) -> None:
    edit(copy / "generation_config.json", eos_token_id=[7, 9])
    assert read_config(copy).eos_token_ids == (7, 9)
    (copy / "generation_config.json").unlink()
    assert read_config(copy).eos_token_ids == (0,)


def test_auto_dtype_is_the_checkpoints_own(copy: Path) -> None:
    assert read_config(copy).dtype is torch.float32
    edit(copy / "config.json", dtype="bfloat16")
    assert read_config(copy).dtype is torch.bfloat16
    assert read_config(copy, dtype="float32").dtype is torch.float32


def test_nothing_is_left_on_the_meta_device(checkpoint: Checkpoint) -> None:
    from hortator.workers.engine.parallel import SingleRank

    body = load_model(read_config(checkpoint.path), SingleRank()).body
    assert not [name for name, t in [*body.named_parameters(), *body.named_buffers()] if t.is_meta]


def test_equal_directories_have_equal_fingerprints(llama: Checkpoint, copy: Path) -> None:
    assert fingerprint(llama.path, dtype="float32", block_size=16) == fingerprint(copy, dtype="float32", block_size=16)


def test_the_way_tensors_are_spread_over_files_does_not_matter(llama: Checkpoint, tmp_path: Path) -> None:
    llama.reference().save_pretrained(tmp_path, max_shard_size="100KB")
    assert fingerprint(tmp_path, dtype="float32")["weights"] == fingerprint(llama.path, dtype="float32")["weights"]


def test_another_random_seed_has_another_fingerprint(llama: Checkpoint, tmp_path: Path) -> None:
    other = make_checkpoint("llama", tmp_path / "other", seed=1)
    ours, theirs = fingerprint(llama.path, dtype="float32"), fingerprint(other.path, dtype="float32")
    assert {name for name in ours if ours[name] != theirs[name]} == {"weights"}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda p: edit(p / "config.json", rms_norm_eps=1e-5), "config"),
        (lambda p: edit(p / "generation_config.json", eos_token_id=3), "config"),
        (lambda p: (p / "tokenizer.json").write_text("{}"), "tokenizer"),
    ],
)
def test_a_difference_in_what_lies_beside_the_weights_is_named(
    change: Callable[[Path], object], name: str, llama: Checkpoint, copy: Path
) -> None:
    change(copy)
    ours, theirs = fingerprint(llama.path, dtype="float32"), fingerprint(copy, dtype="float32")
    assert {key for key in ours if ours[key] != theirs[key]} == {name}


def test_one_finetuned_tensor_changes_the_fingerprint(llama: Checkpoint, tmp_path: Path) -> None:
    model = make_checkpoint("llama", tmp_path / "base").reference()
    model.model.layers[1].mlp.up_proj.weight.data += 1e-3
    model.save_pretrained(tmp_path / "tuned")
    assert fingerprint(tmp_path / "tuned", dtype="x")["weights"] != fingerprint(llama.path, dtype="x")["weights"]


@pytest.mark.parametrize("module", ["scheduler", "blocks", "step", "admission", "checkpoint", "fingerprint"])
def test_the_pure_core_does_not_import_torch(module: str) -> None:
    code = f"import sys, hortator.workers.engine.{module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
