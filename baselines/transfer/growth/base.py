"""What the growth methods share: what cannot be grown, what would not be the donor's function, and silent layers."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from baselines.transfer.base import Transfer
from baselines.transfer.sizes import metadata_pair
from zoo.targets.blueprint import Blueprint
from zoo.targets.configs import ACTIVATIONS, EPSILONS, NAMES, parse, text_config
from zoo.tensors import TensorSpec

if TYPE_CHECKING:
    from zoo.donors.donor import Donor
    from zoo.donors.zoo import Zoo

log = logging.getLogger(__name__)

# Keys of a config that say nothing about the function beside what is compared already, and endings of such keys.
IGNORED_KEYS = {
    *(key for keys in NAMES.values() for key in keys), *ACTIVATIONS, *EPSILONS, "rope_theta", "rotary_dim",
    "rotary_pct", "partial_rotary_factor", "use_parallel_residual", "parallel_attn", "layer_types",
    "no_rope_layers", "model_type", "no_rope_layer_interval", "max_window_layers", "sliding_window_pattern",
    "architectures", "dtype", "torch_dtype", "use_cache", "initializer_range", "max_position_embeddings",
    "n_positions", "n_ctx", "tie_word_embeddings", "transformers_version", "_name_or_path", "pretraining_tp",
    "id2label", "label2id", "problem_type", "hidden_dropout", "word_embed_proj_dim", "bos_token", "eos_token",
    "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder",
    "layerdrop", "dropout", "init_std", "_sliding_window_pattern", "attn_pdrop", "embd_pdrop", "resid_pdrop",
}  # fmt: skip
IGNORED_ENDINGS = ("_token_id", "_dropout", "_implementation", "_dropout_prob")

SHRINKING_METHODS = "for a smaller one use weight-selection, subcloning, pruning or sliced"


@dataclass(kw_only=True)
class Growth(Transfer):
    """A transfer to a target that is nowhere smaller than its donor. `fit` says aloud what keeps the target from
    computing the donor's function."""

    family: ClassVar[str] = "growth"

    @property
    def grows(self) -> bool:
        return True

    def refuses(self, donor: Donor, blueprint: Blueprint) -> list[str]:
        return growth_mismatches(donor, blueprint)

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        super().fit(zoo, blueprint)
        for reason in self.inexact(blueprint):
            log.info("%s: not exactly the donor's function: %s", self.name, reason)
        return self

    def inexact(self, blueprint: Blueprint) -> list[str]:
        """Why the target's function will not be the donor's, beside other tokens: one line each."""
        return config_differences(self.source, blueprint)


def growth_mismatches(donor: Donor, blueprint: Blueprint) -> list[str]:
    """The axes that a target has less of than the donor, with both sizes; and what no index map can carry over."""
    source, target = metadata_pair(donor, blueprint)
    axes = ("layers", "width", "ffn", "head_dim", "kv_heads", "heads")
    pairs = [(axis, getattr(source, axis), getattr(target, axis)) for axis in axes]
    smaller = [f"{axis} {t} would shrink to {s}" for axis, t, s in pairs if s < t]
    found = [f"{', '.join(smaller)}: {SHRINKING_METHODS}"] if smaller else []
    if target.kv_heads >= source.kv_heads and target.heads >= source.heads:
        per_group, wanted = source.heads // source.kv_heads, target.heads // target.kv_heads
        if target.kv_heads // source.kv_heads * wanted < per_group:
            found.append(
                f"{per_group} query heads of a KV head do not fit the target's {wanted}"
                f" (kv_heads {source.kv_heads} -> {target.kv_heads}): give it more KV heads, or more queries each"
            )
    if unknown := blueprint.unknown:
        found.append(
            f"{len(unknown)} tensors of the target have no known role ({unknown[0]}) and would be drawn anew, which"
            " loses the donor's function: row-column grows it all the same"
        )
    if target.width > source.width and not blueprint.find("norm"):
        found.append("the target has no norm whose gain would show how wide its stream is: keep its width")
    elif target.width > source.width and blueprint.ties and not blueprint.find("norm", site="final"):
        found.append("its head is tied and no norm before it takes its scale: untie the head, or keep the width")
    return found


