"""What a rank needs: compared with what transformers allocates and with what the engine really loads."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hortator.topology import advice
from hortator.topology.errors import BadModel, DoesNotFit
from hortator.topology.fleet import ModelSpec
from hortator.topology.memory import fit, human, rank_memories
from hortator.topology.modelshape import DTYPE_BYTES, FAMILIES, ModelShape, model_shape
from hortator.workers.engine import model as engine_model
from hortator.workers.engine.architectures import ARCHITECTURES as SERVED
from hortator.workers.engine.architectures import divided_sizes
from hortator.workers.engine.kvcache import PagedCache
from tests.workers.engine.checkpoints import ARCHITECTURES, make_checkpoint
from tests.workers.engine.meshes import Stage

GIB = 2**30
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 250,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    ("mistral", {"head_dim": 32}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True}),
    ("gemma2", {}),
    ("gemma3_text", {"tie_word_embeddings": False}),
    ("phi3", {}),
    ("mixtral", {"num_local_experts": 4}),
    ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 32, "mlp_only_layers": [1], "head_dim": 16}),
    ("qwen3_moe", {"num_experts": 6, "decoder_sparse_step": 2}),
]
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


def llama_8b(**changes: Any) -> ModelShape:
    return model_shape({**LLAMA_8B, **changes}, source="/models/llama-8b")


def spec(**settings: Any) -> ModelSpec:
    return ModelSpec.model_validate({"name": "m", "path": "/models/m", **settings})


def built(kind: str, changes: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, Any]]:
    """transformers' model, without memory, and the config.json that it would write."""
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **changes})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model, {**json.loads(config.to_json_string()), "architectures": [type(model).__name__]}


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_a_model_is_as_large_as_transformers_makes_it(kind: str, changes: dict[str, Any]) -> None:
    """Also if config.json holds only what its author wrote down."""
    model, raw = built(kind, changes)
    elements = sum(parameter.numel() for parameter in model.parameters())
    for config in (raw, {**SMALL, **changes, "architectures": raw["architectures"]}):
        (rank,) = rank_memories(model_shape(config, source="x"), spec(dtype="float32"))
        assert rank.weight_bytes == 4 * elements


def test_every_family_of_the_table_is_compared_with_transformers() -> None:
    assert {built(kind, changes)[1]["architectures"][0] for kind, changes in VARIANTS} == set(FAMILIES)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    transformers.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("models")
    return {name: make_checkpoint(name, root / name, num_hidden_layers=3).path for name in ARCHITECTURES}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("tp_size", "pp_size", "dtype"), [(1, 1, "bfloat16"), (2, 1, "float32"), (2, 2, "bfloat16")])
def test_each_rank_holds_as_many_bytes_as_the_engine_loads(
    tiny: dict[str, Path], name: str, tp_size: int, pp_size: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_model, "_parallelise", lambda *_: None)  # slices are loaded before it
    shape = model_shape(json.loads((tiny[name] / "config.json").read_text()), source=name)
    config = engine_model.read_config(tiny[name], dtype=dtype)
    sizes = spec(dtype=dtype, tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size)
    for estimate in rank_memories(shape, sizes):
        place = Stage(estimate.pp_rank, pp_size, tp_rank=estimate.tp_rank, tp_size=tp_size)
        loaded = engine_model.load_model(config, place)
        parts = [part for part in (loaded.body, loaded.head) if part is not None]
        held = {p.data_ptr(): p.nbytes for part in parts for p in part.parameters()}
        assert (estimate.rank, estimate.layers) == (place.rank, loaded.stage)
        assert sum(held.values()) == estimate.weight_bytes
        assert config.cache_shape(place).token_bytes == estimate.token_bytes


