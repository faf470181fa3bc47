"""The work on one picture after the other, none for longer than its time."""

from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import dataclass
from pathlib import Path

from ..runtime.network import PredictorError
from ..runtime.predictor import ImageError
from .downloads import Files, write_files
from .limits import Limits, WebError
from .models import Choice
from .rendering import Shown, shown_of
from .upload import open_picture, shown_name


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


__all__ = ["PredictorError", "Request", "Work"]
