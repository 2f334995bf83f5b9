"""The architecture's own initialisation, one block at a time. It also fills what other methods leave out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

from zoo.options import option
from zoo.sampler import Sampler
from zoo.streams import stream_seed
from zoo.targets.blueprint import Blueprint, meta_model, to_disk
from zoo.targets.configs import parse_config
from zoo.tensors import TensorSpec

if TYPE_CHECKING:
    from zoo.donors.zoo import Zoo

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Default(Sampler):
    """transformers' `_init_weights` for a language model, torch's `reset_parameters` for a plain module.

    Parameters of a plain module that only its constructor sets are left out. Each block (a decoder layer, an embedding,
    a final norm, a head) is built alone in float32 and initialised under the stream (seed, block), on the CPU or a CUDA
    device. The distribution is that of `AutoModelForCausalLM.from_config`, and the bytes do not depend on the order of
    blocks.
    """

    name: ClassVar[str] = "default"
    family: ClassVar[str] = "default"
    summary: ClassVar[str] = "the architecture's own random initialisation under a seed"
    reference: ClassVar[str] = "huggingface/transformers"

    scale: float = option(1.0, "multiplies weights with two or more dimensions")

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        return self

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        yield from self.fill(blueprint, blueprint.names, seed)

    def fill(self, blueprint: Blueprint, names: Collection[str], seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        """`sample` for some tensors only. Blocks that hold none of them are not built."""
        remaining = set(names)
        if not remaining:
            return
        model = empty_model(blueprint)
        for prefix, block, owner in model_blocks(model):
            on_disk = disk_names(model, prefix, block)
            if remaining.isdisjoint(on_disk):
                continue
            state = initialize_block(model, block, owner, prefix, seed, self.device)
            for name, tensor in disk_state(model, prefix, state).items():
                if name in remaining:
                    remaining.discard(name)
                    yield name, tensor * self.multiplier(blueprint[name])
        if remaining and hasattr(model, "save_pretrained"):
            raise RuntimeError(f"no block of {type(model).__name__} holds {sorted(remaining)[:3]}")
        if remaining:
            log.info("only the constructor sets %s: the module's values stay", ", ".join(sorted(remaining)))

    def multiplier(self, spec: TensorSpec) -> float:
        """The factor of the default's draw of a tensor."""
        return self.scale if len(spec.shape) >= 2 else 1.0


def empty_model(blueprint: Blueprint) -> nn.Module:
    """The model that a blueprint describes: its own module, or that of its config on the meta device."""
    if blueprint.module is not None:
        return blueprint.module
    assert blueprint.config is not None  # a blueprint comes from a config or a module
    return meta_model(parse_config(blueprint.config))


def model_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(prefix, block, owner) of the blocks that are initialised one by one, in the model's order.

    A block is an entry of a list of modules, a module without such a list inside, or a module with tensors of its own
    beside its list (BART's buffer `final_logits_bias`). The owner is the innermost enclosing model, whose
    `_init_weights` applies.
    """

    def walk(module: nn.Module, prefix: str, owner: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        if hasattr(module, "_init_weights"):
            owner = module
        if isinstance(module, nn.ModuleList):
            for i, child in module.named_children():
                yield f"{prefix}{i}.", child, owner
        elif not any(isinstance(child, nn.ModuleList) for child in module.modules()):
            if module.state_dict():
                yield prefix, module, owner
        else:
            own = _without_children(module)
            if own.state_dict():
                yield prefix, own, owner
            for name, child in module.named_children():
                yield from walk(child, f"{prefix}{name}.", owner)

    return walk(model, "", model)


def _without_children(module: nn.Module) -> nn.Module:
    """A module with its own parameters and buffers and none of its children."""
    twin = copy.copy(module)
    twin._modules = {}
    return twin


def initialize_block(
    model: nn.Module, block: nn.Module, owner: nn.Module, name: str, seed: int, device: str = "cpu"
) -> dict[str, Tensor]:
    """The persistent tensors of a block, float32 on the CPU, initialised under the stream (seed, name).

    device: where they are drawn, if it is a CUDA device; others draw on the CPU.
    """
    twin = copy.deepcopy(block)
    place = torch.device(device if torch.device(device).type == "cuda" else "cpu")
    twin = twin.float().to_empty(device=place)
    for seen in (*twin.modules(), *twin.parameters()):  # transformers skips what it has initialised before
        seen.__dict__.pop("_is_hf_initialized", None)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
            torch.manual_seed(stream_seed(seed, f"default/{name}"))
            _initialize_module(twin, owner)
    state = {key: tensor.cpu() for key, tensor in twin.state_dict().items()}
    bare = [k for k, v in state.items() if v.isnan().any()]
    if bare and not hasattr(model, "save_pretrained"):
        return {k: v for k, v in state.items() if k not in bare}  # a plain module's constructor cannot be run again
    if bare:
        # Only a constructor sets these, and it has to run for the whole model.
        log.info("%s%s is initialised only by its constructor, so that the whole model is built", name, bare[0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "default/"))
            whole = type(model)(copy.deepcopy(model.config)).float().state_dict()  # type: ignore[call-arg]
        state |= {k: whole[name + k] for k in bare}
    return state


def _initialize_module(module: nn.Module, owner: nn.Module) -> None:
    """Initialises children first, as transformers does, because a parent may rescale its children's draws (GPT-2)."""
    owner = module if hasattr(module, "_init_weights") else owner
    for child in module.children():
        _initialize_module(child, owner)
    if hasattr(owner, "_init_weights"):
        owner._init_weights(module)  # type: ignore[operator]
    elif hasattr(module, "reset_parameters"):
        module.reset_parameters()  # type: ignore[operator]
    elif hasattr(module, "_reset_parameters"):  # torch's attention and its whole transformer
        module._reset_parameters()  # type: ignore[operator]


def disk_state(model: nn.Module, prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A block's tensors with their names and shapes on disk (Mixtral's experts are fused in memory only)."""
    full = {prefix + name: tensor for name, tensor in state.items()}
    return to_disk(model, full) if hasattr(model, "save_pretrained") else full  # type: ignore[arg-type]


def disk_names(model: nn.Module, prefix: str, block: nn.Module) -> list[str]:
    """The names that a block has on disk."""
    return list(disk_state(model, prefix, dict(block.state_dict())))
