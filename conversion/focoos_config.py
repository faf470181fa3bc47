"""Converts Focoos's model descriptions (`model_info.json`) to this package's configuration and image processor."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.activations import ACT2FN

from hf_faim2f.download import bare_url
from hf_faim2f.errors import ConversionError, nearest_name
from hf_faim2f.family import FAMILY, find_preset, load_config, load_labels
from hf_faim2f.family.presets import RESNET_BLOCKS, label_keywords
from hf_faim2f.files import read_text
from hf_faim2f.model.channels_faim2f import RGB, spread_values
from hf_faim2f.model.configuration_faim2f import FaiM2FConfig
from hf_faim2f.model.image_processing_faim2f import FaiM2FImageProcessor

# Focoos's parameters that only have a different name here. `translate_configuration` handles the others.
RENAMED = {
    "num_queries": "num_queries",
    "pixel_decoder_feat_dim": "feature_size",
    "pixel_decoder_out_dim": "mask_feature_size",
    "pixel_decoder_transformer_layers": "encoder_layers",
    "pixel_decoder_transformer_dropout": "encoder_dropout",
    "pixel_decoder_transformer_nheads": "encoder_attention_heads",
    "pixel_decoder_transformer_dim_feedforward": "encoder_feedforward_dim",
    "transformer_predictor_hidden_dim": "hidden_dim",
    "transformer_predictor_dec_layers": "decoder_layers",
    "transformer_predictor_dim_feedforward": "dim_feedforward",
    "cls_sigmoid": "cls_sigmoid",
    "postprocessing_type": "postprocessing_type",
    "mask_threshold": "mask_threshold",
    "predict_all_pixels": "predict_all_pixels",
    "use_mask_score": "use_mask_score",
    "filter_empty_masks": "filter_empty_masks",
    "threshold": "threshold",
    "top_k": "top_k",
    "criterion_deep_supervision": "use_auxiliary_loss",
    "criterion_eos_coef": "no_object_weight",
    "criterion_num_points": "train_num_points",
    "weight_dict_loss_dice": "dice_weight",
    "weight_dict_loss_mask": "mask_weight",
    "weight_dict_loss_ce": "class_weight",
    "matcher_cost_class": "class_cost",
    "matcher_cost_mask": "mask_cost",
    "matcher_cost_dice": "dice_cost",
}
# Parameters of the image processor, not of the model.
PROCESSOR_PARAMETERS = ("resolution", "pixel_mean", "pixel_std", "size_divisibility")
# Widths that Focoos specifies twice: both must be equal, and the second name is kept.
REPEATED = {"transformer_predictor_out_dim": "pixel_decoder_out_dim"}
# Focoos's model does not read these; a note is given if the value differs from that of the published models.
UNUSED = ("head_out_dim",)
MODEL_PARAMETERS = {*RENAMED, *PROCESSOR_PARAMETERS, *REPEATED, *UNUSED, "num_classes", "backbone_config"}
# The two families, by the values of `model_family` that Focoos has written. BiSeNetFormer's pixel decoder has no
# transformer, and Focoos has no panoptic post-processing for it.
MASKFORMER = ("fai_mf", "fai_m2f", "fai-mf", "fai-m2f")
BISENETFORMER = ("bisenetformer", "fai_bf", "fai-bf")
BISENET_PARAMETERS = {name for name in MODEL_PARAMETERS if not name.startswith("pixel_decoder_transformer_")}
# Focoos's defaults that differ from this package's, for parameters that a file may omit.
DEFAULTS = {"feature_size": 256, "mask_feature_size": 256, "decoder_layers": 6, "dim_feedforward": 1024, "top_k": 300}

# Initial weights for training. The checkpoint replaces them, so only the model card mentions them.
INITIALIZATION = ("use_pretrained", "pretrained", "backbone_url")
STDC_PARAMETERS = {
    "in_chans": "num_channels",
    "base": "embedding_size",
    "layers": "depths",
    "block_num": "block_num",
    "block_type": "block_type",
    "use_conv_last": "use_conv_last",
}
RESNET_PARAMETERS = ("in_chans", "depth", "variant", "freeze_at", "num_stages", "freeze_norm", "act")
LEVELS = ["res2", "res3", "res4", "res5"]
# Largest number of layers or blocks, and of anything else, so that a description cannot make a model without end.
MOST_LAYERS, LARGEST_NUMBER = 100, 1 << 16
LAYERS = ("pixel_decoder_transformer_layers", "transformer_predictor_dec_layers", "layers", "block_num")


@dataclass
class FocoosDescription:
    """A Focoos description, converted to this package's objects.

    Args:
        name: the model's name.
        config: the model's configuration.
        processor: the image processor.
        started_from: Focoos's parameters for the initialization of the backbone before training.
        notes: sentences for the user about parameters without effect.
    """

    name: str
    config: FaiM2FConfig
    processor: FaiM2FImageProcessor
    started_from: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _check_known(values: dict[str, Any], known: "set[str] | tuple[str, ...]", where: str) -> None:
    for name in values:
        if name not in known:
            nearest = nearest_name(str(name), sorted(known), 0.5)
            hint = f" Did you mean {nearest!r}?" if nearest else ""
            raise ConversionError(f"{where} has the parameter {name!r}, which this converter does not support.{hint}")


def _check_numbers(values: dict[str, Any], where: str) -> None:
    """Rejects numbers that no model has, before anything of their size is made."""
    for name, value in values.items():
        most = MOST_LAYERS if name in LAYERS else LARGEST_NUMBER
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) > MOST_LAYERS or any(isinstance(one, int | float) and one > most for one in numbers):
            raise ConversionError(
                f"{where} has {name!r} = {str(value)[:40]}, more than the {most} that can be converted."
            )


def _without_path(value: Any) -> Any:
    """A value for the model card: a URL without secrets, and only the file's name of a path on somebody's machine."""
    if isinstance(value, str) and not value.startswith(("http://", "https://")):
        return value.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return bare_url(value) if isinstance(value, str) else bool(value)


def _backbone(values: Any, where: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Converts Focoos's `backbone_config`: returns ours, implied `FaiM2FConfig` keywords, and initialization values."""
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ConversionError(f"{where}: 'backbone_config' must be a dictionary with a 'model_type'.")
    values = dict(values)
    kind = values.pop("model_type")
    where = f"{where}, 'backbone_config' ({kind}),"
    _check_numbers(values, where)
    started_from = {name: values.pop(name) for name in INITIALIZATION if name in values}
    started_from = {name: _without_path(value) for name, value in started_from.items() if value}
    if kind == "stdc":
        _check_known(values, {*STDC_PARAMETERS, "out_features"}, where)
        if values.pop("out_features", LEVELS) != LEVELS:
            raise ConversionError(
                f"{where} has 'out_features' other than {LEVELS}; the pixel decoder needs these four."
            )
        ours = {STDC_PARAMETERS[name]: value for name, value in values.items()}
        return {"model_type": "faim2f_stdc", **ours}, {}, started_from
    if kind != "resnet":
        raise ConversionError(
            f"{where} is of a kind that cannot be converted; the published models have stdc or resnet."
        )
    _check_known(values, RESNET_PARAMETERS, where)
    if values.get("num_stages", 4) != 4:
        raise ConversionError(f"{where} has 'num_stages' = {values['num_stages']}; the pixel decoder needs 4.")
    depth, variant = values.get("depth", 50), values.get("variant", "d")
    if depth not in list(RESNET_BLOCKS):  # a list, because a value in a file need not be hashable
        raise ConversionError(f"{where} has 'depth' = {depth!r}; it can be {', '.join(map(str, RESNET_BLOCKS))}.")
    if variant not in ("a", "b", "c", "d"):
        raise ConversionError(f"{where} has 'variant' = {variant!r}; it can be a, b, c or d.")
    if values.get("act", "relu") not in list(ACT2FN):
        raise ConversionError(f"{where} has 'act' = {values['act']!r}; it must be an activation of transformers.")
    ours = {
        "num_channels": values.get("in_chans", 3),
        "depths": RESNET_BLOCKS[depth],
        "hidden_act": values.get("act", "relu"),
        "layer_type": "bottleneck" if depth >= 50 else "basic",
        "hidden_sizes": [256, 512, 1024, 2048] if depth >= 50 else [64, 128, 256, 512],
    }
    if variant == "d":
        ours["model_type"] = "rt_detr_resnet"
    else:
        ours.update(model_type="faim2f_resnet", variant=variant)
    frozen = {
        "backbone_freeze_at": values.get("freeze_at", -1),
        "backbone_freeze_norm": values.get("freeze_norm", False),
    }
    return ours, frozen, started_from


