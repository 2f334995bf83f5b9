"""A device for tests that behaves as a GPU does: tensors on it and on the CPU do not mix, and moves are counted.

Its tensors say that they are on torch's `meta` device, and hold their values on the CPU, where every operation is
computed. A method that forgets to move a tensor fails as it would on a GPU, on a machine that has none.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "meta"
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)


class DeviceTensor(Tensor):
    """A tensor on the device; `values` is on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> DeviceTensor:
        tensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype, device=DEVICE
        )
        tensor.values = values
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.values})"

    def tolist(self) -> Any:
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{op}: a tensor of the device is used outside PretendDevice")


class PretendDevice(TorchDispatchMode):
    """Inside it, `device="meta"` is the device.

    to_device, to_cpu  how many values moved, by direction
    worked             calls of operations on tensors of the device, by name
    """

    def __init__(self) -> None:
        super().__init__()
        self.to_device = self.to_cpu = 0
        self.worked: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = [x for x in given if isinstance(x, DeviceTensor)]
        target = kwargs.get("device")
        to_device = bool(on_device) if target is None else torch.device(target).type == DEVICE
        is_copy = op in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if on_device and not is_copy:
            self.worked[op.__name__] += 1
            # As on a GPU, single numbers on the CPU may be operands, and indices on the CPU may be brackets.
            may_mix = op in INDEXING and isinstance(args[0], DeviceTensor)
            if mixed := [x for x in given if not isinstance(x, DeviceTensor) and x.ndim and not may_mix]:
                raise RuntimeError(f"{op}: tensors on the device and on the CPU {[tuple(x.shape) for x in mixed]}")
        if target is not None:
            kwargs["device"] = "cpu"
        result = op(*pytree.tree_map(_values, args), **pytree.tree_map(_values, kwargs))
        if op is torch.ops.aten._to_copy.default and bool(on_device) != to_device:
            self.to_device += given[0].numel() * to_device
            self.to_cpu += given[0].numel() * (not to_device)
        if op._schema.is_mutable and given and isinstance(args[0], Tensor):
            return args[0] if isinstance(result, Tensor) else result
        return pytree.tree_map(_on_device, result) if to_device else result


def _values(x: Any) -> Any:
    return x.values if isinstance(x, DeviceTensor) else x


def _on_device(x: Any) -> Any:
    return DeviceTensor(x) if isinstance(x, Tensor) else x
