"""Mask2Former as published (https://arxiv.org/abs/2112.01527): its architecture and its model zoo.

The zoo (github.com/facebookresearch/Mask2Former) has one row per published checkpoint. A model's name is the path of
its configuration without the parts shared by all: `coco/panoptic/maskformer2_R50_bs16_50ep` stands for
configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml. All models share one architecture.
"""

import functools
import json
from dataclasses import dataclass, field
from typing import Any

from ..errors import nearest_name
from .presets import ADE20K_STUFF, CITYSCAPES_CLASSES, CITYSCAPES_FIRST_THING, DATA, RESNET_BLOCKS, load_labels

STAGES = ["stage1", "stage2", "stage3", "stage4"]
# The published ResNet-50 is torchvision's, whose bottlenecks have the stride in the 3x3 convolution.
RESNET_50 = {
    "model_type": "resnet",
    "embedding_size": 64,
    "hidden_sizes": [256, 512, 1024, 2048],
    "depths": RESNET_BLOCKS[50],
    "layer_type": "bottleneck",
    "downsample_in_bottleneck": False,
    "out_features": STAGES,
}
# As in configs/.../maskformer2_R50_bs16_90k.yaml; the other configurations have the same values.
ARCHITECTURE: dict[str, Any] = {
    "pixel_decoder_type": "deformable",
    "feature_size": 256,
    "mask_feature_size": 256,
    "encoder_layers": 6,
    "encoder_attention_heads": 8,
    "encoder_feedforward_dim": 1024,
    "encoder_points": 4,
    "hidden_dim": 256,
    "decoder_layers": 9,
    "num_attention_heads": 8,
    "dim_feedforward": 2048,
    "pre_norm": False,
    "use_level_embedding": True,
    "enforce_input_projection": False,
    "num_queries": 100,
    "no_object_weight": 0.1,
    "class_weight": 2.0,
    "mask_weight": 5.0,
    "dice_weight": 5.0,
    "train_num_points": 12544,
    "oversample_ratio": 3.0,
    "importance_sample_ratio": 0.75,
}
# Backbones of the Mask2Formers that can be trained from scratch, by name.
MASK2FORMER: dict[str, dict[str, Any]] = {"mask2former-r50": RESNET_50}
# Shorter edge of images, in pixels, if the recipe does not specify it; as in the models published for COCO.
RESOLUTION = 800


def mask2former_values(name: str) -> dict[str, Any]:
    """Keywords of `FaiM2FConfig` except labels and post-processing, for one of the names in `MASK2FORMER`."""
    return {**ARCHITECTURE, "backbone_config": dict(MASK2FORMER[name])}


IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MAPILLARY_IGNORED = 65


def swin(width: int, depth: int, heads: int, window: int, image_size: int) -> dict[str, Any]:
    """A published Swin backbone; `depth` is that of the third stage, and each stage doubles the width."""
    return {
        "model_type": "swin",
        "embed_dim": width,
        "depths": [2, 2, depth, 2],
        "num_heads": [heads * 2**stage for stage in range(4)],
        "window_size": window,
        "drop_path_rate": 0.3,
        "image_size": image_size,
        "out_features": STAGES,
    }


BACKBONES: dict[str, dict[str, Any]] = {
    "R50": RESNET_50,
    "R101": {**RESNET_50, "depths": RESNET_BLOCKS[101]},
    "swin_tiny": swin(96, 6, 3, 7, 224),
    "swin_small": swin(96, 18, 3, 7, 224),
    "swin_base_384": swin(128, 18, 4, 12, 384),
    "swin_base_IN21k_384": swin(128, 18, 4, 12, 384),
    "swin_large_IN21k_384": swin(192, 18, 6, 12, 384),
}
# Training sets by their names in detectron2: the dataset, and the subtask of its annotations.
TRAINING_SETS = {
    "coco_2017_train": ("coco", "instance"),
    "coco_2017_train_panoptic": ("coco", "panoptic"),
    "cityscapes_fine_sem_seg_train": ("cityscapes", "semantic"),
    "cityscapes_fine_instance_seg_train": ("cityscapes", "instance"),
    "cityscapes_fine_panoptic_train": ("cityscapes", "panoptic"),
    "ade20k_sem_seg_train": ("ade20k", "semantic"),
    "ade20k_instance_train": ("ade20k", "instance"),
    "ade20k_panoptic_train": ("ade20k", "panoptic"),
    "mapillary_vistas_sem_seg_train": ("mapillary-vistas", "semantic"),
    "mapillary_vistas_panoptic_train": ("mapillary-vistas", "panoptic"),
}


# Where the zoo's checkpoints are, and the license that its MODEL_ZOO.md states for all of them.
ZOO_URL = "https://dl.fbaipublicfiles.com/maskformer/mask2former"
ZOO_LICENSE, ZOO_LICENSE_ID = "CC BY-NC 4.0", "cc-by-nc-4.0"
SHORT = "mask2former"  # first part of the short names