def translate_configuration(info: dict[str, Any], where: str = "the description") -> FocoosDescription:
    """Translates a Focoos description. Every parameter is either used or rejected by name.

    Args:
        info: a `model_info.json` (`name`, `classes`, `im_size`, `config`, ...), or only its `config`.
        where: name of the description for error messages.

    Raises:
        ConversionError: a parameter is unknown, contradicts another, or is not supported.
    """
    values = info.get("config", info)
    if not isinstance(values, dict) or "backbone_config" not in values:
        raise ConversionError(
            f"{where} is not a description of a Focoos model: it has no 'config' with a 'backbone_config'."
        )
    family = info.get("model_family")
    if family is not None and str(family) not in (*MASKFORMER, *BISENETFORMER):
        raise ConversionError(
            f"{where}: 'model_family' is {family!r}; this converts Focoos's fai_mf and bisenetformer models."
        )
    bisenet = str(family) in BISENETFORMER
    where = f"{where}, 'config',"
    _check_known(values, MODEL_PARAMETERS, where)
    _check_numbers(values, where)
    for name in values:
        if bisenet and name not in BISENET_PARAMETERS:
            raise ConversionError(
                f"{where} has the parameter {name!r}, which a bisenetformer does not have: it is of Focoos's fai_mf."
            )
    if bisenet and values.get("postprocessing_type") == "panoptic":
        raise ConversionError(
            f"{where} has 'postprocessing_type' = 'panoptic'; Focoos's bisenetformer is semantic or instance."
        )
    if "num_classes" not in values:
        raise ConversionError(f"{where} lacks 'num_classes'.")
    backbone, frozen, started_from = _backbone(values["backbone_config"], where)
    keywords: dict[str, Any] = {**DEFAULTS, "use_mask_score": False, "predict_all_pixels": False}
    keywords.update({RENAMED[name]: value for name, value in values.items() if name in RENAMED})
    for repeated, kept in REPEATED.items():
        if repeated in values and values[repeated] != keywords[RENAMED[kept]]:
            raise ConversionError(
                f"{where} has {repeated!r} = {values[repeated]} and {kept!r} = {keywords[RENAMED[kept]]}; "
                "mask embeddings and mask features can only be multiplied if these are equal."
            )
    if keywords["feature_size"] != keywords["mask_feature_size"]:
        raise ConversionError(
            f"{where} has 'pixel_decoder_feat_dim' = {keywords['feature_size']} and 'pixel_decoder_out_dim' = "
            f"{keywords['mask_feature_size']}; Focoos's own model only runs where these are equal."
        )
    notes = []
    for name in UNUSED:
        if name in values and values[name] != keywords["mask_feature_size"]:
            notes.append(f"{name!r} = {values[name]} has no effect in Focoos's model; left out.")
    name = str(info.get("name") or "faim2f")
    labels = _labels(info, values["num_classes"], name, where)
    try:
        config = FaiM2FConfig(
            backbone_config=backbone,
            pixel_decoder_type="bisenet" if bisenet else "fpn",
            **label_keywords(labels),
            **keywords,
            **frozen,
        )
        processor = _processor(info, values, config)
    except Exception as error:  # the values can be anything, and transformers has classes of its own
        raise ConversionError(f"{where} cannot be converted: {' '.join(str(error).split())}") from error
    return FocoosDescription(name, config, processor, started_from, notes)


