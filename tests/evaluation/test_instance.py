"""Average precision compared with pycocotools, the official implementation, on scenes with crowds and empty images."""

import contextlib
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hf_faim2f.evaluation import InstanceMetric
from hf_faim2f.model.focoos_post_processing_faim2f import InstanceEvaluation
from hf_faim2f.model.post_processing_faim2f import post_process_instance_segmentation

NAMES = {1: "cat", 3: "dog", 7: "bird", 8: "never there"}
LABELS = [1, 3, 7]


def ellipse(size: tuple[int, int], centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[: size[0], : size[1]]
    return ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 <= 1


def scenes(seed: int, images: int = 20) -> list[dict[str, Any]]:
    """Ellipses of all sizes, some in crowds, and predictions with many equal scores. Some images lack one or the
    other."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(images):
        size = (int(rng.integers(120, 200)), int(rng.integers(120, 200)))
        objects: dict[str, list[Any]] = {"masks": [], "labels": [], "iscrowd": []}
        guesses: dict[str, list[Any]] = {"masks": [], "scores": [], "labels": []}
        for _ in range(rng.integers(0, 7)):
            centre, radii = rng.uniform(0, size), rng.choice([5, 12, 30, 90]) * rng.uniform(0.6, 1, 2)
            mask, label = ellipse(size, centre, radii), int(rng.choice(LABELS))
            if mask.any():
                objects["masks"].append(mask)
                objects["labels"].append(label)
                objects["iscrowd"].append(bool(rng.random() < 0.2))
            for _ in range(rng.integers(0, 4)):
                near = ellipse(size, centre + rng.normal(0, 1.5, 2), radii * rng.uniform(0.8, 1.2, 2))
                guesses["masks"].append(near)
                guesses["labels"].append(label if rng.random() < 0.8 else int(rng.choice(LABELS)))
                guesses["scores"].append(float(rng.integers(1, 8)) / 8)
        if i % 5 == 3:
            objects = {"masks": [], "labels": [], "iscrowd": []}
        if i % 5 == 4:
            guesses = {"masks": [], "scores": [], "labels": []}
        found.append({"id": 100 - i, "size": size, "objects": objects, "guesses": guesses})
    return found


def stack(masks: list[np.ndarray], size: tuple[int, int]) -> torch.Tensor:
    return torch.from_numpy(np.stack(masks)) if masks else torch.zeros((0, *size), dtype=torch.bool)


def rle(mask: np.ndarray) -> dict[str, Any]:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def official(images: list[dict[str, Any]], names: dict[int, str], max_detections: int = 100) -> dict[str, Any]:
    """pycocotools' averages, overall and per class, in percent."""
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in images:
        for k, mask in enumerate(image["objects"]["masks"]):
            code = rle(mask)
            areas = image["objects"].get("areas")
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": image["objects"]["labels"][k],
                    "segmentation": code,
                    "iscrowd": int(image["objects"]["iscrowd"][k]),
                    "area": areas[k] if areas else float(coco_mask.area(code)),
                    "bbox": coco_mask.toBbox(code).tolist(),
                }
            )
        guesses = image["guesses"]
        for mask, score, label in zip(guesses["masks"], guesses["scores"], guesses["labels"], strict=True):
            results.append({"image_id": image["id"], "category_id": label, "score": score, "segmentation": rle(mask)})
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image["id"], "height": image["size"][0], "width": image["size"][1]} for image in images],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in names.items()],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.params.maxDets = [max_detections]
        evaluation.evaluate()
        evaluation.accumulate()

    def average(values: np.ndarray) -> float:
        return 100 * values[values > -1].mean() if (values > -1).any() else math.nan

    precision, recall = evaluation.eval["precision"][..., 0], evaluation.eval["recall"][..., 0]
    return {
        "AP": average(precision[..., 0]),
        "AP50": average(precision[0, ..., 0]),
        "AP75": average(precision[5, ..., 0]),
        "APs": average(precision[..., 1]),
        "APm": average(precision[..., 2]),
        "APl": average(precision[..., 3]),
        "AR": average(recall[..., 0]),
        "per_class": {
            name: {"AP": average(precision[:, :, k, 0]), "AP50": average(precision[0, :, k, 0])}
            for k, (_, name) in enumerate(sorted(names.items()))
        },
    }


