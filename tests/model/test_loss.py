"""The loss compared with the original's statistics, and with transformers' loss at the same points."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from scipy.optimize import linear_sum_assignment
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from hf_faim2f import FaiM2FConfig
from hf_faim2f.model import loss_faim2f
from hf_faim2f.model.loss_faim2f import FaiM2FLoss
from hf_faim2f.model.point_sampling_faim2f import (
    MaskProduct,
    SegmentTargets,
    draw_points,
    most_uncertain,
    sample_points,
)
from tests.support import forks
from tests.support.reference_models import FOLDER, small_model
from tests.support.train_in_processes import fixed_points

Targets = tuple[list[torch.Tensor], list[torch.Tensor]]


def loss_of(num_labels: int, **overrides: Any) -> FaiM2FLoss:
    return FaiM2FLoss(FaiM2FConfig(num_labels=num_labels, **overrides))


def reference() -> tuple[dict[str, torch.Tensor], Targets, dict[str, Any]]:
    with np.load(FOLDER / "loss.npz") as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays}
    targets = [tensors[f"mask_labels_{i}"] for i in range(2)], [tensors[f"class_labels_{i}"] for i in range(2)]
    return tensors, targets, json.loads((FOLDER / "loss.json").read_text())


def test_within_two_deviations_of_the_original() -> None:
    tensors, (masks, classes), statistics = reference()
    logits, queries = tensors["masks_queries_logits"], tensors["class_queries_logits"]
    auxiliary = [{"masks_queries_logits": 0.5 * logits, "class_queries_logits": 0.5 * queries}]
    loss = loss_of(queries.shape[-1] - 1, train_num_points=statistics["num_points"])
    drawn: dict[str, list[float]] = {}
    for seed in range(10):
        torch.manual_seed(seed)
        for name, value in loss(logits, queries, masks, classes, auxiliary).items():
            drawn.setdefault(name, []).append(float(value))
    assert set(drawn) == set(statistics["losses"])
    for name, theirs in statistics["losses"].items():
        assert abs(np.mean(drawn[name]) - theirs["mean"]) <= 2 * theirs["std"], name
        for value in drawn[name]:
            assert abs(value - theirs["mean"]) <= 5 * theirs["std"], name


def predictions(
    batch: int, queries: int, classes: int, layers: int, size: tuple[int, int] = (24, 32)
) -> list[dict[str, torch.Tensor]]:
    """Smooth masks of both signs, so that nearby points have similar values."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(layers):
        coarse = 4 * torch.randn(batch, queries, 6, 8, generator=generator)
        masks = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
        found.append(
            {
                "masks_queries_logits": masks.requires_grad_(),
                "class_queries_logits": torch.randn(batch, queries, classes + 1, generator=generator).requires_grad_(),
            }
        )
    return found


def segment_maps(counts: list[int], size: tuple[int, int] = (48, 64)) -> tuple[list[torch.Tensor], Targets]:
    """Maps of segment ids with some void (-1), and the same as binary masks."""
    generator = torch.Generator().manual_seed(6)
    maps, masks, classes = [], [], []
    for count in counts:
        coarse = torch.randint(-1, max(count, 1), (1, 1, 7, 9), generator=generator).float()
        ids = torch.nn.functional.interpolate(coarse, size=size, mode="nearest")[0, 0].to(torch.int32)
        ids = torch.full_like(ids, -1) if count == 0 else ids
        maps.append(ids)
        masks.append(torch.stack([ids == index for index in range(count)]) if count else torch.zeros(0, *size))
        classes.append(torch.randint(0, 5, (count,), generator=generator))
    return maps, (masks, classes)


