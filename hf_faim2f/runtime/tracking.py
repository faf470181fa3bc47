"""Tracking of things in video: which segments of consecutive frames are the same object.

ByteTrack (Zhang et al., ECCV 2022) as implemented by the library `trackers` (the extra `video`), which predicts where
each object moves and matches by overlap. The overlap is that of boxes and of masks, so that objects whose boxes
overlap, such as a rider and a bicycle, keep their ids.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

from .drawing import supervision
from .prediction import Prediction, Segment

# Seconds for which an object that is not detected keeps its id.
MEMORY = 1.0
# The most seconds, less than MEMORY, that pass for the library between two frames, however far apart they are. So an
# object is remembered at least until the next frame, and forgotten if it is not there.
LONGEST_STEP = 0.99
# The lowest overlap with an object's predicted position: the mean of the IoU of boxes and that of masks.
LEAST_OVERLAP = 0.1
# The weight of the overlap with an object's position in the frame before, lower than that with its predicted one.
UNMOVED = 0.5
# Masks are compared on a grid with this many points in each direction.
GRID = 48


class Tracker:
    """Assigns object ids, counted from 1, to the things in consecutive predictions of one video.

    Raises:
        ImportError: `trackers` is not installed.
    """

    def __init__(self) -> None:
        library = _library()
        self.overlap = _overlap_class()(self)
        self.tracker = library.ByteTrackTracker(
            lost_track_buffer=round(30 * MEMORY),  # in frames, at the default of 30 per second
            minimum_consecutive_frames=1,
            minimum_iou_threshold=LEAST_OVERLAP,
            # The prediction's own threshold has already removed unlikely segments.
            track_activation_threshold=0.0,
            high_conf_det_threshold=0.0,
            iou=self.overlap,
        )
        self.things: list[Segment] = []
        self.objects: dict[int, tuple[Any, int, Segment]] = {}  # by id() of the library's track
        self.count = 0
        self.seconds = self.clock = 0.0  # the last frame's time, and the time that has passed for the library

    def update(self, prediction: Prediction, seconds: float) -> None:
        """Sets `Segment.track` of each thing in the prediction of the next frame.

        Args:
            prediction: instance or panoptic.
            seconds: the frame's time, later than that of the frame before.
        """
        self.seconds, self.clock = seconds, self.clock + min(seconds - self.seconds, LONGEST_STEP)
        self.things = [segment for segment in prediction.segments if segment.class_id not in prediction.stuff_ids]
        boxes = np.array([_box(segment) for segment in self.things], dtype=np.float64).reshape(-1, 4)
        detections = supervision().Detections(
            xyxy=boxes,
            confidence=np.array([segment.score or 0.0 for segment in self.things]),
            data={"place": np.arange(len(boxes))},
        )
        found = self.tracker.update(detections, timestamp=self.clock)
        owners = {track.tracker_id: track for track in self.tracker.tracks if track.tracker_id >= 0}
        numbers = found.tracker_id if len(found) else []
        places = found.data["place"] if len(found) else []
        objects = {id(track): self.objects.get(id(track)) for track in self.tracker.tracks}
        newborn = _in_turn((track.get_state_bbox(), track) for track in self.tracker.tracks if track.tracker_id < 0)
        for place, number in zip(places, numbers, strict=True):
            # The library assigns an id only to an object seen twice; until then, its box identifies it.
            track = owners.get(number) if number >= 0 else newborn(boxes[place])
            if track is None:
                continue
            known = objects.get(id(track))
            if known is None:
                self.count += 1
            own = self.count if known is None else known[1]
            self.things[place].track = own
            objects[id(track)] = (track, own, self.things[place])
        self.objects = {key: value for key, value in objects.items() if value is not None}

    def similarity(self, predicted: np.ndarray, found: np.ndarray) -> np.ndarray:
        """(n, m): the overlap of objects, as predicted or as in the frame before, with segments of this frame.

        Args:
            predicted: (n, 4), boxes of tracks.
            found: (m, 4), boxes of segments.
        """
        overlaps = supervision().box_iou_batch(predicted, found).astype(np.float64)
        track_of = _in_turn((track.get_state_bbox(), track) for track in self.tracker.tracks)
        segment_of = _in_turn((_box(segment), segment) for segment in self.things)
        tracks, segments = [track_of(box) for box in predicted], [segment_of(box) for box in found]
        known = [self.objects.get(id(track)) for track in tracks]
        # Only of objects in the frame before: where one was earlier, there may be another now.
        recent = [one if one is not None and one[0].time_since_update == 1 else None for one in known]
        last = np.array([predicted[row] if one is None else _box(one[2]) for row, one in enumerate(recent)])
        near = supervision().box_iou_batch(last.reshape(-1, 4), found) > 0
        for row, column in np.argwhere((overlaps > 0) | near):
            one, segment = known[row], segments[column]
            if one is not None and segment is not None:
                mask, other, box = one[2].mask.numpy(), segment.mask.numpy(), found[column]
                moved = (overlaps[row, column] + mask_overlap(mask, predicted[row], other, box)) / 2
                # A stray pixel in one frame enlarges its box, and throws off the position predicted from it.
                overlaps[row, column] = max(moved, UNMOVED * mask_overlap(mask, last[row], other, box))
        return overlaps


def mask_overlap(one: np.ndarray, box: Sequence[float], other: np.ndarray, other_box: Sequence[float]) -> float:
    """The intersection over union of two masks, compared on a grid over both boxes.

    Args:
        one, other: bool, cropped.
        box, other_box: x_min, y_min, x_max, y_max with exclusive ends, to which the masks are stretched.
    """
    left, top = min(box[0], other_box[0]), min(box[1], other_box[1])
    right, bottom = max(box[2], other_box[2]), max(box[3], other_box[3])
    steps = (np.arange(GRID) + 0.5) / GRID
    columns, rows = left + steps * (right - left), top + steps * (bottom - top)
    first, second = _sampled(one, box, rows, columns), _sampled(other, other_box, rows, columns)
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 0.0


def _sampled(mask: np.ndarray, box: Sequence[float], rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(rows, columns) bool: a mask, stretched to a box, sampled at these points; False outside."""
    height, width = mask.shape
    down = np.floor((rows - box[1]) / max(box[3] - box[1], 1e-6) * height).astype(np.int64)
    across = np.floor((columns - box[0]) / max(box[2] - box[0], 1e-6) * width).astype(np.int64)
    inside = ((down >= 0) & (down < height))[:, None] & ((across >= 0) & (across < width))
    return mask[down.clip(0, height - 1)][:, across.clip(0, width - 1)] & inside


