"""Writes the shipped model, `examples/digits/`, from the last of the training runs in `STAGES`.

    python examples/publish_digits.py RUN...

Each RUN is the folder of a finished stage, whose curve is copied; the last stage must be among them. The curves of the
other stages stay as they are in `examples/digits/`. Weights are stored in half precision and load as float32. The
card's results are measured on the stored weights, with held-out scenes that share no digit and no part of a photograph
with the training scenes.
"""

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from safetensors.torch import load_file, save_file

from hf_faim2f.data.formats import DataSource, open_data
from hf_faim2f.evaluation.evaluator import SUBTASKS, Evaluator
from hf_faim2f.evaluation.report import per_class_table, scalars
from hf_faim2f.family.digits import LABELS, RESOLUTION, THING_IDS
from hf_faim2f.hub.card import model_card
from hf_faim2f.hub.results import Measured
from hf_faim2f.model.configuration_faim2f import FaiM2FConfig
from hf_faim2f.training.recipe import Recipe, find_recipe
from hf_faim2f.zoo import open_model

TARGET = Path(__file__).parent / "digits"


@dataclass(frozen=True)
class Stage:
    """One training run, with the recipe `digits`.

    Attributes:
        resolution: side of a scene as the model sees it, in pixels.
        steps: of the whole model.
        learning_rate: at its peak.
        minutes: on one core.
        options: of `faim2f train`, beyond the defaults.
    """

    resolution: int
    steps: int
    learning_rate: float
    minutes: int
    options: str = ""

    @property
    def out(self) -> str:
        """The name of its folder, and of its curve in the published one."""
        return "digits" if self == STAGES[0] else f"digits-{self.resolution}"

    @property
    def curve(self) -> str:
        return "curve.png" if self == STAGES[0] else f"curve-{self.resolution}.png"


FIRST = find_recipe("digits")
STAGES = (
    Stage(RESOLUTION, FIRST.steps, FIRST.learning_rate, 72),
    Stage(256, 2000, 3e-4, 17),
    Stage(320, 4000, 4e-4, 48, "--precision bf16"),
    Stage(384, 4200, 5e-4, 96, "--precision bf16"),
)


def command(stage: Stage, before: Stage | None) -> str:
    """The command of a stage that starts from the weights of the one before."""
    if before is None:
        return f"faim2f train --format digits --model digits --recipe digits --out runs/{stage.out}"
    options = f"--image-size {stage.resolution} {stage.options}".strip()
    return (
        f"faim2f train --format digits --model runs/{before.out}/final --recipe digits --steps {stage.steps} \\\n"
        f"    --learning-rate {stage.learning_rate:g} {options} --out runs/{stage.out}"
    )


COMMANDS = "\n".join(command(stage, before) for stage, before in zip(STAGES, (None, *STAGES), strict=False))
# The hand-written part of the card; `model_card` writes the rest.
WORDS = """\
# FAI-M2F digits

The smallest member of the FAI-M2F family of `hf_faim2f`, trained from scratch to find handwritten digits in synthetic
scenes: images of digits pasted on photographs. It exists so that the package can be demonstrated, tested and measured
with a trained model: {parameters:.1f} million parameters, {megabytes:.1f} MB.

The package's repository holds it in `examples/digits`, without the model's code. `make demo` writes the complete Hub
folder, which the snippets below load, to `demo-output/digits`.

## Intended use and limits

It segments the scenes of `hf_faim2f.data.digits` into the classes
{labels}.
Images are enlarged so that the shorter side has {resolution} pixels. It is not a general digit reader: the digits in
its training scenes are 8x8 images of one dataset, enlarged to between 0.24 and 0.44 of the scene and rotated by at
most 25 degrees.

## Training

```bash
{commands}
```

First, {backbone_steps:,} steps trained the backbone alone to classify segments. Then the whole model was trained, on
larger and larger scenes, because masks at a quarter of {first_resolution} pixels were too coarse for strokes:

{stages}

Each step used {batch_size} scenes. No pretrained weights were used. Each training scene was generated: digits of
scikit-learn's `load_digits` (Alpaydin and Kaynak, UCI 1998; four fifths of them) over parts of its two photographs,
among strokes and blots. AdamW with cosine decay, moving average of the weights with decay {ema_decay}, seed 0, on one
thread of a shared CPU.

{note}

{curves}

## What the results were measured on

{images} held-out scenes of 128x128 pixels with 1 to 8 digits. They share no digit and no part of a photograph with the
training scenes.

## License

Weights and code are licensed under Apache-2.0.
"""
TABLE = "Each class on Scenes of digits (test)"
NOTE = (
    "The shipped model was not trained in one go: the first command was run with `--steps 6 --backbone-steps 4000`, "
    "which trained the backbone, and that run was then resumed with all steps; the third started from the published "
    "half-precision weights of the second."
)


