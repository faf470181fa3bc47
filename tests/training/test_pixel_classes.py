"""The distribution of classes at pixels, compared with a dense computation in float64."""

import math

import pytest
import torch
from torch import Tensor, nn

from hf_faim2f.model.point_sampling_faim2f import MaskProduct, SegmentTargets
from hf_faim2f.training.pixel_classes import (
    classes_of_segments,
    pixel_class_loss,
    pixel_coverage,
    pixel_log_probabilities,
)


def centers(height: int, width: int) -> Tensor:
    """The centers of all pixels (height * width, 2), where sampling returns the pixels' values."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([(x + 0.5) / width, (y + 0.5) / height], -1).flatten(0, 1)


def dense(masks: Tensor, class_logits: Tensor, cls_sigmoid: bool) -> Tensor:
    """By definition: every product of query, class and pixel, in float64."""
    classes = class_logits.double()
    classes = (classes.sigmoid() if cls_sigmoid else classes.softmax(-1))[..., :-1]
    scores = (classes[..., None] * masks.double().flatten(2).sigmoid()[:, :, None]).sum(1)  # (B, C, P)
    return (scores / scores.sum(1, keepdim=True)).log()


@pytest.mark.parametrize("cls_sigmoid", [False, True])
@pytest.mark.parametrize("factored", [False, True])
def test_values_and_gradients_are_the_dense_ones(cls_sigmoid: bool, factored: bool) -> None:
    torch.manual_seed(0)
    embedding, features = 3 * torch.randn(2, 7, 4), torch.randn(2, 4, 5, 6)
    class_logits = 3 * torch.randn(2, 7, 4)
    inputs = [value.requires_grad_() for value in (embedding, features, class_logits)]
    product = MaskProduct(embedding, features)
    points = centers(5, 6)
    found = pixel_log_probabilities(product if factored else product.full(), class_logits, points,
                                    cls_sigmoid=cls_sigmoid)  # fmt: skip
    wanted = dense(product.full(), class_logits, cls_sigmoid)
    assert found.shape == (2, 3, 30)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)

    target = torch.rand(2, 3, 30).softmax(1)
    gradients = torch.autograd.grad(pixel_class_loss(found, target), inputs)
    expected = torch.autograd.grad(-(target * wanted).sum() / 60, inputs)
    for gradient, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cls_sigmoid", [False, True])
def test_coverage_is_that_of_the_most_confident_query(cls_sigmoid: bool) -> None:
    """Query by query; half of the queries are "no object" or of no class, and no query covers some pixels."""
    torch.manual_seed(0)
    masks, class_logits = 4 * torch.randn(2, 6, 5, 6) - 2, 2 * torch.randn(2, 6, 4)
    class_logits[:, 3:] += torch.tensor([-6.0, -6.0, -6.0, 3.0])
    found = pixel_coverage(masks, class_logits, centers(5, 6), cls_sigmoid=cls_sigmoid)
    expected = torch.zeros(2, 30, dtype=torch.float64)
    for image in range(2):
        for query in range(6):
            logits = class_logits[image, query].tolist()
            if cls_sigmoid:
                confidence = max(1 / (1 + math.exp(-value)) for value in logits[:-1])
            else:
                exponents = [math.exp(value) for value in logits]
                confidence = sum(exponents[:-1]) / sum(exponents)
            for pixel, value in enumerate(masks[image, query].flatten().tolist()):
                expected[image, pixel] = max(float(expected[image, pixel]), confidence / (1 + math.exp(-value)))
    assert expected.min() < 0.1 < 0.9 < expected.max()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_few_points_of_a_product_are_its_masks_sampled() -> None:
    torch.manual_seed(0)
    product, class_logits = MaskProduct(torch.randn(1, 5, 4), torch.randn(1, 4, 8, 8)), torch.randn(1, 5, 4)
    points = 0.1 + 0.8 * torch.rand(9, 2)  # inside the centers of the border pixels
    grid = nn.functional.grid_sample(product.full(), 2 * points[None, None] - 1, align_corners=False)  # (1, Q, 1, P)
    found = pixel_log_probabilities(product, class_logits, points, cls_sigmoid=False)
    torch.testing.assert_close(found.double(), dense(grid, class_logits, False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls_sigmoid", [False, True])
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_extreme_logits_give_finite_losses_and_gradients(cls_sigmoid: bool, size: float) -> None:
    torch.manual_seed(0)
    masks = (size * torch.randn(2, 6, 4, 4)).requires_grad_()
    class_logits = (size * torch.randn(2, 6, 5)).requires_grad_()
    found = pixel_log_probabilities(masks, class_logits, centers(4, 4), cls_sigmoid=cls_sigmoid)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(2, 16))
    loss = pixel_class_loss(found, torch.full_like(found, 0.25))
    assert loss.isfinite()
    for gradient in torch.autograd.grad(loss, [masks, class_logits]):
        assert gradient.isfinite().all()


def test_a_class_that_no_query_is_sure_of_still_learns() -> None:
    """Its score underflows in float32, but not relative to the most confident query."""
    masks = torch.tensor([-200.0, -240.0]).view(1, 2, 1, 1).requires_grad_()
    class_logits = torch.tensor([[[60.0, -60.0, 0.0], [50.0, -60.0, 0.0]]]).requires_grad_()
    found = pixel_log_probabilities(masks, class_logits, torch.tensor([[0.5, 0.5]]), cls_sigmoid=False)
    torch.testing.assert_close(found[0, :, 0], torch.tensor([0.0, -120.0]), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(pixel_class_loss(found, torch.tensor([[[0.0], [1.0]]])), class_logits)
    assert gradient[0, 0, 1] < -0.9


def test_autocast_does_not_lower_the_precision() -> None:
    torch.manual_seed(0)
    product, class_logits = MaskProduct(torch.randn(1, 5, 4), torch.randn(1, 4, 8, 8)), torch.randn(1, 5, 4)
    points = torch.rand(9, 2)
    plain = pixel_log_probabilities(product, class_logits, points, cls_sigmoid=False)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(pixel_log_probabilities(product, class_logits, points, cls_sigmoid=False), plain)


def test_the_loss_is_torchs_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 10), torch.randint(0, 3, (2, 10))
    hard = nn.functional.one_hot(labels, 3).transpose(1, 2).float()
    weights = torch.ones(2, 10)
    weights[1, :5] = 0
    wanted = nn.functional.cross_entropy(logits, labels, reduction="none") * weights
    loss = pixel_class_loss(logits.log_softmax(1), hard, weights)
    torch.testing.assert_close(loss, wanted.mean())

    soft = torch.rand(2, 3, 10).softmax(1)
    loss = pixel_class_loss(logits.log_softmax(1), soft)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, soft))

    parts = [pixel_class_loss(logits[[image]].log_softmax(1), soft[[image]], images=2) for image in (0, 1)]
    torch.testing.assert_close(sum(parts), loss)


def test_labels_as_distributions() -> None:
    ids = torch.tensor([[0, 0, 1, -1], [2, 2, 1, -1]])
    masks = torch.zeros(2, 2, 4)
    masks[0, 0, :2] = masks[1, 0, :2] = 1  # two overlapping segments of different classes
    targets = SegmentTargets([ids, masks], [torch.tensor([2, 0, 2]), torch.tensor([1, 0])], 3, 2, torch.device("cpu"))
    probabilities, weights = classes_of_segments(targets, centers(2, 4), 3)
    assert weights.tolist() == [[1, 1, 1, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert probabilities[0, 2].tolist() == [1, 1, 0, 0, 1, 1, 0, 0]  # both segments of class 2
    assert probabilities[0, 0].tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
    assert probabilities[1, :2, 0].tolist() == [0.5, 0.5]

    between = torch.tensor([[2 / 4, 1 / 4], [3 / 4, 1 / 4]])  # two classes; a class and no segment
    probabilities, weights = classes_of_segments(targets, between, 3)
    torch.testing.assert_close(probabilities[0, :, 0], torch.tensor([0.5, 0, 0.5]))
    torch.testing.assert_close(probabilities[0, :, 1], torch.tensor([1.0, 0, 0]))
    torch.testing.assert_close(weights[0], torch.tensor([1, 0.5]))


def test_images_without_segments_have_no_weight() -> None:
    targets = SegmentTargets([torch.full((2, 2), -1)], [torch.zeros(0, dtype=torch.long)], 3, 1, torch.device("cpu"))
    probabilities, weights = classes_of_segments(targets, centers(2, 2), 3)
    assert not probabilities.any() and not weights.any()
    logits = torch.randn(1, 3, 4).log_softmax(1).requires_grad_()
    loss = pixel_class_loss(logits, probabilities, weights)
    assert loss == 0 and loss.requires_grad