def _box(segment: Segment) -> tuple[float, float, float, float]:
    """A segment's box with exclusive ends, as in `supervision`."""
    x_min, y_min, x_max, y_max = segment.box
    return float(x_min), float(y_min), float(x_max + 1), float(y_max + 1)


def _in_turn(pairs: Iterable[tuple[Iterable[float], Any]]) -> Callable[[Iterable[float]], Any]:
    """A lookup of values by box: for equal boxes, each call returns the next value, and None after the last."""
    found: dict[tuple[float, ...], deque[Any]] = {}
    for box, value in pairs:
        found.setdefault(tuple(box), deque()).append(value)

    def take(box: Iterable[float]) -> Any:
        left = found.get(tuple(box))
        return left.popleft() if left else None

    return take


def _library() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import trackers
    except ImportError as error:
        raise ImportError(
            f"--track needs trackers, which cannot be imported ({error}): install hf-faim2f[video]."
        ) from error
    return trackers


@cache
def _overlap_class() -> Any:
    """A subclass of the library's IoU metric, created on demand because the library is optional."""

    class Overlap(_library().BaseIoU):  # type: ignore[misc]
        def __init__(self, owner: Tracker) -> None:
            self.owner = owner

        def _compute(self, boxes_1: np.ndarray, boxes_2: np.ndarray) -> np.ndarray:
            return self.owner.similarity(boxes_1, boxes_2)

    return Overlap


__all__ = ["Tracker", "mask_overlap"]
