"""The common steps of conversions: reading checkpoints, checking weights, comparing outputs, writing the Hub folder.

Checkpoints are untrusted: nothing runs code from them, or allocates more memory than their contents need.
"""

import pickletools
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Mask2FormerForUniversalSegmentation
from transformers.utils import logging

from hf_faim2f.errors import ConversionError, first_line
from hf_faim2f.files import new_folder
from hf_faim2f.hub.card import Provenance, model_card
from hf_faim2f.model.image_processing_faim2f import FaiM2FImageProcessor
from hf_faim2f.model.modeling_faim2f import FaiM2FForUniversalSegmentation

# Maximum accepted difference between the two models' logits, due to rounding, as a fraction of the largest logit.
LARGEST_ERROR = 1e-4
# Number of images to try. If rounding decides whether a query attends to a pixel, even the same model differs by more
# from run to run.
TRIES = 3
LOGITS = ("class_queries_logits", "masks_queries_logits")
# Number of feature levels to which the transformer decoder's layers attend in turn.
NUM_LEVELS = 3
LEVEL_EMBEDDING = "transformer_decoder.level_embedding.weight"
INPUT_PROJECTION = re.compile(r"transformer_decoder\.input_projections\.(\d)\.")
# The names that a pickle by torch.save may have. torch's restricted unpickler allows more, and some of these allocate
# as much memory as a number in the file says, such as `bytearray`.
ALLOWED_NAMES = re.compile(
    r"torch\.(\w+Storage|Size|device|bool|[a-z]+\d+\w*)|torch\.serialization\._get_layout|"
    r"torch\._utils\._rebuild_(tensor|tensor_v2|parameter|parameter_with_state|sparse_tensor|meta_tensor_no_storage)|"
    r"collections\.(OrderedDict|Counter)|(builtins|__builtin__)\.(set|complex)|_codecs\.encode"
)
# The entries with a checkpoint's weights (the second is Lightning's), and those with their moving averages in training,
# which need not have the buffers.
STATES, AVERAGES = ("model", "state_dict"), ("ema_state", "model_ema", "state_dict_ema", "ema")
BUFFERS = (
    "running_mean", "running_var", "num_batches_tracked", "empty_weight", "relative_position_index", "pixel_mean",
    "pixel_std",
)  # fmt: skip
# What DataParallel, Lightning and torch.compile put before all keys.
PREFIXES = ("module.", "model.", "_orig_mod.")


@dataclass(frozen=True)
class ConvertedModel:
    """The result of a successful conversion.

    Args:
        name: name of the model.
        notes: sentences for the user.
        error: the largest difference from the original's logits, as a fraction of the largest logit; None if the
            original was not run.
    """

    name: str
    notes: list[str] = field(default_factory=list)
    error: float | None = None


def check_keys(missing: Iterable[str], unexpected: Iterable[str], where: str, remedy: str) -> None:
    """Checks that a checkpoint has exactly the keys that its configuration implies.

    Args:
        missing: keys that the configuration implies and the checkpoint lacks.
        unexpected: keys of the checkpoint that the configuration does not imply.
        where: name of the checkpoint for error messages.
        remedy: end of the message: why the two differ and what to do.

    Raises:
        ConversionError: a key is missing or unexpected; the message names the first and counts the others.
    """
    for kind, keys in (("lacks", list(missing)), ("has the unexpected", list(unexpected))):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ConversionError(f"{where} {kind} key {keys[0]!r}{more}: {remedy}")


def check_weight(key: str, tensor: torch.Tensor, where: str) -> None:
    """Checks that values are floating-point and finite, and variances not negative.

    Raises:
        ConversionError: the tensor has another dtype or an invalid value.
    """
    if not tensor.is_floating_point():
        raise ConversionError(f"{where}: {key!r} holds {tensor.dtype} where floating-point weights were expected.")
    if not torch.isfinite(tensor).all():
        raise ConversionError(f"{where}: {key!r} has values that are not finite; the training run diverged.")
    if key.endswith("running_var") and (tensor < 0).any():
        raise ConversionError(f"{where}: {key!r} has negative values, which a variance cannot have.")


def drop_unused_levels(weights: dict[str, torch.Tensor], decoder_layers: int) -> dict[str, torch.Tensor]:
    """Drops embeddings and projections of levels that a decoder with fewer layers than levels never reads.

    Args:
        weights: weights by this package's names.
        decoder_layers: number of decoder layers.
    """
    levels = min(NUM_LEVELS, decoder_layers)
    kept = {
        key: tensor
        for key, tensor in weights.items()
        if not (match := INPUT_PROJECTION.match(key)) or int(match[1]) < levels
    }
    if LEVEL_EMBEDDING in kept:
        kept[LEVEL_EMBEDDING] = kept[LEVEL_EMBEDDING][:levels].clone()
    return kept


