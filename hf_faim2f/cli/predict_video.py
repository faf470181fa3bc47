"""Videos of `faim2f predict`: a video with the segments drawn over it, and a JSON line for each frame.

Files for a video `a/clip.mp4`:

- `a/clip.frames.jsonl`: for each predicted frame its number from 0, its time in seconds and its segments, which have
  the fields of an image's JSON, and with --track the number of the object;
- `a/clip.overlay.mp4`, unless --no-overlays: the video of these frames, with their time stamps and the unchanged audio;
- `a/clip.json`: the video's file and size, the number of predicted frames and the time of the last of them in seconds,
  the settings, and whether the video is complete.

Each file appears when it is complete. Ctrl+C and SIGTERM end the video after the current frame.

`find_sources` finds the videos and images that the command line names.
"""

import argparse
import json
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from PIL import Image
from tqdm.auto import tqdm

from ..errors import PredictorError, SettingsError, VideoError
from ..files import FoundFile, above_pattern, find_files, place_of, printable, write_whole
from ..model.image_loading_faim2f import ARRAY_SUFFIXES, IMAGE_SUFFIXES
from ..runtime.prediction import Prediction
from ..runtime.prediction_files import (
    ANNOTATIONS,
    DOCUMENT,
    FILM,
    FINISHED,
    LABELS,
    LINES,
    OVERLAY,
    SEGMENTS,
    THREADS,
    check_inside,
    is_prediction,
    remove_others,
    write_inside,
)
from ..runtime.predictor import Predictor, ahead, background_threads
from ..runtime.tracking import Tracker
from ..runtime.video import FILM_SUFFIXES, Film, FilmWriter, Frame
from ..version import __version__
from .output import MOST_LISTED, no_bars, require_packages, say

# Maximum number of frames that are drawn ahead of the one being written.
MOST_DRAWN = 4


@dataclass
class FilmRun:
    """The settings that all videos of a command share.

    Args:
        options: the command's checked options.
        predictor: the opened model.
        batch_size: the largest batch.
        about: facts for each video's JSON.
    """

    options: argparse.Namespace
    predictor: Predictor
    batch_size: int | None
    about: Mapping[str, Any]


def check_settings(options: argparse.Namespace) -> None:
    """Checks the settings for videos; call it if there are any.

    Raises:
        SettingsError, ImportError: they cannot be combined, or a library is missing.
    """
    if options.annotations is not None:
        raise SettingsError("--annotations is for images, but a video is named: leave one of them out.")
    require_packages(("av", "trackers") if options.track else ("av",), "video")


def check_subtask(predictor: Predictor, options: argparse.Namespace) -> None:
    """Raises SettingsError if --track is combined with the semantic subtask, which has no objects."""
    if options.track and (options.subtask or predictor.subtasks[0]) == "semantic":
        raise SettingsError("--track follows objects, but a semantic label map has none: choose another --subtask.")


def live_file(word: str) -> FoundFile:
    """A file name for the outputs of a stream or a camera."""
    if word.isdecimal():
        return FoundFile(Path(f"camera-{word}"), 1)
    parts = urlsplit(word)
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in Path(parts.path).name)
    return FoundFile(Path(name.strip(".") or parts.hostname or "stream"), 1)


