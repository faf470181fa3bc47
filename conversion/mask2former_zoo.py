"""Checkpoints of Mask2Former's own repository (detectron2): reads, converts and writes them as Hub folders."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_faim2f.errors import ConversionError
from hf_faim2f.family.mask2former import STAGES, ZOO_LICENSE_ID, zoo_model_of
from hf_faim2f.files import check_new_folder, md5_of, read_object, sha256_of
from hf_faim2f.hub.card import Provenance
from hf_faim2f.model.configuration_faim2f import FaiM2FConfig
from hf_faim2f.model.modeling_faim2f import FaiM2FForUniversalSegmentation

from .array_pickle import read_array_pickle
from .mask2former_zoo_config import (
    PIXEL_DECODER,
    PREDICTOR,
    architecture_of,
    check_architecture,
    choose_description,
    image_processor,
    model_configuration,
)
from .weights import (
    NUM_LEVELS,
    ConvertedModel,
    check_keys,
    check_weight,
    drop_unused_levels,
    quiet,
    read_state_dict,
    take_weights,
    write_model_folder,
)

SUFFIXES = (".pkl", ".pth", ".pt", ".safetensors")
# Buffers that torch and transformers' Swin compute when a model is built.
COMPUTED = ("relative_position_index", "num_batches_tracked")
# Buffers of the loss and the preprocessing. They are derived from the configuration, so they are not converted.
FROM_CONFIGURATION = ("criterion.empty_weight", "pixel_mean", "pixel_std")


def is_zoo_checkpoint(source: str) -> bool:
    """Whether `source` names a checkpoint file rather than a transformers folder or a Hub id."""
    path = Path(source)
    return path.is_file() or (path.suffix in SUFFIXES and not path.is_dir())


def convert(source: Path, out_dir: Path, config: str | None = None, subtask: str | None = None) -> ConvertedModel:
    """Converts a checkpoint and writes a complete Hub repository to `out_dir` atomically.

    Args:
        source: a checkpoint of Mask2Former's repository, `.pkl` or `.pth`; untrusted.
        out_dir: a folder that does not exist yet.
        config, subtask: as in `choose_description`.

    Raises:
        ConversionError: the checkpoint cannot be converted; nothing is left behind.
    """
    check_new_folder(out_dir, ConversionError)
    if not source.is_file():
        raise ConversionError(f"{source} does not exist; name a checkpoint of Mask2Former (.pkl or .pth).")
    if config is None and _is_of_transformers(source):
        raise ConversionError(
            f"{source} has the weights of a model that transformers saved: name its folder, {source.parent}, instead."
        )
    md5 = md5_of(source)
    described = choose_description(source, md5, config, subtask)
    state = read_weights(source, described.notes)
    # Checked before anything is built, so that no configuration can require more memory than the file's weights.
    check_architecture(architecture_of(state, source), described, source)
    ours = model_configuration(described)
    processor = image_processor(described, ours)
    converted = convert_state_dict(state, ours, str(source))
    del state
    model = build_model(ours, converted, str(source))
    published = zoo_model_of(md5) is not None
    provenance = Provenance(
        source.name, sha256_of(source), library="Mask2Former", model=described.name, published=published
    )
    license = ZOO_LICENSE_ID if published else None
    write_model_folder(out_dir, out_dir.name, model, processor, provenance, license=license)
    return ConvertedModel(described.name, described.notes)


def _is_of_transformers(source: Path) -> bool:
    """Whether the configuration of a transformers Mask2Former is beside a file."""
    try:
        return read_object(source.with_name("config.json")).get("model_type") == "mask2former"
    except (OSError, ValueError):
        return False


def read_weights(path: Path, notes: list[str] | None = None) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, by the keys of the zoo's newest format.

    Args:
        path: a pickle of arrays, as published in the zoo, or a file saved by torch or safetensors; untrusted.
        notes: as in `read_state_dict`.

    Raises:
        ConversionError: the file is missing, truncated, of another type, or contains more than tensors and containers.
    """
    if not path.is_file():
        raise ConversionError(f"{path} does not exist; name a checkpoint of Mask2Former (.pkl or .pth).")
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if is_archive or path.suffix == ".safetensors":
        state = read_state_dict(path, notes)
    else:
        state = _tensors(_arrays(take_weights(read_array_pickle(path), path, notes), path), path)
    return {_newest_name(key): tensor for key, tensor in state.items()}


