"""A comparison whose donor is a folder outside any zoo."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.fuzz.materials import TEXT, language_model
from tests.support.commands import compare


def test_the_report_knows_the_donor_and_a_changed_donor_is_compared_again(tmp_path: Path) -> None:
    donor = language_model(tmp_path / "donor")
    (tmp_path / "text.txt").write_text(TEXT)
    options = dict(
        target=donor, methods=("weight-selection",), donor=str(donor), corpus=tmp_path / "text.txt",
        out=tmp_path / "out", steps=1, seeds=(0,), lrs=(1e-3,), default_scales=(1.0,), batch_size=1, sequence=8,
        windows=1, workers=1,
    )  # fmt: skip
    method = compare(**options)["methods"]["weight-selection"]
    weights = load_file(donor / "model.safetensors")
    loss = json.loads((donor / "facts.json").read_text())["loss"]
    assert method["donors"][0]["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert method["donors"][0]["loss"] == loss
    assert method["novelty"]["distance"] == 0  # the target has the donor's shape, so it gets the donor's weights
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, donor / "model.safetensors", {"format": "pt"})
    again = compare(**options)["methods"]["weight-selection"]
    assert again["step0_loss"] != method["step0_loss"]
