"""Learning from scratch on CamVid at equal training time: ours, SegFormer-B0 and Mask2Former Swin-T.

    python benchmarks/camvid.py --data CAMVID [--minutes 30 120] [--models NAME ...] [--out RUNS]

CAMVID has `train`, `val` and `test`, each with `images` and `masks`, and `labels.txt`; mask value 11 is "no label".
Every model starts from random weights, trains on `train` (367 photographs of 480x360) for each budget of minutes, one
after the other, and is evaluated on `test` (233): whole images, 11 classes. Nothing is tuned on `test`; evaluations
during training use `val` (101).

- Ours: the recipe `from-scratch`.
- SegFormer-B0: transformers' model with the recipe of its paper: AdamW at 6e-5, ten times that in the head, scales 0.5
  to 2 of whole images. The paper starts from ImageNet's weights, so `segformer-b0-ours` has our recipe instead.
- Mask2Former Swin-T: transformers' model with the recipe of its paper, except that the backbone, which is random here,
  trains at the full rate. It trains in float32. Some of its first gradients are so large that their norm overflows;
  clipping then sets them to 0, as in the authors' code.

Only training counts as time, not evaluation, and learning rates follow the time, so that every model completes its
schedule. Budgets are wall-clock time on an idle machine. With `--clock cpu` they are CPU time, minutes x threads, which
is the same on an idle machine and fairer on a shared one. A run resumes from its last evaluation.

Writes `camvid.png` and appends a line to `camvid.jsonl` in `benchmarks/results/`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from measurement import RESULTS, record
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
)

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.data import SegmentationCollator
from hf_faim2f.data.augmentation import mask2former_semantic_augmentations
from hf_faim2f.data.collate import TrainingItems
from hf_faim2f.data.dataset import Description
from hf_faim2f.data.formats import DataSource, open_data
from hf_faim2f.data.item import Item, class_map
from hf_faim2f.evaluation.semantic import SemanticMetric
from hf_faim2f.training.recipe import Recipe, averaged_weights, find_recipe, parameter_groups
from hf_faim2f.training.start import recipe_at, start_model

NO_LABEL, VOID = 11, 255
HEIGHT, WIDTH = 360, 480
MEASURED = 10  # number of evaluations in each budget
SPLITS = ("train", "val", "test")
DEFAULT = ["fai-m2f-s-ade", "bisenetformer-s-ade", "segformer-b0", "segformer-b0-ours", "mask2former-swin-t"]
# mIoU on `test` of models trained on this split at this resolution, as published in their papers.
PUBLISHED = {
    "ENet (2016), from scratch": 51.3,
    "SegNet (2017), ImageNet": 60.1,
    "FC-DenseNet-56 (2017), from scratch": 58.9,
    "FC-DenseNet-103 (2017), from scratch": 66.9,
}


@dataclass(frozen=True)
class Peer:
    """A model of this benchmark.

    Args:
        make: returns the new model, with random weights.
        recipe: how it is trained. Its `steps` only shape the schedule.
        head: the part of the model with ten times the recipe's learning rate; "" for none.
        binary: whether the model's loss takes binary masks rather than maps of segment ids.
        full_precision: whether it trains in float32 in any case.
    """

    make: Callable[[Description], Any]
    recipe: Recipe
    head: str = ""
    binary: bool = False
    full_precision: bool = False


def ours(name: str) -> Callable[[Description], nn.Module]:
    def make(description: Description) -> nn.Module:
        return start_model(name, description, from_scratch=True).model

    return make


def segformer(description: Description) -> nn.Module:
    """A new SegFormer-B0: the defaults of transformers' configuration."""
    return SegformerForSemanticSegmentation(SegformerConfig(id2label=description.id2label))


def mask2former(description: Description) -> nn.Module:
    backbone = SwinConfig(
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        embed_dim=96,
        window_size=7,
        drop_path_rate=0.3,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=backbone, id2label=description.id2label)
    )


OF_PAPERS = mask2former_semantic_augmentations(HEIGHT, HEIGHT, WIDTH, None)
SEGFORMER = Recipe(
    "segformer", 1000, batch_size=8, learning_rate=6e-5, backbone_multiplier=1.0, weight_decay=0.01, schedule="poly",
    warmup_steps=10, clip=float("inf"), augmentations=OF_PAPERS,
)  # fmt: skip
OURS = recipe_at(find_recipe("from-scratch"), HEIGHT)
PEERS = {
    "fai-m2f-s-ade": Peer(ours("fai-m2f-s-ade"), OURS),
    "bisenetformer-s-ade": Peer(ours("bisenetformer-s-ade"), OURS),
    "fai-mf-m-ade": Peer(ours("fai-mf-m-ade"), OURS),
    "segformer-b0": Peer(segformer, SEGFORMER, head="decode_head"),
    "segformer-b0-ours": Peer(segformer, OURS),
    "mask2former-swin-t": Peer(
        mask2former,
        Recipe("mask2former", 1000, 8, backbone_multiplier=1.0, schedule="poly", augmentations=OF_PAPERS),
        binary=True,
        full_precision=True,
    ),
}


