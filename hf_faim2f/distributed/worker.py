"""Predicts the images of a part and writes its Parquet file.

An image can kill the process that reads it: it needs more memory than there is, or crashes a decoder. Ray would hand
the part to the next worker for ever, and a killed worker leaves no message. So each worker records what it begins
(`Attempts`). After some deaths a part is predicted image by image, each recorded before it is begun, and an image at
which workers died twice is left out.
"""

import itertools
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BulkError, ImageError, PredictorError, sentence
from ..files import printable
from ..runtime.backends import usual_batch_size
from ..runtime.prediction import Prediction
from ..runtime.predictor import Predictor
from ..version import __version__
from .parts import write_part
from .plan import Plan, read_plan
from .rows import Entry, read_pieces

Row = dict[str, Any]
# Deaths of workers before a part is predicted image by image, which is slow: most deaths have other causes.
CAREFUL_AFTER = 3
# Deaths at an image before it is left out.
LEFT_OUT_AFTER = 2
# Deaths before any image was begun, after which the run stops: no image is to blame.
MOST_ATTEMPTS = 12
# Of a record's file; no run comes near.
MOST_BYTES = 1 << 22
TRY, WRITING = "try", "writing"
# How Pillow names a file without a name.
NO_NAME = re.compile(r" <_io\.BytesIO [^>]*>")


