"""Reading parts of a checkpoint: the right bytes, and no more memory than they need."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hortator.producer.errors import ConfigError
from hortator.workers.engine.checkpoint import read_entries
from hortator.workers.engine.parallel import WHOLE, Cut
from hortator.workers.engine.weights import ShardReader
from tests.workers.engine import footprint
from tests.workers.engine.group import ROOT

CPU = torch.device("cpu")


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], Cut]:
    """A shape of one to three dimensions, and up to three ranges of one of them."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    dim = draw(st.integers(0, len(shape) - 1))
    bounds = sorted(draw(st.lists(st.integers(0, shape[dim]), min_size=2, max_size=6)))
    ranges = tuple(range(a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=False))
    return shape, draw(st.sampled_from([WHOLE, Cut(dim, ranges)]))


@settings(max_examples=300)
@given(case=cuts(), buffer_bytes=st.integers(8, 400), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_part_of_any_tensor_is_read_right_through_any_buffer(
    case: tuple[tuple[int, ...], Cut], buffer_bytes: int, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape, cut = case
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    tensor = torch.randperm(torch.Size(shape).numel()).to(dtype).view(shape)
    save_file({"before": torch.ones(3), "it": tensor}, folder / "model.safetensors")
    target = torch.full(cut.shape(shape), -1.0)
    with ShardReader(CPU, buffer_bytes=buffer_bytes) as reader:
        reader.read(read_entries(folder)["it"], cut, target)
    expected = tensor
    if cut.dim is not None:
        indices = [index for wanted in cut.ranges for index in wanted]
        expected = tensor.index_select(cut.dim, torch.tensor(indices, dtype=torch.int64))
    assert target.equal(expected.float())


def test_a_type_that_no_weight_has_is_refused(tmp_path: Path) -> None:
    save_file({"it": torch.ones(3, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with ShardReader(CPU) as reader, pytest.raises(ConfigError, match="of type I8, which is not supported"):
        reader.read(read_entries(tmp_path)["it"], WHOLE, torch.empty(3))


def _write_shard(path: Path, header: object, num_bytes: int) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(num_bytes))


def _header(**changes: object) -> dict[str, object]:
    """Of two tensors of 16 and 8 bytes; `changes` are to the second one."""
    return {
        "first": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "second": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24], **changes},
    }


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (_header(data_offsets=[8, 24]), "16 bytes are not what BF16"),
        (_header(data_offsets=[24, 16]), "data_offsets are"),
        (_header(data_offsets=[-8, 24]), "data_offsets are"),
        (_header(data_offsets=[16.0, 24.0]), "data_offsets are"),
        (_header(data_offsets=[16, 20, 24]), "data_offsets are"),
        (_header(data_offsets="ab"), "data_offsets are"),
        (_header(data_offsets=[16, True]), "data_offsets are"),
        (_header(shape=[3]), "8 bytes are not what BF16"),
        (_header(shape=[-2, -2]), "shape is"),
        (_header(shape=["4"]), "shape is"),
        (_header(shape=4), "shape is"),
        (_header(dtype=["BF16"]), "dtype is"),
        (_header(dtype=None), "dtype is"),
        ({"second": 7}, "dtype is"),
        (_header() | {"third": {"dtype": "F32", "shape": [2], "data_offsets": [12, 20]}}, "first and third overlap"),
        ([1], "no JSON object"),
    ],
)
def test_a_header_that_would_give_other_bytes_is_refused_by_file_and_tensor(
    header: object, said: str, tmp_path: Path
) -> None:
    _write_shard(tmp_path / "model.safetensors", header, 24)
    with pytest.raises(ConfigError, match=re.escape(said)) as refusal:
        read_entries(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(refusal.value)
    assert "second" in str(refusal.value) or "third" in str(refusal.value) or isinstance(header, list)


def test_empty_tensors_and_types_that_are_not_ours_may_be_in_a_shard(tmp_path: Path) -> None:
    header = _header(dtype="F4") | {"none": {"dtype": "F32", "shape": [0, 3], "data_offsets": [16, 16]}}
    _write_shard(tmp_path / "model.safetensors", header, 24)
    assert set(read_entries(tmp_path)) == {"first", "second", "none"}


def test_what_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    shard = tmp_path / "model.safetensors"
    shard.symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"cannot read .*No such file"):
        read_entries(tmp_path)
    shard.unlink()
    shard.mkdir()
    with pytest.raises(ConfigError, match=r"cannot read .*Is a directory"):
        read_entries(tmp_path)


def test_an_index_names_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": ["x"], "b": "y"}}))
    with pytest.raises(ConfigError, match="names no file for a"):
        read_entries(tmp_path)


def test_a_shard_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    save_file({"it": torch.ones(300)}, tmp_path / "model.safetensors")
    entries = read_entries(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 900)
    with ShardReader(CPU) as reader, pytest.raises(ConfigError, match="became shorter"):
        reader.read(entries["it"], WHOLE, torch.empty(300))


def write_hollow_checkpoint(path: Path) -> None:
    """About 400 MB of zeros that take no room on the disk: a llama of five layers."""
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=5,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=8192,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(path)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        header[name] = {"dtype": "F32", "shape": list(parameter.shape), "data_offsets": [end, end + parameter.nbytes]}
        end += parameter.nbytes
    raw = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)


def test_loading_takes_the_ranks_share_and_one_tensor(tmp_path: Path) -> None:
    """A whole model, a tensor parallel half, a pipeline stage, and a half of a stage."""
    write_hollow_checkpoint(tmp_path)
    places = ["0 1 0 1", "0 1 1 2", "1 2 0 1", "1 2 1 2"]
    command = [sys.executable, footprint.__file__, str(tmp_path), *" ".join(places).split()]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # otherwise freed tensors stay with the process, and are not seen to return
    }
    output = subprocess.run(command, env=environment, check=True, timeout=100, stdout=subprocess.PIPE).stdout
    one_tensor = 4 * 1024 * 8192
    total, *others = found = [(use["share"], use["grown"]) for use in json.loads(output.splitlines()[-1])]
    assert total[0] > 400_000_000
    assert all(share < 0.6 * total[0] for share, _ in others)
    assert [(share, grown) for share, grown in found if grown > share + one_tensor] == []