class Data:
    """The three splits in memory, and the image processor that all models share."""

    def __init__(self, root: Path) -> None:
        self.items: dict[str, list[Item]] = {}
        for split in SPLITS:
            opened = open_data("folder", DataSource(str(root), splits=(split, split), ignore_index=NO_LABEL), "train")
            self.items[split] = [opened.items[index] for index in range(len(opened.items))]
        self.description = opened.description
        # The default mean and deviation are ImageNet's, as in all three models.
        self.processor = FaiM2FImageProcessor(size={"height": HEIGHT, "width": WIDTH})


class Run:
    """A model in training, its clock and its curve. It resumes from its last evaluation."""

    def __init__(self, name: str, minutes: float, data: Data, options: argparse.Namespace) -> None:
        self.name, self.minutes, self.data, self.options = name, minutes, data, options
        self.peer, self.recipe = PEERS[name], PEERS[name].recipe
        self.clock = time.process_time if options.clock == "cpu" else time.perf_counter
        self.seconds, self.steps, self.points = 0.0, 0, list[dict[str, float]]()
        torch.manual_seed(0)
        self.model: Any = self.peer.make(data.description)
        self.model.to(memory_format=torch.channels_last).train()
        if self.recipe.mask_points:
            self.model.config.train_num_points = self.recipe.mask_points
        parts = [(self.model, self.recipe)]
        if self.peer.head:
            faster = replace(self.recipe, learning_rate=10 * self.recipe.learning_rate)
            children = self.model.named_children()
            parts = [(part, faster if name == self.peer.head else self.recipe) for name, part in children]
        groups = [group for part, recipe in parts for group in parameter_groups(part, recipe)]
        self.optimizer = torch.optim.AdamW([{**group, "peak": group["lr"]} for group in groups])
        decay = self.recipe.ema_decay
        self.average = averaged_weights(self.model, decay) if decay else None
        self.train_items = TrainingItems(data.items["train"], self.recipe.augmentations)
        self.collator = SegmentationCollator(data.processor, compact=not self.peer.binary)
        self.state = options.out / f"{name}-{minutes:g}.pt"
        self.about = repr((self.recipe, self.budget, options.precision, options.clock, options.threads))
        if self.state.is_file():
            self._load()

    @property
    def budget(self) -> float:
        return 60 * self.minutes * (self.options.threads if self.options.clock == "cpu" else 1)

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "average": self.average}
        return {name: part for name, part in parts.items() if part is not None}

    def _load(self) -> None:
        state = torch.load(self.state, weights_only=True)
        if state["about"] != self.about:
            raise SystemExit(f"{self.state} was begun with other settings: choose another --out, or remove it.")
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.seconds, self.steps, self.points = state["seconds"], state["steps"], state["points"]
        torch.set_rng_state(state["random"])

    def _save(self) -> None:
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {
            "about": self.about,
            "seconds": self.seconds,
            "steps": self.steps,
            "points": self.points,
            "random": torch.get_rng_state(),
        }
        unfinished = self.state.with_suffix(".tmp")
        torch.save(state, unfinished)
        unfinished.replace(self.state)

    def batch(self) -> list[Item]:
        """The items of the next step: each photograph once per epoch, in an order that depends only on the epoch."""
        count, size = len(self.train_items), self.recipe.batch_size
        epoch, place = divmod(self.steps, count // size)
        self.train_items.set_epoch(epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
        return [self.train_items[index] for index in order[place * size : (place + 1) * size].tolist()]

    def loss(self, batch: dict[str, Any]) -> Tensor:
        if isinstance(self.model, SegformerForSemanticSegmentation):
            maps = [
                torch.cat([classes, torch.tensor([VOID])])[segments.long()]
                for segments, classes in zip(batch["mask_labels"], batch["class_labels"], strict=True)
            ]
            return self.model(pixel_values=batch["pixel_values"], labels=torch.stack(maps)).loss
        return self.model(**batch).loss

    def step(self) -> None:
        batch = self.collator(self.batch())
        batch["pixel_values"] = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
        half = self.options.precision == "bf16" and not self.peer.full_precision
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        if not norm.isfinite() and not all(bool(gradient.isfinite().all()) for gradient in gradients):
            raise FloatingPointError(f"The gradients of {self.name} are not finite.")
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.steps += 1

    def train(self) -> None:
        """Trains to the end of the budget, with evaluations in between."""
        while self.seconds < self.budget:
            start = self.clock()
            rate = self.recipe.rate(int(self.recipe.steps * self.seconds / self.budget))
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["peak"]
            self.step()
            self.seconds += self.clock() - start
            if self.seconds >= self.budget * (len(self.points) + 1) / MEASURED:
                done = self.seconds >= self.budget
                self.points.append(self.measure("test" if done else "val"))
                self._save()
                print(f"{self.name:22}", *(f"{key} {value:8.2f}" for key, value in self.points[-1].items()), flush=True)

    def measure(self, split: str) -> dict[str, float]:
        metric = SemanticMetric(self.data.description.id2label, ignore_index=VOID)
        for item in self.data.items[split]:
            true = class_map(item)
            metric.add(prediction=self.predict(item), reference=true.where(true >= 0, VOID))
        result = metric.compute()
        spent = self.seconds / (self.options.threads if self.options.clock == "cpu" else 1)
        return {
            "minutes": spent / 60,
            "steps": self.steps,
            f"{split} mIoU": result["mIoU"],
            f"{split} pACC": result["pACC"],
        }

    @torch.inference_mode()
    def predict(self, item: Item) -> Tensor:
        """The label map of a photograph, at its own size."""
        model = self.model if self.average is None else self.average.module
        model.eval()
        pixels = self.data.processor(item["image"], input_data_format="channels_first", return_tensors="pt")
        outputs = model(pixel_values=pixels["pixel_values"])
        size = tuple(item["segments"].shape)
        if isinstance(model, SegformerForSemanticSegmentation):
            labels = F.interpolate(outputs.logits, size=size, mode="bilinear", align_corners=False)[0].argmax(0)
        else:
            labels = self.data.processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0]
        self.model.train()
        return labels

    def rate(self) -> float:
        """Label maps per second at batch 1: the median of 20."""
        seconds = []
        for item in self.data.items["test"][:20]:
            start = time.perf_counter()
            self.predict(item)
            seconds.append(time.perf_counter() - start)
        return 1 / statistics.median(seconds)


def draw(runs: list[Run]) -> None:
    """Plots mIoU on `val` against the minutes of training, one panel for each budget, as `camvid.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    budgets = sorted({run.minutes for run in runs})
    figure, axes = pyplot.subplots(1, len(budgets), figsize=(6 * len(budgets), 4.2), sharey=True, squeeze=False)
    for axis, budget in zip(axes[0], budgets, strict=True):
        for run in (run for run in runs if run.minutes == budget):
            measured = [point for point in run.points if "val mIoU" in point]
            x, y = ([point[key] for point in measured] for key in ("minutes", "val mIoU"))
            axis.plot(x, y, marker="o", label=run.name)
        axis.set(xlabel="minutes of training", ylabel="mIoU on val, percent", title=f"{budget:g} minutes")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "camvid.png", dpi=90)


def main() -> None:
    """Trains, measures and compares; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", nargs="+", type=float, default=[30, 120])
    parser.add_argument("--models", nargs="+", choices=tuple(PEERS), default=DEFAULT)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--out", type=Path, default=Path("camvid-runs"), help="keeps the runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    options.out.mkdir(parents=True, exist_ok=True)
    data = Data(options.data)
    print({split: len(items) for split, items in data.items.items()}, ", ".join(data.description.labels), flush=True)
    runs = []
    for minutes in options.minutes:
        for name in options.models:
            run = Run(name, minutes, data, options)
            run.train()
            runs.append(run)
            draw(runs)
    rates = {run.name: run.rate() for run in runs}
    print("\n| from scratch on CamVid | " + " | ".join(f"{minutes:g} min" for minutes in options.minutes) +
          " | million parameters | label maps a second |\n" + "| --- " * (len(options.minutes) + 3) + "|")  # fmt: skip
    for name in options.models:
        own = [run for run in runs if run.name == name]
        found = " | ".join(f"{run.points[-1]['test mIoU']:.1f}" for run in own)
        millions = sum(parameter.numel() for parameter in own[0].model.parameters()) / 1e6
        print(f"| {name} | {found} | {millions:.1f} | {rates[name]:.1f} |")
    for name, value in PUBLISHED.items():
        print(f"| {name}, published |" + " |" * (len(options.minutes) - 1) + f" {value} | | |")
    curves = {f"{run.name}, {run.minutes:g} minutes": run.points for run in runs}
    about = {"precision": options.precision, "clock": options.clock, "rates": rates}
    record("camvid", {**about, "curves": curves}, threads=options.threads)


if __name__ == "__main__":
    main()
