"""As many threads as a step has work for."""

from collections.abc import Iterator

import pytest
import torch

from hortator.workers.engine.attention import Paged
from hortator.workers.engine.model import LoadedModel, load_model, read_config
from hortator.workers.engine.parallel import SingleRank
from hortator.workers.engine.runner import TorchRunner
from hortator.workers.engine.step import Request, SamplingParams
from hortator.workers.engine.threads import FLOPS_PER_THREAD, Threads
from tests.workers.engine.checkpoints import Checkpoint, mixed_requests
from tests.workers.engine.drive import build, run


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("num_tokens", "wanted"), [(1, 1), (99, 1), (100, 2), (299, 3), (300, 4), (10**9, 4)])
def test_a_thread_for_so_much_work(num_tokens: int, wanted: int) -> None:
    assert Threads(most=4, num_parameters=FLOPS_PER_THREAD // 200 + 1).wanted(num_tokens) == wanted


def test_one_thread_stays_one() -> None:
    assert Threads(most=1, num_parameters=10**12).wanted(10**6) == 1


def test_matrices_of_layers_count_and_embeddings_do_not(checkpoint: Checkpoint) -> None:
    model = load_model(read_config(checkpoint.path), SingleRank())
    embedded = model.config.hf.vocab_size * model.config.hf.hidden_size
    vectors = sum(p.numel() for p in model.body.parameters() if p.dim() == 1)
    total = sum(p.numel() for p in model.body.parameters())
    assert Threads.found(model.body).num_parameters == total - embedded - vectors


def test_an_engine_uses_them_and_answers_the_same(llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    hidden = LoadedModel.hidden

    def spy(model: LoadedModel, inputs: torch.Tensor, positions: torch.Tensor, paged: Paged) -> torch.Tensor:
        used.append(torch.get_num_threads())
        return hidden(model, inputs, positions, paged)

    requests = mixed_requests(24)
    wanted = run(build(llama.path), requests)
    monkeypatch.setattr(LoadedModel, "hidden", spy)
    engine = build(llama.path)
    assert isinstance(engine._runner, TorchRunner)
    engine._runner.threads = Threads(3, FLOPS_PER_THREAD // 8)
    run(engine, [Request(0, tuple(range(10, 15)), SamplingParams(max_tokens=3, ignore_eos=True))])
    assert used == [2, 1, 1]
    assert run(engine, requests).tokens == wanted.tokens
    assert set(used) == {1, 2, 3}
