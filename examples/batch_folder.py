"""Segments all photographs in a folder and writes a table of their objects.

    python examples/batch_folder.py FOLDER OUT.csv [MODEL]

MODEL is a folder or Hub id (default: `examples/digits`). Images are read while the network runs; those that cannot be
read are reported and skipped. The command `faim2f predict` also writes masks and overlays.
"""

import csv
import sys
from pathlib import Path

from hf_faim2f.errors import ImageError
from hf_faim2f.model.image_loading_faim2f import IMAGE_SUFFIXES
from hf_faim2f.runtime import Predictor


def main(folder: str, table: str, model_name: str = str(Path(__file__).parent / "digits")) -> int:
    """Writes the table; returns 1 if an image was skipped, else 0."""
    if not Path(folder).is_dir():
        sys.exit(f"{folder} is not a folder: name one with images in it.")
    photographs = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    predictor = Predictor.from_pretrained(model_name)
    left_out = 0
    rows: list[tuple[object, ...]] = []
    for place, made in predictor.stream(photographs, subtask="instance", batch_size=4):
        if isinstance(made, ImageError):
            print(made, file=sys.stderr)
            left_out += 1
            continue
        for segment in made.segments:
            rows.append((photographs[place].name, segment.label, f"{segment.score:.3f}", *segment.box))
    with Path(table).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "label", "score", "x_min", "y_min", "x_max", "y_max"))
        writer.writerows(sorted(rows))
    print(f"{len(rows)} segments in {len(photographs) - left_out} images: {table}")
    return 1 if left_out else 0


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
