"""The benefit of a teacher: the same student with and without one, at equal training time of the student.

    python benchmarks/distillation.py [--seconds N] [--scenes N] [--teacher MODEL] [--student NAME] [--out DIR]
    python benchmarks/distillation.py --data CAMVID --ignore-index 11 [--size PIXELS] [--teacher-seconds N]
        [--unlabelled FOLDER] ...

The student is a new model with random weights. It learns once from the labels alone, once from the labels and the
teacher, and with `--unlabelled` once more from both and from the teacher's predictions of these images, each for the
given number of seconds: CPU time on one thread, without evaluations, checkpoints and the teacher's forward passes,
whose time is printed separately. Other work on the teacher's outputs counts as the student's. So a run with a teacher
has fewer steps, and takes longer overall. The number of steps that fit is estimated first, from 50 steps; the time that
they then took is recorded.

The data are scenes of digits, with the shipped model as teacher; or a folder of semantic masks (`--data`, with train,
val and test), with the teacher in `--teacher`, or one that the script first trains from scratch for
`--teacher-seconds`. A killed run continues from its last checkpoint in `--out` with the same command. Prints a table
and appends a line to `distillation.jsonl` in `benchmarks/results/`.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measurement import record
from transformers import TrainerCallback
from transformers.utils import logging

from hf_faim2f.data import SegmentationCollator, TrainingItems
from hf_faim2f.data.collate import MixedItems, UnlabelledImages
from hf_faim2f.data.dataset import Description
from hf_faim2f.data.digits import DigitScenes
from hf_faim2f.data.formats import DataSource, open_data
from hf_faim2f.evaluation.evaluator import Evaluator
from hf_faim2f.family.digits import LABELS, THING_IDS
from hf_faim2f.training import Recipe, find_recipe, run
from hf_faim2f.training.distillation import Teacher, open_teacher
from hf_faim2f.training.start import recipe_at, start_model
from hf_faim2f.training.trainer import FaiM2FTrainer

SHIPPED = Path(__file__).parents[1] / "examples" / "digits"
TEST_SCENES, SIZE = 100, 128
# Steps of the initial measurement, of which the first are not timed.
TIMED, UNTIMED = 52, 2
TIMES = "times.json"


@dataclass(frozen=True)
class Data:
    """The training and test data, and the subtasks to evaluate."""

    description: Description
    train: Any
    test: Any
    subtasks: tuple[str, ...]
    size: int


class Clock(TrainerCallback):
    """CPU seconds of the steps, and of the teacher's forward passes within them; saved for a resumed run."""

    def __init__(self, out: Path, teacher: Teacher | None) -> None:
        self.path = out / TIMES
        self.steps: list[float] = []  # of each step, including the teacher
        self.taught: list[float] = []  # the teacher's part
        self._teacher = 0.0
        self._began = self._last = 0.0
        self._hooks: list[Any] = []
        if teacher is not None:
            self._hooks = [
                teacher.model.register_forward_pre_hook(lambda *_: setattr(self, "_began", time.process_time())),
                teacher.model.register_forward_hook(lambda *_: self._add_teacher()),
            ]

    def _add_teacher(self) -> None:
        self._teacher += time.process_time() - self._began

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and self.path.is_file():
            known = json.loads(self.path.read_text())
            self.steps, self.taught = known["steps"][: state.global_step], known["taught"][: state.global_step]
        self._start()

    def _start(self) -> None:
        self._last, self._teacher = time.process_time(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(time.process_time() - self._last)
        self.taught.append(self._teacher)
        self.path.write_text(json.dumps({"steps": self.steps, "taught": self.taught}))
        self._start()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start()

    on_evaluate = on_log = on_save

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()


def open_digits(scenes: int) -> Data:
    description = Description("scenes of digits", "panoptic", tuple(LABELS), frozenset(THING_IDS))
    train, test = DigitScenes("train", scenes, SIZE), DigitScenes("test", TEST_SCENES, SIZE)
    return Data(description, train, test, ("semantic", "instance"), SIZE)


def open_folder(root: str, ignore_index: int, size: int) -> Data:
    source = DataSource(root, ignore_index=ignore_index, splits=(None, "test"))
    train, test = open_data("folder", source, "train"), open_data("folder", source, "validation")
    return Data(train.description, train.items, test.items, ("semantic",), size)


def recipe_for(data: Data, steps: int) -> Recipe:
    """The recipe: for the digits as in `learning.py`, for a folder `from-scratch`."""
    if data.subtasks == ("semantic",):
        return replace(recipe_at(find_recipe("from-scratch"), data.size), steps=steps, warmup_steps=max(1, steps // 20))
    return Recipe(
        "compared", steps, batch_size=8, learning_rate=6e-4, backbone_multiplier=1.0, schedule="cosine",
        warmup_steps=max(1, steps // 20), clip=5.0, ema_decay=0.99,
    )  # fmt: skip


def learn(data: Data, name: str, teacher: Teacher | None, steps: int, out: Path, measure: bool) -> tuple[Any, Clock]:
    """Trains a new model of this name in a folder; returns the trainer and the times."""
    torch.manual_seed(0)
    start = start_model(name, data.description, from_scratch=True, image_size=data.size)
    recipe, clock = recipe_for(data, steps), Clock(out, teacher)
    evaluator = Evaluator(
        start.processor, data.description.id2label, data.subtasks, sorted(data.description.things) or None
    )

    class Timed(FaiM2FTrainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.add_callback(clock)

    out.mkdir(parents=True, exist_ok=True)
    run.FaiM2FTrainer = Timed  # type: ignore[misc]
    try:
        trainer = run.train(
            start.model, start.processor, TrainingItems(data.train, recipe.augmentations),
            data.test if measure else None, recipe, out,
            evaluator=evaluator if measure else None, save_every=max(1, steps // 10) if measure else steps,
            log_every=max(1, steps // 20),
            collator=SegmentationCollator(start.processor, do_resize=not recipe.augmentations), teacher=teacher,
        )  # fmt: skip
    finally:
        run.FaiM2FTrainer = FaiM2FTrainer  # type: ignore[misc]
        clock.stop()
    return trainer, clock


def planned(data: Data, name: str, teacher: Teacher | None, seconds: float, out: Path) -> int:
    """The number of steps that fit into the student's time; measured once, and saved for a resumed run."""
    plan = out / "plan.json"
    if plan.is_file():
        return int(json.loads(plan.read_text())["steps"])
    with tempfile.TemporaryDirectory() as folder:
        _, clock = learn(data, name, teacher, TIMED, Path(folder), measure=False)
    own = [step - part for step, part in zip(clock.steps, clock.taught, strict=True)][UNTIMED:]
    steps = max(1, round(seconds * len(own) / sum(own)))
    out.mkdir(parents=True, exist_ok=True)
    plan.write_text(json.dumps({"steps": steps, "seconds_a_step": sum(own) / len(own)}))
    return steps


def main() -> None:
    """Trains both students and compares them; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder of semantic masks with train and test (default: scenes of digits)")
    parser.add_argument("--ignore-index", type=int, default=255)
    parser.add_argument("--size", type=int, default=360, help="shorter side of the pictures of --data")
    parser.add_argument("--scenes", type=int, default=1000, help="scenes of digits to learn from")
    parser.add_argument("--seconds", type=float, default=600, help="the student's time")
    parser.add_argument("--student", help="a new model (default: digits, or fai-m2f-s-ade for --data)")
    parser.add_argument("--teacher", help="(default: the model that ships, or one that is trained first for --data)")
    parser.add_argument("--teacher-model", default="fai-mf-m-ade", help="the teacher to train first for --data")
    parser.add_argument("--teacher-seconds", type=float, default=3600)
    parser.add_argument("--unlabelled", help="also learn from the teacher on the images of this folder")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "faim2f-distillation")
    options = parser.parse_args()
    print(__doc__)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    data = open_digits(options.scenes)
    if options.data:
        data = open_folder(options.data, options.ignore_index, options.size)
    name = options.student or ("fai-m2f-s-ade" if options.data else "digits")
    of_teacher = options.teacher or str(SHIPPED)
    if options.data and not options.teacher:
        folder = options.out / "teacher"
        steps = planned(data, options.teacher_model, None, options.teacher_seconds, folder)
        print(f"The teacher, {options.teacher_model}: {steps} steps.", flush=True)
        learn(data, options.teacher_model, None, steps, folder, measure=True)
        of_teacher = str(folder / "final")
    teacher = open_teacher(of_teacher, data.description, TrainingItems(data.train))
    evaluator = Evaluator(
        teacher.processor, data.description.id2label, data.subtasks, sorted(data.description.things) or None
    )
    print(*teacher.notes, sep="\n", flush=True)
    measured = {"the teacher": {"steps": None, "student": None, "teacher": None,
                                **figures(evaluator(teacher.model, data.test))}}  # fmt: skip
    arms = [("labels", None, data), ("labels and teacher", teacher, data)]
    if options.unlabelled:
        mixed = replace(data, train=MixedItems(data.train, UnlabelledImages(options.unlabelled)))
        arms.append(("labels, teacher and unlabeled images", teacher, mixed))
    for arm, own, seen in arms:
        folder = options.out / arm.replace(", ", "-").replace(" ", "-")
        steps = planned(seen, name, own, options.seconds, folder)
        print(f"\n{name}, {arm}: {steps} steps.", flush=True)
        trainer, _ = learn(seen, name, own, steps, folder, measure=True)
        times = json.loads((folder / TIMES).read_text())
        part = sum(times["taught"])
        measured[arm] = {"steps": steps, "student": round(sum(times["steps"]) - part, 1), "teacher": round(part, 1),
                         **figures(trainer.results[1])}  # fmt: skip
    record(
        "distillation",
        {"data": data.description.name if not options.data else Path(options.data).name, "student": name,
         "teacher": teacher.short_name, "train_images": len(data.train), "test_images": len(data.test),
         "seconds": options.seconds, "measured": measured},
        threads=1,
    )  # fmt: skip
    names = list(figures({subtask: {"mIoU": 0.0, "AP": 0.0} for subtask in data.subtasks}))
    print(f"\n| {name} | steps | student, s | teacher, s | {' | '.join(names)} |")
    print("| --- " * (4 + len(names)) + "|")
    for arm, row in measured.items():
        times_of = [str(row[key]) if row[key] is not None else "–" for key in ("steps", "student", "teacher")]
        print(f"| {arm} | {' | '.join(times_of)} | {' | '.join(f'{row[metric]:.1f}' for metric in names)} |")


def figures(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """mIoU, and AP if it was measured, in percent."""
    found = {"mIoU": round(float(results["semantic"]["mIoU"]), 2)}
    if "instance" in results:
        found["AP"] = round(float(results["instance"]["AP"]), 2)
    return found


if __name__ == "__main__":
    main()
