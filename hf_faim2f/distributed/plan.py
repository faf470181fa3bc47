"""The plan of a run: the images of each part, and the model and settings for predicting them.

The plan is written before anything else and never changed. In the run's folder, `_run/pieces.arrow` lists the pieces of
each part. `_run/plan.json`, which is written last and marks the folder as a run, holds the settings and a digest of its
contents. A process that continues the run reads the plan; a worker reads the pieces of its part. The model is pinned by
a digest of its files, so that all machines and later processes use the same one.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..download import download_model
from ..errors import BulkError, ModelError, first_line
from ..files import sha256_of, write_whole
from ..zoo import published_source, resolve
from .parts import PIECES_SCHEMA, Piece, describe_part, escape_path, from_batch, into_parts, to_batch

# The files of a model's folder that a runtime reads. Others, such as the card, may change during a run.
PATTERNS = (
    "config.json", "preprocessor_config.json", "processor_config.json", "engine.json", "compiled.json",
    "format.json", "*.safetensors", "*.safetensors.index.json", "*.onnx", "*.onnx_data", "*.onnx.data", "*.engine",
    "*.pt2", "openvino_model.*", "*.pte", "*.tflite",
)  # fmt: skip
# Files that are read in a folder, but not downloaded.
LOCAL = ("pytorch_model*.bin*",)
# Runtimes that open without a GPU, so that errors are found before any worker starts.
OPEN_HERE = ("torch", "onnxruntime", "openvino")
FORMAT = 1
FOLDER, PLAN, PIECES, LOCK, UNFINISHED, TRIES = "_run", "plan.json", "pieces.arrow", "lock", "unfinished", "tries"
# Limit on plan.json in bytes; its size does not depend on the number of images.
MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class ModelFiles:
    """A pinned model.

    Args:
        name: the model's name on the command line.
        place: a folder's absolute path, or a Hub id.
        revision: the commit of a Hub id; None for a folder; "" for the folder of a converted model in the cache, which
            other machines look up or convert by the model's name.
        digest: a digest of all files that a runtime reads.
    """

    name: str
    place: str
    revision: str | None
    digest: str

    def here(self) -> Path:
        """The model's folder on this machine; a model on the Hub is downloaded unless it is in the cache.

        Raises:
            BulkError: the folder is missing, its files differ, or the model cannot be downloaded.
        """
        if self.revision:
            folder = _download(self.place, self.revision)
        else:
            folder = Path(self.place)
            if self.revision == "" and not folder.is_dir():
                folder = resolve(self.name, error=BulkError)
            if not folder.is_dir():
                raise BulkError(
                    f"There is no folder {self.place} on a machine of the cluster: put the model where all of them see "
                    "it, or name one on the Hub."
                )
        if _digest(folder) != self.digest:
            raise BulkError(
                f"The model {self.place} has other files on a machine of the cluster than where the run was started, "
                "or has changed since: make them the same, or start again in another folder."
            )
        return folder


def pin_model(name: str) -> tuple[ModelFiles, Path]:
    """Pins the files of a model, given by a name as in `zoo.resolve`; returns it and its folder on this machine.

    Raises:
        BulkError: there is no such model.
    """
    on_the_hub = False
    try:
        on_the_hub = published_source(name) is None
        folder = resolve(name, files=PATTERNS)
    except ModelError as reason:
        where = f"The model {name} cannot be downloaded from the Hub: " if on_the_hub else ""
        raise BulkError(f"{where}{reason}") from reason
    digest = _digest(folder)
    if Path(name).is_dir():
        return ModelFiles(name, str(folder.absolute()), None, digest), folder
    if folder.parent.name == "snapshots":  # of the Hub's cache, which names folders after commits
        return ModelFiles(name, name, folder.name, digest), folder
    return ModelFiles(name, str(folder.absolute()), "", digest), folder


def _download(name: str, revision: str) -> Path:
    try:
        return download_model(name, revision, PATTERNS)
    except Exception as error:  # depends on the name, the network and the library
        raise BulkError(
            f"The model {name}, which is not a folder here, cannot be downloaded from the Hub: {first_line(error)}."
        ) from error


def _digest(folder: Path) -> str:
    """A digest of the names and contents of the files that a runtime reads."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in (*PATTERNS, *LOCAL)):
            total.update(f"{path.name}\0{sha256_of(path)}\0".encode())
    return total.hexdigest()


