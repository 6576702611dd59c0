"""From a Hugging Face directory to the part of the model that this rank holds.

The class is built on the meta device, so without memory, and cut down to the rank's pipeline stage; then each rank
reads its own slices from the shards, straight to its device.
"""

import copy
import socket
from collections.abc import Container, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import torch
import transformers

from hortator.producer.errors import ConfigError
from hortator.topology.errors import TooManyStages
from hortator.topology.stages import stage_layers

from . import attention
from .architectures import ARCHITECTURES, architecture_of, check_features, divided_sizes, head_dim, layer_elements
from .attention import Paged
from .checkpoint import TensorEntry, read_entries, read_json
from .kvcache import CacheShape
from .parallel import ParallelExperts, Ranks, check_divides, parallel_linear, style_of
from .sizes import check_num_layers, check_sizes, check_token_ids
from .sources import EMBEDDING, HEAD, Placement, check_sources, placements
from .weights import ShardReader

# What a config.json may say about forward's output; ours is the only caller.
_FORWARD_OPTIONS = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
LoadFormat = Literal["safetensors", "dummy"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the engine needs to know of a checkpoint, checked."""

    path: Path
    architecture: str
    hf: Any  # transformers.PreTrainedConfig
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    vocab_size: int

    @property
    def head_dim(self) -> int:
        return head_dim(self.hf)

    def stage(self, ranks: Ranks) -> range:
        """The layers of this rank's pipeline stage, by their numbers in the checkpoint.

        A step streams all weights, so cost is counted in elements on one rank; the head is not cut.  The embedding is a
        lookup and costs nothing.
        """
        costs = [elements / ranks.tp_size for elements in layer_elements(self.hf)]
        head = float(self.vocab_size * self.hf.hidden_size)
        try:
            return stage_layers(len(costs), ranks.pp_size, costs=costs, last_extra=head)[ranks.pp_rank]
        except TooManyStages as error:
            raise ConfigError(f"pipeline_parallel_size={ranks.pp_size} is too much for {self.path}: {error}") from error

    def cache_shape(self, ranks: Ranks) -> CacheShape:
        """Of this rank: its stage's layers, its KV heads."""
        return CacheShape(
            num_layers=len(self.stage(ranks)),
            num_kv_heads=self.hf.num_key_value_heads // ranks.tp_size,
            head_dim=self.head_dim,
            dtype=self.dtype,
        )


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """This rank's part: the layers of `stage`, the embedding before them on the first stage, the final norm after them
    on the last one.  Layers are numbered from 0 in every stage, and so is the cache."""

    config: ModelConfig
    stage: range  # by the checkpoint's numbers
    first: bool
    last: bool
    body: torch.nn.Module  # transformers' own base model, with what other stages hold taken out
    head: torch.nn.Module | None  # only on the rank that samples: no vocabulary crosses the wire

    def hidden(self, inputs: torch.Tensor, positions: torch.Tensor, paged: Paged) -> torch.Tensor:
        """Token ids [tokens] on the first stage, hidden states [tokens, hidden size] of the stage before on others;
        gives [tokens, hidden size].  Keys and values go to the paged cache."""
        name = "input_ids" if self.first else "inputs_embeds"
        output = self.body(
            **{name: inputs.unsqueeze(0)}, position_ids=positions.unsqueeze(0), use_cache=False, paged=paged
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden size] to [rows, vocabulary], only where `head` is."""
        assert self.head is not None
        logits: torch.Tensor = self.head(hidden)
        softcap = getattr(self.config.hf, "final_logit_softcapping", None)
        return logits if softcap is None else (logits / softcap).tanh_().mul_(softcap)


def read_config(model_path: Path, *, dtype: str = "auto") -> ModelConfig:
    """Check the directory's config; what cannot be served is refused with a ConfigError that says why."""
    if not model_path.is_dir():
        raise ConfigError(
            f"model_path {model_path} is no directory on {socket.gethostname()}:"
            " give one with config.json and safetensors"
        )
    if not (model_path / "config.json").is_file():
        raise ConfigError(f"{model_path} has no config.json: it is not a Hugging Face model directory")
    raw = read_json(model_path / "config.json")
    architecture = architecture_of(raw, model_path)
    check_sizes(raw, model_path / "config.json")
    try:
        hf = transformers.AutoConfig.from_pretrained(
            model_path, trust_remote_code=False, local_files_only=True, **_FORWARD_OPTIONS
        )
    except Exception as error:  # transformers raises whatever its validators raise
        raise ConfigError(f"transformers cannot read {model_path / 'config.json'}: {error}") from error
    check_sizes(hf.to_dict(), model_path / "config.json")
    check_features(hf, str(model_path))
    return ModelConfig(
        path=model_path,
        architecture=architecture,
        hf=hf,
        dtype=_resolve_dtype(dtype, hf, model_path),
        eos_token_ids=_eos_token_ids(model_path, hf),
        max_model_len=hf.max_position_embeddings,
        vocab_size=hf.vocab_size,
    )


def load_model(config: ModelConfig, ranks: Ranks, *, load_format: LoadFormat = "safetensors") -> LoadedModel:
    """Build the model and read this rank's slices; "dummy": random weights of the same shapes instead, for
    benchmarks of models that are not there."""
    attention.register()
    entries = read_entries(config.path) if load_format == "safetensors" else {}
    if load_format == "safetensors":
        check_num_layers(config.hf.num_hidden_layers, entries, config.path)
    check_divides(divided_sizes(config.hf), ranks.tp_size)
    stage = config.stage(ranks)
    first, last = ranks.pp_rank == 0, ranks.pp_rank == ranks.pp_size - 1
    model = _hollow(config)
    _keep(model, stage, first=first, last=last, head=last and ranks.tp_rank == 0)
    if load_format == "dummy":
        _fill_randomly(model, config, stage, ranks)
    else:
        _fill(model, config, stage, ranks, entries)
    _compute_buffers(model.model, config.hf, ranks.device)
    if ranks.tp_size > 1:
        _parallelise(model, ranks)
    return LoadedModel(config, stage, first, last, model.model.eval(), model.lm_head)


def _keep(model: Any, stage: range, *, first: bool, last: bool, head: bool) -> None:
    """Take out what other ranks hold.  transformers' forward walks `layers` and the config's per-layer lists from 0, so
    both are cut, and the layers are numbered anew."""
    body = model.model
    body.layers = torch.nn.ModuleList(body.layers[stage.start : stage.stop])
    model.config.num_hidden_layers = len(stage)
    if types := getattr(model.config, "layer_types", None):
        model.config.layer_types = types[stage.start : stage.stop]
    for module in body.layers.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx -= stage.start
    if not first:
        body.embed_tokens = None
    if not last:
        body.norm = torch.nn.Identity()
    if not head:
        model.lm_head = None


def _resolve_dtype(name: str, hf: Any, model_path: Path) -> torch.dtype:
    if name != "auto":
        return _DTYPES[name]
    dtype = hf.dtype if isinstance(hf.dtype, torch.dtype) else torch.float32
    if dtype not in (*_DTYPES.values(), torch.float64):
        raise ConfigError(
            f"{model_path / 'config.json'}: dtype {dtype} is not supported: set dtype to one of {', '.join(_DTYPES)}"
        )
    return dtype


def _eos_token_ids(model_path: Path, hf: Any) -> tuple[int, ...]:
    """generation_config.json wins over config.json, as in transformers."""
    generation = model_path / "generation_config.json"
    ids = read_json(generation).get("eos_token_id") if generation.is_file() else None
    if ids is None:
        return check_token_ids(hf.eos_token_id, model_path / "config.json", vocab_size=hf.vocab_size)
    return check_token_ids(ids, generation, vocab_size=hf.vocab_size)


def _hollow(config: ModelConfig) -> Any:
    """transformers' own model, on the meta device."""
    try:
        with torch.device("meta"):
            return getattr(transformers, config.architecture)._from_config(
                copy.deepcopy(config.hf), dtype=config.dtype, attn_implementation=attention.IMPLEMENTATION
            )
    except Exception as error:  # whatever its classes raise at values that no validator looks at
        raise ConfigError(
            f"transformers cannot make the model of {config.path / 'config.json'}: {type(error).__name__}: {error}"
        ) from error


def _fill(
    model: torch.nn.Module, config: ModelConfig, stage: range, ranks: Ranks, entries: dict[str, TensorEntry]
) -> None:
    """Replace every meta parameter by this rank's part of the checkpoint's tensor."""
    tied = bool(config.hf.tie_word_embeddings)
    placed = _placements(model, config, stage, ranks, entries.keys() - {HEAD} if tied else entries.keys())
    check_sources(placed, entries)
    parts = []
    for name, placement in placed.items():
        tensor = torch.empty(placement.shape, dtype=model.get_parameter(name).dtype, device=ranks.device)
        _set_parameter(model, name, tensor)
        parts += [(entries[source.name], source.cut, tensor[source.place]) for source in placement.sources]
    with ShardReader(ranks.device) as reader:
        reader.read_all(parts)
    _tie(model, config)


def _fill_randomly(model: torch.nn.Module, config: ModelConfig, stage: range, ranks: Ranks) -> None:
    """Norms are ones, biases zeros, all else is small; a parameter's name is its seed, so that a tied head on a stage
    of its own is the embedding again."""
    generator = torch.Generator(ranks.device)
    names = _EverythingBut({HEAD} if config.hf.tie_word_embeddings else set())
    for name, placement in _placements(model, config, stage, ranks, names).items():
        dtype = model.get_parameter(name).dtype
        tensor = torch.ones(placement.shape, dtype=dtype, device=ranks.device)
        if name.endswith("bias"):
            tensor.zero_()
        elif tensor.dim() > 1:
            tensor.normal_(std=0.02, generator=generator.manual_seed(crc32(placement.sources[0].name.encode())))
        _set_parameter(model, name, tensor)
    _tie(model, config)


@dataclass(frozen=True, slots=True)
class _EverythingBut:
    """A checkpoint that has every other name."""

    missing: Set[str]

    def __contains__(self, name: object) -> bool:
        return name not in self.missing


def _placements(
    model: torch.nn.Module, config: ModelConfig, stage: range, ranks: Ranks, names: Container[str]
) -> dict[str, Placement]:
    """Of every parameter but a tied head beside its embedding."""
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False) if p is not None}
    if config.hf.tie_word_embeddings and EMBEDDING in shapes:
        shapes.pop(HEAD, None)
    architecture = ARCHITECTURES[config.architecture]
    return placements(
        shapes, architecture=architecture, stage=stage, head_sizes=_head_sizes(config), names=names, ranks=ranks
    )


