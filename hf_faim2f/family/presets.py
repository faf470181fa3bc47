"""The family: one row a published model. Configurations, cards, tests and benchmarks read their facts here."""

import difflib
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..model.configuration_faim2f import FaiM2FConfig

DATA = Path(__file__).parent / "data"
WEIGHTS_URL = "https://public.focoos.ai/pretrained_models/{name}/model_final.pth"

STDC_1 = {"model_type": "faim2f_stdc", "depths": [2, 2, 2]}
STDC_2 = {"model_type": "faim2f_stdc", "depths": [4, 5, 3]}
RESNET_50 = {"model_type": "rt_detr_resnet", "depths": [3, 4, 6, 3]}
RESNET_101 = {"model_type": "rt_detr_resnet", "depths": [3, 4, 23, 3]}

SEMANTIC = {"postprocessing_type": "semantic", "predict_all_pixels": True, "use_mask_score": False}
INSTANCE = {"postprocessing_type": "instance", "predict_all_pixels": False, "use_mask_score": True}
COCO_DECODER = {"encoder_layers": 3, "decoder_layers": 6, "dim_feedforward": 1024}


@dataclass(frozen=True)
class Preset:
    """A published model: what it was trained for, and where it differs from the configuration's defaults.

    Args:
        name: Focoos's name, which is also the name of its weights.
        dataset: key of the labels, "ade20k" or "coco".
        resolution: shortest edge, in pixels, of the published evaluations.
        config: keywords of `FaiM2FConfig` besides the labels.
        summary: a few words on the architecture, for the card and the README.
    """

    name: str
    dataset: str
    resolution: int
    summary: str
    config: dict[str, Any] = field(repr=False)

    @property
    def labels(self) -> list[str]:
        """Class names in the order of their ids."""
        return load_labels(self.dataset)

    @property
    def weights_url(self) -> str:
        """Where Focoos publishes the checkpoint."""
        return WEIGHTS_URL.format(name=self.name)

    @property
    def published(self) -> dict[str, Any]:
        """The metrics and frame rate of the model card, and per class where they were published."""
        return _published()["members"][self.name]["published"]

    @property
    def re_evaluated(self) -> dict[str, float]:
        """The maintainers' later evaluation, per class too; empty if there was none."""
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
        Preset("fai-mf-s-coco-ins", "coco", 1024, "ResNet-50 d, 3 encoder and 6 decoder layers",
               {**INSTANCE, **COCO_DECODER, "backbone_config": RESNET_50}),
        Preset("fai-mf-m-coco-ins", "coco", 1024, "ResNet-101 d, 3 encoder and 6 decoder layers",
               {**INSTANCE, **COCO_DECODER, "backbone_config": RESNET_101}),
        Preset("fai-mf-l-coco-ins", "coco", 1024, "ResNet-101 d, 6 encoder and 9 decoder layers, 256 wide",
               {**INSTANCE, "backbone_config": RESNET_101, "encoder_layers": 6, "decoder_layers": 9,
                "feature_size": 256, "mask_feature_size": 256, "dim_feedforward": 2048}),
    )
}  # fmt: skip
# The ADE20K models were first published under these names.
ALIASES = {"fai-m2f-m-ade": "fai-mf-m-ade", "fai-m2f-l-ade": "fai-mf-l-ade"}


@functools.cache
def _published() -> dict[str, Any]:
    return json.loads((DATA / "published.json").read_text(encoding="utf-8"))


def published_peers() -> dict[str, Any]:
    """What other models reached in the same published figures: mIoU on ADE20K and frames per second on a T4."""
    return _published()["peers"]


@functools.cache
def _labels() -> dict[str, list[str]]:
    return json.loads((DATA / "labels.json").read_text(encoding="utf-8"))


def load_labels(dataset: str) -> list[str]:
    """Class names of "ade20k" (150) or "coco" (80), in the order of their ids."""
    if dataset not in _labels():
        raise ValueError(f"No labels of {dataset!r} here; there are those of {', '.join(_labels())}.")
    return list(_labels()[dataset])


def find_preset(name: str) -> Preset:
    """The row of a published model.

    Raises:
        ValueError: no model of that name; the message lists the known ones and the nearest.
    """
    known = [*FAMILY, *ALIASES]
    if name not in known:
        nearest = difflib.get_close_matches(name, known, 1, 0.4)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"No published model is called {name!r}. Known: {', '.join(FAMILY)}.{hint}")
    return FAMILY[ALIASES.get(name, name)]


def load_config(name: str, **overrides: Any) -> FaiM2FConfig:
    """The configuration of a published model, with its labels: `load_config("fai-mf-m-ade")`.

    Args:
        name: one of the family's names.
        overrides: keywords of `FaiM2FConfig` that shall differ; `num_labels` or `id2label` replace the labels.
    """
    preset = find_preset(name)
    values: dict[str, Any] = {**preset.config, "backbone_config": dict(preset.config["backbone_config"])}
    if "num_labels" not in overrides and "id2label" not in overrides:
        values["id2label"] = dict(enumerate(preset.labels))
        values["label2id"] = {label: index for index, label in enumerate(preset.labels)}
    return FaiM2FConfig(**{**values, **overrides})
