"""Masks written by image editors and annotation tools: 0 and 255, white on black in RGB, and antialiased ones."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hf_faim2f.data import DatasetError, class_map, load_folder, load_hub
from hf_faim2f.data.formats import DataSource, open_data
from tests.support.image_files import photo, save

LESION = np.zeros((12, 16), dtype=np.uint8)
LESION[3:8, 4:11] = 255
EMPTY = np.zeros_like(LESION)
NAMES = ["background", "lesion"]


def folder(root: Path, *masks: np.ndarray) -> Path:
    for index, mask in enumerate(masks):
        save(root / "images" / f"{index}.jpg", photo(*mask.shape[:2]))
        save(root / "masks" / f"{index}.png", mask)
    return root


def test_white_that_would_be_ignored_is_refused_and_can_be_read(tmp_path: Path) -> None:
    root = folder(tmp_path, EMPTY, LESION)
    with pytest.raises(DatasetError, match="no values but 0 and 255.* no pixel would be 'lesion'.*--ignore-index -1"):
        load_folder(root, NAMES)
    data = load_folder(root, NAMES, ignore_index=None)
    np.testing.assert_array_equal(class_map(data[1]).numpy(), LESION // 255)
    np.testing.assert_array_equal(class_map(data[0]).numpy(), EMPTY)
    # With reduced labels, 0 is no class, and the only class is white.
    with pytest.raises(DatasetError, match="no pixel would be 'lesion'"):
        load_folder(root, ["lesion"], reduce_labels=True)
    data = load_folder(root, ["lesion"], reduce_labels=True, ignore_index=None)
    np.testing.assert_array_equal(class_map(data[1]).numpy(), LESION.astype(int) // 255 - 1)


def test_with_one_label_the_background_would_be_the_object(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="every pixel left would be 'lesion'.*--labels background,lesion.*index -1"):
        load_folder(folder(tmp_path, LESION), ["lesion"])


def test_void_beside_a_class_stays_void(tmp_path: Path) -> None:
    """Even if many masks lack the class. If masks have both 1 and 255, the meaning of white is ambiguous and not
    guessed."""
    both = LESION.copy()
    both[0] = 1
    data = load_folder(folder(tmp_path, *[LESION] * 9, both), NAMES)
    assert set(class_map(data[0]).unique().tolist()) == {-1, 0}
    assert set(class_map(data[9]).unique().tolist()) == {-1, 0, 1}
    data = load_folder(tmp_path, NAMES, ignore_index=None)
    with pytest.raises(DatasetError, match=r"9\.png has the values 1 and 255: set ignore_index to"):
        data[9]


@pytest.mark.parametrize("name", ["voc", "camvid"])
def test_white_in_layouts_of_classes(tmp_path: Path, name: str) -> None:
    """In Pascal VOC's, 255 can only be a border. A part for validation may lack the object."""
    both = LESION.copy()
    both[0] = 1
    (tmp_path / ("class_names.txt" if name == "voc" else "labels.txt")).write_text("\n".join(NAMES))
    masks = {"train": tmp_path / "trainannot" / "0.png", "val": tmp_path / "valannot" / "1.png"}
    if name == "voc":
        masks = {part: tmp_path / "SegmentationClass" / path.name for part, path in masks.items()}
        save(tmp_path / "JPEGImages" / "0.jpg", photo(12, 16))
        save(tmp_path / "JPEGImages" / "1.jpg", photo(12, 16))
        (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    for number, (part, path) in enumerate(masks.items()):
        save(path, LESION)
        if name == "voc":
            (tmp_path / "ImageSets" / "Segmentation" / f"{part}.txt").write_text(str(number))
        else:
            save(tmp_path / part / path.name, photo(12, 16))
    remedy = "save objects with the value 1" if name == "voc" else "--ignore-index -1"
    with pytest.raises(DatasetError, match=f"no values but 0 and 255.*{remedy}"):
        open_data(name, DataSource(str(tmp_path)), "train")
    save(masks["train"], both)
    for part, found in (("train", {-1, 0, 1}), ("validation", {-1, 0})):
        item = open_data(name, DataSource(str(tmp_path)), part).items[0]  # type: ignore[arg-type]
        assert set(class_map(item).unique().tolist()) == found


def test_three_labels_have_no_white(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="has the value 255, which no class"):
        load_folder(folder(tmp_path, LESION), [*NAMES, "tumor"], ignore_index=None)[0]


def test_rows_of_a_data_set(tmp_path: Path) -> None:
    import datasets

    def png(array: np.ndarray) -> dict[str, Any]:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    columns = {"image": [png(photo(12, 16))] * 2, "mask": [png(EMPTY), png(LESION)]}
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    datasets.Dataset.from_dict(columns, features).to_parquet(str(tmp_path / "train.parquet"))
    for source in (tmp_path / "train.parquet", datasets.Dataset.from_dict(columns, features)):
        with pytest.raises(DatasetError, match="no pixel would be 'lesion'"):
            load_hub(source, labels=NAMES)
        data = load_hub(source, labels=NAMES, ignore_index=None)
        np.testing.assert_array_equal(class_map(data[1]).numpy(), LESION // 255)


def soft(mask: np.ndarray) -> np.ndarray:
    """An object as drawn in an editor: rotated, with interpolated edges."""
    return np.asarray(
        Image.fromarray(mask).resize((64, 48), Image.Resampling.NEAREST).rotate(17, Image.Resampling.BILINEAR)
    )


def test_soft_edges_of_classes(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"0\.png has soft edges: \d+ values lie between 0 and 255"):
        load_folder(folder(tmp_path, soft(LESION)), NAMES, ignore_index=None)[0]


def test_soft_edges_of_instances(tmp_path: Path) -> None:
    shades = soft(LESION)
    assert len(np.unique(shades)) > 20
    blurred = np.asarray(Image.fromarray(LESION).resize((64, 48), Image.Resampling.BICUBIC))
    one_shade = LESION.copy()
    one_shade[3, 4:11] = 128
    for index, mask in enumerate((shades, blurred, one_shade)):
        with pytest.raises(DatasetError, match=r"0\.png has soft edges: \d+ of its values between 0 and 255 are thin"):
            load_folder(folder(tmp_path / str(index), mask), ["cell"], "instance")[0]


def test_hard_edges_of_instances(tmp_path: Path) -> None:
    """White is an instance like any other value if the others are drawn in visible shades."""
    image = Image.new("L", (64, 48))
    draw = ImageDraw.Draw(image)
    for value, left in ((85, 2), (170, 22), (255, 42)):
        draw.ellipse((left, 5, left + 15, 40), fill=value)
    item = load_folder(folder(tmp_path, np.asarray(image)), ["cell"], "instance")[0]
    values = np.asarray(image)
    assert len(item["classes"]) == 3
    for k, value in enumerate((85, 170, 255)):
        np.testing.assert_array_equal(item["segments"].numpy() == k, values == value)
    item = load_folder(folder(tmp_path / "one", LESION), ["cell"], "instance")[0]
    np.testing.assert_array_equal(item["segments"].numpy() == 0, LESION == 255)


WHITE = np.repeat(LESION[..., None], 3, axis=-1)
RED = WHITE * np.array([1, 0, 0], dtype=np.uint8)
GREEN = WHITE * np.array([0, 1, 0], dtype=np.uint8)
OPAQUE = np.dstack([WHITE, np.full_like(LESION, 255)])
TRANSPARENT = np.dstack([np.full_like(WHITE, 7), LESION])


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (WHITE, "shows white on black in RGB"),
        (RED, "shows pure colors on black in RGB"),
        (GREEN, "shows pure colors on black in RGB"),
        (OPAQUE, "shows white on black in RGB"),
        (TRANSPARENT, "is partly transparent"),
    ],
)
@pytest.mark.parametrize("labels", [["cell"], ["cell", *"bcdefghij"]])
def test_objects_on_black_in_colors(tmp_path: Path, mask: np.ndarray, words: str, labels: list[str]) -> None:
    root = folder(tmp_path, mask)
    with pytest.raises(DatasetError, match=rf"0\.png {words}.*: save it with one channel \(mode L\), 0 for the backgr"):
        load_folder(root, labels, "instance")[0]
    if words == "shows white on black in RGB":
        with pytest.raises(DatasetError, match=words):
            load_folder(root, labels, "instance", reduce_labels=True)[0]


