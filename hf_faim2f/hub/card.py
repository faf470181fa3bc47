"""The model card: every fact in it comes from `family/` or from what the converter did."""

from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..family import FAMILY
from ..model.configuration_faim2f import FaiM2FConfig

DATASETS = {"ade20k": "ADE20K", "coco": "COCO"}
# Focoos: transformers'. Words for the task in the card.
TASKS = {"semantic": "semantic segmentation", "instance": "instance segmentation", "panoptic": "panoptic segmentation"}
POST_PROCESSING = {
    "semantic": "post_process_semantic_segmentation",
    "instance": "post_process_instance_segmentation",
    "panoptic": "post_process_panoptic_segmentation",
}


@dataclass(frozen=True)
class Provenance:
    """Where a converted model's weights came from.

    Args:
        file: the name of the source checkpoint's file.
        sha256: the hexadecimal digest of that file.
        started_from: what the backbone was initialized with before training, as the source's configuration says.
        library: whose format it was, "Focoos" or "transformers".
        model: what it was called there, where that is another name.
        error: the largest difference from the source's logits that was measured, as a share of the largest; None where
            the source's library was not run.
    """

    file: str
    sha256: str
    started_from: dict[str, Any] = field(default_factory=dict)
    library: str = "Focoos"
    model: str | None = None
    error: float | None = None


USAGE = """\
```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

folder = "{folder}"
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForUniversalSegmentation.from_pretrained(folder, trust_remote_code=True).eval()

image = Image.open("photo.jpg")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
result = processor.{post_process}(outputs, target_sizes=[(image.height, image.width)])[0]
```

Or, in one line each:

```python
from transformers import pipeline

segment = pipeline("image-segmentation", model="{folder}", trust_remote_code=True)
segments = segment("photo.jpg", subtask="{task}")
```
"""


def model_card(name: str, config: FaiM2FConfig, provenance: Provenance) -> str:
    """The README.md of a converted model, with the Hub's metadata in front.

    Args:
        name: what the model is called; a name of the family brings its published metrics.
        config: the model's configuration.
        provenance: the source checkpoint.
    """
    preset = FAMILY.get(name)
    task = config.postprocessing_type
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["faim2f", "mask2former", f"{task}-segmentation", "vision"],
        model_name=name,
    )
    backbone = config.backbone_config
    lines = [
        f"# {name}",
        "",
        _introduction(TASKS[task], provenance),
        "",
        "## Use",
        "",
        USAGE.format(folder=name, post_process=POST_PROCESSING[task], task=task),
        "## Architecture",
        "",
        f"- backbone: {backbone.model_type}, depths {list(backbone.depths)}"
        if hasattr(backbone, "depths")
        else f"- backbone: {backbone.model_type}",
        f"- pixel decoder: {_pixel_decoder(config)}",
        f"- transformer decoder: {config.decoder_layers} layers, {config.num_queries} queries, "
        f"{config.num_labels} classes",
        "",
    ]
    if preset is not None:
        published = {key: value for key, value in preset.published.items() if not isinstance(value, dict)}
        lines += ["## Published results", "", "As Focoos published them; not measured again here.", ""]
        lines += ["| figure | value |", "| --- | --- |"]
        lines += [f"| {key} | {value} |" for key, value in published.items()] + [""]
    lines += [
        "## Provenance",
        "",
        f"- source file: `{provenance.file}`, SHA-256 `{provenance.sha256}`",
    ]
    if provenance.library == "transformers":
        lines[-1] = f"- source: transformers' `{provenance.model}`, SHA-256 of its weights `{provenance.sha256}`"
    lines += [f"- training started from: {key} = {value}" for key, value in provenance.started_from.items()]
    if provenance.error is not None:
        lines.append(f"- conversion error: {provenance.error:.1e} of the largest logit, measured on noise of 128x160")
    owner = "Focoos's" if provenance.library == "Focoos" else "that of their source"
    lines += [f"- the licence of the weights is {owner}; that of the code in this repository is Apache-2.0", ""]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)))


def _introduction(task: str, provenance: Provenance) -> str:
    if provenance.library == "Focoos":
        return (
            f"FAI-M2F for {task}, converted from Focoos's checkpoint to Hugging Face transformers: Mask2Former with a "
            "feature pyramid in place of deformable attention, made for speed."
        )
    return (
        f"Mask2Former for {task}, converted from transformers' own model to `hf_faim2f`: the same answers, with "
        "exports to ONNX and TensorRT and a faster post-processing."
    )


def _pixel_decoder(config: FaiM2FConfig) -> str:
    if config.pixel_decoder_type == "deformable":
        return (
            f"{config.encoder_layers} layers of deformable attention over three levels, {config.feature_size} channels"
        )
    return (
        f"feature pyramid of {config.feature_size} channels, {config.encoder_layers} transformer layers on its "
        "coarsest level"
    )


__all__ = ["Provenance", "model_card"]
