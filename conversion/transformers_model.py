"""Writes a deformable model as a folder of transformers' own Mask2Former, which loads without this package's code.

The inverse of `mask2former.py`, with the same table of names. Settings that transformers' class does not have are
rejected if they change the outputs or the loss, and reported if they only affect training or post-processing.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from transformers import __version__ as transformers_version

from hf_faim2f.errors import ConversionError, first_line
from hf_faim2f.files import check_new_folder, new_folder
from hf_faim2f.hub.card_facts import read_provenance
from hf_faim2f.hub.sections import TASK, parse_card, plain
from hf_faim2f.model.configuration_faim2f import OWN_BACKBONES, FaiM2FConfig
from hf_faim2f.model.image_processing_faim2f import FaiM2FImageProcessor
from hf_faim2f.model.image_settings_faim2f import BILINEAR, MAX_RESIZED_PIXELS
from hf_faim2f.model.modeling_faim2f import FaiM2FForUniversalSegmentation
from hf_faim2f.version import __version__

from .mask2former import DERIVED, PROCESSOR_SETTINGS, SAME, STRIDES, TIED, to_their_names
from .weights import ConvertedModel, measure_difference

# Settings for which transformers' class supports only one value, and the reasons.
REQUIRED = {
    "pixel_decoder_type": ("deformable", "its only pixel decoder is the deformable one"),
    "encoder_points": (4, "it always samples 4 points"),
    "use_level_embedding": (True, "it always has this embedding"),
    "label_weights": (None, "its loss weights all classes alike"),
    "num_channels": (3, "its image processor reads RGB"),
    "cls_sigmoid": (False, "it always classifies with a softmax"),
    "use_auxiliary_loss": (
        True,
        "it does not even predict without this; set it to true in config.json, where it changes only training",
    ),
}
# Settings of training and post-processing that transformers' class does not have, and their values without effect.
WITHOUT_PLACE = {"backbone_freeze_at": -1, "backbone_freeze_norm": False, "threshold": 0.5, "mask_threshold": 0.5}
INTERMEDIATE_SIZE = [384, 384]
# Projections of the levels to the decoder's width. Earlier releases keep them in a plain list, and so neither save nor
# load their weights.
PROJECTION, SAVES_PROJECTIONS = "transformer_module.input_projections.", "5.21"

CARD = """\
---
{metadata}
---

# {title}

Mask2Former for {task} segmentation, as transformers' own class `Mask2FormerForUniversalSegmentation`: no
`trust_remote_code` is needed.

```python
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

repository = {repository}
processor = AutoImageProcessor.from_pretrained(repository)
model = Mask2FormerForUniversalSegmentation.from_pretrained(repository).eval()
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")  # upright
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
result = processor.post_process_{task}_segmentation(outputs, target_sizes=[(image.height, image.width)]{stuff})[0]
```

## Origin

