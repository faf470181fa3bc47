"""Configurations for checkpoints of Mask2Former's own repository (detectron2), which contain only weights.

A model's task, image size and number of attention heads come from a configuration: one of the zoo's, by name, or a
detectron2 YAML. Widths, depths, window sizes, queries and classes can also be read from the weights, and the two must
agree.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_faim2f.errors import ConversionError
from hf_faim2f.family.mask2former import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    STAGES,
    TRAINING_SETS,
    ZooModel,
    find_zoo_model,
    labels_and_stuff,
    zoo,
    zoo_model_of,
)
from hf_faim2f.family.presets import RESNET_BLOCKS, label_keywords
from hf_faim2f.model.configuration_faim2f import FaiM2FConfig
from hf_faim2f.model.image_processing_faim2f import FaiM2FImageProcessor

from .detectron2_config import read_settings
from .weights import NUM_LEVELS

# These are all equivalent at inference, and differ only in training.
NORMS = ("FrozenBN", "BN", "SyncBN", "nnSyncBN", "naiveSyncBN")
# Key prefixes of the zoo's newest format.
PIXEL_DECODER, PREDICTOR = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
ENCODER_POINTS = 4  # per head and level; the original has a setting that its code does not read
# The two thresholds of the panoptic post-processing, by their names in detectron2: that argument of
# `post_process_panoptic_segmentation` and its default, and the value in all panoptic configurations of the zoo.
PANOPTIC_THRESHOLDS = {
    "OBJECT_MASK_THRESHOLD": ("threshold", 0.5, 0.8),
    "OVERLAP_THRESHOLD": ("overlap_mask_area_threshold", 0.8, 0.8),
}
# Memory grows with the fourth power of a window's side, but the number of weights only with the second.
LARGEST_WINDOW = 32


@dataclass
class CheckpointDescription:
    """Everything about a checkpoint except its weights.

    Args:
        where: name of the description for error messages.
        name: the model's name.
        subtask: "semantic", "instance" or "panoptic".
        config: keywords of `FaiM2FConfig`, without labels and post-processing.
        num_labels: number of classes.
        data: the zoo's dataset that provides the labels; None if unknown: classes are then named by their index.
        size: (shorter edge, longest edge) of images, in pixels; a shorter edge of 0 for images that are not resized.
        mean, std: mean and standard deviation of pixels in 0..255, RGB.
        notes: sentences for the user.
    """

    where: str
    name: str
    subtask: str
    config: dict[str, Any]
    num_labels: int
    data: str | None
    size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    notes: list[str] = field(default_factory=list)


def choose_description(path: Path, md5: str, config: str | None, subtask: str | None) -> CheckpointDescription:
    """The description of a checkpoint: the requested one, or that of the zoo if the file was published there.

    Args:
        path: the checkpoint, for error messages.
        md5: MD5 of the file, hexadecimal.
        config: a configuration of the zoo, or the path of a YAML; None to recognize the zoo's files by their MD5.
        subtask: selects among the zoo's configurations with the same name, or gives the task of a YAML.

    Raises:
        ConversionError: there is no description, or it contradicts what is known about the file.
    """
    known = zoo_model_of(md5)
    if config is not None and (
        Path(config).is_file() or (Path(config).suffix in (".yaml", ".yml") and not _may_be_of_zoo(config))
    ):
        return describe_yaml(Path(config), subtask)
    if config is None and known is None:
        raise ConversionError(
            f"{path} is none of the zoo's files by its MD5, so --config has to say what it is: one of the zoo's "
            f"{len(zoo())} configurations, such as {next(iter(zoo()))}, or the YAML that it was trained with."
        )
    try:
        named = find_zoo_model(config, subtask) if config is not None else known
    except ValueError as error:
        raise ConversionError(f"--config: {error}") from error
    assert named is not None
    if known is not None and known != named:
        raise ConversionError(f"{path} is the zoo's {known.name} by its MD5, and not {named.name} (--config).")
    if subtask not in (None, named.subtask):
        raise ConversionError(f"{named.name} was trained for {named.subtask} segmentation, not {subtask} (--subtask).")
    return describe_published(named)


def _may_be_of_zoo(config: str) -> bool:
    """Whether the zoo has a configuration with this name; otherwise, the name of a YAML file must be a path."""
    try:
        find_zoo_model(config)
    except ValueError as error:
        return "could be" in str(error)
    return True


def describe_published(model: ZooModel) -> CheckpointDescription:
    """The description of one of the zoo's models."""
    labels, _ = labels_and_stuff(model.data, model.subtask)
    return CheckpointDescription(
        where=f"the configuration {model.name}",
        name=f"mask2former-{model.name.replace('/', '-')}",
        subtask=model.subtask,
        config=model.config,
        num_labels=len(labels),
        data=model.data,
        size=model.size,
        notes=_notes_on_thresholds(
            model.subtask, {name: published for name, (_, _, published) in PANOPTIC_THRESHOLDS.items()}
        ),
    )


