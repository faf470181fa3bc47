"""Focoos's models: their configuration and their state dict in our names, and the folder that comes of both."""

import difflib
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_faim2f.errors import ConversionError
from hf_faim2f.family import FAMILY, find_preset, load_labels
from hf_faim2f.files import check_new_folder, new_folder, read_text
from hf_faim2f.hub.card import Provenance, model_card
from hf_faim2f.model.configuration_faim2f import FaiM2FConfig
from hf_faim2f.model.image_processing_faim2f import FaiM2FImageProcessor
from hf_faim2f.model.modeling_faim2f import FaiM2FForUniversalSegmentation

from .checkpoint import read_state_dict

# Focoos's parameter: ours. What is not a renaming is below, in `translate_configuration`.
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
# Read by the image processor, not by the model.
OF_THE_PROCESSOR = ("resolution", "pixel_mean", "pixel_std", "size_divisibility")
# Widths that Focoos repeats: they must agree with the one we keep.
REPEATED = {"transformer_predictor_out_dim": "pixel_decoder_out_dim"}
# Nothing in Focoos's model reads these; a value other than that of the models' is told to the user.
WITHOUT_EFFECT = ("head_out_dim",)
OF_THE_MODEL = {*RENAMED, *OF_THE_PROCESSOR, *REPEATED, *WITHOUT_EFFECT, "num_classes", "backbone_config"}
# Focoos's defaults where they differ from ours and a file may leave them out.
DEFAULTS = {"feature_size": 256, "mask_feature_size": 256, "decoder_layers": 6, "dim_feedforward": 1024, "top_k": 300}

# Where training started from; the checkpoint replaces those weights, so they are told in the card alone.
OF_THE_START = ("use_pretrained", "pretrained", "backbone_url")
OF_STDC = {
    "in_chans": "num_channels",
    "base": "embedding_size",
    "layers": "depths",
    "block_num": "block_num",
    "block_type": "block_type",
    "use_conv_last": "use_conv_last",
}
OF_RESNET = ("in_chans", "depth", "variant", "freeze_at", "num_stages", "freeze_norm", "act")
RESNET_DEPTHS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
LEVELS = ["res2", "res3", "res4", "res5"]


@dataclass
class FocoosModel:
    """A Focoos model's description in our words.

    Args:
        name: what it is called.
        config: the model's configuration.
        processor: the image processor.
        started_from: what its backbone was initialized with before training, as Focoos's configuration tells it.
        notes: sentences for the user: what of the description has no effect.
    """

    name: str
    config: FaiM2FConfig
    processor: FaiM2FImageProcessor
    started_from: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _refuse_unknown(values: dict[str, Any], known: "set[str] | tuple[str, ...]", where: str) -> None:
    for name in values:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), sorted(known), 1, 0.5)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ConversionError(f"{where} has the parameter {name!r}, which this converter cannot honour.{hint}")


