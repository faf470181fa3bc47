"""Where labels are placed: on the largest part of their segment, beside small ones, and never on each other."""

import itertools

import numpy as np
import pytest

from hf_faim2f.runtime.drawing import Box, LabelPlacement

SIZE = (120, 160)  # (height, width)
FONT = 12


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
    on_top[60:100, 80:110] = 2  # in front of the larger one, where its middle is
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
    assert min(abs(place[3] - own[1]), abs(own[3] - place[1])) < 5  # next to it


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


def test_a_label_without_room_or_segment_is_left_out() -> None:
    on_top = np.ones((10, 10), dtype=np.uint8)
    assert LabelPlacement(on_top, FONT).place(1, (0, 0, 9, 9), "a long name") is None
    hidden = np.ones(SIZE, dtype=np.uint8)
    assert LabelPlacement(hidden, FONT).place(2, (0, 0, 159, 119), "cat") is None
