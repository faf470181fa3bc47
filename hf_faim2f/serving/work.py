"""What one visitor of the page may take: bytes, pixels, seconds, and places in the queue."""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import ImageError, PredictorError, WebError
from ..model.image_loading_faim2f import IMAGE_FORMATS, READ_FORMATS
from ..runtime.prediction import PANOPTIC_THRESHOLD
from ..runtime.predictor import Predictor
from .rendering import Files, Shown, shown_of, write_files

MEGA = 1_000_000


@dataclass(frozen=True)
class Limits:
    """Bounds of a request.

    Args:
        megabytes: of an uploaded file.
        megapixels: of a picture; they are counted before it is decoded.
        seconds: from the start of the work on a picture to its end.
        waiting: pictures that may wait for those before them.
    """

    megabytes: float = 20.0
    megapixels: float = 25.0
    seconds: float = 60.0
    waiting: int = 16

    @property
    def bytes(self) -> int:
        """Of an uploaded file."""
        return int(self.megabytes * MEGA)

    @property
    def pixels(self) -> int:
        """Of a picture."""
        return int(self.megapixels * MEGA)


# A stranger's file as a picture, of which only the head is read before its size is known to be bearable.

LONGEST_SHOWN = 60


def open_picture(path: Path, name: str, limits: Limits) -> Image.Image:
    """The picture, not decoded yet; of several frames it is the first.

    Args:
        path: of the file.
        name: what its owner calls it, for messages.

    Raises:
        WebError: it is no picture, or has too many pixels or bytes.
    """
    if path.stat().st_size > limits.bytes:
        raise WebError(f"{name} has more than {limits.megabytes:g} MB: save it smaller, or with more compression.")
    try:
        picture = Image.open(path, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise WebError(f"{name} has more than {limits.megapixels:g} million pixels: make it smaller.") from error
    except Exception as error:  # a plugin raises whatever a broken head makes it raise
        raise WebError(f"{name} cannot be read as a picture: {READ_FORMATS} files can.") from error
    width, height = picture.size
    if width * height > limits.pixels:
        picture.close()
        raise WebError(
            f"{name} has {width}x{height} pixels, {width * height / MEGA:.1f} million, and this page takes "
            f"{limits.megapixels:g} million: make it smaller."
        )
    return picture


def shown_name(name: str) -> str:
    """A file's own name, short and printable, without folders."""
    last = name.replace("\\", "/").rpartition("/")[2]
    printable = "".join(character if character.isprintable() else "?" for character in last)
    if len(printable) > LONGEST_SHOWN:
        printable = printable[: LONGEST_SHOWN - 1] + "…"
    return printable or "picture"


# What the page can run: a model's folder and its exports, each in the runtimes that it has files for.

# What a folder has for each runtime that is not torch.
FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.engine"}


@dataclass(frozen=True)
class Choice:
    """A network that a visitor can choose.

    Args:
        name: what the page calls it.
        model: the last part of the folder's path, or the id on the Hub.
        runtime: a key of `RUNTIMES`.
    """

    name: str
    model: str
    runtime: str
    predictor: Predictor

    def threshold(self, subtask: str) -> float:
        """The least score that a segment has where nobody chooses another."""
        if subtask == "panoptic":
            return PANOPTIC_THRESHOLD
        return float(self.predictor.network.processor.to_dict()["threshold"])


def open_choices(
    model: str, exports: Sequence[str] = (), device: str | None = None
) -> tuple[dict[str, Choice], list[str]]:
    """The networks by the names that the page has for them, and what could not be opened.

    Of a folder with files for several runtimes those that cannot run here are left out, and told; one of which
    nothing can run is an error.

    Args:
        model: a folder, or an id on the Hub.
        exports: folders of `faim2f export` and `faim2f quantize`.

    Raises:
        PredictorError: a folder has nothing that can run here; the labels of two are not the same.
    """
    opened: list[tuple[str, str, Predictor]] = []
    notes: list[str] = []
    for folder in [model, *exports]:
        problems = []
        runtimes = runtimes_of(folder)
        for runtime in runtimes:
            try:
                opened.append((folder, runtime, Predictor.from_pretrained(folder, runtime, device)))
            except PredictorError as error:
                problems.append(error)
        if len(problems) == len(runtimes):
            raise problems[0]
        notes += [f"Not offered: {error}" for error in problems]
    first = opened[0][2].network.config.id2label
    for folder, _, predictor in opened:
        if predictor.network.config.id2label != first:
            raise PredictorError(f"{folder} has other labels than {model}: it is no export of that model.")
    counts = Counter(runtime for _, runtime, _ in opened)
    choices = {}
    for folder, runtime, predictor in opened:
        own = Path(os.path.abspath(folder)).name if Path(folder).is_dir() else folder
        name = runtime if counts[runtime] == 1 else f"{runtime}: {own}"
        while name in choices:
            name += "'"
        choices[name] = Choice(name, own, runtime, predictor)
    return choices, notes


def runtimes_of(folder: str) -> list[str]:
    """Those that a folder has files for; of what has none torch, which says what it misses."""
    path = Path(folder)
    able = [runtime for runtime, file in FILES.items() if (path / file).is_file()]
    if not able or any(path.glob("*.safetensors*")):
        able.insert(0, "torch")
    return able


# The work on one picture after the other, none for longer than its time.


@dataclass(frozen=True)
class Request:
    """What a visitor asks for; a stranger may have written all of it.

    Args:
        path: of the uploaded file.
        name: what its owner calls it.
        network: a key of the page's choices.
        subtask, threshold: as `Predictor` takes them.
    """

    path: Path
    name: str
    network: str
    subtask: str
    threshold: float


class Work:
    """Answers requests, each after the one before.

    What takes too long is given up, though a thread cannot be stopped: until it ends by itself, those who come next
    wait, for no longer than the limit either.

    Args:
        choices: by name.
        folder: in which files to download are written.
    """

    def __init__(self, choices: dict[str, Choice], limits: Limits, folder: Path) -> None:
        self.choices, self.limits, self.folder = choices, limits, folder
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="faim2f-app")

    def __call__(self, request: Request) -> tuple[Shown, Files]:
        """The answer.

        Raises:
            WebError, PredictorError: it cannot be done. One sentence.
        """
        future = self.executor.submit(self._answer, request)
        try:
            return future.result(self.limits.seconds)
        except OutOfTime as error:
            if future.cancel():
                raise WebError("The picture before yours takes too long: come back in a minute.") from error
            raise WebError(
                f"This took longer than {self.limits.seconds:g} seconds and was given up: try a smaller picture."
            ) from error

    def _answer(self, request: Request) -> tuple[Shown, Files]:
        choice = self.choices.get(request.network)
        if choice is None:
            raise WebError(f"There is no runtime of that name here: choose one of {', '.join(self.choices)}.")
        name = shown_name(request.name)
        threshold = None if request.subtask == "semantic" else request.threshold
        with open_picture(request.path, name, self.limits) as picture:
            try:
                prediction = choice.predictor(picture, request.subtask, threshold)[0]
            except ImageError as error:
                raise WebError(str(error).replace("image 0", name)) from error
        about = {
            "model": choice.model,
            "runtime": choice.runtime,
            "subtask": request.subtask,
            "threshold": threshold,
        }
        return shown_of(prediction), write_files(prediction, about, name, self.folder)

    def close(self) -> None:
        """Lets what waits go."""
        self.executor.shutdown(wait=False, cancel_futures=True)


__all__ = [
    "Choice",
    "Limits",
    "PredictorError",
    "Request",
    "WebError",
    "Work",
    "open_choices",
    "open_picture",
    "shown_name",
]
