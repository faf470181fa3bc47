"""The predictor in every runtime gives the same results as the model and image processor called directly."""

import importlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f import masks as run_lengths
from hf_faim2f.data.digits import DigitScenes
from hf_faim2f.export.engine import EngineRunner
from hf_faim2f.masks import encode_run_lengths
from hf_faim2f.model.image_processing_faim2f import scale_and_shift
from hf_faim2f.runtime import ImageError, Predictor, PredictorError, backends
from hf_faim2f.runtime.backends import Network, usual_batch_size
from hf_faim2f.runtime.predictor import ahead, background_threads
from tests.support.lively_model import LABELS, STUFF, check_same, photographs, save_model
from tests.support.shared import exported

SIZE = (64, 96)
SUBTASKS = ("semantic", "instance", "panoptic")
# An untrained model has low scores.
THRESHOLDS: dict[str, float | None] = {"semantic": None, "instance": 0.1, "panoptic": 0.1}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def graph(model_folder: Path) -> Callable[[str], Path]:
    """The folder of a kind of graph, exported on first use."""
    options: dict[str, dict[str, Any]] = {
        "logits": {},
        "semantic": {"size": SIZE, "batch": 2},
        "instances": {"size": SIZE, "batch": 1, "input_name": "image"},
        "queries": {"size": SIZE},
    }
    return lambda kind: exported(model_folder, outputs=kind, **options[kind])


@pytest.fixture(scope="module")
def torch_predictor(model_folder: Path) -> Predictor:
    return Predictor.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """The torch predictor with the image processor of a graph with a fixed size."""
    size = {"height": SIZE[0], "width": SIZE[1]}
    return Predictor.from_pretrained(str(save_model(tmp_path_factory.mktemp("fixed"), size=size)), "torch", "cpu")


