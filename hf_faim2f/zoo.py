"""The check for weights that are NaN or infinite: with them a model answers one class everywhere, and says nothing."""

import hashlib
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers.utils import logging

from .data.dataset import Description
from .errors import DamagedFileError, ModelError, first_line
from .hub_errors import is_transient
from .model.configuration_faim2f import FaiM2FConfig
from .model.image_processing_faim2f import FaiM2FImageProcessor
from .model.modeling_faim2f import FaiM2FForUniversalSegmentation


def first_not_finite(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer with a value that is NaN or infinite; None where all are finite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def check_finite(source: str | Path, model: nn.Module, error: type[Exception]) -> None:
    """Before a model answers, is trained further, or is exported.

    Args:
        source: the folder or Hub id that the weights came from, for the message.
        model: with its weights loaded.
        error: what is raised where a weight is not finite, with one sentence that says what to do.
    """
    name = first_not_finite(model)
    if name is not None:
        raise error(
            f"{source} has weights that are not finite, the first {name}: the training that wrote them diverged. Take "
            "an earlier checkpoint, or train again with a lower learning rate."
        )


# Loading weights without transformers' own report: what does not fit is told in one sentence by whoever loads.


@contextmanager
def quiet_loading() -> Iterator[None]:
    """A block in which transformers warns of nothing, such as by its table of weights of another shape."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def unfit_weights(info: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The names of weights that were missing, and of those that had another shape, sorted.

    Args:
        info: `output_loading_info` of transformers, whose 4.57 has names where 5.x has names with shapes.
    """
    mismatched = [entry if isinstance(entry, str) else str(entry[0]) for entry in info["mismatched_keys"]]
    return sorted(map(str, info["missing_keys"])), sorted(mismatched)


# A model's files from the Hub, compared with the hashes that the Hub names: clients themselves compare sizes alone.

# What a model is made of; code is not, for this package runs its own.
PATTERNS = [
    "config.json",
    "preprocessor_config.json",
    "README.md",
    "model*.safetensors",
    "model.safetensors.index.json",
]
# Seconds between tries; and after which a client has tried often enough by itself.
WAITS, PATIENCE = (0.5, 1.0), 10.0
SHA256 = re.compile(r"[0-9a-f]{64}")


def download_model(name: str, revision: str | None = None) -> Path:
    """The folder of a model of the Hub, in the cache; downloads that broke off are gone on with.

    Large files are kept in the cache under their SHA-256, which the Hub named; one that has another is taken out of it.

    Args:
        name: "owner/name".
        revision: a branch, tag or commit.

    Raises:
        DamagedFileError: a file arrived with other contents.
        Exception: whatever huggingface_hub raises where there is no such model, or no way to it.
    """
    folder = Path(_persistently(name, revision))
    for file in sorted(folder.glob("*.safetensors")):
        blob = file.resolve()
        # Small files have git's hash; and where the file system has no links, the name is the file's own.
        if SHA256.fullmatch(blob.name) and _sha256(blob) != blob.name:
            file.unlink()
            blob.unlink()
            raise DamagedFileError(
                f"{file.name} arrived without the SHA-256 that the Hub names, and was removed: load it again."
            )
    return folder


def _persistently(name: str, revision: str | None) -> str:
    """The folder, after some tries where the Hub or a connection fails at once: clients try different things again."""
    for wait in WAITS:
        started = time.monotonic()
        try:
            return snapshot_download(name, revision=revision, allow_patterns=PATTERNS)
        # Each HTTP library has its own; what will not pass, or was waited for long enough, is the caller's.
        except Exception as error:
            if not is_transient(error) or time.monotonic() - started > PATIENCE:
                raise
        time.sleep(wait)
    return snapshot_download(name, revision=revision, allow_patterns=PATTERNS)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# A model and its image processor from a folder or the Hub, or one sentence that says why not.

# Settings of the configuration that tell a model's labels.
LABELS = frozenset({"id2label", "label2id", "num_labels"})


def load_model(
    name: str | Path, *, new_weights: bool = False, begun_anew: "list[str] | None" = None, **overrides: Any
) -> tuple[FaiM2FForUniversalSegmentation, FaiM2FImageProcessor]:
    """The model and its processor.

    Args:
        name: a folder, or an id on the Hub. No code of it is run: the classes are this package's.
        new_weights: weights that `overrides` gave another shape begin anew; otherwise they are an error.
        begun_anew: gets the names of weights that did.
        overrides: settings of the configuration that shall differ, such as `id2label`.

    Raises:
        ModelError: there is no such model, it is of another kind, something of it is missing or does not fit, or a
            weight is not finite.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"{name} is no model's folder: it has no config.json.")
    kind = try_loading(name, "configuration", lambda: FaiM2FConfig.get_config_dict(str(name))[0]).get("model_type")
    if kind != FaiM2FConfig.model_type:
        raise ModelError(f"{name} is a model of type {kind!r}, not {FaiM2FConfig.model_type!r}.")
    place = folder if folder.is_dir() else try_loading(name, "files", lambda: download_model(str(name)))
    with quiet_loading():
        model, info = try_loading(
            name,
            "weights",
            lambda: FaiM2FForUniversalSegmentation.from_pretrained(
                str(place), output_loading_info=True, ignore_mismatched_sizes=True, **overrides
            ),
        )
    wrong, mismatched = unfit_weights(info)
    if not new_weights:
        wrong += mismatched
    if begun_anew is not None:
        begun_anew += mismatched
    if wrong:
        raise ModelError(
            f"The weights of {name} are not those of its config.json: {len(wrong)} are missing or of another shape, "
            f"the first {wrong[0]}."
        )
    check_finite(name, model, ModelError)
    processor = try_loading(name, "image processor", lambda: FaiM2FImageProcessor.from_pretrained(str(place)))
    model.config._name_or_path = str(name)  # not where the cache of this machine is
    if LABELS & set(overrides):
        # The processor's own stuff is of the labels that the model had.
        processor.label_ids_to_fuse = None
    _agree_on_stuff(name, model.config, processor)
    return model, processor


def _agree_on_stuff(name: str | Path, config: FaiM2FConfig, processor: FaiM2FImageProcessor) -> None:
    """The configuration says which classes are stuff; folders from before it did have it in the processor alone."""
    if config.label_ids_to_fuse is None:
        config.label_ids_to_fuse = processor.label_ids_to_fuse
    beyond = [label for label in config.label_ids_to_fuse or () if label >= config.num_labels]
    if beyond:
        raise ModelError(
            f"The image processor of {name} has the class {beyond[0]} in label_ids_to_fuse, but only the classes 0 to "
            f"{config.num_labels - 1}: mend preprocessor_config.json."
        )
    processor.take_labels_from(config)


def label_difference(name: str | Path, config: FaiM2FConfig, description: Description) -> str | None:
    """The first way in which a model's labels are not those of the data, as the beginning of a sentence; or None."""
    own = [config.id2label[index] for index in sorted(config.id2label)]
    if len(own) != len(description.labels):
        return f"{name} has {len(own)} classes, but {description.name} {len(description.labels)}"
    for index, (mine, theirs) in enumerate(zip(own, description.labels, strict=True)):
        if mine != theirs:
            return f"Class {index} is {mine!r} in {name}, but {theirs!r} in {description.name}"
    return None


def try_loading(name: str | Path, what: str, load: Any) -> Any:
    try:
        return load()
    # Whatever the network, the Hub, JSON, safetensors and transformers make of a name or of a stranger's files.
    except Exception as error:
        if Path(name).is_dir():
            raise ModelError(f"The {what} of {name} cannot be loaded: {first_line(error)}") from error
        raise ModelError(
            f"{name} is no folder here, and loading its {what} from the Hub failed: {first_line(error)}"
        ) from error


__all__ = ["DamagedFileError", "check_finite", "download_model", "first_not_finite", "quiet_loading", "unfit_weights"]