def _backbone(values: Any, where: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Focoos's `backbone_config` as ours, the model's keywords that it carries, and where its training started."""
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ConversionError(f"{where}: 'backbone_config' must be a dictionary with a 'model_type'.")
    values = dict(values)
    kind = values.pop("model_type")
    where = f"{where}, 'backbone_config' ({kind}),"
    started_from = {name: values.pop(name) for name in OF_THE_START if name in values}
    started_from = {name: value for name, value in started_from.items() if value}
    if kind == "stdc":
        _refuse_unknown(values, {*OF_STDC, "out_features"}, where)
        if values.pop("out_features", LEVELS) != LEVELS:
            raise ConversionError(
                f"{where} has 'out_features' other than {LEVELS}; the pixel decoder needs these four."
            )
        ours = {OF_STDC[name]: value for name, value in values.items()}
        return {"model_type": "faim2f_stdc", **ours}, {}, started_from
    if kind != "resnet":
        raise ConversionError(
            f"{where} is of a kind that cannot be converted; the published models have stdc or resnet."
        )
    _refuse_unknown(values, OF_RESNET, where)
    if values.get("num_stages", 4) != 4:
        raise ConversionError(f"{where} has 'num_stages' = {values['num_stages']}; the pixel decoder needs 4.")
    depth, variant = values.get("depth", 50), values.get("variant", "d")
    if depth not in RESNET_DEPTHS:
        raise ConversionError(f"{where} has 'depth' = {depth!r}; it can be {', '.join(map(str, RESNET_DEPTHS))}.")
    if variant not in ("a", "b", "c", "d"):
        raise ConversionError(f"{where} has 'variant' = {variant!r}; it can be a, b, c or d.")
    ours = {
        "num_channels": values.get("in_chans", 3),
        "depths": RESNET_DEPTHS[depth],
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


def translate_configuration(info: dict[str, Any], where: str = "the description") -> FocoosModel:
    """Focoos's description of a model in our words; every one of its parameters has its place or is refused by name.

    Args:
        info: a `model_info.json` (`name`, `classes`, `im_size`, `config`, ...), or its `config` alone.
        where: what to call it in errors.

    Raises:
        ConversionError: a parameter that is unknown, that contradicts another, or that cannot be honoured.
    """
    values = info.get("config", info)
    if not isinstance(values, dict) or "backbone_config" not in values:
        raise ConversionError(
            f"{where} is no description of a Focoos model: it has no 'config' with a 'backbone_config'."
        )
    family = info.get("model_family")
    if family is not None and str(family) not in ("fai_mf", "fai_m2f", "fai-mf", "fai-m2f"):
        raise ConversionError(f"{where}: 'model_family' is {family!r}; this converts Focoos's fai_mf models.")
    where = f"{where}, 'config',"
    _refuse_unknown(values, OF_THE_MODEL, where)
    if "num_classes" not in values:
        raise ConversionError(f"{where} lacks 'num_classes'.")
    backbone, frozen, started_from = _backbone(values["backbone_config"], where)
    keywords: dict[str, Any] = {**DEFAULTS, "use_mask_score": False, "predict_all_pixels": False}
    keywords.update({RENAMED[name]: value for name, value in values.items() if name in RENAMED})
    for repeated, kept in REPEATED.items():
        if values.get(repeated, keywords[RENAMED[kept]]) != keywords[RENAMED[kept]]:
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
    for name in WITHOUT_EFFECT:
        if name in values and values[name] != keywords["mask_feature_size"]:
            notes.append(f"{name!r} = {values[name]} has no effect in Focoos's model; left out.")
    name = str(info.get("name") or "faim2f")
    labels = _labels(info, values["num_classes"], name, where)
    try:
        config = FaiM2FConfig(
            backbone_config=backbone,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            **keywords,
            **frozen,
        )
        processor = _processor(info, values, config)
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{where} cannot be honoured: {error}") from error
    return FocoosModel(name, config, processor, started_from, notes)


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
    if mean is not None:
        overrides["image_mean"] = [round(value / 255, 12) for value in mean]
    if std is not None:
        overrides["image_std"] = [round(value / 255, 12) for value in std]
    return FaiM2FImageProcessor.from_model_config(config, **overrides)


def image_size(resolution: "int | list[int]") -> dict[str, int]:
    """The processor's `size` for one of Focoos's resolutions: one number is the shortest edge, two are fixed (H, W).

    The cap of the longest edge is four times the shortest, as in the evaluations on ADE20K (640 and 2560).
    """
    if isinstance(resolution, (list, tuple)):
        height, width = resolution
        return {"height": int(height), "width": int(width)}
    return {"shortest_edge": int(resolution), "longest_edge": 4 * int(resolution)}


def read_info(name_or_json: str) -> FocoosModel:
    """The description of a model: a published name, or the path of a `model_info.json`.

    Raises:
        ConversionError: neither; or the file cannot be read or understood.
    """
    path = Path(name_or_json)
    if path.suffix != ".json" and not path.is_file():
        try:
            preset = find_preset(name_or_json)
        except ValueError as error:
            raise ConversionError(f"--info: {error} A path must end in .json.") from error
        config = FaiM2FConfig(
            **{**preset.config, "backbone_config": dict(preset.config["backbone_config"])},
            id2label=dict(enumerate(preset.labels)),
            label2id={label: index for index, label in enumerate(preset.labels)},
        )
        processor = FaiM2FImageProcessor.from_model_config(config, size=image_size(preset.resolution))
        return FocoosModel(preset.name, config, processor)
    if path.exists() and not path.is_file():  # a pipe would be waited for, perhaps for ever
        raise ConversionError(f"--info: {path} is no file.")
    try:
        info = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise ConversionError(f"--info: {path} does not exist.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"--info: {path} is no readable JSON ({error}).") from error
    if not isinstance(info, dict):
        raise ConversionError(f"--info: {path} holds a {type(info).__name__} where a JSON object was expected.")
    return translate_configuration(info, f"--info: {path}")


@dataclass(frozen=True)
class Source:
    """Where one of our tensors comes from: a Focoos key, and which third of it (query, key, value) if it is packed."""

    key: str
    third: int | None = None


# Ours on the left as a regular expression, Focoos's on the right. The first that matches a whole key counts.
KEY_RULES = [
    (r"backbone\.stem\.(convolution|normalization)\.(.+)", r"pixel_decoder.backbone.features.0.<\1>.\2"),
    (r"backbone\.stages\.0\.(convolution|normalization)\.(.+)", r"pixel_decoder.backbone.features.1.<\1>.\2"),
    (r"backbone\.last_convolution\.(convolution|normalization)\.(.+)", r"pixel_decoder.backbone.conv_last.<\1>.\2"),
    (r"pixel_decoder\.input_projection\.(.+)", r"pixel_decoder.input_proj.\1"),
    (r"pixel_decoder\.encoder_norm\.(.+)", r"pixel_decoder.transformer.encoder.norm.\1"),
    (r"pixel_decoder\.encoder_layers\.(\d+)\.self_attention\.(.+)",
     r"pixel_decoder.transformer.encoder.layers.\1.self_attn.\2"),
    (r"pixel_decoder\.encoder_layers\.(\d+)\.self_attention_norm\.(.+)",
     r"pixel_decoder.transformer.encoder.layers.\1.norm1.\2"),
    (r"pixel_decoder\.encoder_layers\.(\d+)\.feed_forward_norm\.(.+)",
     r"pixel_decoder.transformer.encoder.layers.\1.norm2.\2"),
    (r"pixel_decoder\.encoder_layers\.(\d+)\.(linear[12]\..+)", r"pixel_decoder.transformer.encoder.layers.\1.\2"),
    (r"pixel_decoder\.mask_projection\.(.+)", r"pixel_decoder.mask_features.\1"),
    (r"transformer_decoder\.query_features\.weight", r"head.predictor.query_feat.weight"),
    (r"transformer_decoder\.query_position\.weight", r"head.predictor.query_embed.weight"),
    (r"transformer_decoder\.input_projections\.(.+)", r"head.predictor.input_proj.\1"),
    (r"transformer_decoder\.norm\.(.+)", r"head.predictor.forward_prediction_heads.decoder_norm.\1"),
    (r"transformer_decoder\.class_predictor\.(.+)", r"head.predictor.forward_prediction_heads.classifier.\1"),
    (r"transformer_decoder\.mask_embedder\.(.+)", r"head.predictor.forward_prediction_heads.mask_classifier.\1"),
    (r"transformer_decoder\.layers\.(\d+)\.cross_attention\.(.+)",
     r"head.predictor.transformer_cross_attention_layers.\1.multihead_attn.\2"),
    (r"transformer_decoder\.layers\.(\d+)\.cross_attention_norm\.(.+)",
     r"head.predictor.transformer_cross_attention_layers.\1.norm.\2"),
    (r"transformer_decoder\.layers\.(\d+)\.self_attention\.(.+)",
     r"head.predictor.transformer_self_attention_layers.\1.self_attn.\2"),
    (r"transformer_decoder\.layers\.(\d+)\.self_attention_norm\.(.+)",
     r"head.predictor.transformer_self_attention_layers.\1.norm.\2"),
    (r"transformer_decoder\.layers\.(\d+)\.feed_forward_norm\.(.+)",
     r"head.predictor.transformer_ffn_layers.\1.norm.\2"),
    (r"transformer_decoder\.layers\.(\d+)\.(linear[12]\..+)", r"head.predictor.transformer_ffn_layers.\1.\2"),
]  # fmt: skip
# A buffer of Focoos's loss, built from the configuration; ours is too.
OF_THE_LOSS = "head.criterion.empty_weight"
THIRDS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


def _stdc_key(key: str, depths: list[int]) -> str | None:
    """Focoos counts the blocks of all stages in one list, after the two strided convolutions."""
    match = re.fullmatch(r"backbone\.stages\.([123])\.(\d+)\.(.+)", key)
    if match is None:
        return None
    stage, block, rest = int(match[1]), int(match[2]), match[3]
    prefix = f"pixel_decoder.backbone.features.{2 + sum(depths[: stage - 1]) + block}."
    for ours, theirs in (
        (r"convolutions\.(\d+)\.convolution\.(.+)", r"conv_list.\1.conv.\2"),
        (r"convolutions\.(\d+)\.normalization\.(.+)", r"conv_list.\1.bn.\2"),
        (r"downsample\.convolution\.(.+)", r"avd_layer.0.\1"),
        (r"downsample\.normalization\.(.+)", r"avd_layer.1.\1"),
        (r"projection\.downsample\.convolution\.(.+)", r"skip.0.\1"),
        (r"projection\.downsample\.normalization\.(.+)", r"skip.1.\1"),
        (r"projection\.convolution\.(.+)", r"skip.2.\1"),
        (r"projection\.normalization\.(.+)", r"skip.3.\1"),
    ):
        if re.fullmatch(ours, rest):
            return prefix + re.sub(ours, theirs, rest)
    return None


def _resnet_key(key: str) -> str | None:
    """RT-DETR's ResNet in transformers' names to the original's, which Focoos kept."""
    norm = {"convolution": "conv", "normalization": "norm"}
    match = re.fullmatch(r"backbone\.embedder\.embedder\.(\d+)\.(convolution|normalization)\.(.+)", key)
    if match:
        return f"pixel_decoder.backbone.conv1.conv1_{int(match[1]) + 1}.{norm[match[2]]}.{match[3]}"
    match = re.fullmatch(r"backbone\.encoder\.stages\.(\d+)\.layers\.(\d+)\.(.+)", key)
    if match is None:
        return None
    prefix, rest = f"pixel_decoder.backbone.res_layers.{match[1]}.blocks.{match[2]}.", match[3]
    match = re.fullmatch(r"layer\.(\d)\.(convolution|normalization)\.(.+)", rest)
    if match:
        return f"{prefix}branch2{'abc'[int(match[1])]}.{norm[match[2]]}.{match[3]}"
    match = re.fullmatch(r"shortcut\.(1\.)?(convolution|normalization)\.(.+)", rest)
    if match:  # behind a pooling the projection is one level deeper
        return f"{prefix}short.{'conv.' if match[1] else ''}{norm[match[2]]}.{match[3]}"
    return None


def focoos_source(key: str, config: FaiM2FConfig) -> Source:
    """Where our tensor `key` is in a Focoos state dict."""
    backbone = config.backbone_config
    found = None
    if key.startswith("backbone."):
        found = _stdc_key(key, backbone.depths) if backbone.model_type == "faim2f_stdc" else _resnet_key(key)
    match = re.fullmatch(r"pixel_decoder\.(lateral|output)_convolutions\.(\d+)\.(convolution|normalization)\.(.+)", key)
    if match:  # ours run coarse to fine, and the coarsest level has no lateral; Focoos numbers the levels from fine
        level = 4 - int(match[2]) - (match[1] == "lateral")
        name = f"{'adapter' if match[1] == 'lateral' else 'layer'}_{level}"
        found = f"pixel_decoder.{name}.{'' if match[3] == 'convolution' else 'norm.'}{match[4]}"
    for ours, theirs in KEY_RULES if found is None else []:
        if re.fullmatch(ours, key):
            found = re.sub(ours, theirs, key).replace("<convolution>", "conv").replace("<normalization>", "bn")
            break
    if found is None:
        raise KeyError(key)
    for projection, third in THIRDS.items():
        if f".{projection}." in found:
            return Source(found.replace(f".{projection}.", ".in_proj_"), third)
    return Source(found)


def expected_shapes(model: torch.nn.Module, config: FaiM2FConfig) -> dict[str, tuple[int, ...]]:
    """Every key and shape that a Focoos state dict of this configuration has."""
    shapes: dict[str, tuple[int, ...]] = {OF_THE_LOSS: (config.num_labels + 1,)}
    for key, tensor in model.state_dict().items():
        source = focoos_source(key, config)
        shape = tuple(tensor.shape)
        shapes[source.key] = shape if source.third is None else (3 * shape[0], *shape[1:])
    return shapes


def _optional(key: str) -> bool:
    # A frozen batch norm has no counter; the loss's buffer is absent where Focoos saved the bare network.
    return key == OF_THE_LOSS or key.endswith("num_batches_tracked")


def convert_state_dict(
    state: dict[str, torch.Tensor], config: FaiM2FConfig, where: str = "the checkpoint"
) -> dict[str, torch.Tensor]:
    """A Focoos state dict in our names.

    Args:
        state: tensors by Focoos's keys, in any floating type; float32 comes out.
        config: what they must fit, key by key and shape by shape.
        where: what to call it in errors.

    Raises:
        ConversionError: a missing or unexpected key, a wrong shape or type, or a value that is not finite.
    """
    with torch.device("meta"):
        model = FaiM2FForUniversalSegmentation(config)
    expected = expected_shapes(model, config)
    missing = [key for key in expected if key not in state and not _optional(key)]
    unexpected = [key for key in state if key not in expected]
    for kind, keys in (("lacks", missing), ("has the unexpected", unexpected)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ConversionError(
                f"{where} {kind} key {keys[0]!r}{more}: the checkpoint and the configuration given by --info do not "
                "match; give the model_info.json that was saved beside it."
            )
    for key, shape in expected.items():
        if key in state and tuple(state[key].shape) != shape:
            raise ConversionError(
                f"{where}: {key!r} has the shape {tuple(state[key].shape)} where the configuration given by --info "
                f"(num_classes = {config.num_labels}, num_queries = {config.num_queries}) needs {shape}."
            )
    for key, tensor in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        if not tensor.is_floating_point():
            raise ConversionError(f"{where}: {key!r} holds {tensor.dtype} where floating-point weights were expected.")
        if not torch.isfinite(tensor).all():
            raise ConversionError(f"{where}: {key!r} has values that are not finite; the training run diverged.")
        if key.endswith("running_var") and (tensor < 0).any():
            raise ConversionError(f"{where}: {key!r} has negative values, which a variance cannot have.")
    converted = {}
    for key, target in model.state_dict().items():
        source = focoos_source(key, config)
        if source.key not in state:
            tensor = torch.zeros((), dtype=torch.long)
        elif source.third is None:
            tensor = state[source.key]
        else:
            tensor = state[source.key].chunk(3)[source.third]
        converted[key] = tensor.detach().to(target.dtype).contiguous().clone()
    return converted


def focoos_state_dict(model: FaiM2FForUniversalSegmentation) -> dict[str, torch.Tensor]:
    """The other way: a model's weights in Focoos's names, for those who go on with Focoos's own library."""
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for key, tensor in model.state_dict().items():
        source = focoos_source(key, model.config)
        parts.setdefault(source.key, []).append((source.third or 0, tensor.detach().cpu()))
    state = {
        key: torch.cat([tensor for _, tensor in sorted(tensors, key=lambda part: part[0])])
        if len(tensors) > 1
        else tensors[0][1]
        for key, tensors in parts.items()
    }
    weight = torch.ones(model.config.num_labels + 1)
    weight[-1] = model.config.no_object_weight
    return {**state, OF_THE_LOSS: weight}


def build_model(config: FaiM2FConfig, state: dict[str, torch.Tensor]) -> FaiM2FForUniversalSegmentation:
    """The model with converted weights, without having initialized it first; in evaluation mode."""
    with torch.device("meta"):
        model = FaiM2FForUniversalSegmentation(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def convert(checkpoint: Path, out_dir: Path, info: str) -> FocoosModel:
    """Writes a complete Hub repository of a Focoos checkpoint to `out_dir`, which appears whole or not at all.

    Args:
        checkpoint: `.pth` or `.safetensors`; untrusted.
        out_dir: a folder that does not exist.
        info: a published name, or the path of a `model_info.json`.

    Raises:
        ConversionError: anything that keeps the folder from being right; nothing is left behind.
    """
    check_new_folder(out_dir, ConversionError)
    described = read_info(info)
    state = read_state_dict(checkpoint)
    model = build_model(described.config, convert_state_dict(state, described.config, str(checkpoint)))
    provenance = Provenance(checkpoint.name, _digest(checkpoint), described.started_from)
    with new_folder(out_dir) as staging:
        model.save_pretrained(staging)
        described.processor.save_pretrained(staging)
        card = model_card(described.name, described.config, provenance)
        (staging / "README.md").write_text(card, encoding="utf-8")
    return described
