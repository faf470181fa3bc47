"""A model's files from the Hub, compared with the hashes that the Hub names: clients themselves compare sizes alone."""

import hashlib
import re
import time
from pathlib import Path

from huggingface_hub import snapshot_download

from .hub_errors import is_transient

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


class DamagedFileError(ValueError):
    """A file is not what the Hub says that it is. One sentence."""


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


__all__ = ["DamagedFileError", "download_model"]
