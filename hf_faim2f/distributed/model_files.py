"""The model of a run: the same files on every machine, and in every process that goes on with it."""

import hashlib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download

from ..runtime.network import first_line
from .errors import BulkError

# What a runtime reads of a model's folder; a changed card is no other model.
PATTERNS = (
    "config.json", "preprocessor_config.json", "processor_config.json", "engine.json", "*.safetensors",
    "*.safetensors.index.json", "*.onnx", "*.onnx_data", "*.onnx.data", "*.engine",
)  # fmt: skip
CHUNK = 1 << 20


@dataclass(frozen=True)
class ModelFiles:
    """A model, pinned.

    Args:
        name: what it was called.
        place: a folder's absolute path, or an id on the Hub.
        revision: of an id on the Hub, its commit.
        digest: of all files that a runtime reads.
    """

    name: str
    place: str
    revision: str | None
    digest: str

    def here(self) -> Path:
        """The folder of it on this machine; from the Hub it is downloaded, where it is not yet.

        Raises:
            BulkError: it is not here, or not the same.
        """
        if self.revision is None:
            folder = Path(self.place)
            if not folder.is_dir():
                raise BulkError(
                    f"There is no folder {self.place} on a machine of the cluster: put the model where all of them see "
                    "it, or name one of the Hub."
                )
        else:
            folder = _download(self.place, self.revision)
        if _digest(folder) != self.digest:
            raise BulkError(
                f"The model {self.place} has other files on a machine of the cluster than where the run was started, "
                "or has changed since: make them the same, or begin anew in another folder."
            )
        return folder


def pin_model(name: str) -> tuple[ModelFiles, Path]:
    """The model of a folder or of the Hub, and its folder here.

    Raises:
        BulkError: there is none.
    """
    folder = Path(name)
    if folder.is_dir():
        return ModelFiles(name, str(folder.absolute()), None, _digest(folder)), folder
    folder = _download(name, None)
    return ModelFiles(name, name, folder.name, _digest(folder)), folder


def _download(name: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    except Exception as error:  # whatever a name, the network and the library make of it
        raise BulkError(
            f"The model {name}, which is no folder here, cannot be had of the Hub: {first_line(error)}."
        ) from error


def _digest(folder: Path) -> str:
    """Of the names and contents of what a runtime reads."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in PATTERNS):
            own = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    own.update(chunk)
            total.update(f"{path.name}\0{own.hexdigest()}\0".encode())
    return total.hexdigest()


__all__ = ["PATTERNS", "ModelFiles", "pin_model"]