@dataclass(frozen=True)
class ZooModel:
    """A published checkpoint of the zoo.

    Args:
        name: such as "coco/panoptic/maskformer2_R50_bs16_50ep".
        md5: the first six digits of the MD5 of its file, which are part of the file name.
        backbone: key of BACKBONES.
        size: (shorter edge, longest edge) of images in the published evaluations, in pixels.
        num_queries: number of learned queries.
        norm: "FrozenBN" or "SyncBN", for a ResNet.
        published: metrics in percent, published by the authors for the validation images.
    """

    name: str
    md5: str
    backbone: str
    size: tuple[int, int]
    num_queries: int
    norm: str
    published: dict[str, float] = field(repr=False)

    @property
    def data(self) -> str:
        """The dataset it was trained on: "coco", "cityscapes", "ade20k" or "mapillary-vistas"."""
        return self.name.split("/")[0]

    @property
    def subtask(self) -> str:
        """The task it was trained for: "semantic", "instance" or "panoptic"."""
        return self.name.split("/")[1]

    @property
    def short(self) -> str:
        """Its name without the details of the training, such as "mask2former/coco/panoptic/swin_tiny"."""
        return f"{SHORT}/{self.data}/{self.subtask}/{self.backbone}"

    @property
    def weights_url(self) -> str:
        """The URL of the checkpoint."""
        path = self.name.replace("mapillary-vistas", "mapillary_vistas")
        return f"{ZOO_URL}/{path}/model_final_{self.md5}.pkl"

    @property
    def config(self) -> dict[str, Any]:
        """Keywords of `FaiM2FConfig` except the labels."""
        return {
            **ARCHITECTURE,
            "backbone_config": dict(BACKBONES[self.backbone]),
            "num_queries": self.num_queries,
            "ignore_value": MAPILLARY_IGNORED if self.data == "mapillary-vistas" else 255,
            "backbone_freeze_norm": self.backbone.startswith("R") and self.norm == "FrozenBN",
        }


@functools.cache
def _facts() -> dict[str, Any]:
    return json.loads((DATA / "mask2former_zoo.json").read_text(encoding="utf-8"))


@functools.cache
def zoo() -> dict[str, ZooModel]:
    """The zoo's models by name."""
    sizes = _facts()["sizes"]
    models = {}
    for name, row in _facts()["models"].items():
        data, subtask, _ = name.split("/")
        size = row.get("size") or sizes.get(f"{data}/{subtask}") or sizes[data]
        models[name] = ZooModel(
            name, row["md5"], row["backbone"], (size[0], size[1]), row.get("num_queries", 100),
            row.get("norm", "FrozenBN"), row["published"],
        )  # fmt: skip
    return models


def labels_and_stuff(data: str, subtask: str) -> tuple[list[str], list[int] | None]:
    """Class names in the order of their ids, and the ids of the stuff classes; None unless `subtask` is "panoptic".

    Args:
        data, subtask: as in `ZooModel`. For instance segmentation, only the things are classes.
    """
    if data == "coco":
        labels = load_labels("coco") + _facts()["stuff"]["coco"]
        stuff = list(range(len(load_labels("coco")), len(labels)))
    elif data == "cityscapes":
        labels, stuff = list(CITYSCAPES_CLASSES.values()), list(range(CITYSCAPES_FIRST_THING))
    elif data == "ade20k":
        labels, stuff = load_labels("ade20k"), list(ADE20K_STUFF)
    else:
        labels = list(_facts()["labels"][data])
        stuff = [index for index, label in enumerate(labels) if label in set(_facts()["stuff"][data])]
    if subtask == "instance":
        return [label for index, label in enumerate(labels) if index not in set(stuff)], None
    return labels, stuff if subtask == "panoptic" else None


def _parts(name: str) -> list[str]:
    """The parts of a configuration's name or path, without the folders that all paths share; never empty."""
    *folders, last = name.removesuffix(".yaml").replace("mapillary_vistas", "mapillary-vistas").strip("/").split("/")
    folders = [part for part in folders if part not in ("swin", "configs")]
    return [part.removesuffix("-segmentation") for part in (*folders, last)]


def zoo_models_named(name: str) -> list[ZooModel]:
    """The models with this short name, or whose name ends like this name, path or URL; usually one or none."""
    parts = _parts(name)
    if parts[0] == SHORT and len(parts) > 1:
        found = [model for model in zoo().values() if model.short.lower() == "/".join(parts).lower()]
        if found:
            return found
        parts = parts[1:]
    return [model for model in zoo().values() if model.name.split("/")[-len(parts) :] == parts]


def find_zoo_model(name: str, subtask: str | None = None) -> ZooModel:
    """Finds a model of the zoo by its name, or by the end of its name, path or URL.

    Args:
        name: such as "coco/panoptic/maskformer2_R50_bs16_50ep", "maskformer2_swin_base_384_bs16_50ep",
            "configs/coco/instance-segmentation/swin/maskformer2_swin_tiny_bs16_50ep.yaml" or
            "mask2former/coco/instance/swin_tiny".
        subtask: selects one if several models have this name.

    Raises:
        ValueError: no model matches, or several do, which the message lists.
    """
    found = zoo_models_named(name)
    named = [model for model in found if subtask in (None, model.subtask)]
    if not named:
        if found:
            raise ValueError(f"{found[0].name} was not trained for {subtask} segmentation.")
        parts = _parts(name)
        ends = {model.name.split("/")[-1] for model in zoo().values()}
        nearest = nearest_name("/".join(parts), sorted(zoo()), 0.6) or nearest_name(parts[-1], sorted(ends), 0.6)
        hint = f"; did you mean {nearest!r}?" if nearest else f", such as {next(iter(zoo()))!r}."
        raise ValueError(f"{name!r} is none of the zoo's {len(zoo())} configurations{hint}")
    if len(named) > 1:
        raise ValueError(f"{name!r} could be {', '.join(model.name for model in named)}; say which.")
    return named[0]


def zoo_model_of(md5: str) -> ZooModel | None:
    """The zoo's model whose file has this MD5 (hexadecimal); only the published first digits are compared."""
    return next((model for model in zoo().values() if md5.startswith(model.md5)), None)


__all__ = [
    "BACKBONES",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MASK2FORMER",
    "RESOLUTION",
    "STAGES",
    "TRAINING_SETS",
    "ZOO_LICENSE",
    "ZooModel",
    "find_zoo_model",
    "labels_and_stuff",
    "mask2former_values",
    "zoo",
    "zoo_model_of",
    "zoo_models_named",
]
