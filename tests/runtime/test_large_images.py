"""Large images tile by tile: instances are neither cut nor duplicated, maps have no seams, and memory is bounded."""

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage
from torch.nn import functional as F

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.cli import main
from hf_faim2f.errors import ImageError
from hf_faim2f.runtime import Prediction, Predictor, Segment, large_images
from hf_faim2f.runtime.drawing import Segments
from hf_faim2f.runtime.large_images import LargePrediction, Picture
from hf_faim2f.runtime.prediction_files import write_png
from hf_faim2f.runtime.tile_merging import Blend, BlockMap, ClassScores, Grid, Merging, Votes
from tests.support.lively_model import photographs, save_model

DISKS = 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


def disks(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width) int: separate disks of many sizes, numbered from 1, and bars across the whole image."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    found = np.zeros((height, width), dtype=int)
    for _ in range(400):
        radius = random.integers(3, 26)
        y, x = random.integers(0, height), random.integers(0, width)
        disk = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
        if not found[ndimage.binary_dilation(disk, iterations=2)].any():
            found[disk] = found.max() + 1
    return found


def segments_of(numbers: np.ndarray) -> list[Segment]:
    """The segments in a window as a perfect model would return them; the class is the number modulo 3."""
    segments = []
    for number in np.unique(numbers[numbers > 0]).tolist():
        parts, count = ndimage.label(numbers == number)
        for part in range(1, count + 1):
            (rows, columns) = ndimage.find_objects((parts == part).astype(int))[0]
            mask = torch.from_numpy((parts == part)[rows, columns].copy())
            box = (columns.start, rows.start, columns.stop - 1, rows.stop - 1)
            segments.append(Segment(number % 3, str(number % 3), 0.5 + number / 1000, box, mask))
    return segments


def merged(numbers: np.ndarray, grid: Grid) -> list[np.ndarray]:
    """The masks after merging, at the image's size."""
    merging = Merging(grid)
    for place in grid.places():
        left, top, right, bottom = grid.area(place)
        merging.add(place, segments_of(numbers[top:bottom, left:right]))
    masks = []
    for group in merging.groups():
        whole = np.zeros(grid.size, dtype=bool)
        for fragment in group:
            fragment.pack()  # like for completed rows
            x_min, y_min, x_max, y_max = fragment.box
            whole[y_min : y_max + 1, x_min : x_max + 1] |= fragment.pixels()
        masks.append(whole)
    return masks


@pytest.mark.parametrize(("tile", "overlap"), [(64, 0.2), (64, 0.5), (50, 0.3), (90, 0.1), (1000, 0.2)])
def test_instances_that_cross_tiles_are_one_and_none_is_doubled(tile: int, overlap: float) -> None:
    """Compared with the disks themselves, many of which are larger than the overlap, or lie on corners of tiles."""
    numbers = disks(301, 407)
    masks = merged(numbers, Grid(numbers.shape, tile, overlap))
    assert len(masks) == numbers.max() > 40
    found = sorted(int(numbers[mask][0]) for mask in masks)
    assert found == list(range(1, numbers.max() + 1))
    assert all(np.array_equal(mask, numbers == numbers[mask][0]) for mask in masks)


def test_an_instance_across_the_whole_picture_is_one() -> None:
    numbers = np.zeros((200, 300), dtype=int)
    numbers[90:110] = 1
    numbers[:80, 140:150] = 2
    masks = merged(numbers, Grid((200, 300), 64, 0.25))
    assert sorted(mask.sum() for mask in masks) == [800, 6000]


