"""Processes visitors' requests one at a time, with limits on bytes, pixels, seconds and the queue's length."""

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
from ..model import inference_api_faim2f
from ..model.inference_api_faim2f import MEGA, RequestError
from ..runtime.prediction import usual_threshold
from ..runtime.predictor import Predictor
from ..zoo import runtimes_of
from .rendering import Downloads, PageView, view_of, write_downloads

# Maximum number of characters of an uploaded file's name in messages.
LONGEST_NAME = 60


@dataclass(frozen=True)
class Limits:
    """Limits on a request.

    Args:
        megabytes: size of an uploaded file.
        megapixels: size of an image, checked before it is decoded.
        seconds: processing time of an image.
        waiting: maximum number of images in the queue.
    """

    megabytes: float = 20.0
    megapixels: float = 25.0
    seconds: float = 60.0
    waiting: int = 16

    @property
    def bytes(self) -> int:
        """Maximum bytes of an uploaded file."""
        return int(self.megabytes * MEGA)

    @property
    def pixels(self) -> int:
        """Maximum pixels of an image."""
        return int(self.megapixels * MEGA)


def open_picture(path: Path, name: str, limits: Limits) -> Image.Image:
    """Opens an uploaded file as an image (its first frame) without decoding it.

    Only the header is read before the size is checked against the limits.

    Args:
        path: the file.
        name: the uploaded file's name, for messages.
        limits: limits on the image.

    Raises:
        WebError: it is not an image, or has too many bytes or pixels.
    """
    if path.stat().st_size > limits.bytes:
        raise WebError(f"{name} has more than {limits.megabytes:g} MB: save it smaller, or with more compression.")
    try:
        return inference_api_faim2f.open_picture(path, name, limits.pixels, "this page")
    except RequestError as error:
        raise WebError(str(error)) from error


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
        name: its name on the page.
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
        return usual_threshold(self.predictor.network, subtask)


def open_choices(
    model: str, exports: Sequence[str] = (), device: str | None = None
) -> tuple[dict[str, Choice], list[str]]:
    """Opens a model and its exports in every runtime that they have files for.

    A runtime that is not available is skipped with a note if the folder supports another one.

    Args:
        model: a folder or Hub id.
        exports: folders written by `faim2f export` or `faim2f quantize` for the same model, which are trusted.
        device: see `Predictor.from_pretrained`.

    Returns:
        The networks by their names on the page, and the notes.

    Raises:
        PredictorError: no runtime for a folder is available, or its labels differ from the model's.
    """
    opened: list[tuple[str, str, Predictor]] = []
    notes: list[str] = []
    for folder in [model, *exports]:
        problems = []
        # An engine can execute any code, so one that lies beside a model is not opened.
        runtimes = runtimes_of(folder, ("tensorrt",) if folder in exports else ())
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
            raise PredictorError(f"{folder} has other labels than {model}: it is not an export of that model.")
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
    """A visitor's request; all values are untrusted.

    Args:
        path: path of the uploaded file.
        name: the uploaded file's name.
        network: a key of the page's choices.
        subtask, threshold: see `Predictor`.
    """

    path: Path
    name: str
    network: str
    subtask: str
    threshold: float


class RequestHandler:
    """Processes requests one after the other.

    A request that exceeds the time limit fails. Its thread cannot be stopped, so later requests wait until it ends, at
    most for the same time.

    Args:
        choices: networks by name.
        limits: limits on each request.
        folder: the folder of uploads and downloads; files elsewhere are not read.
    """

    def __init__(self, choices: dict[str, Choice], limits: Limits, folder: Path) -> None:
        self.choices, self.limits, self.folder = choices, limits, folder.resolve()
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="faim2f-app")

    def __call__(self, request: Request) -> tuple[PageView, Downloads]:
        """Segments an image.

        Raises:
            WebError, PredictorError: the request fails; one sentence.
        """
        future = self.executor.submit(self._answer, request)
        try:
            return future.result(self.limits.seconds)
        except OutOfTime as error:
            if future.cancel():
                raise WebError("The previous image is still being processed: try again in a minute.") from error
            raise WebError(
                f"This took longer than {self.limits.seconds:g} seconds and was stopped: try a smaller image."
            ) from error

    def _answer(self, request: Request) -> tuple[PageView, Downloads]:
        choice = self.choices.get(request.network)
        if choice is None:
            raise WebError(f"There is no runtime of that name here: choose one of {', '.join(self.choices)}.")
        name = display_name(request.name)
        # Gradio checks only paths that are marked as files; uploads and copies of the examples are in the folder.
        if not (request.path.is_file() and request.path.resolve().is_relative_to(self.folder)):
            raise WebError("This request did not come from this page: reload it.")
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
        """Drops waiting requests."""
        self.executor.shutdown(wait=False, cancel_futures=True)


__all__ = ["Choice", "Limits", "Request", "RequestHandler", "display_name", "open_choices", "open_picture"]
