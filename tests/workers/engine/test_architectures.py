"""The table of what is served: the code's, the documentation's, and what the tests really run."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from hortator.producer.errors import ConfigError
from hortator.workers.engine.architectures import ARCHITECTURES, check_features, divided_sizes, layer_elements
from hortator.workers.engine.parallel import WHOLE, Cut, cut_of, style_of
from tests.workers.engine.checkpoints import Checkpoint
from tests.workers.engine.group import ROOT
from tests.workers.engine.meshes import Stage

MIXED = {
    "num_hidden_layers": 4,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 100,
    "moe_intermediate_size": 10,
    "num_experts": 6,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 2,
}


def documented() -> dict[str, tuple[str, bool, bool, bool]]:
    section = Path(ROOT / "docs" / "04-engine.md").read_text().partition("## Models")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if "CausalLM" in line]
    return {
        row[0].split()[0]: (row[1].removesuffix(" layers"), *(bool(cell) for cell in row[2:5]))  # type: ignore[misc]
        for row in rows
        if len(row) == 5
    }


def test_the_documentation_lists_what_the_code_serves() -> None:
    served = {
        name: (row.window, row.softcap, row.fused, row.experts is not None) for name, row in ARCHITECTURES.items()
    }
    assert documented() == served


def test_every_architecture_has_a_checkpoint_in_the_tests(checkpoints: dict[str, Checkpoint]) -> None:
    assert {type(checkpoint.reference()).__name__ for checkpoint in checkpoints.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_parameters": {"rope_type": "longrope"}}, "depend on what else"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {}}}, "'dynamic'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
    ],
)
def test_what_a_config_may_not_ask_for_is_refused(config: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_features(SimpleNamespace(**config), "here")


def test_layers_with_and_without_experts_are_counted_apart() -> None:
    attention = 8 * 2 * 2 * (4 + 2)
    dense, experts = attention + 3 * 8 * 100, attention + 3 * 8 * 6 * 10
    assert layer_elements(SimpleNamespace(**MIXED)) == [dense, experts, dense, experts]


def test_only_sizes_that_are_there_must_divide() -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    assert divided_sizes(SimpleNamespace(**MIXED)) == {**heads, "moe_intermediate_size": 10, "intermediate_size": 100}
    all_experts = MIXED | {"mlp_only_layers": [], "decoder_sparse_step": 1}
    assert divided_sizes(SimpleNamespace(**all_experts)) == {**heads, "moe_intermediate_size": 10}
    dense = {name: size for name, size in MIXED.items() if name not in ("num_experts", "moe_intermediate_size")}
    assert divided_sizes(SimpleNamespace(**dense)) == {**heads, "intermediate_size": 100}


@pytest.mark.parametrize(
    ("name", "shape", "cut"),
    [
        ("a.q_proj.weight", (8, 6), Cut(0, (range(4, 8),))),
        ("a.q_proj.bias", (8,), Cut(0, (range(4, 8),))),
        ("a.o_proj.weight", (6, 8), Cut(1, (range(4, 8),))),
        ("a.o_proj.bias", (6,), WHOLE),
        ("a.qkv_proj.weight", (16, 6), Cut(0, (range(4, 8), range(10, 12), range(14, 16)))),
        ("a.gate_up_proj.weight", (8, 6), Cut(0, (range(2, 4), range(6, 8)))),
        ("a.experts.gate_up_proj", (3, 8, 6), Cut(1, (range(2, 4), range(6, 8)))),
        ("a.experts.down_proj", (3, 6, 4), Cut(2, (range(2, 4),))),
        ("a.gate.weight", (3, 6), WHOLE),
        ("a.q_norm.weight", (8,), WHOLE),
        ("embed_tokens.weight", (8, 6), WHOLE),
    ],
)
def test_a_name_says_what_the_second_of_two_ranks_holds(name: str, shape: tuple[int, ...], cut: Cut) -> None:
    assert cut_of(name, shape, (8, 4, 4), Stage(0, 1, tp_rank=1, tp_size=2)) == cut
    assert cut_of(name, shape, (8, 4, 4), Stage(0, 1)) == WHOLE
    assert (style_of(name) is None) == (cut == WHOLE and "bias" not in name)
