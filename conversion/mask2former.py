"""Converts configuration, weights and image processor of transformers' Mask2Former, and writes a Hub folder.

The architecture is the same in both: deformable attention in the pixel decoder, a post-norm transformer decoder, and
a backbone from transformers. `NAMES` maps the names of weights, for this conversion and its inverse.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, PretrainedConfig

from hf_faim2f.download import download_model
from hf_faim2f.errors import ConversionError, first_line
from hf_faim2f.family.presets import stuff_of
from hf_faim2f.files import check_new_folder, read_object, read_text
from hf_faim2f.hub.card import Provenance
from hf_faim2f.hub.results import CARD
from hf_faim2f.hub.sections import parse_card
from hf_faim2f.model.configuration_faim2f import POSTPROCESSING_TYPES, FaiM2FConfig
from hf_faim2f.model.image_processing_faim2f import FaiM2FImageProcessor
from hf_faim2f.model.image_settings_faim2f import BILINEAR
from hf_faim2f.model.modeling_faim2f import FaiM2FForUniversalSegmentation

from .weights import (
    NUM_LEVELS,
    ConvertedModel,
    check_weight,
    drop_unused_levels,
    measure_difference,
    quiet,
    write_model_folder,
)

# Parameters of the model's configuration that have the same name in both.
SAME = (
    "feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "activation_function",
    "encoder_layers", "num_attention_heads", "dropout", "dim_feedforward", "pre_norm", "enforce_input_projection",
    "num_queries", "no_object_weight", "class_weight", "mask_weight", "dice_weight", "train_num_points",
    "oversample_ratio", "importance_sample_ratio", "use_auxiliary_loss", "ignore_value",
)  # fmt: skip
# Our parameters that transformers derives from another one: our name, and the name of that parameter.
TIED = {
    "encoder_attention_heads": "num_attention_heads",
    "encoder_dropout": "dropout",
    "class_cost": "class_weight",
    "mask_cost": "mask_weight",
    "dice_cost": "dice_weight",
}
# Settings of the image processor that have the same name in both; `convert_processor` handles the others.
PROCESSOR_SETTINGS = (
    "do_resize", "size", "size_divisor", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
)  # fmt: skip
STEPS = ("do_resize", "do_rescale", "do_normalize")
# What transformers' image processor does where preprocessor_config.json does not say the size of images.
DEFAULT_SIZE = {"shortest_edge": 800, "longest_edge": 1333}
DEFAULT_DIVISOR = 32
STRIDES = [4, 8, 16, 32]
# transformers' names and ours: `#` stands for a number and `*` for any ending, in the same order on both sides.
# The backbone's own names are the same.
NAMES = (
    ("model.pixel_level_module.encoder.*", "backbone.*"),
    ("model.pixel_level_module.decoder.input_projections.#.0.*", "pixel_decoder.input_projections.#.convolution.*"),
    ("model.pixel_level_module.decoder.input_projections.#.1.*", "pixel_decoder.input_projections.#.normalization.*"),
    ("model.pixel_level_module.decoder.level_embed", "pixel_decoder.level_embedding.weight"),
    (
        "model.pixel_level_module.decoder.encoder.layers.#.self_attn.*",
        "pixel_decoder.encoder_layers.#.attention.*",
    ),
    (
        "model.pixel_level_module.decoder.encoder.layers.#.self_attn_layer_norm.*",
        "pixel_decoder.encoder_layers.#.attention_norm.*",
    ),
    ("model.pixel_level_module.decoder.encoder.layers.#.fc#.*", "pixel_decoder.encoder_layers.#.linear#.*"),
    (
        "model.pixel_level_module.decoder.encoder.layers.#.final_layer_norm.*",
        "pixel_decoder.encoder_layers.#.feed_forward_norm.*",
    ),
    # The level of stride 4, which the deformable layers do not use.
    ("model.pixel_level_module.decoder.adapter_1.0.*", "pixel_decoder.lateral_convolutions.0.convolution.*"),
    ("model.pixel_level_module.decoder.adapter_1.1.*", "pixel_decoder.lateral_convolutions.0.normalization.*"),
    ("model.pixel_level_module.decoder.layer_1.0.*", "pixel_decoder.output_convolutions.0.convolution.*"),
    ("model.pixel_level_module.decoder.layer_1.1.*", "pixel_decoder.output_convolutions.0.normalization.*"),
    ("model.pixel_level_module.decoder.mask_projection.*", "pixel_decoder.mask_projection.*"),
    ("model.transformer_module.queries_embedder.weight", "transformer_decoder.query_position.weight"),
    ("model.transformer_module.queries_features.weight", "transformer_decoder.query_features.weight"),
    ("model.transformer_module.input_projections.#.*", "transformer_decoder.input_projections.#.*"),
    ("model.transformer_module.level_embed.weight", "transformer_decoder.level_embedding.weight"),
    ("model.transformer_module.decoder.layers.#.self_attn.*", "transformer_decoder.layers.#.self_attention.*"),
    (
        "model.transformer_module.decoder.layers.#.self_attn_layer_norm.*",
        "transformer_decoder.layers.#.self_attention_norm.*",
    ),
    (
        "model.transformer_module.decoder.layers.#.cross_attn.out_proj.*",
        "transformer_decoder.layers.#.cross_attention.out_proj.*",
    ),
    # transformers packs query, key and value into one tensor, we have three: see `_split` and `_packed`.
    (
        "model.transformer_module.decoder.layers.#.cross_attn.in_proj_*",
        "transformer_decoder.layers.#.cross_attention.qkv_proj.*",
    ),
    (
        "model.transformer_module.decoder.layers.#.cross_attn_layer_norm.*",
        "transformer_decoder.layers.#.cross_attention_norm.*",
    ),
    ("model.transformer_module.decoder.layers.#.fc#.*", "transformer_decoder.layers.#.linear#.*"),
    (
        "model.transformer_module.decoder.layers.#.final_layer_norm.*",
        "transformer_decoder.layers.#.feed_forward_norm.*",
    ),
    ("model.transformer_module.decoder.layernorm.*", "transformer_decoder.norm.*"),
    (
        "model.transformer_module.decoder.mask_predictor.mask_embedder.#.0.*",
        "transformer_decoder.mask_embedder.layers.#.*",
    ),
    ("class_predictor.*", "transformer_decoder.class_predictor.*"),
)
# The loss's class weights, which are derived from the configuration.
DERIVED = "criterion."
PACKED = re.compile(r"(.*\.cross_attention\.)qkv_proj\.(weight|bias)")
QUERY = re.compile(r"(.*\.cross_attention\.)q_proj\.(weight|bias)")


def convert_config(theirs: Mask2FormerConfig, subtask: str) -> FaiM2FConfig:
    """Converts a Mask2Former configuration of transformers.

    Args:
        theirs: the configuration to convert.
        subtask: "semantic", "instance" or "panoptic": the task of the weights, which `theirs` does not contain.

    Raises:
        ConversionError: a value is not supported.
    """
    if list(theirs.feature_strides) != STRIDES or theirs.common_stride != STRIDES[0]:
        raise ConversionError(
            f"feature_strides = {theirs.feature_strides} with common_stride = {theirs.common_stride} cannot be "
            f"converted: the pixel decoder has the strides {STRIDES} and 4."
        )
    if theirs.decoder_layers < 2:
        raise ConversionError(
            f"decoder_layers = {theirs.decoder_layers} is too small: transformers counts one layer more than there are."
        )
    values = {name: getattr(theirs, name) for name in SAME}
    values.update({name: values[other] for name, other in TIED.items()})
    labels = [theirs.id2label[index] for index in sorted(theirs.id2label)]
    try:
        return FaiM2FConfig(
            backbone_config=theirs.backbone_config.to_dict(),
            pixel_decoder_type="deformable",
            decoder_layers=theirs.decoder_layers - 1,
            use_level_embedding=True,
            output_auxiliary_logits=bool(theirs.output_auxiliary_logits),
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
    """Converts a Mask2Former's weights to this package's names, in float32.

    Raises:
        ConversionError: an unknown or missing key, a wrong shape, or an invalid value.
    """
    with torch.device("meta"):
        expected = FaiM2FForUniversalSegmentation(config).state_dict()
    converted = drop_unused_levels(to_our_names(theirs), config.decoder_layers)
    for kind, keys in (("lack", expected.keys() - converted.keys()), ("have", converted.keys() - expected.keys())):
        if keys:
            raise ConversionError(
                f"the weights {kind} {sorted(keys)[0]!r} (in this package's names) where the configuration says "
                "otherwise: the two do not match."
            )
    for key, target in expected.items():
        if converted[key].shape != target.shape:
            raise ConversionError(
                f"{key!r} has the shape {tuple(converted[key].shape)}, and the configuration says "
                f"{tuple(target.shape)}: the two do not match."
            )
    return {key: tensor.detach().to(expected[key].dtype).contiguous().clone() for key, tensor in converted.items()}


def convert_processor(theirs: dict[str, Any], config: FaiM2FConfig) -> tuple[FaiM2FImageProcessor, list[str]]:
    """Converts a preprocessor_config.json; returns the image processor and a sentence about each setting of note.

    Args:
        theirs: the settings in the file; none if there is no file. As in transformers, a missing size is DEFAULT_SIZE,
            and a step that is null (`"do_rescale": null`) is left out.
        config: the converted configuration of the model.

    Raises:
        ConversionError: a value is invalid.
    """
    theirs = {"size_divisor": DEFAULT_DIVISOR, **theirs}
    settings = {name: theirs[name] for name in PROCESSOR_SETTINGS if theirs.get(name) is not None}
    settings.update({name: False for name in STEPS if name in theirs and theirs[name] is None})
    notes: list[str] = []
    if "size" not in settings:
        settings["size"] = DEFAULT_SIZE | {"longest_edge": theirs.get("max_size", DEFAULT_SIZE["longest_edge"])}
        notes.append(
            "no preprocessor_config.json says the size of images, so that transformers' default is kept: "
            "{shortest_edge} pixels for the shorter edge, at most {longest_edge} for the longer one (if the model was "
            "trained with another size, change preprocessor_config.json)".format_map(settings["size"])
        )
    if theirs.get("do_reduce_labels") or theirs.get("reduce_labels"):
        settings["do_reduce_labels"] = True
    if isinstance(settings.get("size"), int):  # old files have a number, and a separate `max_size`
        settings["size"] = {"shortest_edge": settings["size"], "longest_edge": theirs.get("max_size", 1333)}
    if theirs.get("ignore_index") is not None:
        settings["ignore_index"] = theirs["ignore_index"]
    if theirs.get("resample") not in (None, BILINEAR):
        notes.append(f"images were resized with resample = {theirs['resample']}, but are resized bilinearly here")
    if theirs.get("pad_size") is not None:
        notes.append(
            f"pad_size = {theirs['pad_size']} is not kept: images are padded to the largest of their batch, and masks "
            "leave the padding out, which transformers' masks include"
        )
    try:
        return FaiM2FImageProcessor.from_model_config(config, **settings), notes
    except (ValueError, TypeError) as error:
        raise ConversionError(f"preprocessor_config.json cannot be converted ({error}).") from error


def subtask_of(name: str) -> str | None:
    """The task that a model's name states, such as "panoptic" for "mask2former-swin-tiny-coco-panoptic".

    None if it states none, or several.
    """
    kinds = [kind for kind in POSTPROCESSING_TYPES if kind in name]
    return kinds[0] if len(kinds) == 1 else None


def convert(source: str, out_dir: Path, subtask: str | None = None, name: str | None = None) -> ConvertedModel:
    """Converts a Mask2Former and writes a complete Hub repository to `out_dir` atomically.

    Args:
        source: a folder saved by transformers, or a Hub id. Only safetensors weights are read, and those from the Hub
            must have the SHA-256 that it lists.
        out_dir: a folder that does not exist yet.
        subtask: the task of the weights; None to infer it from the name.
        name: the model's name or Hub id; None for that of `source`.

    Raises:
        ConversionError: the model cannot be converted, or the converted model's outputs differ; nothing is left behind.
    """
    check_new_folder(out_dir, ConversionError)
    if name is None:
        name = Path(source).resolve().name if Path(source).is_dir() else source
    short = name.split("/")[-1]
    subtask = subtask or subtask_of(short)
    if subtask is None:
        raise ConversionError(
            f"{source} does not say what it was trained for: pass --subtask, one of {', '.join(POSTPROCESSING_TYPES)}."
        )
    folder = _folder_of(source)
    theirs, settings, digest, unused = _load(source, folder)
    config = convert_config(theirs.config, subtask)
    theirs.config.use_auxiliary_loss = True  # without it, transformers' class does not even predict
    state = convert_state_dict(theirs.state_dict(), config)
    # Not on the meta device: computed buffers that are not saved, such as Swin's table of positions, must exist.
    model = FaiM2FForUniversalSegmentation(config).eval()
    model.load_state_dict(state)
    processor, notes = convert_processor(settings, config)
    if subtask == "panoptic" and config.label_ids_to_fuse is None:
        notes.append(
            "it is not known which of these classes are stuff, so nothing is fused: write their ids into "
            "label_ids_to_fuse of config.json and preprocessor_config.json"
        )
    if unused:
        notes.append(f"weights that this model does not use are left out: {len(unused)}, the first {unused[0]!r}")
    error = measure_difference(model, theirs)
    provenance = Provenance("model.safetensors", digest, library="transformers", model=name, error=error)
    try:
        card = read_text(folder / CARD) if (folder / CARD).is_file() else ""
        parse_card(card)
    except ValueError as reason:
        notes.append(f"the model card of the source is not kept ({first_line(reason, kind=False)})")
        card = ""
    write_model_folder(out_dir, out_dir.name, model, processor, provenance, before=card)
    return ConvertedModel(short, notes, error)


def _folder_of(source: str) -> Path:
    """The model's folder, downloaded if `source` is a Hub id.

    Raises:
        ConversionError: there is no such folder, or the model cannot be downloaded.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return download_model(source)
    except Exception as error:  # the network and the Hub raise many types
        raise ConversionError(f"{source} cannot be loaded ({first_line(error, kind=False)}).") from error


