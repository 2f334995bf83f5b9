"""The base of the growth methods: which targets cannot be grown, what changes the function, and silent layers."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from baselines.transfer.base import Transfer
from baselines.transfer.growth.alibi import alibi_mismatch
from baselines.transfer.growth.experts import experts_mismatch
from baselines.transfer.matching import drawn_tensors, has_unknown_axes
from baselines.transfer.sizes import expert_ffn_size, metadata_pair, shared_ffn_size
from zoo.targets.blueprint import Blueprint
from zoo.targets.configs import ACTIVATIONS, EPSILONS, SIZE_KEYS, parse_config, text_config
from zoo.tensors import NORM_SITES, TensorSpec

if TYPE_CHECKING:
    from zoo.donors.donor import Donor
    from zoo.donors.zoo import Zoo

log = logging.getLogger(__name__)

# Keys of a config that do not change the function, or that are compared elsewhere; and endings of such keys.
IGNORED_KEYS = {
    *(key for keys in SIZE_KEYS.values() for key in keys), *ACTIVATIONS, *EPSILONS, "rope_theta", "rotary_dim",
    "rotary_pct", "partial_rotary_factor", "use_parallel_residual", "parallel_attn", "layer_types",
    "no_rope_layers", "model_type", "no_rope_layer_interval", "max_window_layers", "sliding_window_pattern",
    "architectures", "dtype", "torch_dtype", "use_cache", "initializer_range", "max_position_embeddings",
    "n_positions", "n_ctx", "tie_word_embeddings", "transformers_version", "_name_or_path", "pretraining_tp",
    "id2label", "label2id", "problem_type", "hidden_dropout", "word_embed_proj_dim", "bos_token", "eos_token",
    "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder",
    "layerdrop", "dropout", "init_std", "_sliding_window_pattern", "attn_pdrop", "embd_pdrop", "resid_pdrop",
}  # fmt: skip
IGNORED_ENDINGS = ("_token_id", "_dropout", "_implementation", "_dropout_prob")

# Architectures in which no layer can be silent, for reasons that names and shapes of tensors do not show.
NEVER_SILENT = {
    "distilbert": "its norms act on the residual stream",
    "flaubert": "its norms act on the residual stream",
    "openai-gpt": "its norms act on the residual stream",
    "xlm": "its norms act on the residual stream",
    "esmc": "it divides what layers add by a number that depends on the depth",
}

SHRINKING_METHODS = "for a smaller one use weight-selection, subcloning, pruning or sliced"


@dataclass(kw_only=True)
class Growth(Transfer):
    """A transfer to a target that has no axis smaller than the donor's.

    `fit` logs every reason why the target will not compute exactly the donor's function.
    """

    family: ClassVar[str] = "growth"

    @property
    def keeps_alibi_slopes(self) -> bool:
        return True

    @property
    def allow_larger(self) -> bool:
        return True

    def extra_mismatches(self, donor: Donor, blueprint: Blueprint) -> list[str]:
        source, target = metadata_pair(donor, blueprint)
        return growth_mismatches(donor, blueprint, silent=target.layers > source.layers)

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        super().fit(zoo, blueprint)
        if blueprint.metadata is None:  # a copy of a donor with the same config
            return self
        for reason in self.function_differences(blueprint):
            log.info("%s: the function differs from the donor's: %s", self.name, reason)
        return self

    def function_differences(self, blueprint: Blueprint) -> list[str]:
        """Why the target will not compute the donor's function on the tokens that both know: one line each."""
        return config_differences(self.source, blueprint)


