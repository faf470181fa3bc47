"""Fine-tunes a converted model on a folder of images with transformers' own Trainer.

    python examples/finetune_folder.py MODEL_FOLDER DATA_FOLDER OUT_FOLDER [STEPS]

DATA_FOLDER holds `images/`, `masks/` (PNGs of class ids with the images' names, 255 where nothing is labeled) and
`labels.txt` (one class name per line). OUT_FOLDER becomes a complete Hub folder.
"""

import sys

from transformers import Trainer, TrainingArguments

from hf_faim2f.data import SegmentationCollator, TrainingItems, describe, load_folder
from hf_faim2f.training.recipe import find_recipe, make_optimizer, make_schedule
from hf_faim2f.training.run import shortened
from hf_faim2f.training.start import start_model


def main(model_folder: str, data_folder: str, out_folder: str, steps: int = 2000) -> None:
    """Trains a model and saves it."""
    data = load_folder(data_folder)
    # `from_pretrained(model_folder, id2label=..., ignore_mismatched_sizes=True)`, and whatever else the data changes.
    start = start_model(model_folder, describe(data), new_labels=True)
    model, processor = start.model, start.processor
    recipe = shortened(find_recipe("finetune"), steps)
    optimizer = make_optimizer(model, recipe)
    arguments = TrainingArguments(
        output_dir=f"{out_folder}-checkpoints",
        max_steps=recipe.steps,
        per_device_train_batch_size=min(recipe.batch_size, len(data)),
        max_grad_norm=recipe.clip,
        logging_steps=max(1, steps // 20),
        remove_unused_columns=False,
        report_to=[],
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=TrainingItems(data, recipe.augmentations),
        data_collator=SegmentationCollator(processor),
        optimizers=(optimizer, make_schedule(optimizer, recipe)),
    )
    trainer.train()
    model.save_pretrained(out_folder)
    processor.save_pretrained(out_folder)


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    model_folder, data_folder, out_folder = sys.argv[1:4]
    main(model_folder, data_folder, out_folder, *map(int, sys.argv[4:]))
