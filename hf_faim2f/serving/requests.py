"""Answers visitors' requests, one after the other, within limits: bytes, pixels, seconds and places in the queue."""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import ImageError, PredictorError, WebError
from ..files import printable
from ..model.image_loading_faim2f import IMAGE_FORMATS, READ_FORMATS
from ..runtime.prediction import PANOPTIC_THRESHOLD
from ..runtime.predictor import Predictor
from ..zoo import runtimes_of
from .rendering import Downloads, PageView, view_of, write_downloads

MEGA = 1_000_000
# Characters of an uploaded file's name that are shown.
LONGEST_NAME = 60


@dataclass(frozen=True)
class Limits:
    """Bounds of a request.

    Args:
        megabytes: of an uploaded file.
        megapixels: of a picture, counted before it is decoded.
        seconds: from the start of the work on a picture to its end.
        waiting: pictures that may wait in the queue.
    """

    megabytes: float = 20.0
    megapixels: float = 25.0
    seconds: float = 60.0
    waiting: int = 16

    @property
    def bytes(self) -> int:
        """Bytes of an uploaded file."""
        return int(self.megabytes * MEGA)

    @property
    def pixels(self) -> int:
        """Pixels of a picture."""
        return int(self.megapixels * MEGA)


def open_picture(path: Path, name: str, limits: Limits) -> Image.Image:
    """Opens an uploaded file as a picture, or its first frame, without decoding it.

    Only the header is read before the size is known to be within the limits.

    Args:
        path: the file.
        name: what its owner calls it, for messages.
        limits: of the picture.

    Raises:
        WebError: it is no picture, or has too many bytes or pixels.
    """
    if path.stat().st_size > limits.bytes:
        raise WebError(f"{name} has more than {limits.megabytes:g} MB: save it smaller, or with more compression.")
    try:
        picture = Image.open(path, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise WebError(f"{name} has more than {limits.megapixels:g} million pixels: make it smaller.") from error
    except Exception as error:  # Pillow's plugins raise whatever a malformed header causes
        raise WebError(f"{name} cannot be read as a picture: {READ_FORMATS} files can.") from error
    width, height = picture.size
    if width * height > limits.pixels:
        picture.close()
        raise WebError(
            f"{name} has {width}x{height} pixels, {width * height / MEGA:.1f} million, and this page takes "
            f"{limits.megapixels:g} million: make it smaller."
        )
    return picture


def display_name(name: str) -> str:
    """The name of an uploaded file, short and printable, without folders."""
    text = printable(name.replace("\\", "/").rpartition("/")[2])
    if len(text) > LONGEST_NAME:
        text = text[: LONGEST_NAME - 1] + "…"
    return text or "picture"


@dataclass(frozen=True)
class Choice:
    """A network that a visitor can choose: a model in a runtime.

    Args:
        name: what the page calls it.
        model: the last part of the folder's path, or the Hub id.
        runtime: a key of `RUNTIMES`.
        predictor: the opened network.
    """

    name: str
    model: str
    runtime: str
    predictor: Predictor

    def threshold(self, subtask: str) -> float:
        """The default threshold: the lowest score of a segment."""
        if subtask == "panoptic":
            return PANOPTIC_THRESHOLD
        return float(self.predictor.network.processor.to_dict()["threshold"])


def open_choices(
    model: str, exports: Sequence[str] = (), device: str | None = None
) -> tuple[dict[str, Choice], list[str]]:
    """Opens a model and its exports in every runtime that they have files for.

    A runtime that cannot run here is left out with a note if its folder has another that can.

    Args:
        model: a folder or Hub id.
        exports: folders of `faim2f export` and `faim2f quantize` of the same model.
        device: as `Predictor.from_pretrained` takes it.

    Returns:
        The networks by their names on the page, and the notes.

    Raises:
        PredictorError: a folder has nothing that can run here, or its labels differ from the model's.
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


@dataclass(frozen=True)
class Request:
    """What a visitor asks for; none of it can be trusted.

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


class RequestHandler:
    """Answers requests one after the other.

    A request that takes too long is given up. Its thread cannot be stopped, so until it ends, the next requests wait,
    but not longer than the limit either.

    Args:
        choices: networks by name.
        limits: of each request.
        folder: where downloads are written.
    """

    def __init__(self, choices: dict[str, Choice], limits: Limits, folder: Path) -> None:
        self.choices, self.limits, self.folder = choices, limits, folder
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="faim2f-app")

    def __call__(self, request: Request) -> tuple[PageView, Downloads]:
        """Segments a picture.

        Raises:
            WebError, PredictorError: it cannot be done; one sentence says why.
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

    def _answer(self, request: Request) -> tuple[PageView, Downloads]:
        choice = self.choices.get(request.network)
        if choice is None:
            raise WebError(f"There is no runtime of that name here: choose one of {', '.join(self.choices)}.")
        name = display_name(request.name)
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
        return view_of(prediction), write_downloads(prediction, about, name, self.folder)

    def close(self) -> None:
        """Drops the requests that wait."""
        self.executor.shutdown(wait=False, cancel_futures=True)


__all__ = ["Choice", "Limits", "Request", "RequestHandler", "display_name", "open_choices", "open_picture"]
