"""Reads configs, refuses those whose numbers disagree, and turns them into metadata and models without weights."""

from __future__ import annotations

import copy
import logging
import re
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.checkpoints.files import read_json, refuse_other_formats
from zoo.checkpoints.hub import HUB_ID, with_retries
from zoo.checkpoints.quantised import without_quantisation
from zoo.errors import UserError, unknown
from zoo.limits import (
    MAX_BUFFER_VALUES,
    MAX_CONFIG,
    MAX_EXPERT_MATRICES,
    MAX_EXPERT_MODULES,
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_MODULES,
)
from zoo.targets.config_bounds import check_bounds, limited_modules
from zoo.targets.config_facts import ask
from zoo.tensors import Metadata

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

# The keys of each size in configs, the most common key of transformers first. A key that is an alias within one config
# class is not listed: the class's attribute_map resolves it.
SIZE_KEYS = {
    "width": ("hidden_size", "d_model", "n_embd"),
    "layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    "heads": ("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim", "d_kv"),
    "ffn": (
        "intermediate_size",
        "ffn_dim",
        "n_inner",
        "ffn_hidden_size",
        "encoder_ffn_dim",
        "d_ff",
        "inner_dim",
        "hidden_dim",
    ),
    "vocab": ("vocab_size",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_ffn": ("moe_intermediate_size",),
    "experts_per_token": ("num_experts_per_tok",),
}
NEIGHBOUR_PAIRS = (  # architectures whose rotary embedding turns the coordinates (0, 1), (2, 3), … of a head
    "codegen", "cohere", "cohere2", "cohere2_moe", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "gptj", "helium",
    "llama4_text",
)  # fmt: skip
MODEL_DTYPES = ("float32", "bfloat16", "float16", "float64", "float", "half", "double")  # in which torch computes
LARGEST = {"layers": MAX_LAYERS, "experts": MAX_EXPERTS}
MOST_PARAMETERS = 10**14
ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation", "afn")
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon")


def read_config(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(the parsed config, its name in errors).

    source: a config.json, a folder that contains one, a hub id (org/name or org/name@revision) or a parsed config. Only
    a hub id uses the network. UserError if there is no config.
    """
    if isinstance(source, Mapping):
        return dict(source), "config"
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / "config.json"
    elif not path.exists():
        if not isinstance(source, str) or source.endswith(".json") or not HUB_ID.fullmatch(source):
            raise UserError(
                f"{source}: no such file or folder, and not a hub id; give a config.json, a folder with one, or "
                "org/name"
            )
        from huggingface_hub import hf_hub_download

        repo, _, revision = source.partition("@")
        path = Path(with_retries(lambda: hf_hub_download(repo, "config.json", revision=revision or None), source))
    refuse_other_formats(path)
    return read_json(path, MAX_CONFIG), str(path)


def parse_config(data: Mapping[str, Any], where: str = "config") -> PretrainedConfig:
    """A parsed config.json as transformers' config object. Never runs remote code.

    A quantization_config is left out. UserError for an architecture that transformers does not know, and numbers that
    disagree.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = data.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"{where}: has no model_type; give the config.json of a transformers model")
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in data:
            raise UserError(f"{where}: model_type {model_type!r} needs remote code (auto_map), which is never run")
        raise UserError(f"{where}: {unknown('model_type', model_type, CONFIG_MAPPING)}"[:300])
    check_bounds(data, where)
    data = without_quantisation(data)
    _check_sizes(data, CONFIG_MAPPING[model_type], where)
    for part in (data, *(value for value in data.values() if isinstance(value, Mapping))):  # with sub-configs
        _check_dtype(part, where)
    rest = {k: v for k, v in data.items() if k not in ("model_type", "auto_map", "transformers_version")}
    try:
        with quiet_transformers():
            config = AutoConfig.for_model(model_type, **decode_floats(rest))
    except Exception as error:  # strict validation, an unknown dtype, a missing sub-config
        raise UserError(f"{where}: {_reason(error, data)}") from error
    check_config(config, where)
    return config


def _check_dtype(data: Mapping[str, Any], where: str) -> None:
    for key in ("dtype", "torch_dtype"):
        name = data.get(key)
        if name not in (None, *MODEL_DTYPES) and not isinstance(name, torch.dtype):
            found = reprlib.repr(name)
            raise UserError(f"{where}: {key} is {found}, not a dtype of a model; give float32, bfloat16 or float16")


def check_config(config: PretrainedConfig, where: str = "config") -> None:
    """UserError, with keys and values, where the sizes of a config disagree."""
    text = text_config(config)
    _check_layer(text, where)
    for layer in _layer_configs(text):
        _check_layer(layer, where)
    name = {size: _key(text, size) for size in SIZE_KEYS}
    experts, chosen = _size(text, "experts"), _size(text, "experts_per_token")
    if experts and chosen and chosen > experts:
        raise UserError(f"{where}: {name['experts_per_token']} {chosen} exceeds {name['experts']} {experts}")


def _check_layer(config: PretrainedConfig, where: str) -> None:
    """UserError, with keys and values, where the sizes of one layer (or of a config without layers' own) disagree."""
    _check_sizes({k: _value(config, k) for keys in SIZE_KEYS.values() for k in keys}, type(config), where)
    width, heads, kv_heads = _size(config, "width"), _size(config, "heads"), _kv_heads(config)
    name = {size: _key(config, size) for size in SIZE_KEYS}
    if width and heads and not _size(config, "head_dim") and width % heads:
        raise UserError(f"{where}: {name['width']} {width} is not a multiple of {name['heads']} {heads}")
    if heads and kv_heads and heads % kv_heads:
        raise UserError(f"{where}: {name['heads']} {heads} is not a multiple of {name['kv_heads']} {kv_heads}")
    head_dim = _head_dim(config)
    if head_dim % 2 and _rope(config).get("rope_theta") and "rotary_dim" not in vars(config):
        raise UserError(f"{where}: head_dim {head_dim} is odd; rotary embedding needs an even one")


def decode_floats(value: Any) -> Any:
    """A copy of a parsed config.json with floats in place of what JSON has no number for.

    transformers 5 writes infinity as {"__float__": "Infinity"}, and -Infinity and NaN likewise.
    """
    if isinstance(value, Mapping):
        name = value.get("__float__") if len(value) == 1 else None
        if isinstance(name, str) and name in ("Infinity", "-Infinity", "NaN"):
            return float(name)
        return {key: decode_floats(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(decode_floats(entry) for entry in value)
    return copy.deepcopy(value)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The language model inside a multimodal config (Gemma 3), or the config itself."""
    return getattr(config, "text_config", None) or config


def meta_model(config: PretrainedConfig, where: str = "config") -> PreTrainedModel:
    """The model of a config on the meta device, in the config's dtype: names and shapes, no memory.

    Its class is the one in `architectures`, else the one for sequence-to-sequence, masked or causal language modelling
    (in this order), else the bare model. UserError where transformers cannot build it.
    """
    config = copy.deepcopy(config)
    try:
        text = text_config(config)
        most = MAX_MODULES + min(MAX_EXPERT_MODULES, 10 * _size(text, "layers") * _size(text, "experts"))
        with torch.device("meta"), quiet_transformers(), limited_modules(most, where):
            model = _model_class(config)._from_config(config)
    except UserError:
        raise
    except Exception as error:  # a constructor's reason for values that no check above covers
        reason = _reason(error, vars(config))
        raise UserError(f"{where}: transformers cannot build this {config.model_type}: {reason}") from error
    experts = sum(p.shape[0] for p in model.parameters() if p.ndim == 3 and p.shape[1] > 1)  # fused: [experts, out, in]
    if experts > MAX_EXPERT_MATRICES:
        raise UserError(
            f"{where}: its layers have {experts} expert matrices, more than the {MAX_EXPERT_MATRICES} allowed"
        )
    buffers = sum(b.numel() for b in model.buffers())
    if buffers > MAX_BUFFER_VALUES:
        raise UserError(f"{where}: its sizes give buffers of {buffers:.1e} values; check them for a typing error")
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > MOST_PARAMETERS:
        raise UserError(f"{where}: its sizes give {parameters:.1e} parameters; check them for a typing error")
    return model


def _model_class(config: PretrainedConfig) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    for class_name in config.architectures or ():
        cls = getattr(transformers, class_name, None)
        if getattr(cls, "config_class", None) is type(config):
            return cls
    mappings = [auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_MAPPING]
    if not getattr(config, "is_decoder", False):
        mappings.insert(0, auto.MODEL_FOR_MASKED_LM_MAPPING)
    if getattr(config, "is_encoder_decoder", False):
        mappings.insert(0, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    for mapping in mappings:
        if type(config) in mapping:
            classes = mapping[type(config)]
            return classes[0] if isinstance(classes, tuple) else classes
    raise UserError(f"transformers has no model for a {config.model_type} config; give the config of a whole model")


def model_class_name(data: Mapping[str, Any], where: str = "config") -> str:
    """The name of the class of transformers that a parsed config describes. UserError as `parse_config`."""
    return ask("class", data, lambda: str(_model_class(parse_config(data, where)).__name__))


def with_language_head(data: Mapping[str, Any], where: str = "config") -> dict[str, Any]:
    """The config with an architecture that predicts tokens.

    `architectures` may name a bare model or a classifier. A language model that loads such weights draws its head at
    random. The architecture then becomes transformers' language model for this model_type. UserError where there is
    none.
    """
    own, language_model = ask("language-model", data, lambda: _language_model(data, where))
    if own == language_model:
        return dict(data)
    log.info("%s: %s predicts no tokens; the language model %s is written instead", where, own, language_model)
    return {**data, "architectures": [language_model]}


def _language_model(data: Mapping[str, Any], where: str) -> list[str]:
    """[name of the class that a config describes, name of the class that predicts tokens]."""
    from transformers.models.auto import modeling_auto as auto

    config = parse_config(data, where)
    language_models: set[str] = set()
    for task in ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "PRETRAINING"):
        for classes in getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values():
            language_models |= {classes} if isinstance(classes, str) else set(classes)
    own = _model_class(config).__name__
    if own in language_models:
        return [own, own]
    config.architectures = None
    language_model = _model_class(config).__name__
    if language_model not in language_models:
        raise UserError(f"{where}: {own} is not a language model, and transformers has none for {config.model_type!r}")
    return [own, language_model]


def to_disk(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names and tensors in memory -> as `save_pretrained` writes them.

    transformers 5 fuses Mixtral's experts and renames heads in memory only. Works on the meta device. All tensors that
    are converted together (the experts of a layer) must be in `state`.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(state))


def names_in_memory(model: PreTrainedModel) -> dict[str, str]:
    """Name on disk -> name in memory, for tensors that are at most renamed (the head of GPT-NeoX)."""
    state = model.state_dict()
    names = {id(tensor): name for name, tensor in state.items()}
    return {name: names[id(tensor)] for name, tensor in to_disk(model, state).items() if id(tensor) in names}


def metadata_of(config: PretrainedConfig) -> Metadata | None:
    """The numbers of a config, None where it has no residual stream (a convolutional network).

    `norm`, `positions` and `extra['rms_offset']` are not in a config: the blueprint takes them from the model.
    """
    text = text_config(config)
    width, layers = _size(text, "width"), _size(text, "layers")
    if not width or not layers:
        return None
    rope = _rope(text)
    heads, head_dim = _size(text, "heads"), _head_dim(text)
    is_rotary = bool(rope.get("rope_theta"))
    rotary = [getattr(text, "rotary_dim", None) or n for n in sorted(_rotary_sizes(text, head_dim))]
    extra: dict[str, object] = {
        "activation": next((a for k in ACTIVATIONS if isinstance(a := getattr(text, k, None), str)), None),
        "norm_eps": next((e for k in EPSILONS if (e := getattr(text, k, None)) is not None), None),
        "rotary_dim": rotary[0] if is_rotary else None,
        "rotary_neighbours": (is_rotary and text.model_type in NEIGHBOUR_PAIRS) or None,
        "rotary_differs": (is_rotary and len(rotary) > 1) or None,  # between the kinds of layers
        "rope_theta_local": rope.get("rope_theta_local"),
        "embed_scale": _embed_scale(text, width),
        "expert_ffn": _size(text, "expert_ffn") or None,
        "experts_per_token": _size(text, "experts_per_token") or None,
        "parallel_block": _parallel(text),
        "post_norm": getattr(text, "do_layer_norm_before", True) is False,  # OPT-350m
        "alibi": text.model_type in ("bloom", "mpt") or bool(getattr(text, "alibi", False)) or None,
        "layer_sizes": _layer_sizes(text) or None,  # sizes that differ between layers
    }
    return Metadata(
        architecture=config.model_type,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=_kv_heads(text),
        head_dim=head_dim,
        ffn=_size(text, "ffn") or 4 * width,
        vocab=_size(text, "vocab"),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        rope_theta=rope.get("rope_theta"),
        experts=_size(text, "experts"),
        extra={k: v for k, v in extra.items() if v is not None},
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' log messages on token ids and unused keys. Errors are raised all the same."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_sizes(values: Mapping[str, Any], cls: type, where: str) -> None:
    """UserError where a size is not a whole number or out of range. cls: the config's class."""
    aliases = {alias: name for name, alias in getattr(cls, "attribute_map", {}).items()}
    for key, value in values.items():
        size = next((s for s, keys in SIZE_KEYS.items() if key in keys or aliases.get(key) in keys), None)
        if size is None or value is None or isinstance(value, list | tuple | Mapping):  # a list: one size per layer
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{where}: {key} is {value!r}; give a whole number")
        # num_local_experts and similar keys may be 0 in the dense models of a family with experts.
        least = 0 if size in ("experts", "expert_ffn", "experts_per_token") else 1
        most = LARGEST.get(size, 2**31 - 1)
        if not least <= value <= most:
            raise UserError(f"{where}: {key} is {value}; give {least} to {most}")


def _value(config: PretrainedConfig, key: str, default: Any = None) -> Any:
    """The value of a key; that of the whole model where layers have values of their own (Gemma 4's head_dim)."""
    try:
        return getattr(config, key, default)
    except RuntimeError:  # transformers raises it for a key that differs between layers
        whole = copy.copy(config)
        whole.allow_global_per_layer_attribute_access = True  # type: ignore[attr-defined]
        with quiet_transformers():
            return getattr(whole, key, default)


def _layer_configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The config of each layer, empty where all layers have the values of the whole model."""
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else []  # type: ignore[attr-defined]


def _key(config: PretrainedConfig, size: str) -> str:
    """The key under which a config has a size."""
    key = next((k for k in SIZE_KEYS[size] if _value(config, k) is not None), SIZE_KEYS[size][0])
    return config.attribute_map.get(key, key)


def _size(config: PretrainedConfig, size: str) -> int:
    """A size of a config: 0 where it has none, and that of the first layer where it lists one per layer."""
    value = next((v for k in SIZE_KEYS[size] if (v := _value(config, k)) is not None), 0)
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return value if isinstance(value, int) else 0


def _layer_sizes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """The sizes that differ between layers: `heads`, `kv_heads`, `head_dim` or `ffn` -> one size per layer."""
    layers, n_layers = _layer_configs(config), _size(config, "layers")
    sizes: dict[str, tuple[int, ...]] = {}
    for size, read in (("heads", _heads), ("kv_heads", _kv_heads), ("head_dim", _head_dim), ("ffn", _ffn)):
        listed = next((v for k in SIZE_KEYS[size] if isinstance(v := _value(config, k), list | tuple)), ())
        if layers:
            sizes[size] = tuple(read(layer) for layer in layers)
        elif len(listed) == n_layers and all(isinstance(n, int) for n in listed):
            sizes[size] = tuple(listed)
    return {size: values for size, values in sizes.items() if len(set(values)) > 1}


def _heads(config: PretrainedConfig) -> int:
    return _size(config, "heads")


def _ffn(config: PretrainedConfig) -> int:
    return _size(config, "ffn")


def _kv_heads(config: PretrainedConfig) -> int:
    # multi_query means one KV head in Falcon and StarCoder 1; Falcon's new layout uses num_kv_heads again.
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    return _size(config, "kv_heads") or _size(config, "heads")


def _head_dim(config: PretrainedConfig) -> int:
    heads = _size(config, "heads")
    return _size(config, "head_dim") or (_size(config, "width") // heads if heads else 0)


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """transformers 5's rope_parameters, {} without a rotary embedding.

    Where they have one entry per kind of layer (Gemma 3): that of full attention, and the sliding layers' rope_theta as
    `rope_theta_local`.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if getattr(config, "alibi", False):
        return {}
    if "full_attention" in rope:
        local = rope.get("sliding_attention") or {}
        return {**(rope["full_attention"] or {}), "rope_theta_local": local.get("rope_theta")}
    if not rope and getattr(config, "rotary_dim", None):  # GPT-J's rope_theta is fixed
        return {"rope_theta": 10000.0}
    return rope


def _rotary_sizes(config: PretrainedConfig, head_dim: int) -> set[int]:
    """How many coordinates of a head the rotary embedding turns in pairs: one number for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] if "full_attention" in rope else [rope]
    common = getattr(config, "partial_rotary_factor", None) or 1.0
    fractions = {
        # A proportional embedding pairs all coordinates, and leaves the pairs of the lowest frequencies as they are.
        1.0 if kind.get("rope_type") == "proportional" else kind.get("partial_rotary_factor") or common
        for kind in kinds
    }
    return {int(head_dim * fraction) for fraction in fractions}


def _embed_scale(config: PretrainedConfig, width: int) -> float:
    """The factor of the embeddings before the first block."""
    if config.model_type.startswith(("gemma", "t5gemma", "vaultgemma")) or getattr(config, "scale_embedding", False):
        return width**0.5
    return float(getattr(config, "embedding_multiplier", 1.0))


def _parallel(config: PretrainedConfig) -> bool:
    """Whether attention and MLP of a block read the same residual stream."""
    keys = ("use_parallel_residual", "parallel_attn")
    always = ("cohere", "cohere2", "phi", "gptj", "codegen")
    return config.model_type in always or any(bool(getattr(config, k, False)) for k in keys)


def _reason(error: BaseException, config: Mapping[str, Any]) -> str:
    """Why a config was not read, or its model not built.

    Python's words for a list that is too short name no list, and a KeyError names only a value. This adds the key.
    """
    if isinstance(error, IndexError) or "not enough values to unpack" in str(error):
        layers = next((config[k] for k in SIZE_KEYS["layers"] if isinstance(config.get(k), int)), 1)
        lists = {k: v for k, v in config.items() if isinstance(v, list | tuple) and k != "architectures"}
        # An inner list can be too short as well, such as those of GPT-Neo's attention_types.
        short = {k: len(v) for k, v in lists.items() if len(v) < layers or any(v == [] or v == () for v in v)}
        named = ", ".join(f"{key} has {count} entries" for key, count in sorted(short.items())[:3])
        return f"a list is too short: {named or _first_reason(error)}; make it longer"
    if not isinstance(error, KeyError):
        return _first_reason(error)
    value = error.args[0]
    key = next((k for k, v in config.items() if v == value or (isinstance(v, dict) and value in v.values())), "a value")
    return f"{key} is {value!r}, which it does not know"


def _first_reason(error: BaseException) -> str:
    """The line of an error that states the reason. transformers' validators put it last, after the validator's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = lines[-1] if lines[0].startswith(("Validation error", "Class validation error")) else lines[0]
    return re.sub(r"^\w*Error: ", "", line)[:300]