def _arrays(arrays: Any, path: Path) -> dict[str, np.ndarray]:
    if not isinstance(arrays, dict):
        raise ConversionError(
            f"{path} holds a {type(arrays).__name__} where a dictionary of arrays was expected, bare or under the key "
            "'model'."
        )
    if not arrays:
        raise ConversionError(f"{path} holds no weights; there is nothing to convert.")
    for key, value in arrays.items():
        if not isinstance(key, str) or not isinstance(value, np.ndarray):
            found = ", ".join(repr(name)[:60] for name in list(arrays)[:5])
            raise ConversionError(
                f"{path}: the entry {key!r} is not an array ({type(value).__name__}); a dictionary of arrays was "
                f"expected, bare or under the key 'model' (found the keys {found})."
            )
    return arrays


def _tensors(arrays: dict[str, np.ndarray], path: Path) -> dict[str, torch.Tensor]:
    # Checked before anything is copied: arrays are views of the file's bytes, and several can share them.
    claimed = sum(array.nbytes for array in arrays.values())
    if claimed > path.stat().st_size:
        raise ConversionError(f"{path}: its arrays have {claimed} bytes, more than the file; refused as forged.")
    return {key: torch.from_numpy(array.astype(array.dtype.newbyteorder("="))) for key, array in arrays.items()}


def _newest_name(key: str) -> str:
    """The key in the newest format; old keys are renamed as in `_load_from_state_dict` of Mask2Former's heads."""
    head = "sem_seg_head."
    if key.startswith(head) and not key.startswith((PIXEL_DECODER, PREDICTOR)):
        key = PIXEL_DECODER + key.removeprefix(head)
    return key.replace("static_query", "query_feat")


def build_model(config: FaiM2FConfig, state: dict[str, torch.Tensor], where: str) -> FaiM2FForUniversalSegmentation:
    """Builds the model with converted weights, in evaluation mode; transformers translates keys of its own backbones.

    Raises:
        ConversionError: the keys of the installed transformers differ from those known to this converter.
    """
    with quiet():
        model, info = FaiM2FForUniversalSegmentation.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True
        )
    wrong = [key for key in info["missing_keys"] if not key.endswith(COMPUTED)]
    wrong += [*info["unexpected_keys"], *map(str, info["mismatched_keys"])]
    if wrong:
        raise ConversionError(
            f"{where}: {sorted(wrong)[0]!r} has no place in the model of the installed version of transformers; please "
            "report it."
        )
    return model.eval()


@dataclass(frozen=True)
class Weight:
    """One tensor of the zoo's format.

    Args:
        key: its name in the checkpoint.
        shape: its shape in the checkpoint.
        ours: its name in this package; or three names, if it is split into thirds (query, key, value).
    """

    key: str
    shape: tuple[int, ...]
    ours: tuple[str, ...]


def convert_state_dict(state: dict[str, torch.Tensor], config: FaiM2FConfig, where: str) -> dict[str, torch.Tensor]:
    """Converts weights to this package's names, in float32; a Swin backbone gets the names of transformers' weights.

    Args:
        state: tensors by the keys of the zoo's newest format.
        config: the configuration that keys and shapes must match.
        where: name of the file for error messages.

    Raises:
        ConversionError: a missing or unexpected key, a wrong shape or dtype, or an invalid value.
    """
    expected = {weight.key: weight for weight in weights_of(config)}
    check_keys(
        [key for key in expected if key not in state],
        [key for key in state if key not in expected and not _may_be_ignored(key, state[key], config, where)],
        where,
        "the checkpoint and the configuration do not match; name its own by --config.",
    )
    converted = {}
    for key, weight in expected.items():
        tensor = state[key]
        if tuple(tensor.shape) != weight.shape:
            raise ConversionError(
                f"{where}: {key!r} has the shape {tuple(tensor.shape)} where the configuration needs {weight.shape}."
            )
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float32)  # before the check, because a float64 can become infinite
        check_weight(key, tensor, where)
        for ours, part in zip(weight.ours, tensor.chunk(len(weight.ours)), strict=True):
            converted[ours] = part.clone()
    return drop_unused_levels(converted, config.decoder_layers)