def _largest_difference(ours: Any, theirs: Any) -> float:
    """The largest difference between two models' logits, as a fraction of the largest logit of the second."""
    return max(
        float((ours[key] - theirs[key]).abs().max() / theirs[key].abs().max().clamp(min=1e-12)) for key in LOGITS
    )


@torch.no_grad()
def measure_difference(ours: FaiM2FForUniversalSegmentation, theirs: Mask2FormerForUniversalSegmentation) -> float:
    """The largest difference between the two models' logits on an image, as a fraction of the largest logit.

    Raises:
        ConversionError: on all of several images, the difference is larger than rounding explains.
    """
    differences = []
    for seed in range(TRIES):
        image = torch.randn(1, 3, 128, 160, generator=torch.Generator().manual_seed(seed))
        differences.append(_largest_difference(ours(image), theirs(image)))
        if differences[-1] <= LARGEST_ERROR:
            return differences[-1]
    raise ConversionError(
        f"the converted model differs from transformers' by {min(differences):.1e} of the largest value, more than "
        "rounding: please report it with the model's config.json."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' own report on missing and mismatched weights."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def write_model_folder(
    out_dir: Path,
    name: str,
    model: FaiM2FForUniversalSegmentation,
    processor: FaiM2FImageProcessor,
    provenance: Provenance,
    *,
    license: str | None = None,
    before: str = "",
) -> None:
    """Writes a complete Hub repository to `out_dir` atomically: weights, configurations, code and model card.

    Args:
        out_dir: a folder that does not exist yet.
        name: the model's name on its card.
        provenance: the origin of the weights, for the card.
        license: the Hub's id of the license of the weights, if it is known.
        before: the card of the source, whose metadata and hand-written sections are kept.

    Raises:
        ConversionError: the metadata of `before` is invalid.
        OSError: the folder cannot be written.
    """
    try:
        card = model_card(name, model.config, provenance, license=license, before=before)
    except ValueError as error:
        raise ConversionError(
            f"the model card of the source cannot be kept: {first_line(error, kind=False)}."
        ) from error
    with new_folder(out_dir) as staging:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        (staging / "README.md").write_text(card, encoding="utf-8")


def read_state_dict(path: Path, notes: list[str] | None = None) -> dict[str, torch.Tensor]:
    """Reads a state dict from a `.safetensors` file, or from a `.pth` file, where it may be the entry "model".

    Args:
        path: the file. A pickle is read by torch's restricted unpickler, after its names are checked: it may have only
            tensors and plain containers. It must be in an uncompressed zip archive: with compressed entries, or in the
            format before torch 1.6, a small file can make torch allocate any amount of memory.
        notes: gets a sentence about the weights that were taken if the file has several; see `take_weights`.

    Returns:
        Tensors on the CPU by key, which have at most as many bytes as the file. Keys, shapes and values are not
        checked.

    Raises:
        ConversionError: the file is missing, truncated, of another type, or contains more than tensors; or its tensors
            claim more bytes than the file has.
    """
    if path.is_dir():
        raise ConversionError(
            f"{path} is a folder; name the checkpoint file in it, such as {path / 'model_final.pth'}."
        )
    if not path.exists():
        raise ConversionError(f"{path} does not exist; name a Focoos checkpoint (.pth or .safetensors).")
    if not path.is_file():  # reading a pipe could block forever
        raise ConversionError(f"{path} is not a file; name a Focoos checkpoint (.pth or .safetensors).")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    state = _state_dict_of(take_weights(content, path, notes), path)
    # A tensor can be a view that repeats a single number, and several tensors can share one storage.
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if claimed > path.stat().st_size:
        raise ConversionError(f"{path}: its tensors have {claimed} bytes, more than the file; refused as forged.")
    return state


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConversionError(f"{path} is not a complete safetensors file ({error}); download it again.") from error