def test_a_cut_instance_takes_the_class_of_its_larger_part() -> None:
    grid = Grid((64, 100), 64, 0.4)
    whole = torch.ones(30, 30, dtype=torch.bool)
    merging = Merging(grid)
    # The left tile sees 10 columns of a square, from column 54, and classifies them wrongly.
    merging.add((0, 0), [Segment(1, "1", 0.99, (54, 10, 63, 39), whole[:, :10])])
    merging.add((0, 1), [Segment(2, "2", 0.7, (18, 10, 47, 39), whole)])
    (group,) = merging.groups()
    assert group[0].class_id == 2 and len(group) == 2
    # Two complete instances of different classes at the same place are both kept.
    merging = Merging(grid)
    merging.add((0, 0), [Segment(1, "1", 0.9, (45, 10, 55, 20), whole[:11, :11])])
    merging.add((0, 1), [Segment(2, "2", 0.9, (9, 10, 19, 20), whole[:11, :11])])
    assert len(merging.groups()) == 2


def test_neighbors_that_touch_stay_apart() -> None:
    """Two adjacent squares in the overlap."""
    grid = Grid((64, 100), 64, 0.5)
    numbers = np.zeros((64, 100), dtype=int)
    numbers[10:30, 38:48], numbers[10:30, 48:60] = 3, 6  # both of the same class
    assert sorted(mask.sum() for mask in merged(numbers, grid)) == [200, 240]


# ---------------------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize(("size", "tile", "overlap"), [((150, 210), 64, 0.25), ((97, 64), 64, 0.5), ((70, 70), 50, 0)])
def test_blended_scores_against_a_plain_loop(size: tuple[int, int], tile: int, overlap: float, tmp_path: Path) -> None:
    """Weights over the whole image, in float64, tile by tile."""
    generator = torch.Generator().manual_seed(0)
    grid = Grid(size, tile, overlap)
    tables = {place: torch.rand(4, 9, 11, generator=generator) for place in grid.places()}
    sums = torch.zeros(4, *size, dtype=torch.float64)
    tops, lefts = grid.starts(0), grid.starts(1)

    def ramp(starts: list[int], number: int, window: int) -> torch.Tensor:
        weights = torch.ones(window, dtype=torch.float64)
        for position in range(window):
            if number and position < (shared := starts[number - 1] + window - starts[number]):
                weights[position] = min(float(weights[position]), (position + 0.5) / shared)
            if number + 1 < len(starts):
                shared = starts[number] + window - starts[number + 1]
                weights[position] = min(float(weights[position]), (window - position - 0.5) / max(1, shared))
        return weights

    height, width = grid.window
    for (row, column), table in tables.items():
        scores = F.interpolate(table[None].double(), size=(height, width), mode="bilinear")[0]
        weights = ramp(tops, row, height)[:, None] * ramp(lefts, column, width)
        sums[:, tops[row] : tops[row] + height, lefts[column] : lefts[column] + width] += scores * weights
    with BlockMap(size, np.uint16, tmp_path) as labels:
        blend = Blend(grid, labels)
        for place, table in tables.items():
            blend.add(place, ClassScores(table, grid.window))
        found = torch.from_numpy(labels.read(0, 0, *size).astype(np.int64)) - 1
        assert not blend.tiles
    best = sums.amax(0)
    chosen = sums.gather(0, found[None])[0]
    assert (best - chosen).max() < 1e-5 and len(found.unique()) == 4


def test_there_are_no_seams(tmp_path: Path) -> None:
    """Two tiles disagree slightly about the border between two classes: the border has no step at the tiles' edges."""
    size, grid = (64, 400), Grid((64, 400), 100, 0.4)
    unblended = np.zeros(size, dtype=int)
    with BlockMap(size, np.uint16, tmp_path) as labels:
        blend = Blend(grid, labels)
        for number, place in enumerate(grid.places()):
            border = 32 + (6 if number % 2 else -6)
            rows = torch.arange(64, dtype=torch.float32)
            upper = torch.sigmoid((border - rows) / 8)[:, None].expand(64, 100)
            blend.add(place, ClassScores(torch.stack([upper, 1 - upper]), (64, 100)))
            left, _, right, _ = grid.area(place)
            unblended[:, left:right] = (upper > 0.5).int()
        found = labels.read(0, 0, *size)
    borders = (found == 1).sum(0)
    assert borders.min() < 28 and borders.max() > 36
    assert np.abs(np.diff(borders.astype(int))).max() <= 1
    assert np.abs(np.diff(unblended.sum(0))).max() > 1


