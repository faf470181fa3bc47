"""Data on the published models and their datasets, used by configurations, model cards, tests and benchmarks."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import nearest_name
from ..model.configuration_faim2f import FaiM2FConfig


@dataclass(frozen=True)
class Dataset:
    """A public dataset.

    Args:
        name: its full name.
        hub_id: its Hub id, for the metadata of model cards.
        format: its name for `faim2f evaluate --format`.
        url: its home page.
        training, validation: number of images in these splits.
        split: the split of the published metrics.
        scenes: what its images show.
        terms: terms of use.
    """

    name: str
    hub_id: str
    format: str
    url: str
    training: int
    validation: int
    split: str
    scenes: str
    terms: str


DATASETS = {
    "ade20k": Dataset(
        "ADE20K",
        "scene_parse_150",
        "ade20k",
        "https://groups.csail.mit.edu/vision/datasets/ADE20K/",
        20210,
        2000,
        "validation",
        "everyday scenes, indoors and outdoors",
        "its images are for non-commercial research and education",
    ),
    "coco": Dataset(
        "COCO",
        "coco",
        "coco-instance",
        "https://cocodataset.org",
        118287,
        5000,
        "val2017",
        "photographs of common objects in their surroundings",
        "its annotations are CC BY 4.0, its images under the terms of Flickr",
    ),
}


DATA = Path(__file__).parent / "data"
WEIGHTS_URL = "https://public.focoos.ai/pretrained_models/{name}/model_final.pth"
WEIGHTS_LICENSE = "not stated by Focoos"

# Number of blocks in each stage of a ResNet, by its depth (He et al., Deep Residual Learning, table 1).
RESNET_BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
STDC_1 = {"model_type": "faim2f_stdc", "depths": [2, 2, 2]}
STDC_2 = {"model_type": "faim2f_stdc", "depths": [4, 5, 3]}
RESNET_50 = {"model_type": "rt_detr_resnet", "depths": RESNET_BLOCKS[50]}
RESNET_101 = {"model_type": "rt_detr_resnet", "depths": RESNET_BLOCKS[101]}

SEMANTIC = {"postprocessing_type": "semantic", "predict_all_pixels": True, "use_mask_score": False}
INSTANCE = {"postprocessing_type": "instance", "predict_all_pixels": False, "use_mask_score": True}
BISENET = {"pixel_decoder_type": "bisenet", "decoder_layers": 6, "dim_feedforward": 1024}
COCO_DECODER = {"encoder_layers": 3, "decoder_layers": 6, "dim_feedforward": 1024}


@dataclass(frozen=True)
class Preset:
    """A published model.

    Args:
        name: the name of the model and its weights in Focoos.
        dataset: key of `DATASETS` and of the labels, "ade20k" or "coco".
        resolution: shortest edge of images in the published evaluations, in pixels.
        summary: the architecture in a few words, for the model card and the README.
        config: keywords of `FaiM2FConfig` that differ from the defaults, except the labels.
        sha256: the SHA-256 of its checkpoint, which a download must have; None if unknown. Focoos publishes none.
    """

    name: str
    dataset: str
    resolution: int
    summary: str
    config: dict[str, Any] = field(repr=False)
    sha256: str | None = None

    @property
    def labels(self) -> list[str]:
        """Class names in the order of their ids."""
        return load_labels(self.dataset)

    @property
    def weights_url(self) -> str:
        """The URL of the checkpoint published by Focoos."""
        return WEIGHTS_URL.format(name=self.name)

    @property
    def published(self) -> dict[str, Any]:
        """Metrics and frame rates from Focoos's model card, including per-class metrics; those that were published."""
        return _published()["members"][self.name]["published"]

    @property
    def re_evaluated(self) -> dict[str, float]:
        """Metrics from Focoos's later evaluation, including per-class metrics; empty if there was none."""
        return _published()["members"][self.name].get("re_evaluated", {})


FAMILY = {
    preset.name: preset
    for preset in (
        Preset("fai-m2f-s-ade", "ade20k", 640, "STDC-1, 1 decoder layer",
               {**SEMANTIC, "backbone_config": STDC_1, "decoder_layers": 1}),
        Preset("fai-mf-m-ade", "ade20k", 640, "STDC-2, 3 decoder layers",
               {**SEMANTIC, "backbone_config": STDC_2, "decoder_layers": 3}),
        Preset("fai-mf-l-ade", "ade20k", 640, "ResNet-101 d, 6 decoder layers",
               {**SEMANTIC, "backbone_config": RESNET_101, "decoder_layers": 6, "dim_feedforward": 1024}),
        Preset("bisenetformer-s-ade", "ade20k", 640, "STDC-1, BiSeNet, 6 decoder layers",
               {**SEMANTIC, **BISENET, "backbone_config": STDC_1}),
        Preset("bisenetformer-m-ade", "ade20k", 640, "STDC-2, BiSeNet, 4 decoder layers, 96 wide",
               {**SEMANTIC, **BISENET, "backbone_config": STDC_2, "decoder_layers": 4,
                "feature_size": 96, "mask_feature_size": 96, "dim_feedforward": 512}),
        Preset("bisenetformer-l-ade", "ade20k", 640, "STDC-2, BiSeNet, 6 decoder layers",
               {**SEMANTIC, **BISENET, "backbone_config": STDC_2}),
        Preset("fai-mf-s-coco-ins", "coco", 1024, "ResNet-50 d, 3 encoder and 6 decoder layers",
               {**INSTANCE, **COCO_DECODER, "backbone_config": RESNET_50}),
        Preset("fai-mf-m-coco-ins", "coco", 1024, "ResNet-101 d, 3 encoder and 6 decoder layers",
               {**INSTANCE, **COCO_DECODER, "backbone_config": RESNET_101}),
        Preset("fai-mf-l-coco-ins", "coco", 1024, "ResNet-101 d, 6 encoder and 9 decoder layers, 256 wide",
               {**INSTANCE, "backbone_config": RESNET_101, "encoder_layers": 6, "decoder_layers": 9,
                "feature_size": 256, "mask_feature_size": 256, "dim_feedforward": 2048}),
    )
}  # fmt: skip
# Focoos's earlier names of some ADE20K models.
ALIASES = {
    "fai-m2f-m-ade": "fai-mf-m-ade",
    "fai-m2f-l-ade": "fai-mf-l-ade",
    "fai-bf-m-ade": "bisenetformer-m-ade",
}


