"""Checkpoints of Mask2Former's own repository (detectron2): reads, converts and writes them as Hub folders."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from hf_faim2f.errors import ConversionError
from hf_faim2f.files import check_new_folder, md5_of, sha256_of
from hf_faim2f.hub.card import Provenance
from hf_faim2f.model.configuration_faim2f import FaiM2FConfig
from hf_faim2f.model.modeling_faim2f import FaiM2FForUniversalSegmentation

from .array_pickle import read_array_pickle
from .checkpoint import read_state_dict
from .converted_model import ConvertedModel, write_model_folder
from .mask2former_zoo_config import (
    PIXEL_DECODER,
    PREDICTOR,
    architecture_of,
    check_architecture,
    choose_description,
    image_processor,
    model_configuration,
)
from .mask2former_zoo_weights import convert_state_dict

SUFFIXES = (".pkl", ".pth", ".pt", ".safetensors")
# Buffers that torch and transformers' Swin compute when a model is built.
COMPUTED = ("relative_position_index", "num_batches_tracked")


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
    described = choose_description(source, md5_of(source), config, subtask)
    state = read_weights(source)
    # Checked before anything is built, so that no configuration can require more memory than the file's weights.
    check_architecture(architecture_of(state, source), described, source)
    ours = model_configuration(described)
    processor = image_processor(described, ours)
    converted = convert_state_dict(state, ours, str(source))
    del state
    model = build_model(ours, converted, str(source))
    provenance = Provenance(source.name, sha256_of(source), library="Mask2Former", model=described.name)
    write_model_folder(out_dir, out_dir.name, model, processor, provenance)
    return ConvertedModel(described.name, described.notes)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, by the keys of the zoo's newest format.

    Args:
        path: a pickle of arrays, as published in the zoo, or a file saved by torch or safetensors; untrusted.

    Raises:
        ConversionError: the file is missing, truncated, of another type, or contains more than tensors and containers.
    """
    if not path.is_file():
        raise ConversionError(f"{path} does not exist; name a checkpoint of Mask2Former (.pkl or .pth).")
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if is_archive or path.suffix == ".safetensors":
        state = read_state_dict(path)
    else:
        state = _tensors(_arrays(read_array_pickle(path), path), path)
    # A tensor can be a view that repeats a single number, and several tensors can share one storage.
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if claimed > path.stat().st_size:
        raise ConversionError(f"{path}: its tensors have {claimed} bytes, more than the file; refused as forged.")
    return {_newest_name(key): tensor for key, tensor in state.items()}


def _arrays(content: Any, path: Path) -> dict[str, np.ndarray]:
    arrays = content["model"] if isinstance(content, dict) and isinstance(content.get("model"), dict) else content
    if not isinstance(arrays, dict):
        raise ConversionError(
            f"{path} holds a {type(content).__name__} where a dictionary of arrays was expected, bare or under the key "
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
    with _quiet():
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' warnings about buffers that are not in the checkpoint."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


__all__ = ["build_model", "convert", "is_zoo_checkpoint", "read_weights"]
