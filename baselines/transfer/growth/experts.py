"""Growth of the number of experts, where each copy of an expert has a copy of its row of the router."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from baselines.transfer.sizes import metadata_pair
from zoo.targets.blueprint import Blueprint
from zoo.targets.configs import parse_config, text_config

if TYPE_CHECKING:
    from zoo.donors.donor import Donor

# Routers that choose the experts of the largest logits and weight them by a softmax over all experts, or over the
# chosen ones: n copies of an expert are chosen together and have an n-th of its weight each.
SOFTMAX_ROUTERS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "deepseek_v2", "ernie4_5_moe")
# Routers that weight the experts by a sigmoid each: the same only where the weights are divided by their sum.
SIGMOID_ROUTERS = ("deepseek_v3", "glm4_moe", "dots1")


def experts_mismatch(donor: Donor, blueprint: Blueprint) -> str | None:
    """Why copies of a donor's experts would not compute its function, or None.

    With n copies of each expert the function stays if n times as many are chosen: the copies of the chosen experts have
    equal logits, are chosen together, and their weights add up to the expert's.
    """
    source, target = metadata_pair(donor, blueprint)
    if source.experts == target.experts or not source.experts:
        return None
    chosen, chosen_after = (int(str(side.extra.get("experts_per_token", 1))) for side in (source, target))
    times, rest = divmod(target.experts, source.experts)
    grows = f"experts {source.experts} -> {target.experts}"
    if rest or chosen_after != times * chosen:
        times = max(2, times)
        return (
            f"{grows} with {chosen} -> {chosen_after} per token: copies keep the function where both grow by the same"
            f" whole factor (to {times * source.experts} and {times * chosen}); use row-column for other numbers"
        )
    settings: Any = text_config(parse_config(blueprint.config)) if blueprint.config is not None else None
    if source.architecture in SOFTMAX_ROUTERS:
        return None
    if source.architecture not in SIGMOID_ROUTERS:
        return f"{grows}: how {source.architecture} weights its experts is not known: keep their number"
    if not settings.norm_topk_prob or settings.n_group not in (None, settings.topk_group):
        return f"{grows}: its weights are not divided by their sum, or groups limit the choice: keep their number"
    return None