def _tie(model: Any, config: ModelConfig) -> None:
    """A tied head shares the embedding of its own rank; where that is not, it has a copy of its own."""
    if config.hf.tie_word_embeddings and model.lm_head is not None and model.model.embed_tokens is not None:
        model.lm_head.weight = model.get_parameter(EMBEDDING)


def _head_sizes(config: ModelConfig) -> tuple[int, int, int]:
    """Rows of all queries, keys and values."""
    kv_rows = config.hf.num_key_value_heads * config.head_dim
    return config.hf.num_attention_heads * config.head_dim, kv_rows, kv_rows


def _set_parameter(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, kind = name.rpartition(".")
    setattr(model.get_submodule(owner), kind, torch.nn.Parameter(tensor, requires_grad=False))


def _compute_buffers(body: Any, hf: Any, device: torch.device) -> None:
    """Rotary frequencies and gemma's embedding scale: computed, never stored."""
    body.rotary_emb = type(body.rotary_emb)(config=hf).to(device)
    scale = getattr(body.embed_tokens, "scalar_embed_scale", None)
    if scale is not None:
        body.embed_tokens.embed_scale = torch.tensor(scale, device=device)


def _parallelise(model: Any, ranks: Ranks) -> None:
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, torch.nn.Linear) and (style := style_of(name)) is not None:
            setattr(model.get_submodule(parent), child, parallel_linear(module, style, ranks))
        elif child == "experts":
            setattr(model.get_submodule(parent), child, ParallelExperts(module, ranks))
        elif hasattr(module, "qkv_proj"):  # transformers splits its output by the numbers of heads
            module.num_key_value_heads //= ranks.tp_size
            module.config = copy.copy(module.config)
            module.config.num_attention_heads //= ranks.tp_size