class EarlierOutputs:
    """Recognizes outputs of earlier predictions among images and videos, so that they are not predicted; collects them.

    They are recognized by their names and by the prediction's JSON beside them; in the output folder, where an
    interruption may have left no JSON, by their names alone, and copies in its folder `annotations` by the files there.

    Args:
        out: the output folder.
        words: the arguments of the command line. Copies that they name, themselves or by their folder, are predicted.
    """

    def __init__(self, out: Path, words: Sequence[str] = ()) -> None:
        self.inside = os.path.realpath(out) + os.sep
        exist = [Path(word) for word in words if os.path.lexists(word)]
        self.named = [Path(os.path.realpath(path) if path.is_dir() else place_of(path)) for path in exist]
        patterns = [word for word in words if not os.path.lexists(word)]
        self.named += [Path(os.path.realpath(above_pattern(word))) for word in patterns]
        self.any_is_named = any(ANNOTATIONS in Path(word).parts for word in patterns)
        self.found: dict[str, Path] = {}

    def __call__(self, path: Path) -> bool:
        """Whether a file is such an output.

        Raises:
            OSError: the JSON beside it cannot be read.
        """
        place = place_of(path)
        suffix = next((suffix for suffix in (LABELS, SEGMENTS, OVERLAY, FILM) if path.name.endswith(suffix)), None)
        is_output = suffix is not None and (
            place.startswith(self.inside) or is_prediction(path.with_name(path.name.removesuffix(suffix) + DOCUMENT))
        )
        if is_output or any(self._is_copy(Path(place), above) for above in Path(place).parents):
            self.found[place] = path
        return place in self.found

    def _is_copy(self, path: Path, above: Path) -> bool:
        """Whether an image in the folder `above` is the copy of one that was predicted with annotations."""
        if above.name != ANNOTATIONS or self.any_is_named:
            return False
        if any(named.is_relative_to(above) and path.is_relative_to(named) for named in self.named):
            return False
        if os.path.join(above.parent, "") == self.inside and any((above / name).exists() for name in FINISHED):
            return True
        folders = path.relative_to(above).parts[:-1]
        below = folders[1:] if folders[:1] == ("images",) else folders
        # Each format has folders of its own, and YOLO's renames folders called `images`.
        renamed = tuple(re.sub("(?i)^(images_*)_$", r"\1", one) for one in below)
        documents = (above.parent.joinpath(*place, path.stem + DOCUMENT) for place in {folders, below, renamed})
        return any(map(is_prediction, documents))

    def __str__(self) -> str:
        count, first = len(self.found), next(map(printable, self.found.values()), "")
        if count == 1:
            return f"1 output of an earlier prediction is skipped: {first}."
        return f"{count} outputs of earlier predictions are skipped, such as {first}."


def find_sources(words: Sequence[str], out: Path, takes_films: bool = True) -> list[FoundFile]:
    """Finds the images and videos that the command line names; says which videos and earlier outputs it skips.

    Args:
        words: the arguments.
        out: the output folder.
        takes_films: whether the command would predict videos that are named.

    Raises:
        SettingsError: an argument matches nothing, or only what is skipped.
    """
    outputs = EarlierOutputs(out, words)
    try:
        found = find_files(words, IMAGE_SUFFIXES, "image", ARRAY_SUFFIXES, outputs)
    except SettingsError as error:
        films = _films_passed_over(words, [], out)
        if "There is no image" not in str(error) or not films:
            raise
        raise SettingsError(f"{str(error).rstrip('.')}, only videos: {_name_them(films, takes_films)}.") from error
    if words and not found:
        raise SettingsError(f"There is nothing to predict: {outputs}")
    if outputs.found:
        say(str(outputs))
    films = _films_passed_over(words, found, out)
    if films:
        count = "1 video is" if len(films) == 1 else f"{len(films)} videos are"
        say(f"{count} skipped: {_name_them(films, takes_films)}.")
    return found


def _films_passed_over(words: Sequence[str], found: Sequence[FoundFile], out: Path) -> list[Path]:
    """The videos that folders and patterns match; they are skipped, because videos must be named individually."""
    named = {one.path for one in found}
    outputs = EarlierOutputs(out, words)
    films: dict[Path, None] = {}
    for word in words:
        try:
            films |= dict.fromkeys(one.path for one in find_files([word], FILM_SUFFIXES, "video", (), outputs))
        except SettingsError:
            continue
    return [film for film in films if film.suffix.lower() in FILM_SUFFIXES and film not in named]


def _name_them(films: Sequence[Path], takes_films: bool) -> str:
    names = ", ".join(printable(film) for film in films[:MOST_LISTED])
    more = f" and {len(films) - MOST_LISTED} more" if len(films) > MOST_LISTED else ""
    how = f"name them, for example 'FOLDER/*{films[0].suffix}'" if takes_films else "name them without --ray"
    return f"{names}{more}; to predict videos, {how}"


