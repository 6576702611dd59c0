"""What can never work, found from the settings and the model's config.json before anything starts.  No torch.

Ranks find the same and more, but seconds later, each for itself, and after Celery has begun.
"""

from pathlib import Path

from hortator.producer.errors import ConfigError
from hortator.topology.errors import BadModel
from hortator.topology.fleet import ModelSpec
from hortator.topology.memory import model_len_of, rank_memories
from hortator.topology.modelshape import ModelShape, model_shape

from .engine.architectures import architecture_of
from .engine.checkpoint import read_json
from .engine.sizes import check_sizes
from .settings import WorkerSettings

GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))  # NVIDIA's, AMD's, Windows' for its Linux
_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "max_model_len")


def check_model(settings: WorkerSettings) -> None:
    """Raises ConfigError unless the engine serves such a model, cut for so many ranks, on such a device."""
    if settings.engine != "paged":
        return
    assert settings.model_path is not None  # the settings saw to it
    shape = _shape(settings.model_path)
    if shape is not None:
        spec = ModelSpec(name=settings.queue, **{name: getattr(settings, name) for name in _SIZES})
        try:
            model_len_of(shape, spec)
            rank_memories(shape, spec)
        except BadModel as error:
            raise ConfigError(str(error)) from None
    if settings.device == "cuda" and settings.launcher == "local":
        check_gpu()


def check_gpu(devices: tuple[Path, ...] = GPU_DEVICES) -> None:
    """Raises ConfigError on a host that cannot have a GPU."""
    if not any(device.exists() for device in devices):
        raise ConfigError("device=cuda: this host has no GPU, or its driver is not loaded: use device=cpu or auto")


def _shape(path: Path) -> ModelShape | None:
    """None if config.json leaves out what only transformers' defaults know: the engine may still make sense of it."""
    raw = read_json(path / "config.json")
    architecture_of(raw, path)
    check_sizes(raw, path / "config.json")
    try:
        return model_shape(raw, source=str(path))
    except BadModel:
        return None
