"""Panoptic quality compared with a direct implementation of its definition, with COCO's rules for void and crowds."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.data.item import make_item
from hf_faim2f.evaluation import PanopticMetric
from hf_faim2f.evaluation.evaluator import Evaluator
from hf_faim2f.model.post_processing_faim2f import post_process_panoptic_segmentation

NAMES = {0: "person", 1: "car", 2: "sky", 3: "grass"}
THINGS = [0, 1]


def image(ids: Any, classes: dict[int, int], crowds: set[int] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
    info = [{"id": i, "label_id": label, "iscrowd": int(i in crowds)} for i, label in classes.items()]
    return {"segmentation": np.asarray(ids), "segments_info": info}


def textbook(images: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Equation 1 of the paper, with sets of pixels; void and crowds as in https://cocodataset.org/#panoptic-eval.

    Of several crowds of one class in an image, the last listed counts, as in panopticapi.
    """
    tally: dict[int, list[float]] = {label: [0.0, 0, 0, 0] for label in NAMES}
    for prediction, reference in images:
        guess, truth = prediction["segmentation"], reference["segmentation"]
        true = {s["id"]: (s["label_id"], s["iscrowd"], truth == s["id"]) for s in reference["segments_info"]}
        predicted = {s["id"]: (s["label_id"], guess == s["id"]) for s in prediction["segments_info"]}
        void = np.ones_like(truth, dtype=bool)
        for _, _, pixels in true.values():
            void &= ~pixels
        matched_true, matched_predicted = set(), set()
        for i, (label, crowd, pixels) in true.items():
            for j, (guessed_label, guessed) in predicted.items():
                inside = guessed & ~void
                union = (pixels | inside).sum()
                if not crowd and label == guessed_label and union and (pixels & inside).sum() / union > 0.5:
                    tally[label][0] += (pixels & inside).sum() / union
                    tally[label][1] += 1
                    matched_true.add(i)
                    matched_predicted.add(j)
        for i, (label, crowd, _) in true.items():
            tally[label][3] += not crowd and i not in matched_true
        for j, (label, guessed) in predicted.items():
            excused = void.copy()
            for crowd_pixels in [pixels for other, crowd, pixels in true.values() if crowd and other == label][-1:]:
                excused |= crowd_pixels
            tally[label][2] += j not in matched_predicted and (guessed & excused).sum() <= guessed.sum() / 2
    result: dict[str, Any] = {}
    of_class = {}
    for label, (iou, tp, fp, fn) in tally.items():
        if tp + fp + fn == 0:
            of_class[label] = (math.nan, math.nan, math.nan)
        else:
            recognition = tp / (tp + fp / 2 + fn / 2)
            quality = iou / tp if tp else 0
            of_class[label] = (100 * quality * recognition, 100 * quality, 100 * recognition)
    for suffix, group in (("", NAMES), ("_th", THINGS), ("_st", set(NAMES) - set(THINGS))):
        for k, name in enumerate(("PQ", "SQ", "RQ")):
            values = [of_class[label][k] for label in group if not math.isnan(of_class[label][k])]
            result[name + suffix] = np.mean(values) if values else math.nan
    result["per_class"] = {NAMES[i]: dict(zip(("PQ", "SQ", "RQ"), v, strict=True)) for i, v in of_class.items()}
    return result


def assert_same(result: dict[str, Any], expectation: dict[str, Any]) -> None:
    assert list(result) == list(expectation)
    for name, value in expectation.items():
        if isinstance(value, dict):
            assert_same(result[name], value)
        else:
            assert result[name] == pytest.approx(value, abs=1e-6, nan_ok=True), name