def _check_archive(path: Path) -> None:
    """Rejects anything but an uncompressed zip archive whose entries fit into the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        size = path.stat().st_size
        raise ConversionError(
            f"{path} ({size} bytes) is not a torch checkpoint, or a truncated one ({error}); download it again, or, if "
            "it is older than torch 1.6, load it there and save it once more with `torch.save`."
        ) from error
    if not any(entry.filename.endswith("data.pkl") for entry in entries):
        raise ConversionError(f"{path} is a zip archive, but not a torch checkpoint: it has no entry data.pkl.")
    compressed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if compressed is not None:
        raise ConversionError(
            f"{path}: the entry {compressed.filename!r} is compressed, which torch.save never does; refused."
        )
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ConversionError(f"{path}: its entries are larger than the file; refused as damaged or forged.")


def _read_pickle(path: Path) -> Any:
    _check_archive(path)
    try:
        _check_names(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"), path)  # the bytes that torch reads
        return torch.load(path, map_location="cpu", weights_only=True)
    except ConversionError:
        raise
    # torch raises RuntimeError for broken records; a malicious pickle can make its unpickler raise any exception.
    except Exception as error:
        reason = first_line(error, kind=False)
        raise ConversionError(f"{path} cannot be read as a torch checkpoint ({reason}); download it again.") from error


def _check_names(content: bytes, path: Path) -> None:
    """Rejects a pickle with names other than those of tensors and plain containers."""
    for instruction, argument, _ in pickletools.genops(content):
        name = str(argument).replace(" ", ".") if instruction.name == "GLOBAL" else instruction.name
        if name in ("STACK_GLOBAL", "INST") or (instruction.name == "GLOBAL" and not ALLOWED_NAMES.fullmatch(name)):
            shown = repr(name.removeprefix("__builtin__."))[1:-1]
            raise ConversionError(
                f"{path} holds `{shown}`, which is neither a tensor nor a plain container: "
                'refused. Save the weights alone, by `torch.save({"model": model.state_dict()}, path)`.'
            )


def take_weights(content: Any, path: Path, notes: list[str] | None = None) -> Any:
    """The weights in the content of a checkpoint: one of its entries, or the whole.

    If the training kept moving averages of the weights, these are taken, because it evaluated them, and not the weights
    of the last step. Buffers that were not averaged are those of the last step. A prefix of all keys is removed.

    Args:
        content: any value, from an untrusted file.
        path: the file, for error messages.
        notes: gets a sentence if averages were taken.

    Returns:
        The weights, or `content` itself if it is not a dictionary.

    Raises:
        ConversionError: averages are there, and lack a weight.
    """
    if not isinstance(content, dict):
        return content
    entry = next((name for name in STATES if isinstance(content.get(name), dict)), None)
    if entry is None:
        return _without_prefix(content)
    state = _without_prefix(content[entry])
    for name in AVERAGES:
        if not isinstance(content.get(name), dict) or not content[name]:
            continue
        averages = _without_prefix(content[name])
        lacking = [key for key in state if key not in averages and not str(key).endswith(BUFFERS)]
        if lacking:
            raise ConversionError(
                f"{path}: the averaged weights in the entry {name!r} lack {lacking[0]!r} of the entry {entry!r}: save "
                'the weights to convert alone, by `torch.save({"model": weights}, path)`.'
            )
        if notes is not None:
            notes.append(
                f"the averaged weights in the entry {name!r} are converted, which training evaluates, and not those of "
                f"the last step in {entry!r}"
            )
        return {**state, **{key: value for key, value in averages.items() if key in state}}
    return state


def _without_prefix(state: Mapping[Any, Any]) -> dict[Any, Any]:
    for prefix in PREFIXES:
        if all(isinstance(key, str) and key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _state_dict_of(state: Any, path: Path) -> dict[str, torch.Tensor]:
    if not isinstance(state, dict):
        raise ConversionError(
            f"{path} holds a {type(state).__name__} where a state dict was expected, bare or under the key 'model'."
        )
    if not state:
        raise ConversionError(f"{path} holds an empty state dict; there is nothing to convert.")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            found = ", ".join(repr(name) for name in list(state)[:5])
            raise ConversionError(
                f"{path}: the entry {key!r} is not a tensor ({type(value).__name__}); a state dict was expected, bare "
                f"or under the key 'model' (found the keys {found})."
            )
        if value.layout is not torch.strided or value.is_quantized:
            raise ConversionError(
                f"{path}: the entry {key!r} is a sparse or quantized tensor; save it dense, in float."
            )
        if value.device.type != "cpu":  # `map_location` does not move tensors without values
            raise ConversionError(
                f"{path}: the entry {key!r} has no values (its device is {value.device}); save the weights from a "
                "model that is on the CPU or a GPU."
            )
    return state


__all__ = [
    "NUM_LEVELS",
    "ConvertedModel",
    "check_keys",
    "check_weight",
    "drop_unused_levels",
    "measure_difference",
    "quiet",
    "read_state_dict",
    "take_weights",
    "write_model_folder",
]