def same_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every set of P points is the same, so that order and batching do not matter."""

    def rand(count: int, points: int, two: int, **_: Any) -> torch.Tensor:
        generator = np.random.default_rng(points)
        return torch.from_numpy(generator.random((points, two), dtype=np.float32))[None].repeat(count, 1, 1)

    monkeypatch.setattr(torch, "rand", rand)


# transformers' matcher takes the weights of its configuration as costs.
DISTINCT = {"class_cost": 1.5, "mask_cost": 6.0, "dice_cost": 0.4, "class_weight": 0.7, "mask_weight": 2.5,
            "dice_weight": 9.0, "oversample_ratio": 2.0, "importance_sample_ratio": 0.6}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, DISTINCT], ids=["defaults", "distinct"])
@pytest.mark.parametrize("counts", [[3, 5], [1, 4, 2], [7], [30, 2]])
def test_equals_the_loss_of_transformers_at_the_same_points(
    counts: list[int], changes: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients for the last layer and every auxiliary one; also with more masks than queries."""
    same_points(monkeypatch)
    ours = loss_of(5, train_num_points=500, **changes)
    config = ours.config
    weights = {"loss_cross_entropy": config.class_weight, "loss_mask": config.mask_weight,
               "loss_dice": config.dice_weight}  # fmt: skip
    their_config = Mask2FormerConfig(
        num_labels=5, train_num_points=500, class_weight=config.class_cost, mask_weight=config.mask_cost,
        dice_weight=config.dice_cost, oversample_ratio=config.oversample_ratio,
        importance_sample_ratio=config.importance_sample_ratio,
    )  # fmt: skip
    theirs = Mask2FormerLoss(their_config, weights)
    *auxiliary, last = predictions(len(counts), 12, 5, layers=3)
    other = [copy.deepcopy({k: v.detach() for k, v in item.items()}) for item in (*auxiliary, last)]
    for item in other:
        for tensor in item.values():
            tensor.requires_grad_()
    _, (masks, classes) = segment_maps(counts)
    got = ours(last["masks_queries_logits"], last["class_queries_logits"], masks, classes, auxiliary)
    floats = [mask.float() for mask in masks]
    expected = theirs(other[-1]["masks_queries_logits"], other[-1]["class_queries_logits"], floats, classes, other[:-1])
    names = {"loss_ce": "loss_cross_entropy", "loss_mask": "loss_mask", "loss_dice": "loss_dice"}
    assert len(got) == len(expected) == 9
    for name, value in got.items():
        base, _, index = name.rpartition("_") if name[-1].isdigit() else (name, "", "")
        their_name = names[base] + (f"_{index}" if index else "")
        torch.testing.assert_close(value, weights[names[base]] * expected[their_name], rtol=2e-5, atol=2e-6, msg=name)
    sum(got.values()).backward()  # type: ignore[union-attr]
    sum(weights[name.rstrip("_0123456789")] * value for name, value in expected.items()).backward()
    for our_item, their_item in zip((*auxiliary, last), other, strict=True):
        for key in our_item:
            torch.testing.assert_close(our_item[key].grad, their_item[key].grad, rtol=1e-3, atol=1e-6)


def cheapest(
    mask_logits: torch.Tensor, class_logits: torch.Tensor, masks: torch.Tensor, classes: torch.Tensor, loss: FaiM2FLoss
) -> dict[int, int]:
    """The segment of each matched query of an image, by the definition of the costs, in float64."""
    config = loss.config
    points = draw_points(config.train_num_points, torch.device("cpu")).double().numpy()

    def sampled(maps: torch.Tensor) -> np.ndarray:
        height, width = maps.shape[1:]
        where = [points[:, 1] * height - 0.5, points[:, 0] * width - 0.5]
        values = maps.detach().double().numpy()
        return np.stack([map_coordinates(each, where, order=1, mode="grid-constant") for each in values])

    logits, wanted = sampled(mask_logits)[:, None], sampled(masks)[None]  # (Q, 1, P) and (1, n, P)
    scores = class_logits.detach().double().numpy()
    exponents = np.exp(scores)
    chances = 1 / (1 + np.exp(-scores)) if config.cls_sigmoid else exponents / exponents.sum(-1, keepdims=True)
    shares = 1 / (1 + np.exp(-logits))
    cross = -(wanted * np.log(shares) + (1 - wanted) * np.log(1 - shares)).mean(-1)
    dice = 1 - (2 * (shares * wanted).sum(-1) + 1) / (shares.sum(-1) + wanted.sum(-1) + 1)
    costs = config.mask_cost * cross + config.dice_cost * dice - config.class_cost * chances[:, classes.numpy()]
    return dict(zip(*(side.tolist() for side in linear_sum_assignment(costs)), strict=True))


