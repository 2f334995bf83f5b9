"""Configs: read them, refuse those whose numbers disagree, and turn them into metadata and a model without weights."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.checkpoints.files import read_json, refuse_pickle
from zoo.errors import UserError, unknown
from zoo.tensors import Metadata

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

# What a size is called, transformers' common name first. Aliases inside one config class (n_embd) are not listed:
# its attribute_map resolves them.
NAMES = {
    "width": ("hidden_size", "d_model", "n_embd"),
    "layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    "heads": ("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim", "d_kv"),
    "ffn": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "encoder_ffn_dim", "d_ff", "inner_dim"),
    "vocab": ("vocab_size",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_ffn": ("moe_intermediate_size",),
    "experts_per_token": ("num_experts_per_tok",),
}
LIMIT = {"layers": 10_000, "experts": 100_000}  # anything above is a typing error, and would take minutes to build
MOST_PARAMETERS = 10**14
ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation", "afn")
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon")


def read_config(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """A config.json, a folder that holds one, a hub id (org/name or org/name@revision) or a parsed config ->
    (parsed config, what to call it in an error). UserError where there is none; only a hub id uses the network."""
    if isinstance(source, Mapping):
        return dict(source), "config"
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / "config.json"
    elif not path.exists():
        from zoo.checkpoints.hub import HUB_ID, with_retries

        if not isinstance(source, str) or source.endswith(".json") or not HUB_ID.fullmatch(source):
            raise UserError(
                f"{source}: no such file or folder, and no hub id; give a config.json, a folder that holds one, or "
                "org/name"
            )
        from huggingface_hub import hf_hub_download

        repo, _, revision = source.partition("@")
        path = Path(with_retries(lambda: hf_hub_download(repo, "config.json", revision=revision or None), source))
    refuse_pickle(path)
    return read_json(path), str(path)


def parse_config(data: Mapping[str, Any], where: str = "config") -> PretrainedConfig:
    """A parsed config.json -> transformers' config object. UserError for an architecture that transformers does not
    know (no remote code is ever run), for a quantised checkpoint, and for numbers that disagree."""
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = data.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"{where}: has no model_type; it must be the config.json of a transformers model")
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in data:
            raise UserError(f"{where}: model_type {model_type!r} needs remote code (auto_map), which is never run")
        raise UserError(f"{where}: {unknown('model_type', model_type, CONFIG_MAPPING)}"[:300])
    if data.get("quantization_config"):
        raise UserError(f"{where}: quantization_config is set; quantised tensors cannot be described, take it out")
    _check_sizes(data, CONFIG_MAPPING[model_type], where)
    for key in ("dtype", "torch_dtype"):
        if isinstance(name := data.get(key), str) and not isinstance(getattr(torch, name, None), torch.dtype):
            raise UserError(f"{where}: {key} is {name!r}, which torch does not have; say float32, bfloat16 or float16")
    rest = {k: v for k, v in data.items() if k not in ("model_type", "auto_map", "transformers_version")}
    try:
        with quiet_transformers():
            config = AutoConfig.for_model(model_type, **copy.deepcopy(rest))
    except Exception as error:  # strict validation, a dtype that torch lacks, a missing sub-config: all the config's
        raise UserError(f"{where}: {_first_reason(error)}") from error
    check_config(config, where)
    return config


def check_config(config: PretrainedConfig, where: str = "config") -> None:
    """UserError, naming keys and values, where the sizes of a config cannot make a model."""
    text = text_config(config)
    _check_sizes({k: getattr(text, k, None) for names in NAMES.values() for k in names}, type(text), where)
    width, heads, kv_heads = _size(text, "width"), _size(text, "heads"), _kv_heads(text)
    name = {what: _key(text, what) for what in NAMES}
    if width and heads and not _size(text, "head_dim") and width % heads:
        raise UserError(f"{where}: {name['width']} {width} is not a multiple of {name['heads']} {heads}")
    if heads and kv_heads and heads % kv_heads:
        raise UserError(f"{where}: {name['heads']} {heads} is not a multiple of {name['kv_heads']} {kv_heads}")
    head_dim = _head_dim(text)
    if head_dim % 2 and _rope(text).get("rope_theta") and "rotary_dim" not in vars(text):
        raise UserError(f"{where}: head_dim {head_dim} is odd; rotary embedding needs an even one")
    experts, chosen = _size(text, "experts"), _size(text, "experts_per_token")
    if experts and chosen and chosen > experts:
        raise UserError(f"{where}: {name['experts_per_token']} {chosen} exceeds {name['experts']} {experts}")


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The language model inside a multimodal config (Gemma 3), or the config itself."""
    return getattr(config, "text_config", None) or config


