"""Training from scratch on scenes of digits: our smallest model against transformers' Mask2Former (Swin-T).

    python benchmarks/learning.py [STEPS]

Both get the same scenes in the same order, with the same batches, steps, optimizer, schedule and metrics, on one
thread, alternating every twelfth of the steps. The classes are "digit" and "background", because neither model learns
to distinguish the digits from scratch in a few hundred steps. Time is the CPU time of training without evaluations. On
one thread it equals wall-clock time on an idle core, even if other programs run; wall-clock time is also recorded.

Writes `learning.png` and appends a line to `learning.jsonl` in `benchmarks/results/`.
"""

import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import transformers
from measurement import RESULTS, record
from torch import nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from hf_faim2f import FaiM2FConfig, FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.data import SegmentationCollator
from hf_faim2f.data.digits import BACKGROUND, DigitScenes
from hf_faim2f.data.item import Item
from hf_faim2f.evaluation.evaluator import Evaluator
from hf_faim2f.family.digits import digits_config
from hf_faim2f.training.recipe import Recipe, make_schedule, parameter_groups

SIZE, SCENES, TURNS = 128, 100, 12
LABELS = {0: "digit", 1: "background"}


@dataclass(frozen=True)
class UnnamedDigits:
    """Scenes of digits with the ten digits as one class."""

    scenes: DigitScenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Item:
        item = self.scenes[index].copy()
        item["classes"] = (item["classes"] == BACKGROUND).long()
        return item


def our_config() -> FaiM2FConfig:
    config = digits_config()
    config.id2label = dict(LABELS)
    config.label2id = {label: index for index, label in LABELS.items()}
    return config


def our_model() -> nn.Module:
    return FaiM2FForUniversalSegmentation(our_config())


def their_model() -> nn.Module:
    """transformers' Mask2Former with Swin-T, with the same labels, queries and points as ours."""
    ours = our_config()
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            depths=[2, 2, 6, 2],
            num_heads=[3, 6, 12, 24],
            embed_dim=96,
            window_size=7,
            drop_path_rate=0.3,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        num_queries=ours.num_queries,
        train_num_points=ours.train_num_points,
        id2label=dict(LABELS),
    )
    return Mask2FormerForUniversalSegmentation(config)


class Contender:
    """A model, its optimizer, and its training time so far."""

    def __init__(self, name: str, model: nn.Module, binary: bool, recipe: Recipe) -> None:
        self.name, self.model, self.recipe = name, model.train(), recipe
        self.processor = FaiM2FImageProcessor.from_model_config(
            our_config(), size={"shortest_edge": SIZE, "longest_edge": 4 * SIZE}
        )
        self.collator = SegmentationCollator(self.processor, compact=not binary)
        groups = parameter_groups(model, recipe)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate)
        self.schedule = make_schedule(self.optimizer, recipe)
        self.wall = self.processor_seconds = 0.0
        self.points: list[dict[str, float]] = []

    def steps(self, scenes: UnnamedDigits, first: int, last: int) -> None:
        """Steps first..last of the training, on this contender's clock."""
        wall, used = time.perf_counter(), time.process_time()
        self.model.train()
        for step in range(first, last):
            start = step * self.recipe.batch_size
            batch = self.collator([scenes[start + k] for k in range(self.recipe.batch_size)])
            loss = self.model(**batch).loss
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
            self.optimizer.step()
            self.schedule.step()
        self.wall += time.perf_counter() - wall
        self.processor_seconds += time.process_time() - used

    def measure(self, step: int, scenes: UnnamedDigits) -> None:
        """Records mIoU and AP on held-out scenes, and the time so far."""
        evaluator = Evaluator(self.processor, LABELS, ("semantic", "instance"), thing_ids=(0,))
        result = evaluator(self.model, scenes)  # type: ignore[arg-type]
        self.points.append(
            {
                "step": step,
                "seconds": round(self.wall, 1),
                "processor_seconds": round(self.processor_seconds, 1),
                "mIoU": round(result["semantic"]["mIoU"], 2),
                "AP": round(result["instance"]["AP"], 2),
            }
        )
        print(f"{self.name:24}", *(f"{key} {value:8.1f}" for key, value in self.points[-1].items()), flush=True)


def turns(steps: int) -> Iterator[tuple[int, int]]:
    bounds = [round(steps * turn / TURNS) for turn in range(TURNS + 1)]
    yield from itertools.pairwise(bounds)


def draw(contenders: list[Contender]) -> None:
    """Plots both metrics against the training time, as `learning.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, metric in zip(axes, ("mIoU", "AP"), strict=True):
        for contender in contenders:
            x = [point["processor_seconds"] / 60 for point in contender.points]
            axis.plot(x, [point[metric] for point in contender.points], marker="o", label=contender.name)
        axis.set(xlabel="minutes of training, one core", ylabel=f"{metric}, percent", title=f"{metric}, held out")
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "learning.png", dpi=90)


def main() -> None:
    """Trains both and compares; see the top of this file."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 480
    print(__doc__)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    recipe = Recipe(
        "compared", steps, batch_size=8, learning_rate=3e-4, backbone_multiplier=1.0, schedule="cosine",
        warmup_steps=steps // 20, clip=1.0,
    )  # fmt: skip
    contenders = []
    for name, make in (("hf_faim2f, digits", our_model), ("Mask2Former, Swin-T", their_model)):
        torch.manual_seed(0)
        model = make()
        contenders.append(Contender(name, model, binary=make is their_model, recipe=recipe))
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")
    train = UnnamedDigits(DigitScenes("train", 10**6, SIZE))
    test = UnnamedDigits(DigitScenes("test", SCENES, SIZE))
    for first, last in turns(steps):
        for contender in contenders:
            contender.steps(train, first, last)
            contender.measure(last, test)
        draw(contenders)
    record("learning", {"steps": steps, "points": {c.name: c.points for c in contenders}}, threads=1)
    print("\n| | steps | minutes | mIoU | AP |\n| --- | --- | --- | --- | --- |")
    for contender in contenders:
        last_point = contender.points[-1]
        print(f"| {contender.name} | {steps} | {last_point['processor_seconds'] / 60:.1f} | "
              f"{last_point['mIoU']:.1f} | {last_point['AP']:.1f} |")  # fmt: skip


if __name__ == "__main__":
    main()