@pytest.mark.parametrize("cls_sigmoid", [False, True])
def test_matching_has_the_least_cost(cls_sigmoid: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With masks that are weak beside the classes, whose logits differ much between queries."""
    same_points(monkeypatch)
    counts = [4, 3, 6]
    maps, (masks, classes) = segment_maps(counts)
    layers = predictions(3, 12, 5, layers=4)
    loss = loss_of(5, cls_sigmoid=cls_sigmoid, train_num_points=200, class_cost=9.0, mask_cost=0.3, dice_cost=2.0)
    mask_logits = [item["masks_queries_logits"].detach() for item in layers]
    class_logits = torch.stack([3 * item["class_queries_logits"].detach() for item in layers])
    targets = SegmentTargets(maps, classes, 5, 3, torch.device("cpu"))
    for layer, (image, query, segment) in enumerate(loss._match(mask_logits, class_logits, targets)):
        for i, (mask, labels) in enumerate(zip(masks, classes, strict=True)):
            found = dict(zip(query[image == i].tolist(), segment[image == i].tolist(), strict=True))
            assert found == cheapest(mask_logits[layer][i], class_logits[layer, i], mask, labels, loss)


@pytest.mark.parametrize("counts", [[3, 5], [30, 2]])
def test_class_weights_are_those_of_the_cross_entropy(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' loss has no such setting, but a vector that contains the weight of "no object"."""
    same_points(monkeypatch)
    label_weights = [0.2, 3.0, 1.0, 0.7, 9.0]
    theirs = Mask2FormerLoss(Mask2FormerConfig(num_labels=5, train_num_points=500), {})
    theirs.empty_weight[:-1] = torch.tensor(label_weights)
    (last,) = predictions(len(counts), 12, 5, layers=1)
    _, (masks, classes) = segment_maps(counts)
    inputs = (last["masks_queries_logits"], last["class_queries_logits"], masks, classes)
    weighted = loss_of(5, train_num_points=500, label_weights=label_weights)(*inputs)
    expected = theirs(*inputs[:2], [mask.float() for mask in masks], classes)
    torch.testing.assert_close(weighted["loss_ce"], 2 * expected["loss_cross_entropy"], rtol=2e-5, atol=2e-6)
    plain = loss_of(5, train_num_points=500)(*inputs)
    assert plain["loss_ce"].item() != pytest.approx(weighted["loss_ce"].item(), rel=0.01)
    assert (plain["loss_mask"], plain["loss_dice"]) == (weighted["loss_mask"], weighted["loss_dice"])
    ones = loss_of(5, train_num_points=500, label_weights=[1.0] * 5)(*inputs)
    assert ones["loss_ce"] == plain["loss_ce"]


def test_class_weights_with_sigmoids_weigh_each_query_as_its_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with the sum over queries, computed one at a time."""
    same_points(monkeypatch)
    label_weights = [0.2, 3.0, 1.0, 0.7, 9.0]
    (last,) = predictions(1, 6, 5, layers=1)
    _, (masks, classes) = segment_maps([3])
    loss = loss_of(5, cls_sigmoid=True, train_num_points=500, label_weights=label_weights)
    found = loss(last["masks_queries_logits"], last["class_queries_logits"], masks, classes)["loss_ce"]
    matched = cheapest(last["masks_queries_logits"][0], last["class_queries_logits"][0], masks[0], classes[0], loss)
    of_query = {query: int(classes[0][segment]) for query, segment in matched.items()}
    expected = 0.0
    for index, logits in enumerate(last["class_queries_logits"][0].detach()):
        target = torch.zeros(5)
        weight = 1.0
        if index in of_query:
            target[of_query[index]] = 1
            weight = label_weights[of_query[index]]
        chances = logits[:5].double().sigmoid()
        expected += weight * float(-(target * chances.log() + (1 - target) * (1 - chances).log()).sum())
    assert len(of_query) == 3 and found.item() == pytest.approx(2 * expected / 3, rel=1e-5)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 0.0], [1.0, float("inf"), 1.0], ["a", 1.0, 1.0], 2.0])
def test_class_weights_are_a_number_for_each_class(weights: Any) -> None:
    with pytest.raises(ValueError, match="`label_weights` must be 3 numbers above 0, one for each class, or None"):
        FaiM2FConfig(num_labels=3, label_weights=weights)


def test_new_labels_have_no_class_weights() -> None:
    config = FaiM2FConfig(num_labels=3, label_weights=[1, 2, 3])
    assert FaiM2FConfig.from_dict(config.to_dict()).label_weights == [1.0, 2.0, 3.0]
    assert FaiM2FConfig.from_dict(config.to_dict(), num_labels=2).label_weights is None
    assert FaiM2FConfig.from_dict(config.to_dict(), num_labels=2, label_weights=[4, 5]).label_weights == [4.0, 5.0]
    both = FaiM2FConfig(num_labels=3, label_weights=[1, 2, 3], label_ids_to_fuse=[2])
    for changed in (FaiM2FConfig.from_dict(both.to_dict(), num_labels=2), FaiM2FConfig.from_dict(both.to_dict())):
        changed.num_labels = 2
        assert changed.label_weights is None and changed.label_ids_to_fuse == []
    config.id2label = {0: "a", 1: "b"}
    assert config.label_weights is None and "label_weights" not in FaiM2FConfig(num_labels=2).to_diff_dict()


@pytest.mark.parametrize("counts", [[3, 5], [0, 4], [40, 1]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_a_map_of_ids_gives_what_its_binary_masks_give(counts: list[int], dtype: torch.dtype) -> None:
    maps, (masks, classes) = segment_maps(counts)
    *auxiliary, last = predictions(len(counts), 12, 5, layers=2)
    loss = loss_of(5, train_num_points=500)
    results = []
    for targets in (masks, [ids.to(dtype) for ids in maps]):
        torch.manual_seed(3)
        results.append(loss(last["masks_queries_logits"], last["class_queries_logits"], targets, classes, auxiliary))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("num_points", [50, 2000])
@pytest.mark.parametrize("counts", [[3, 5], [0, 4], [30, 1], [0, 0]])
def test_masks_that_are_not_multiplied_out_give_the_same(counts: list[int], num_points: int) -> None:
    """Values and gradients with respect to embeddings and features, with more pixels than points and with fewer."""
    maps, (_, classes) = segment_maps(counts)
    generator = torch.Generator().manual_seed(8)
    features = torch.randn(2, 7, 24, 32, generator=generator).requires_grad_()
    embeddings = [torch.randn(2, 12, 7, generator=generator).requires_grad_() for _ in range(3)]
    logits = [torch.randn(2, 12, 6, generator=generator) for _ in range(3)]
    loss = loss_of(5, train_num_points=num_points)
    results, gradients = [], []
    for whole in (True, False):
        products = [MaskProduct(embedding, features) for embedding in embeddings]
        masks = [product.full() if whole else product for product in products]
        *auxiliary, last = [
            {"masks_queries_logits": mask, "class_queries_logits": classes_of}
            for mask, classes_of in zip(masks, logits, strict=True)
        ]
        torch.manual_seed(4)
        found = loss(last["masks_queries_logits"], last["class_queries_logits"], maps, classes, auxiliary)
        results.append(found)
        gradients.append(torch.autograd.grad(torch.stack(list(found.values())).sum(), [features, *embeddings]))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-6, msg=name)
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


def test_points_of_targets_are_those_of_grid_sample() -> None:
    """Including borders and points outside: the corners are gathered explicitly."""
    maps, (masks, classes) = segment_maps([4, 3], size=(9, 13))
    points = torch.rand(2, 400, 2) * 1.2 - 0.1
    for mask_labels in (masks, maps):
        targets = SegmentTargets(mask_labels, classes, 5, 2, torch.device("cpu"))
        for image, mask in enumerate(masks):
            expected = sample_points(mask.float()[None], points[image : image + 1])[0]
            torch.testing.assert_close(targets.sample_all(image, points[image]), expected, rtol=0, atol=1e-5)
            rows = targets.rows_of(torch.full((len(mask),), image), torch.arange(len(mask)))
            torch.testing.assert_close(targets.sample_batch(points[image])[rows], expected, rtol=0, atol=1e-5)


def test_uncertain_points_are_where_the_mask_is_least_sure() -> None:
    ramp = torch.linspace(-10, 10, 64).expand(2, 64, 64).contiguous()
    ramp[1] += 5  # shifts its zero by a quarter of the width to the left
    candidates = draw_points(1200, torch.device("cpu"))
    assert candidates.shape == (1200, 2) and float(candidates.min()) >= 0 and float(candidates.max()) <= 1
    chosen = most_uncertain(ramp, candidates, 300)
    assert chosen.shape == (2, 300) and all(len(set(row.tolist())) == 300 for row in chosen)
    for row, zero in zip(chosen, (0.5, 0.25), strict=True):
        distance = (candidates[:, 0] - zero).abs()
        # Almost all: at the border, where grid_sample fades to 0, a few other points seem uncertain, too.
        assert int((distance[row] <= distance.sort().values[299] + 0.01).sum()) >= 295


def test_points_are_uniform() -> None:
    points = draw_points(40000, torch.device("cpu"))
    counts = torch.histogramdd(points.double(), bins=[4, 4], range=[0.0, 1.0, 0.0, 1.0]).hist
    assert float((counts - 2500).abs().max()) < 250


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("counts", [[0, 0], [1, 0], [60, 3]])
def test_odd_numbers_of_masks_train(counts: list[int], compact: bool, sigmoid: bool) -> None:
    maps, (masks, classes) = segment_maps(counts)
    model = small_model(cls_sigmoid=sigmoid).train()
    output = model(torch.randn(2, 3, 48, 64), mask_labels=maps if compact else masks, class_labels=classes)
    output.loss.backward()
    assert output.loss.isfinite() and len(output.loss_dict) == 3 * 5
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_no_segment_and_no_weight_of_no_object_is_no_loss() -> None:
    maps, (_, classes) = segment_maps([0, 0])
    *_, last = predictions(2, 6, 5, layers=1)
    loss = loss_of(5, no_object_weight=0.0, train_num_points=50)
    found = loss(last["masks_queries_logits"], last["class_queries_logits"], maps, classes)
    assert {name: value.item() for name, value in found.items()} == {"loss_ce": 0.0, "loss_mask": 0.0, "loss_dice": 0.0}


def test_masks_smaller_than_a_pixel_of_the_grid_train() -> None:
    masks = torch.zeros(3, 64, 64)
    masks[0, 5, 7] = 1
    masks[1, 63, 63] = 1  # one mask is empty
    model = small_model().train()
    loss = model(torch.randn(1, 3, 64, 64), mask_labels=[masks], class_labels=[torch.tensor([0, 1, 2])]).loss
    loss.backward()
    assert loss.isfinite()


def test_a_diverged_prediction_does_not_stop_the_matching() -> None:
    *_, last = predictions(1, 6, 5, layers=1)
    logits = last["masks_queries_logits"].detach().clone()
    logits[:, 2] = float("nan")
    maps, (_, classes) = segment_maps([3])
    matched = loss_of(5, train_num_points=100)._match(
        [logits], last["class_queries_logits"].detach()[None],
        SegmentTargets(maps, classes, 5, 1, logits.device),
    )  # fmt: skip
    assert 2 not in matched[0][1].tolist() and len(matched[0][1]) == 3


def test_sigmoid_classification_is_the_original_s_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """One-hot binary cross-entropy, summed over all queries and classes, per segment."""
    same_points(monkeypatch)
    maps, (masks, classes) = segment_maps([3, 2])
    *_, last = predictions(2, 6, 5, layers=1)
    loss = loss_of(5, cls_sigmoid=True, train_num_points=200)
    got = loss(last["masks_queries_logits"], last["class_queries_logits"], maps, classes)["loss_ce"]
    one_hot = torch.zeros(2, 6, 5)
    for i, (mask, labels) in enumerate(zip(masks, classes, strict=True)):
        matched = cheapest(last["masks_queries_logits"][i], last["class_queries_logits"][i], mask, labels, loss)
        for query, segment in matched.items():
            one_hot[i, query, labels[segment]] = 1
    chances = last["class_queries_logits"][..., :-1].sigmoid()
    expected = -(one_hot * chances.log() + (1 - one_hot) * (1 - chances).log()).sum() / 5
    torch.testing.assert_close(got, 2 * expected, rtol=1e-4, atol=1e-5)


def test_two_images_apart_add_up_to_both_together() -> None:
    """Required for gradient accumulation: with the global number of masks, the mask losses of the parts add up."""
    maps, (_, classes) = segment_maps([3, 5])
    *_, last = predictions(2, 12, 5, layers=1)
    loss = loss_of(5, train_num_points=20000)  # so many points that sampling noise is small
    masks, queries = last["masks_queries_logits"], last["class_queries_logits"]
    whole = loss(masks, queries, maps, classes)
    parts = [loss(masks[i : i + 1], queries[i : i + 1], maps[i : i + 1], classes[i : i + 1], None, 8) for i in (0, 1)]
    for name in ("loss_mask", "loss_dice"):
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name], rtol=0.02, atol=0)


ONE_IMAGE = """
import sys
import torch
from hf_faim2f import FaiM2FConfig
from hf_faim2f.model import loss_faim2f
from tests.support.train_in_processes import fixed_points
loss_faim2f.draw_points = fixed_points
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
loss = loss_faim2f.FaiM2FLoss(FaiM2FConfig(num_labels=5, train_num_points=300, cls_sigmoid=True))
found = loss(*(values[rank : rank + 1] for values in torch.load(sys.argv[1])))
torch.save(found, f"{sys.argv[1]}.{rank}")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.newest_only
@pytest.mark.slow
@pytest.mark.parametrize("counts", [[1, 6], [0, 5]])
def test_processes_divide_by_the_mean_number_of_their_masks(
    counts: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Averaged gradients are then those of the whole batch, divided by all masks, however they are spread."""
    monkeypatch.setattr(loss_faim2f, "draw_points", fixed_points)
    maps, (_, classes) = segment_maps(counts)
    (last,) = predictions(2, 12, 5, layers=1)
    inputs = (last["masks_queries_logits"].detach(), last["class_queries_logits"].detach(), maps, classes)
    whole = loss_of(5, train_num_points=300, cls_sigmoid=True)(*inputs)
    torch.save(inputs, tmp_path / "batch")
    for process in forks.run_together(ONE_IMAGE, tmp_path / "batch"):
        assert process.returncode == 0, process.error
    parts = [torch.load(tmp_path / f"batch.{rank}") for rank in (0, 1)]
    for name, value in whole.items():
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda masks, classes: (masks[:1], classes), "one entry per image: 2 images, 1 mask_labels"),
        (lambda masks, classes: ([masks[0].float().argmax(0).float(), masks[1]], classes), r"mask_labels\[0\] must be"),
        (
            lambda masks, classes: ([masks[0], masks[1].numpy()], classes),
            r"mask_labels\[1\] is a ndarray, not a tensor",
        ),
        (
            lambda masks, classes: (masks, [classes[0].tolist(), classes[1]]),
            r"class_labels\[0\] is a list, not a tensor",
        ),
        (lambda masks, classes: (masks, [classes[0], classes[1][:, None]]), r"class_labels\[1\] must be of shape"),
        (lambda masks, classes: (masks, [classes[0], classes[1] + 9]), r"class_labels\[1\] has ids outside of 0..4"),
        (
            lambda masks, classes: (masks, [classes[0], classes[1] + 0.5]),
            r"class_labels\[1\] must be of an integer type",
        ),
        (lambda masks, classes: ([masks[0], masks[1] * 255], classes), r"mask_labels\[1\] has values from 0 to 255"),
        (lambda masks, classes: ([masks[0] * -1.0, masks[1]], classes), r"mask_labels\[0\] has values from -1 to -?0"),
        (
            lambda masks, classes: ([masks[0], masks[1] * torch.tensor(float("nan"))], classes),
            r"mask_labels\[1\] has values from nan to nan",
        ),
        (lambda masks, classes: ([masks[0], masks[1][0]], classes), r"mask_labels\[1\] must be .* torch.bool"),
        (
            lambda masks, classes: ([masks[0], masks[1].int().argmax(0) * 2], classes),
            r"mask_labels\[1\] is a map of segment ids and has \[6, 8\], but class_labels\[1\] names 5 segments",
        ),
    ],
)
def test_targets_that_do_not_fit_are_named(change: Callable[..., Targets], sentence: str) -> None:
    _, (masks, classes) = segment_maps([3, 5])
    *_, last = predictions(2, 12, 5, layers=1)
    with pytest.raises(ValueError, match=sentence):
        loss_of(5)(last["masks_queries_logits"], last["class_queries_logits"], *change(masks, classes))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64, torch.float16, torch.bool])
def test_masks_of_any_type_are_the_same_masks(dtype: torch.dtype) -> None:
    _, (masks, classes) = segment_maps([3, 0, 2])
    *_, last = predictions(3, 12, 5, layers=1)
    losses = []
    for targets in (masks, [mask.to(dtype) for mask in masks]):
        torch.manual_seed(3)
        losses.append(
            loss_of(5, train_num_points=200)(
                last["masks_queries_logits"], last["class_queries_logits"], targets, classes
            )
        )
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16])
def test_pixels_of_no_segment_may_have_the_ignored_value(dtype: torch.dtype) -> None:
    maps, (_, classes) = segment_maps([3, 5])
    *_, last = predictions(2, 12, 5, layers=1)
    losses = []
    for void in (-1, 77):
        torch.manual_seed(3)
        targets = [torch.where(ids < 0, void, ids) for ids in maps]
        targets = targets if void < 0 else [ids.to(dtype) for ids in targets]
        loss = loss_of(5, train_num_points=200, ignore_value=77)
        losses.append(loss(last["masks_queries_logits"], last["class_queries_logits"], targets, classes))
    assert losses[0] == losses[1]


def test_an_id_of_a_segment_is_no_ignored_value() -> None:
    """Segments count from 0, so any number of them may be in an image; a map that counts from 1 is refused."""
    maps, (_, classes) = segment_maps([3, 5])
    *_, last = predictions(2, 12, 5, layers=1)
    losses = []
    for ignored in (255, 0, 1):
        torch.manual_seed(3)
        loss = loss_of(5, train_num_points=200, ignore_value=ignored)
        losses.append(loss(last["masks_queries_logits"], last["class_queries_logits"], maps, classes))
    assert losses[0] == losses[1] == losses[2]
    loss = loss_of(5, ignore_value=0)
    with pytest.raises(ValueError, match=r"has \[3\], but class_labels\[0\] names 3 segments, whose ids count from 0"):
        loss(last["masks_queries_logits"], last["class_queries_logits"], [ids + 1 for ids in maps], classes)


def test_an_ignored_value_beyond_a_byte_is_no_other_id() -> None:
    """In a uint8 tensor, torch treats -1 as 255."""
    *_, last = predictions(2, 12, 5, layers=1)
    ids = torch.zeros(2, 16, 16, dtype=torch.uint8)
    ids[:, :4] = 255
    loss = loss_of(5, ignore_value=-1)
    with pytest.raises(ValueError, match=r"mask_labels\[0\] is a map of segment ids and has \[255\]"):
        loss(last["masks_queries_logits"], last["class_queries_logits"], list(ids), [torch.tensor([1])] * 2)


def test_a_soft_mask_is_learned_as_probabilities() -> None:
    """The cross-entropy at logit 0 is log 2 for any target; its gradient is 1/2 minus the target."""
    logits = torch.zeros(1, 1, 8, 8, requires_grad=True)
    soft = torch.full((1, 8, 8), 0.25)
    loss = loss_of(5, train_num_points=4000, mask_weight=1.0, importance_sample_ratio=0.0)  # only uniform points
    found = loss(logits, torch.zeros(1, 1, 6), [soft], [torch.tensor([2])])["loss_mask"]
    assert float(found.detach()) == pytest.approx(np.log(2), rel=1e-5)
    (gradient,) = torch.autograd.grad(found, logits)
    inner = gradient[0, 0, 2:-2, 2:-2].mean() * 64  # near the border, sampling fades to 0
    assert float(inner) == pytest.approx(0.5 - 0.25, rel=0.1)


@pytest.mark.parametrize("compact", [False, True])
def test_checking_the_targets_waits_for_the_device_once(compact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    maps, (masks, classes) = segment_maps([3, 5, 2])
    looks: list[str] = []

    def counted(name: str) -> Callable[[torch.Tensor], Any]:
        own = getattr(torch.Tensor, name)

        def look(tensor: torch.Tensor) -> Any:
            looks.append(name)
            return own(tensor)

        return look

    for name in ("__bool__", "__int__", "__float__", "item", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    SegmentTargets(maps if compact else masks, classes, 5, 3, torch.device("cpu"))
    assert looks == ["__bool__"]
