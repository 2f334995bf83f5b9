"""All that the analysis measures of one tensor, from one reading of it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headstart.analyze.marginals import marginal_summary
from zoo.donors.donor import Donor
from zoo.errors import NotFinite, UserError
from zoo.statistics.row_column import RowColumnSettings, measure_matrix
from zoo.statistics.signature import has_projection, power_sums
from zoo.statistics.similarity import PROJECTIONS, constant_projection
from zoo.statistics.spectra import singular_values, spectrum_summary
from zoo.streams import stream
from zoo.tensors import TensorSpec, split_parts


@dataclass(frozen=True)
class AnalysisTask:
    """A donor and the settings of its analysis."""

    donor: Donor
    ranks: tuple[int, ...]  # ascending
    bootstraps: int
    seed: int
    device: str

    @property
    def row_column(self) -> RowColumnSettings:
        """The settings of the study of rows and columns."""
        return RowColumnSettings(seed=self.seed, device=self.device)


def is_measured(spec: TensorSpec) -> bool:
    """Whether a tensor holds weights. Integers are no weights."""
    return bool(spec.numel) and spec.dtype.is_floating_point


def measure_tensor(task: AnalysisTask, spec: TensorSpec) -> dict[str, Any]:
    """The measurements of one tensor in JSON values, or why there are none:

    marginals   role -> `marginal_summary`
    spectra     role -> `spectrum_summary`, and `noise`: that of a random matrix of the same shape
    stacks      projection -> the largest singular values of its matrix, as many as the largest rank; or {why}
    std         projection -> `power_sums`
    row_column  role -> what `measure_matrix` returns, energies as base64
    not_finite  the error for a tensor with NaN or infinity; then there is nothing else
    error       the error for a tensor that cannot be read; then there is nothing else

    A fused tensor is split into its parts. In memory are the tensor in float32 and a part of it in float64.
    """
    try:
        found = _measure_parts(task, spec)
    except NotFinite as error:
        return {"not_finite": str(error)}
    except UserError as error:
        return {"error": str(error)}
    for role, spectrum in found["spectra"].items():  # now that the tensor is not in memory any more
        spectrum["noise"] = _noise_spectrum(task, spec, role)
    return found


def _measure_parts(task: AnalysisTask, spec: TensorSpec) -> dict[str, Any]:
    """What `measure_tensor` returns, without noise."""
    tensor = task.donor.read(spec.name)
    tensor = tensor if tensor.dtype.itemsize >= 4 else tensor.float()
    found: dict[str, Any] = {"marginals": {}, "spectra": {}, "stacks": {}, "std": {}, "row_column": {}}
    for part in spec.parts:
        role, values = part.role, split_parts(spec, tensor)[part.role]
        if values.ndim > 1:
            entry, rows, columns = measure_matrix(spec, part, values.flatten(1), task.row_column)
            found["row_column"][role] = [entry, _to_base64(rows), _to_base64(columns)]
        values = values.to(task.device, torch.float32)
        found["marginals"][role] = _summary_or_reason(marginal_summary, values.flatten())
        if role in PROJECTIONS and has_projection(spec):
            found["std"][role] = power_sums(values)
        if values.ndim > 1:
            found["spectra"][role], found["stacks"][role] = _spectrum(task, spec, role, values.flatten(1))
    return found


def label_of(spec: TensorSpec, role: str) -> str:
    """The name of a part of a tensor in the results."""
    return spec.name if len(spec.parts) == 1 else f"{spec.name} [{role}]"


def from_base64(text: str) -> Tensor:
    """The inverse of how `measure_tensor` stores energies: float64 [n]."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f8").copy())


def _to_base64(values: Tensor) -> str:
    return base64.b64encode(values.cpu().numpy().astype("<f8").tobytes()).decode()


def _spectrum(task: AnalysisTask, spec: TensorSpec, role: str, matrix: Tensor) -> tuple[dict[str, Any], Any]:
    """The summary of the spectrum of a matrix, and its largest singular values or {why}."""
    values = singular_values(matrix)
    summary = _summary_or_reason(lambda matrix: spectrum_summary(matrix, values), matrix)
    if matrix.min() == matrix.max():
        return summary, {"why": str(constant_projection(task.donor, spec, role))}
    return summary, values[: max(task.ranks)].tolist()


def _noise_spectrum(task: AnalysisTask, spec: TensorSpec, role: str) -> dict[str, Any]:
    """The summary of the spectrum of a random matrix. Each matrix has its own draw, so that matrices can be counted as
    independent trials."""
    shape = next(part.shape for part in spec.parts if part.role == role)
    generator = stream(task.seed, f"analyze/noise/{task.donor.sha256}/{label_of(spec, role)}")
    matrix = torch.randn(shape, generator=generator).to(task.device)
    return _summary_or_reason(spectrum_summary, matrix.flatten(1))


def _summary_or_reason(measure: Callable[[Tensor], dict[str, Any]], values: Tensor) -> dict[str, Any]:
    """The measurement, or {"why": reason} where this tensor does not allow it (a constant one, for example)."""
    try:
        return measure(values)
    except UserError as error:
        return {"why": str(error)}