{origin}
"""


def their_config(config: FaiM2FConfig) -> Mask2FormerConfig:
    """The configuration of the same model in transformers.

    Raises:
        ConversionError: a setting that transformers' class does not have; the message names it.
    """
    for name, (required, why) in REQUIRED.items():
        if getattr(config, name) != required:
            raise _refusal(config, name, why)
    for name, other in TIED.items():
        if getattr(config, name) != getattr(config, other):
            raise _refusal(config, name, f"it takes the value of {other}, which is {getattr(config, other)!r}")
    backbone = config.backbone_config
    if backbone.model_type in OWN_BACKBONES:
        raise ConversionError(
            f"transformers' Mask2Former cannot have the backbone_config of this model: {backbone.model_type!r} is a "
            "backbone of this package, not of transformers."
        )
    if len(backbone.out_features) != len(STRIDES):
        raise ConversionError(
            "transformers' Mask2Former cannot have the backbone_config of this model: it takes four feature maps, not "
            f"{backbone.out_features}."
        )
    return Mask2FormerConfig(
        backbone_config=backbone.to_dict(),
        decoder_layers=config.decoder_layers + 1,
        output_auxiliary_logits=config.output_auxiliary_logits or None,
        feature_strides=list(STRIDES),
        common_stride=STRIDES[0],
        id2label=dict(config.id2label),
        label2id=dict(config.label2id),
        **{name: getattr(config, name) for name in SAME},
    )


def _refusal(config: FaiM2FConfig, name: str, why: str) -> ConversionError:
    return ConversionError(
        f"transformers' Mask2Former does not support this model's {name} = {getattr(config, name)!r}: {why}."
    )


def their_model(ours: FaiM2FForUniversalSegmentation) -> Mask2FormerForUniversalSegmentation:
    """The same model as transformers' class, in float32 and evaluation mode.

    Raises:
        ConversionError: transformers' class cannot express the model; the message names the setting.
    """
    theirs = Mask2FormerForUniversalSegmentation(their_config(ours.config))
    weights = to_their_names(ours.state_dict())
    expected = {key for key in theirs.state_dict() if not key.startswith(DERIVED)}
    if any(PROJECTION in key for key in weights.keys() - expected):
        name = "enforce_input_projection" if ours.config.enforce_input_projection else "feature_size"
        raise _refusal(
            ours.config,
            name,
            f"transformers {transformers_version} does not save the projections that this needs; convert the model "
            f"with transformers {SAVES_PROJECTIONS} or later",
        )
    different = sorted(weights.keys() ^ expected)
    if different:
        raise ConversionError(
            f"transformers' Mask2Former and this model differ in the weight {different[0]!r}: please report it with "
            "the model's config.json."
        )
    theirs.load_state_dict(weights, strict=False)
    return theirs.eval()


def their_processor(processor: FaiM2FImageProcessor) -> tuple[dict[str, Any], list[str]]:
    """The contents of preprocessor_config.json for transformers, and a sentence about each setting it does not have."""
    notes: list[str] = []
    settings = {name: getattr(processor, name) for name in PROCESSOR_SETTINGS}
    settings["image_processor_type"] = "Mask2FormerImageProcessor"
    settings["resample"] = BILINEAR
    settings["do_reduce_labels"] = processor.do_reduce_labels
    for name in ("ignore_index", "num_labels"):
        if getattr(processor, name) is not None:
            settings[name] = getattr(processor, name)
    if "shortest_edge" in processor.size:
        # transformers requires a maximum; no image has such a long edge.
        settings["size"] = {"longest_edge": MAX_RESIZED_PIXELS, **processor.size}
        if processor.do_resize and not processor.size_divisor:
            notes.append(
                "transformers truncates the sides of a resized image where this package rounds them, so that images "
                "of some sizes become one pixel smaller (set size_divisor to 32 to have the same in both)"
            )
    if processor.pad_size is not None:
        notes.append(
            f"pad_size = {processor.pad_size} is not written: transformers' post-processing would stretch the padding "
            "over the image, and this package leaves it out"
        )
    if processor.intermediate_size != INTERMEDIATE_SIZE:
        notes.append(
            f"intermediate_size = {processor.intermediate_size} is not written: transformers' post-processing always "
            f"has {INTERMEDIATE_SIZE}"
        )
    return settings, notes


def convert(
    model: FaiM2FForUniversalSegmentation,
    processor: FaiM2FImageProcessor,
    out_dir: Path,
    *,
    name: str = "",
    card: str = "",
) -> ConvertedModel:
    """Writes a deformable model to `out_dir` as a folder of transformers' own Mask2Former, atomically.

    Args:
        model: a model in float32 and evaluation mode.
        processor: its image processor.
        out_dir: a folder that does not exist yet.
        name: the model's name, for the new model card; by default that of `out_dir`.
        card: the model's card. The new one keeps its metadata, such as the license.

    Raises:
        ConversionError: transformers' class cannot express the model, or its outputs differ; nothing is left behind.
    """
    check_new_folder(out_dir, ConversionError)
    name = name or out_dir.name
    config = model.config
    theirs = their_model(model)
    settings, notes = their_processor(processor)
    if any(PROJECTION in key for key in theirs.state_dict()):
        notes.append(
            f"only transformers {SAVES_PROJECTIONS} or later loads this folder: earlier releases leave the "
            "transformer_module.input_projections random"
        )
    stuff = config.label_ids_to_fuse if config.label_ids_to_fuse is not None else processor.label_ids_to_fuse
    if config.postprocessing_type == "panoptic" and stuff:
        notes.append(
            "transformers' folders do not say which classes are stuff: pass "
            f"label_ids_to_fuse={stuff} to post_process_panoptic_segmentation"
        )
    notes += [
        f"{setting} = {getattr(config, setting)!r} is not written: transformers' class has no such setting"
        for setting, default in WITHOUT_PLACE.items()
        if getattr(config, setting) != default
    ]
    error = measure_difference(theirs, model)
    try:
        text = _card(name, out_dir.name, config, stuff, card, error)
    except ValueError as reason:
        raise ConversionError(f"the model card of {name} cannot be kept: {first_line(reason, kind=False)}.") from reason
    with new_folder(out_dir) as staging:
        theirs.save_pretrained(staging)
        (staging / "preprocessor_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        (staging / "README.md").write_text(text, encoding="utf-8")
    return ConvertedModel(name, notes, error)


def _card(name: str, repository: str, config: FaiM2FConfig, stuff: Any, before: str, error: float) -> str:
    """The README.md: the previous card's metadata, how to load the model, and where it comes from."""
    metadata, _ = parse_card(before)
    data: Any = ModelCardData(**metadata)
    task = config.postprocessing_type
    data.library_name, data.pipeline_tag = "transformers", TASK
    tags = [tag for tag in data.tags or [] if tag != FaiM2FConfig.model_type]
    data.tags = list(dict.fromkeys(["mask2former", f"{task}-segmentation", "vision", *tags]))
    provenance = read_provenance(before)
    origin = (
        f"Written by hf_faim2f {__version__} from the model {plain(name)} of the type `{FaiM2FConfig.model_type}`. Its "
        f"logits differ from that model's by at most {error:.1e} of the largest value."
    )
    if provenance is not None:
        origin += (
            f"\n\nThat model was converted from {plain(provenance.library)}'s "
            f"{plain(provenance.model or provenance.file)} (SHA-256 `{plain(provenance.sha256)}`)."
        )
    return CARD.format(
        metadata=data.to_yaml(), title=plain(repository), task=task, repository=json.dumps(repository), origin=origin,
        stuff=f", label_ids_to_fuse={stuff}" if task == "panoptic" and stuff else "",
    )  # fmt: skip


__all__ = ["convert", "their_config", "their_model", "their_processor"]