def meta_model(config: PretrainedConfig, where: str = "config") -> PreTrainedModel:
    """The model of a config on the meta device, in the config's dtype: names and shapes, no memory.

    The class is the one that `architectures` names, else the one for sequence-to-sequence, masked or causal language
    modelling, in this order, else the bare model. UserError where transformers cannot build it."""
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"), quiet_transformers():
            model = _model_class(config)._from_config(config)
    except UserError:
        raise
    except Exception as error:  # whatever a constructor says of values that no check above knows
        kind = config.model_type
        raise UserError(f"{where}: transformers cannot build this {kind}: {_reason(error, config)}") from error
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > MOST_PARAMETERS:
        raise UserError(f"{where}: its sizes make {parameters:.1e} parameters; one of them must be a typing error")
    return model


def _model_class(config: PretrainedConfig) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    for named in config.architectures or ():
        cls = getattr(transformers, named, None)
        if getattr(cls, "config_class", None) is type(config):
            return cls
    mappings = [auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_MAPPING]
    if not getattr(config, "is_decoder", False):
        mappings.insert(0, auto.MODEL_FOR_MASKED_LM_MAPPING)
    if getattr(config, "is_encoder_decoder", False):
        mappings.insert(0, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    for mapping in mappings:
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise UserError(f"transformers has no model for a {config.model_type} config; give that of a whole model")


def with_language_head(data: Mapping[str, Any], where: str = "config") -> dict[str, Any]:
    """The config with an architecture that predicts tokens. `architectures` may name a bare model or a classifier;
    weights for one only seem to load as a language model, whose head would be drawn anew. It then becomes the class
    that transformers has for language modelling with this model_type. UserError where there is none."""
    from transformers.models.auto import modeling_auto as auto

    config = parse_config(data, where)
    heads: set[str] = set()
    for task in ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "PRETRAINING"):
        for found in getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values():
            heads |= {found} if isinstance(found, str) else set(found)
    named = _model_class(config).__name__
    if named in heads:
        return dict(data)
    config.architectures = None
    head = _model_class(config).__name__
    if head not in heads:
        raise UserError(f"{where}: {named} is no language model, and transformers has none for {config.model_type!r}")
    log.info("%s: %s predicts no tokens; written as %s, the language model of this kind", where, named, head)
    return {**data, "architectures": [head]}