def _notes_on_thresholds(subtask: str, thresholds: dict[str, float]) -> list[str]:
    """A sentence about each threshold of the panoptic evaluation that is not this package's default.

    Args:
        subtask: "semantic", "instance" or "panoptic"; only the last has these thresholds.
        thresholds: the values in the original's configuration, by the keys of PANOPTIC_THRESHOLDS.
    """
    return [
        f"the original keeps panoptic segments by {name} = {thresholds[name]}, and this package's default is "
        f"{default}: pass {argument}={thresholds[name]} to post_process_panoptic_segmentation"
        + (f" (or --threshold {thresholds[name]} to `faim2f predict`)" if argument == "threshold" else "")
        + " to get the same segments"
        for name, (argument, default, _) in PANOPTIC_THRESHOLDS.items()
        if subtask == "panoptic" and thresholds[name] != default
    ]


def describe_yaml(path: Path, subtask: str | None = None) -> CheckpointDescription:
    """The description in a detectron2 YAML.

    Args:
        path: the YAML file.
        subtask: the task of the weights; None to infer it from the name of the training data.

    Raises:
        ConversionError: the file cannot be read, or a value is not supported.
    """
    settings = read_settings(path)
    head, former = "MODEL.SEM_SEG_HEAD.", "MODEL.MASK_FORMER."
    weights = {name: settings[f"{former}{name.upper()}"] for name in ("class_weight", "mask_weight", "dice_weight")}
    config = {
        "pixel_decoder_type": "deformable",
        "backbone_config": _backbone_of(settings, str(path)),
        "feature_size": settings[f"{head}CONVS_DIM"],
        "mask_feature_size": settings[f"{head}MASK_DIM"],
        "encoder_layers": settings[f"{head}TRANSFORMER_ENC_LAYERS"],
        "encoder_attention_heads": settings[f"{former}NHEADS"],
        "encoder_dropout": settings[f"{former}DROPOUT"],
        "encoder_points": ENCODER_POINTS,
        "hidden_dim": settings[f"{former}HIDDEN_DIM"],
        "decoder_layers": settings[f"{former}DEC_LAYERS"]
        - 1,  # the original also counts the prediction from the learned queries
        "num_attention_heads": settings[f"{former}NHEADS"],
        "dim_feedforward": settings[f"{former}DIM_FEEDFORWARD"],
        "pre_norm": settings[f"{former}PRE_NORM"],
        "use_level_embedding": True,
        "enforce_input_projection": settings[f"{former}ENFORCE_INPUT_PROJ"],
        "num_queries": settings[f"{former}NUM_OBJECT_QUERIES"],
        "no_object_weight": settings[f"{former}NO_OBJECT_WEIGHT"],
        **weights,
        **{name.replace("weight", "cost"): value for name, value in weights.items()},
        "train_num_points": settings[f"{former}TRAIN_NUM_POINTS"],
        "oversample_ratio": settings[f"{former}OVERSAMPLE_RATIO"],
        "importance_sample_ratio": settings[f"{former}IMPORTANCE_SAMPLE_RATIO"],
        "use_auxiliary_loss": settings[f"{former}DEEP_SUPERVISION"],
        "top_k": settings["TEST.DETECTIONS_PER_IMAGE"],
        "ignore_value": settings[f"{head}IGNORE_VALUE"],
    }
    if settings["MODEL.BACKBONE.NAME"] == "build_resnet_backbone":
        config["backbone_freeze_norm"] = settings["MODEL.RESNETS.NORM"] == "FrozenBN"
        config["backbone_freeze_at"] = settings["MODEL.BACKBONE.FREEZE_AT"] - 1  # detectron2 counts the stem as stage 1
    datasets: list[str] = list(settings["DATASETS.TRAIN"])
    trained_on = next(iter(datasets), "")
    data, inferred = TRAINING_SETS.get(trained_on, (None, _subtask_of(trained_on, settings)))
    if data is not None and subtask not in (None, inferred):
        raise ConversionError(f"{path} is for {inferred} segmentation (DATASETS.TRAIN), which --subtask contradicts.")
    subtask = subtask or inferred
    count = settings[f"{head}NUM_CLASSES"]
    notes = []
    if data is not None and len(labels_and_stuff(data, subtask)[0]) != count:
        data = None
    if data is None:
        notes.append(
            f"the names of the {count} classes of {trained_on or 'the training data'} are not known: they get numbers"
            + (", and none of them counts as stuff" if subtask == "panoptic" else "")
        )
    if len(datasets) > 1:
        notes.append(
            f"DATASETS.TRAIN names {len(datasets)} datasets: the classes are taken to be those of {trained_on}"
        )
    notes += _notes_on_thresholds(subtask, {name: settings[f"{former}TEST.{name}"] for name in PANOPTIC_THRESHOLDS})
    size = (settings["INPUT.MIN_SIZE_TEST"], settings["INPUT.MAX_SIZE_TEST"])
    return CheckpointDescription(
        where=str(path),
        name=path.stem,
        subtask=subtask,
        config=config,
        num_labels=count,
        data=data,
        size=size,
        mean=tuple(settings["MODEL.PIXEL_MEAN"]),
        std=tuple(settings["MODEL.PIXEL_STD"]),
        notes=notes,
    )


