"""Zoos in a folder, of one donor, and of donors at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from zoo.donors.folder import StandaloneDonor, ZooDonor, donor_ref, open_ref
from zoo.donors.manifest import read_manifest
from zoo.donors.memory import zoo_of
from zoo.donors.zoo import Zoo, open_standalone
from zoo.errors import UserError

Make = Callable[..., Path]


def test_donors_are_sorted_and_found_by_name(filled: Path) -> None:
    zoo = Zoo.open(filled)
    assert [d.name for d in zoo.donors] == ["first", "second"] == list(zoo.names)
    donor = zoo.donor("second")
    assert isinstance(donor, ZooDonor) and donor.folder == filled / "models" / "second"
    with pytest.raises(UserError, match="did you mean 'second'"):
        zoo.donor("secnd")


def test_a_folder_without_a_zoo_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a zoo"):
        Zoo.open(tmp_path)
    (tmp_path / "manifest.parquet").write_bytes(b"PAR1 not at all PAR1")
    with pytest.raises(UserError, match="not a readable manifest"):
        read_manifest(tmp_path)
    with pytest.raises(UserError, match="not a readable manifest"):
        _ = Zoo.open(tmp_path).names


def test_a_standalone_donor_is_named_after_its_folder(tmp_path: Path, tiny_llama: Make) -> None:
    zoo = open_standalone(tiny_llama(tmp_path / "alone"), quiet=True)
    (donor,) = zoo.donors
    assert isinstance(donor, StandaloneDonor) and zoo.names == ("alone",) and zoo.path == donor.folder
    assert donor.revision == f"sha256:{donor.sha256}" and donor.source == str((tmp_path / "alone").resolve())


def test_the_donor_of_a_saved_sampler_is_found_again_unless_it_changed(filled: Path, tmp_path: Path) -> None:
    for donor in (Zoo.open(filled).donor("first"), StandaloneDonor.open(tmp_path / "src" / "first", quiet=True)):
        ref = donor_ref(donor)
        assert open_ref(ref, "method").sha256 == donor.sha256 and type(open_ref(ref, "method")) is type(donor)
        with pytest.raises(UserError, match="not the donor that method was fitted to"):
            open_ref(ref | {"sha256": "0"}, "method")
    with pytest.raises(UserError, match="is a module in memory"):
        donor_ref(zoo_of({"a": nn.Linear(2, 2)}).donor("a"))


def test_a_zoo_shows_its_donors(filled: Path, tmp_path: Path) -> None:
    assert repr(Zoo.open(filled)) == f"Zoo({str(filled)!r}, 2 donors: first, second)"
    many = {f"net{i}": nn.Linear(2, 2) for i in range(9)}
    assert repr(zoo_of(many)) == "Zoo('memory', 9 donors: net0, net1, net2, net3, net4, net5 and 3 more)"
    (filled / "manifest.parquet").write_bytes(b"PAR1 not at all PAR1")
    assert "not readable" in repr(Zoo.open(filled))
