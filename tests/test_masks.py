"""Masks against pycocotools, which the package itself does not need."""

import subprocess
import sys

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from hf_faim2f.masks import decode_run_lengths, encode_run_lengths, last_on_top, map_run_lengths, to_run_lengths


@pytest.mark.parametrize("seed", range(20))
def test_run_lengths_of_a_map(seed: int) -> None:
    generator = np.random.default_rng(seed)
    height, width, count = generator.integers(1, 30, 3).tolist()
    numbers = generator.integers(0, count + 1, (height, width))
    if seed % 2:  # larger segments, some of them empty
        numbers[: height // 2] = 1
    counts = map_run_lengths(numbers, count)
    masks = [numbers == number for number in range(1, count + 1)]
    whole = [(0, 0, width - 1, height - 1)] * count
    for mask, runs, encoded in zip(masks, counts, encode_run_lengths(masks, whole, (height, width)), strict=True):
        assert sum(runs) == height * width and runs[0] >= 0 and min(runs[1:], default=1) > 0
        theirs = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        given = {"size": [height, width], "counts": runs}
        assert coco_mask.frPyObjects(given, height, width)["counts"] == theirs["counts"] == encoded["counts"].encode()
        for form in (given, encoded):
            assert np.array_equal(decode_run_lengths(to_run_lengths(form, height, width)), mask)


def test_compressed_run_lengths_have_to_fill_the_image() -> None:
    height, width = 40_000, 50_000  # run lengths of 7 characters
    for counts in ([height * width], [0, height * width], [5, 1, 7, height * width - 1_000_013, 1_000_000]):
        given = {"size": [height, width], "counts": counts}
        text = coco_mask.frPyObjects(given, height, width)["counts"]
        assert to_run_lengths({**given, "counts": text.decode()}, height, width)["counts"] == text
        with pytest.raises(ValueError, match="add up to 2000000000, but the image has 2000050000 pixels"):
            to_run_lengths({"size": [height + 1, width], "counts": text}, height + 1, width)
    for damaged in (b"", b"o", b"\x20", b"p", b"o" * 40 + b"0", b"O", b"1O"):
        with pytest.raises(ValueError, match="its compressed run lengths are damaged"):
            to_run_lengths({"size": [4, 4], "counts": damaged}, 4, 4)


def test_polygons_are_united() -> None:
    polygons = [[1, 1, 9, 1, 9, 6, 1, 6], [5.5, 4, 15, 4, 15, 11, 5.5, 11]]
    theirs = coco_mask.merge(coco_mask.frPyObjects([[float(x) for x in polygon] for polygon in polygons], 12, 16))
    assert to_run_lengths(polygons, 12, 16)["counts"] == theirs["counts"]


@pytest.mark.parametrize("turns", [1000, 100_000])
def test_a_polygon_that_would_exhaust_the_memory_is_refused(turns: int) -> None:
    """A small file can describe a polygon that crosses the image very often."""
    polygon = [0.0, 0.0, 0.0, 900.0] * turns
    if turns == 1000:
        assert not decode_run_lengths(to_run_lengths([[*polygon, 9.0, 9.0]], 1000, 20))[:, 10:].any()
        return
    with pytest.raises(ValueError, match="is 180000000 pixels long, more than 16777216: simplify it"):
        to_run_lengths([polygon], 1000, 20)


def test_the_last_mask_lies_on_top() -> None:
    crops = [(np.ones((2, 2), dtype=bool), (0, 0, 1, 1)), (np.array([[True, False]]), (1, 1, 2, 1))]
    assert last_on_top(crops, (2, 4)).tolist() == [[1, 1, 0, 0], [1, 2, 0, 0]]


@pytest.mark.slow  # starts processes
def test_the_core_needs_no_extra() -> None:
    blocked = "import sys; sys.modules['faster_coco_eval'] = sys.modules['pycocotools'] = None; "
    code = blocked + "from hf_faim2f.masks import encode_run_lengths; import hf_faim2f.runtime.prediction"
    subprocess.run([sys.executable, "-c", code], check=True)
