"""Pipeline stages, one after the other in one process: chained, they are the whole model."""

from array import array
from pathlib import Path

import pytest
import torch

from hortator.producer.errors import ConfigError
from hortator.workers.engine import model as model_module
from hortator.workers.engine.attention import Paged, Pulse
from hortator.workers.engine.kvcache import PagedCache
from hortator.workers.engine.model import LoadedModel, LoadFormat, load_model, read_config
from hortator.workers.engine.parallel import SingleRank
from hortator.workers.engine.pipeline import Stages, routes
from hortator.workers.engine.scheduler import Row, Sequence
from hortator.workers.engine.step import Request, SamplingParams
from tests.workers.engine.checkpoints import ARCHITECTURES, Checkpoint, make_checkpoint
from tests.workers.engine.meshes import Stage

NUM_LAYERS = 5  # in two and three stages: uneven
BLOCK_SIZE = 4


class Part:
    """A loaded stage and its cache."""

    def __init__(self, path: Path, place: Stage | SingleRank, load_format: LoadFormat = "safetensors") -> None:
        self.model: LoadedModel = load_model(read_config(path), place, load_format=load_format)
        shape = self.model.config.cache_shape(place)
        self.cache = PagedCache(shape, num_blocks=80, block_size=BLOCK_SIZE, device=place.device)

    @torch.inference_mode()
    def __call__(self, inputs: torch.Tensor, rows: list[Row]) -> torch.Tensor:
        places = [(row, position) for row in rows for position in range(row.start, row.context)]
        slots = [row.sequence.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for row, p in places]
        num_decodes = sum(row.count == 1 for row in rows)
        paged = Paged(
            cache=self.cache,
            decodes=tuple(rows[:num_decodes]),
            chunks=tuple(rows[num_decodes:]),
            slots=torch.tensor(slots),
            dtype=self.model.config.dtype,
            pulse=Pulse(),
        )
        return self.model.hidden(inputs, torch.tensor([p for _, p in places]), paged)


def steps() -> list[list[Row]]:
    """A prompt in two chunks beside one that decodes, longer than mistral's window."""
    short, long = sequence(7, range(15)), sequence(40, range(20, 35))
    return [
        [row(short, 0, 5), row(long, 0, 20)],
        [row(short, 5, 1), row(long, 20, 19)],
        [row(short, 6, 1), row(long, 39, 1)],
    ]


def sequence(length: int, blocks: range) -> Sequence:
    tokens = array("i", [(7 * length + 3 * i) % 250 + 1 for i in range(length)])
    request = Request(blocks.start, tuple(tokens), SamplingParams(max_tokens=1))
    return Sequence(request, 999, frozenset(), tokens, BLOCK_SIZE, blocks=array("i", blocks))


def row(sequence: Sequence, start: int, count: int) -> Row:
    return Row(sequence, start, count, samples=False, position=0, pending=False)


def tokens_of(rows: list[Row]) -> torch.Tensor:
    return torch.tensor([token for row in rows for token in row.tokens])


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("deep")
    return {name: make_checkpoint(name, root / name, num_hidden_layers=NUM_LAYERS) for name in ARCHITECTURES}


