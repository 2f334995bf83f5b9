"""Ways to distribute a training that would be wrong are refused."""

from __future__ import annotations

import pytest
from accelerate import DistributedType

from zoo.errors import UserError
from zoo.training.shared_steps import require_data_parallelism


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_sharded_weights_are_refused_in_one_line(kind: DistributedType) -> None:
    with pytest.raises(UserError, match=f"accelerate: {kind.value} is not supported; .* use --multi_gpu or --cpu"):
        require_data_parallelism(kind)


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU])
def test_shared_data_is_accepted(kind: DistributedType) -> None:
    require_data_parallelism(kind)