def half_precision(path: Path) -> None:
    """Converts the floating-point weights of a safetensors file to float16."""
    state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})


def measured(folder: Path) -> tuple[dict[str, Any], int]:
    """All metrics of the folder's model on the held-out scenes, and their number."""
    data = open_data("digits", DataSource(), "validation")
    model, processor = open_model(folder)
    evaluator = Evaluator(processor, dict(enumerate(LABELS)), SUBTASKS, THING_IDS)
    return evaluator(model.eval(), data.items), len(data.items)


def own_words(config: FaiM2FConfig, images: int, parameters: int, size: int, recipe: Recipe) -> str:
    """Fills in the hand-written sections of the card."""
    rows = [
        "| scenes enlarged to | steps | learning rate | precision | minutes |",
        "| ---: | ---: | ---: | --- | ---: |",
    ]
    rows += [
        f"| {stage.resolution} pixels | {stage.steps:,} | {stage.learning_rate:g} | "
        f"{'bfloat16' if 'bf16' in stage.options else 'float32'} | {stage.minutes} |"
        for stage in STAGES
    ]
    first, *later = STAGES
    curves = [f"![Losses, and metrics on held-out scenes, from scratch]({first.curve})"]
    curves += [f"![The same on scenes of {stage.resolution} pixels]({stage.curve})" for stage in later]
    return WORDS.format(
        parameters=parameters / 1e6,
        megabytes=size / 1e6,
        labels=", ".join(config.id2label[index] for index in sorted(config.id2label)),
        resolution=STAGES[-1].resolution,
        first_resolution=RESOLUTION,
        images=images,
        commands=COMMANDS,
        stages="\n".join(rows),
        curves="\n".join(curves),
        batch_size=recipe.batch_size,
        backbone_steps=recipe.backbone_steps,
        ema_decay=recipe.ema_decay,
        note=NOTE,
    )


def card(
    words: str, config: FaiM2FConfig, size: dict[str, int], results: list[EvalResult], table: str, title: str
) -> str:
    """The folder's README.md, including the Hub's metadata."""
    return model_card(
        "fai-m2f-digits",
        config,
        size=size,
        results=results,
        tables={title: table},
        license="apache-2.0",
        repository="demo-output/digits",
        before=words,
    )


def stage_of(run: Path) -> Stage:
    """The stage that a finished run is."""
    recipe = json.loads((run / "log.json").read_text(encoding="utf-8"))["recipe"]
    for stage in STAGES:
        if (recipe["name"], recipe["steps"], recipe["learning_rate"]) == ("digits", stage.steps, stage.learning_rate):
            return stage
    sys.exit(f"{run} is not a finished run of one of the commands:\n{COMMANDS}")


def main(runs: list[Path]) -> None:
    """Writes a new folder, and replaces the old one when it is complete."""
    by_stage = {stage_of(run): run for run in runs}
    if STAGES[-1] not in by_stage:
        sys.exit(f"None of the runs is that of the last command:\n{COMMANDS}")
    with tempfile.TemporaryDirectory(dir=TARGET.parent) as made:
        folder = Path(made) / "digits"
        model, processor = open_model(by_stage[STAGES[-1]] / "final")
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        half_precision(folder / "model.safetensors")
        for stage in STAGES:
            source = by_stage[stage] / "curve.png" if stage in by_stage else TARGET / stage.curve
            shutil.copy(source, folder / stage.curve)
        results, images = measured(folder)
        bytes_written = sum(file.stat().st_size for file in folder.iterdir())
        parameters = sum(parameter.numel() for parameter in model.parameters())
        words = own_words(model.config, images, parameters, bytes_written, FIRST)
        chosen = {"semantic": ("mIoU", "pACC"), "instance": ("AP", "AP50", "AP75"), "panoptic": ("PQ", "SQ", "RQ")}
        metrics = {
            subtask: {name: value for name, value in values.items() if name in chosen[subtask]}
            for subtask, values in scalars(results).items()
        }
        evaluations = Measured("digits", "Scenes of digits", "test", images, 0, metrics).results()
        table = per_class_table(results, "").partition("In percent.")[2].strip()
        text = card(words, model.config, processor.to_dict()["size"], evaluations, table, TABLE)
        (folder / "README.md").write_text(text, encoding="utf-8")
        for file in folder.glob("*.py"):  # the repository has this code already, in hf_faim2f/model/
            file.unlink()
        old = Path(made) / "old"
        TARGET.rename(old)
        try:
            folder.rename(TARGET)
        except OSError:
            old.rename(TARGET)
            raise
    print(f"{TARGET}: {bytes_written / 1e6:.1f} MB")
    for subtask, values in scalars(results).items():
        print(subtask, {name: round(value, 2) for name, value in values.items()})


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main([Path(name) for name in sys.argv[1:]])
