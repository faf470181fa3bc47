"""Properties of all metrics: an `evaluate.Metric` that works offline with little memory and merges exactly."""

import importlib
import json
import pickle
import socket
import sys
from pathlib import Path
from typing import Any

import evaluate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_faim2f.evaluation import InstanceMetric, SemanticMetric
from tests.support.forks import run_together
from tests.support.metric_cases import METRICS, NAMES, add, images, pair


@pytest.fixture(params=METRICS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("kind", METRICS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_the_division_of_images_leaves_no_trace(kind: str, data: st.DataObject) -> None:
    """Any split over any number of processes, in any order, gives a bit-identical result."""
    count = data.draw(st.integers(1, 7))
    pairs = list(enumerate(images(kind, count, data.draw(st.integers(0, 99)))))
    alone = json.dumps(add(METRICS[kind](), pairs).compute())
    owner = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    states = []
    for process in range(4):
        mine = data.draw(st.permutations([p for p, o in zip(pairs, owner, strict=True) if o == process]))
        states.append(pickle.dumps(add(METRICS[kind](), mine).state_dict()))
    together = METRICS[kind]()
    for state in data.draw(st.permutations(states)):
        together.merge(pickle.loads(state))
    assert len(together) == count
    assert json.dumps(together.compute()) == alone


@pytest.mark.parametrize("kind", METRICS)
def test_sums_of_many_images_have_no_order(kind: str) -> None:
    """Enough fractions that a floating-point sum would depend on the order."""
    pairs = list(enumerate(images(kind, 80)))
    forward, backward = (add(METRICS[kind](), order).compute() for order in (pairs, pairs[::-1]))
    assert json.dumps(forward) == json.dumps(backward)


SCRIPT = """
import json, sys
from accelerate import PartialState
state = PartialState(cpu=True)
from tests.support.metric_cases import METRICS, add, images
results = {}
for kind, make in METRICS.items():
    pairs = list(enumerate(images(kind, 5)))
    metric = add(make(), pairs[state.process_index :: state.num_processes])
    assert len(metric) == (3, 2)[state.process_index]
    metric.gather()
    results[kind] = metric.compute()
with open(f"{sys.argv[1]}/{state.process_index}.json", "w") as file:
    json.dump(results, file)
state.destroy_process_group()
"""


@pytest.mark.slow  # starts processes
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Five images on two processes of torch.distributed (gloo), 3 and 2, compared with one process."""
    for process in run_together(SCRIPT, tmp_path):
        assert process.returncode == 0, process.error
    alone = {kind: add(make(), list(enumerate(images(kind, 5)))).compute() for kind, make in METRICS.items()}
    for rank in range(2):
        assert (tmp_path / f"{rank}.json").read_text() == json.dumps(alone)


def test_is_a_metric_of_evaluate(kind: str) -> None:
    metric = METRICS[kind]()
    assert isinstance(metric, evaluate.Metric)
    assert metric.name == f"{kind}_metric" and metric.citation.startswith("https://arxiv.org/abs/")
    assert "predictions" in metric.inputs_description and metric._feature_names() == ["predictions", "references"]
    pairs = images(kind, 3)
    expectation = json.dumps(add(metric, list(enumerate(pairs))).compute())
    combined = evaluate.combine({"first": metric})
    for prediction, reference in pairs:
        combined.add(prediction, reference)
    assert json.dumps(combined.compute()) == expectation
    # all at once, as tensors or lists
    predictions, references = [p for p, _ in pairs], [r for _, r in pairs]
    assert json.dumps(metric.compute(predictions=predictions, references=references)) == expectation


def test_needs_neither_network_nor_disk(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    metric = add(METRICS[kind](), list(enumerate(images(kind, 2))))
    assert metric.compute()
    assert not Path(evaluate.config.HF_METRICS_CACHE).exists()


@pytest.mark.parametrize("kind", ["semantic", "panoptic", "cityscapes"])
def test_what_is_kept_does_not_grow(kind: str) -> None:
    metric = METRICS[kind]()
    sizes = []
    for seed in range(40):
        prediction, reference = pair(kind, seed)
        metric.add(prediction=prediction, reference=reference)
        sizes.append(len(pickle.dumps(metric.state_dict())))
    assert sizes[-1] < sizes[4] + 500  # up to the digits of the fractions


def test_masks_are_kept_as_run_lengths() -> None:
    metric = METRICS["instance"]()
    prediction, reference = pair("instance", 0, scale=100)
    assert prediction["masks"].nbytes + reference["masks"].nbytes == 6 * 500 * 500
    before = len(pickle.dumps(metric.state_dict()))
    metric.add(prediction=prediction, reference=reference)
    assert len(pickle.dumps(metric.state_dict())) - before < 6 * 3000


def test_compute_starts_anew_and_needs_images(kind: str) -> None:
    metric = METRICS[kind]()
    pairs = list(enumerate(images(kind, 2)))
    first = json.dumps(add(metric, pairs).compute())
    with pytest.raises(ValueError, match="no images were added"):
        metric.compute()
    assert json.dumps(add(metric, pairs).compute()) == first
    add(metric, pairs[:1]).reset()
    assert len(metric) == 0 and metric  # an empty metric is still a metric


def test_an_image_counts_once(kind: str) -> None:
    metric, other = METRICS[kind](), METRICS[kind]()
    pairs = list(enumerate(images(kind, 3)))
    add(metric, pairs[:2])
    with pytest.raises(ValueError, match="image 1 was counted before"):
        add(metric, pairs[1:2])
    add(other, pairs[1:])
    with pytest.raises(ValueError, match="Image 1 was counted by two processes.*even_batches=False"):
        metric.merge(other.state_dict())
    assert len(metric) == 2
    third = add(METRICS[kind](), pairs[2:]).state_dict()
    metric.merge(third)
    with pytest.raises(ValueError, match="Image 2 was counted by two processes"):
        metric.merge(third)


def test_only_the_same_metric_merges() -> None:
    metric = SemanticMetric(NAMES)
    with pytest.raises(ValueError, match="only with the same settings"):
        metric.merge(SemanticMetric(NAMES, ignore_index=0).state_dict())
    with pytest.raises(ValueError, match="only with the same settings"):
        metric.merge(SemanticMetric({**NAMES, 3: "d"}).state_dict())
    with pytest.raises(ValueError, match="only with the same metric: SemanticMetric is not InstanceMetric"):
        metric.merge(InstanceMetric(NAMES).state_dict())


def test_gather_with_one_process_changes_nothing_and_happens_once(kind: str) -> None:
    metric = METRICS[kind]()
    pairs = list(enumerate(images(kind, 2)))
    expectation = json.dumps(add(metric, pairs).compute())
    add(metric, pairs).gather()
    with pytest.raises(ValueError, match="gathered already"):
        metric.gather()
    with pytest.raises(ValueError, match="gathered: call compute or reset before adding"):
        add(metric, [(7, pairs[0][1])])
    assert json.dumps(metric.compute()) == expectation


def test_names_images_without_id_by_their_order() -> None:
    metric = SemanticMetric(NAMES)
    with pytest.raises(ValueError, match=r"^image 2 \(in the order they were added\): class 5"):
        metric.add_batch(predictions=[[[0]], [[5]]], references=[[[0]], [[0]]])
    assert len(metric) == 1


def test_mistakes_in_calling() -> None:
    metric = SemanticMetric(NAMES)
    with pytest.raises(ValueError, match="2 predictions, 1 references and 2 image_ids"):
        metric.add_batch(predictions=[[[0]], [[0]]], references=[[[0]]])
    with pytest.raises(ValueError, match="one of them is missing"):
        metric.compute(predictions=[[[0]]])
    with pytest.raises(ValueError, match="one of them is missing"):
        metric.add(prediction=[[0]])
    with pytest.raises(ValueError, match="takes predictions, references and image_ids, not logits"):
        metric.add_batch(predictions=[], references=[], logits=[])
    with pytest.raises(ValueError, match="at least one class"):
        SemanticMetric({})
    with pytest.raises(ValueError, match="must give a name for each class id"):
        SemanticMetric({"wall": "wall"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="must give a name for each class id"):
        SemanticMetric(["wall"])  # type: ignore[arg-type]


def test_classes_that_share_a_name_stay_apart() -> None:
    result = SemanticMetric({0: "screen", 1: "door", 2: "screen"}).compute(predictions=[[[0]]], references=[[[0]]])
    assert list(result["per_class"]) == ["screen (0)", "door", "screen (2)"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("instance", "faster_coco_eval"),
        ("panoptic", "hotcoco.panoptic"),
        ("cityscapes", "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling"),
    ],
)
def test_a_missing_library_is_named(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"needs {name}, which cannot be .* install hf-faim2f\[evaluate\]"):
        METRICS[kind]()
    SemanticMetric(NAMES)  # works without the library


def test_evaluate_itself_is_named_when_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [module for module in sys.modules if module.startswith("hf_faim2f.evaluation")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ImportError, match=r"needs evaluate, which cannot be .* install hf-faim2f\[evaluate\]"):
        importlib.import_module("hf_faim2f.evaluation")
