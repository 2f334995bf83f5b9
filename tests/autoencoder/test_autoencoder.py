"""The unit autoencoder against PCA, and what must be exact in it."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor

from autoencoder import training
from autoencoder.model import UnitAutoencoder, error_weights, set_linear_part_to_pca
from autoencoder.sampler import AutoencoderSampler, copied_rows, vocabulary_units
from autoencoder.training import AutoencoderTrainConfig
from tests.support.tiny import config, donor, make_zoo
from zoo.add import add
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.training.resumable import STATE_FILE
from zoo.units.aligned import AlignedDonor, align_donors
from zoo.units.units import ROLES
from zoo.vocabularies.tokens import Tokens


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def donors(zoo: Zoo) -> list[AlignedDonor]:
    return list(align_donors(zoo))


def correlated(n: int, seed: int = 0) -> Tensor:
    """[n, 2, 12] units with a spectrum."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(24, 24, generator=rng) * torch.logspace(0, -2, 24)
    return (torch.randn(n, 24, generator=rng) @ mix).unflatten(1, (2, 12))


def test_pca_is_numpys_under_the_weights() -> None:
    vectors = correlated(300)
    weight = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)) + 0.1
    model = UnitAutoencoder(12, {"vo": 7}, hidden=0)
    set_linear_part_to_pca(model, "vo", vectors, weight)
    directions = torch.nn.functional.normalize(vectors, dim=-1).flatten(1).double().numpy()
    root = weight.flatten().sqrt().double().numpy()
    centred = (directions - directions.mean(0)) * root
    _, _, vt = np.linalg.svd(centred, full_matrices=False)
    left = np.square(centred - centred @ vt[:7].T @ vt[:7]).sum()
    total = np.square(directions * root).sum()
    assert float(model.loss("vo", vectors).detach()) == pytest.approx(left / total, rel=1e-3)


def test_norms_are_exact_and_a_full_latent_loses_nothing() -> None:
    vectors = correlated(50)
    for size, tolerance in ((24, 1e-5), (5, None)):
        model = UnitAutoencoder(12, {"vo": size}, hidden=8)
        set_linear_part_to_pca(model, "vo", vectors, torch.ones(2, 12))
        with torch.no_grad():
            decoded = model.decode("vo", *model.encode("vo", vectors), 12)
        assert torch.allclose(decoded.norm(dim=-1), vectors.norm(dim=-1), rtol=1e-5)
        if tolerance:
            assert (decoded - vectors).abs().max() < tolerance


def test_narrower_and_wider_units() -> None:
    vectors = correlated(50)
    model = UnitAutoencoder(12, {"vo": 24}, hidden=0)
    set_linear_part_to_pca(model, "vo", vectors, torch.ones(2, 12))
    with torch.no_grad():
        narrow = model.decode("vo", *model.encode("vo", vectors[..., :9]), 9)
        wide = model.decode("vo", *model.encode("vo", vectors), 15)
    assert (narrow - vectors[..., :9]).abs().max() < 1e-5
    assert (wide[..., :12] - vectors).abs().max() < 1e-5
    assert not wide[..., 12:].any()


def test_readers_are_weighed_by_what_the_writers_write(donors: list[AlignedDonor]) -> None:
    units = [{k: v.clone() for k, v in d.units.items()} for d in donors]
    for of_donor in units:
        of_donor["neuron"][:, 2, 5] *= 10  # `down` writes loudly to coordinate 5
    before, after = error_weights([d.units for d in donors], 32), error_weights(units, 32)
    assert after["qk"][0, 5] > 5 * before["qk"][0, 5]
    assert torch.allclose(after["vo"][1], before["vo"][1])  # what is written is weighed by the readers


def test_noise_on_latents_is_not_blown_up_where_narrow_donors_have_nothing() -> None:
    narrow = correlated(300)
    narrow[..., 6:] = 0
    units = torch.cat([narrow, 0.1 * correlated(100, seed=1)])
    weight = torch.ones(2, 12)
    weight[:, 6:] = 1e-3  # as error_weights has it where only the faint units write
    model = UnitAutoencoder(12, {"vo": 18}, hidden=16)
    set_linear_part_to_pca(model, "vo", units, weight)
    rng = torch.Generator().manual_seed(2)

    def noise(rows: int) -> Tensor:
        return 0.1 * torch.randn(rows, 18, generator=rng)

    def beyond() -> float:
        """Share of the energy of noised narrow units in coordinates that they do not have."""
        with torch.no_grad():
            latents, norms = model.encode("vo", narrow)
            off = latents + noise(len(latents)) * latents.square().mean().sqrt()
            energy = model.decode("vo", off, norms, 12).square()
        return float(energy[..., 6:].sum() / energy.sum())

    def error() -> float:
        with torch.no_grad():
            return float(model.loss("vo", units, noise(len(units))))

    before, pca = beyond(), error()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        model.loss("vo", units, noise(len(units))).backward()
        optimizer.step()
    assert before > 0.1
    assert beyond() < before / 3
    assert error() < 0.9 * pca