def test_stages_are_cut_as_the_engine_cuts_them(tiny: dict[str, Path]) -> None:
    """Also where layers differ, and for sizes whose weights are not here."""
    for name, pp_size in itertools.product(("qwen3_moe", "mixtral", "llama"), (2, 3)):
        raw = json.loads((tiny[name] / "config.json").read_text())
        shape = model_shape({**raw, "vocab_size": 5000}, source=name)
        config = engine_model.read_config(tiny[name])
        config.hf.vocab_size = 5000
        config = dataclasses.replace(config, vocab_size=5000)
        stages = [rank.layers for rank in rank_memories(shape, spec(pipeline_parallel_size=pp_size))]
        assert stages == [config.stage(Stage(stage, pp_size)) for stage in range(pp_size)]


def test_what_must_divide_is_what_the_engine_divides(tiny: dict[str, Path]) -> None:
    for name, path in tiny.items():
        shape = model_shape(json.loads((path / "config.json").read_text()), source=name)
        assert shape.divisible == divided_sizes(engine_model.read_config(path).hf)


def test_the_table_has_the_families_that_the_engine_serves() -> None:
    assert set(FAMILIES) == set(SERVED)


def test_the_pool_takes_as_many_bytes_as_the_engines_cache(tiny: dict[str, Path]) -> None:
    shape = model_shape(json.loads((tiny["llama"] / "config.json").read_text()), source="llama")
    config = engine_model.read_config(tiny["llama"])
    found = fit(shape, spec(max_num_seqs=3), [4 * GIB])
    assert found.num_blocks == 3 * 512 // 16  # more than enough memory: as much as the sequences can use
    cache_shape = config.cache_shape(Stage(0, 1))
    cache = PagedCache(cache_shape, num_blocks=found.num_blocks, block_size=16, device=torch.device("cpu"))
    assert found.kv_bytes(found.ranks[0]) == cache._storage.nbytes