def growth_mismatches(donor: Donor, blueprint: Blueprint, silent: bool) -> list[str]:
    """Why a target cannot be grown from a donor: the axes that would shrink, with both sizes, and missing tensors.

    silent: whether layers of the target are copies that add nothing at first.
    """
    source, target = metadata_pair(donor, blueprint)
    axes = ("layers", "width", "ffn", "head_dim", "kv_heads", "heads", "experts")
    sizes = [(axis, getattr(source, axis), getattr(target, axis)) for axis in axes]
    sizes += [("expert ffn", expert_ffn_size(source), expert_ffn_size(target))]
    sizes += [("shared ffn", shared_ffn_size(source), shared_ffn_size(target))]
    smaller = [
        f"{axis} {n_source} would shrink to {n_target}" for axis, n_source, n_target in sizes if n_target < n_source
    ]
    found = [f"{', '.join(smaller)}: {SHRINKING_METHODS}"] if smaller else []
    if target.kv_heads >= source.kv_heads and target.heads >= source.heads:
        source_queries, target_queries = source.heads // source.kv_heads, target.heads // target.kv_heads
        if target.kv_heads // source.kv_heads * target_queries < source_queries:
            found.append(
                f"{source_queries} query heads per KV head do not fit the target's {target_queries}"
                f" (kv_heads {source.kv_heads} -> {target.kv_heads}): give it more of either"
            )
    resized = any(n_source != n_target for axis, n_source, n_target in sizes if axis != "layers")
    if unknown := _unknown_tensors(donor, blueprint, resized, silent):
        found.append(
            f"{len(unknown)} tensors of the target have no known role ({unknown[0]}), and drawing or copying them"
            " loses the donor's function: use row-column, which accepts that"
        )
    if silent and (reason := _never_silent(blueprint)):
        found.append(f"layers {source.layers} -> {target.layers}: {reason}, so that no layer can be silent")
    found += [reason for reason in (alibi_mismatch(source, target), experts_mismatch(donor, blueprint)) if reason]
    if target.width > source.width and target.extra.get("sinusoidal_positions"):
        found.append("its positions are sine waves over the width, and differ at another width: keep the width")
    has_norms = blueprint.find("norm") or any(blueprint.has_norm(site) for site in NORM_SITES)
    if target.width > source.width and not has_norms:
        found.append("the target has no norms, so that its width cannot be read from its tensors: keep the width")
    elif target.width > source.width and blueprint.ties and not blueprint.find("norm", site="final"):
        found.append("its head is tied and has no norm before it to take the scale: untie the head, or keep the width")
    return found


def _never_silent(blueprint: Blueprint) -> str | None:
    """Why no layer of a model can be made to add nothing, None where each layer can."""
    assert blueprint.metadata is not None
    ends = {spec.layer for spec in blueprint.specs if ends_residual_branch(spec, blueprint)}
    if not ends.issuperset(range(blueprint.metadata.layers)):
        return "its layers share weights, or what they add is unknown"
    if (blueprint.config or {}).get("apply_residual_connection_post_layernorm"):  # Bloom
        return "its norms act on the residual stream"
    return NEVER_SILENT.get(blueprint.metadata.architecture)


def _unknown_tensors(donor: Donor, blueprint: Blueprint, resized: bool, silent: bool) -> list[str]:
    """The tensors with unknown axes that stand against growth.

    Those are all that are drawn. Of those that are copied whole only a single number (of an activation) means the same
    in a model that is resized, and none that lies in a layer if that must be silent.
    """
    drawn = set(drawn_tensors(donor.blueprint, blueprint))
    return [
        spec.name
        for spec in blueprint.specs
        if has_unknown_axes(spec)
        and (spec.name in drawn or (resized and spec.numel > 1) or (silent and spec.layer is not None))
    ]