def test_torch_is_the_processor_and_the_model_by_hand(model_folder: Path, torch_predictor: Predictor) -> None:
    model = FaiM2FForUniversalSegmentation.from_pretrained(model_folder).optimize_for_inference()
    processor = FaiM2FImageProcessor.from_pretrained(model_folder)
    assert torch_predictor.subtasks == ("instance", "semantic", "panoptic")
    several = 0
    for image in photographs():
        inputs = processor(image, return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        sizes, network_size = [(image.height, image.width)], tuple(inputs["pixel_values"].shape[-2:])
        semantic, instance, panoptic = (torch_predictor(image, task, THRESHOLDS[task])[0] for task in SUBTASKS)

        label_map = processor.post_process_semantic_segmentation(outputs, sizes)[0]
        assert torch.equal(semantic.label_map, label_map) and semantic.size == sizes[0]
        assert [segment.class_id for segment in semantic.segments] == label_map.unique().tolist()
        for segment, mask in zip(semantic.segments, semantic.masks(), strict=True):
            assert torch.equal(mask, label_map == segment.class_id) and segment.score is None

        detections = processor.post_process_detections(outputs, sizes, network_size, 0.1, id2label=LABELS)[0]
        detections.sort(key=lambda detection: -detection.score)
        assert len(detections) == len(instance.segments) > 0
        for segment, detection in zip(instance.segments, detections, strict=True):
            assert (segment.class_id, segment.label, segment.score) == (
                detection.class_id, detection.label, detection.score
            )  # fmt: skip
            assert segment.box == detection.box and torch.equal(segment.mask, detection.mask)
        best = torch.full(sizes[0], -1)
        for segment, mask in reversed(list(zip(instance.segments, instance.masks(), strict=True))):
            best[mask] = segment.class_id
        assert torch.equal(instance.label_map, best)
        places = instance.segment_map()
        assert torch.equal(places < 0, best < 0) and int(places.max()) < len(detections)

        found = processor.post_process_panoptic_segmentation(outputs, 0.1, label_ids_to_fuse=set(), target_sizes=sizes)[
            0
        ]
        expected = torch.full(sizes[0], -1)
        for info in found["segments_info"]:
            expected[found["segmentation"] == info["id"]] = info["label_id"]
        assert torch.equal(panoptic.label_map, expected)
        labels = [segment.class_id for segment in panoptic.segments]
        every = [info["label_id"] for info in found["segments_info"]]
        assert all(labels.count(label) == (min(1, every.count(label)) if label in STUFF else every.count(label))
                   for label in LABELS)  # fmt: skip
        assert (panoptic.masks().sum(0) <= 1).all() and len(every) > 0
        scores = [segment.score or 0.0 for segment in panoptic.segments]
        assert scores == sorted(scores, reverse=True) and max(scores) == max(i["score"] for i in found["segments_info"])
        several += len(every) > len(labels)
        # Without a threshold, the processor's own is used.
        assert len(torch_predictor(image)[0].segments) == len(detections)
    assert several  # some stuff was fused


@pytest.mark.slow  # exports with instances inside
def test_onnxruntime_says_what_torch_says(torch_predictor: Predictor, graph: Callable[[str], Path]) -> None:
    predictor = Predictor.from_pretrained(graph("logits"), "onnxruntime", device="cpu")
    assert usual_batch_size(predictor.network) == 1  # as torch on a CPU
    assert predictor.subtasks == torch_predictor.subtasks
    for subtask in SUBTASKS:
        ours = predictor(photographs(), subtask, THRESHOLDS[subtask], batch_size=2)
        check_same(ours, torch_predictor(photographs(), subtask, THRESHOLDS[subtask]), stray=2e-4)


def test_a_graph_beside_the_configuration_of_another_model_is_refused(
    graph: Callable[[str], Path], tmp_path: Path
) -> None:
    """Otherwise its classes would get the other model's names."""
    folder = tmp_path / "mixed"
    shutil.copytree(graph("logits"), folder)
    config = json.loads((folder / "config.json").read_text())
    names = {str(number): f"other {number}" for number in range(len(LABELS) - 1)}
    config |= {"id2label": names, "label2id": {name: int(number) for number, name in names.items()}}
    (folder / "config.json").write_text(json.dumps(config | {"label_ids_to_fuse": None}))
    predictor = Predictor.from_pretrained(folder, "onnxruntime", device="cpu")
    said = f"predicts {len(LABELS)} classes, but its config.json names {len(names)}"
    with pytest.raises(PredictorError, match=said):
        predictor(photographs()[0])
    outputs = {"segmentation": torch.tensor([[[0, len(names)]]])}
    with pytest.raises(PredictorError, match=said):
        backends.check_outputs(predictor.network, outputs)
    backends.check_outputs(predictor.network, {"segmentation": outputs["segmentation"] - 1})


def of_bytes(predictor: Predictor) -> Predictor:
    """The same network for images whose pixels are rounded after resizing."""
    scale, shift = scale_and_shift(predictor.network.processor.to_dict())
    run = predictor.network.run
    return Predictor(
        replace(predictor.network, run=lambda image: run(image.float() * scale + shift), input_name="image")
    )


@pytest.mark.newest_only  # the graph includes post-processing, which test_onnx.py compares for both exporters
@pytest.mark.slow  # exports too
@pytest.mark.parametrize("kind", ["instances", pytest.param("queries", marks=pytest.mark.large)])
def test_graphs_with_instances_inside(kind: str, graph: Callable[[str], Path], fixed: Predictor) -> None:
    predictor = Predictor.from_pretrained(graph(kind), "onnxruntime")
    assert predictor.subtasks == ("instance",) and predictor.network.size == SIZE
    same = of_bytes(fixed) if predictor.network.input_name == "image" else fixed
    assert (same is fixed) == (kind == "queries")
    ours, exact = predictor(photographs(), threshold=0.1), fixed(photographs(), "instance", 0.1)
    check_same(ours, same(photographs(), "instance", 0.1), stray=2e-4)
    assert sum(len(prediction.segments) for prediction in ours) > 5
    for one, other in zip(ours, exact, strict=True):  # rounding changes little
        assert (one.label_map != other.label_map).float().mean() < 0.02
    assert [len(p.segments) for p in predictor(photographs(), threshold=1.0)] == [0] * 5
    # All segments with pixels.
    everything, theirs = predictor(photographs()[:1], threshold=0.0), same(photographs()[:1], threshold=0.0)
    assert 8 <= len(everything[0].segments) == len(theirs[0].segments)
    if kind == "queries":  # whose best queries the predictor selects
        processor = FaiM2FImageProcessor.from_dict({**fixed.network.processor.to_dict(), "top_k": 2})
        few, expected = (Predictor(replace(one.network, processor=processor)) for one in (predictor, fixed))
        check_same(few(photographs()), expected(photographs()), stray=2e-4)
        assert max(len(prediction.segments) for prediction in few(photographs())) == 2


def test_a_graph_of_label_maps_and_a_fixed_batch(graph: Callable[[str], Path], fixed: Predictor) -> None:
    predictor = Predictor.from_pretrained(graph("semantic"), "onnxruntime")
    batches: list[int] = []
    run = predictor.network.run

    def counted(inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        batches.append(len(inputs))
        return run(inputs)

    predictor.network.run = counted
    images = photographs()
    ours = predictor(images)
    assert batches == [2, 2, 2] and [p.size for p in ours] == [(i.height, i.width) for i in images]
    model, processor = fixed.network.run, fixed.network.processor
    for image, prediction, smooth in zip(images, ours, fixed(images, "semantic"), strict=True):
        outputs = model(processor(image, return_tensors="pt")["pixel_values"])
        small = processor.post_process_semantic_segmentation(outputs, [SIZE])[0]
        # Pillow reads at pixel centers. torch's "nearest" shifts the map by half a pixel of the graph, right and down.
        size = prediction.size[::-1]
        nearest = np.asarray(Image.fromarray(small.byte().numpy()).resize(size, Image.Resampling.NEAREST))
        assert (prediction.label_map.numpy() != nearest).mean() < 1e-3
        assert (prediction.label_map == smooth.label_map).float().mean() > 0.8


@pytest.mark.parametrize(("fixed_batch", "calls"), [(None, [5]), (8, [8])])
def test_each_image_gets_its_own_outputs(torch_predictor: Predictor, fixed_batch: int | None, calls: list[int]) -> None:
    sizes: list[int] = []

    def run(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes.append(len(batch))
        return {"mean": batch.mean((1, 2, 3)), "twice": 2 * batch}

    network = replace(torch_predictor.network, run=run, batch=fixed_batch)
    images = [torch.full((3, 4, 6), float(number)) for number in range(5)]
    outputs = Predictor(network)._run(images)
    assert sizes == calls and len(outputs) == 5
    for image, own in zip(images, outputs, strict=True):
        assert torch.equal(own["twice"], 2 * image[None]) and torch.equal(own["mean"], image.mean()[None])


def test_the_usual_batch_is_what_the_network_accepts(torch_predictor: Predictor) -> None:
    network = torch_predictor.network
    assert usual_batch_size(replace(network, usual_batch=4)) == 4
    assert usual_batch_size(replace(network, usual_batch=4, largest_batch=2)) == 2
    assert usual_batch_size(replace(network, batch=8)) is None  # there is no other choice
    assert network.usual_batch == (4 if torch.cuda.is_available() else 1)


def test_what_is_predicted_of_an_image_does_not_depend_on_the_others(torch_predictor: Predictor) -> None:
    apart = [torch_predictor(image, "panoptic", 0.1)[0] for image in photographs()]
    for batch_size in (1, 2, 3, 8):
        check_same(torch_predictor(photographs(), "panoptic", 0.1, batch_size), apart, stray=2e-4)


def test_a_processor_that_pads(model_folder: Path, torch_predictor: Predictor) -> None:
    network = torch_predictor.network
    processor = FaiM2FImageProcessor.from_pretrained(model_folder, pad_size={"height": 640, "width": 640})
    padded = Predictor(Network("padded", network.config, processor, network.run))
    for image in photographs()[:2]:
        assert not processor(image, return_tensors="pt")["pixel_mask"].all()
        inputs = processor(image, return_tensors="pt", do_pad=False)
        outputs = network.run(inputs["pixel_values"])
        label_map = processor.post_process_semantic_segmentation(outputs, [(image.height, image.width)])[0]
        assert torch.equal(padded(image, "semantic")[0].label_map, label_map)
        # The same as uint8.
        values = of_bytes(padded)._prepare((0, image)).values
        normalized = processor(values, do_resize=False, do_pad=False, return_tensors="pt")["pixel_values"][0]
        assert values.dtype == torch.uint8 and (normalized - inputs["pixel_values"][0]).abs().max() < 0.01


def test_images_of_every_kind(torch_predictor: Predictor, tmp_path: Path) -> None:
    image = photographs()[0]
    image.save(tmp_path / "a.png")
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    array = np.array(image)
    kinds = [image, array, torch.from_numpy(array).permute(2, 0, 1), tmp_path / "a.png", str(tmp_path / "turned.png")]
    found = torch_predictor(kinds, "semantic")
    assert all(torch.equal(one.label_map, found[0].label_map) for one in found)
    assert all(np.array_equal(np.asarray(one.image), array) for one in found)
    batch = torch_predictor(np.stack([array, array]), "semantic")
    assert len(batch) == 2 and torch.equal(batch[1].label_map, found[0].label_map)
    # Half-way between 0 and 65535 is mid-gray.
    deep = Image.fromarray(np.full((40, 50), 32896, dtype=np.uint16))
    assert np.asarray(torch_predictor(deep)[0].image).tolist()[0][0] == [128] * 3


@pytest.mark.parametrize(("white", "dtype"), [(1, np.float32), (255, np.float32), (255, np.uint8)])
def test_the_picture_of_an_image_that_is_not_rescaled(white: int, dtype: Any, model_folder: Path) -> None:
    """Some processors have the means of pixels in 0..255, and do not rescale."""
    predictor = Predictor.from_pretrained(model_folder, device="cpu")
    settings = {"do_rescale": False, "image_mean": [white / 2] * 3, "image_std": [white / 4] * 3}
    predictor.network.processor = FaiM2FImageProcessor.from_pretrained(model_folder, **settings)
    photo = np.array(photographs()[0])
    array = (photo * (white / 255)).astype(dtype)
    assert np.array_equal(predictor(array)[0].image, photo)
    expected = predictor.network.processor(array.astype(np.float32), return_tensors="pt", do_pad=False)["pixel_values"]
    assert torch.allclose(predictor._prepare((0, array)).values, expected[0], atol=1e-5)


def test_one_image_or_several(torch_predictor: Predictor, tmp_path: Path) -> None:
    one, other = photographs()[:2]
    one.save(tmp_path / "one.png")
    maps = [torch_predictor(image, "semantic")[0].label_map for image in (one, other)]
    pixels = np.array(one)
    column = datasets.Dataset.from_dict({"image": [one, other]}, datasets.Features({"image": datasets.Image()}))[
        "image"
    ]
    with open(tmp_path / "one.png", "rb") as file:
        for given, count in (
            (one, 1), (str(tmp_path / "one.png"), 1), (tmp_path / "one.png", 1), (file, 1), (pixels, 1),
            (pixels[None], 1), ([one, other], 2), (column, 2), (iter([one, other]), 2),
        ):  # fmt: skip
            if not hasattr(given, "__next__") and given is not file:
                assert len(list(torch_predictor.stream(given, "semantic"))) == count
            found = torch_predictor(given, "semantic")
            assert len(found) == count
            assert all(torch.equal(a.label_map, b) for a, b in zip(found, maps, strict=False))


def test_a_graph_of_bytes_takes_nothing_else(torch_predictor: Predictor) -> None:
    """Heights of up to 3000 would be cut at 255."""
    settings = {"num_channels": 4, "do_rescale": False, "image_mean": [120.0] * 3 + [800.0], "image_std": [60.0] * 4}
    network = replace(torch_predictor.network, processor=FaiM2FImageProcessor(**settings), input_name="image")
    array = np.full((40, 50, 4), 100.0, dtype=np.float32)
    assert Predictor(network)._prepare((0, array)).values.dtype == torch.uint8
    for value in (3000.0, -20.0):
        array[:, :, 3] = value
        error = Predictor(network)._prepare((7, array)).error
        assert re.match(r"image 7 has values from -?\d+ to \d+, but the graph takes bytes .*pixel_values", str(error))
    scaled = replace(network, processor=FaiM2FImageProcessor(rescale_factor=1e-4))
    assert "image 0 has values from" in str(Predictor(scaled)._prepare((0, array[..., :3] + 9000)).error)


def test_images_that_cannot_be_used(
    torch_predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = photographs()[0]
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    sources = [good, tmp_path / "bad.jpg", Image.new("RGB", (9000, 2)), good, tmp_path, None]
    made = dict(torch_predictor.stream(sources, batch_size=2))
    assert [isinstance(made[index], ImageError) for index in range(6)] == [False, True, True, False, True, True]
    assert str(made[1]).startswith(f"{tmp_path / 'bad.jpg'} cannot be opened as an image")
    assert str(made[2]).startswith("image 2: 2x9000 pixels would be resized to 0x160")
    assert str(made[4]) == f"{tmp_path} is not a file."
    assert str(made[5]).startswith("image 5 is a NoneType")
    with pytest.raises(ImageError, match="image 1 is a bytes"):
        torch_predictor([good, b"bytes"])
    with pytest.raises(ImageError, match="list of images is empty"):
        torch_predictor([])
    for nothing in (None, 5, b"bytes", {"image": good}):
        assert [str(error).split(":")[0] for _, error in torch_predictor.stream(nothing)] == [
            f"image 0 is a {type(nothing).__name__}"
        ]
    (tmp_path / "image 0.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError) as raised:
        torch_predictor(tmp_path / "image 0.jpg")
    assert str(raised.value).startswith(f"{tmp_path / 'image 0.jpg'} cannot be opened as an image: ")
    scaled = np.array(good) / 255  # would be divided by 255 again, and be black
    for floats in (scaled, torch.from_numpy(scaled).half()):
        with pytest.raises(ImageError, match="image 1 is an array of floats in 0..1, .*: multiply it by 255"):
            torch_predictor([good, floats])
    np.save(tmp_path / "scaled.npy", scaled)
    with pytest.raises(ImageError, match=r"^/[^ ]*/scaled.npy is an array of floats in 0..1, .*: multiply it by 255"):
        torch_predictor([good, tmp_path / "scaled.npy"])
    np.save(tmp_path / "four.npy", scaled[..., [0, 1, 2, 0]])
    four = Predictor(replace(torch_predictor.network, processor=FaiM2FImageProcessor(num_channels=4)))
    assert "four.npy is an array of floats in 0..1" in str(four._prepare((0, tmp_path / "four.npy")).error)
    # Pillow's float images, which are scaled.
    Image.fromarray(scaled[..., 0].astype(np.float32)).save(tmp_path / "scaled.tif")
    assert np.array_equal(
        torch_predictor(tmp_path / "scaled.tif")[0].image, np.array(good.getchannel(0).convert("RGB"))
    )
    assert torch_predictor([np.zeros((40, 50, 3)), np.array(good).astype(np.float32)])[1].segments
    good.save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="large.png"):
        torch_predictor([tmp_path / "large.png"])


def test_threads_that_share_an_engine_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buffers are shared: a second batch would overwrite the first before the engine has run."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    runner = EngineRunner(SimpleNamespace(library="tensorrt"), None, None, torch.device("cuda"))  # type: ignore[arg-type]
    buffer = torch.zeros(1)

    def run(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        buffer.copy_(batch)
        time.sleep(0.01)
        return {"logits": buffer.clone()}

    monkeypatch.setattr(runner, "_run", run)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda value: runner(torch.tensor([value]))["logits"].item(), map(float, range(16))))
    assert found == list(range(16))


def test_images_are_read_ahead_in_another_thread(torch_predictor: Predictor) -> None:
    read: list[tuple[int, str]] = []
    prepare = torch_predictor._prepare

    def watched(entry: Any) -> Any:
        read.append((entry[0], threading.current_thread().name))
        return prepare(entry)

    predictor = Predictor(torch_predictor.network)
    predictor._prepare = watched  # type: ignore[method-assign]
    stream = predictor.stream(photographs()[:1] * 20)
    assert read == []
    next(stream)
    next(stream)
    stream.close()
    # Two were yielded, one is predicted, one is next at the network, and two are ahead; the rest was not read.
    assert 2 <= len(read) <= 6 and [index for index, _ in read] == list(range(len(read)))
    assert all(name.startswith("faim2f-images") for _, name in read)
    assert not any(thread.name.startswith("faim2f-images") for thread in threading.enumerate())


@pytest.mark.parametrize("count", [1, 3])
def test_torch_computes_on_one_core_in_background_threads(count: int) -> None:
    """All other threads, including those started later, keep the previous number."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    together = threading.Barrier(count)
    others: list[int] = []

    def threads_of_torch() -> int:
        together.wait(timeout=60)
        return torch.get_num_threads()

    try:
        with background_threads("test", count) as executor:
            assert [one.result() for one in [executor.submit(threads_of_torch) for _ in range(count)]] == [1] * count
        thread = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert torch.get_num_threads() == 2 and others == [2]
    finally:
        torch.set_num_threads(before)


def test_an_error_of_the_reading_thread_ends_the_predictions(torch_predictor: Predictor) -> None:
    """An error that is not about an image: earlier predictions are yielded, and no thread is left."""
    predictor = Predictor(torch_predictor.network)
    prepare = torch_predictor._prepare

    def failing(entry: Any) -> Any:
        if entry[0] == 2:
            raise MemoryError
        return prepare(entry)

    predictor._prepare = failing  # type: ignore[method-assign]
    given: list[int] = []
    with pytest.raises(MemoryError):
        given.extend(index for index, _ in predictor.stream(photographs()[:1] * 5))
    assert given in ([0], [0, 1])
    assert not any(thread.name.startswith("faim2f-images") for thread in threading.enumerate())


def test_large_images_after_small_ones_are_not_all_read_ahead() -> None:
    sizes = [1] * 20 + [100] * 20
    made: list[int] = []

    class AtOnce(ThreadPoolExecutor):
        def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result(work(*arguments, **named))
            return future

    def make(place: int) -> int:
        made.append(place)
        return sizes[place]

    most_ahead = []
    for place, size in enumerate(ahead(AtOnce(), make, range(40), 16, lambda size: max(1, 32 // size))):
        assert size == sizes[place]
        most_ahead.append(len(made) - place - 1)
    # The size is unknown before the first result. Then sixteen are ahead; once a large one is made, at most one.
    assert most_ahead[:5] == [1, 16, 16, 16, 16] and max(most_ahead[19:]) == 1
    assert all(place + ahead <= 20 for place, ahead in enumerate(most_ahead[:20]))


@pytest.mark.parametrize("together", [None, 1, 300])
def test_run_lengths_are_those_of_coco(together: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if together is not None:
        monkeypatch.setattr(run_lengths, "COUNTS_TOGETHER", together)
    generator = np.random.default_rng(0)
    assert encode_run_lengths([], [], (4, 3)) == []
    for case in range(100):
        height, width = generator.integers(1, 40, 2)
        # Masks of one to hundreds of runs, whose texts must be separated.
        masks, crops, boxes = [], [], []
        for number in range(1 + case % 5):
            mask = generator.random((height, width)) < generator.choice([0.02, 0.5, 0.98, 2])
            if (case + number) % 7 == 0:
                mask[:] = False
            rows, columns = (mask.any(axis).nonzero()[0] for axis in (1, 0))
            box = (columns[0], rows[0], columns[-1], rows[-1]) if len(rows) else (0, 0, 0, 0)
            masks.append(mask)
            crops.append(mask[box[1] : box[3] + 1, box[0] : box[2] + 1])
            boxes.append(box)
        for mask, ours in zip(masks, encode_run_lengths(crops, boxes, (int(height), int(width))), strict=True):
            theirs = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            assert ours["counts"].encode() == theirs["counts"] and ours["size"] == theirs["size"]
            assert np.array_equal(coco_mask.decode(ours).astype(bool), mask)
    # An image of which only the crop is read, and a count of several characters.
    far = encode_run_lengths([np.ones((1, 2), dtype=bool)], [(30_000, 5, 30_001, 5)], (60_000, 40_000))[0]
    assert coco_mask.area(far) == 2 and coco_mask.toBbox(far).tolist() == [30_000, 5, 2, 1]


def test_a_prediction_as_data_and_as_a_picture(torch_predictor: Predictor) -> None:
    for subtask in SUBTASKS:
        prediction = torch_predictor(photographs()[1], subtask, THRESHOLDS[subtask])[0]
        read = json.loads(json.dumps(prediction.to_json(), allow_nan=False))
        assert len(read) == len(prediction.segments) > 0
        for entry, segment, mask in zip(read, prediction.segments, prediction.masks(), strict=True):
            decoded = coco_mask.decode(entry["segmentation"]).astype(bool)
            assert np.array_equal(decoded, mask.numpy()) and entry["area"] == decoded.sum()
            assert entry["label"] == LABELS[entry["class_id"]] and entry["score"] == segment.score
            x, y, width, height = coco_mask.toBbox(entry["segmentation"]).tolist()
            assert entry["box"] == [x, y, x + width - 1, y + height - 1]
        drawn = prediction.draw()
        assert drawn.size == prediction.image.size and drawn.tobytes() != prediction.image.tobytes()
        small = prediction.draw(longest=50)
        assert max(small.size) == 50
        assert prediction.masks((20, 31)).shape == (len(read), 20, 31)
    nothing = torch_predictor(photographs()[1], "panoptic", 1.0)[0]
    assert nothing.segments == [] and (nothing.label_map == -1).all() and nothing.to_json() == []
    assert nothing.draw().tobytes() == nothing.image.tobytes()


def test_the_classes_that_are_drawn_lightly(torch_predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration's stuff; without any, all classes of a semantic map."""

    def stuff(subtask: str) -> set[int]:
        prediction = torch_predictor(photographs()[1], subtask, THRESHOLDS[subtask])[0]
        plain = replace(prediction, stuff_ids=())
        differs = any(segment.class_id in prediction.stuff_ids for segment in prediction.segments)
        assert (prediction.draw().tobytes() != plain.draw().tobytes()) == differs
        return set(prediction.stuff_ids)

    config = torch_predictor.network.config
    assert [stuff(subtask) for subtask in SUBTASKS] == [set(config.label_ids_to_fuse)] * 3
    monkeypatch.setattr(config, "label_ids_to_fuse", None)
    assert [stuff(subtask) for subtask in SUBTASKS] == [set(range(len(LABELS))), set(), set()]


def test_a_network_with_ranges(torch_predictor: Predictor) -> None:
    """Like an engine: too large batches are rejected before any image is read, and an image of an unsupported size is
    named."""
    seen = [tuple(image.size) for image in photographs()]
    prepared = {tuple(torch_predictor._input_of(np_pixels(image))[1].shape[1:]) for image in photographs()}
    assert len(prepared) > 1, seen
    largest = max(prepared)
    network = replace(torch_predictor.network, largest_batch=3, sizes=(min(prepared), largest))
    with pytest.raises(PredictorError, match="takes at most 3 images at once, not 4: choose a smaller batch size"):
        Predictor(network).stream(photographs(), batch_size=4)
    network = replace(network, sizes=(largest, largest))
    made = [item for _, item in Predictor(network).stream(photographs(), batch_size=3)]
    left_out = [item for item in made if isinstance(item, ImageError)]
    assert 0 < len(left_out) < len(made)
    assert f"and the network takes {largest[0]}x{largest[1]} to {largest[0]}x{largest[1]}: leave it" in str(left_out[0])


def np_pixels(image: Image.Image) -> torch.Tensor:
    """(3, H, W) float32 in 0..255; (1, H, W) for a gray image."""
    pixels = torch.from_numpy(np.array(image)).float()
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def test_what_a_network_does_not_answer(torch_predictor: Predictor) -> None:
    image = photographs()[0]
    for kind, subtask in (("semantic", "instance"), ("instances", "semantic"), ("queries", "panoptic")):
        predictor = Predictor(replace(torch_predictor.network, outputs=kind, batch=2))
        with pytest.raises(PredictorError, match=f"outputs {kind}, which answer .*, but not {subtask}: export it"):
            predictor(image, subtask)
        with pytest.raises(PredictorError, match="takes 2 images at once, not 3"):
            predictor(image, batch_size=3)
    for message, arguments in (
        ("subtask must be one of semantic, instance, panoptic, not 'semantics'", {"subtask": "semantics"}),
        ("has no threshold", {"subtask": "semantic", "threshold": 0.5}),
        ("threshold must be from 0 to 1, not 1.5", {"threshold": 1.5}),
        ("at least 1, not 0", {"batch_size": 0}),
    ):
        with pytest.raises(PredictorError, match=message):
            torch_predictor.stream([image], **arguments)  # before anything is read


def test_what_cannot_be_loaded(
    model_folder: Path, graph: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Any, *arguments: Any) -> str:
        with pytest.raises(PredictorError) as caught:
            Predictor.from_pretrained(path, *arguments)
        message = str(caught.value)
        assert "\n" not in message and message.endswith(".")
        return message

    assert (
        "runtime must be one of torch, onnxruntime, tensorrt, aotinductor, openvino, executorch, litert, not "
        "'tensorflow'" in refused(model_folder, "tensorflow")
    )
    assert "has no config.json" in refused(tmp_path)
    assert "is not a folder here" in refused("someone/something")
    assert "There is no device 'cuda:77' for torch here" in refused(model_folder, "torch", "cuda:77")
    assert "There is no device 'gpu'" in refused(model_folder, "torch", "gpu")
    assert "choose the runtime onnxruntime" in refused(graph("queries"))
    assert "There is no file" in refused(model_folder, "onnxruntime")
    assert "device must be cpu, cuda or cuda:N" in refused(graph("queries"), "onnxruntime", "gpu")
    onnxruntime = importlib.import_module("onnxruntime")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "cannot run on cuda:0" in refused(graph("queries"), "onnxruntime", "cuda:0")

    damaged = tmp_path / "damaged"
    shutil.copytree(graph("queries"), damaged)
    (damaged / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 64}}))
    assert "takes 64x96 pixels (height x width) and nothing else" in refused(damaged, "onnxruntime")
    (damaged / "model.onnx").write_bytes(b"no graph")
    assert f"The graph of {damaged} cannot be loaded" in refused(damaged, "onnxruntime")
    (damaged / "config.json").write_text('{"model_type": "mask2former"}')
    assert "is a model of type 'mask2former', not 'faim2f'" in refused(damaged, "onnxruntime")

    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_queries": 13}))
    assert "are not those of its config.json" in refused(other)
    (other / "config.json").write_text(json.dumps(config))
    (other / "preprocessor_config.json").unlink()
    assert f"{other} has no preprocessor_config.json, which says how images are" in refused(other)

    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")

    monkeypatch.setattr(backends, "import_module", missing)
    assert "needs onnxruntime, which cannot be imported" in refused(graph("queries"), "onnxruntime")