def predict_film(run: FilmRun, source: str, name: Path, guard: "Interruptions") -> str | None:
    """Predicts a video and writes its files; returns a sentence if a part could not be read.

    Args:
        run: the settings that videos share.
        source: a path, a stream URL, or a camera's index.
        name: the relative path of the files without suffix.
        guard: holds back Ctrl+C while something is written.

    Raises:
        VideoError: it cannot be read; nothing is written.
        OSError: it cannot be written.
        KeyboardInterrupt, PredictorError: after Ctrl+C, or the network returns NaN. The files contain the frames that
            were written by then.
    """
    with guard.released():
        opened = Film(source)
    with opened as film:
        writing = _Writing(run, film, guard)
        folder: Path = run.options.out
        stem = folder / name
        lines_path = stem.with_name(stem.name + LINES)
        film_path = stem.with_name(stem.name + FILM) if run.options.overlays else None
        check_inside(folder, stem)

        def write(lines: BinaryIO, file: BinaryIO | None = None) -> None:
            writing.write(lines, file)
            remove_others(stem, [LINES, FILM] if file is not None else [LINES])

        if film_path is None:
            write_whole(lines_path, write)
        else:
            own = film_path
            write_whole(lines_path, lambda lines: write_whole(own, lambda file: write(lines, file)))
        problem = film.problem(writing.count)
        height, width = writing.size
        document = {
            "film": {"file": film.name, "height": height, "width": width},
            **run.about,
            "subtask": writing.subtask,
            "track": run.options.track,
            "every": run.options.every,
            "frames": writing.count,
            "seconds": writing.seconds,
            "sound": writing.sound,
            "whole": writing.stopped is None and problem is None,
            "version": __version__,
        }
        content = json.dumps(document, allow_nan=False, indent=1).encode()
        write_inside(folder, stem.with_name(stem.name + DOCUMENT), content)
    rate = writing.count / max(writing.took, 1e-9)
    say(
        f"{film.name}: {writing.count} frame{'' if writing.count == 1 else 's'} in {writing.took:.1f} seconds "
        f"({rate:.1f} per second), in {film_path or lines_path}."
    )
    if writing.sound == "left out":
        say(f"{film.name}: its audio is left out, at least in part, because MP4 does not support its codec.")
    if writing.stopped is not None:
        raise writing.stopped
    return problem


