"""Segments drawn over their images: stable colors, in the right places, with labels that never overlap."""

import itertools
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from hf_faim2f.runtime import drawing
from hf_faim2f.runtime.drawing import (
    GAP,
    STUFF_OPACITY,
    Box,
    LabelPlacement,
    Segments,
    _text_color,
    below,
    beside,
    class_color,
    draw_segments,
    load_font,
    scaled,
    segments_of_item,
    segments_of_map,
    segments_of_panoptic,
)
from tests.support.shapes import Shapes

GRAY = Image.new("RGB", (120, 80), (100, 100, 100))
SIZE = (120, 160)  # (height, width)
FONT = 12


def halves() -> Segments:
    masks = torch.zeros(2, 80, 120, dtype=torch.bool)
    masks[0, :, :50], masks[1, 40:, 60:] = True, True
    return Segments(masks, torch.tensor([3, 7]))


def test_colors_depend_on_the_class_alone_and_differ() -> None:
    colors = [class_color(label) for label in range(150)]
    assert len(set(colors)) == 150 and colors[7] == class_color(7)
    near = [np.abs(np.subtract(a, b)).max() for a, b in pairwise(colors)]
    assert min(near) > 60


def test_a_mask_is_tinted_and_the_rest_is_not() -> None:
    drawn = np.asarray(draw_segments(GRAY, halves(), {3: "cat", 7: "dog"})).astype(float)
    assert (drawn[:38, 62:] == 100).all()  # outside the masks and the labels
    for row, column, label in ((5, 5, 3), (78, 118, 7)):
        tint, color = drawn[row, column] - 100, np.array(class_color(label)) - 100.0
        assert np.abs(tint - 0.55 * color).max() < 3, label
    # A class has the same color, whatever other classes are drawn.
    alone = Segments(halves().masks[1:], torch.tensor([7]))
    assert (np.asarray(draw_segments(GRAY, alone, {}))[78, 118] == drawn[78, 118]).all()
    assert (np.asarray(GRAY) == 100).all()


def test_stuff_is_tinted_lightly_and_outlined_as_things_are() -> None:
    segments = halves()
    segments.stuff_ids = {3}
    drawn = np.asarray(draw_segments(GRAY, segments, {3: "sky", 7: "dog"})).astype(float)
    color = np.array(class_color(3)) - 100.0
    assert np.abs(drawn[5, 5] - 100 - STUFF_OPACITY * color).max() < 3
    assert np.abs(drawn[78, 118] - 100 - 0.55 * (np.array(class_color(7)) - 100.0)).max() < 3
    for row, column, label in ((20, 49, 3), (40, 61, 7), (78, 60, 7)):  # pixels at the segments' edges
        assert np.abs(drawn[row, column] - class_color(label)).max() < 25, label
    assert np.abs(drawn[20, 0] - drawn[5, 5]).max() == 0  # no outline along the image's border
    assert (drawn[20, 50] == 100).all()


