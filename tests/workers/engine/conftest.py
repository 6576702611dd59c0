"""One tiny checkpoint of each architecture, made once a session."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests.workers.engine.byte_tokenizer import write_tokenizer
from tests.workers.engine.checkpoints import ARCHITECTURES, Checkpoint, make_checkpoint


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_small() -> Iterator[None]:
    """Other tests share the machine: one thread is as fast for models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(name, root / name) for name in ARCHITECTURES}


@pytest.fixture(scope="session", params=ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    """Each architecture in turn."""
    return checkpoints[request.param]


@pytest.fixture(scope="session")
def llama(checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    return checkpoints["llama"]


@pytest.fixture(scope="session")
def speaking(llama: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama with a tokenizer, so that its output can be structured."""
    directory = tmp_path_factory.mktemp("speaking") / "llama"
    shutil.copytree(llama.path, directory)
    write_tokenizer(directory)
    return directory