class _Writing:
    """Runs the frames of one video through the model and writes its files."""

    def __init__(self, run: FilmRun, film: Film, guard: "Interruptions") -> None:
        self.run, self.film, self.guard = run, film, guard
        options = run.options
        self.subtask = options.subtask or run.predictor.subtasks[0]
        self.tracker = Tracker() if options.track else None
        self.frames: deque[Frame] = deque()
        self.count, self.seconds, self.took, self.size = 0, 0.0, 0.0, (0, 0)
        self.stopped: BaseException | None = None  # what ended it early, after at least one frame
        self.sound: str | None = None

    def write(self, lines: BinaryIO, file: BinaryIO | None) -> None:
        """Predicts and writes the frames, up to the end of the video, or to Ctrl+C or a failure of the network."""
        writer = None
        begun = time.monotonic()
        stated = self.film.stated_frames
        total = None if stated is None else -(-stated // self.run.options.every)
        pool = background_threads("drawing", THREADS)
        drawn = ahead(pool, self._drawn if file is not None else _undrawn, self._predictions(), MOST_DRAWN, _most_drawn)
        try:
            with tqdm(total=total, unit="frame", disable=no_bars()) as bar:
                while True:
                    with self.guard.released():
                        made = next(drawn, None)
                    if made is None:
                        break
                    frame, prediction, image = made
                    if file is not None:
                        if writer is None:
                            writer = FilmWriter(file, self.film, image.size)
                        writer.add(image, frame.pts)
                    lines.write(_line(frame, prediction))
                    self.size = self.size if self.count else prediction.size
                    self.count, self.seconds = self.count + 1, frame.seconds
                    bar.update()
        except BaseException as error:
            if not self.count or not isinstance(error, (KeyboardInterrupt, PredictorError)):
                if writer is not None:
                    writer.abandon()
                raise
            self.stopped = error
        finally:
            drawn.close()
        if writer is not None:
            writer.finish()
            if self.film.audio is not None:
                self.sound = "left out" if writer.lost_sound else "kept"
        self.took = time.monotonic() - begun

    def _predictions(self) -> Iterator[tuple[Frame, Prediction]]:
        options = self.run.options
        results = self.run.predictor.stream(
            self._images(), options.subtask, options.threshold, self.run.batch_size, in_order=True
        )
        for index, result in results:
            frame = self.frames.popleft()
            if not isinstance(result, Prediction):
                self.film.unusable = f"Frame {frame.index} of {self.film.name} cannot be used: {result}"
                if not index:
                    raise VideoError(self.film.unusable)
                return
            if self.tracker is not None:
                self.tracker.update(result, frame.seconds)
            yield frame, result

    def _images(self) -> Iterator[Image.Image]:
        begun = False
        try:
            for frame in self.film.frames(self.run.options.every):
                image, frame.image = frame.image, None  # type: ignore[assignment]  # the prediction holds it
                self.frames.append(frame)
                begun = True
                yield image
        except VideoError as error:  # a frame is too large
            if not begun:
                raise
            self.film.unusable = str(error)

    @staticmethod
    def _drawn(made: tuple[Frame, Prediction]) -> tuple[Frame, Prediction, Image.Image]:
        return *made, made[1].draw()


def _undrawn(made: tuple[Frame, Prediction]) -> tuple[Frame, Prediction, Image.Image]:
    return *made, made[1].image


def _most_drawn(made: tuple[Frame, Prediction, Image.Image]) -> int:
    return max(1, MOST_DRAWN * 2**22 // (made[2].width * made[2].height))


def _line(frame: Frame, prediction: Prediction) -> bytes:
    line = {"frame": frame.index, "time": round(frame.seconds, 6), "segments": prediction.to_json()}
    return json.dumps(line, allow_nan=False).encode() + b"\n"


class Interruptions:
    """A context manager for the main thread that defers Ctrl+C and SIGTERM, except in `released` blocks.

    So frames are written whole, and an interrupted video is playable. The third signal is not deferred.
    """

    def __init__(self) -> None:
        self.is_released, self.count = False, 0
        self.before: dict[int, Any] = {}

    @contextmanager
    def released(self) -> Iterator[None]:
        """Lets Ctrl+C interrupt the block; a deferred one raises KeyboardInterrupt at its start."""
        self.check()
        self.is_released = True
        try:
            yield
        finally:
            self.is_released = False

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl+C was deferred."""
        if self.count:
            raise KeyboardInterrupt

    def __enter__(self) -> "Interruptions":
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT, signal.SIGTERM)
            self.before = {number: signal.signal(number, self._interrupt) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is None:
            self.check()

    def _interrupt(self, number: int, frame: Any) -> None:
        self.count += 1
        if self.is_released or self.count > 2:
            raise KeyboardInterrupt


def predict_films(run: FilmRun, sources: Iterable[str], names: Iterable[Path], problems: list[str]) -> int:
    """Predicts videos in turn; returns the number written.

    Args:
        run: the settings that videos share.
        sources, names: see `predict_film`.
        problems: takes a sentence for each video that could not be read whole.

    Raises:
        OSError: something cannot be written.
        KeyboardInterrupt: after Ctrl+C.
    """
    written = 0
    with Interruptions() as guard:
        for source, name in zip(sources, names, strict=True):
            try:
                problem = predict_film(run, source, name, guard)
                written += 1
            except PredictorError:
                raise
            except VideoError as error:
                problem = printable(error)
            if problem is not None:
                problems.append(problem)
    return written


__all__ = [
    "EarlierOutputs", "FilmRun", "check_settings", "check_subtask", "find_sources", "live_file", "predict_films",
]  # fmt: skip