def test_stages_share_out_the_layers_and_the_ends_hold_the_vocabulary() -> None:
    shape = llama_8b()
    embedding = 2 * shape.embedding
    ranks = rank_memories(shape, spec(tensor_parallel_size=2, pipeline_parallel_size=4))
    layers = [sum(2 * (shape.layers[n].cut // 2 + shape.layers[n].whole) for n in rank.layers) for rank in ranks]
    extra = [rank.weight_bytes - held for rank, held in zip(ranks, layers, strict=True)]
    norm = 2 * shape.hidden_size
    assert extra == [embedding, embedding, 0, 0, 0, 0, embedding + norm, norm]
    assert [layer for rank in ranks[::2] for layer in rank.layers] == list(range(32))
    assert len(ranks[0].layers) > len(ranks[-1].layers)  # the head costs its stage a layer or more


def test_a_tied_head_costs_nothing_unless_the_embedding_is_on_another_stage() -> None:
    tied, untied = llama_8b(tie_word_embeddings=True), llama_8b()
    embedding = 2 * tied.embedding
    (alone,), (free,) = rank_memories(tied, spec()), rank_memories(untied, spec())
    assert free.weight_bytes - alone.weight_bytes == embedding
    two = spec(pipeline_parallel_size=2)
    assert rank_memories(tied, two) == rank_memories(untied, two)


def test_what_is_left_of_the_memory_becomes_kv_tokens() -> None:
    found = fit(llama_8b(), spec(), [80 * GIB])
    assert found.num_blocks is not None
    (rank,) = found.ranks
    assert rank.token_bytes == 2 * 32 * 8 * 128 * 2
    usable = int(0.9 * 80 * GIB)
    block = 16 * rank.token_bytes
    assert usable - block < rank.fixed_bytes + (found.num_blocks + 1) * block <= usable
    assert found.max_sequences == found.kv_tokens // 131072 == 3  # type: ignore[operator]


def test_the_poorest_rank_decides_for_all() -> None:
    two = spec(pipeline_parallel_size=2)
    rich, poor = fit(llama_8b(), two, [80 * GIB] * 2), fit(llama_8b(), two, [80 * GIB, 40 * GIB])
    assert poor.num_blocks is not None
    assert rich.num_blocks is not None
    assert poor.num_blocks < rich.num_blocks


def test_with_unknown_memory_the_least_that_is_needed_is_known() -> None:
    found = fit(llama_8b(), spec(), [None])
    assert (found.num_blocks, found.max_sequences) == (None, None)
    assert found.needed_bytes(found.ranks[0]) == found.ranks[0].fixed_bytes + (131072 + 16) * 131072


@pytest.mark.parametrize(
    ("gib", "settings", "problem", "fitting"),
    [
        (24, {}, "may use 21.6 GiB of its GPU's 24.0 GiB", ["max_model_len=38160", "tensor_parallel_size=2"]),
        (16, {}, "rank 0 needs 32.9 GiB (weights 15.0 GiB", ["pipeline_parallel_size=3"]),
        (
            40,
            {"dtype": "float32"},
            "weights 29.9 GiB",
            ["max_model_len=15792", "dtype=bfloat16", "tensor_parallel_size=2"],
        ),
        (40, {"kv_cache_bytes": 40 * GIB}, "KV cache 40.0 GiB as kv_cache_bytes has it", ["kv_cache_bytes left out"]),
        (
            24,
            {"kv_cache_bytes": 20 * GIB},
            "KV cache 20.0 GiB as kv_cache_bytes has it",
            ["kv_cache_bytes left out and max_model_len=38160"],
        ),
        (
            16,
            {"kv_cache_bytes": 20 * GIB},
            "KV cache 20.0 GiB as kv_cache_bytes has it",
            ["kv_cache_bytes left out and pipeline_parallel_size=3"],
        ),
        (
            80,
            {"kv_cache_bytes": GIB},
            "holds 8192 tokens, less than one",
            ["kv_cache_bytes left out", "max_model_len=8192"],
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_what_would_is_named(
    gib: int, settings: dict[str, Any], problem: str, fitting: list[str]
) -> None:
    wanted = spec(**settings)
    with pytest.raises(DoesNotFit) as refusal:
        fit(llama_8b(), wanted, [gib * GIB])
    assert problem in str(refusal.value)
    changes = advice.for_memory(llama_8b(), wanted, gib * GIB)
    assert [advice.worded(change) for change in changes] == fitting
    for change in changes:
        better = advice.changed(wanted, change)
        fit(llama_8b(), better, [gib * GIB] * better.world_size)


def test_the_longest_length_that_is_named_is_the_longest_that_fits() -> None:
    with pytest.raises(DoesNotFit):
        fit(llama_8b(), spec(max_model_len=38160 + 16), [24 * GIB])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"tensor_parallel_size": 3}, "does not divide num_attention_heads=32, .* the nearest that works is 2"),
        ({"tensor_parallel_size": 16}, "does not divide num_key_value_heads=8 .* the nearest that works is 8"),
        ({"pipeline_parallel_size": 33}, "32 layers cannot be cut into 33 stages: use 1 to 32"),
        ({"max_model_len": 200_000}, "more than the 131072 positions of /models/llama-8b: give at most 131072"),
    ],
)
def test_a_model_that_cannot_be_cut_that_way_is_refused(settings: dict[str, Any], problem: str) -> None:
    wanted = spec(**settings)
    with pytest.raises(BadModel, match=problem):
        fit(llama_8b(), wanted, [None] * wanted.world_size)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"hidden_size": "4096"}, r"has no usable \('4096'\) hidden_size"),
        ({"num_hidden_layers": 10**9}, r"has no usable \(1000000000\) num_hidden_layers"),
        ({"quantization_config": {}}, "is quantised"),
        ({"architectures": ["Unheard"]}, "sizes of architecture Unheard are not known"),
        ({"architectures": "LlamaForCausalLM"}, "architecture none"),
    ],
)
def test_a_config_that_does_not_say_what_is_needed_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadModel, match=problem):
        llama_8b(**changes)


def test_sizes_are_shown_for_people() -> None:
    assert [human(size) for size in (5, 2048, 3 << 20, 3 * GIB // 2)] == ["5 B", "2.0 KiB", "3.0 MiB", "1.5 GiB"]


def test_the_types_of_the_fleet_file_have_sizes() -> None:
    assert set(DTYPE_BYTES) | {"auto"} == set(ModelSpec.model_fields["dtype"].annotation.__args__)  # type: ignore[union-attr]