def _subtask_of(trained_on: str, settings: dict[str, Any]) -> str:
    """The subtask for unknown data: from the data's name, or else from the enabled evaluations.

    A panoptic model supports all three evaluations, so the most specific one decides.
    """
    for word, subtask in (("panoptic", "panoptic"), ("instance", "instance"), ("sem_seg", "semantic")):
        if word in trained_on:
            return subtask
    for subtask in ("panoptic", "instance"):
        if settings[f"MODEL.MASK_FORMER.TEST.{subtask.upper()}_ON"]:
            return subtask
    return "semantic"


def _backbone_of(settings: dict[str, Any], where: str) -> dict[str, Any]:
    kind = settings["MODEL.BACKBONE.NAME"]
    if kind == "D2SwinTransformer":
        swin = {key.removeprefix("MODEL.SWIN."): value for key, value in settings.items() if "SWIN" in key}
        if len(swin["DEPTHS"]) != 4 or len(swin["NUM_HEADS"]) != 4:
            raise ConversionError(f"{where}: MODEL.SWIN must have four DEPTHS and four NUM_HEADS.")
        return {
            "model_type": "swin",
            "image_size": swin["PRETRAIN_IMG_SIZE"],
            "embed_dim": swin["EMBED_DIM"],
            "depths": swin["DEPTHS"],
            "num_heads": swin["NUM_HEADS"],
            "window_size": swin["WINDOW_SIZE"],
            "mlp_ratio": swin["MLP_RATIO"],
            "hidden_dropout_prob": swin["DROP_RATE"],
            "attention_probs_dropout_prob": swin["ATTN_DROP_RATE"],
            "drop_path_rate": swin["DROP_PATH_RATE"],
            "out_features": STAGES,
        }
    if kind != "build_resnet_backbone":
        raise ConversionError(
            f"{where}: MODEL.BACKBONE.NAME is {kind!r}, and only D2SwinTransformer and build_resnet_backbone can be "
            "converted."
        )
    resnet = {key.removeprefix("MODEL.RESNETS."): value for key, value in settings.items() if "RESNETS" in key}
    depth, width = resnet["DEPTH"], resnet["RES2_OUT_CHANNELS"]
    if depth not in RESNET_BLOCKS:
        raise ConversionError(f"{where}: MODEL.RESNETS.DEPTH is {depth}; there are {list(RESNET_BLOCKS)}.")
    if resnet["NORM"] not in NORMS:
        raise ConversionError(f"{where}: MODEL.RESNETS.NORM is {resnet['NORM']!r}, and only batch norms are converted.")
    if depth >= 50 and width != 4 * resnet["WIDTH_PER_GROUP"]:
        raise ConversionError(
            f"{where}: MODEL.RESNETS.RES2_OUT_CHANNELS is {width}, and only 4 * WIDTH_PER_GROUP = "
            f"{4 * resnet['WIDTH_PER_GROUP']} can be converted."
        )
    return {
        "model_type": "resnet",
        "embedding_size": resnet["STEM_OUT_CHANNELS"],
        "hidden_sizes": [width * 2**stage for stage in range(4)],
        "depths": RESNET_BLOCKS[depth],
        "layer_type": "bottleneck" if depth >= 50 else "basic",
        "downsample_in_bottleneck": resnet["STRIDE_IN_1X1"],
        "out_features": STAGES,
    }


