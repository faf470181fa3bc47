"""Opening a model: its configuration, image processor and weights, from a folder or the Hub.

`open_model` is the only place that loads weights of this family. No code of the folder is run: the classes are this
package's. Whatever a damaged or foreign folder, the network or the libraries do is raised as one sentence.

Files from the Hub are compared with the SHA-256 that the Hub lists for them; its own client compares sizes only.
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

# The files that make up a model. Remote code is not among them.
MODEL_FILES = [
    "config.json",
    "preprocessor_config.json",
    "README.md",
    "model*.safetensors",
    "model.safetensors.index.json",
]
# Seconds to wait before the second and third attempt, unless the first took longer than PATIENCE.
WAITS, PATIENCE = (0.5, 1.0), 10.0
SHA256 = re.compile(r"[0-9a-f]{64}")
# Settings of a configuration that change its labels.
LABEL_SETTINGS = frozenset({"id2label", "label2id", "num_labels"})

_Loaded = TypeVar("_Loaded")


def open_model(
    name: str | Path, *, error: type[ValueError] = ModelError
) -> tuple[FaiM2FForUniversalSegmentation, FaiM2FImageProcessor]:
    """Opens a model in float32, on the CPU and in evaluation mode, with its image processor.

    Args:
        name: a folder, or an id on the Hub.
        error: the class of the error.

    Raises:
        ModelError: there is no such model, it is of another type, something of it is missing or does not fit, or a
            weight is not finite. (Or `error`.)
    """
    model, processor, _ = _open(name, error, {})
    return model, processor


def open_with_settings(
    name: str | Path, **settings: Any
) -> tuple[FaiM2FForUniversalSegmentation, FaiM2FImageProcessor, list[str]]:
    """Opens a model with some settings of its configuration changed, such as `id2label`.

    Args:
        name: as in `open_model`.
        settings: of `FaiM2FConfig`.

    Returns:
        The model, its image processor, and the sorted names of the weights whose shape the settings changed: they are
        new and random.

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
    model.config._name_or_path = str(name)  # and not a folder of this machine's cache
    if LABEL_SETTINGS & set(settings):
        processor.label_ids_to_fuse = None  # they belong to the old labels
    _agree_on_stuff(name, model.config, processor, error)
    return model.eval(), processor, mismatched


def model_type(name: str | Path, error: type[ValueError] = ModelError) -> str | None:
    """What a folder or an id on the Hub says in its config.json of its type.

    Raises:
        ModelError: there is no such model. (Or `error`.)
    """
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise error(f"{name} is not a model folder: it has no config.json.")
    values = try_loading(name, "configuration", lambda: FaiM2FConfig.get_config_dict(str(name))[0], error)
    kind: str | None = values.get("model_type")
    return kind


def check_type(name: str | Path, error: type[ValueError] = ModelError) -> None:
    """Raises `error` for a model of another type than this package's, or for none."""
    kind = model_type(name, error)
    if kind != FaiM2FConfig.model_type:
        raise error(f"{name} is a model of type {kind!r}, not {FaiM2FConfig.model_type!r}.")


def load_weights(
    name: str | Path, load: Callable[..., tuple[nn.Module, Mapping[str, Any]]], error: type[ValueError] = ModelError
) -> tuple[Any, list[str], list[str]]:
    """Loads weights without transformers' own report of those that do not fit.

    Args:
        name: where they come from, for the message.
        load: `from_pretrained` of a class, which gets the keywords.
        error: the class of the error.

    Returns:
        The model in float32, and the sorted names of the weights that are missing and of those of another shape.
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
    # transformers 4.57 lists names, 5.x tuples of a name and two shapes.
    mismatched = [entry if isinstance(entry, str) else str(entry[0]) for entry in info["mismatched_keys"]]
    return model, sorted(map(str, info["missing_keys"])), sorted(mismatched)


def first_not_finite(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer with a value that is NaN or infinite; None if all are finite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def check_finite(source: str | Path, model: nn.Module, error: type[Exception] = ModelError) -> None:
    """Raises `error` for a model with NaN or infinite weights: it would answer one class everywhere, without a word.

    Args:
        source: the folder or Hub id that the weights come from, for the message.
        model: with its weights loaded.
        error: the class of the error.
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
    """Makes the configuration and the image processor name the same stuff classes.

    The configuration decides. In folders written before it had them, only the image processor has.
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
    """The first difference between the labels of a model and of a data set, as the start of a sentence, or None."""
    own = [config.id2label[index] for index in sorted(config.id2label)]
    if len(own) != len(description.labels):
        return f"{name} has {len(own)} classes, but {description.name} {len(description.labels)}"
    for index, (mine, theirs) in enumerate(zip(own, description.labels, strict=True)):
        if mine != theirs:
            return f"Class {index} is {mine!r} in {name}, but {theirs!r} in {description.name}"
    return None


def download_model(name: str, revision: str | None = None) -> Path:
    """Downloads a model of the Hub into the cache, resuming a download that was interrupted.

    Args:
        name: "owner/name".
        revision: a branch, tag or commit.

    Returns:
        Its folder in the cache.

    Raises:
        DamagedFileError: a file differs from what the Hub lists; it is removed from the cache.
        Exception: whatever huggingface_hub raises if there is no such model, or if the Hub cannot be reached.
    """
    folder = Path(_download(name, revision))
    for file in sorted(folder.glob("*.safetensors")):
        # The cache keeps large files under the SHA-256 that the Hub lists, and small ones under git's hash. Without
        # symbolic links it keeps them under their own names.
        blob = file.resolve()
        if SHA256.fullmatch(blob.name) and sha256_of(blob) != blob.name:
            file.unlink()
            blob.unlink()
            raise DamagedFileError(
                f"{file.name} arrived without the SHA-256 that the Hub lists, and was removed: load it again."
            )
    return folder


def _download(name: str, revision: str | None) -> str:
    """Downloads with retries: what huggingface_hub itself retries differs between its versions."""
    for wait in WAITS:
        started = time.monotonic()
        try:
            return snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES)
        # The HTTP libraries that huggingface_hub uses have no common base class.
        except Exception as error:
            if not is_transient(error) or time.monotonic() - started > PATIENCE:
                raise
        time.sleep(wait)
    return snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES)


def try_loading(
    name: str | Path, what: str, load: Callable[[], _Loaded], error: type[ValueError] = ModelError
) -> _Loaded:
    """Calls `load`, and raises `error` with one sentence for whatever it raises.

    Args:
        name: the folder or Hub id, for the message.
        what: what is loaded, as in "The {what} of {name}".
        load: reads files of a stranger, or the network; any exception is expected of it.
        error: the class of the error.
    """
    try:
        return load()
    except Exception as reason:
        if Path(name).is_dir():
            raise error(f"The {what} of {name} cannot be loaded: {first_line(reason)}.") from reason
        raise error(
            f"{name} is not a folder here, and loading its {what} from the Hub failed: {first_line(reason)}."
        ) from reason


# What marks a folder as having files for a runtime, apart from torch's weights.
RUNTIME_FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.engine"}


def runtimes_of(name: str | Path) -> list[str]:
    """The runtimes that a model's folder has files for.

    Of a folder that has none, and of a Hub id, "torch", whose error message then says what is missing.
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