@pytest.mark.parametrize("pp_size", [2, 3, NUM_LAYERS])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stages_in_a_row_give_the_whole_models_numbers(name: str, pp_size: int, deep: dict[str, Checkpoint]) -> None:
    path = deep[name].path
    whole = Part(path, SingleRank())
    parts = [Part(path, Stage(rank, pp_size)) for rank in range(pp_size)]
    assert [layer for part in parts for layer in part.model.stage] == list(range(NUM_LAYERS))
    for rows in steps():
        expected = whole(tokens_of(rows), rows)
        states = tokens_of(rows)
        for part in parts:
            states = part(states, rows)
        assert states.equal(expected)
        assert parts[-1].model.logits(states).equal(whole.model.logits(expected))


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])  # an own head, a tied one, stacked experts
def test_random_weights_are_the_same_in_any_number_of_stages(name: str, deep: dict[str, Checkpoint]) -> None:
    path, rows = deep[name].path, steps()[0]
    whole = Part(path, SingleRank(), "dummy")
    first, last = (Part(path, Stage(rank, 2), "dummy") for rank in range(2))
    expected = whole.model.logits(whole(tokens_of(rows), rows))
    assert last.model.logits(last(first(tokens_of(rows), rows), rows)).equal(expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_transformers(name: str, deep: dict[str, Checkpoint]) -> None:
    """At every position of a long prompt: greedy tokens would not show a scale of all logits, nor their soft-cap."""
    whole = Part(deep[name].path, SingleRank())
    rows = [row(sequence(300, range(80)), 0, 300)]
    with torch.inference_mode():
        expected = deep[name].reference()(tokens_of(rows).unsqueeze(0)).logits[0]
    assert torch.allclose(whole.model.logits(whole(tokens_of(rows), rows)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # an own head, a tied one
def test_a_stage_holds_its_layers_and_only_the_ends_hold_the_vocabulary(name: str, deep: dict[str, Checkpoint]) -> None:
    models = [load_model(read_config(deep[name].path), Stage(rank, 3)) for rank in range(3)]
    first, middle, last = models
    assert [(m.first, m.last) for m in models] == [(True, False), (False, False), (False, True)]
    for model in models:
        layers = {n.split(".")[1] for n, _ in model.body.named_parameters() if n.startswith("layers.")}
        assert layers == {str(i) for i in range(len(model.stage))}
        assert model.config.cache_shape(Stage(models.index(model), 3)).num_layers == len(model.stage)
    outside = [{n for n, _ in m.body.named_parameters() if not n.startswith("layers.")} for m in models]
    assert outside == [{"embed_tokens.weight"}, set(), {"norm.weight"}]
    assert first.head is None
    assert middle.head is None
    assert last.head is not None


def test_only_the_first_rank_of_the_last_stage_holds_a_head(
    deep: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "parallel_linear", lambda linear, *_: linear)  # needs real ranks
    config = read_config(deep["llama"].path)
    places_ = [Stage(pp_rank, 2, tp_rank=tp_rank, tp_size=2) for pp_rank in (0, 1) for tp_rank in (0, 1)]
    assert [load_model(config, place).head is not None for place in places_] == [False, False, True, False]


def test_more_stages_than_layers_are_refused(deep: dict[str, Checkpoint]) -> None:
    with pytest.raises(ConfigError, match=r"pipeline_parallel_size=6 is too much for .*: 5 layers .* use 1 to 5"):
        load_model(read_config(deep["llama"].path), Stage(0, 6))


class Post:
    """Stands for torch.distributed's messages: who sent what to whom, as one rank sees it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.groups: list[str] = []
        self.seen: set[tuple[str, int, int]] = set()

    def new_group(self) -> str:
        self.groups.append(("hidden", "tokens", "report")[len(self.groups)])
        return self.groups[-1]

    def send(self, tensor: torch.Tensor, *, dst: int, group: str) -> None:
        self.seen.add((group, self.rank, dst))

    def recv(self, tensor: torch.Tensor, *, src: int, group: str) -> None:
        self.seen.add((group, src, self.rank))
        tensor.copy_(
            torch.tensor([2])
            if tensor.dtype == torch.int64
            else torch.frombuffer(bytearray(b"{}"), dtype=torch.uint8)[: len(tensor)]
        )

    isend = send
    irecv = recv


@pytest.mark.parametrize("rank", range(6))
def test_a_step_sends_nothing_along_a_route_that_was_not_used_at_the_start(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL connects two ranks at their first message, and waits for both."""
    post = Post(rank)
    for name in ("new_group", "send", "recv", "isend", "irecv"):
        monkeypatch.setattr(torch.distributed, name, getattr(post, name))
    pp_rank, tp_rank = divmod(rank, 2)
    link = Stages(Stage(pp_rank, 3, tp_rank, 2), hidden_size=2, dtype=torch.float32)
    at_start, post.seen = post.seen, set()
    hidden = torch.zeros(1, 2) if link.first else link.receive(1).float()
    link.send(hidden)
    samples = rank == 4
    report = link.report({} if samples else None)
    link.share(torch.tensor([1]) if samples else None, 1)
    link.read_report(report)
    assert post.seen <= at_start
    assert at_start == {route for route in routes(Stage(pp_rank, 3, tp_rank, 2)) if rank in route[1:]}
    assert post.seen