def _labels(info: dict[str, Any], num_classes: Any, name: str, where: str) -> list[str]:
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
        raise ConversionError(f"{where} has 'num_classes' = {num_classes!r}; it must be a positive integer.")
    classes = info.get("classes")
    if classes is None:
        preset = FAMILY.get(name)
        if preset is not None and len(preset.labels) == num_classes:
            return load_labels(preset.dataset)
        return [f"LABEL_{index}" for index in range(num_classes)]
    if not isinstance(classes, list) or len(classes) != num_classes:
        count = len(classes) if isinstance(classes, list) else 0
        raise ConversionError(f"{where} has 'num_classes' = {num_classes}, but 'classes' names {count}.")
    return [str(label) for label in classes]


def _processor(info: dict[str, Any], values: dict[str, Any], config: FaiM2FConfig) -> FaiM2FImageProcessor:
    mean, std = values.get("pixel_mean"), values.get("pixel_std")
    overrides: dict[str, Any] = {
        "size": image_size(info.get("im_size") or values.get("resolution", 640)),
        "size_divisor": values.get("size_divisibility", 0) or None,
    }
    for name, values_of_channels in (("image_mean", mean), ("image_std", std)):
        if values_of_channels is not None:
            overrides[name] = [round(value / 255, 12) for value in values_of_channels]
            if len(overrides[name]) == RGB:  # Focoos states ImageNet's three values even for other numbers of channels
                overrides[name] = spread_values(overrides[name], config.num_channels)
    return FaiM2FImageProcessor.from_model_config(config, **overrides)


def image_size(resolution: "int | list[int]") -> dict[str, int]:
    """The image processor's `size` for a Focoos resolution: one number is the shortest edge, two are a fixed (H, W).

    The longest edge is at most four times the shortest, as in the evaluations on ADE20K (640 and 2560).
    """
    if isinstance(resolution, (list, tuple)):
        height, width = resolution
        return {"height": int(height), "width": int(width)}
    return {"shortest_edge": int(resolution), "longest_edge": 4 * int(resolution)}


def read_info(name_or_json: str) -> FocoosDescription:
    """Reads the description of a model.

    Args:
        name_or_json: the name of a published model, or the path of a `model_info.json`.

    Raises:
        ConversionError: there is no such model or file, or the file cannot be read or is not supported.
    """
    path = Path(name_or_json)
    if path.suffix != ".json" and not path.is_file():
        try:
            preset = find_preset(name_or_json)
        except ValueError as error:
            raise ConversionError(f"--info: {error} A path must end in .json.") from error
        config = load_config(preset.name)
        processor = FaiM2FImageProcessor.from_model_config(config, size=image_size(preset.resolution))
        return FocoosDescription(preset.name, config, processor)
    if path.exists() and not path.is_file():  # reading a pipe could block forever
        raise ConversionError(f"--info: {path} is not a file.")
    try:
        info = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise ConversionError(f"--info: {path} does not exist.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"--info: {path} is not readable JSON ({error}).") from error
    if not isinstance(info, dict):
        raise ConversionError(f"--info: {path} holds a {type(info).__name__} where a JSON object was expected.")
    return translate_configuration(info, f"--info: {path}")


__all__ = ["FocoosDescription", "image_size", "read_info", "translate_configuration"]
