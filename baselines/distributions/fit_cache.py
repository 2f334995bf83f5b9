"""Fits that a zoo keeps, so that the same fit of the same donors is not made again."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from zoo.checkpoints.atomic import new_folder
from zoo.donors.layout import fit_path
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.sampler import Sampler

log = logging.getLogger(__name__)

AnySampler = TypeVar("AnySampler", bound=Sampler)
CODE = tuple(sorted(Path(__file__).parent.glob("*.py")))  # other code may fit other values


def fit_folder(sampler: Sampler, zoo: Zoo, what: Mapping[str, Sequence[Sequence[str]]]) -> Path | None:
    """Where a zoo keeps the fit of a sampler. None for a zoo in memory and for a donor outside a zoo, which keep none.

    what: group -> (content hash of a donor, name, part) of the values that are fitted. The folder's name is a hash of
    it, of the method, its options, its device, and the source code of this package.
    """
    if zoo.members is not None:
        return None
    options = {name: value for name, value in sampler.options().items() if name != "donor"}  # `what` names the donors
    return fit_path(zoo.path, sampler.name, [options, sampler.device, what], CODE)


def load_fit(cls: type[AnySampler], folder: Path) -> AnySampler | None:
    """The fitted sampler in a folder. None where there is none, and with a warning where it cannot be read."""
    if not folder.exists():
        return None
    try:
        return cls.load(folder)
    except UserError as error:
        log.warning("%s; it is fitted again", error)
        return None


def keep_fit(sampler: Sampler, folder: Path) -> None:
    """Saves a fitted sampler. A zoo that cannot be written is no error, nor another process that saves the same."""
    try:
        if folder.exists():  # it could not be read
            shutil.rmtree(folder)
        with new_folder(folder) as partial:
            sampler.save(partial)
    except (UserError, OSError) as error:
        log.info("%s: the fit is not kept: %s", sampler.name, error)