def to_disk(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names and tensors as in memory -> as `save_pretrained` writes them: transformers 5 fuses Mixtral's experts
    and renames heads in memory only. Works on the meta device; all tensors that are converted together (the experts
    of a layer) must be in `state`."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(state))


def metadata_of(config: PretrainedConfig) -> Metadata | None:
    """The numbers of a config, or None where it has no residual stream (a convolutional network). `norm`,
    `positions` and `extra['rms_offset']` are not in a config: the blueprint reads them off the model."""
    text = text_config(config)
    width, layers = _size(text, "width"), _size(text, "layers")
    if not width or not layers:
        return None
    rope = _rope(text)
    heads, head_dim = _size(text, "heads"), _head_dim(text)
    fraction = rope.get("partial_rotary_factor") or getattr(text, "partial_rotary_factor", None) or 1.0
    rotary = getattr(text, "rotary_dim", None) or int(head_dim * fraction)
    extra: dict[str, object] = {
        "activation": next((a for k in ACTIVATIONS if isinstance(a := getattr(text, k, None), str)), None),
        "norm_eps": next((e for k in EPSILONS if (e := getattr(text, k, None)) is not None), None),
        "rotary_dim": rotary if rope.get("rope_theta") else None,
        "rope_theta_local": rope.get("rope_theta_local"),
        "embed_scale": _embed_scale(text, width),
        "expert_ffn": _size(text, "expert_ffn") or None,
        "experts_per_token": _size(text, "experts_per_token") or None,
        "parallel_block": _parallel(text),
        "post_norm": getattr(text, "do_layer_norm_before", True) is False,  # OPT-350m
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
    """Without transformers' remarks on token ids and unused keys; errors are raised, not logged."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_sizes(values: Mapping[str, Any], cls: type, where: str) -> None:
    aliases = {alias: name for name, alias in getattr(cls, "attribute_map", {}).items()}
    for key, value in values.items():
        what = next((w for w, names in NAMES.items() if key in names or aliases.get(key) in names), None)
        if what is None or value is None or isinstance(value, list | tuple | Mapping):  # one size per layer or stage
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{where}: {key} is {value!r} where a whole number must be")
        # num_local_experts and its like may be 0 in dense models of a family that also has experts.
        least = 0 if what in ("experts", "expert_ffn", "experts_per_token") else 1
        most = LIMIT.get(what, 2**31 - 1)
        if not least <= value <= most:
            raise UserError(f"{where}: {key} is {value}; it must be from {least} to {most}")


def _key(config: PretrainedConfig, what: str) -> str:
    """The name under which a config has a size."""
    found = next((k for k in NAMES[what] if getattr(config, k, None) is not None), NAMES[what][0])
    return config.attribute_map.get(found, found)


def _size(config: PretrainedConfig, what: str) -> int:
    """A size of a config, 0 where it has none or one per layer."""
    value = next((v for k in NAMES[what] if (v := getattr(config, k, None)) is not None), 0)
    return value if isinstance(value, int) else 0


def _kv_heads(config: PretrainedConfig) -> int:
    # Falcon and StarCoder 1 say multi_query and mean one; Falcon's new layout goes by num_kv_heads again.
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    return _size(config, "kv_heads") or _size(config, "heads")


def _head_dim(config: PretrainedConfig) -> int:
    heads = _size(config, "heads")
    return _size(config, "head_dim") or (_size(config, "width") // heads if heads else 0)


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """transformers 5's rope_parameters; of one entry per kind of layer (Gemma 3), that of full attention, with the
    base of the sliding layers beside it."""
    rope = getattr(config, "rope_parameters", None) or {}
    if getattr(config, "alibi", False):
        return {}
    if "full_attention" in rope:
        local = rope.get("sliding_attention") or {}
        return {**(rope["full_attention"] or {}), "rope_theta_local": local.get("rope_theta")}
    if not rope and getattr(config, "rotary_dim", None):  # GPT-J has a fixed base
        return {"rope_theta": 10000.0}
    return rope


def _embed_scale(config: PretrainedConfig, width: int) -> float:
    """What the embedding is multiplied with before the first block."""
    if config.model_type.startswith(("gemma", "t5gemma", "vaultgemma")) or getattr(config, "scale_embedding", False):
        return width**0.5
    return float(getattr(config, "embedding_multiplier", 1.0))


def _parallel(config: PretrainedConfig) -> bool:
    """Whether attention and MLP read the same stream and are added together."""
    keys = ("use_parallel_residual", "parallel_attn")
    always = ("cohere", "cohere2", "phi", "gptj", "codegen")
    return config.model_type in always or any(bool(getattr(config, k, False)) for k in keys)


def _reason(error: BaseException, config: PretrainedConfig) -> str:
    """Why a model was not built. A KeyError is a value (of an activation, of a kind of rotary embedding) that
    transformers looked up in vain: say whose."""
    if not isinstance(error, KeyError):
        return _first_reason(error)
    value = error.args[0]
    values = config.to_dict().items()
    key = next((k for k, v in values if v == value or (isinstance(v, dict) and value in v.values())), "a value")
    return f"{key} is {value!r}, which it does not know"


def _first_reason(error: BaseException) -> str:
    """The telling line of an error: transformers' validators put it last, after the name of the validator."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = lines[-1] if lines[0].startswith(("Validation error", "Class validation error")) else lines[0]
    return re.sub(r"^\w*Error: ", "", line)[:300]
