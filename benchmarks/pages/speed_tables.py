"""Tables of the smaller benchmarks: convolution filters, the speed of fits and of spectra."""

from __future__ import annotations

import json
from typing import Any

from benchmarks import convolutions
from benchmarks.pages import cells
from benchmarks.paths import RESULTS
from benchmarks.speed import spectra

FITS = RESULTS / "fits.json"


def read_convolutions() -> dict[str, Any]:
    return json.loads(convolutions.RESULTS.read_text())


def convolutions_table() -> str:
    return convolutions.table(read_convolutions()["methods"])


def fits_table() -> str:
    rows = json.loads(FITS.read_text())["rows"]
    heads = ["family", "seconds", "times `torch.quantile`"]
    return cells.table(heads, [[r["method"], f"{r['seconds']:.3f}", f"{r['ratio']:.2f}"] for r in rows])


def spectra_table() -> str:
    return spectra.table(json.loads(spectra.RESULTS.read_text())["rows"])