@functools.cache
def _published() -> dict[str, Any]:
    return json.loads((DATA / "published.json").read_text(encoding="utf-8"))


def published_peers() -> dict[str, Any]:
    """Other models in the same published comparison: mIoU on ADE20K, and frames per second on a T4."""
    return _published()["peers"]


@functools.cache
def _labels() -> dict[str, list[str]]:
    return json.loads((DATA / "labels.json").read_text(encoding="utf-8"))


def load_labels(dataset: str) -> list[str]:
    """Class names of "ade20k" (150) or "coco" (80), in the order of their ids.

    Raises:
        ValueError: the name is unknown.
    """
    if dataset not in _labels():
        raise ValueError(f"There are no labels of {dataset!r}: choose from {', '.join(_labels())}.")
    return list(_labels()[dataset])


def label_keywords(labels: Sequence[str]) -> dict[str, Any]:
    """Keywords of `FaiM2FConfig` for class names in the order of their ids."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}


def find_preset(name: str) -> Preset:
    """The published model with this name.

    Raises:
        ValueError: there is none; the message lists the known names and suggests the closest.
    """
    known = [*FAMILY, *ALIASES]
    if name not in known:
        nearest = nearest_name(name, known)
        hint = f" Did you mean {nearest!r}?" if nearest else ""
        raise ValueError(f"No published model is called {name!r}. Known: {', '.join(FAMILY)}.{hint}")
    return FAMILY[ALIASES.get(name, name)]


def load_config(name: str, **overrides: Any) -> FaiM2FConfig:
    """The configuration of a published model, with its labels: `load_config("fai-mf-m-ade")`.

    Args:
        name: one of the published names.
        overrides: keywords of `FaiM2FConfig` to change; `num_labels` or `id2label` replace the labels.

    Raises:
        ValueError: there is no model with this name.
    """
    preset = find_preset(name)
    values: dict[str, Any] = {**preset.config, "backbone_config": dict(preset.config["backbone_config"])}
    if "num_labels" not in overrides and "id2label" not in overrides:
        values |= label_keywords(preset.labels)
    return FaiM2FConfig(**{**values, **overrides})


# Checkpoints of other libraries have class names, but do not specify which classes are things (countable objects) and
# which are stuff. For well-known datasets, the tables below do.

# Cityscapes' evaluated classes, label id and name, in the order of their train ids; things start at "person".
CITYSCAPES_CLASSES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
CITYSCAPES_FIRST_THING = list(CITYSCAPES_CLASSES).index(24)
# Number of COCO's panoptic classes; the 80 things come first.
COCO_PANOPTIC = 133
# ADE20K's stuff: the 50 of its 150 classes without instance annotations.
ADE20K_STUFF = (
    0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59, 60, 61, 63, 68, 77, 79,
    84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122, 128, 131, 140, 141, 145,
)  # fmt: skip
# Fraction of the names that must match. Some differ between libraries, such as "windowpane" and "window".
ALIKE = 0.85


def stuff_of(labels: Sequence[str]) -> list[int] | None:
    """The ids of the stuff classes if these are the panoptic classes of COCO, ADE20K or Cityscapes; otherwise None.

    Args:
        labels: class names in the order of their ids. Of names separated by commas, only the first is compared.
    """
    coco = load_labels("coco")
    if len(labels) == COCO_PANOPTIC and _alike(labels[: len(coco)], coco):
        return list(range(len(coco), COCO_PANOPTIC))
    if _alike(labels, load_labels("ade20k")):
        return list(ADE20K_STUFF)
    if _alike(labels, list(CITYSCAPES_CLASSES.values())):
        return list(range(CITYSCAPES_FIRST_THING))
    return None


def _alike(labels: Sequence[str], known: Sequence[str]) -> bool:
    if len(labels) != len(known):
        return False
    same = sum(_first(one) == _first(other) for one, other in zip(labels, known, strict=True))
    return same >= ALIKE * len(known)


def _first(label: str) -> str:
    return label.partition(",")[0].strip().lower().replace("_", " ")


__all__ = [
    "ADE20K_STUFF",
    "ALIASES",
    "CITYSCAPES_CLASSES",
    "CITYSCAPES_FIRST_THING",
    "DATA",
    "DATASETS",
    "FAMILY",
    "INSTANCE",
    "RESNET_BLOCKS",
    "SEMANTIC",
    "Dataset",
    "Preset",
    "find_preset",
    "label_keywords",
    "load_config",
    "load_labels",
    "published_peers",
    "stuff_of",
]