def config_differences(donor: Donor, blueprint: Blueprint) -> list[str]:
    """What two configs with the same kinds of tensors compute differently, one line each."""
    source, target = metadata_pair(donor, blueprint)
    pairs = [(key, source.extra.get(key), target.extra.get(key)) for key in ("activation", "norm_eps", "rotary_dim")]
    pairs += [("parallel_block", source.extra.get("parallel_block"), target.extra.get("parallel_block"))]
    pairs += [("rope_theta", source.rope_theta, target.rope_theta)]
    found = [f"{name} {t} -> {s}" for name, t, s in pairs if t != s]
    if source.architecture == target.architecture:
        here, there = _other_settings(donor.blueprint), _other_settings(blueprint)
        found += [
            f"{key} {here.get(key)} -> {there.get(key)}"
            for key in sorted({*here, *there})
            if here.get(key) != there.get(key)
        ]
    if target.tied and not source.tied:
        found.append("the target ties its head to the embedding and the donor does not")
    same_depth = tuple(range(source.layers))
    if target.layers == source.layers and (moved := changed_layer_kind(donor, blueprint, same_depth)):
        found.append(moved)
    return found


def changed_layer_kind(donor: Donor, blueprint: Blueprint, layers: tuple[int, ...]) -> str | None:
    """Where a donor's layer would come to stand as a layer of another kind (sliding instead of full attention), the
    first one as text. layers: the donor's layer of each of the target's, of which the first copy counts."""
    here, there = _layer_kinds(donor.blueprint), _layer_kinds(blueprint)
    for place, layer in enumerate(layers):
        if layer not in layers[:place] and here and there and here[layer] != there[place]:
            return f"layer {layer} ({here[layer]}) would be the target's layer {place} ({there[place]})"
    return None


def _other_settings(blueprint: Blueprint) -> dict[str, Any]:
    """What a config says beside sizes, names, and what `differences` and `moved_kinds` look at themselves."""
    if blueprint.config is None:
        return {}
    settings = text_config(parse(blueprint.config)).to_dict()
    if isinstance(rope := settings.get("rope_parameters"), dict):
        settings["rope_parameters"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return {
        key: value for key, value in settings.items() if key not in IGNORED_KEYS and not key.endswith(IGNORED_ENDINGS)
    }


def _layer_kinds(blueprint: Blueprint) -> list[str]:
    """The kind of every layer, where a config tells them apart: of attention, and whether it rotates (SmolLM 3)."""
    if blueprint.config is None:
        return []
    config: Any = text_config(parse(blueprint.config))
    types = getattr(config, "layer_types", None)
    rotates = getattr(config, "no_rope_layers", None)
    if types and rotates:
        return [f"{kind}, {'rotary' if one else 'no rotary'}" for kind, one in zip(types, rotates, strict=True)]
    return list(types or ())


def repeated_layers(layers: tuple[int, ...]) -> set[int]:
    """The target's layers that are further copies of a donor's."""
    return {place for place, layer in enumerate(layers) if layer in layers[:place]}


def silence_layers(
    tensors: Iterable[tuple[str, Tensor]], blueprint: Blueprint, layers: Collection[int]
) -> Iterator[tuple[str, Tensor]]:
    """Zero for what has the last word on what these layers add to the stream, so that they add nothing, yet learn."""
    for name, tensor in tensors:
        spec = blueprint[name]
        if spec.layer in layers and ends_residual_branch(spec, blueprint):
            tensor = torch.full_like(tensor, -blueprint.offset(spec))
        yield name, tensor


def ends_residual_branch(spec: TensorSpec, blueprint: Blueprint) -> bool:
    """Whether a tensor has the last word on what its half of a block adds to the stream: the norm after the writer
    where there is one, else the writer."""
    if spec.role == "norm":
        return spec.site in ("attn.out", "mlp.out")
    sites = {"attn.o": "attn.out", "mlp.down": "mlp.out"}
    return spec.role in sites and not blueprint.find("norm", layer=spec.layer, site=sites[spec.role])


def has_post_norm(blueprint: Blueprint) -> bool:
    """Whether norms stand on the stream itself (BERT, OPT-350m), so that no layer can be made to do nothing."""
    assert blueprint.metadata is not None
    return blueprint.metadata.norm == "layer" and bool(blueprint.find("norm", site="attn.out"))
