"""From a Hugging Face directory to the part of the model that this rank holds.

The class is built on the meta device, so without memory, and cut down to the rank's pipeline stage; then each rank
reads its own slices from the shards, straight to its device.  Which linear is cut how is transformers' own
tensor-parallel plan of the architecture.
"""

import copy
import fnmatch
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from hortator.producer.errors import ConfigError
from hortator.topology.errors import TooManyStages
from hortator.topology.stages import stage_layers

from . import attention
from .attention import Paged
from .checkpoint import TensorEntry, read_entries, read_json
from .kvcache import CacheShape
from .parallel import Cut, Ranks, check_divides, cut_of, parallel_linear

SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
# What a config.json may say about forward's output; ours is the only caller.
_FORWARD_OPTIONS = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
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
        return int(getattr(self.hf, "head_dim", None) or self.hf.hidden_size // self.hf.num_attention_heads)

    def stage(self, ranks: Ranks) -> range:
        """The layers of this rank's pipeline stage, by their numbers in the checkpoint.

        A step streams all weights, so cost is counted in elements: the head's, which is not cut, in units of a layer's
        slice.  The embedding is a lookup and costs nothing.
        """
        head = self.vocab_size * self.hf.hidden_size * ranks.tp_size / _layer_elements(self.hf, self.head_dim)
        try:
            return stage_layers(self.hf.num_hidden_layers, ranks.pp_size, last_extra=head)[ranks.pp_rank]
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
        return logits


def read_config(model_path: Path, *, dtype: str = "auto") -> ModelConfig:
    """Check the directory's config; what cannot be served is refused with a ConfigError that says why."""
    if not model_path.is_dir():
        raise ConfigError(f"model_path {model_path} is no directory: give one with config.json and safetensors")
    if not (model_path / "config.json").is_file():
        raise ConfigError(f"{model_path} has no config.json: it is not a Hugging Face model directory")
    raw = read_json(model_path / "config.json")
    architecture = _architecture(raw, model_path)
    try:
        hf = transformers.AutoConfig.from_pretrained(
            model_path, trust_remote_code=False, local_files_only=True, **_FORWARD_OPTIONS
        )
    except Exception as error:  # transformers raises whatever its validators raise
        raise ConfigError(f"transformers cannot read {model_path / 'config.json'}: {error}") from error
    rope = (getattr(hf, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in _BATCH_DEPENDENT_ROPE:
        raise ConfigError(
            f"{model_path}: rope_type {rope!r} makes a token depend on what else is in the batch; it is not supported"
        )
    return ModelConfig(
        path=model_path,
        architecture=architecture,
        hf=hf,
        dtype=_resolve_dtype(dtype, hf),
        eos_token_ids=_eos_token_ids(model_path, hf),
        max_model_len=hf.max_position_embeddings,
        vocab_size=hf.vocab_size,
    )


def load_model(config: ModelConfig, ranks: Ranks) -> LoadedModel:
    """Build the model and read this rank's slices."""
    attention.register()
    check_divides(
        {
            "num_attention_heads": config.hf.num_attention_heads,
            "num_key_value_heads": config.hf.num_key_value_heads,
            "intermediate_size": config.hf.intermediate_size,
        },
        ranks.tp_size,
    )
    stage = config.stage(ranks)
    first, last = ranks.pp_rank == 0, ranks.pp_rank == ranks.pp_size - 1
    with torch.device("meta"):
        model = getattr(transformers, config.architecture)._from_config(
            copy.deepcopy(config.hf), dtype=config.dtype, attn_implementation=attention.IMPLEMENTATION
        )
    _keep(model, stage, first=first, last=last, head=last and ranks.tp_rank == 0)
    plan = {f"model.{pattern}": style for pattern, style in (config.hf.base_model_tp_plan or {}).items()}
    sources = _sources(model, stage, tied=bool(config.hf.tie_word_embeddings))
    _fill(model, sources, read_entries(config.path), plan, ranks)
    if model.lm_head is not None and "lm_head.weight" not in sources:
        model.lm_head.weight = model.model.embed_tokens.weight
    if ranks.tp_size > 1:
        _parallelise(model, plan, ranks)
    # The only buffers are the rotary frequencies; they are computed, never stored.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(ranks.device)
    return LoadedModel(config, stage, first, last, model.model.eval(), model.lm_head)


def _layer_elements(hf: Any, head_dim: int) -> int:
    """Weights of one layer, norms and biases left out."""
    attention_ = hf.hidden_size * head_dim * 2 * (hf.num_attention_heads + hf.num_key_value_heads)
    return int(attention_ + 3 * hf.hidden_size * hf.intermediate_size)


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


def _sources(model: torch.nn.Module, stage: range, *, tied: bool) -> dict[str, str]:
    """Where each parameter is in the checkpoint.  A tied head shares the embedding of its own rank, or reads a copy."""
    prefix = "model.layers."
    sources = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        sources[name] = name
        if name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            sources[name] = f"{prefix}{int(index) + stage.start}.{rest}"
    if tied and "lm_head.weight" in sources:
        sources["lm_head.weight"] = "model.embed_tokens.weight"
        if "model.embed_tokens.weight" in sources:
            del sources["lm_head.weight"]
    return sources


def _architecture(raw: dict[str, Any], model_path: Path) -> str:
    if "auto_map" in raw:
        raise ConfigError(
            f"{model_path / 'config.json'} has auto_map: the model brings its own Python code, which is never run. "
            f"Use a checkpoint of one of {', '.join(SUPPORTED)}"
        )
    if "quantization_config" in raw:
        raise ConfigError(f"{model_path} is quantised, which is not supported: use the unquantised checkpoint")
    names = raw.get("architectures") or ["none"]
    if names[0] not in SUPPORTED:
        raise ConfigError(f"{model_path}: architecture {names[0]} is not supported; supported: {', '.join(SUPPORTED)}")
    return str(names[0])


def _resolve_dtype(name: str, hf: Any) -> torch.dtype:
    if name != "auto":
        return _DTYPES[name]
    return hf.dtype if isinstance(hf.dtype, torch.dtype) else torch.float32


def _eos_token_ids(model_path: Path, hf: Any) -> tuple[int, ...]:
    """generation_config.json wins over config.json, as in transformers."""
    generation = model_path / "generation_config.json"
    ids = read_json(generation).get("eos_token_id") if generation.is_file() else None
    ids = hf.eos_token_id if ids is None else ids
    return tuple(ids) if isinstance(ids, list | tuple) else () if ids is None else (ids,)


def _style(module_name: str, plan: dict[str, str]) -> str | None:
    return next((style for pattern, style in plan.items() if fnmatch.fnmatchcase(module_name, pattern)), None)


def _fill(
    model: torch.nn.Module,
    sources: dict[str, str],
    entries: dict[str, TensorEntry],
    plan: dict[str, str],
    ranks: Ranks,
) -> None:
    """Replace every meta parameter by this rank's slice of the checkpoint's tensor."""
    wanted = {name: model.get_parameter(name) for name in sources}
    _check_present({sources[name]: tuple(parameter.shape) for name, parameter in wanted.items()}, entries)
    with ExitStack() as stack:
        shards = {file: _open(file, stack) for file in {entries[source].file for source in sources.values()}}
        for name, parameter in wanted.items():
            owner, _, kind = name.rpartition(".")
            cut = cut_of(_style(owner, plan), kind, ranks)
            source = sources[name]
            tensor = _read_slice(shards[entries[source].file], source, cut, tuple(parameter.shape))
            value = torch.nn.Parameter(tensor.to(ranks.device, parameter.dtype), requires_grad=False)
            setattr(model.get_submodule(owner), kind, value)


def _check_present(wanted: dict[str, tuple[int, ...]], entries: dict[str, TensorEntry]) -> None:
    if missing := sorted(set(wanted) - set(entries)):
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise ConfigError(f"the checkpoint lacks {shown}: it is incomplete or of another model than its config.json")
    for name, shape in wanted.items():
        if entries[name].shape != shape:
            raise ConfigError(
                f"{name} in {entries[name].file} is {list(entries[name].shape)}, but config.json makes it "
                f"{list(shape)}: weights and config are of different models"
            )


def _open(file: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(file, framework="pt", device="cpu"))
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"cannot read {file}: {error}: download it again") from error


def _read_slice(shard: Any, name: str, cut: Cut, shape: tuple[int, ...]) -> torch.Tensor:
    tensor: torch.Tensor = shard.get_slice(name)[cut.bounds(shape)]
    return tensor.contiguous()


def _parallelise(model: torch.nn.Module, plan: dict[str, str], ranks: Ranks) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and (style := _style(name, plan)) is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, parallel_linear(module, style, ranks))