def _may_be_ignored(key: str, tensor: torch.Tensor, config: FaiM2FConfig, where: str) -> bool:
    """Whether a key that is not a weight may be present: a computed buffer, or one derived from the configuration.

    Raises:
        ConversionError: a Swin's table of relative positions differs from the one implied by its window.
    """
    if key in FROM_CONFIGURATION or key.endswith(".norm.num_batches_tracked"):
        return True
    if not re.fullmatch(r"backbone\.layers\.\d+\.blocks\.\d+\.attn\.relative_position_index", key):
        return False
    window = getattr(config.backbone_config, "window_size", 0)
    is_right = tensor.shape == (window**2, window**2)
    if not is_right or not torch.equal(tensor.to(torch.int64), _relative_position_index(window)):
        raise ConversionError(f"{where}: {key!r} is not what a window of {window} pixels has; refused as damaged.")
    return True


def _relative_position_index(window: int) -> torch.Tensor:
    """(window**2, window**2): the bias row for each pair of pixels in a window (Swin Transformer, section 3.2)."""
    place = torch.arange(window)
    rows, columns = place.repeat_interleave(window), place.repeat(window)
    down, right = rows[:, None] - rows[None] + window - 1, columns[:, None] - columns[None] + window - 1
    return down * (2 * window - 1) + right


def weights_of(config: FaiM2FConfig) -> list[Weight]:
    """All tensors of a checkpoint with this configuration."""
    backbone = config.backbone_config
    parts = _swin(backbone) if backbone.model_type == "swin" else _resnet(backbone)
    channels = (
        [backbone.embed_dim * 2**stage for stage in range(4)]
        if backbone.model_type == "swin"
        else list(backbone.hidden_sizes)
    )
    return [*parts, *_pixel_decoder(config, channels), *_predictor(config)]


def _affine(theirs: str, ours: str, *shape: int) -> list[Weight]:
    """Weight and bias of a linear layer or convolution with shape (out, in, ...), or of a norm with shape (out,)."""
    return [
        Weight(f"{theirs}.weight", shape, (f"{ours}.weight",)),
        Weight(f"{theirs}.bias", shape[:1], (f"{ours}.bias",)),
    ]


def _thirds(theirs: str, joint: str, ours: list[str], width: int) -> list[Weight]:
    """Query, key and value, which the zoo packs into one tensor."""
    return [
        Weight(f"{theirs}{joint}weight", (3 * width, width), tuple(f"{name}.weight" for name in ours)),
        Weight(f"{theirs}{joint}bias", (3 * width,), tuple(f"{name}.bias" for name in ours)),
    ]


