"""transformers' Mask2Former: its configuration, weights and image processor in our names, and the folder of them.

The architecture is the same: deformable attention in the pixel decoder, norms behind the attentions of the decoder. The
backbone is transformers' own in both.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, PretrainedConfig

from hf_faim2f.errors import ConversionError
from hf_faim2f.family.presets import stuff_of
from hf_faim2f.files import check_new_folder, new_folder, read_text
from hf_faim2f.hub.card import Provenance, model_card
from hf_faim2f.model.configuration_faim2f import POSTPROCESSING_TYPES, FaiM2FConfig
from hf_faim2f.model.image_processing_faim2f import FaiM2FImageProcessor
from hf_faim2f.model.image_settings_faim2f import BILINEAR
from hf_faim2f.model.modeling_faim2f import FaiM2FForUniversalSegmentation

# Of the model's configuration, under the same name.
SAME = (
    "feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "activation_function",
    "encoder_layers", "num_attention_heads", "dropout", "dim_feedforward", "pre_norm", "enforce_input_projection",
    "num_queries", "no_object_weight", "class_weight", "mask_weight", "dice_weight", "train_num_points",
    "oversample_ratio", "importance_sample_ratio", "use_auxiliary_loss", "ignore_value",
)  # fmt: skip
# Of the image processor's, under the same name; the others have no counterpart and are checked.
OF_THE_PROCESSOR = (
    "do_resize", "size", "size_divisor", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
)  # fmt: skip
STRIDES = [4, 8, 16, 32]
# The largest error that a folder is kept with, as a share of the largest value: rounding, and no more.
LARGEST_ERROR = 1e-4
# Where rounding decides whether a query looks at a pixel, either model differs from itself by more; see `_measure`.
TRIES = 3

# Their keys and ours, without the backbone's, whose names are the same below its prefix.
PIXEL_DECODER, TRANSFORMER = "model.pixel_level_module.decoder.", "model.transformer_module."
PATTERNS = (
    (r"model\.pixel_level_module\.encoder\.(.*)", r"backbone.\1"),
    (r"pixel_decoder:input_projections\.(\d)\.0\.(.*)", r"pixel_decoder.input_projections.\1.convolution.\2"),
    (r"pixel_decoder:input_projections\.(\d)\.1\.(.*)", r"pixel_decoder.input_projections.\1.normalization.\2"),
    (r"pixel_decoder:level_embed", r"pixel_decoder.level_embedding.weight"),
    (r"pixel_decoder:encoder\.layers\.(\d+)\.self_attn\.(.*)", r"pixel_decoder.encoder_layers.\1.attention.\2"),
    (
        r"pixel_decoder:encoder\.layers\.(\d+)\.self_attn_layer_norm\.(.*)",
        r"pixel_decoder.encoder_layers.\1.attention_norm.\2",
    ),
    (r"pixel_decoder:encoder\.layers\.(\d+)\.fc([12])\.(.*)", r"pixel_decoder.encoder_layers.\1.linear\2.\3"),
    (
        r"pixel_decoder:encoder\.layers\.(\d+)\.final_layer_norm\.(.*)",
        r"pixel_decoder.encoder_layers.\1.feed_forward_norm.\2",
    ),
    # There is one level above those of the deformable layers: strides are 4, 8, 16 and 32.
    (r"pixel_decoder:adapter_1\.0\.(.*)", r"pixel_decoder.lateral_convolutions.0.convolution.\1"),
    (r"pixel_decoder:adapter_1\.1\.(.*)", r"pixel_decoder.lateral_convolutions.0.normalization.\1"),
    (r"pixel_decoder:layer_1\.0\.(.*)", r"pixel_decoder.output_convolutions.0.convolution.\1"),
    (r"pixel_decoder:layer_1\.1\.(.*)", r"pixel_decoder.output_convolutions.0.normalization.\1"),
    (r"pixel_decoder:mask_projection\.(.*)", r"pixel_decoder.mask_projection.\1"),
    (r"transformer:queries_embedder\.weight", r"transformer_decoder.query_position.weight"),
    (r"transformer:queries_features\.weight", r"transformer_decoder.query_features.weight"),
    (r"transformer:input_projections\.(\d)\.(.*)", r"transformer_decoder.input_projections.\1.\2"),
    (r"transformer:level_embed\.weight", r"transformer_decoder.level_embedding.weight"),
    (r"transformer:decoder\.layers\.(\d+)\.self_attn\.(.*)", r"transformer_decoder.layers.\1.self_attention.\2"),
    (
        r"transformer:decoder\.layers\.(\d+)\.self_attn_layer_norm\.(.*)",
        r"transformer_decoder.layers.\1.self_attention_norm.\2",
    ),
    (
        r"transformer:decoder\.layers\.(\d+)\.cross_attn\.out_proj\.(.*)",
        r"transformer_decoder.layers.\1.cross_attention.out_proj.\2",
    ),
    # Query, key and value in one table; see `convert_state_dict`.
    (
        r"transformer:decoder\.layers\.(\d+)\.cross_attn\.in_proj_(weight|bias)",
        r"transformer_decoder.layers.\1.cross_attention.{}_proj.\2",
    ),
    (
        r"transformer:decoder\.layers\.(\d+)\.cross_attn_layer_norm\.(.*)",
        r"transformer_decoder.layers.\1.cross_attention_norm.\2",
    ),
    (r"transformer:decoder\.layers\.(\d+)\.fc([12])\.(.*)", r"transformer_decoder.layers.\1.linear\2.\3"),
    (
        r"transformer:decoder\.layers\.(\d+)\.final_layer_norm\.(.*)",
        r"transformer_decoder.layers.\1.feed_forward_norm.\2",
    ),
    (r"transformer:decoder\.layernorm\.(.*)", r"transformer_decoder.norm.\1"),
    (
        r"transformer:decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.(.*)",
        r"transformer_decoder.mask_embedder.layers.\1.\2",
    ),
    (r"class_predictor\.(.*)", r"transformer_decoder.class_predictor.\1"),
)


@dataclass
class Mask2FormerModel:
    """What was converted.

    Args:
        name: what it is called.
        error: the largest difference between the two models' logits, as a share of the largest.
        notes: sentences for the user.
    """

    name: str
    error: float
    notes: list[str] = field(default_factory=list)


def convert_config(theirs: Mask2FormerConfig, subtask: str) -> FaiM2FConfig:
    """Their configuration as ours.

    Args:
        subtask: "semantic", "instance" or "panoptic": what the weights were trained for, which theirs does not say.

    Raises:
        ConversionError: a value that cannot be honoured.
    """
    if list(theirs.feature_strides) != STRIDES or theirs.common_stride != STRIDES[0]:
        raise ConversionError(
            f"feature_strides = {theirs.feature_strides} with common_stride = {theirs.common_stride} cannot be "
            f"converted: the pixel decoder has the strides {STRIDES} and 4."
        )
    if theirs.decoder_layers < 2:
        raise ConversionError(
            f"decoder_layers = {theirs.decoder_layers} leaves no layer (transformers counts one more than there are)."
        )
    values = {name: getattr(theirs, name) for name in SAME}
    labels = [theirs.id2label[index] for index in sorted(theirs.id2label)]
    try:
        return FaiM2FConfig(
            backbone_config=theirs.backbone_config.to_dict(),
            pixel_decoder_type="deformable",
            encoder_attention_heads=theirs.num_attention_heads,
            encoder_dropout=theirs.dropout,
            decoder_layers=theirs.decoder_layers - 1,
            use_level_embedding=True,
            init_std=1.0,
            postprocessing_type=subtask,
            use_mask_score=True,
            predict_all_pixels=False,
            id2label=dict(theirs.id2label),
            label_ids_to_fuse=stuff_of(labels) if subtask == "panoptic" else None,
            **values,
        )
    except (ValueError, TypeError) as error:
        raise ConversionError(f"config.json cannot be converted ({error}).") from error


def convert_state_dict(theirs: dict[str, torch.Tensor], config: FaiM2FConfig) -> dict[str, torch.Tensor]:
    """Their weights in our names, float32.

    Raises:
        ConversionError: a key that has no place, one that is missing, a wrong shape or values that are not finite.
    """
    with torch.device("meta"):
        expected = FaiM2FForUniversalSegmentation(config).state_dict()
    converted: dict[str, torch.Tensor] = {}
    for key, tensor in theirs.items():
        if key.startswith("criterion."):  # the loss's weights of classes, which come from the configuration
            continue
        short = key.replace(PIXEL_DECODER, "pixel_decoder:", 1).replace(TRANSFORMER, "transformer:", 1)
        ours = next((re.sub(p, r, short) for p, r in PATTERNS if re.fullmatch(p, short)), None)
        if ours is None:
            raise ConversionError(f"the weights have the key {key!r}, which has no place in this model.")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ConversionError(f"{key!r} has values that are not finite; the training run diverged.")
        if "{}" in ours:
            for name, part in zip("qkv", tensor.chunk(3), strict=True):
                converted[ours.format(name)] = part
        else:
            converted[ours] = tensor
    # A decoder of fewer layers than levels has no use for the others.
    levels = min(3, config.decoder_layers)
    embedding = "transformer_decoder.level_embedding.weight"
    if embedding in converted:
        converted[embedding] = converted[embedding][:levels]
    for key in [key for key in converted if key.startswith("transformer_decoder.input_projections.")]:
        if int(key.split(".")[2]) >= levels:
            del converted[key]
    for kind, keys in (("lack", expected.keys() - converted.keys()), ("have", converted.keys() - expected.keys())):
        if keys:
            raise ConversionError(
                f"the weights {kind} {sorted(keys)[0]!r} (in this package's names) where the configuration says "
                "otherwise: the two do not belong together."
            )
    for key, target in expected.items():
        if converted[key].shape != target.shape:
            raise ConversionError(
                f"{key!r} has the shape {tuple(converted[key].shape)}, and the configuration says "
                f"{tuple(target.shape)}: the two do not belong together."
            )
    return {key: tensor.detach().to(expected[key].dtype).contiguous().clone() for key, tensor in converted.items()}


def convert_processor(theirs: dict[str, Any], config: FaiM2FConfig) -> tuple[FaiM2FImageProcessor, list[str]]:
    """The image processor of a preprocessor_config.json, and what of it has no place, a sentence each.

    Raises:
        ConversionError: a value that cannot be.
    """
    settings = {name: theirs[name] for name in OF_THE_PROCESSOR if theirs.get(name) is not None}
    notes: list[str] = []
    if theirs.get("do_reduce_labels") or theirs.get("reduce_labels"):
        settings["do_reduce_labels"] = True
    if isinstance(settings.get("size"), int):  # of old, with `max_size` beside it
        settings["size"] = {"shortest_edge": settings["size"], "longest_edge": theirs.get("max_size", 1333)}
    if theirs.get("ignore_index") is not None:
        settings["ignore_index"] = theirs["ignore_index"]
    if theirs.get("resample") not in (None, BILINEAR):
        notes.append(f"images were resized with resample = {theirs['resample']}, and are bilinearly here")
    try:
        return FaiM2FImageProcessor.from_model_config(config, **settings), notes
    except (ValueError, TypeError) as error:
        raise ConversionError(f"preprocessor_config.json cannot be converted ({error}).") from error


def convert(source: str, out_dir: Path, subtask: str | None = None) -> Mask2FormerModel:
    """Writes a complete Hub repository of a Mask2Former to `out_dir`, which appears whole or not at all.

    Args:
        source: a folder that transformers saved, or an id on the Hub. Weights are read from safetensors only.
        out_dir: a folder that does not exist.
        subtask: what the weights were trained for; None to read it from the name of `source`.

    Raises:
        ConversionError: anything that keeps the folder from being right; nothing is left behind.
    """
    check_new_folder(out_dir, ConversionError)
    name = Path(source).resolve().name if Path(source).is_dir() else source.split("/")[-1]
    subtask = subtask or next((kind for kind in POSTPROCESSING_TYPES if kind in name), None)
    if subtask is None:
        raise ConversionError(
            f"{source} does not say what it was trained for: pass --subtask, one of {', '.join(POSTPROCESSING_TYPES)}."
        )
    theirs, settings, digest = _load(source)
    config = convert_config(theirs.config, subtask)
    state = convert_state_dict(theirs.state_dict(), config)
    # Not on the meta device: what a backbone computes and does not save (Swin's table of positions) has to be there.
    model = FaiM2FForUniversalSegmentation(config).eval()
    model.load_state_dict(state)
    processor, notes = convert_processor(settings, config)
    if subtask == "panoptic" and config.label_ids_to_fuse is None:
        notes.append(
            "which classes are stuff is not known of these labels: write their ids into label_ids_to_fuse of "
            "config.json and preprocessor_config.json, or nothing is fused"
        )
    error = _measure(model, theirs)
    provenance = Provenance("model.safetensors", digest, library="transformers", model=name, error=error)
    with new_folder(out_dir) as staging:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        (staging / "README.md").write_text(model_card(out_dir.name, config, provenance), encoding="utf-8")
    return Mask2FormerModel(name, error, notes)


def _load(source: str) -> tuple[Mask2FormerForUniversalSegmentation, dict[str, Any], str]:
    """Their model, the settings of their image processor, and the SHA-256 of the weights' names, types and values."""
    try:
        kind = PretrainedConfig.get_config_dict(source)[0].get("model_type")
    except Exception as error:  # whatever the network, the Hub and JSON make of a name
        raise ConversionError(f"{source} cannot be loaded ({_first_line(error)}).") from error
    if kind is None:
        raise ConversionError(f"{source} cannot be loaded: it has no config.json with a model_type.")
    if kind != "mask2former":
        raise ConversionError(f"{source} is a model of type {kind!r}, and only 'mask2former' is converted here.")
    try:
        model, info = Mask2FormerForUniversalSegmentation.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        raise ConversionError(
            f"the weights of {source} cannot be loaded ({_first_line(error)}); only safetensors are read."
        ) from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("criterion."))
    if missing:
        raise ConversionError(f"the weights of {source} lack {len(missing)} keys, the first {missing[0]!r}.")
    settings: dict[str, Any] = {}
    path = Path(source) / "preprocessor_config.json"
    try:
        if Path(source).is_dir():
            settings = json.loads(read_text(path)) if path.is_file() else {}
        else:
            from transformers import ImageProcessingMixin

            settings = ImageProcessingMixin.get_image_processor_dict(source)[0]
    except (OSError, ValueError) as error:
        raise ConversionError(f"{source}: preprocessor_config.json cannot be read ({_first_line(error)}).") from error
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return model.eval(), settings, digest.hexdigest()


@torch.no_grad()
def _measure(ours: FaiM2FForUniversalSegmentation, theirs: Mask2FormerForUniversalSegmentation) -> float:
    """The largest difference of the two on an image, as a share of the largest value.

    Raises:
        ConversionError: it is more than rounding, on each of a few images.
    """
    worst = []
    for seed in range(TRIES):
        image = torch.randn(1, 3, 128, 160, generator=torch.Generator().manual_seed(seed))
        one, other = ours(image), theirs(image)
        errors = []
        for key in ("class_queries_logits", "masks_queries_logits"):
            errors.append(float((one[key] - other[key]).abs().max() / other[key].abs().max().clamp(min=1e-12)))
        worst.append(max(errors))
        if worst[-1] <= LARGEST_ERROR:
            return worst[-1]
    raise ConversionError(
        f"the converted model differs from transformers' by {min(worst):.1e} of the largest value, more than rounding: "
        "please report it with the model's config.json."
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")


__all__ = ["Mask2FormerModel", "convert", "convert_config", "convert_processor", "convert_state_dict"]