def test_votes_leave_what_has_no_class(tmp_path: Path) -> None:
    grid = Grid((40, 60), 40, 0.5)
    with BlockMap((40, 60), np.uint16, tmp_path) as labels:
        blend = Blend(grid, labels)
        first, second = np.full((40, 40), -1), np.full((40, 40), 2)
        first[:, :10] = 0
        blend.add((0, 0), Votes(first, 3))
        blend.add((0, 1), Votes(second, 3))
        found = labels.read(0, 0, 40, 60).astype(int) - 1
    assert (found[:, :10] == 0).all() and (found[:, 10:20] == -1).all() and (found[:, 20:] == 2).all()


def test_maps_on_disk_and_as_png(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    expected = np.zeros((1100, 700), dtype=np.uint32)
    with BlockMap((1100, 700), np.uint32, tmp_path) as numbers:
        for _ in range(30):
            top, left = int(random.integers(1000)), int(random.integers(600))
            window = random.integers(0, 60000, (90, 70)).astype(np.uint32)
            mask = random.random((90, 70)) < 0.5
            numbers.write(top, left, window, mask)
            expected[top : top + 90, left : left + 70][mask] = window[mask]
        assert np.array_equal(numbers.read(0, 0, 1100, 700), expected)
        assert np.array_equal(numbers.read(301, 405, 500, 250), expected[301:801, 405:655])
        assert list(tmp_path.iterdir()) == []  # the file has been unlinked
        for kind in (np.uint8, np.uint16):
            file = io.BytesIO()
            write_png(file, (1100, 700), (band.astype(kind) for _, band in numbers.bands()))
            assert np.array_equal(np.asarray(Image.open(file)), expected.astype(kind))


# -------------------------------------------------------------------------------------------------------- pictures


def large(predictor: Predictor, path: Path, tile: int, overlap: float, subtask: str, folder: Path) -> Any:
    """Segments and maps of an image predicted by tiles."""
    threshold = None if subtask == "semantic" else 0.1
    with Picture(path) as picture:
        grid = Grid(picture.size, tile, overlap)
        with LargePrediction(predictor, picture, grid, subtask, threshold, folder) as made:
            for _ in made.predict(2):
                pass
            return SimpleNamespace(
                json=made.to_json(), labels=np.concatenate(list(made.label_bands())),
                numbers=np.concatenate(list(made.segment_bands())), drawn=made.draw(64), tiles=made.tiles,
            )  # fmt: skip


@pytest.mark.parametrize("subtask", ["semantic", "instance", "panoptic"])
def test_one_tile_is_the_whole_picture(subtask: str, tiny: Path, tmp_path: Path) -> None:
    photographs()[0].save(tmp_path / "photo.png")
    predictor = Predictor.from_pretrained(tiny, device="cpu")
    made = large(predictor, tmp_path / "photo.png", 4000, 0.2, subtask, tmp_path)
    (expected,) = predictor([tmp_path / "photo.png"], subtask, None if subtask == "semantic" else 0.1)
    assert made.tiles == 1 and len(made.json) == len(expected.segments) > 0
    assert (made.labels == expected.label_map.numpy()).mean() > 0.999
    if subtask == "semantic":
        found = [segment["class_id"] for segment in made.json]
        assert found == sorted(found) == [segment.class_id for segment in expected.segments]
    else:
        assert [(s["class_id"], s["box"], s["segmentation"]) for s in made.json] == [
            (s["class_id"], s["box"], s["segmentation"]) for s in expected.to_json()
        ]
        assert np.array_equal(made.numbers, expected.segment_map().numpy() + 1)


@pytest.mark.parametrize("subtask", ["instance", "panoptic"])
def test_what_tiles_disagree_about_is_one_segment_in_a_panoptic_prediction(subtask: str, tmp_path: Path) -> None:
    """Instances may overlap; in a panoptic prediction the better one has the pixel, as without tiles."""
    config = SimpleNamespace(id2label={number: str(number) for number in range(4)}, label_ids_to_fuse=[0])
    predictor: Any = SimpleNamespace(network=SimpleNamespace(config=config))
    picture: Any = SimpleNamespace(size=(64, 112), name="picture")

    def thing(class_id: int, score: float, left: int, top: int, right: int, bottom: int) -> Segment:
        mask = torch.ones(bottom - top, right - left, dtype=torch.bool)
        return Segment(class_id, str(class_id), score, (left, top, right - 1, bottom - 1), mask)

    with LargePrediction(predictor, picture, Grid((64, 112), 64, 0.25), subtask, None, tmp_path) as made:
        made.merging.add((0, 0), [thing(1, 0.9, 20, 10, 54, 40)])
        # The first shares a corner with that of the other tile, the second half of itself.
        made.merging.add((0, 1), [thing(2, 0.8, 2, 30, 42, 60), thing(3, 0.7, 0, 12, 12, 20)])
        made._number()
        found = made.to_json()
        numbers = np.concatenate(list(made.segment_bands()))
    boxes = {one["class_id"]: (one["box"], one["area"]) for one in found}
    corner = 4 * 10
    expected: dict[int, tuple[list[int], int]] = {1: ([20, 10, 53, 39], 34 * 30), 2: ([50, 30, 89, 59], 40 * 30)}
    if subtask == "instance":
        expected[3] = [48, 12, 59, 19], 12 * 8
    else:
        expected[2] = expected[2][0], expected[2][1] - corner
    assert boxes == expected
    for number, one in enumerate(found, 1):
        mask = coco_mask.decode(one["segmentation"]).astype(bool)
        assert mask.sum() == one["area"]
        assert subtask == "instance" or np.array_equal(mask, numbers == number)


@pytest.mark.parametrize("subtask", ["instance", "panoptic"])
@pytest.mark.parametrize(("tile", "overlap"), [(64, 0.25), (50, 0.4), (1000, 0.2)])
def test_tiles_of_a_painted_picture_give_the_picture(
    subtask: str, tile: int, overlap: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles as a perfect model would predict them: disks, two kinds of stuff, and pixels of no class."""
    numbers = disks(130, 190)
    labels = np.full((130, 190), -1)
    labels[:50], labels[40:, 120:] = 3, 4
    if subtask == "instance":
        labels[:] = -1
    labels[numbers > 0] = numbers[numbers > 0] % 3
    names = {number: str(number) for number in range(5)}

    def answer(network: Any, outputs: Any, size: Any, area: Any, *_: Any) -> Prediction:
        left, top, right, bottom = area.box
        own = labels[top:bottom, left:right]
        segments = segments_of(numbers[top:bottom, left:right])
        for class_id in np.unique(own[own > 2]).tolist():
            box = (0, 0, right - left - 1, bottom - top - 1)
            segments.append(Segment(class_id, str(class_id), 0.25, box, torch.from_numpy(own == class_id)))
        return Prediction(subtask, torch.from_numpy(own), segments, area, names)

    def stream_outputs(areas: Any, make: Any, batch_size: Any) -> Any:
        for index, (left, top, right, bottom) in enumerate(areas):
            area = SimpleNamespace(box=(left, top, right, bottom), height=bottom - top, width=right - left)
            yield index, make(SimpleNamespace(image=area, values=torch.zeros(3, 64, 64)), {})

    monkeypatch.setattr(large_images, "answer", answer)
    network = SimpleNamespace(config=SimpleNamespace(id2label=names, label_ids_to_fuse=[3, 4]), outputs="logits")
    predictor: Any = SimpleNamespace(network=network, stream_outputs=stream_outputs)
    picture: Any = SimpleNamespace(size=(130, 190), name="picture", read=lambda *area: area)
    with LargePrediction(predictor, picture, Grid((130, 190), tile, overlap), subtask, None, tmp_path) as made:
        for _ in made.predict():
            pass
        found, of_segments = made.to_json(), np.concatenate(list(made.segment_bands()))
        assert np.array_equal(np.concatenate(list(made.label_bands())), labels)
    assert len(found) == numbers.max() + (2 if subtask == "panoptic" else 0) > 10
    for place, one in enumerate(found, 1):
        mask = coco_mask.decode(one["segmentation"]).astype(bool)
        assert np.array_equal(mask, of_segments == place)
        true = labels == one["class_id"] if one["class_id"] > 2 else numbers == numbers[mask][0]
        assert np.array_equal(mask, true) and one["area"] == true.sum()
        assert one["score"] == (0.25 if one["class_id"] > 2 else pytest.approx(0.5 + numbers[mask][0] / 1000))


@pytest.mark.parametrize("subtask", ["semantic", "instance", "panoptic"])
def test_the_documents_agree_with_the_maps(subtask: str, tiny: Path, tmp_path: Path) -> None:
    """By the command, with several tiles: areas, boxes and run lengths equal those of the maps wherever nothing
    overlaps."""
    photographs()[0].resize((150, 110)).save(tmp_path / "photo.png")
    out = tmp_path / "out"
    words = ["predict", tiny, tmp_path / "photo.png", "--tiles", 64, "--overlap", 0.25, "--subtask", subtask]
    words += ["--out", out] + ([] if subtask == "semantic" else ["--threshold", 0.1])
    assert main([str(word) for word in words]) == 0
    document = json.loads((out / "photo.json").read_text())
    assert document["tiles"] == {"side": 64, "overlap": 0.25, "count": 6}
    assert document["image"]["height"] == 110 and document["segments"]
    labels = np.asarray(Image.open(out / "photo.labels.png")).astype(int)
    names = {path.name for path in out.iterdir()}
    assert names == {"photo.json", "photo.labels.png", "photo.overlay.jpg"} | (
        set() if subtask == "semantic" else {"photo.segments.png"}
    )
    numbers = None if subtask == "semantic" else np.asarray(Image.open(out / "photo.segments.png"))
    for number, segment in enumerate(document["segments"], 1):
        mask = coco_mask.decode(segment["segmentation"]).astype(bool)
        assert mask.shape == (110, 150) and mask.sum() == segment["area"]
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert segment["box"] == [columns[0], rows[0], columns[-1], rows[-1]]
        if subtask == "semantic":
            assert np.array_equal(mask, labels == segment["class_id"])
        elif number == 1 or segment["score"] is None:
            assert np.array_equal(mask, numbers == number) and (labels[mask] == segment["class_id"]).all()
        elif numbers is not None:
            assert mask[numbers == number].all()
        if subtask == "panoptic":  # each pixel has one segment
            assert np.array_equal(mask, numbers == number) and (labels[mask] == segment["class_id"]).all()
    scores = [segment["score"] for segment in document["segments"]]
    assert subtask == "semantic" or scores == sorted(scores, reverse=True)


def test_pictures_beyond_pillow_s_limit(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A TIFF gives the same results in windows as decoded whole; other files give an error that says what to do."""
    pytest.importorskip("rasterio")
    photo = photographs()[0].resize((300, 200))
    for name, options in (("map.tif", {"compression": "tiff_lzw"}), ("photo.png", {}), ("turned.tif", {})):
        if name == "turned.tif":
            turned = Image.Exif()
            turned[0x0112] = 6
            photo.save(tmp_path / name, exif=turned)
        else:
            photo.save(tmp_path / name, **options)
    words = ["predict", str(tiny), "--tiles", "96", "--threshold", "0.1", "--no-overlays"]
    assert main([*words, str(tmp_path / "map.tif"), "--out", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 25_000)
    names = [str(tmp_path / name) for name in ("map.tif", "photo.png", "turned.tif")]
    capsys.readouterr()
    assert main([*words, *names, "--out", str(tmp_path / "windows")]) == 1
    for name in ("map.json", "map.labels.png", "map.segments.png"):
        assert (tmp_path / "windows" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    first, second = (tmp_path / "windows" / "left_out.txt").read_text().splitlines()
    assert "photo.png" in first
    assert first.endswith("save it as a tiled TIFF file, and read it in windows with --tiles 1024.")
    assert "turned.tif has 200x300 pixels (height x width) and is therefore read in windows, which does not" in second
    # The same files also give an error without tiles.
    assert main([*words[:2], *names[:2], "--no-overlays", "--out", str(tmp_path / "none")]) == 1
    assert (tmp_path / "none" / "left_out.txt").read_text().count("with --tiles 1024.\n") == 2
    monkeypatch.setitem(sys.modules, "rasterio", None)
    capsys.readouterr()
    assert main([*words, names[0], "--out", str(tmp_path / "without")]) == 1
    assert "install hf-faim2f[large]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "photometric", "bits"),
    [(1, "MINISBLACK", bits) for bits in (1, 2, 4, 7, 8)]
    + [(3, "RGB", 4), (4, "RGB", 8), (2, "MINISBLACK", 8), (3, "MINISBLACK", 8), (5, "MINISBLACK", 8)],
)
def test_windows_are_read_as_by_pillow(
    count: int, photometric: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that Pillow refuses, such as multispectral ones, are refused beyond its limit, too."""
    rasterio = pytest.importorskip("rasterio")
    pixels = np.random.default_rng(0).integers(0, 2**bits, (count, 40, 60)).astype(np.uint8)
    settings: dict[str, Any] = {"driver": "GTiff", "height": 40, "width": 60, "count": count, "dtype": "uint8"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about missing georeferencing
        with rasterio.open(tmp_path / "map.tif", "w", **settings, photometric=photometric, nbits=bits) as file:
            file.write(pixels)

    def read() -> Any:
        try:
            with Picture(tmp_path / "map.tif") as picture:
                assert picture.reduced(30).size == (30, 20)
                return np.asarray(picture.read(5, 3, 55, 35)).tolist()
        except ImageError as error:
            assert str(tmp_path) in str(error) and str(error).endswith(".") and "\n" not in str(error)
            return "refused"

    whole = read()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert read() == whole
    assert (whole == "refused") == ((count, bits) not in ((1, 1), (1, 2), (1, 4), (1, 8), (4, 8)))


def test_arrays_are_read_as_pictures(tmp_path: Path) -> None:
    pixels = np.asarray(photographs()[0])
    np.save(tmp_path / "photo.npy", pixels)
    with Picture(tmp_path / "photo.npy") as picture:
        assert picture.size == pixels.shape[:2]
        assert np.array_equal(picture.read(3, 5, 40, 30), pixels[5:30, 3:40])
    np.save(tmp_path / "image 0.npy", pixels / 255)  # would be black
    with pytest.raises(ImageError, match=r"^/[^ ]*/image 0.npy is an array of floats in 0..1, .*: multiply it by 255"):
        Picture(tmp_path / "image 0.npy")
    Image.fromarray((pixels / 255).astype(np.float32)[..., 0]).save(tmp_path / "float.tif")
    with Picture(tmp_path / "float.tif") as picture:
        assert np.array_equal(picture.read(3, 5, 40, 30), pixels[5:30, 3:40, :1].repeat(3, 2))


def test_mistakes_are_one_sentence(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photographs()[0].save(tmp_path / "photo.png")
    for words, message in (
        (["--overlap", "0.2"], "--overlap requires --tiles"),
        (["--tiles", "8"], "at least 32 pixels a side, not 8"),
        (["--tiles", "64", "--overlap", "0.7"], "from 0 to 0.5 of their side, not 0.7"),
        (["--tiles", "64", "--annotations", "coco"], "--annotations cannot be combined with --tiles"),
        (["--tiles", "64", "--ray", "local"], "--tiles cannot be combined with --ray"),
    ):
        out = tmp_path / "out"
        assert main(["predict", str(tiny), str(tmp_path / "photo.png"), "--out", str(out), *words]) == 2
        assert message in capsys.readouterr().err and not out.exists()


def test_processors_that_tiles_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photographs()[0].save(tmp_path / "photo.png")
    save_model(tmp_path / "raw", do_rescale=False)
    FaiM2FForUniversalSegmentation.from_pretrained(tmp_path / "raw", num_channels=4).save_pretrained(tmp_path / "four")
    FaiM2FImageProcessor(num_channels=4).save_pretrained(tmp_path / "four")
    for name, message in (("raw", "does not rescale them"), ("four", "takes 4 channels: leave --tiles out")):
        words = ["predict", tmp_path / name, tmp_path / "photo.png", "--tiles", 64, "--out", tmp_path / "out"]
        assert main([str(word) for word in words]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_one_channel_in_tiles(tiny: Path, tmp_path: Path) -> None:
    FaiM2FForUniversalSegmentation.from_pretrained(tiny, num_channels=1).save_pretrained(tmp_path / "gray")
    FaiM2FImageProcessor(num_channels=1).save_pretrained(tmp_path / "gray")
    photographs()[0].convert("L").save(tmp_path / "photo.png")
    words = ["predict", str(tmp_path / "gray"), str(tmp_path / "photo.png"), "--subtask", "semantic", "--no-overlays"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    assert main([*words, "--out", str(tmp_path / "tiles"), "--tiles", "4000"]) == 0
    whole, tiles = (np.asarray(Image.open(tmp_path / out / "photo.labels.png")) for out in ("whole", "tiles"))
    assert (whole == tiles).mean() > 0.999


# Both subtasks take 22 minutes on one core.
HUGE = pytest.mark.skipif("HUGE" not in os.environ, reason="takes long: HUGE=1 runs it")
PEAK = """
import re, sys
from pathlib import Path
from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.cli import main
status = main(sys.argv[1:])
print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
sys.exit(status)
"""


def striped_tiff(path: Path, side: int) -> None:
    """A tiled, compressed square TIFF, written in windows."""
    import rasterio
    from rasterio.windows import Window

    random = np.random.default_rng(0)
    settings = {"driver": "GTiff", "height": side, "width": side, "count": 3, "dtype": "uint8", "BIGTIFF": "YES"}
    settings |= {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate", "ZLEVEL": 1}
    photo = np.asarray(photographs()[0].resize((512, 512))).transpose(2, 0, 1)
    with rasterio.open(path, "w", **settings) as file:
        for top in range(0, side, 512):
            for left in range(0, side, 512):
                height, width = min(512, side - top), min(512, side - left)
                part = np.roll(photo, int(random.integers(512)), 2)[:, :height, :width]
                file.write(part, window=Window(left, top, width, height))


@pytest.mark.large
@pytest.mark.skipif(sys.platform != "linux", reason="The peak of memory is read as Linux tells it.")
@pytest.mark.parametrize("side", [6000, pytest.param(30000, marks=HUGE)])
@pytest.mark.parametrize("subtask", ["semantic", "panoptic"])
def test_memory_does_not_follow_the_picture(subtask: str, side: int, tiny: Path, tmp_path: Path) -> None:
    """Below 4 GB, even for an image whose pixels alone take 2.7 GB."""
    pytest.importorskip("rasterio")
    striped_tiff(tmp_path / "map.tif", side)
    words = ["predict", str(tiny), "map.tif", "--tiles", "1024", "--overlap", "0.2", "--subtask", subtask]
    program = f"from PIL import Image\nImage.MAX_IMAGE_PIXELS = 10_000_000\n{PEAK}"
    ran = subprocess.run(
        [sys.executable, "-c", program, *words, "--out", "out"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    peak = int(ran.stdout.split()[-1]) / 1e6
    document = json.loads((tmp_path / "out" / "map.json").read_text())
    assert document["image"]["height"] == side and document["segments"]
    assert peak < (2 if side == 6000 else 4), f"{peak:.2f} GB"


@pytest.mark.slow
def test_tiles_against_the_picture_at_once(tmp_path: Path) -> None:
    """Scenes of digits side by side, predicted by the shipped model at the same scale: the figures in
    docs/guides/predict.md."""
    from hf_faim2f.data.digits import DigitScenes
    from tests.support.shipped_digits import DIGITS

    scenes = DigitScenes("test", 9, size=256)
    picture, truth, count = np.zeros((768, 768, 3), np.uint8), np.zeros((768, 768), int), 0
    for number in range(9):
        scene = scenes[number]
        top, left = 256 * (number // 3), 256 * (number % 3)
        picture[top : top + 256, left : left + 256] = scene["image"].permute(1, 2, 0).numpy()
        segments = np.asarray(scene["segments"])
        things = len(scene["classes"]) - 1
        truth[top : top + 256, left : left + 256] = np.where(segments < things, segments + 1 + count, 0)
        count += things
    Image.fromarray(picture).save(tmp_path / "scenes.png")
    predictor = Predictor.from_pretrained(DIGITS, device="cpu")
    by_tiles = large(predictor, tmp_path / "scenes.png", 256, 0.25, "panoptic", tmp_path)
    side = 3 * predictor.network.processor.size["shortest_edge"]  # three tiles
    predictor.network.processor.size = {"shortest_edge": side, "longest_edge": side}
    (at_once,) = predictor([tmp_path / "scenes.png"], "panoptic")
    edges = np.zeros((768, 768), dtype=bool)
    labels = at_once.label_map.numpy()
    edges[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edges[1:] |= labels[1:] != labels[:-1]
    inside = ~ndimage.binary_dilation(edges, iterations=4)
    agreement = (labels == by_tiles.labels).mean(), (labels == by_tiles.labels)[inside].mean()

    def found(segments: list[dict[str, Any]]) -> tuple[int, int]:
        """The number of true digits that were found, and of segments that match none."""
        masks = [coco_mask.decode(s["segmentation"]).astype(bool) for s in segments if s["label"] != "background"]
        best = [
            max((mask & (truth == n)).sum() / (mask | (truth == n)).sum() for n in range(1, count + 1))
            for mask in masks
        ]
        right = sum(value > 0.5 for value in best)
        return right, len(masks) - right

    figures: dict[str, Any] = {
        "agreement": agreement,
        "digits": count,
        "tiles": found(by_tiles.json),
        "at once": found(at_once.to_json()),
    }
    print(figures)
    assert agreement[0] > 0.95 and agreement[1] > 0.97, figures
    right, wrong = figures["tiles"]
    assert right >= 0.85 * count and wrong <= 0.15 * count, figures


def test_classes_drawn_in_place_of_many_segments_have_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the number of segments equals the number of classes up to the highest one that occurs."""
    drawn: list[Segments] = []
    monkeypatch.setattr(large_images, "draw_segments", lambda image, segments, names: drawn.append(segments))
    numbers = np.array([[0, 1, 1], [2, 3, 3]])
    made: Any = SimpleNamespace(
        picture=SimpleNamespace(reduced=lambda longest: Image.new("RGB", (3, 2))),
        size=(2, 3), segment_bands=lambda: [numbers], stuff_ids=frozenset(), id2label={},
        segments=[SimpleNamespace(class_id=id, score=score) for id, score in ((2, 0.9), (0, 0.8), (2, 0.7))],
    )  # fmt: skip
    for most, classes in ((3, [2, 0, 2]), (2, [0, 2])):
        monkeypatch.setattr(large_images, "MOST_DRAWN", most)
        LargePrediction.draw(made, 3)
        assert drawn[-1].class_ids.tolist() == classes
    assert drawn[0].scores is not None and drawn[0].scores.tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert drawn[1].scores is None and drawn[1].masks.tolist() == [
        [[False, False, False], [True, False, False]],
        [[False, True, True], [False, True, True]],
    ]