def scene(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A prediction and a reference with void, crowds (also two of one class), and segments of the wrong class."""
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(1, 9, 2))
    truth = rng.integers(0, rng.integers(1, 7), size)
    guess = np.where(rng.random(size) < rng.uniform(0.3, 1), truth, rng.integers(0, 8, size))
    true = {int(i): int(rng.integers(4)) for i in rng.permutation(np.unique(truth)) if i}
    predicted = {int(i): int(rng.integers(4)) for i in np.unique(guess) if i}
    for i in predicted:
        if i in true and rng.random() < 0.8:
            predicted[i] = true[i]
    crowds = {i for i in true if rng.random() < 0.25}
    return image(guess, predicted), image(truth, true, crowds)


@settings(max_examples=250, deadline=None)
@given(seeds=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5))
def test_equals_the_textbook(seeds: list[int]) -> None:
    images = [scene(seed) for seed in seeds]
    metric = PanopticMetric(NAMES, THINGS, fuse_stuff=False)
    for prediction, reference in images:
        metric.add_batch(predictions=[prediction], references=[reference])
    assert_same(metric.compute(), textbook(images))


def test_scenes_depend_on_void_and_crowd() -> None:
    images = [scene(seed) for seed in range(200)]
    result = PanopticMetric(NAMES, THINGS, fuse_stuff=False).compute(
        predictions=[prediction for prediction, _ in images], references=[reference for _, reference in images]
    )
    assert 10 < result["PQ"] < 90
    told_apart = [
        (guess, {**truth, "segments_info": [{**s, "iscrowd": 0} for s in truth["segments_info"]]})
        for guess, truth in images
    ]
    assert textbook(told_apart)["PQ"] != pytest.approx(result["PQ"], abs=0.1)
    # Listed as one more segment of the class "car", void counts.
    filled = [
        (guess, {"segmentation": truth["segmentation"] + 100, "segments_info": [
            {"id": 100, "label_id": 1, "iscrowd": 0}, *({**s, "id": s["id"] + 100} for s in truth["segments_info"])
        ]})
        for guess, truth in images
    ]  # fmt: skip
    assert textbook(filled)["PQ"] != pytest.approx(result["PQ"], abs=0.1)


def test_by_hand() -> None:
    """Ten pixels: a person of 4 (found, IoU 3/4), a car of 2 (missed), void of 2, and sky of 2, found with one pixel of
    void, which does not count."""
    truth = image([[1, 1, 1, 1, 2, 2, 0, 0, 3, 3]], {1: 0, 2: 1, 3: 2})
    guess = image([[5, 5, 5, 0, 0, 6, 6, 7, 7, 7]], {5: 0, 6: 0, 7: 2})
    result = PanopticMetric(NAMES, THINGS).compute(predictions=[guess], references=[truth])
    # Segment 6 is not a person. Half of it is void; only more than half would be ignored.
    assert result["per_class"]["person"] == pytest.approx({"PQ": 100 * 0.75 / 1.5, "SQ": 75, "RQ": 100 / 1.5})
    assert result["per_class"]["car"] == {"PQ": 0, "SQ": 0, "RQ": 0}
    assert result["per_class"]["sky"] == pytest.approx({"PQ": 100, "SQ": 100, "RQ": 100})
    assert math.isnan(result["per_class"]["grass"]["PQ"])
    assert result["PQ"] == pytest.approx((50 + 0 + 100) / 3)
    assert result["PQ_th"] == pytest.approx(25) and result["PQ_st"] == pytest.approx(100)


def test_stuff_is_one_segment_a_class() -> None:
    truth = image([[2, 2, 2, 2, 1, 1]], {1: 0, 2: 2})
    guess = image([[7, 7, 8, 8, 4, 4]], {7: 2, 8: 2, 4: 0})
    fused = PanopticMetric(NAMES, THINGS).compute(predictions=[guess], references=[truth])
    apart = PanopticMetric(NAMES, THINGS, fuse_stuff=False).compute(predictions=[guess], references=[truth])
    assert fused["PQ"] == pytest.approx(100)
    assert apart["per_class"]["sky"]["PQ"] == 0  # neither half has an IoU above 0.5
    people = image([[7, 7, 8, 8, 4, 4]], {7: 0, 8: 0, 4: 1})
    result = PanopticMetric(NAMES, THINGS).compute(
        predictions=[people], references=[image([[2, 2, 2, 2, 1, 1]], {1: 1, 2: 0})]
    )
    assert result["per_class"]["person"]["PQ"] == 0  # things are never fused


@pytest.mark.parametrize(("fused", "quality"), [(None, 100), ((2,), 100), ((), 0)])
def test_an_evaluator_measures_stuff_as_the_model_predicts_it(fused: tuple[int, ...] | None, quality: float) -> None:
    """A sky in two halves counts as two segments, unless the model, or the data in its place, says that it is stuff."""

    class Halves(torch.nn.Linear):
        def forward(self, pixel_values: torch.Tensor) -> Any:
            class_logits, mask_logits = torch.full((1, 2, 5), -9.0), torch.full((1, 2, 16, 16), -9.0)
            class_logits[:, :, 2] = mask_logits[:, 0, :8] = mask_logits[:, 1, 8:] = 9
            return SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=mask_logits)

    item = make_item(torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(64, 64), [2], 0, "sky.png")
    processor = FaiM2FImageProcessor(size={"shortest_edge": 64}, label_ids_to_fuse=fused)
    result = Evaluator(processor, NAMES, ("panoptic",), THINGS)(Halves(1, 1), [item])["panoptic"]
    assert result["per_class"]["sky"]["PQ"] == pytest.approx(quality)


def test_a_true_segment_without_pixels_is_missed() -> None:
    truth, guess = image([[1, 1]], {1: 0, 2: 0}), image([[1, 1]], {1: 0})
    result = PanopticMetric(NAMES, THINGS).compute(predictions=[guess], references=[truth])
    assert result["RQ"] == pytest.approx(100 / 1.5)


def test_takes_what_the_post_processing_gives_with_and_without_segments() -> None:
    class_logits = torch.full((2, 3, 5), -9.0)
    class_logits[:, :, 4] = 0
    class_logits[0, 0, 0] = class_logits[0, 1, 2] = class_logits[0, 2, 2] = 9
    mask_logits = torch.full((2, 3, 8, 8), -9.0)
    mask_logits[:, 0, :4], mask_logits[:, 1, 4:, :4], mask_logits[:, 2, 4:, 4:] = 9, 9, 9
    ids = np.full((8, 8), 2)
    ids[:4] = 1
    truth = image(ids, {1: 0, 2: 2})
    for fuse in (set(), {2, 3}):
        found = post_process_panoptic_segmentation(
            class_logits, mask_logits, label_ids_to_fuse=fuse, target_sizes=[(8, 8), (8, 8)]
        )
        assert not found[1]["segments_info"]  # a map of -1
        result = PanopticMetric(NAMES, THINGS).compute(predictions=found, references=[truth, truth])
        assert result["SQ"] == pytest.approx(100) and result["RQ"] == pytest.approx(100 / 1.5)


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        (image([[1]], {1: 0}), image([[1, 1]], {1: 0}), "image 'street': the prediction is 1x1 .* reference is 1x2"),
        (image([[1]], {1: 9}), image([[1]], {1: 0}), "image 'street': class 9 of the prediction is not one of the 4"),
        (image([[1]], {1: 0}), image([[1]], {1: -2}), "class -2 of the reference"),
        (
            image([[1, 2]], {1: 0}),
            image([[1, 1]], {1: 0}),
            "the prediction's map has the id 2, which its segments_info",
        ),
        (image([[1]], {1: 0}), image([[255]], {}), "the reference's map has the id 255"),
        (image([[1]], {1: 0, 4: 1}), image([[1]], {1: 0}), "lists 4, which has no pixels"),
        (np.ones((2, 2)), image([[1]], {1: 0}), "the prediction must be a mapping with segmentation and segments_info"),
    ],
)
def test_mistakes_are_named_and_nothing_is_counted(prediction: Any, reference: Any, message: str) -> None:
    metric = PanopticMetric(NAMES, THINGS)
    with pytest.raises(ValueError, match=message):
        metric.add(prediction=prediction, reference=reference, image_id="street")
    assert len(metric) == 0 and not any(any(matches) for matches in metric.state_dict()["counts"].values())


@pytest.mark.parametrize("labels", [(2, 0), (0, 0)])
def test_ids_that_transformers_repeats_are_refused(labels: tuple[int, int]) -> None:
    guess = {"segmentation": [[3, 3]], "segments_info": [{"id": 3, "label_id": label} for label in labels]}
    with pytest.raises(ValueError, match=r"two segments of the prediction have the id 3.*label_ids_to_fuse=set\(\)"):
        PanopticMetric(NAMES, THINGS).add(prediction=guess, reference=image([[1, 1]], {1: 0}))


def test_things_must_be_classes() -> None:
    with pytest.raises(ValueError, match="thing_ids has 8, which is not a class"):
        PanopticMetric(NAMES, [0, 8])
