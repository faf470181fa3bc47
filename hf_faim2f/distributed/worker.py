"""What workers died at. A worker that is killed says nothing; so each writes down what it begins.

An image can kill whoever reads it: more memory than there is, a decoder that crashes. Ray would give the part to the
next worker, for ever. After some deaths a part is done with care, image by image, each written down before it is begun;
and an image at which workers died twice so is left out.
"""

import itertools
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BulkError, ImageError, PredictorError
from ..runtime.network import usual_batch_size
from ..runtime.prediction import Prediction
from ..runtime.predictor import Predictor
from ..version import __version__
from .parts import write_part
from .pieces import Entry, read_pieces
from .plan import Plan, read_plan

# Workers die for many reasons, of which most are not an image; care is slow.
CAREFUL_AFTER = 3
LEFT_OUT_AFTER = 2
# So many deaths with no image begun are no image's fault.
MOST_TRIES = 12
# Of the file: no run comes near.
MOST_BYTES = 1 << 22
TRY, WRITING = "try", "writing"


class Tries:
    """The tries of a part.

    Args:
        path: of the file that remembers them; it may not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = self._lines()
        self.count = lines.count(TRY)
        # The last image of each try that ended without one that was finished.
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
        """Whether this try takes one image at a time."""
        return self.count >= CAREFUL_AFTER

    @property
    def hopeless(self) -> bool:
        """Whether workers die before they begin any image, or where one is left out already."""
        if self.deaths:
            return max(self.deaths.values()) > LEFT_OUT_AFTER
        return self.count >= MOST_TRIES

    def begin(self) -> None:
        """Writes down that a try begins."""
        self._append(TRY)

    def begin_image(self, place: int) -> None:
        """Writes down that an image begins."""
        self._append(str(place))

    def begin_writing(self) -> None:
        """Writes down that all images are done."""
        self._append(WRITING)

    def left_out(self, place: int) -> bool:
        """Whether workers died at an image."""
        return self.deaths.get(place, 0) >= LEFT_OUT_AFTER

    def end(self) -> None:
        """Forgets all: the part is finished, or has failed in a way that says why."""
        self.path.unlink(missing_ok=True)

    def _append(self, line: str) -> None:
        with self.path.open("ab") as file:
            file.write(f"{line}\n".encode())


# What a worker does: it predicts the images of a part, and writes the part's file.

Row = dict[str, Any]
# What Pillow calls the file of an image that has none.
NO_NAME = re.compile(r" <_io\.BytesIO [^>]*>")


class Worker:
    """Does parts of a run, on whatever machine it finds itself; Ray Data makes it, and another where it dies.

    The model is loaded with the first part, so that a death then is remembered as one of that part.

    Args:
        out: the folder of the run.
        digest: of its plan.
        device: as `Predictor.from_pretrained` takes it.
        batch_size: likewise, of its `stream`; None for what fits the network.
    """

    def __init__(self, out: str, digest: str, device: str | None, batch_size: int | None) -> None:
        self.out, self.digest = Path(out), digest
        self.device, self.batch_size = device, batch_size
        self.opened: tuple[Plan, Predictor] | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Does the parts whose numbers are in `batch["part"]`; of each, how many images it has and how many of them
        are bad, and an empty text, or one sentence that says why the part could not be done."""
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
            text = str(error)
            if isinstance(error, OSError) and error.strerror:
                text = f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
            return 0, 0, f"{text} (It was on the machine {socket.gethostname()}.)"

    def do(self, number: int) -> tuple[int, int]:
        """Does a part, if it is not done; how many images it has, and how many of them cannot be used.

        Raises:
            BulkError, PredictorError, OSError: it cannot be done.
        """
        plan = self.opened[0] if self.opened else self._open_plan()
        pieces = plan.pieces(number)
        count = sum(piece.count for piece in pieces)
        # A worker may have died, or been lost, between the file and the answer.
        bad = plan.errors_in(number)
        if bad is not None:
            return count, bad
        tries = Tries(plan.tries / f"{number:05}")
        if tries.hopeless:
            tries.end()
            raise BulkError(
                f"Part {number} was begun {tries.count} times, and each time the worker died, as a rule for want of "
                "memory: look at Ray's logs, and give the same command again with fewer workers."
            )
        tries.begin()
        try:
            predictor = self._open_predictor(plan)
            predict = self._one_by_one if tries.careful else self._together
            rows = list(predict(plan, predictor, read_pieces(pieces), tries))
            tries.begin_writing()
            write_part(plan.part(number), rows, plan.about(number, len(rows)), plan.unfinished)
        finally:  # nobody was killed
            tries.end()
        return count, sum(row["error"] is not None for row in rows)

    def _open_plan(self) -> Plan:
        if not self.out.is_dir():
            raise BulkError(f"There is no folder {self.out}: --out must be one that all machines of the cluster see.")
        plan = read_plan(self.out)
        if plan.digest != self.digest:
            raise BulkError(f"{self.out} is another folder than where the run was started: all machines must see one.")
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

    def _together(self, plan: Plan, predictor: Predictor, entries: Iterator[Entry], _: Tries) -> Iterator[Row]:
        """The rows of a part in its order."""
        rows: list[Row] = []
        places: list[int] = []  # of the images that the predictor is given

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

    def _one_by_one(self, plan: Plan, predictor: Predictor, entries: Iterator[Entry], tries: Tries) -> Iterator[Row]:
        """The same, with each image by itself, written down before it is begun."""
        settings = plan.settings
        for place in itertools.count():
            tries.begin_image(place)
            entry = next(entries, None)
            if entry is None:
                return
            row = _row(entry)
            if row["error"] is None and tries.left_out(place):
                row["error"] = f"{entry.key} was left out: {tries.deaths[place]} workers died at it."
            elif row["error"] is None:
                for index, made in predictor.stream([entry.source], settings.subtask, settings.threshold):
                    _fill(row, made, index)
            yield row


def _row(entry: Entry) -> Row:
    """An image's row without what is predicted."""
    empty: Row = {"height": None, "width": None, "subtask": None, "segments": []}
    return {"key": entry.key, "file": entry.file, "error": entry.error, **empty}


def _fill(row: Row, made: Prediction | ImageError, index: int) -> None:
    """What is predicted, or what is wrong."""
    if isinstance(made, ImageError):
        text, unnamed = str(made), f"image {index}"
        # Of an image without a file's name the predictor knows only the place.
        text = row["key"] + text.removeprefix(unnamed) if text.startswith(unnamed) else text
        text = NO_NAME.sub("", text)
        row["error"] = "".join(c if c.isprintable() else "?" for c in text)
        return
    row["height"], row["width"] = made.size
    row["subtask"], row["segments"] = made.subtask, made.to_json()


__all__ = ["Tries", "Worker"]