def _resnet(backbone: Any) -> Iterator[Weight]:
    def convolution(theirs: str, ours: str, *shape: int) -> Iterator[Weight]:
        yield Weight(f"backbone.{theirs}.weight", shape, (f"backbone.{ours}.convolution.weight",))
        for name in ("weight", "bias", "running_mean", "running_var"):
            yield Weight(f"backbone.{theirs}.norm.{name}", shape[:1], (f"backbone.{ours}.normalization.{name}",))

    yield from convolution("stem.conv1", "embedder.embedder", backbone.embedding_size, 3, 7, 7)
    before = backbone.embedding_size
    for stage, (width, depth) in enumerate(zip(backbone.hidden_sizes, backbone.depths, strict=True)):
        for block in range(depth):
            theirs, ours = f"res{stage + 2}.{block}", f"encoder.stages.{stage}.layers.{block}"
            if backbone.layer_type == "bottleneck":
                narrow = width // 4
                shapes = [(narrow, before, 1, 1), (narrow, narrow, 3, 3), (width, narrow, 1, 1)]
            else:
                shapes = [(width, before, 3, 3), (width, width, 3, 3)]
            # Both implementations have a projection if the stride or the width changes.
            if before != width or (stage > 0 and block == 0):
                yield from convolution(f"{theirs}.shortcut", f"{ours}.shortcut", width, before, 1, 1)
            for index, shape in enumerate(shapes):
                yield from convolution(f"{theirs}.conv{index + 1}", f"{ours}.layer.{index}", *shape)
            before = width


def _swin(backbone: Any) -> Iterator[Weight]:
    """Uses the names of transformers' published Swin models; loading translates them if necessary."""
    width, rows = backbone.embed_dim, (2 * backbone.window_size - 1) ** 2
    embeddings = "backbone.embeddings."
    yield from _affine("backbone.patch_embed.proj", f"{embeddings}patch_embeddings.projection", width, 3, 4, 4)
    yield from _affine("backbone.patch_embed.norm", f"{embeddings}norm", width)
    for stage, (depth, heads) in enumerate(zip(backbone.depths, backbone.num_heads, strict=True)):
        inner = int(width * backbone.mlp_ratio)
        for block in range(depth):
            theirs = f"backbone.layers.{stage}.blocks.{block}"
            ours = f"backbone.encoder.layers.{stage}.blocks.{block}"
            table, attention = "relative_position_bias_table", f"{ours}.attention.self"
            yield Weight(f"{theirs}.attn.{table}", (rows, heads), (f"{attention}.{table}",))
            three = [f"{attention}.{name}" for name in ("query", "key", "value")]
            yield from _thirds(f"{theirs}.attn.", "qkv.", three, width)
            yield from _affine(f"{theirs}.attn.proj", f"{ours}.attention.output.dense", width, width)
            yield from _affine(f"{theirs}.norm1", f"{ours}.layernorm_before", width)
            yield from _affine(f"{theirs}.norm2", f"{ours}.layernorm_after", width)
            yield from _affine(f"{theirs}.mlp.fc1", f"{ours}.intermediate.dense", inner, width)
            yield from _affine(f"{theirs}.mlp.fc2", f"{ours}.output.dense", width, inner)
        yield from _affine(f"backbone.norm{stage}", f"backbone.hidden_states_norms.{STAGES[stage]}", width)
        if stage < 3:
            theirs, ours = f"backbone.layers.{stage}.downsample", f"backbone.encoder.layers.{stage}.downsample"
            reduction = ".reduction.weight"
            yield Weight(f"{theirs}{reduction}", (2 * width, 4 * width), (f"{ours}{reduction}",))
            yield from _affine(f"{theirs}.norm", f"{ours}.norm", 4 * width)
            width *= 2