def architecture_of(state: dict[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """The values determined by the shapes of the weights, by the keywords of `FaiM2FConfig` and of the backbone.

    Raises:
        ConversionError: these are not weights of Mask2Former with a ResNet or Swin backbone.
    """

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        if key not in state or state[key].ndim != dimensions:
            raise ConversionError(
                f"{path} has no weight {key!r} of {dimensions} dimensions: these are not weights of Mask2Former with "
                "deformable attention and a ResNet or Swin backbone."
            )
        return tuple(state[key].shape)

    queries, hidden = shape(f"{PREDICTOR}query_feat.weight", 2)
    encoder, decoder = f"{PIXEL_DECODER}transformer.encoder.layers.", f"{PREDICTOR}transformer_ffn_layers."
    found: dict[str, Any] = {
        "num_queries": queries,
        "hidden_dim": hidden,
        "num_labels": shape(f"{PREDICTOR}class_embed.weight", 2)[0] - 1,
        "decoder_layers": _count(state, decoder),
        "dim_feedforward": shape(f"{decoder}0.linear1.weight", 2)[0],
        "feature_size": shape(f"{PIXEL_DECODER}transformer.level_embed", 2)[1],
        "mask_feature_size": shape(f"{PIXEL_DECODER}mask_features.weight", 4)[0],
        "encoder_layers": _count(state, encoder),
        "encoder_feedforward_dim": shape(f"{encoder}0.linear1.weight", 2)[0],
        # Heads times points: the weights determine only the product.
        "encoder samples": shape(f"{encoder}0.self_attn.attention_weights.weight", 2)[0] // NUM_LEVELS,
    }
    if "backbone.patch_embed.proj.weight" in state:
        width = shape("backbone.patch_embed.proj.weight", 4)[0]
        tables = [shape(f"backbone.layers.{stage}.blocks.0.attn.relative_position_bias_table", 2) for stage in range(4)]
        backbone = {
            "model_type": "swin",
            "embed_dim": width,
            "depths": [_count(state, f"backbone.layers.{stage}.blocks.") for stage in range(4)],
            "num_heads": [heads for _, heads in tables],
            "window_size": (round(tables[0][0] ** 0.5) + 1) // 2,  # a table has (2 * window - 1) ** 2 rows
        }
        if backbone["window_size"] > LARGEST_WINDOW:
            raise ConversionError(
                f"{path} has windows of {backbone['window_size']} pixels; more than {LARGEST_WINDOW} are not converted."
            )
    else:
        bottleneck = "backbone.res2.0.conv3.weight" in state
        last = 3 if bottleneck else 2
        backbone = {
            "model_type": "resnet",
            "embedding_size": shape("backbone.stem.conv1.weight", 4)[0],
            "hidden_sizes": [shape(f"backbone.res{stage}.0.conv{last}.weight", 4)[0] for stage in range(2, 6)],
            "depths": [_count(state, f"backbone.res{stage}.") for stage in range(2, 6)],
            "layer_type": "bottleneck" if bottleneck else "basic",
        }
    return {**found, "backbone_config": backbone}


def _count(state: dict[str, torch.Tensor], prefix: str) -> int:
    """The number of different indices that follow a prefix in the keys."""
    return len({match[1] for key in state if (match := re.match(re.escape(prefix) + r"(\d{1,6})\.", key))})


def check_architecture(found: dict[str, Any], described: CheckpointDescription, path: Path) -> None:
    """Checks that the weights match the description.

    Args:
        found: the result of `architecture_of`.
        described: the description.
        path: the checkpoint, for error messages.

    Raises:
        ConversionError: they differ; the message names the first value.
    """
    stated = {**described.config, "num_labels": described.num_labels}
    stated["encoder samples"] = stated["encoder_attention_heads"] * stated["encoder_points"]
    stated.setdefault("encoder_feedforward_dim", 1024)
    backbone = stated.pop("backbone_config")
    pairs = [("backbone", found["backbone_config"]["model_type"], backbone["model_type"])]
    if found["backbone_config"]["model_type"] == backbone["model_type"]:
        pairs += [
            (f"backbone's {name}", value, backbone.get(name))
            for name, value in found["backbone_config"].items()
            if name in backbone
        ]
    pairs += [(name, value, stated[name]) for name, value in found.items() if name != "backbone_config"]
    for name, actual, expected in pairs:
        if actual != expected:
            raise ConversionError(
                f"{path} does not belong to {described.where}: by its weights the {name} is {actual}, there it is "
                f"{expected}; name its own configuration by --config."
            )


def model_configuration(described: CheckpointDescription) -> FaiM2FConfig:
    """The model's configuration, with labels, stuff classes and post-processing.

    Raises:
        ConversionError: a value is invalid.
    """
    labels, stuff = [str(index) for index in range(described.num_labels)], None
    if described.data is not None:
        labels, stuff = labels_and_stuff(described.data, described.subtask)
    try:
        return FaiM2FConfig(
            **{**described.config, "backbone_config": dict(described.config["backbone_config"])},
            init_std=1.0,
            postprocessing_type=described.subtask,
            use_mask_score=True,
            predict_all_pixels=False,
            label_ids_to_fuse=stuff,
            **label_keywords(labels),
        )
    except (ValueError, TypeError) as error:
        raise ConversionError(f"{described.where} cannot be converted ({error}).") from error


def image_processor(described: CheckpointDescription, config: FaiM2FConfig) -> FaiM2FImageProcessor:
    """The image processor that prepares images as in the original's evaluation.

    The original also pads to multiples of 32, which this model does not need.

    Raises:
        ConversionError: a value is invalid.
    """
    shortest, longest = described.size
    resizing: dict[str, Any] = {"size": {"shortest_edge": shortest, "longest_edge": longest}}
    try:
        return FaiM2FImageProcessor.from_model_config(
            config,
            **(resizing if shortest != 0 else {"do_resize": False}),
            image_mean=[value / 255 for value in described.mean],
            image_std=[value / 255 for value in described.std],
        )
    except (ValueError, TypeError) as error:
        raise ConversionError(f"{described.where} cannot be converted ({error}).") from error


__all__ = [
    "PANOPTIC_THRESHOLDS",
    "PIXEL_DECODER",
    "PREDICTOR",
    "CheckpointDescription",
    "architecture_of",
    "check_architecture",
    "choose_description",
    "describe_published",
    "describe_yaml",
    "image_processor",
    "model_configuration",
]