def test_another_graph_is_not_taken_for_one(model_folder: Path, tmp_path: Path) -> None:
    onnx = importlib.import_module("onnx")
    shutil.copytree(model_folder, tmp_path / "other")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    nodes = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "other", [value], [result])
    model = onnx.helper.make_model(nodes, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "other" / "model.onnx")
    with pytest.raises(PredictorError, match="turns x into y, which is not a graph"):
        Predictor.from_pretrained(tmp_path / "other", "onnxruntime")


def test_bfloat16_says_nearly_the_same() -> None:
    """The shipped model on unseen scenes: its predictions in bfloat16 match those in float32."""
    digits = Path(__file__).parents[2] / "examples" / "digits"
    whole, half = (Predictor.from_pretrained(digits, device="cpu", precision=kind) for kind in ("fp32", "bf16"))
    scenes = DigitScenes("test", 3)
    images = [Image.fromarray(scenes[index]["image"].permute(1, 2, 0).numpy()) for index in range(3)]
    _, values = half._input_of(np_pixels(images[0]))
    assert {output.dtype for output in half._run([values])[0].values()} == {torch.bfloat16}
    assert {output.dtype for output in whole._run([values])[0].values()} == {torch.float32}
    for one, other in zip(half(images, "semantic"), whole(images, "semantic"), strict=True):
        assert (one.label_map == other.label_map).float().mean() > 0.99
    # No score is near this threshold: at 0.5, a segment has 0.505 in float32 and less than 0.5 in bfloat16.
    ours, theirs = (predictor(images, "instance", threshold=0.6) for predictor in (half, whole))
    names = [[segment.label for segment in made.segments] for made in ours]
    assert names == [[segment.label for segment in made.segments] for made in theirs]


def test_a_precision_that_cannot_be(model_folder: Path) -> None:
    with pytest.raises(PredictorError, match="precision must be one of fp32, bf16, fp16, not 'int8'"):
        Predictor.from_pretrained(model_folder, precision="int8")
    with pytest.raises(PredictorError, match="The precision of onnxruntime is that of its graph"):
        Predictor.from_pretrained(model_folder, "onnxruntime", precision="bf16")