def config_differences(donor: Donor, blueprint: Blueprint) -> list[str]:
    """What two configs with the same kinds of tensors compute differently: one line each."""
    source, target = metadata_pair(donor, blueprint)
    compared = ["activation", "norm_eps", "rotary_dim", "parallel_block"]
    compared += ["experts_per_token"] if source.experts == target.experts else []  # else `experts_mismatch` compares
    values = [(key, source.extra.get(key), target.extra.get(key)) for key in compared]
    values += [("rope_theta", source.rope_theta, target.rope_theta)]
    if source.architecture == target.architecture:
        old, new = _other_settings(donor.blueprint), _other_settings(blueprint)
        values += [(key, old.get(key), new.get(key)) for key in sorted({*old, *new})]
    found = [f"{key} {before} -> {after}" for key, before, after in values if before != after]
    if target.tied and not source.tied:
        found.append("the target ties its head to the embedding and the donor does not")
    same_depth = tuple(range(source.layers))
    if target.layers == source.layers and (moved := changed_layer_kind(donor, blueprint, same_depth)):
        found.append(moved)
    return found


def changed_layer_kind(donor: Donor, blueprint: Blueprint, layers: tuple[int, ...]) -> str | None:
    """The first layer that would change its kind, for instance from full to sliding attention, as text; None for none.

    layers: the donor's layer for each layer of the target; only the first copy of a layer counts.
    """
    source_kinds, target_kinds = _layer_kinds(donor.blueprint), _layer_kinds(blueprint)
    for place, layer in enumerate(layers):
        is_first = layer not in layers[:place]
        if is_first and source_kinds and target_kinds and source_kinds[layer] != target_kinds[place]:
            return f"layer {layer} ({source_kinds[layer]}) would be the target's layer {place} ({target_kinds[place]})"
    return None


def _other_settings(blueprint: Blueprint) -> dict[str, Any]:
    """The settings of a config that may change the function, but for those that other checks compare."""
    if blueprint.config is None:
        return {}
    config = text_config(parse_config(blueprint.config))
    settings, own_names = config.to_dict(), {config.attribute_map.get(key, key) for key in IGNORED_KEYS}
    if isinstance(rope := settings.get("rope_parameters"), dict):
        settings["rope_parameters"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return {
        key: value
        for key, value in settings.items()
        if key not in IGNORED_KEYS | own_names and not key.endswith(IGNORED_ENDINGS)
    }


def _layer_kinds(blueprint: Blueprint) -> list[str]:
    """The kind of attention of every layer, and whether it rotates (SmolLM 3); empty where the config has no kinds."""
    if blueprint.config is None:
        return []
    config: Any = text_config(parse_config(blueprint.config))
    types = getattr(config, "layer_types", None)
    rotates = getattr(config, "no_rope_layers", None)
    if types and rotates:
        return [f"{kind}, {'rotary' if one else 'no rotary'}" for kind, one in zip(types, rotates, strict=True)]
    return list(types or ())


def repeated_layers(layers: tuple[int, ...]) -> set[int]:
    """The layers of the target that are a second or later copy of a donor's layer."""
    return {place for place, layer in enumerate(layers) if layer in layers[:place]}


def silence_layers(
    tensors: Iterable[tuple[str, Tensor]], blueprint: Blueprint, layers: Collection[int]
) -> Iterator[tuple[str, Tensor]]:
    """Sets to zero what ends the residual branches of these layers: they add nothing at first, and can learn."""
    for name, tensor in tensors:
        spec = blueprint[name]
        if spec.layer in layers and ends_residual_branch(spec, blueprint):
            tensor = torch.full_like(tensor, -blueprint.offset(spec))
        yield name, tensor


def ends_residual_branch(spec: TensorSpec, blueprint: Blueprint) -> bool:
    """Whether a tensor ends a residual branch: the norm after the output projection, or else that projection."""
    if spec.role == "norm":
        return spec.site in ("attn.out", "mlp.out")
    sites = {"attn.o": "attn.out", "mlp.down": "mlp.out"}
    return spec.role in sites and not blueprint.find("norm", layer=spec.layer, site=sites[spec.role])


def has_post_norm(blueprint: Blueprint) -> bool:
    """Whether norms act on the residual stream itself (BERT, OPT-350m), so that no layer can be made to do nothing."""
    assert blueprint.metadata is not None
    return blueprint.metadata.norm == "layer" and (blueprint.has_norm("attn.out") or blueprint.has_norm("mlp.out"))
