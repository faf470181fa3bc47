"""Writes `examples/digits/`, the shipped model, from two finished trainings: from scratch, then on larger images.

    faim2f train --format digits --model digits --recipe digits --out RUN
    faim2f train --format digits --model RUN/final --recipe digits --steps 2000 --learning-rate 3e-4 \\
        --image-size 256 --out FINE
    python examples/publish_digits.py RUN FINE

Weights are stored in half precision and load as float32. The card's results are measured on the folder as it ships, on
held-out scenes that share no digit and no part of a photograph with training.
"""

import json
import shutil
import sys
import tempfile
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
FINE_STEPS = 2000
COMMANDS = f"""\
faim2f train --format digits --model digits --recipe digits --out runs/digits
faim2f train --format digits --model runs/digits/final --recipe digits --steps {FINE_STEPS} \\
    --learning-rate 3e-4 --image-size 256 --out runs/digits-256"""
# The hand-written part of the card; `faim2f card` writes the rest.
WORDS = """\
# FAI-M2F digits

The smallest member of the FAI-M2F family of `hf_faim2f`, trained from scratch to find handwritten digits in synthetic
scenes: images of digits pasted on photographs. It exists so that the package can be demonstrated, tested and measured
with a trained model: {parameters:.1f} million parameters, {megabytes:.1f} MB.

The package's repository holds it in `examples/digits`, without the model's code. `make demo` writes the complete Hub
folder, which the snippets below load, to `demo-output/digits`.

## Intended use and limits

It segments the scenes of `hf_faim2f.data.digits` into the classes {labels}. Images are enlarged so that the shorter
side has {resolution} pixels. It is not a general digit reader: the digits in its training scenes are 8x8 images of one
dataset, enlarged to between 0.24 and 0.44 of the scene and rotated by at most 25 degrees.

## Training

```bash
{commands}
```

First, {backbone_steps:,} steps trained the backbone alone to classify segments; then {steps:,} steps trained the whole
model on scenes enlarged to {first_resolution} pixels; the last {fine_steps:,} steps used scenes enlarged to
{resolution} pixels, because masks at a quarter of {first_resolution} pixels were too coarse for strokes. Each step used
{batch_size} scenes. No pretrained weights were used. Each training scene was generated: digits of scikit-learn's
`load_digits` (Alpaydin and Kaynak, UCI 1998; four fifths of them) over parts of its two photographs, among strokes and
blots. AdamW, learning rate {learning_rate:g} and then 0.0003, each with cosine decay, moving average of the weights
with decay {ema_decay}, float32, seed 0, on one thread of a shared CPU: about 14, 58 and {fine_minutes:.0f} minutes.
{note}

![Losses, and metrics on 100 held-out scenes, from scratch](curve.png)
![The same on larger images](curve-256.png)

## What the results were measured on

{images} held-out scenes of 128x128 pixels with 1 to 8 digits. They share no digit and no part of a photograph with the
training scenes.

## Licence

Weights and code are licensed under Apache-2.0.
"""
TABLE = "Each class on Scenes of digits (test)"
NOTE = (
    "The shipped model was not trained in one go: the first command was run with `--steps 6`, which trained the "
    "backbone, and that run was then resumed with all steps. The command above does both at once."
)


def half_precision(path: Path) -> None:
    """Converts the floating-point weights of a safetensors file to float16."""
    state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})


def measured(folder: Path) -> tuple[dict[str, Any], int]:
    """All metrics of the folder's model on the held-out scenes, and the number of scenes."""
    data = open_data("digits", DataSource(), "validation")
    model, processor = open_model(folder)
    evaluator = Evaluator(processor, dict(enumerate(LABELS)), SUBTASKS, THING_IDS)
    return evaluator(model.eval(), data.items), len(data.items)


def own_words(
    config: FaiM2FConfig, images: int, parameters: int, size: int, recipe: Recipe, resolution: int, seconds: float
) -> str:
    """Fills in the hand-written sections of the card."""
    return WORDS.format(
        parameters=parameters / 1e6,
        megabytes=size / 1e6,
        labels=", ".join(config.id2label[index] for index in sorted(config.id2label)),
        resolution=resolution,
        first_resolution=RESOLUTION,
        fine_steps=FINE_STEPS,
        fine_minutes=seconds / 60,
        images=images,
        commands=COMMANDS,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        backbone_steps=recipe.backbone_steps,
        learning_rate=recipe.learning_rate,
        ema_decay=recipe.ema_decay,
        note=NOTE,
    )


def card(
    words: str, config: FaiM2FConfig, size: dict[str, int], results: list[EvalResult], table: str, title: str
) -> str:
    """The folder's README.md, with the Hub's metadata in front."""
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


def finished(run: Path, steps: int) -> dict[str, Any]:
    """The log of a finished run of this many steps."""
    log = json.loads((run / "log.json").read_text(encoding="utf-8"))
    if log["recipe"]["name"] != "digits" or log["recipe"]["steps"] != steps:
        sys.exit(f"{run} is not a finished run of {steps} steps of the recipe digits.")
    return log


def main(run: Path, fine: Path) -> None:
    """Writes the folder, complete or not at all."""
    recipe = find_recipe("digits")
    finished(run, recipe.steps)
    seconds = next(entry["train_runtime"] for entry in finished(fine, FINE_STEPS)["log"] if "train_runtime" in entry)
    with tempfile.TemporaryDirectory(dir=TARGET.parent) as made:
        folder = Path(made) / "digits"
        model, processor = open_model(fine / "final")
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        half_precision(folder / "model.safetensors")
        shutil.copy(run / "curve.png", folder / "curve.png")
        shutil.copy(fine / "curve.png", folder / "curve-256.png")
        results, images = measured(folder)
        bytes_written = sum(file.stat().st_size for file in folder.iterdir())
        parameters = sum(parameter.numel() for parameter in model.parameters())
        size = processor.to_dict()["size"]
        words = own_words(model.config, images, parameters, bytes_written, recipe, size["shortest_edge"], seconds)
        chosen = {"semantic": ("mIoU", "pACC"), "instance": ("AP", "AP50", "AP75"), "panoptic": ("PQ", "SQ", "RQ")}
        metrics = {
            subtask: {name: value for name, value in values.items() if name in chosen[subtask]}
            for subtask, values in scalars(results).items()
        }
        evaluations = Measured("digits", "Scenes of digits", "test", images, 0, metrics).results()
        table = per_class_table(results, "").partition("In per cent.")[2].strip()
        text = card(words, model.config, size, evaluations, table, TABLE)
        (folder / "README.md").write_text(text, encoding="utf-8")
        for file in folder.glob("*.py"):  # the repository has this code already, in hf_faim2f/model/
            file.unlink()
        shutil.rmtree(TARGET, ignore_errors=True)
        folder.rename(TARGET)
    print(f"{TARGET}: {bytes_written / 1e6:.1f} MB")
    for subtask, values in scalars(results).items():
        print(subtask, {name: round(value, 2) for name, value in values.items()})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
