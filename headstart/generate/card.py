"""The model card of a generated checkpoint: what it is, what made it, and what it is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.sampler import Sampler
    from zoo.targets.blueprint import Blueprint


def text(record: dict[str, Any], method: type[Sampler], blueprint: Blueprint, bases: list[str]) -> str:
    """README.md from what headstart.json holds (`record`), the sampler's class, the target's blueprint and the hub ids
    of donors."""
    donors = record["donors"]
    sections = [front_matter(donors, bases), _body(record, method, blueprint), donors_table(donors), caveats(donors)]
    return "\n".join(section for section in sections if section)


def front_matter(
    donors: list[dict[str, Any]], bases: list[str], library: str = "transformers", tags: Sequence[str] = ()
) -> str:
    """What the hub reads: the licences of the donors, and the hub ids `bases` of what this was made from."""
    lines = ["---", f"library_name: {library}", "tags:", "- headstart", "- initialization", *[f"- {t}" for t in tags]]
    licenses = sorted({d["license"] or "unknown" for d in donors})
    if len(licenses) == 1:
        lines.insert(1, f"license: {_license_id(licenses[0])}")
    elif licenses:
        lines[1:1] = ["license: other", f"license_name: {' and '.join(licenses)}"]
    if bases:
        lines += ["base_model:", *[f"- {name}" for name in bases]]
    return "\n".join([*lines, "---", ""])


def _license_id(name: str) -> str:
    """A licence as the hub writes it; what is no single word is `other`."""
    return name.lower() if " " not in name else "other"


def _body(record: dict[str, Any], method: type[Sampler], blueprint: Blueprint) -> str:
    meta = blueprint.metadata
    shape = ""
    if meta is not None:
        shape = (
            f" A {meta.architecture} of {meta.layers} layers, width {meta.width}, {meta.heads} query and"
            f" {meta.kv_heads} key-value heads of {meta.head_dim}, FFN {meta.ffn}, vocabulary {meta.vocab}:"
        )
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    counts = record["tensors"]
    return f"""# Initial weights by {record["method"]}

These are weights to start training from, **not a trained model**.{shape} {record["parameters"]:,} parameters.

```
{record["command"]}
```

- Method: `{record["method"]}`, {method.summary} ({link(method.reference)}).
- Seed {record["seed"]}; {counts["sampled"]} tensors from the method, {counts["defaulted"]} by default initialisation.
- Made with {versions}.
{option_table(record["options"])}"""


def option_table(options: dict[str, Any]) -> str:
    rows = [f"| {key} | {value} |" for key, value in options.items()]
    return "\n".join(["", "| option | value |", "|---|---|", *rows, ""]) if rows else ""


def link(reference: str) -> str:
    if reference[:4].isdigit():
        return f"[arXiv:{reference}](https://arxiv.org/abs/{reference})"
    return f"[{reference}](https://github.com/{reference})" if reference.count("/") == 1 else reference


def donors_table(donors: list[dict[str, Any]]) -> str:
    if not donors:
        return ""
    rows = "\n".join(
        f"| {d['name']} | {d['revision'] or '-'} | {d['license'] or 'unknown'} | {_short(d['sha256'])} |"
        for d in donors
    )
    return f"""## Donors

| donor | revision | licence | sha256 |
|---|---|---|---|
{rows}
"""


def _short(sha256: str | None) -> str:
    return f"`{sha256[:16]}`" if sha256 else "-"


def caveats(donors: list[dict[str, Any]]) -> str:
    lines = ["- Train it before you use it, and compare it with the default initialisation at a tuned learning rate."]
    if donors:
        lines.append("- The weights derive from the donors above; their licences and the data they learned from apply.")
    if any(d["license"] in (None, "unknown") for d in donors):
        lines.append("- The licence of at least one donor is not known.")
    return "\n".join(["## Before you use it", "", *lines, ""])
