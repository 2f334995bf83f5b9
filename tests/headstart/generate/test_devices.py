"""Every method computes on the device that it is given, and returns what it returns on the CPU, as it is made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headstart import samplers
from headstart.generate.sampling import build_sampler
from tests.headstart.generate.test_every_method import METHODS
from tests.support.pretend_device import DEVICE, PretendDevice
from tests.support.shaken import CONFIGS, donor
from zoo.donors.zoo import Zoo
from zoo.targets.blueprint import Blueprint

SMALLER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALLER |= {"num_key_value_heads": 1}
LARGER = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
LLAMA = CONFIGS["llama"] | {"vocab_size": 256}  # bytes, so that a text needs no tokenizer
TARGETS = dict.fromkeys(METHODS, SMALLER) | dict.fromkeys(("net2wider", "hypercloning"), LARGER)
TARGETS |= {"stacking": {"num_hidden_layers": 4}}
# These only draw. Where the generator is on the CPU, as for all devices but CUDA, so is the result.
ONLY_DRAWN = {"default", "scaled-default", "gpt2", "truncated-normal", "identity"}
ONLY_COPIES = {"stacking"}
BY_BLOCK = {"matrix-normal"}  # each block returns as it is drawn, and the tensors are made of all blocks
CASES = [*METHODS, "hybrid:values=kde,law=laplace,noise=0.1,mixing=linear", "hybrid:values=permuted,law=mixture"]
CASES += ["row-column:scale=1/multiplicity,noise=0.1", "net2wider:residual=pad,noise=0.1", "identity:scheme=nanochat"]
CASES += ["auto-fit:families=stable", "hypercloning:noise=0.1", "truncated-normal:recipe=olmo"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return donor(tmp_path_factory.mktemp("donor") / "donor", LLAMA)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return path


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The device is seen only by the thread that enters it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES)
def test_a_device_gives_what_the_cpu_gives(case: str, zoo: Zoo, text: Path) -> None:
    name, _, options = case.partition(":")
    settings = dict(option.split("=") for option in options.split(",") if option)
    blueprint = Blueprint.from_config(LLAMA | TARGETS[name])
    cls = samplers.get(name)
    if name == "learned-pruning":
        settings |= {"text": str(text), "steps": "2", "batch_size": "2", "windows": "2"}
    wanted = dict(build_sampler(cls, settings).fit(zoo, blueprint).sample(blueprint, 5))
    with PretendDevice() as device:
        fitted = build_sampler(cls, settings, device=DEVICE).fit(zoo, blueprint)
        arrived, got = [0], {}
        for tensor_name, tensor in fitted.sample(blueprint, 5):
            assert type(tensor) is torch.Tensor and tensor.device.type == "cpu", tensor_name
            got[tensor_name] = tensor
            arrived.append(device.to_cpu)
    assert got.keys() == wanted.keys()
    for tensor_name, tensor in got.items():
        torch.testing.assert_close(tensor, wanted[tensor_name], rtol=1e-5, atol=1e-6, msg=tensor_name)
    if name in ONLY_DRAWN:
        return
    matrices = sum(tensor.numel() for tensor in got.values() if tensor.ndim > 1)
    assert (device.worked or name in ONLY_COPIES) and device.to_cpu >= matrices, "it was made on the CPU"
    assert name in BY_BLOCK or len(set(arrived)) > len(got) / 2, "everything came at once"