def _load(source: str, folder: Path) -> tuple[Mask2FormerForUniversalSegmentation, dict[str, Any], str, list[str]]:
    """The model, its image processor's settings, the SHA-256 of its weights, and the names of weights that are unused.

    Args:
        source: its name in messages.
        folder: its files.

    Raises:
        ConversionError: the model cannot be loaded or is of another type.
    """
    try:
        kind = PretrainedConfig.get_config_dict(folder)[0].get("model_type")
    except Exception as error:  # JSON and transformers raise many types
        raise ConversionError(f"{source} cannot be loaded ({first_line(error, kind=False)}).") from error
    if kind is None:
        raise ConversionError(f"{source} cannot be loaded: it has no config.json with a model_type.")
    if kind != "mask2former":
        raise ConversionError(f"{source} is a model of type {kind!r}, and only 'mask2former' is converted here.")
    if not any(folder.glob("*.safetensors*")):
        raise ConversionError(f"{source} has no weights in a .safetensors file, and only safetensors are read.")
    try:
        with quiet():
            model, info = Mask2FormerForUniversalSegmentation.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
    except Exception as error:  # also libraries that its configuration needs and are not here
        raise ConversionError(f"the model {source} cannot be loaded ({first_line(error, kind=False)}).") from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(DERIVED))
    if missing:
        raise ConversionError(f"the weights of {source} lack {len(missing)} keys, the first {missing[0]!r}.")
    # transformers 4.57 returns names, 5.x tuples of a name and two shapes.
    mismatched = sorted(key if isinstance(key, str) else str(key[0]) for key in info["mismatched_keys"])
    if mismatched:
        raise ConversionError(
            f"the weights of {source} are not those of its config.json: {len(mismatched)} have another shape, the "
            f"first {mismatched[0]!r}."
        )
    settings: Any = None
    for name in ("processor_config.json", "preprocessor_config.json"):  # as in transformers 5, the first that has them
        try:
            if settings is None and (folder / name).is_file():
                settings = read_object(folder / name)
                settings = settings.get("image_processor") if name.startswith("processor") else settings
            if not isinstance(settings, dict | None):
                raise ValueError(f"image_processor is a {type(settings).__name__}")
        except (OSError, ValueError) as error:
            raise ConversionError(f"{source}: {name} cannot be read ({first_line(error, kind=False)}).") from error
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return model.eval(), settings or {}, digest.hexdigest(), sorted(map(str, info["unexpected_keys"]))


