"""Opens a model: its configuration, image processor and weights, from a folder or the Hub.

All commands and `Predictor` load weights through `open_model`. It runs no code from the folder, only this package's
classes. Every error, whether from a damaged folder, the network or a library, becomes a `ModelError` with a message of
one sentence.

Files from the Hub are compared with the SHA-256 listed there; huggingface_hub compares only sizes.
"""

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers.utils import logging

from .data.dataset import Description
from .errors import DamagedFileError, ModelError, first_line
from .files import sha256_of
from .hub_errors import is_transient
from .model.configuration_faim2f import FaiM2FConfig
from .model.image_processing_faim2f import FaiM2FImageProcessor
from .model.modeling_faim2f import FaiM2FForUniversalSegmentation

# The files to download for a model; no remote code.
MODEL_FILES = [
    "config.json",
    "preprocessor_config.json",
    "README.md",
    "model*.safetensors",
    "model.safetensors.index.json",
]
# Seconds to wait before the second and the third attempt. No retry after an attempt that took longer than PATIENCE.
WAITS, PATIENCE = (0.5, 1.0), 10.0
SHA256 = re.compile(r"[0-9a-f]{64}")
# Settings of the configuration that change the labels.
LABEL_SETTINGS = frozenset({"id2label", "label2id", "num_labels"})

_Loaded = TypeVar("_Loaded")


def open_model(
    name: str | Path, *, error: type[ValueError] = ModelError
) -> tuple[FaiM2FForUniversalSegmentation, FaiM2FImageProcessor]:
    """Opens a model in float32, on the CPU and in evaluation mode, with its image processor.

    Args:
        name: a folder, or a Hub id.
        error: the exception class to raise.

    Raises:
        ModelError: there is no such model, it is of another type, its files are incomplete or inconsistent, or a weight
            is not finite. (Or `error`, if given.)
    """
    model, processor, _ = _open(name, error, {})
    return model, processor


def open_with_settings(
    name: str | Path, **settings: Any
) -> tuple[FaiM2FForUniversalSegmentation, FaiM2FImageProcessor, list[str]]:
    """Opens a model with some settings of its configuration changed, such as `id2label`.

    Args:
        name: as in `open_model`.
        settings: parameters of `FaiM2FConfig`.

    Returns:
        The model, its image processor, and the sorted names of the weights whose shape the settings changed: these are
        randomly initialized.

    Raises:
        ModelError: as in `open_model`.
    """
    return _open(name, ModelError, settings)


def open_settings(
    name: str | Path, *, error: type[ValueError] = ModelError
) -> tuple[FaiM2FConfig, FaiM2FImageProcessor]:
    """The configuration and the image processor of a model, without its weights.

    Args:
        name, error: as in `open_model`.

    Raises:
        ModelError: as in `open_model`.
    """
    check_type(name, error)
    config = try_loading(name, "configuration", lambda: FaiM2FConfig.from_pretrained(str(name)), error)
    processor = try_loading(name, "image processor", lambda: FaiM2FImageProcessor.from_pretrained(str(name)), error)
    _agree_on_stuff(name, config, processor, error)
    return config, processor


def _open(
    name: str | Path, error: type[ValueError], settings: Mapping[str, Any]
) -> tuple[FaiM2FForUniversalSegmentation, FaiM2FImageProcessor, list[str]]:
    check_type(name, error)
    place = str(name if Path(name).is_dir() else try_loading(name, "files", lambda: download_model(str(name)), error))
    processor = try_loading(name, "image processor", lambda: FaiM2FImageProcessor.from_pretrained(place), error)
    model, missing, mismatched = load_weights(
        name, lambda **how: FaiM2FForUniversalSegmentation.from_pretrained(place, **how, **settings), error
    )
    wrong = missing if settings else missing + mismatched
    if wrong:
        raise error(
            f"The weights of {name} are not those of its config.json: {len(wrong)} are missing or of another shape, "
            f"the first {wrong[0]}."
        )
    check_finite(name, model, error)
    model.config._name_or_path = str(name)  # not the path in the local cache
    if LABEL_SETTINGS & set(settings):
        processor.label_ids_to_fuse = None  # these are ids of the old labels
    _agree_on_stuff(name, model.config, processor, error)
    return model.eval(), processor, mismatched


def model_type(name: str | Path, error: type[ValueError] = ModelError) -> str | None:
    """The `model_type` in the config.json of a folder or Hub id.

    Raises:
        ModelError: there is no such model. (Or `error`, if given.)
    """
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise error(f"{name} is not a model folder: it has no config.json.")
    values = try_loading(name, "configuration", lambda: FaiM2FConfig.get_config_dict(str(name))[0], error)
    kind: str | None = values.get("model_type")
    return kind


def check_type(name: str | Path, error: type[ValueError] = ModelError) -> None:
    """Raises `error` if there is no such model, or it is not of this package's type."""
    kind = model_type(name, error)
    if kind != FaiM2FConfig.model_type:
        raise error(f"{name} is a model of type {kind!r}, not {FaiM2FConfig.model_type!r}.")