def _pixel_decoder(config: FaiM2FConfig, channels: list[int]) -> Iterator[Weight]:
    size, ours = config.feature_size, "pixel_decoder."
    for level, width in enumerate(reversed(channels[1:])):  # both order levels from coarse to fine
        theirs, projection = f"{PIXEL_DECODER}input_proj.{level}", f"{ours}input_projections.{level}"
        yield from _affine(f"{theirs}.0", f"{projection}.convolution", size, width, 1, 1)
        yield from _affine(f"{theirs}.1", f"{projection}.normalization", size)
    transformer = f"{PIXEL_DECODER}transformer."
    yield Weight(f"{transformer}level_embed", (NUM_LEVELS, size), (f"{ours}level_embedding.weight",))
    samples = config.encoder_attention_heads * NUM_LEVELS * config.encoder_points
    for layer in range(config.encoder_layers):
        theirs, own = f"{transformer}encoder.layers.{layer}", f"{ours}encoder_layers.{layer}"
        for name, count in (
            ("sampling_offsets", 2 * samples),
            ("attention_weights", samples),
            ("value_proj", size),
            ("output_proj", size),
        ):
            yield from _affine(f"{theirs}.self_attn.{name}", f"{own}.attention.{name}", count, size)
        yield from _affine(f"{theirs}.norm1", f"{own}.attention_norm", size)
        yield from _affine(f"{theirs}.linear1", f"{own}.linear1", config.encoder_feedforward_dim, size)
        yield from _affine(f"{theirs}.linear2", f"{own}.linear2", size, config.encoder_feedforward_dim)
        yield from _affine(f"{theirs}.norm2", f"{own}.feed_forward_norm", size)
    # The level of stride 4, which the deformable layers do not use.
    for name, own, shape in (
        ("adapter_1", "lateral_convolutions.0", (size, channels[0], 1, 1)),
        ("layer_1", "output_convolutions.0", (size, size, 3, 3)),
    ):
        yield Weight(f"{PIXEL_DECODER}{name}.weight", shape, (f"{ours}{own}.convolution.weight",))
        yield from _affine(f"{PIXEL_DECODER}{name}.norm", f"{ours}{own}.normalization", size)
    yield from _affine(f"{PIXEL_DECODER}mask_features", f"{ours}mask_projection", config.mask_feature_size, size, 1, 1)


def _predictor(config: FaiM2FConfig) -> Iterator[Weight]:
    size, ours = config.hidden_dim, "transformer_decoder."
    queries = (config.num_queries, size)
    yield Weight(f"{PREDICTOR}query_feat.weight", queries, (f"{ours}query_features.weight",))
    yield Weight(f"{PREDICTOR}query_embed.weight", queries, (f"{ours}query_position.weight",))
    yield Weight(f"{PREDICTOR}level_embed.weight", (NUM_LEVELS, size), (f"{ours}level_embedding.weight",))
    if config.enforce_input_projection or config.feature_size != size:
        for level in range(NUM_LEVELS):
            own = f"{ours}input_projections.{level}"
            yield from _affine(f"{PREDICTOR}input_proj.{level}", own, size, config.feature_size, 1, 1)
    for layer in range(config.decoder_layers):
        own = f"{ours}layers.{layer}"
        for kind, module in (("self", "self_attn"), ("cross", "multihead_attn")):
            theirs = f"{PREDICTOR}transformer_{kind}_attention_layers.{layer}"
            attention = f"{own}.{kind}_attention"
            three = [f"{attention}.{name}_proj" for name in "qkv"]
            yield from _thirds(f"{theirs}.{module}.", "in_proj_", three, size)
            yield from _affine(f"{theirs}.{module}.out_proj", f"{attention}.out_proj", size, size)
            yield from _affine(f"{theirs}.norm", f"{own}.{kind}_attention_norm", size)
        theirs = f"{PREDICTOR}transformer_ffn_layers.{layer}"
        yield from _affine(f"{theirs}.linear1", f"{own}.linear1", config.dim_feedforward, size)
        yield from _affine(f"{theirs}.linear2", f"{own}.linear2", size, config.dim_feedforward)
        yield from _affine(f"{theirs}.norm", f"{own}.feed_forward_norm", size)
    yield from _affine(f"{PREDICTOR}decoder_norm", f"{ours}norm", size)
    yield from _affine(f"{PREDICTOR}class_embed", f"{ours}class_predictor", config.num_labels + 1, size)
    for layer, width in enumerate((size, size, config.mask_feature_size)):
        theirs = f"{PREDICTOR}mask_embed.layers.{layer}"
        yield from _affine(theirs, f"{ours}mask_embedder.layers.{layer}", width, size)


__all__ = ["Weight", "build_model", "convert", "convert_state_dict", "is_zoo_checkpoint", "read_weights", "weights_of"]
