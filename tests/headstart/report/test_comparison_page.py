"""The page of a comparison, from results made by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest

from headstart.report import scores
from headstart.report.comparison import render_comparison
from headstart.report.comparison_findings import (
    caveats,
    format_step_ratio,
    headline,
    introduction,
    rank_methods,
    speedup_text,
)
from tests.support.pages import assert_self_contained, parse_page

SECTIONS = [
    "Loss during training", "Speed-up", "Learning rates", "Where the weights come from", "Limits of this comparison",
    "How it was measured",
]  # fmt: skip
DONOR = {
    "name": "<b>donor", "license": "<i>mit", "revision": "sha256:<u>0123456789", "parameters": 1000, "loss": None,
    "tokens": 5000,
}  # fmt: skip


def run(method: str, seed: int, losses: list[float], **changes: Any) -> dict[str, Any]:
    init = {"seconds": 1.0, "donors": [], "novelty": None, "novelty_note": "uses no donor"}
    return {
        "method": method, "scale": 1.0, "seed": seed, "lr": 1e-3, "steps": [0, 50, 100], "losses": losses,
        "max_grad_norm": 1.0, "diverged": None, "init": init, "grad_spikes": 0,
        "activation_rms": {"start": [1.0], "end": [1.0]},
    } | changes  # fmt: skip


def results_of(runs: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    threshold, methods = scores.score(runs, budget=100)
    for entry in methods.values():
        entry |= {"summary": "<script>alert(1)</script>", "options": {"x": "<i>"}}
    return {
        "target": {"model_type": "<u>", "n_layer": 2}, "parameters": 10, "threshold": threshold, "methods": methods,
        "corpus": {"name": "<tt>.txt", "tokens": 1000, "held_out": 100, "tokenizer": "<bytes>"},
        "steps": 100, "seeds": sorted({r["seed"] for r in runs}), "tuning_seeds": [0, 1], "refused": {},
        "grid": [1e-3], "batch_size": 1, "sequence": 8, "windows": 2, "command": None,
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    """A fast method, one below the threshold at once, one that never arrives, one that diverges; donors; a refusal."""
    donor = {"seconds": 1.0, "donors": [DONOR], "novelty": None, "novelty_note": "<em>no distance"}
    runs = []
    for seed in (0, 1):
        runs += [
            run("default", seed, [5.0, 4.0, 3.0 + 0.1 * seed]),
            run("fast <b>", seed, [4.0, 2.5 + 0.1 * seed, 2.0]),
            run("instant", seed, [1.0, 0.9, 0.8 + 0.1 * seed], init=donor),
            run("slow", seed, [6.0, 5.0, 4.0]),
            run("broken", seed, [9.0, 9.0, 9.0], diverged=3),
        ]
    return results_of(runs, refused={"<b>big": "too <wide>."}, command="headstart compare <made-up>")


def test_every_section_is_on_the_full_page(full: dict[str, Any]) -> None:
    html = render_comparison(full)
    page = parse_page(html)
    assert_self_contained(html)
    assert page.headings == SECTIONS and html.count("<svg") == 3 and html.count("<table") == 5
    text = " ".join(page.text)
    assert headline(full) in text and introduction(full) in text and "headstart compare <made-up>" in text
    for sentence in caveats(full):
        assert sentence in text
    assert "instant: <em>no distance." in text and "Left out: <b>big. It cannot fill this target: too <wide>." in text


def test_every_section_is_on_a_page_with_nothing_but_a_diverged_default() -> None:
    results = results_of([run("default", 0, [5.0, 4.0, 3.0], diverged=1)])
    html = render_comparison(results)
    assert_self_contained(html)
    assert parse_page(html).headings == SECTIONS and html.count("<svg") == 1 and html.count("<table") == 3
    assert headline(results).startswith("The default initialisation diverged at every learning rate")


def test_names_and_texts_are_escaped(full: dict[str, Any]) -> None:
    html = render_comparison(full)
    text = " ".join(parse_page(html).text)
    hostile = ("fast <b>", "<script>alert(1)</script>", "(x=<i>)", "<u>", "<tt>.txt", "<bytes>", "<b>donor", "<i>mit")
    assert all(name in text for name in hostile)
    assert not re.search(r"<(script|b>donor|b>big|tt|em|i>)", html)


def test_the_headline_states_speed_up_interval_and_verdict() -> None:
    def with_method(losses: list[list[float]]) -> dict[str, Any]:
        default = [run("default", seed, [5.0, 4.0, 3.0]) for seed in range(len(losses))]
        return results_of(default + [run("other", seed, each) for seed, each in enumerate(losses)])

    one = headline(with_method([[5.0, 3.0, 2.0]]))
    assert one == (
        "other reaches the final loss of the tuned default in 50 steps instead of 100 steps: 2.00× faster, measured "
        "with one seed, which cannot exclude noise."
    )
    sure = headline(with_method([[5.0, 3.0, 2.0], [5.0, 2.99, 2.0], [5.0, 3.0, 2.0]]))
    assert "2.00× faster (95 % interval" in sure and sure.endswith("more than the noise of 3 seeds.")
    unsure = headline(with_method([[5.0, 2.0, 1.0], [5.0, 4.9, 3.0]]))
    assert unsure.endswith("within the noise of 2 seeds.")
    below = headline(with_method([[1.0, 0.9, 0.8], [1.0, 0.9, 0.81]]))
    assert below.startswith("other starts below the loss that the tuned default reaches after 100 steps.")
    assert "It ends at 0.805, the default at 3.000: more than the noise of 2 seeds." in below
    assert headline(with_method([[5.0, 4.0, 3.5]])).startswith("No method reaches the final loss of the tuned default")


def test_methods_are_ranked_by_speed_up_then_loss(full: dict[str, Any]) -> None:
    assert [name for name, _ in rank_methods(full)] == ["instant", "fast <b>", "default", "slow", "broken"]
    texts = [speedup_text(full["methods"][name]) for name in ("instant", "default", "slow")]
    assert texts == ["≥ 100×", "1.00×", "–"]


def test_step_ratios() -> None:
    def ratio(steps: list[float | None], mean: float | None, ci95: list[float] | None = None) -> str:
        return format_step_ratio({"steps": steps, "ratio": {"mean": mean, "ci95": ci95}})

    assert ratio([10.0, 12.0], 16.9, [10.6, 26.2]) == "17× (11–26)" and ratio([60.0], 1.6667) == "1.7×"
    assert ratio([0.5, 1.0], 50.9) == "≥ 50×" and ratio([0.5], 49.9999999999) == "≥ 50×"
    assert ratio([3.0, None, 4.0], None) == "2 of 3 arrive" and ratio([None, None], None) == "never"


def test_caveats_name_what_the_data_does_not_show(full: dict[str, Any]) -> None:
    text = "\n".join(caveats(full))
    for part in (
        "With 2 seeds an interval is wide",
        "slow never reached the threshold within 100 steps, so it has no speed-up.",
        "Below the threshold before or within the first step: instant.",
        "Only one learning rate (0.001) was tried",
        "The scale of the default initialisation was not tuned.",
        "broken diverged in 2 runs, at learning rate 0.001.",
        "does not check whether the donors were trained on the held-out text",
    ):
        assert part in text
    single = results_of([run("default", 0, [5.0, 4.0, 3.0])])
    assert caveats(single)[0].startswith("One seed does not show") and not any("donors" in c for c in caveats(single))
    unknown = results_of(
        [
            run("default", 0, [5.0, 4.0, 3.0]),
            run("carry", 0, [4.0, 3.0, 2.0], init=full["methods"]["instant"] | {"donors": [DONOR | {"tokens": None}]}),
        ]
    )
    assert any("For carry that cost is unknown." in c for c in caveats(unknown))


def test_a_page_of_adapters_says_what_was_trained_and_where_it_started() -> None:
    adapter = {"base": "model", "rank": 8, "alpha": 16.0, "targets": ["q_proj", "v_proj"], "reference": None}
    runs = [run("default", 0, [3.0, 3.1, 3.2]), run("pissa", 0, [3.0, 2.9, 2.8])]
    results = results_of(runs, adapter=adapter)
    text = " ".join(" ".join(parse_page(render_comparison(results)).text).split())
    assert "headstart compare · LoRA of rank 8 on <u>, 2 layers" in text and "2 initial adapters, each trained" in text
    assert "Adapters: rank 8, alpha 16, modules q_proj, v_proj." in text and "no weight decay" in text
    warned = "\n".join(caveats(results))
    assert "The tuned default ends no lower than the base" in warned
    assert "trained on similar text" not in warned and "scale of the default" not in warned
    better = results_of([run("default", 0, [3.0, 2.9, 2.8]), runs[1]], adapter=adapter)
    assert "no lower than the base" not in "\n".join(caveats(better))
