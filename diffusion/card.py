"""The model card of a saved pipeline."""

from __future__ import annotations

from autoencoder.model import WeightAutoencoder
from diffusion.denoiser import LatentDenoiser
from zoo.cards.card import card_data, donors_section, model_card

TEXT = """# Weights of {architecture} language models, generated

A `WeightDiffusionPipeline` of headstart: it writes initial weights for a language model of any shape. It learned from
the {count} donors below. {numbers:,} numbers generate {tokens:,} token embeddings and blocks of any number, up to
{width} wide with {neurons} neurons and {groups} KV heads of {head_dim}; larger targets are grown from that.

```python
import headstart
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER or ID")
output = pipeline("config.json", text=open("sample.txt").read())
output.save_pretrained("init")
```
"""


def pipeline_card(autoencoder: WeightAutoencoder, denoiser: LatentDenoiser) -> str:
    """The card of a pipeline, with the licences and the provenance of the donors that it learned from."""
    sizes, donors = autoencoder.sizes, list(autoencoder.config["donors"] or [])
    numbers = sum(p.numel() for p in autoencoder.field.parameters())
    numbers += sum(p.numel() for p in denoiser.parameters())
    text = TEXT.format(
        architecture=autoencoder.config["architecture"],
        count=len(donors),
        numbers=numbers,
        tokens=sizes.tokens,
        width=sizes.width,
        neurons=sizes.neurons,
        groups=sizes.groups,
        head_dim=sizes.head_dim,
    )
    base_models = sorted({name for donor in donors for name in donor.get("base_models", ())})
    data = card_data(donors, base_models, None, library="diffusers")
    warning = "The weights that it writes derive from these donors. Their licences apply.\n" if donors else ""
    return str(model_card(data, [text, donors_section(donors), warning]))