class Attempts:
    """The attempts at a part, recorded in a file.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = self._lines()
        self.count = lines.count(TRY)
        # The last image that each earlier attempt began: workers died at it.
        ends = [before for before, line in zip(lines, [*lines[1:], TRY], strict=False) if line == TRY and before != TRY]
        self.deaths = {int(end): ends.count(end) for end in ends if end.isdigit()}

    def _lines(self) -> list[str]:
        try:
            with self.path.open("rb") as file:
                return file.read(MOST_BYTES).decode("ascii", "replace").split()
        except FileNotFoundError:
            return []

    @property
    def careful(self) -> bool:
        """Whether this attempt predicts one image at a time."""
        return self.count >= CAREFUL_AFTER

    @property
    def hopeless(self) -> bool:
        """Whether workers die before they begin any image, or at one that is left out already."""
        if self.deaths:
            return max(self.deaths.values()) > LEFT_OUT_AFTER
        return self.count >= MOST_ATTEMPTS

    def begin(self) -> None:
        """Records that an attempt begins."""
        self._append(TRY)

    def begin_image(self, place: int) -> None:
        """Records that an image is begun."""
        self._append(str(place))

    def begin_writing(self) -> None:
        """Records that all images are predicted."""
        self._append(WRITING)

    def left_out(self, place: int) -> bool:
        """Whether an image is skipped because workers died at it."""
        return self.deaths.get(place, 0) >= LEFT_OUT_AFTER

    def end(self) -> None:
        """Deletes the record: the part is finished, or failed with a message."""
        self.path.unlink(missing_ok=True)

    def _append(self, line: str) -> None:
        with self.path.open("ab") as file:
            file.write(f"{line}\n".encode())


class Worker:
    """Predicts parts of a run; Ray Data creates it on some machine, and again if it dies.

    The model is loaded with the first part, so that a death while loading is recorded for that part.

    Args:
        out: the folder of the run.
        digest: of its plan.
        device: as `Predictor.from_pretrained` takes it.
        batch_size: as `Predictor.stream` takes it; None for the network's usual one.
    """

    def __init__(self, out: str, digest: str, device: str | None, batch_size: int | None) -> None:
        self.out, self.digest = Path(out), digest
        self.device, self.batch_size = device, batch_size
        self.opened: tuple[Plan, Predictor] | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Predicts the parts whose numbers are in `batch["part"]`.

        Returns:
            For each part its number of images, how many of them could not be used, and an empty text or one sentence
            that says why the part failed.
        """
        done = [self._try(int(number)) for number in batch["part"]]
        images, bad, failures = zip(*done, strict=True)
        return {
            "part": batch["part"],
            "images": np.array(images),
            "bad": np.array(bad),
            "failure": np.array(failures, dtype=object),
        }

    def _try(self, number: int) -> tuple[int, int, str]:
        try:
            return *self.do(number), ""
        except (BulkError, PredictorError, OSError) as error:
            return 0, 0, f"{sentence(error)} (On the machine {socket.gethostname()}.)"

    def do(self, number: int) -> tuple[int, int]:
        """Predicts a part unless it is finished; returns how many images it has, and how many cannot be used.

        Raises:
            BulkError, PredictorError, OSError: it cannot be done.
        """
        plan = self.opened[0] if self.opened else self._open_plan()
        pieces = plan.pieces(number)
        count = sum(piece.count for piece in pieces)
        # A worker may have died between writing the file and reporting it.
        bad = plan.errors_in(number)
        if bad is not None:
            return count, bad
        attempts = Attempts(plan.attempts / f"{number:05}")
        if attempts.hopeless:
            attempts.end()
            raise BulkError(
                f"Part {number} was begun {attempts.count} times, and each time the worker died, usually for lack of "
                "memory: look at Ray's logs, and run the same command again with fewer workers."
            )
        attempts.begin()
        try:
            predictor = self._open_predictor(plan)
            predict = self._predict_one_by_one if attempts.careful else self._predict_batches
            rows = list(predict(plan, predictor, read_pieces(pieces), attempts))
            attempts.begin_writing()
            write_part(plan.part(number), rows, plan.about(number, len(rows)), plan.unfinished)
        finally:  # not reached if the worker is killed
            attempts.end()
        return count, sum(row["error"] is not None for row in rows)

    def _open_plan(self) -> Plan:
        if not self.out.is_dir():
            raise BulkError(
                f"There is no folder {self.out}: --out must be on a file system that all machines of the cluster share."
            )
        plan = read_plan(self.out)
        if plan.digest != self.digest:
            raise BulkError(f"{self.out} is not the folder in which the run was started: all machines must share one.")
        if plan.settings.version != __version__:
            raise BulkError(
                f"hf-faim2f is {__version__}, and {plan.settings.version} where the run was started: install the same."
            )
        return plan

    def _open_predictor(self, plan: Plan) -> Predictor:
        if self.opened is None:
            settings = plan.settings
            folder = plan.model.here()
            predictor = Predictor.from_pretrained(folder, settings.runtime, self.device, settings.precision)
            self.opened = plan, predictor
        return self.opened[1]

    def _predict_batches(
        self, plan: Plan, predictor: Predictor, entries: Iterator[Entry], _: Attempts
    ) -> Iterator[Row]:
        """The rows of a part in order, predicted in batches."""
        rows: list[Row] = []
        places: list[int] = []  # in `rows`, of the images that the predictor gets

        def sources() -> Iterator[Any]:
            for entry in entries:
                rows.append(_row(entry))
                if entry.error is None:
                    places.append(len(rows) - 1)
                    yield entry.source

        settings = plan.settings
        batch_size = usual_batch_size(predictor.network) if self.batch_size is None else self.batch_size
        for index, made in predictor.stream(sources(), settings.subtask, settings.threshold, batch_size):
            _fill(rows[places[index]], made, index)
        yield from rows

    def _predict_one_by_one(
        self, plan: Plan, predictor: Predictor, entries: Iterator[Entry], attempts: Attempts
    ) -> Iterator[Row]:
        """The same, image by image, each recorded before it is begun."""
        settings = plan.settings
        for place in itertools.count():
            attempts.begin_image(place)
            entry = next(entries, None)
            if entry is None:
                return
            row = _row(entry)
            if row["error"] is None and attempts.left_out(place):
                row["error"] = f"{entry.key} was left out: {attempts.deaths[place]} workers died at it."
            elif row["error"] is None:
                for index, made in predictor.stream([entry.source], settings.subtask, settings.threshold):
                    _fill(row, made, index)
            yield row


def _row(entry: Entry) -> Row:
    """An image's row without a prediction."""
    empty: Row = {"height": None, "width": None, "subtask": None, "segments": []}
    return {"key": entry.key, "file": entry.file, "error": entry.error, **empty}


def _fill(row: Row, made: Prediction | ImageError, index: int) -> None:
    """Puts a prediction, or an error, into an image's row."""
    if isinstance(made, ImageError):
        text, unnamed = str(made), f"image {index}"
        # The predictor numbers images that have no file name.
        text = row["key"] + text.removeprefix(unnamed) if text.startswith(unnamed) else text
        row["error"] = printable(NO_NAME.sub("", text))
        return
    row["height"], row["width"] = made.size
    row["subtask"], row["segments"] = made.subtask, made.to_json()


__all__ = ["Attempts", "Worker"]
