"""What the page can run: a model's folder and its exports, each in the runtimes that it has files for."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runtime.answers import PANOPTIC_THRESHOLD
from ..runtime.network import PredictorError
from ..runtime.predictor import Predictor

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


__all__ = ["Choice", "open_choices"]