def test_names_and_outlines_grow_with_the_picture() -> None:
    def areas(width: int, height: int) -> tuple[int, int]:
        """The area of a label's background in pixels, and the width of the outline in a row."""
        masks = torch.zeros(1, height, width, dtype=torch.bool)
        masks[0, :, : width // 2] = True
        image = Image.new("RGB", (width, height), (0, 0, 0))
        drawn = np.asarray(draw_segments(image, Segments(masks, torch.tensor([2])), {2: "i"})).astype(int)
        full = np.abs(drawn - class_color(2)).max(-1) == 0
        return int(full.sum()), int((drawn[2] > 0.8 * np.array(class_color(2))).all(-1).sum())

    (small_name, small_line), (large_name, large_line) = areas(300, 200), areas(3000, 2000)
    assert large_name > 4 * small_name > 0 and large_line >= 4 * small_line > 0


def test_text_can_be_read_on_every_color() -> None:
    """The contrast ratio of WCAG 2.2, whose level AA requires 4.5."""

    def luminance(color: tuple[int, int, int]) -> float:
        shares = np.array(color) / 255
        linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for label in range(150):
        color = class_color(label)
        dark, light = sorted((luminance(color), luminance(_text_color(color))))
        assert (light + 0.05) / (dark + 0.05) > 4.5


@pytest.mark.parametrize(("scores", "on_top"), [(None, 7), ([0.9, 0.2], 3), ([0.2, 0.9], 7)])
def test_the_surer_lies_on_top_and_without_scores_the_smaller(scores: list[float] | None, on_top: int) -> None:
    over = halves()
    over.masks[1, 60:, 20:60] = True  # overlaps the first mask, and is smaller
    over.masks[1, :60] = False
    over.scores = None if scores is None else torch.tensor(scores)
    tint = np.asarray(draw_segments(GRAY, over, {}))[78, 25] - 100.0
    assert np.abs(tint - 0.55 * (np.array(class_color(on_top)) - 100.0)).max() < 3


def test_names_are_written_and_tiny_segments_go_without() -> None:
    named, unnamed = halves(), halves()
    unnamed.masks = torch.zeros_like(named.masks)
    unnamed.masks[0, :2, :2] = True
    plain = draw_segments(GRAY, unnamed, {3: "cat"})
    assert (np.asarray(plain)[3:, 3:] == 100).all()
    first = np.asarray(draw_segments(GRAY, named, {3: "cat", 7: "dog"}))
    assert (first != np.asarray(draw_segments(GRAY, named, {3: "cow", 7: "dog"}))).any()
    named.scores = torch.tensor([0.25, 0.75])
    assert (first != np.asarray(draw_segments(GRAY, named, {3: "cat", 7: "dog"}))).any()


def test_names_drawn_again_are_the_same() -> None:
    """Draws other names, positions and colors in between, and the same name in black and in white."""
    pictures = [(halves(), {3: "cat", 7: "cat"}), (halves(), {3: "dög", 7: "cat"}), (halves(), {3: "cat", 7: "dög"})]
    pictures[1][0].class_ids = torch.tensor([4, 1])
    pictures[2][0].masks = pictures[2][0].masks.flip(2)

    def draw() -> list[np.ndarray]:
        return [np.asarray(draw_segments(GRAY, segments, names)) for segments, names in pictures]

    for one, same in zip(draw(), draw(), strict=True):
        assert (one == same).all()


def test_nothing_to_draw_is_the_image() -> None:
    empty = Segments(torch.zeros(0, 80, 120, dtype=torch.bool), torch.zeros(0, dtype=torch.int64))
    assert draw_segments(GRAY, empty, {}).tobytes() == GRAY.tobytes()
    image, segments = scaled(GRAY, empty, 240)
    assert image.size == (240, 160) and segments.masks.shape == (0, 160, 240)
    with pytest.raises(ValueError, match="masks are 80x120 pixels, but the image 160x240"):
        draw_segments(image, halves(), {})


def test_segments_of_truth_and_predictions() -> None:
    item = Shapes(3)[2]
    truth = segments_of_item(item)
    assert torch.equal(truth.masks.long().argmax(0), item["segments"].long())
    by_class = segments_of_map(torch.tensor([[0, 2], [2, -1]]))
    assert by_class.class_ids.tolist() == [0, 2] and by_class.masks[1].tolist() == [[False, True], [True, False]]
    info = [{"id": 1, "label_id": 5, "score": 0.5}, {"id": 2, "label_id": 4, "score": 0.9}]
    panoptic = segments_of_panoptic({"segmentation": torch.tensor([[0, 1], [2, 2]]), "segments_info": info})
    assert panoptic.masks.sum((1, 2)).tolist() == [1, 2] and panoptic.class_ids.tolist() == [5, 4]
    assert not panoptic.stuff_ids
    fused = [{**entry, "was_fused": entry["label_id"] == 4} for entry in info]
    assert segments_of_panoptic({"segmentation": torch.zeros(2, 2), "segments_info": fused}).stuff_ids == {4}
    nothing = segments_of_panoptic({"segmentation": torch.full((2, 2), -1.0), "segments_info": []})
    assert nothing.masks.shape == (0, 2, 2)


def test_sheets() -> None:
    row = beside([GRAY, GRAY], ["image", "truth"])
    assert row.width == 2 * 120 + GAP and row.height > 80
    sheet = below([row, row])
    assert sheet.size == (row.width, 2 * row.height + GAP)
    assert sheet.getpixel((60, row.height - 1)) == (100, 100, 100)


def box_of(on_top: np.ndarray, number: int) -> Box:
    rows, columns = np.nonzero(on_top == number)
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())


