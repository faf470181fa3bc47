"""Things and stuff end to end: a dataset in COCO's panoptic format, a Mask2Former trained on it by the command, its
evaluation, a plain PQ of the written files, and overlays."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_faim2f.conversion.mask2former import convert_config
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hf_faim2f import FaiM2FConfig, FaiM2FImageProcessor
from hf_faim2f.cli import main
from hf_faim2f.data import load_coco_panoptic
from hf_faim2f.errors import ModelError
from hf_faim2f.family.presets import CITYSCAPES_CLASSES, load_labels, stuff_of
from hf_faim2f.model.post_processing_faim2f import post_process_panoptic_segmentation
from hf_faim2f.runtime import Predictor
from hf_faim2f.zoo import open_model
from tests.support.mask2former_models import small_mask2former, tiny

SIDE = 64
# Ids with gaps, and stuff before a thing, so that ids are not in the order of the classes.
CATEGORIES = [
    {"id": 3, "name": "car", "isthing": 1, "supercategory": "vehicle", "color": [0, 0, 142]},
    {"id": 17, "name": "grass", "isthing": 0, "supercategory": "plant", "color": [0, 255, 0]},
    {"id": 40, "name": "ball", "isthing": 1, "supercategory": "sports", "color": [255, 0, 0]},
    {"id": 187, "name": "sky", "isthing": 0, "supercategory": "sky", "color": [70, 130, 180]},
]
STUFF = [1, 3]
COLORS = {3: (200, 60, 60), 17: (60, 160, 60), 40: (230, 220, 80), 187: (110, 160, 230)}


def scene(seed: int) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """Pixels, ids above 255 and `segments_info`: sky over grass, a void strip, cars and balls, sometimes a crowd of
    balls."""
    random = np.random.default_rng(seed)
    ids = np.zeros((SIDE, SIDE), dtype=np.int64)
    pixels = np.zeros((SIDE, SIDE, 3))
    horizon = int(random.integers(20, 40))
    places: list[tuple[int, Any, int]] = [
        (187, np.s_[:horizon, :], 0),
        (17, np.s_[horizon + 2 :, :], 0),
    ]
    for left in (4, 34):
        kind = int(random.choice([3, 40]))
        top, height, width = int(random.integers(2, 44)), int(random.integers(10, 18)), int(random.integers(12, 22))
        places.append((kind, np.s_[top : top + height, left : left + width], 0))
    if seed % 3 == 0:
        places.append((40, np.s_[54:, :30], 1))
    info: list[dict[str, Any]] = []
    for category, where, crowd in places:
        number = int(random.integers(1, 2**24))
        ids[where], pixels[where] = number, COLORS[category]
        info.append({"id": number, "category_id": category, "iscrowd": crowd})
    pixels += random.normal(0, 12, pixels.shape)
    seen = [entry for entry in info if (ids == entry["id"]).any()]
    for entry in seen:
        rows, columns = np.nonzero(ids == entry["id"])
        box = [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
        entry.update(area=len(rows), bbox=box)
    return pixels.clip(0, 255).astype(np.uint8), ids, seen


def write_split(root: Path, split: str, first: int, count: int) -> None:
    maps = root / "annotations" / f"panoptic_{split}"
    for folder in (root / split, maps):
        folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(first, first + count):
        pixels, ids, info = scene(number)
        name = f"{number:012d}"
        Image.fromarray(pixels).save(root / split / f"{name}.jpg", quality=95)
        Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 256**2], -1).astype(np.uint8)).save(
            maps / f"{name}.png"
        )
        images.append({"id": number, "file_name": f"{name}.jpg", "height": SIDE, "width": SIDE})
        annotations.append({"image_id": number, "file_name": f"{name}.png", "segments_info": info})
    document = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (root / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(document))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `coco`, the dataset, and `run/final`, a model that the command trained on it."""
    root = tmp_path_factory.mktemp("panoptic")
    write_split(root / "coco", "train2017", 0, 48)
    write_split(root / "coco", "val2017", 500, 7)
    small_mask2former().save_pretrained(root / "start")
    FaiM2FImageProcessor(size={"shortest_edge": SIDE}).save_pretrained(root / "start")
    assert (
        main(["train", "--model", str(root / "start"), "--new-labels", "--data", str(root / "coco"),
              "--format", "coco-panoptic", "--recipe", "digits", "--steps", "300", "--batch-size", "3",
              "--image-size", str(SIDE), "--learning-rate", "3e-3", "--samples", "2", "--no-tensorboard",
              "--save-every", "1000", "--eval-limit", "2", "--out", str(root / "run")])
        == 0
    )  # fmt: skip
    return root