def test_training_compares_itself_to_pca_and_resumes_to_the_same_bytes(zoo: Zoo, tmp_path: Path) -> None:
    config = AutoencoderTrainConfig(steps=60, rate=3.0, hidden=16)
    command = {"subcommand": "train autoencoder", "steps": 60}

    def train(name: str, config: AutoencoderTrainConfig = config, resume: bool = False) -> Path:
        return training.train_autoencoder(
            config, zoo.path, tmp_path / name, resume=resume, device="cpu", quiet=True, command=command
        )

    whole = train("whole")
    report = json.loads((whole / "report.json").read_text())
    assert report["config"] == command and report["recipe"]["steps"] == 60
    assert set(report["error"]) == set(ROLES)
    for found in report["error"].values():  # of weights that are iid, PCA already holds all that can be held
        assert found["autoencoder"] == pytest.approx(found["pca"], rel=0.02)
        assert found["autoencoder_noised"] == pytest.approx(found["pca_noised"], rel=0.02)
        assert found["pca_noised"] > found["pca"]
    exact = train("exact", replace(config, noise=0.0))
    still = train("still", replace(config, lr=0.0))
    assert len({(path / "diffusion_pytorch_model.safetensors").read_bytes() for path in (whole, exact, still)}) == 3

    real = training.sample_batch

    def stopping(
        donors: list[AlignedDonor], kind: str, config: AutoencoderTrainConfig, step: int, width: int
    ) -> Tensor:
        if step == 31 and kind == "qk":
            os.kill(os.getpid(), signal.SIGINT)
        return real(donors, kind, config, step, width)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "sample_batch", stopping)
        train("cut")
    with pytest.raises(UserError, match="--resume"):
        train("cut")
    with pytest.raises(UserError, match="other settings"):
        train("cut", replace(config, steps=61), resume=True)
    cut = train("cut", resume=True)
    name = "diffusion_pytorch_model.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert not (cut / STATE_FILE).exists()


def words(folder: Path, first: int) -> None:
    """A tokenizer of 48 words, from number `first` on."""
    vocabulary = {f"w{first + i}": i for i in range(48)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=f"w{first}")).save(str(folder / "tokenizer.json"))


def test_the_donor_knows_the_tokens_first_then_is_wide_good_and_near(tmp_path: Path) -> None:
    """Of those that have recorded no loss the nearest in size, not the first by name."""
    sizes = {"a": (32, 3), "b": (32, 2), "c": (24, 2), "stranger": (32, 2)}
    folders = {
        name: donor(tmp_path / name, i, hidden_size=w, layers=n) for i, (name, (w, n)) in enumerate(sizes.items())
    }
    for name, folder in folders.items():
        words(folder, 40 if name == "stranger" else 0)
        (folder / "facts.json").unlink()

    def chosen(*names: str, width: int = 28) -> str:
        path = tmp_path / "-".join((*names, str(width)))
        add([str(folders[name]) for name in names], path, quiet=True)
        (target := tmp_path / "target").mkdir(exist_ok=True)
        words(target, 0)
        sampler = AutoencoderSampler(model=str(coder), tokenizer=str(target))
        return sampler.fit(Zoo.open(path), Blueprint.from_pretrained_config(config(width, 2))).donors[0]

    add([str(folder) for folder in folders.values()], tmp_path / "zoo", quiet=True)
    coder = training.train_autoencoder(
        AutoencoderTrainConfig(steps=2), tmp_path / "zoo", tmp_path / "coder", device="cpu", quiet=True
    )
    assert chosen("a", "b", "c", "stranger") == "b"
    assert chosen("c", "stranger") == "c"  # narrower than the target, but it knows the tokens
    assert chosen("a", "c", width=20) == "c"
    (folders["a"] / "facts.json").write_text(json.dumps({"loss": 2.0}))
    assert chosen("a", "b", width=24) == "a"


def test_vocabulary_pairs_of_other_tokens_are_composed() -> None:
    """The donor's strings mark words as SentencePiece does, the target's as byte-level BPE."""
    own = ("<s>", "▁the", "re", "x", "<row 4>")
    pairs = torch.randn(5, 2, 6)
    meta = Metadata("llama", 1, 6, heads=1, kv_heads=1, head_dim=6, ffn=8, vocab=5)
    donor_units = AlignedDonor("donor", meta, own, {"vocab": pairs})
    target = Tokens.of_strings({"Ġthe": 0, "Ġthere": 1, "q": 2, "<s>": 3})
    got = vocabulary_units(donor_units, replace(meta, vocab=6), target, "mean")
    expected = torch.stack([pairs[1], pairs[1:3].mean(0), *[pairs.mean(0)] * 4])
    expected[3] = pairs[0]
    torch.testing.assert_close(got, expected)
    assert copied_rows(donor_units, replace(meta, vocab=6), target, "strings").tolist() == [-1, -1, -1, 0, -1, -1]
    assert torch.equal(vocabulary_units(donor_units, meta, None, "mean"), pairs)