def pixels(box: Box) -> tuple[slice, slice]:
    return slice(box[1], box[3] + 1), slice(box[0], box[2] + 1)


def overlap(one: Box, other: Box) -> bool:
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]


def test_a_label_lies_on_the_largest_part_and_not_on_what_is_in_front() -> None:
    on_top = np.zeros(SIZE, dtype=np.uint8)
    on_top[10:30, 5:50] = on_top[50:110, 60:150] = 1  # two parts of one segment
    on_top[60:100, 80:110] = 2  # in front of the middle of the larger part
    place = LabelPlacement(on_top, FONT).place(1, box_of(on_top, 1), "tree")
    assert place is not None and (on_top[pixels(place)] == 1).mean() > 0.9 and place[1] >= 50


@pytest.mark.parametrize("left", [0, 75, 152])
def test_the_label_of_a_small_segment_lies_beside_it(left: int) -> None:
    on_top = np.ones(SIZE, dtype=np.uint8)
    on_top[50:58, left : left + 8] = 2
    own = box_of(on_top, 2)
    place = LabelPlacement(on_top, FONT).place(2, own, "traffic light 0.97")
    assert place is not None and not overlap(place, own)
    assert place[0] >= 0 and place[1] >= 0 and place[2] < SIZE[1] and place[3] < SIZE[0]
    assert min(abs(place[3] - own[1]), abs(own[3] - place[1])) < 5  # next to the segment


def test_labels_do_not_overlap_and_go_without_where_there_is_no_room() -> None:
    on_top = np.zeros(SIZE, dtype=np.uint8)
    for number in range(40):
        row, column = divmod(number, 8)
        on_top[24 * row + 4 : 24 * row + 16, 20 * column + 4 : 20 * column + 16] = number + 1
    placement = LabelPlacement(on_top, FONT)
    places = [placement.place(number, box_of(on_top, number), "person") for number in range(1, 41)]
    found = [place for place in places if place is not None]
    assert 5 < len(found) < 40
    assert not any(overlap(one, other) for one, other in itertools.combinations(found, 2))


def test_names_of_other_languages_are_written_in_a_font_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's own font has ASCII only, and shows anything else as a box."""
    said: list[str] = []
    monkeypatch.setattr(drawing.logger, "warning_once", said.append)
    drawing._font_file.cache_clear()
    for text in ("traffic light 0.97", "Straße", "año", "дорога", "κτίριο"):
        font = load_font(text, FONT)
        box = bytes(font.getmask("\U0010ffff"))
        assert [one for one in text if not one.isspace() and bytes(font.getmask(one)) == box] == []
    assert not said
    load_font("tree \u0378", FONT)  # a code point that Unicode has not assigned
    assert len(said) == 1 and "so that pictures show some as boxes" in said[0]
    drawn = [np.asarray(draw_segments(GRAY, halves(), {3: name, 7: name})) for name in ("aa", "ää", "öö")]
    assert not np.array_equal(drawn[1], drawn[2]) and not np.array_equal(drawn[0], drawn[1])


def test_a_label_without_room_or_segment_is_left_out() -> None:
    on_top = np.ones((10, 10), dtype=np.uint8)
    assert LabelPlacement(on_top, FONT).place(1, (0, 0, 9, 9), "a long name") is None
    hidden = np.ones(SIZE, dtype=np.uint8)
    assert LabelPlacement(hidden, FONT).place(2, (0, 0, 159, 119), "cat") is None
