"""Images of a few bright shapes on a dark ground, generated when read, which a small model learns in a minute."""

import base64
import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_faim2f.data.item import Item, make_item

LABELS = ("ground", "square", "disc", "bar")
THINGS = (1, 2, 3)
SIDE = 64


def shapes(seed: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """An image (64, 64, 3) uint8, a segment map (64, 64) counted from 0 (the ground), and the class of each segment."""
    random = np.random.default_rng(seed)
    segments, classes = np.zeros((SIDE, SIDE), dtype=np.int32), [0]
    pixels = random.normal(60, 12, (SIDE, SIDE, 3))
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for _ in range(int(random.integers(1, 4))):
        label = int(random.integers(1, len(LABELS)))
        row, column = random.integers(12, SIDE - 12, 2)
        height, width = {1: (10, 10), 2: (10, 10), 3: (4, 12)}[label]
        down, right = (rows - row) / height, (columns - column) / width
        mask = down**2 + right**2 <= 1 if label == 2 else np.maximum(abs(down), abs(right)) <= 1
        if (segments[mask] > 0).any():
            continue  # shapes do not overlap
        segments[mask] = len(classes)
        classes.append(label)
        pixels[mask] = np.array([[200, 90, 60], [90, 200, 60], [60, 90, 200]][label - 1]) + random.normal(
            0, 20, (int(mask.sum()), 3)
        )
    return pixels.clip(0, 255).astype(np.uint8), segments, classes


class Shapes:
    """A dataset of generated items."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count = count
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self.count:
            raise IndexError(index)
        pixels, segments, classes = shapes(self.seed + index)
        return make_item(
            torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(segments), classes, index, f"{index}.png"
        )


def write_folder(folder: Path, count: int, seed: int = 0) -> Path:
    """Writes `images`, `masks` with class ids, and `labels.txt`; returns the folder."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    (folder / "labels.txt").write_text("\n".join(LABELS) + "\n")
    for number in range(count):
        pixels, segments, classes = shapes(seed + number)
        Image.fromarray(pixels).save(folder / "images" / f"{number:03}.png")
        Image.fromarray(np.array(classes, dtype=np.uint8)[segments]).save(folder / "masks" / f"{number:03}.png")
    return folder


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths: column by column, starting with a run outside."""
    flat = mask.ravel(order="F")
    starts = [0, *(np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist(), flat.size]
    runs = np.diff(starts).tolist()
    return [0, *runs] if flat[0] else runs


def write_tree(form: str, root: Path, count: int = 2) -> Path:
    """Writes data in a format of `hf_faim2f.data.formats`, `count` images in both parts; returns the value of
    `--data`."""
    writers = {
        "ade20k": _write_ade20k,
        "coco-instance": _write_coco,
        "coco-panoptic": _write_coco,
        "cityscapes": _write_cityscapes,
        "hub": _write_parquet,
        "yolo": _write_yolo,
        "coco": _write_roboflow,
        "labelme": _write_labelme,
        "supervisely": _write_supervisely,
        "roboflow-masks": _write_roboflow_masks,
        "voc": _write_voc,
        "camvid": _write_camvid,
        "colors": _write_colors,
    }
    for part, seed in (("train", 0), ("val", 500)):
        if form == "folder":
            write_folder(root / part, count, seed)
        else:
            writers[form](root, part, [shapes(seed + number) for number in range(count)])
    return root


Scenes = list[tuple[np.ndarray, np.ndarray, list[int]]]


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _write_ade20k(root: Path, part: str, scenes: Scenes) -> None:
    split = {"train": "training", "val": "validation"}[part]
    for number, (pixels, segments, classes) in enumerate(scenes):
        name = f"ADE_{part}_{number:08}.png"
        _save(root / "images" / split / name, pixels)
        _save(root / "annotations" / split / name, np.array(classes, dtype=np.uint8)[segments] + 1)


def _write_coco(root: Path, part: str, scenes: Scenes) -> None:
    """Writes the instances of the shapes, and panoptic annotations that include the ground."""
    split = f"{part}2017"
    instances: list[dict[str, Any]] = []
    panoptic: list[dict[str, Any]] = []
    images = [
        {"id": number, "file_name": f"{number}.png", "height": SIDE, "width": SIDE} for number in range(len(scenes))
    ]
    for number, (pixels, segments, classes) in enumerate(scenes):
        _save(root / split / f"{number}.png", pixels)
        ids = (segments + 1).astype(np.uint8)
        _save(root / "annotations" / f"panoptic_{split}" / f"{number}.png", np.stack([ids, ids * 0, ids * 0], axis=-1))
        info = [{"id": k + 1, "category_id": label + 1} for k, label in enumerate(classes)]
        panoptic.append({"image_id": number, "file_name": f"{number}.png", "segments_info": info})
        for k, label in enumerate(classes):
            if label:
                rle = {"size": [SIDE, SIDE], "counts": _run_lengths(segments == k)}
                instances.append({"id": len(instances) + 1, "image_id": number, "category_id": label + 1,
                                  "iscrowd": 0, "segmentation": rle})  # fmt: skip
    categories = [{"id": k + 1, "name": name, "isthing": int(k in THINGS)} for k, name in enumerate(LABELS)]
    for kind, annotations in (("instances", instances), ("panoptic", panoptic)):
        document = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(document))


def _write_cityscapes(root: Path, part: str, scenes: Scenes) -> None:
    """The ground is road (7), squares are persons (24), discs are cars (26), bars are poles (17), which are stuff."""
    label_ids = np.array([7, 24, 26, 17])
    for number, (pixels, segments, classes) in enumerate(scenes):
        _save(root / "leftImg8bit" / part / "town" / f"town_{number}_leftImg8bit.png", pixels)
        of_segment = label_ids[classes]
        single = np.where(of_segment >= 24, of_segment * 1000 + np.arange(len(classes)), of_segment)
        stem = root / "gtFine" / part / "town" / f"town_{number}_gtFine"
        _save(stem.with_name(f"{stem.name}_labelIds.png"), of_segment[segments].astype(np.uint8))
        _save(stem.with_name(f"{stem.name}_instanceIds.png"), single[segments].astype(np.uint16))


def _write_parquet(root: Path, part: str, scenes: Scenes) -> None:
    import datasets

    def encoded(pixels: np.ndarray) -> dict[str, Any]:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    columns = {
        "image": [encoded(pixels) for pixels, _, _ in scenes],
        "label": [encoded(np.array(classes, dtype=np.uint8)[segments]) for _, segments, classes in scenes],
        "image_id": [f"{part}-{number}" for number in range(len(scenes))],
    }
    features = {"image": datasets.Image(), "label": datasets.Image(), "image_id": datasets.Value("string")}
    root.mkdir(parents=True, exist_ok=True)
    name = {"train": "train", "val": "validation"}[part]
    datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(str(root / f"{name}-0.parquet"))


def outline(mask: np.ndarray) -> list[list[int]]:
    """The outline [x, y] of a mask with one run per row, along pixel edges: down the right side, up the left side."""
    rows = np.flatnonzero(mask.any(1)).tolist()
    runs = {row: np.flatnonzero(mask[row]) for row in rows}
    right = [[int(runs[row][-1]) + 1, row + below] for row in rows for below in (0, 1)]
    left = [[int(runs[row][0]), row + below] for row in reversed(rows) for below in (1, 0)]
    return right + left


def _objects(segments: np.ndarray, classes: list[int]) -> list[tuple[int, list[list[int]]]]:
    """The class and the outline of each shape, without the ground."""
    return [(label, outline(segments == k)) for k, label in enumerate(classes) if label]


def _write_yolo(root: Path, part: str, scenes: Scenes) -> None:
    for number, (pixels, segments, classes) in enumerate(scenes):
        _save(root / "images" / part / f"{number}.png", pixels)
        lines = [
            " ".join(map(str, [label, *(value / SIDE for corner in corners for value in corner)]))
            for label, corners in _objects(segments, classes)
        ]
        path = root / "labels" / part / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(LABELS))
    (root / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}")


def _write_roboflow(root: Path, part: str, scenes: Scenes) -> None:
    """COCO as Roboflow exports it: the JSON is beside the images, and a category groups all others."""
    folder = root / {"train": "train", "val": "valid"}[part]
    annotations: list[dict[str, Any]] = []
    for number, (pixels, segments, classes) in enumerate(scenes):
        _save(folder / f"{number}.png", pixels)
        for label, corners in _objects(segments, classes):
            polygon = [value for corner in corners for value in corner]
            annotations.append({"id": len(annotations), "image_id": number, "category_id": label + 1, "iscrowd": 0,
                                "segmentation": [polygon]})  # fmt: skip
    images = [{"id": k, "file_name": f"{k}.png", "height": SIDE, "width": SIDE} for k in range(len(scenes))]
    categories = [{"id": 0, "name": "shapes", "supercategory": "none"}]
    categories += [{"id": k + 1, "name": name, "supercategory": "shapes"} for k, name in enumerate(LABELS)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(document))


def _write_labelme(root: Path, part: str, scenes: Scenes) -> None:
    for number, (pixels, segments, classes) in enumerate(scenes):
        _save(root / part / f"{number}.png", pixels)
        found: list[dict[str, Any]] = [
            {"label": LABELS[label], "points": corners, "group_id": None, "shape_type": "polygon", "flags": {}}
            for label, corners in _objects(segments, classes)
        ]
        document: dict[str, Any] = {
            "version": "5.5.0",
            "flags": {},
            "shapes": found,
            "imagePath": f"{number}.png",
            "imageData": None,
            "imageHeight": SIDE,
            "imageWidth": SIDE,
        }
        (root / part / f"{number}.json").write_text(json.dumps(document))
    (root / "labels.txt").write_text("\n".join(["__ignore__", *LABELS]))


def _write_supervisely(root: Path, part: str, scenes: Scenes) -> None:
    """Discs are bitmaps, squares and bars polygons, whose corners are the indices of pixels."""
    for number, (pixels, segments, classes) in enumerate(scenes):
        _save(root / part / "img" / f"{number}.png", pixels)
        found: list[dict[str, Any]] = []
        for k, label in enumerate(classes):
            if not label:
                continue
            rows, columns = np.nonzero(segments == k)
            top, left, bottom, right = (int(v) for v in (rows.min(), columns.min(), rows.max(), columns.max()))
            about: dict[str, Any] = {
                "classTitle": LABELS[label],
                "geometryType": "bitmap" if label == 2 else "polygon",
                "tags": [],
            }
            if label == 2:
                file = io.BytesIO()
                Image.fromarray((segments == k)[top : bottom + 1, left : right + 1]).save(file, "PNG")
                text = base64.b64encode(zlib.compress(file.getvalue())).decode()
                found.append({**about, "bitmap": {"data": text, "origin": [left, top]}})
            else:
                corners = [[left, top], [right, top], [right, bottom], [left, bottom]]
                found.append({**about, "points": {"exterior": corners, "interior": []}})
        content = {"description": "", "tags": [], "size": {"height": SIDE, "width": SIDE}, "objects": found}
        path = root / part / "ann" / f"{number}.png.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    classes_of_project = [{"title": name, "shape": "any", "color": "#00FF00"} for name in LABELS]
    (root / "meta.json").write_text(json.dumps({"classes": classes_of_project, "tags": [], "projectType": "images"}))


def _write_roboflow_masks(root: Path, part: str, scenes: Scenes) -> None:
    folder = root / {"train": "train", "val": "valid"}[part]
    for number, (pixels, segments, classes) in enumerate(scenes):
        _save(folder / f"{number}.png", pixels)
        _save(folder / f"{number}_mask.png", np.array(classes, dtype=np.uint8)[segments])
    lines = ["Pixel Value, Class", *(f"{value}, {name}" for value, name in enumerate(LABELS))]
    (folder / "_classes.csv").write_text("\n".join(lines))


def _write_voc(root: Path, part: str, scenes: Scenes) -> None:
    for number, (pixels, segments, classes) in enumerate(scenes):
        _save(root / "JPEGImages" / f"{part}{number}.png", pixels)
        _save(root / "SegmentationClass" / f"{part}{number}.png", np.array(classes, dtype=np.uint8)[segments])
        _save(root / "SegmentationObject" / f"{part}{number}.png", segments.astype(np.uint8))
    path = root / "ImageSets" / "Segmentation" / f"{part}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{part}{number}\n" for number in range(len(scenes))))
    (root / "class_names.txt").write_text("\n".join(LABELS))


def _write_camvid(root: Path, part: str, scenes: Scenes) -> None:
    for number, (pixels, segments, classes) in enumerate(scenes):
        _save(root / part / f"{number}.png", pixels)
        _save(root / f"{part}annot" / f"{number}.png", np.array(classes, dtype=np.uint8)[segments])
    (root / "labels.txt").write_text("\n".join(LABELS))


COLORS = ((0, 0, 0), (128, 0, 0), (0, 128, 0), (200, 100, 50))


def _write_colors(root: Path, part: str, scenes: Scenes) -> None:
    for number, (pixels, segments, classes) in enumerate(scenes):
        _save(root / part / "images" / f"{number}.png", pixels)
        _save(root / part / "masks" / f"{number}.png", np.array(COLORS, dtype=np.uint8)[np.array(classes)[segments]])
    lines = [f"{name} {red} {green} {blue}" for name, (red, green, blue) in zip(LABELS, COLORS, strict=True)]
    (root / "labels.txt").write_text("\n".join(lines))