def load_weights(
    name: str | Path, load: Callable[..., tuple[nn.Module, Mapping[str, Any]]], error: type[ValueError] = ModelError
) -> tuple[Any, list[str], list[str]]:
    """Loads weights without transformers' own report on missing and mismatched ones.

    Args:
        name: the folder or Hub id, for error messages.
        load: calls `from_pretrained` of a class with the keywords that it is given.
        error: the exception class to raise.

    Returns:
        The model in float32, the sorted names of the missing weights, and those of the weights with another shape.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = try_loading(
            name,
            "weights",
            lambda: load(dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True),
            error,
        )
    finally:
        logging.set_verbosity(verbosity)
    # transformers 4.57 returns names, 5.x tuples of a name and two shapes.
    mismatched = [entry if isinstance(entry, str) else str(entry[0]) for entry in info["mismatched_keys"]]
    return model, sorted(map(str, info["missing_keys"])), sorted(mismatched)


def first_not_finite(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer with a value that is NaN or infinite; None if all are finite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def check_finite(source: str | Path, model: nn.Module, error: type[Exception] = ModelError) -> None:
    """Raises `error` if a model has NaN or infinite weights: it would silently predict a single class everywhere.

    Args:
        source: the folder or Hub id of the weights, for the message.
        model: a model whose weights are loaded.
        error: the exception class to raise.
    """
    name = first_not_finite(model)
    if name is not None:
        raise error(
            f"{source} has weights that are not finite, the first {name}: the training that wrote them diverged. Take "
            "an earlier checkpoint, or train again with a lower learning rate."
        )


def _agree_on_stuff(
    name: str | Path, config: FaiM2FConfig, processor: FaiM2FImageProcessor, error: type[ValueError]
) -> None:
    """Makes the configuration and the image processor agree on the stuff classes.

    The configuration takes precedence. In older folders, only the image processor has them.
    """
    if config.label_ids_to_fuse is None:
        config.label_ids_to_fuse = processor.label_ids_to_fuse
    beyond = [label for label in config.label_ids_to_fuse or () if label >= config.num_labels]
    if beyond:
        raise error(
            f"The image processor of {name} has the class {beyond[0]} in label_ids_to_fuse, but only the classes 0 to "
            f"{config.num_labels - 1}: correct preprocessor_config.json."
        )
    processor.take_labels_from(config)


def label_difference(name: str | Path, config: FaiM2FConfig, description: Description) -> str | None:
    """The first difference between the labels of a model and of a dataset, as the start of a sentence, or None."""
    own = [config.id2label[index] for index in sorted(config.id2label)]
    if len(own) != len(description.labels):
        return f"{name} has {len(own)} classes, but {description.name} {len(description.labels)}"
    for index, (mine, theirs) in enumerate(zip(own, description.labels, strict=True)):
        if mine != theirs:
            return f"Class {index} is {mine!r} in {name}, but {theirs!r} in {description.name}"
    return None


def download_model(name: str, revision: str | None = None) -> Path:
    """Downloads a Hub model to the cache, resuming an interrupted download.

    Args:
        name: "owner/name".
        revision: a branch, tag or commit.

    Returns:
        The model's folder in the cache.

    Raises:
        DamagedFileError: a file's SHA-256 differs from the one listed on the Hub; the file is removed from the cache.
        Exception: any exception of huggingface_hub, if there is no such model or the Hub cannot be reached.
    """
    folder = Path(_download(name, revision))
    for file in sorted(folder.glob("*.safetensors")):
        # The cache names large files after the SHA-256 listed on the Hub, and small ones after git's hash. Without
        # symbolic links, it keeps the original names.
        blob = file.resolve()
        if SHA256.fullmatch(blob.name) and sha256_of(blob) != blob.name:
            file.unlink()
            blob.unlink()
            raise DamagedFileError(
                f"{file.name} arrived without the SHA-256 that the Hub lists, and was removed: load it again."
            )
    return folder


def _download(name: str, revision: str | None) -> str:
    """Downloads with retries, because versions of huggingface_hub differ in what they retry themselves."""
    for wait in WAITS:
        started = time.monotonic()
        try:
            return snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES)
        # The exceptions of the HTTP libraries that huggingface_hub uses have no common base class.
        except Exception as error:
            if not is_transient(error) or time.monotonic() - started > PATIENCE:
                raise
        time.sleep(wait)
    return snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES)


def try_loading(
    name: str | Path, what: str, load: Callable[[], _Loaded], error: type[ValueError] = ModelError
) -> _Loaded:
    """Calls `load`, and turns any exception into `error` with a one-sentence message.

    Args:
        name: the folder or Hub id, for the message.
        what: what is loaded, as in "The {what} of {name}".
        load: reads untrusted files or the network, and may raise any exception.
        error: the exception class to raise.
    """
    try:
        return load()
    except Exception as reason:
        if Path(name).is_dir():
            raise error(f"The {what} of {name} cannot be loaded: {first_line(reason)}.") from reason
        raise error(
            f"{name} is not a folder here, and loading its {what} from the Hub failed: {first_line(reason)}."
        ) from reason


# The file whose presence shows that a folder supports a runtime; torch needs *.safetensors.
RUNTIME_FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.engine"}


def runtimes_of(name: str | Path) -> list[str]:
    """The runtimes for which a model's folder has files.

    For a Hub id, or a folder without any, this is "torch"; loading then raises an error that names the missing file.
    """
    folder = Path(name)
    able = [runtime for runtime, file in RUNTIME_FILES.items() if (folder / file).is_file()]
    if not able or any(folder.glob("*.safetensors*")):
        able.insert(0, "torch")
    return able


__all__ = [
    "DamagedFileError",
    "check_finite",
    "check_type",
    "download_model",
    "first_not_finite",
    "label_difference",
    "load_weights",
    "model_type",
    "open_model",
    "open_settings",
    "open_with_settings",
    "runtimes_of",
    "try_loading",
]