def test_the_void_of_pascal_voc_is_no_instance(tmp_path: Path) -> None:
    """255 is void beside instances numbered 1, 2 and so on, like around each object in Pascal VOC."""
    mask = EMPTY.copy()
    mask[1:5, 1:5], mask[6:10, 6:12], mask[5] = 1, 2, 255
    root = folder(tmp_path / "one", mask)
    item = load_folder(root, ["cell"], "instance")[0]
    np.testing.assert_array_equal(item["segments"].numpy(), np.where(mask == 255, 0, mask).astype(int) - 1)
    assert len(load_folder(root, ["cell"], "instance", ignore_index=None)[0]["classes"]) == 3
    several = mask.astype(np.uint16)
    several[mask == 1], several[mask == 2] = 1001, 2001
    item = load_folder(folder(tmp_path / "several", several), ["cell", "core"], "instance")[0]
    assert item["classes"].tolist() == [0, 1] and (item["segments"].numpy() == 1).sum() == (mask == 2).sum()
    # If all 255 values of a byte are used, 255 is an instance.
    full = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(3, 0).repeat(3, 1)
    assert len(load_folder(folder(tmp_path / "full", full), ["cell"], "instance")[0]["classes"]) == 255


def test_a_part_without_the_object_is_told_from_binary_masks_by_the_training_part(tmp_path: Path) -> None:
    both = LESION.copy()
    both[0] = 1
    for layout in ("{}/images", "images/{}"):
        root = tmp_path / layout[0]
        for part, mask in (("train", both), ("val", LESION)):
            save(root / layout.format(part) / "0.jpg", photo(*mask.shape))
            save(root / layout.format(part).replace("images", "masks") / "0.png", mask)
        source = DataSource(str(root), labels=tuple(NAMES))
        item = open_data("folder", source, "validation").items[0]
        assert set(class_map(item).unique().tolist()) == {-1, 0}
        save(root / layout.format("train").replace("images", "masks") / "0.png", LESION)
        for named in ("train", "validation"):
            with pytest.raises(DatasetError, match="no values but 0 and 255"):
                open_data("folder", source, named)


def test_colors_that_name_class_and_instance_stay_what_they_are(tmp_path: Path) -> None:
    mask = np.zeros((4, 6, 3), dtype=np.uint8)
    mask[:, :2] = [255, 0, 0]
    mask[:, 2:4] = [0, 1, 0]
    mask[:, 4:] = [0, 0, 9]
    item = load_folder(folder(tmp_path, mask), ["cell"], "instance")[0]
    assert item["segments"][0].tolist() == [-1, -1, 1, 1, 0, 0]