def read_panoptic(folder: Path, document: dict[str, Any]) -> dict[int, tuple[np.ndarray, list[dict[str, Any]]]]:
    found = {}
    for entry in document["annotations"]:
        rgb = np.asarray(Image.open(folder / entry["file_name"])).astype(np.int64)
        assert rgb.ndim == 3 and rgb.shape[2] == 3
        found[entry["image_id"]] = (rgb @ [1, 256, 256**2], entry["segments_info"])
    return found


def official_ap(truth: dict[int, Any], objects: list[dict[str, Any]], path: Path) -> list[float]:
    """AP, AP50 and AP75 from pycocotools, as fractions, for results in COCO's format and the things of panoptic
    maps."""
    annotations: list[dict[str, Any]] = []
    for image_id, (ids, info) in truth.items():
        for entry in info:
            if entry["category_id"] in (3, 40):
                mask = np.asfortranarray(ids == entry["id"])
                run = coco_mask.encode(mask.astype(np.uint8))
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": image_id, "category_id": entry["category_id"],
                     "segmentation": {**run, "counts": run["counts"].decode()}, "area": int(mask.sum()),
                     "bbox": coco_mask.toBbox(run).tolist(), "iscrowd": entry["iscrowd"]}
                )  # fmt: skip
    images = [{"id": image_id, "height": SIDE, "width": SIDE} for image_id in truth]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES[::2]}))
    official = COCO(str(path))
    evaluation = COCOeval(official, official.loadRes(objects), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [float(value) for value in evaluation.stats[:3]]


def plain_pq(truth: dict[int, Any], predicted: dict[int, Any]) -> dict[str, float]:
    """Panoptic quality of two sets of maps, as described by panopticapi: void and crowds are ignored."""
    tally = {category["id"]: [0.0, 0, 0, 0] for category in CATEGORIES}
    assert truth.keys() == predicted.keys()
    for image_id, (true_ids, true_info) in truth.items():
        ids, info = predicted[image_id]
        assert {entry["id"] for entry in info} | {0} >= set(np.unique(ids)), "the map has ids that are not listed"
        assert len({entry["id"] for entry in info}) == len(info), "an id stands for two segments"
        matched_true, matched = set(), set()
        void = true_ids == 0
        for true in true_info:
            for found in info:
                if true["iscrowd"] or true["category_id"] != found["category_id"]:
                    continue
                one, other = true_ids == true["id"], ids == found["id"]
                common = (one & other).sum()
                iou = common / (one.sum() + other.sum() - common - (other & void).sum())
                if iou > 0.5:
                    tally[true["category_id"]][0] += iou
                    tally[true["category_id"]][1] += 1
                    matched_true.add(true["id"])
                    matched.add(found["id"])
        for true in true_info:
            if not true["iscrowd"] and true["id"] not in matched_true:
                tally[true["category_id"]][3] += 1
        for found in info:
            if found["id"] in matched:
                continue
            pixels = ids == found["id"]
            forgiven = void.copy()
            for true in true_info:
                if true["iscrowd"] and true["category_id"] == found["category_id"]:
                    forgiven |= true_ids == true["id"]
            if (pixels & forgiven).sum() <= pixels.sum() / 2:
                tally[found["category_id"]][2] += 1
    result = {}
    for suffix, kinds in (("", (0, 1)), ("_th", (1,)), ("_st", (0,))):
        rows = [tally[c["id"]] for c in CATEGORIES if c["isthing"] in kinds and sum(tally[c["id"]][1:]) > 0]
        for name, quality in (
            ("PQ", lambda iou, tp, fp, fn: iou / (tp + fp / 2 + fn / 2)),
            ("SQ", lambda iou, tp, fp, fn: iou / tp if tp else 0.0),
            ("RQ", lambda iou, tp, fp, fn: tp / (tp + fp / 2 + fn / 2)),
        ):
            result[name + suffix] = 100 * float(np.mean([quality(*row) for row in rows])) if rows else math.nan
    return result


def test_training_tells_the_model_what_is_stuff(trained: Path) -> None:
    config = json.loads((trained / "run" / "final" / "config.json").read_text())
    processor = json.loads((trained / "run" / "final" / "preprocessor_config.json").read_text())
    assert config["label_ids_to_fuse"] == processor["label_ids_to_fuse"] == STUFF
    assert config["postprocessing_type"] == "panoptic" and config["pixel_decoder_type"] == "deformable"
    model, _ = open_model(trained / "run" / "final")
    assert model.config.thing_ids == [0, 2]
    assert "label_ids_to_fuse" in json.loads((trained / "start" / "config.json").read_text())
    assert json.loads((trained / "start" / "config.json").read_text())["label_ids_to_fuse"] is None


def test_an_evaluation_gives_the_pq_of_what_it_writes(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "evaluation"
    command = ["evaluate", str(trained / "run" / "final"), "--data", str(trained / "coco"), "--format",
               "coco-panoptic", "--out", str(out), "--predictions", "--no-card"]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    measured = json.loads((out / "evaluation.json").read_text())["results"]["panoptic"]
    annotations = trained / "coco" / "annotations"
    truth = read_panoptic(
        annotations / "panoptic_val2017", json.loads((annotations / "panoptic_val2017.json").read_text())
    )
    written = json.loads((out / "predictions" / "panoptic_predictions.json").read_text())
    assert [{key: c[key] for key in ("id", "name", "isthing")} for c in CATEGORIES] == written["categories"]
    predicted = read_panoptic(out / "predictions" / "panoptic", written)
    expected = plain_pq(truth, predicted)
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, abs=1e-6), name
        assert f"{name} {value:.2f}" in printed
    # The model has learned both kinds, so the comparison is meaningful.
    assert expected["PQ_st"] > 30 and expected["PQ_th"] > 0
    # There is at most one segment per stuff class in an image.
    for _, info in predicted.values():
        stuff = [entry["category_id"] for entry in info if entry["category_id"] in (17, 187)]
        assert len(stuff) == len(set(stuff))
    assert (out / "predictions" / "semantic" / "000000000500.png").is_file()
    maps = [np.asarray(Image.open(path)) for path in sorted((out / "predictions" / "semantic").iterdir())]
    assert len(maps) == 7 and {int(value) for each in maps for value in np.unique(each)} <= set(range(4))
    ap = json.loads((out / "evaluation.json").read_text())["results"]["instance"]
    objects = json.loads((out / "predictions" / "instance_predictions.json").read_text())
    evaluation = official_ap(truth, objects, tmp_path / "instances.json")
    for name, value in zip(("AP", "AP50", "AP75"), evaluation, strict=True):
        assert ap[name] == pytest.approx(100 * value, abs=1e-4), name
    assert evaluation[1] > 0 and {entry["category_id"] for entry in objects} <= {3, 40}
    assert not list(out.glob(".*")) and not (out / "predictions" / "instance").exists()


def test_two_processes_write_what_one_does(trained: Path, tmp_path: Path) -> None:
    """Together, two processes write the same files as one; here they run one after the other, with their ranks set."""
    from hf_faim2f.evaluation.evaluator import Evaluator
    from hf_faim2f.evaluation.report import PredictionFiles

    model, processor = open_model(trained / "run" / "final")
    data = load_coco_panoptic(trained / "coco")
    from hf_faim2f.data import describe

    description = describe(data)
    files = [PredictionFiles(tmp_path, description) for _ in range(2)]
    for process, own in enumerate(files):
        own.begin()
        evaluator = Evaluator(processor, description.id2label, ("panoptic",), description.things, watch=own.add)
        evaluator(model, data.select(range(process, 7, 2)))
    files[0].finish([*files[0].annotations, *files[1].annotations])
    document = json.loads((tmp_path / "predictions" / "panoptic_predictions.json").read_text())
    assert sorted(entry["image_id"] for entry in document["annotations"]) == list(range(500, 507))
    assert len(list((tmp_path / "predictions" / "panoptic").iterdir())) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["predictions"]


@pytest.mark.large
def test_predictions_overlays_and_the_pipeline_fuse_by_the_configuration(trained: Path, tmp_path: Path) -> None:
    photos = trained / "coco" / "val2017"
    folder, out = trained / "run" / "final", tmp_path / "out"
    assert main(["predict", str(folder), str(photos), "--out", str(out)]) == 0
    pictures = [path for path in out.rglob("*.png") if path.stat().st_size]
    assert len(pictures) >= 7
    predictor = Predictor.from_pretrained(folder)
    assert predictor.subtasks[0] == "panoptic"
    some = 0
    for prediction in predictor(sorted(photos.iterdir())):
        stuff = [segment.class_id for segment in prediction.segments if segment.class_id in STUFF]
        assert len(stuff) == len(set(stuff))
        some += len(prediction.segments)
        assert prediction.draw().size == (SIDE, SIDE)
    assert some > 7
    program = (
        "import sys, json\nfrom transformers import pipeline\n"
        f"pipe = pipeline('image-segmentation', {str(folder)!r}, trust_remote_code=True)\n"
        f"found = pipe(sys.argv[1:], subtask='panoptic', threshold=0.5, overlap_mask_area_threshold=0.8)\n"
        "print(json.dumps([[(s['label'], sum(1 for v in s['mask'].getdata() if v)) for s in one] for one in found]))\n"
    )
    paths = [str(path) for path in sorted(photos.iterdir())]
    # The same number of threads, because another summation order could move pixels across a threshold.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", program, *paths],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    # The predictor folds norms, so a score at the threshold may be on the other side of it.
    near = {
        sum(len(prediction.segments) for prediction in predictor(sorted(photos.iterdir()), threshold=threshold))
        for threshold in (0.499, 0.5, 0.501)
    }
    assert len(answers) == 7 and sum(map(len, answers)) in near and some in near
    for answer in answers:
        names = [name for name, _ in answer]
        assert names.count("sky") <= 1 and names.count("grass") <= 1
        assert sum(pixels for _, pixels in answer) <= SIDE * SIDE  # segments are disjoint


def test_fusing_never_makes_a_thing_and_stuff_one(trained: Path) -> None:
    """Unlike transformers' fusing, which can assign an id twice, fusing by the configuration gives unique ids."""
    labels = [1, 0, 1, 2, 3, 1, 0]
    class_logits = torch.full((1, 7, 5), -9.0)
    class_logits[0, range(7), labels] = torch.arange(7.0) / 10 + 5
    mask_logits = torch.full((1, 7, 14, 14), -9.0)
    for query in range(7):
        mask_logits[0, query, 2 * query : 2 * query + 2] = 9.0
    outputs = {"class_queries_logits": class_logits, "masks_queries_logits": mask_logits}
    processor = FaiM2FImageProcessor(label_ids_to_fuse=STUFF)
    own = processor.post_process_panoptic_segmentation(outputs, target_sizes=[(14, 14)])[0]
    rows = [int(value) for value in own["segmentation"][::2, 0]]
    assert rows == [1, 2, 1, 3, 4, 1, 5]
    assert [(entry["id"], entry["label_id"], entry["was_fused"]) for entry in own["segments_info"]] == [
        (1, 1, True), (2, 0, False), (3, 2, False), (4, 3, True), (5, 0, False)
    ]  # fmt: skip
    best = post_process_panoptic_segmentation(class_logits, mask_logits)[0]["segments_info"][5]["score"]
    assert own["segments_info"][0]["score"] == best
    theirs = processor.post_process_panoptic_segmentation(outputs, label_ids_to_fuse=STUFF, target_sizes=[(14, 14)])[0]
    ids = [entry["id"] for entry in theirs["segments_info"]]
    assert len(ids) == 7 and ids[1] == ids[3] == 2  # transformers gives a car and a ball the same id


def test_a_model_that_disagrees_with_the_data_is_noted(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(trained / "run" / "final", folder)
    command = ["evaluate", str(folder), "--data", str(trained / "coco"), "--format", "coco-panoptic",
               "--subtasks", "panoptic", "--limit", "2", "--no-card"]  # fmt: skip

    def change(value: Any) -> None:
        for name in ("config.json", "preprocessor_config.json"):
            content = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**content, "label_ids_to_fuse": value}))

    change([3])
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    assert "Class 1 (grass) is a thing in" in capsys.readouterr().out
    change(None)
    assert main([*command, "--out", str(tmp_path / "two")]) == 0
    assert "does not say which classes are stuff" in capsys.readouterr().out
    change([1, 4])
    assert main([*command, "--out", str(tmp_path / "three")]) == 2
    error = capsys.readouterr().err
    assert "has the class 4 in label_ids_to_fuse, but only the classes 0 to 3" in error and "Traceback" not in error
    with pytest.raises(ModelError):
        open_model(folder)
    assert not (tmp_path / "three").exists()


