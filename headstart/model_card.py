"""What all model cards share: front matter for the hub, options, donors and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from zoo.statistics.grouping import Grouping


def model_card(data: ModelCardData, sections: Sequence[str]) -> ModelCard:
    """A card of front matter and sections of Markdown; empty sections are left out."""
    body = "\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def card_data(
    donors: Sequence[dict[str, Any]],
    base_models: Sequence[str],
    library: str = "transformers",
    tags: Sequence[str] = (),
) -> ModelCardData:
    """The front matter: licences of the donors (their records in headstart.json), and hub ids of what was used."""
    licenses = sorted({donor["license"] or "unknown" for donor in donors})
    license_keys: dict[str, Any] = {}
    if len(licenses) == 1:
        license_keys = {"license": _license_id(licenses[0])}
    elif licenses:
        license_keys = {"license": "other", "license_name": " and ".join(licenses)}
    return ModelCardData(
        **license_keys,
        library_name=library,
        tags=["headstart", "initialization", *tags],
        base_model=list(base_models) or None,
    )


def _license_id(name: str) -> str:
    """A licence as the hub writes it. The hub calls a licence with a longer name `other`."""
    return name.lower() if " " not in name else "other"


def how_it_was_made(record: dict[str, Any], summary: str, reference: str, details: Sequence[str]) -> str:
    """The section with the command, the method, `details` and the options."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    items = [
        f"Method: `{record['method']}`, {summary} ({reference_link(reference)}).",
        *details,
        f"Made with {versions}.",
    ]
    lines = ["```", record["command"], "```", "", *(f"- {item}" for item in items), options_table(record["options"])]
    return "\n".join(lines)


def grouping_detail(record: dict[str, Any]) -> list[str]:
    """What was read of the reference, as no or one item of a list."""
    grouping = record.get("grouping")
    if grouping is None:
        return []
    name = f" of {grouping['source']['name']}" if grouping["source"] else ""
    description = Grouping.from_json(grouping).description
    return [f"Characterisation{name} by the top {grouping['rank']} singular values: {description}."]


def options_table(options: dict[str, Any]) -> str:
    rows = [f"| {key} | {value} |" for key, value in options.items()]
    return "\n".join(["", "| option | value |", "|---|---|", *rows, ""]) if rows else ""


def reference_link(reference: str) -> str:
    """A reference as a link, where it is an arXiv id or a repository on GitHub."""
    if reference[:4].isdigit():
        return f"[arXiv:{reference}](https://arxiv.org/abs/{reference})"
    return f"[{reference}](https://github.com/{reference})" if reference.count("/") == 1 else reference


def donors_section(donors: Sequence[dict[str, Any]]) -> str:
    if not donors:
        return ""
    rows = [
        f"| {d['name']} | {d['revision'] or '-'} | {d['license'] or 'unknown'} | {_short_hash(d['sha256'])} |"
        for d in donors
    ]
    return "\n".join(["## Donors", "", "| donor | revision | licence | sha256 |", "|---|---|---|---|", *rows, ""])


def _short_hash(sha256: str | None) -> str:
    return f"`{sha256[:16]}`" if sha256 else "-"


def warnings_section(donors: Sequence[dict[str, Any]]) -> str:
    lines = ["- Train it before you use it. Compare it with the default initialisation at a tuned learning rate."]
    if donors:
        lines.append(
            "- The weights derive from the donors above. Their licences and the terms of their training data apply."
        )
    if any(d["license"] in (None, "unknown") for d in donors):
        lines.append("- The licence of at least one donor is unknown.")
    return "\n".join(["## Before you use it", "", *lines, ""])
