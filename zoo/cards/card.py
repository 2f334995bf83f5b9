"""What all model cards share: front matter for the hub, options, donors and warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from zoo.cards.licenses import license_keys
from zoo.cards.markdown import (
    code_block,
    command_without_folders,
    escape_markdown,
    reference_links,
    table,
    without_folders,
)
from zoo.targets.config_facts import ask
from zoo.targets.configs import model_class_name

# The hub's name for what a model does, by the table of transformers that lists its class.
PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_TO_SEQ_CAUSAL_LM": "text-generation",
    "MASKED_LM": "fill-mask",
    "IMAGE_TEXT_TO_TEXT": "image-text-to-text",
}
DONOR_COLUMNS = {"name": "-", "revision": "-", "license": "unknown"}  # key of a record -> text where it is empty


def model_card(data: ModelCardData, sections: Sequence[str]) -> ModelCard:
    """A card of front matter and sections of Markdown; empty sections are left out."""
    body = "\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def card_data(
    donors: Sequence[dict[str, Any]],
    base_models: Sequence[str],
    pipeline: str | None,
    library: str = "transformers",
    tags: Sequence[str] = (),
) -> ModelCardData:
    """The front matter: licences of the donors (their records in headstart.json), and hub ids of what was used."""
    return ModelCardData(
        **license_keys(donor["license"] for donor in donors),  # type: ignore[arg-type]
        library_name=library,
        pipeline_tag=pipeline,
        tags=["headstart", "initialization", *tags],
        base_model=list(base_models) or None,
    )


def pipeline_tag(config: Mapping[str, Any] | None) -> str | None:
    """The hub's name for what the model of a config does, None where it has none."""
    return None if config is None else ask("pipeline", config, lambda: _pipeline_of(model_class_name(config)))


def _pipeline_of(name: str) -> str | None:
    """The hub's name for what a class of transformers does."""
    from transformers.models.auto import modeling_auto as auto

    for task, pipeline in PIPELINES.items():
        for classes in getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values():
            if name in ([classes] if isinstance(classes, str) else classes):
                return pipeline
    return None


def how_it_was_made(record: dict[str, Any], summary: str, reference: str, details: Sequence[str]) -> str:
    """The section with the command, the method, `details` and the options."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    items = [
        f"Method: `{record['method']}`, {summary} ({reference_links(reference)}).",
        *details,
        f"Made with {versions}.",
    ]
    command = code_block(command_without_folders(record["command"]))
    return "\n".join([command, "", *(f"- {item}" for item in items), options_table(record["options"])])


def grouping_detail(record: dict[str, Any]) -> list[str]:
    """What was read of the reference, as no or one item of a list."""
    grouping = record.get("grouping")
    if grouping is None:
        return []
    from zoo.statistics.grouping import Grouping  # scipy.stats takes long to import, and most cards have no grouping

    name = f" of {escape_markdown(grouping['source']['name'])}" if grouping["source"] else ""
    description = Grouping.from_json(grouping).description
    return [f"Characterisation{name} by the top {grouping['rank']} singular values: {description}."]


def options_table(options: dict[str, Any]) -> str:
    rows = [[escape_markdown(key), escape_markdown(without_folders(str(value)))] for key, value in options.items()]
    return "\n".join(["", table(["option", "value"], rows), ""]) if rows else ""


def donors_section(donors: Sequence[dict[str, Any]]) -> str:
    if not donors:
        return ""
    rows = [
        [*(escape_markdown(d[key] or empty) for key, empty in DONOR_COLUMNS.items()), _short_hash(d["sha256"])]
        for d in donors
    ]
    return "\n".join(["## Donors", "", table(["donor", "revision", "licence", "sha256"], rows), ""])


def _short_hash(sha256: str | None) -> str:
    return f"`{sha256[:16]}`" if sha256 else "-"


def warnings_section(donors: Sequence[dict[str, Any]]) -> str:
    lines = ["- Train it before you use it. Compare it with the default initialisation at a tuned learning rate."]
    if donors:
        lines.append(
            "- The weights derive from the donors above. Their licences and the terms of their training data apply."
        )
    for donor in donors:
        if donor.get("quantisation"):
            name, text = escape_markdown(donor["name"]), escape_markdown(donor["quantisation"])
            lines.append(f"- {name} is quantised: {text}. Its weights were read as the values that it computes with.")
        if donor.get("base_models"):
            name, text = escape_markdown(donor["name"]), escape_markdown(", ".join(donor["base_models"]))
            lines.append(f"- {name} says that it was made from {text}.")
    if any(d["license"] in (None, "unknown") for d in donors):
        lines.append("- The licence of at least one donor is unknown.")
    return "\n".join(["## Before you use it", "", *lines, ""])