@dataclass(frozen=True)
class Settings:
    """The settings that determine the results, which must not change when a run is continued.

    The batch size and the number of workers are not among them.
    """

    model: str  # the digest of its files
    runtime: str
    precision: str | None
    subtask: str | None  # None for the task that the model was trained for
    threshold: float | None
    images: str  # the digest of the images, see `digest_of`
    part_size: int
    version: str  # of this package


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Args:
        out: the absolute path of the run's folder.
        settings: the settings that determine the results.
        model: the pinned model.
        parts: number of parts.
        images: number of images in all parts.
        digest: a digest of the plan's contents.
    """

    out: Path
    settings: Settings
    model: ModelFiles
    parts: int
    images: int
    digest: str

    @property
    def folder(self) -> Path:
        """The folder `_run` beside the parts."""
        return self.out / FOLDER

    @property
    def unfinished(self) -> Path:
        """The folder for temporary files."""
        return self.folder / UNFINISHED

    @property
    def attempts(self) -> Path:
        """The folder with the record of each part's attempts; see `workers.Attempts`."""
        return self.folder / TRIES

    def part(self, number: int) -> Path:
        """The Parquet file of a part."""
        return self.out / f"part-{number:05}-of-{self.parts:05}.parquet"

    def pieces(self, number: int) -> list[Piece]:
        """The pieces of a part.

        Raises:
            BulkError: the plan's file is damaged.
        """
        path = self.folder / PIECES
        try:
            with pa.memory_map(str(path)) as file:
                return from_batch(pa.ipc.open_file(file).get_batch(number))
        except (OSError, pa.ArrowException, IndexError, ValueError) as error:
            raise BulkError(f"{path} cannot be read: {error}; start again in another folder.") from error

    def errors_in(self, number: int) -> int | None:
        """The number of unusable images in a finished part; None if the part is not finished."""
        found = describe_part(self.part(number))
        if found is None:
            return None
        rows, about = found
        ours = about.get("digest") == self.digest and about.get("part") == number and about.get("images") == rows
        return int(about["errors"]) if ours else None

    def about(self, number: int, images: int) -> dict[str, Any]:
        """The metadata of a part's file."""
        return {
            "digest": self.digest,
            "part": number,
            "images": images,
            "model": escape_path(self.model.name),
            **{f"{name}_digest" if name in ("model", "images") else name: value
               for name, value in asdict(self.settings).items()},
        }  # fmt: skip


def digest_of(pieces: Sequence[Piece], stamps: Iterable[str] = ()) -> str:
    """A digest of images: their paths and keys, and stamps that change when a file changes.

    Not of the commit on the Hub: a new one may have changed only the dataset's card.
    """
    total = hashlib.sha256()
    for piece in pieces:
        values = [os.fsencode(piece.path).hex(), piece.key, piece.first, piece.count, piece.column, piece.repo]
        total.update(json.dumps(values).encode() + b"\n")
    for stamp in stamps:
        total.update(stamp.encode() + b"\n")
    return total.hexdigest()


def check_folder(out: Path) -> None:
    """Raises BulkError unless a run can be started or continued in a folder."""
    if out.exists() and not out.is_dir():
        raise BulkError(f"{out} is a file: choose another folder for --out.")
    if out.is_dir() and not (out / FOLDER / PLAN).is_file() and any(path.name != FOLDER for path in out.iterdir()):
        raise BulkError(f"{out} is not empty, and no run of --ray began in it: choose a new folder for --out.")