def assert_same(result: dict[str, Any], expectation: dict[str, Any]) -> None:
    assert list(result) == list(expectation)
    for name, value in expectation.items():
        if isinstance(value, dict):
            assert_same(result[name], value)
        else:
            assert result[name] == pytest.approx(value, abs=1e-6, nan_ok=True), name


def measure(
    images: list[dict[str, Any]],
    predicted: Callable[[dict[str, Any]], Any] | None = None,
    true: Callable[[dict[str, Any]], Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    metric = InstanceMetric(NAMES, **settings)
    for image in images:
        guesses = {**image["guesses"], "masks": stack(image["guesses"]["masks"], image["size"])}
        objects = {**image["objects"], "masks": stack(image["objects"]["masks"], image["size"])}
        metric.add_batch(
            predictions=[predicted(image) if predicted else guesses],
            references=[true(image) if true else objects],
            image_ids=[image["id"]],
        )
    return metric.compute()


@pytest.mark.parametrize("seed", range(6))
def test_equals_pycocotools(seed: int) -> None:
    images = scenes(seed)
    expectation = official(images, NAMES)
    assert_same(measure(images), expectation)
    # Sanity check: every size occurs, results are neither perfect nor zero, and a class is undefined.
    assert all(1 < expectation[name] < 99 for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR"))
    assert math.isnan(expectation["per_class"]["never there"]["AP"])


def test_scenes_depend_on_crowds_and_on_the_order_of_ties() -> None:
    images = scenes(0)
    result = measure(images)
    told_apart = [{**i, "objects": {**i["objects"], "iscrowd": [False] * len(i["objects"]["labels"])}} for i in images]
    assert measure(told_apart)["AP"] != pytest.approx(result["AP"], abs=1e-3)
    renumbered = [{**image, "id": 200 - image["id"]} for image in images]
    assert measure(renumbered)["AP"] != pytest.approx(result["AP"], abs=1e-3)
    assert_same(measure(renumbered), official(renumbered, NAMES))


def test_given_areas_decide_on_the_size() -> None:
    images = scenes(1)
    for image in images:
        image["objects"]["areas"] = [400.0 + 700 * k for k in range(len(image["objects"]["labels"]))]
    result = measure(images)
    assert_same(result, official(images, NAMES))
    assert result["APm"] != pytest.approx(measure(scenes(1))["APm"], abs=1e-3)


def test_limit_on_detections() -> None:
    images = scenes(2)
    result = measure(images, max_detections=2)
    assert_same(result, official(images, NAMES, max_detections=2))
    assert result["AR"] < measure(images)["AR"]


def test_every_form_of_masks_gives_the_same() -> None:
    images = scenes(4)
    expectation = measure(images)

    def encoded(image: dict[str, Any]) -> dict[str, Any]:
        return {**image["guesses"], "masks": [rle(mask) for mask in image["guesses"]["masks"]]}

    def spelled_out(image: dict[str, Any]) -> dict[str, Any]:
        codes = []
        for mask in image["guesses"]["masks"]:
            flat = mask.T.ravel().tolist()
            counts, current = [0], False
            for pixel in flat:
                if pixel != current:
                    counts.append(0)
                    current = pixel
                counts[-1] += 1
            codes.append({"size": list(image["size"]), "counts": counts})
        return {**image["guesses"], "masks": codes}

    def evaluated(image: dict[str, Any]) -> InstanceEvaluation:
        guesses = image["guesses"]
        masks = stack(guesses["masks"], image["size"])
        boxes = torch.zeros(len(masks), 4)
        scores = torch.tensor(guesses["scores"])
        return InstanceEvaluation(scores, torch.tensor(guesses["labels"], dtype=torch.int64), boxes, masks)

    def binary_maps(image: dict[str, Any]) -> dict[str, Any]:
        guesses = image["guesses"]
        rows = zip(guesses["labels"], guesses["scores"], strict=True)
        return {
            "segmentation": stack(guesses["masks"], image["size"]).float(),
            "segments_info": [{"id": k, "label_id": label, "score": score} for k, (label, score) in enumerate(rows)],
        }

    def annotated(image: dict[str, Any]) -> dict[str, Any]:
        objects = image["objects"]
        rows = zip(objects["masks"], objects["labels"], objects["iscrowd"], strict=True)
        return {
            "height": image["size"][0],
            "width": image["size"][1],
            "annotations": [
                {"segmentation": rle(mask), "category_id": label, "iscrowd": int(crowd)} for mask, label, crowd in rows
            ],
        }

    for form in (encoded, spelled_out, evaluated, binary_maps):
        assert_same(measure(images, predicted=form), expectation)
    assert_same(measure(images, true=annotated), expectation)


def test_a_map_of_ids_equals_its_masks() -> None:
    """Disjoint segments, once as a map with the class of each id, and once as masks."""
    images = scenes(5)
    for image in images:
        free = np.ones(image["size"], dtype=bool)
        disjoint: dict[str, list[Any]] = {"masks": [], "labels": [], "iscrowd": []}
        for mask, label, crowd in zip(*image["objects"].values(), strict=True):
            if (mask & free).any():
                disjoint["masks"].append(mask & free)
                disjoint["labels"].append(label)
                disjoint["iscrowd"].append(crowd)
                free &= ~mask
        image["objects"] = disjoint

    def as_map(image: dict[str, Any]) -> dict[str, Any]:
        segmentation = np.full(image["size"], -1)
        info = []
        for k, (mask, label, crowd) in enumerate(zip(*image["objects"].values(), strict=True)):
            segmentation[mask] = 10 * k  # 0 is one of the ids, and then not void
            info.append({"id": 10 * k, "category_id": label, "iscrowd": crowd})
        return {"segmentation": segmentation, "segments_info": info}

    assert_same(measure(images, true=as_map), measure(images))


def test_polygons_as_in_cocos_files() -> None:
    square = [[10, 10, 40, 10, 40, 40, 10, 40]]
    mask = np.zeros((60, 50), dtype=bool)
    mask[10:40, 10:40] = True
    annotations = [{"segmentation": square, "category_id": 3, "iscrowd": 0, "area": 900.0}]
    result = InstanceMetric(NAMES).compute(
        predictions=[{"masks": mask[None], "scores": [0.5], "labels": [3]}],
        references=[{"height": 60, "width": 50, "annotations": annotations}],
    )
    assert result["AP"] == pytest.approx(100) and result["APs"] == pytest.approx(100) and math.isnan(result["APm"])


def test_takes_what_the_post_processing_gives() -> None:
    class_logits = torch.full((1, 2, 3), -9.0)
    class_logits[0, 0, 0] = class_logits[0, 1, 1] = 9
    mask_logits = torch.full((1, 2, 8, 8), -9.0)
    mask_logits[0, 0, :4], mask_logits[0, 1, 5:, 5:] = 9, 9
    (found,) = post_process_instance_segmentation(class_logits, mask_logits, intermediate_size=None)
    truth = {"masks": mask_logits[0] > 0, "labels": torch.tensor([0, 1])}
    result = InstanceMetric({0: "a", 1: "b"}).compute(predictions=[found], references=[truth])
    assert result["AP"] == pytest.approx(100)


def test_empty_cases() -> None:
    nothing: dict[str, list[Any]] = {"masks": [], "scores": [], "labels": []}
    mask = np.ones((1, 4, 4), dtype=bool)
    something = {"masks": mask, "scores": [1.0], "labels": [1]}
    metric = InstanceMetric(NAMES)
    assert math.isnan(metric.compute(predictions=[nothing], references=[nothing])["AP"])
    assert metric.compute(predictions=[nothing], references=[{"masks": mask, "labels": [1]}])["AP"] == 0
    assert math.isnan(metric.compute(predictions=[something], references=[nothing])["AP"])
    empty = {**something, "masks": mask & False}
    assert metric.compute(predictions=[empty], references=[{"masks": mask, "labels": [1]}])["AP"] == 0


MASK = np.ones((1, 4, 4), dtype=bool)
TRUTH = {"masks": MASK, "labels": [1]}
GUESS = {"masks": MASK, "scores": [0.5], "labels": [1]}


def coco_truth(segmentation: Any) -> dict[str, Any]:
    return {"height": 4, "width": 4, "annotations": [{"category_id": 1, "segmentation": segmentation}]}


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        ({**GUESS, "masks": MASK[:, :3]}, TRUTH, "image 'street': the prediction is 3x4 .* the reference is 4x4"),
        ({**GUESS, "labels": [2]}, TRUTH, "image 'street': class 2 of the prediction is not one of the 4 classes"),
        (GUESS, {**TRUTH, "labels": [0]}, "class 0 of the reference"),
        ({**GUESS, "scores": [0.5, 0.4]}, TRUTH, "has 1 masks, but 2 values of score"),
        ({**GUESS, "scores": [math.nan]}, TRUTH, "the score of a predicted cat must be a number"),
        ({"masks": MASK, "labels": [1]}, TRUTH, "has no scores"),
        ({**GUESS, "masks": MASK[0]}, TRUTH, r"must have the shape \(n, height, width\)"),
        ({**GUESS, "masks": MASK * 0.5}, TRUTH, "must be of 0 and 1"),
        (GUESS, {"boxes": []}, "must have masks and labels, or .* but has boxes"),
        (GUESS, [MASK], "the reference must be a mapping"),
        (GUESS, {"annotations": []}, "needs the image's height and width"),
        ({**GUESS, "masks": [{"size": [4, 4], "counts": [3, 2]}]}, TRUTH, "add up to 5, but"),
        # The library's evaluation does not terminate on compressed run lengths of too few pixels.
        ({**GUESS, "masks": [{"size": [4, 4], "counts": b"4"}]}, TRUTH, "'street': .* add up to 4, but"),
        ({**GUESS, "masks": [{"size": [4, 4], "counts": "04T2"}]}, TRUTH, "'street': .* add up to 72, but"),
        ({**GUESS, "masks": [{"size": [4, 4], "counts": "0o"}]}, TRUTH, "'street': a mask .* lengths are damaged"),
        ({**GUESS, "masks": [{"size": [4, 4], "counts": [-4, 20]}]}, TRUTH, "'street': .* whole numbers from 0"),
        ({**GUESS, "masks": [{"counts": [16]}]}, TRUTH, r"'street': a mask of the prediction needs its size"),
        (GUESS, coco_truth([]), "'street': a mask of the reference .* neither a list of polygons nor run lengths"),
        (GUESS, coco_truth([[0, 0, 3, math.nan, 3, 3]]), "'street': .* has nan for a coordinate"),
        (GUESS, coco_truth({"size": [4, 4], "counts": "4"}), "'street': .* add up to 4, but"),
        (GUESS, coco_truth({"size": [2, 8], "counts": [16]}), r"'street': .* for \[2, 8\] pixels, .* \[4, 4\]"),
        (GUESS, {"segmentation": [[5]], "segments_info": []}, "the id 5, which its segments_info does not list"),
        (GUESS, {"segmentation": [[5]], "segments_info": [{"id": 5}]}, "has no id or no label_id"),
    ],
)
def test_mistakes_are_named_and_nothing_is_counted(prediction: Any, reference: Any, message: str) -> None:
    metric = InstanceMetric(NAMES)
    with pytest.raises(ValueError, match=message):
        metric.add(prediction=prediction, reference=reference, image_id="street")
    assert len(metric) == 0 and metric.state_dict()["counts"] == []


def test_limit_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_detections must be at least 1, not 0"):
        InstanceMetric(NAMES, max_detections=0)