def _compiled(pairs: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    """Compiles name pairs into patterns of the first names and templates of the second."""
    return [
        (re.compile(re.escape(name).replace(r"\#", r"(\d+)").replace(r"\*", "(.*)")), re.sub("[#*]", "{}", other))
        for name, other in pairs
    ]


OURS = _compiled(NAMES)
THEIRS = _compiled((ours, theirs) for theirs, ours in NAMES)


def _renamed(weights: Mapping[str, torch.Tensor], names: list[tuple[re.Pattern[str], str]]) -> dict[str, torch.Tensor]:
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in weights.items():
        found = next((other.format(*match.groups()) for name, other in names if (match := name.fullmatch(key))), None)
        if found is None:
            raise ConversionError(f"the weights have the key {key!r}, which has no place in this model.")
        renamed[found] = tensor
    return renamed


def _split(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights in which each packed projection is replaced by those of query, key and value."""
    split: dict[str, torch.Tensor] = {}
    for key, tensor in weights.items():
        if match := PACKED.fullmatch(key):
            parts = zip("qkv", tensor.chunk(3), strict=True)
            split.update({f"{match[1]}{name}_proj.{match[2]}": part for name, part in parts})
        else:
            split[key] = tensor
    return split


def _packed(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `_split`."""
    packed = dict(weights)
    for match in filter(None, map(QUERY.fullmatch, weights)):
        parts = [packed.pop(f"{match[1]}{name}_proj.{match[2]}") for name in "qkv"]
        packed[f"{match[1]}qkv_proj.{match[2]}"] = torch.cat(parts)
    return packed


def to_our_names(theirs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Mask2Former's weights by this package's names.

    Raises:
        ConversionError: an unknown key, or a value that is not finite.
    """
    kept = {key: tensor for key, tensor in theirs.items() if not key.startswith(DERIVED)}
    renamed = _renamed(kept, OURS)
    for key, tensor in kept.items():
        if tensor.is_floating_point():  # the counters of batch norms are not
            check_weight(key, tensor, "the weights")
    return _split(renamed)


def to_their_names(ours: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A deformable model's weights by transformers' names, without the loss's class weights.

    Embeddings and projections of levels that a decoder of one or two layers never reads are zeros.

    Raises:
        ConversionError: an unknown key.
    """
    weights = _packed(ours)
    embedding = weights["transformer_decoder.level_embedding.weight"]
    levels = len(embedding)
    weights["transformer_decoder.level_embedding.weight"] = torch.cat(
        [embedding, embedding.new_zeros(NUM_LEVELS - levels, embedding.shape[1])]
    )
    for level in range(levels, NUM_LEVELS):
        for part in ("weight", "bias"):
            first = weights.get(f"transformer_decoder.input_projections.0.{part}")
            if first is not None:
                weights[f"transformer_decoder.input_projections.{level}.{part}"] = torch.zeros_like(first)
    return _renamed(weights, THEIRS)


__all__ = [
    "DERIVED",
    "convert",
    "convert_config",
    "convert_processor",
    "convert_state_dict",
    "subtask_of",
    "to_our_names",
    "to_their_names",
]
