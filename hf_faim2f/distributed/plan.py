"""The model of a run: the same files on every machine, and in every process that goes on with it."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pyarrow as pa
from huggingface_hub import snapshot_download

from ..errors import BulkError, first_line
from ..files import sha256_of, write_whole
from .parts import describe_part
from .pieces import SCHEMA, Piece, from_batch, into_parts, printable, to_batch

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


# The plan of a run: which part holds which images, and how they are predicted; written first, and never changed.
#
# In the folder of the run, `_run/pieces.arrow` has the pieces of each part, and `_run/plan.json`, with which the run
# begins to exist, the settings and a digest of both. A process that goes on reads the plan, and a worker one part of
# it.

FORMAT = 1
FOLDER, PLAN, PIECES, LOCK, UNFINISHED, TRIES = "_run", "plan.json", "pieces.arrow", "lock", "unfinished", "tries"
# A plan is as large as its settings, whatever the images.
MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Settings:
    """What decides the results, and so must stay the same while a run goes on.

    How many images go through the network together does not, nor which workers there are.
    """

    model: str  # the digest of its files
    runtime: str
    precision: str | None
    subtask: str | None  # None: what the model was trained for
    threshold: float | None
    images: str  # a digest
    part_size: int
    version: str  # of this package


@dataclass(frozen=True)
class Plan:
    """A run.

    Args:
        out: its folder, absolute.
        settings: see there.
        model: its model.
        parts: how many.
        images: how many, all parts together.
        digest: of all of this.
    """

    out: Path
    settings: Settings
    model: ModelFiles
    parts: int
    images: int
    digest: str

    @property
    def folder(self) -> Path:
        """What is beside the parts."""
        return self.out / FOLDER

    @property
    def unfinished(self) -> Path:
        """Where files are while they are written."""
        return self.folder / UNFINISHED

    @property
    def tries(self) -> Path:
        """Where is remembered at what workers died."""
        return self.folder / TRIES

    def part(self, number: int) -> Path:
        """The file of a part."""
        return self.out / f"part-{number:05}-of-{self.parts:05}.parquet"

    def pieces(self, number: int) -> list[Piece]:
        """What a part is made of.

        Raises:
            BulkError: the plan's file is damaged.
        """
        path = self.folder / PIECES
        try:
            with pa.memory_map(str(path)) as file:
                return from_batch(pa.ipc.open_file(file).get_batch(number))
        except (OSError, pa.ArrowException, IndexError, ValueError) as error:
            raise BulkError(f"{path} cannot be read: {error}; begin anew in another folder.") from error

    def errors_in(self, number: int) -> int | None:
        """Of a finished part how many of its images could not be used; None of one that is not finished."""
        found = describe_part(self.part(number))
        if found is None:
            return None
        rows, about = found
        ours = about.get("digest") == self.digest and about.get("part") == number and about.get("images") == rows
        return int(about["errors"]) if ours else None

    def about(self, number: int, images: int) -> dict[str, Any]:
        """What stands in the file of a part beside the rows."""
        return {
            "digest": self.digest,
            "part": number,
            "images": images,
            "model": printable(self.model.name),
            **{f"{name}_digest" if name in ("model", "images") else name: value
               for name, value in asdict(self.settings).items()},
        }  # fmt: skip


def digest_of(pieces: Sequence[Piece], stamps: Sequence[str] = ()) -> str:
    """Of images: of where they are and what they are called, and of files of rows also what is in them."""
    total = hashlib.sha256()
    for piece in pieces:
        values = [os.fsencode(piece.path).hex(), piece.key, piece.first, piece.count, piece.column, piece.repo]
        total.update(json.dumps([*values, piece.revision]).encode() + b"\n")
    for stamp in stamps:
        total.update(stamp.encode() + b"\n")
    return total.hexdigest()


def check_folder(out: Path) -> None:
    """BulkError unless a run can begin in a folder, or go on."""
    if out.exists() and not out.is_dir():
        raise BulkError(f"{out} is a file: choose another folder for --out.")
    if out.is_dir() and not (out / FOLDER / PLAN).is_file() and any(path.name != FOLDER for path in out.iterdir()):
        raise BulkError(f"{out} is not empty, and no run of --ray began in it: choose a new folder for --out.")


def begin(out: Path, pieces: Sequence[Piece], settings: Settings, model: ModelFiles) -> Plan:
    """The plan of a new run, which is written, or that of the run in this folder, which goes on.

    Call it with the folder locked.

    Raises:
        BulkError: the run in this folder has other settings.
        OSError: something cannot be written.
    """
    out = out.absolute()
    path = out / FOLDER / PLAN
    if path.is_file():
        plan = read_plan(out)
        _check_same(plan, settings)
    else:
        plan = _write(out, pieces, settings, model)
    # What a process that was killed left.
    for folder in (plan.unfinished, plan.tries):
        folder.mkdir(exist_ok=True)
    for partial in plan.unfinished.iterdir():
        partial.unlink(missing_ok=True)
    return plan


def _write(out: Path, pieces: Sequence[Piece], settings: Settings, model: ModelFiles) -> Plan:
    keys = {piece.key for piece in pieces}
    if len(keys) != len(pieces):
        raise BulkError("Two of the images have names that differ only in what cannot be printed: rename one.")
    folder = out / FOLDER
    (folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
    count = 0

    def write(file: Any) -> None:
        nonlocal count
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(file, SCHEMA, options=options) as writer:
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
    """The plan of the run in a folder.

    Raises:
        BulkError: there is none, or it is damaged.
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
        told = name in ("model", "images")  # digests say nothing to a person
        words.append(f"other {name}" if name == "images" else f"another {name}" if told else
                     f"{name.replace('_', ' ')} {then[name]}, now {now[name]}")  # fmt: skip
    raise BulkError(
        f"The run in {plan.out} was begun with other settings ({'; '.join(words)}): choose a new folder for --out, or "
        "give the settings of then."
    )


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made; a process that dies leaves no lock.

    Raises:
        BulkError: another run is in it.
    """
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows: two runs would do the same work twice, and nothing worse
        yield
        return
    with (folder / LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BulkError(f"Another run is writing into {out}: wait for it, or choose another folder.") from error
        except OSError:  # a file system without locks
            pass
        yield


__all__ = [
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
