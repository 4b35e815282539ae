"""The model card of a head: a Jinja template, and its fields."""

import re
from collections.abc import Mapping
from typing import Any

FIGURES = ("mAP", "mAP_sample", "F1_micro", "F1_macro", "CF1", "OF1", "P@5", "R@5", "hamming_loss")
READS = {"both": "an image and a caption of it", "image": "an image alone", "text": "a caption alone"}
BLOCKS = {
    "concat": "directions of both embeddings",
    "hadamard": "directions of both embeddings and their product",
    "hadamard_magnitude": "directions of both embeddings, their product, and log-norms",
}

CARD = """---
{{ card_data }}
---

# {{ title }}

A small head, trained with mmcli, that tags from stored [SigLIP2](https://arxiv.org/abs/2502.14786) embeddings. It reads
{{ reads }}, {{ width }} numbers each, and gives {{ n_classes }} logits
{%- if bits %} and a code of {{ bits }} bits, by which neighbours are found{% endif %}.

| | |
|---|---|
| head | {{ head_text }} |
| bits | {{ bits or "none: no hash layer" }} |
| parameters | {{ "{:,}".format(n_parameters) }} |
{%- for name, value in facts %}
| {{ name }} | {{ value }} |
{%- endfor %}

## Load it

```python
from mmcli import load_head
head = load_head("FOLDER")  # this folder; device="cuda" for a GPU
```

From the hub it is `from mmcli.heads.model import {{ class_name }}` and `{{ class_name }}.from_pretrained("USER/NAME")`.
`head(v_img, v_txt)` takes raw pooled embeddings, before L2 normalisation, `(N, {{ width }})` float32 each.
`.logits` are in the order of `category_names` in `config.json`{% if not names %}, where they are known{% endif %}.
{%- if bits %}
`.h` are soft codes; a bit is on where they are not below 0.
{%- endif %}

## Figures
{% if figures %}
{{ figures_of }}

| {% for name, _ in figures %}{{ name }} | {% endfor %}
|{% for _ in figures %}---:|{% endfor %}
| {% for _, value in figures %}{{ value }} | {% endfor %}
{% else %}
None were measured when this folder was written.
{% endif %}
## Limits

- Embeddings of another encoder, another patch budget, or normalised ones fit in shape and give nonsense.
{%- if names %}
- It knows {{ n_classes }} tags and no other: {{ names }}.
{%- else %}
- It knows {{ n_classes }} tags and no other.
{%- endif %}
{%- if inputs != "image" %}
- Captions name the objects of an image: figures with captions are not to be set beside tables made from images alone.
{%- endif %}
{%- if bits %}
- Neighbours need the codes of a train split, which are not in this folder.
{%- endif %}
- Scores are not calibrated, and the head repeats what is one-sided in the data it was trained on.
"""


def card_fields(about: Mapping[str, Any], n_parameters: int) -> dict[str, Any]:
    """The fields of the template.

    Args:
        about: The head's build, and facts about it.
        n_parameters: Trainable parameters.
    """
    mlp, fusion = about["head"] == "mlp", about["fusion"]
    bits = 0 if mlp else about["hash"]["bits"]
    metrics, encoder = about.get("metrics") or {}, str(about.get("encoder", ""))
    layers = " x ".join(str(width) for width in fusion["mlp_dims"])
    blocks = "raw embeddings" if mlp else BLOCKS[fusion["type"]]
    blocks += " shuffled over images (a control)" if fusion["magnitude"] == "shuffled" else ""
    facts = {
        "preset": about.get("preset"),
        "encoder": encoder,
        "patches": about.get("patches"),
        "data": about.get("data"),
        "seed": about.get("seed"),
        "mmcli": about.get("mmcli"),
    }
    measured = [(name, metrics[name]) for name in FIGURES if isinstance(metrics.get(name), float | int)]
    return {
        "title": f"mmcli {'MLP baseline' if mlp else f'{bits}-bit head' if bits else 'head without hash'}",
        "class_name": "MlpBaseline" if mlp else "Head",
        "reads": READS[fusion["inputs"]],
        "inputs": fusion["inputs"],
        "width": about["width"],
        "bits": bits,
        "n_classes": about["classifier"]["num_classes"],
        "n_parameters": n_parameters,
        "head_text": f"{blocks}, MLP {layers}",
        "facts": [(name, value) for name, value in facts.items() if value not in {None, ""}],
        "names": ", ".join(about.get("category_names") or ()),
        "figures": [(name, f"{value:.4f}") for name, value in measured],
        "figures_of": f"Of the {metrics.get('method', 'classifier')} on the {metrics.get('split', 'test')} split.",
        "base_model": encoder if re.fullmatch(r"[\w.-]+/[\w.-]+", encoder) else None,
    }
