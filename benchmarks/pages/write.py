"""Writes the pages: tables.md and the figures whole, a few small parts of hand-written pages between their marks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.generator.claims import generator_claims
from benchmarks.generator.runs import ROWS as GENERATOR_RUNS
from benchmarks.head_start import rows as run_rows
from benchmarks.head_start import tasks
from benchmarks.head_start.results import BenchmarkResults, Facts, Rows
from benchmarks.pages import (
    audit_tables,
    comparison_tables,
    learning_rates,
    method_tables,
    speed_tables,
    training_tables,
)
from benchmarks.pages.claims import claims
from benchmarks.pages.marks import fill_mark
from benchmarks.paths import RESULTS, ROOT
from zoo.checkpoints.atomic import replace_file

TABLES, DETAILS, FIGURES = RESULTS / "tables.md", RESULTS / "details.md", RESULTS / "figures"
TEMPLATE = Path(__file__).with_name("tables.template.md")
NOT_MEASURED = "Not measured yet."

Part = Callable[[BenchmarkResults], str]
COMPARISONS = (("A", "reference"), ("B", "source"), ("B", "shakespeare"), ("C", "stories"))
TABLE_PARTS: dict[str, Part] = {
    "run_counts": comparison_tables.run_counts,
    "overview": comparison_tables.overview_table,
    "training_costs": comparison_tables.training_costs,
    "gains": method_tables.gains_table,
    **{
        f"{task}-{text}-{budget}": comparison_tables.head_start_table(task, text, budget)
        for task, text in COMPARISONS
        for budget in tasks.BUDGETS
    },
    "rivals": comparison_tables.rivals_table,
    "donor_choice": comparison_tables.donor_choice_table,
    "stability": training_tables.stability_table,
    "novelty_bars": audit_tables.novelty_bars,
    "novelty": audit_tables.novelty_table,
    "conditioning": audit_tables.conditioning_table,
    "peers": audit_tables.peers_table,
    "convolutions": lambda results: speed_tables.convolutions_table(),
    "fits": lambda results: speed_tables.fits_table(),
    "spectra": lambda results: speed_tables.spectra_table(),
}
MARKED_PARTS: tuple[tuple[Path, str, Part], ...] = (
    (ROOT / "BENCHMARKS.md", "generator", generator_claims),
    (ROOT / "BENCHMARKS.md", "claims", claims),
    (ROOT / "README.md", "benchmark", method_tables.readme_table),
    (ROOT / "baselines" / "README.md", "methods", method_tables.all_methods_table),
)


def tables_page(results: BenchmarkResults) -> str:
    """The template with its tables and a list of contents. KeyError if it names a table that is not known."""
    template = TEMPLATE.read_text()
    contents = "\n".join(_contents(template))

    def fill(match: re.Match[str]) -> str:
        return contents if match[1] == "contents" else TABLE_PARTS[match[1]](results) or NOT_MEASURED

    return re.sub(r"\{\{([\w-]+)\}\}", fill, template)


def _contents(page: str) -> Iterator[str]:
    """A list item with a link for every heading below the title."""
    for level, title in re.findall(r"^(##+) (.+)$", page, re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        yield f"{'  ' * (len(level) - 2)}- [{title}](#{anchor})"


def marked_pages(results: BenchmarkResults) -> Iterator[tuple[Path, str]]:
    """(path, new text) of every hand-written page with a generated part."""
    for path, mark, make in MARKED_PARTS:
        yield path, fill_mark(path.read_text(), mark, make(results) or NOT_MEASURED)


def write_tables(rows: Rows, facts: Facts) -> None:
    """tables.md, the figures, and the generated parts of the hand-written pages."""
    from benchmarks.pages.figures import draw_figures

    results = BenchmarkResults.from_rows(rows, facts)
    replace_file(TABLES, tables_page(results).encode())
    for path, text in marked_pages(results):
        replace_file(path, text.encode())
    replace_file(
        learning_rates.PATH, learning_rates.learning_rates_table(results, run_rows.read(GENERATOR_RUNS)).encode()
    )
    for name, content in draw_figures(results.entries).items():
        replace_file(FIGURES / f"{name}.png", content)


def write_details(rows: Rows, facts: Facts) -> None:
    """details.md, which git ignores."""
    replace_file(DETAILS, training_tables.details_page(BenchmarkResults.from_rows(rows, facts)).encode())