def test_configurations() -> None:
    config = FaiM2FConfig(num_labels=4, label_ids_to_fuse=(3, 1, 3))
    assert config.label_ids_to_fuse == [1, 3] and config.thing_ids == [0, 2]
    assert FaiM2FConfig(num_labels=4).thing_ids is None
    assert FaiM2FConfig(num_labels=2, label_ids_to_fuse=[]).thing_ids == [0, 1]
    assert FaiM2FImageProcessor.from_model_config(config).label_ids_to_fuse == [1, 3]
    assert FaiM2FConfig.from_dict(json.loads(config.to_json_string())).label_ids_to_fuse == [1, 3]
    for wrong in ("1", [-1], [1.5], 3):
        with pytest.raises(ValueError, match="label_ids_to_fuse` must be a list of class ids"):
            FaiM2FConfig(label_ids_to_fuse=wrong)
    with pytest.raises(TypeError, match="did you mean `label_ids_to_fuse`"):
        FaiM2FConfig(stuff_ids=[1])


def test_the_published_label_sets() -> None:
    """As in transformers' converted checkpoints; 53 stuff classes in COCO, 50 in ADE20K, 11 in Cityscapes."""
    coco = [*load_labels("coco"), "banner", *(f"stuff {number}" for number in range(51)), "rug-merged"]
    assert stuff_of(coco) == list(range(80, 133))
    ade = ["windowpane" if name == "window" else name.split(",")[0] for name in load_labels("ade20k")]
    stuff = stuff_of(ade)
    assert stuff is not None and len(stuff) == 50
    named = {ade[label] for label in stuff}
    assert {"wall", "sky", "road", "grass", "river", "shower"} <= named
    assert not {"windowpane", "door", "person", "flag", "signboard", "fence"} & named
    assert stuff_of(list(CITYSCAPES_CLASSES.values())) == list(range(11))
    assert stuff_of([f"class {number}" for number in range(133)]) is None
    assert stuff_of(["cat", "dog"]) is None


def test_converted_panoptic_models_know_their_stuff() -> None:
    names = list(CITYSCAPES_CLASSES.values())
    theirs = tiny(num_labels=19)
    theirs.config.id2label = dict(enumerate(names))
    config = convert_config(theirs.config, "panoptic")
    assert config.label_ids_to_fuse == list(range(11)) and config.thing_ids == list(range(11, 19))
    assert FaiM2FImageProcessor.from_model_config(config).label_ids_to_fuse == list(range(11))
    assert convert_config(theirs.config, "semantic").label_ids_to_fuse is None
    assert convert_config(tiny().config, "panoptic").label_ids_to_fuse is None