def begin(out: Path, pieces: Sequence[Piece], settings: Settings, model: ModelFiles) -> Plan:
    """Writes the plan of a new run, or reads the plan of the run in this folder to continue it.

    The folder must be `locked`.

    Raises:
        BulkError: the run in this folder has other settings.
        OSError: a file cannot be written.
    """
    out = out.absolute()
    path = out / FOLDER / PLAN
    if path.is_file():
        plan = read_plan(out)
        _check_same(plan, settings)
    else:
        plan = _write(out, pieces, settings, model)
    # Remove temporary files of a killed process.
    for folder in (plan.unfinished, plan.attempts):
        folder.mkdir(exist_ok=True)
    for partial in plan.unfinished.iterdir():
        partial.unlink(missing_ok=True)
    return plan


def _write(out: Path, pieces: Sequence[Piece], settings: Settings, model: ModelFiles) -> Plan:
    keys = {piece.key for piece in pieces}
    if len(keys) != len(pieces):
        raise BulkError("Two of the images have names that differ only in unprintable characters: rename one.")
    folder = out / FOLDER
    (folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
    count = 0

    def write(file: Any) -> None:
        nonlocal count
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(file, PIECES_SCHEMA, options=options) as writer:
            for own in into_parts(pieces, settings.part_size):
                writer.write_batch(to_batch(own))
                count += 1

    write_whole(folder / PIECES, write, beside=folder / UNFINISHED, durable=True)
    content = {
        "format": FORMAT,
        "parts": count,
        "images": sum(piece.count for piece in pieces),
        "model": asdict(model),
        "settings": asdict(settings),
    }
    content["digest"] = sha256_of(json.dumps(content, sort_keys=True).encode())
    text = json.dumps(content, indent=1).encode()
    write_whole(folder / PLAN, text, beside=folder / UNFINISHED, durable=True)
    return read_plan(out)


def read_plan(out: Path) -> Plan:
    """Reads the plan of the run in a folder.

    Raises:
        BulkError: the plan is missing or damaged.
    """
    path = out / FOLDER / PLAN
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MOST_BYTES))
        if content["format"] != FORMAT:
            raise ValueError("it is of another version of this package")
        digest = content.pop("digest")
        if sha256_of(json.dumps(content, sort_keys=True).encode()) != digest:
            raise ValueError("it was changed")
        settings, model = Settings(**content["settings"]), ModelFiles(**content["model"])
        return Plan(out, settings, model, content["parts"], content["images"], digest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BulkError(f"The plan {path} cannot be read: {error}.") from error


def _check_same(plan: Plan, settings: Settings) -> None:
    then, now = asdict(plan.settings), asdict(settings)
    different = [field.name for field in fields(Settings) if then[field.name] != now[field.name]]
    if not different:
        return
    words = []
    for name in different:
        # Digests are not informative for the user.
        digests = {"images": "other or edited images", "model": "another model"}
        words.append(digests.get(name, f"{name.replace('_', ' ')} {then[name]}, now {now[name]}"))
    raise BulkError(
        f"The run in {plan.out} was begun with other settings ({'; '.join(words)}): choose a new folder for --out, or "
        "repeat the earlier settings."
    )


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Creates a folder and locks it against other runs; the lock of a process that dies is released.

    Raises:
        BulkError: another run has locked the folder.
    """
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows: without the lock, two runs would only do the same work twice
        yield
        return
    with (folder / LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BulkError(f"Another run is writing into {out}: wait for it, or choose another folder.") from error
        except OSError:  # the file system has no locks
            pass
        yield


__all__ = [
    "OPEN_HERE",
    "PATTERNS",
    "ModelFiles",
    "Plan",
    "Settings",
    "begin",
    "check_folder",
    "digest_of",
    "locked",
    "pin_model",
    "read_plan",
]
