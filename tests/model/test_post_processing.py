"""Post-processing compared with transformers' Mask2Former, Focoos's recorded results, and direct computation."""

import ast
import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hf_faim2f.model import argmax_faim2f as argmax
from hf_faim2f.model import focoos_post_processing_faim2f as focoos
from hf_faim2f.model import padding_faim2f as padding
from hf_faim2f.model import post_processing_faim2f as post
from hf_faim2f.model import resize_faim2f as resize

try:  # transformers 5.x, where the other Mask2FormerImageProcessor needs torchvision
    from transformers.models.mask2former.image_processing_pil_mask2former import (
        Mask2FormerImageProcessorPil as Mask2FormerImageProcessor,
    )
except ImportError:  # transformers 4.57
    from transformers import Mask2FormerImageProcessor

REFERENCE = Path(__file__).parents[1] / "reference" / "focoos"
ROUNDING = 2e-5  # values closer than this are ties, in which either can win
SIZES = [None, (384, 384), (640, 640), (301, 203), (97, 500), (50, 60), (700, 383)]

examples = settings(max_examples=40, deadline=None)


def noise(seed: int, queries: int, classes: int, height: int, width: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Logits without structure, with some queries confident in a class."""
    generator = torch.Generator().manual_seed(seed)
    class_logits = 4 * torch.randn(batch, queries, classes + 1, generator=generator)
    return class_logits, 3 * torch.randn(batch, queries, height, width, generator=generator)


def scene(seed: int, queries: int = 30, classes: int = 9, height: int = 48, width: int = 40, batch: int = 1):
    """Logits like a model's: smooth masks, a third of the queries confident, the others mostly "no object"."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, queries, 5, 5, generator=generator)
    masks = 8 * F.interpolate(coarse, size=(height, width), mode="bicubic") - 3
    masks += 0.2 * torch.randn(masks.shape, generator=generator)
    class_logits = torch.randn(batch, queries, classes + 1, generator=generator)
    sure = torch.randint(classes, (batch, queries), generator=generator)
    sure[:, queries // 3 :] = classes
    class_logits.scatter_add_(2, sure[..., None], torch.full((batch, queries, 1), 6.0))
    return class_logits, masks


def outputs(class_logits: Tensor, mask_logits: Tensor) -> SimpleNamespace:
    return SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=mask_logits)


def targets(size: tuple[int, int] | None, batch: int = 1) -> list[tuple[int, int]] | None:
    return None if size is None else [size] * batch


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, h, w) to (n, *size), by plain interpolation."""
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def probabilities(class_logits: Tensor, cls_sigmoid: bool = False) -> Tensor:
    return (class_logits.sigmoid() if cls_sigmoid else class_logits.softmax(-1))[..., :-1]


def dense_semantic_scores(class_logits, mask_logits, size, middle=(384, 384), cls_sigmoid=False) -> Tensor:
    """(C, *size) of one image, with every value computed."""
    masks = resized(mask_logits, middle or mask_logits.shape[1:]).sigmoid()
    sums = torch.einsum("qc,qhw->chw", probabilities(class_logits, cls_sigmoid), masks)
    return resized(sums, size) if size else sums


def assert_wins(labels: Tensor, scores: Tensor) -> None:
    """Asserts that `labels` (H, W) have the largest of `scores` (C, H, W) everywhere, and equal argmax except for
    ties."""
    assert labels.shape == scores.shape[1:]
    margin = scores.amax(0) - scores.gather(0, labels[None].long())[0]
    assert margin.max() <= ROUNDING


def same_segments(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert [{**s, "score": None} for s in ours] == [{**s, "score": None} for s in theirs]
    np.testing.assert_allclose([s["score"] for s in ours], [s["score"] for s in theirs], atol=3e-6)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread for many small operations, because on a busy machine threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def peer() -> Any:
    return Mask2FormerImageProcessor()


@contextlib.contextmanager
def small_steps(band: int, step: int, tile: int) -> Iterator[None]:
    """Splits even small images into many bands, steps and tiles."""
    names = {"BAND_ELEMENTS": band, "BAND_PIXELS": band, "STEP_ELEMENTS": step, "TILE": tile}
    place = {name: argmax if name == "TILE" else resize for name in names}
    before = {name: getattr(place[name], name) for name in names}
    for name, value in names.items():
        setattr(place[name], name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(place[name], name, value)


def function_named(name: str) -> Any:
    """A post-processing function by name, from whichever module has it."""
    return next(getattr(module, name) for module in (post, focoos) if hasattr(module, name))


steps = st.builds(
    small_steps,
    band=st.sampled_from([1, 90, 400, 2**21]),
    step=st.sampled_from([50, 500, 2**19]),
    tile=st.integers(1, 5),
)
sides = st.integers(1, 24)
grids = st.tuples(sides, sides)


class TestAgainstTransformers:
    @pytest.mark.parametrize("make", [noise, scene])
    @pytest.mark.parametrize("size", SIZES)
    def test_semantic(self, peer, make, size):
        logits = make(1, 30, 9, 48, 40)
        theirs = peer.post_process_semantic_segmentation(outputs(*logits), target_sizes=targets(size))[0]
        ours = post.post_process_semantic_segmentation(*logits, targets(size))[0]
        assert ours.dtype == theirs.dtype == torch.int64
        dense = dense_semantic_scores(logits[0][0], logits[1][0], size)
        assert_wins(theirs, dense)  # our direct computation equals transformers'
        assert_wins(ours, dense)
        assert (ours != theirs).float().mean() < 1e-4
        assert ours.unique().numel() > 2

    @pytest.mark.parametrize("make", [noise, scene])
    @pytest.mark.parametrize("size", SIZES)
    def test_panoptic(self, peer, make, size):
        class_logits, mask_logits = make(2, 30, 9, 48, 40)
        for options in (
            {"label_ids_to_fuse": set(range(9))},
            {"label_ids_to_fuse": {1, 4, 5}, "threshold": 0.7, "overlap_mask_area_threshold": 0.3},
            {"label_ids_to_fuse": None, "threshold": 0.2, "mask_threshold": 0.4, "overlap_mask_area_threshold": 0.1},
        ):
            theirs = peer.post_process_panoptic_segmentation(
                outputs(class_logits, mask_logits), target_sizes=targets(size), **options
            )[0]
            ours = post.post_process_panoptic_segmentation(
                class_logits, mask_logits, target_sizes=targets(size), **options
            )[0]
            same_segments(ours["segments_info"], theirs["segments_info"])
            assert ours["segmentation"].dtype == theirs["segmentation"].dtype == torch.int32
            assert ours["segmentation"].shape == theirs["segmentation"].shape
            # in a tie, either query can own the pixel
            scores, labels = class_logits[0].softmax(-1).max(-1)
            kept = (labels != 9) & (scores > options.get("threshold", 0.5))
            products = resized(mask_logits[0, kept], (384, 384)).sigmoid()
            products = (resized(products, size) if size else products) * scores[kept, None, None]
            first, second = products.topk(2, 0).values
            assert ((ours["segmentation"] == theirs["segmentation"]) | (first - second < ROUNDING)).all()
        if make is scene:
            assert len(theirs["segments_info"]) > 2

    def test_segments_that_fuse_share_an_id(self, peer):
        labels = [0, 1, 0, 2, 1, 0]
        class_logits = 9 * F.one_hot(torch.tensor(labels), 4)[None].float()
        mask_logits = torch.full((1, 6, 12, 12), -9.0)
        for query in range(6):
            mask_logits[0, query, 2 * query : 2 * query + 2] = 9.0
        for fused in ({0}, {0, 1}, {2}):
            theirs = peer.post_process_panoptic_segmentation(
                outputs(class_logits, mask_logits), label_ids_to_fuse=fused, target_sizes=[(60, 60)]
            )[0]
            ours = post.post_process_panoptic_segmentation(
                class_logits, mask_logits, label_ids_to_fuse=fused, target_sizes=[(60, 60)]
            )[0]
            assert [segment["label_id"] for segment in theirs["segments_info"]] == labels
            same_segments(ours["segments_info"], theirs["segments_info"])
            assert torch.equal(ours["segmentation"], theirs["segmentation"])

    @pytest.mark.parametrize("make", [noise, scene])
    @pytest.mark.parametrize("size", SIZES)
    def test_instance(self, peer, make, size):
        logits = make(3, 30, 9, 48, 40)
        for options in (
            {},
            {"threshold": 0.0},
            {"threshold": 0.3, "return_binary_maps": True},
            {"threshold": 0.3, "return_coco_annotation": True},
        ):
            theirs = peer.post_process_instance_segmentation(outputs(*logits), target_sizes=targets(size), **options)[0]
            ours = post.post_process_instance_segmentation(*logits, target_sizes=targets(size), **options)[0]
            same_segments(ours["segments_info"], theirs["segments_info"])
            assert len(ours["segments_info"]) > 2
            if "return_coco_annotation" in options:
                assert ours["segmentation"] == theirs["segmentation"]
            else:
                assert ours["segmentation"].dtype == theirs["segmentation"].dtype == torch.float32
                assert torch.equal(ours["segmentation"], theirs["segmentation"])

    def test_instances_too_thin_for_the_target_are_left_out(self, peer):
        class_logits, mask_logits = noise(4, 3, 2, 384, 384)
        class_logits[..., 0] += 20
        mask_logits[:] = -9.0
        mask_logits[0, 0, ::32] = 9.0  # lines, some of which every eighth row hits
        mask_logits[0, 1, 3::32, 5::32] = 9.0  # dots, none of which it hits
        mask_logits[0, 2, 100:200] = 9.0
        theirs = peer.post_process_instance_segmentation(outputs(class_logits, mask_logits), target_sizes=[(48, 48)])[0]
        ours = post.post_process_instance_segmentation(class_logits, mask_logits, target_sizes=[(48, 48)])[0]
        assert len(theirs["segments_info"]) == 2
        same_segments(ours["segments_info"], theirs["segments_info"])
        assert torch.equal(ours["segmentation"], theirs["segmentation"])

    @pytest.mark.parametrize("size", [None, (30, 50)])
    def test_nothing_found(self, peer, size):
        class_logits, mask_logits = noise(5, 4, 3, 12, 10)
        class_logits[..., -1] = 50.0
        for name, options in (
            ("post_process_panoptic_segmentation", {"label_ids_to_fuse": set()}),
            ("post_process_instance_segmentation", {}),
            ("post_process_instance_segmentation", {"return_binary_maps": True}),
            ("post_process_instance_segmentation", {"return_coco_annotation": True}),
        ):
            theirs = getattr(peer, name)(outputs(class_logits, mask_logits), target_sizes=targets(size), **options)[0]
            ours = function_named(name)(class_logits, mask_logits, target_sizes=targets(size), **options)[0]
            assert ours["segments_info"] == theirs["segments_info"] == []
            if isinstance(theirs["segmentation"], list):
                assert ours["segmentation"] == theirs["segmentation"]
            else:
                assert ours["segmentation"].dtype == theirs["segmentation"].dtype
                assert torch.equal(ours["segmentation"], theirs["segmentation"])

    def test_scores_of_every_class(self, peer):
        logits = scene(6)
        ours = post.post_process_semantic_segmentation(*logits, [(101, 77)], return_segmentation_scores=True)[0]
        dense = dense_semantic_scores(logits[0][0], logits[1][0], (101, 77))
        torch.testing.assert_close(ours.segmentation_scores, dense, atol=ROUNDING, rtol=0)
        assert torch.equal(ours.segmentation, ours.segmentation_scores.argmax(0))
        with contextlib.suppress(TypeError):  # 4.57 does not have the argument
            theirs = peer.post_process_semantic_segmentation(
                outputs(*logits), target_sizes=[(101, 77)], return_segmentation_scores=True
            )[0]
            torch.testing.assert_close(ours.segmentation_scores, theirs.segmentation_scores, atol=ROUNDING, rtol=0)


class TestAgainstPlainArithmetic:
    @pytest.mark.parametrize("queries", [2, 4])
    def test_as_many_queries_as_classes(self, queries: int) -> None:
        """With equal numbers, the shapes of summed and unsummed scores are the same."""
        for seed in range(5):
            class_logits, mask_logits = noise(seed, queries, queries, 12, 9)
            ours = post.post_process_semantic_segmentation(
                class_logits, mask_logits, [(20, 31)], intermediate_size=None
            )
            assert_wins(ours[0], dense_semantic_scores(class_logits[0], mask_logits[0], (20, 31), None))

    @examples
    @given(
        st.integers(0, 999), grids, grids, st.none() | grids, st.integers(1, 9), st.integers(1, 30), steps, st.data()
    )
    def test_semantic(self, seed, grid, size, middle, queries, classes, how, data):
        make = data.draw(st.sampled_from([noise, scene]))
        cls_sigmoid = data.draw(st.booleans())
        class_logits, mask_logits = make(seed, queries, classes, *grid)
        with how:
            ours = post.post_process_semantic_segmentation(
                class_logits, mask_logits, [size], cls_sigmoid=cls_sigmoid, intermediate_size=middle
            )[0]
            scored = post.post_process_semantic_segmentation(
                class_logits,
                mask_logits,
                [size],
                cls_sigmoid=cls_sigmoid,
                intermediate_size=middle,
                return_segmentation_scores=True,
            )[0]
        dense = dense_semantic_scores(class_logits[0], mask_logits[0], size, middle, cls_sigmoid)
        torch.testing.assert_close(scored.segmentation_scores, dense, atol=ROUNDING, rtol=0)
        assert_wins(ours, dense)
        assert_wins(scored.segmentation, dense)

    @examples
    @given(st.integers(0, 999), grids, grids, grids, st.integers(1, 60), st.floats(0, 1), st.booleans(), steps)
    def test_winners_and_areas(self, seed, grid, middle, size, channels, threshold, informed, how):
        generator = torch.Generator().manual_seed(seed)
        maps = F.interpolate(torch.rand(1, channels, 3, 3, generator=generator), size=grid, mode="bilinear")[0]
        table = maps.flatten(1).t().contiguous()
        device = torch.device("cpu")
        first, second = resize.bilinear_resize(grid, middle, device), resize.bilinear_resize(middle, size, device)
        dense = resized(resized(maps, middle), size)
        with how:
            settled = argmax.settle(argmax.tiles_of(table, grid), first, 1e-6, threshold) if informed else None
            winners, areas = argmax.resized_argmax(
                lambda y, x: first.pixels(table, y, x), second, torch.arange(channels), settled, threshold
            )
        assert_wins(winners, dense)
        doubtful = ((dense - threshold).abs() < ROUNDING).sum((1, 2))
        assert ((areas - (dense >= threshold).sum((1, 2))).abs() <= doubtful).all()

    @examples
    @given(st.integers(0, 999), grids, grids, grids, st.integers(1, 40), st.integers(0, 6), st.booleans(), steps)
    def test_winners_with_shortlists(self, seed, grid, middle, size, channels, power, twins, how):
        generator = torch.Generator().manual_seed(seed)
        maps = F.interpolate(torch.rand(1, channels, 3, 3, generator=generator), size=grid, mode="bilinear")[0]
        maps *= torch.rand(channels, 1, 1, generator=generator) ** power  # from many strong channels to a few
        if twins:
            maps = torch.cat([maps, maps])[torch.randperm(2 * channels, generator=generator)]
        table, device = maps.flatten(1).t().contiguous(), torch.device("cpu")
        first, second = resize.bilinear_resize(grid, middle, device), resize.bilinear_resize(middle, size, device)
        with how, pytest.MonkeyPatch.context() as patch:
            patch.setattr(argmax, "SHORTEST", 2)
            tiles = argmax.tiles_of(table, grid)
            shorter = argmax.shortlists(table, tiles, lambda t: partial(first.pixels, t), 1e-6)
            settled = argmax.settle(tiles, first, 1e-6)
            values, classes = partial(first.pixels, table), torch.arange(len(maps))
            winners, _ = argmax.resized_argmax(values, second, classes, settled, shorter=shorter)
            expected, _ = argmax.resized_argmax(values, second, classes, settled)
        assert_wins(winners, resized(resized(maps, middle), size))
        assert torch.equal(winners, expected)  # of equal channels, the first one

    def test_a_shortlist_is_too_short_if_in_doubt(self):
        shortlist = argmax.Shortlist(torch.tensor([2, 5]), lambda y, x: torch.empty(0), 0.1)
        assert shortlist.winners(torch.tensor([[0.3, 0.6, 0.45], [0.8, 0.6, 0.1]])).tolist() == [5, 2]
        for rest in (0.55, 0.6, 0.7, torch.nan):  # the first is below by less than the rounding error
            assert shortlist.winners(torch.tensor([[0.8, 0.6, 0.1], [0.3, 0.6, rest]])) is None

    def test_a_channel_that_wins_only_between_grid_points(self, monkeypatch):
        monkeypatch.setattr(argmax, "SHORTEST", 2)
        maps = torch.zeros(30, 8, 8)
        maps[0, :, :4] = maps[1, :, 4:] = 1
        maps[2] = 0.7
        table, lengths, device = maps.flatten(1).t().contiguous(), [], torch.device("cpu")
        first, second = resize.bilinear_resize((8, 8), (8, 8), device), resize.bilinear_resize((8, 8), (80, 80), device)

        def values_of(columns):
            lengths.append(columns.shape[1])
            return partial(first.pixels, columns)

        shorter = argmax.shortlists(table, argmax.tiles_of(table, (8, 8)), values_of, 1e-6)
        winners, _ = argmax.resized_argmax(partial(first.pixels, table), second, torch.arange(30), shorter=shorter)
        assert torch.equal(winners, resized(maps, (80, 80)).argmax(0)) and (winners == 2).any()
        assert lengths == [3, 5]  # channels 0 and 1, then channel 2 and one more; each with the bound of the others

    @examples
    @given(st.integers(0, 999), st.integers(1, 40), st.integers(1, 40), grids, steps)
    def test_resizing_is_torch_s(self, seed, height, width, size, how):
        maps = torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))
        bilinear = resize.BilinearResize((height, width), size, torch.device("cpu"))
        table = maps.flatten(1).t().contiguous()
        expected = resized(maps, size)
        y, x = (part.flatten() for part in torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij"))
        with how:
            everything = resize.rows_of(bilinear, table, 3)(0, size[0])
            scattered = bilinear.pixels(table, y, x)
        for ours in (everything, scattered):
            torch.testing.assert_close(ours.t().view(3, *size), expected, atol=2e-6, rtol=0)

    @examples
    @given(st.integers(1, 300), st.integers(1, 300))
    def test_weights_are_torch_s_to_the_bit(self, size_in, size_out):
        axis = resize.bilinear_axis(size_in, size_out)
        ours = torch.zeros(size_in, size_out)
        position = torch.arange(size_out)
        ours.index_put_((axis.low, position), 1 - axis.weight, accumulate=True)
        ours.index_put_((axis.high, position), axis.weight, accumulate=True)
        theirs = F.interpolate(torch.eye(size_in)[None, :, None], size=(1, size_out), mode="bilinear")[0, :, 0]
        assert torch.equal(ours > 0, theirs > 0)  # which corners count affects enlarged binary masks
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)

    @examples
    @given(st.integers(0, 999), st.integers(1, 300))
    def test_codes_hold_the_winner_and_every_flag(self, seed, channels):
        generator = torch.Generator().manual_seed(seed)
        winner = torch.randint(channels, (50,), generator=generator)
        inside = torch.randint(2, (50, channels), generator=generator).float()
        codes = argmax._Codes(channels, True, torch.device("cpu"))
        first, *others = codes.write(winner, inside)
        assert torch.equal(codes.winner(first), winner)
        assert max(number.max() for number in (first, *others)) < 2**24
        read = torch.zeros(50, channels)
        for column, number in enumerate([first % codes.shift, *others]):
            held = codes.flags[:, column] > 0
            read[:, held] = number[:, None].div(codes.flags[held, column], rounding_mode="floor") % 2
        assert torch.equal(read, inside)

    @pytest.mark.parametrize("upright", [False, True])
    @pytest.mark.parametrize("middle", [13, 17, 30, 12, 9, 5, 3])
    def test_a_class_can_win_between_two_tiles_without_winning_in_either(self, middle, upright):
        """Where two confident masks meet, a weak mask that covers the image is largest only at pixels that mix both."""
        grid, size = (4, 12), (16, 6 * middle)
        class_logits = torch.full((1, 3, 4), -20.0)
        class_logits[0, torch.arange(3), torch.arange(3)] = 20
        won = 0
        for border in range(1, 11):
            masks = torch.full((3, 12), -60.0)
            masks[0, : border + 1], masks[1, border:], masks[2] = 12, 12, 2.2
            mask_logits = masks[None, :, None].repeat(1, 1, 4, 1)
            sizes = [grid, (8, middle), size]
            if upright:
                mask_logits, sizes = mask_logits.transpose(2, 3), [pair[::-1] for pair in sizes]
            found = post.post_process_semantic_segmentation(
                class_logits, mask_logits, [sizes[2]], intermediate_size=sizes[1]
            )[0]
            dense = dense_semantic_scores(class_logits[0], mask_logits[0], sizes[2], sizes[1], False)
            assert_wins(found, dense)
            won += int((dense.argmax(0) == 2).sum())
            found = focoos.evaluate_semantic(class_logits, mask_logits, sizes[1], [sizes[2]])[0]
            sums = torch.einsum("qc,qhw->chw", probabilities(class_logits[0]), mask_logits[0].sigmoid())
            assert_wins(found, resized(resized(sums, sizes[1]), sizes[2]))
        assert won or middle not in (5, 9, 13, 17)

    @examples
    @given(st.integers(0, 999), grids, grids, grids, st.integers(1, 9), st.integers(1, 30), st.booleans(), steps)
    def test_semantic_evaluation(self, seed, grid, network, size, queries, classes, cls_sigmoid, how):
        class_logits, mask_logits = scene(seed, queries, classes, *grid)
        with how:
            found = focoos.evaluate_semantic(class_logits, mask_logits, network, [size], cls_sigmoid=cls_sigmoid)[0]
        sums = torch.einsum("qc,qhw->chw", probabilities(class_logits[0], cls_sigmoid), mask_logits[0].sigmoid())
        assert_wins(found, resized(resized(sums, network), size))

    @pytest.mark.parametrize("cls_sigmoid", [False, True])
    def test_instance_evaluation(self, cls_sigmoid):
        class_logits, mask_logits = scene(5, 12, 6, 24, 20)
        found = focoos.evaluate_instances(
            class_logits, mask_logits, (48, 40), [(70, 61)], cls_sigmoid=cls_sigmoid, top_k=20
        )[0]
        shares = resized(resized(mask_logits[0].double().sigmoid(), (48, 40)), (70, 61))
        means = [float(each[each > 0.5].mean()) if (each > 0.5).any() else 0.0 for each in shares]
        chances = probabilities(class_logits[0].double(), cls_sigmoid).tolist()
        best = sorted((chances[query][label], query, label) for query in range(12) for label in range(6))[-20:]
        expected = sorted(((score * means[query], query, label) for score, query, label in best), reverse=True)
        assert found.class_ids.tolist() == [label for _, _, label in expected]
        np.testing.assert_allclose(found.scores, [score for score, _, _ in expected], atol=3e-6)
        for box, mask, (_, query, _) in zip(found.boxes.tolist(), found.masks, expected, strict=True):
            assert ((mask == (shares[query] > 0.5)) | ((shares[query] - 0.5).abs() < ROUNDING)).all()
            y, x = (places.tolist() for places in mask.nonzero(as_tuple=True))
            assert box == ([min(x), min(y), max(x) + 1, max(y) + 1] if y else [0, 0, 0, 0])

    def test_hopeless_classes_and_settled_tiles_exist(self):
        """Otherwise the shortcuts would never be used."""
        class_logits, mask_logits = scene(7, 40, 60, 80, 80)
        tiles = post._bounds_of_sums(
            argmax.tiles_of(post.table_of(mask_logits[0]), (80, 80), 2), probabilities(class_logits[0])
        )
        assert len(post.classes_that_can_win(tiles, 1e-5)) < 40
        first = resize.bilinear_resize((80, 80), (384, 384), torch.device("cpu"))
        assert (argmax.settle(tiles, first, 1e-5).winner >= 0).float().mean() > 0.2

    def test_few_queries_and_classes_can_win(self):
        """Queries and classes of all confidence levels; otherwise the shortcut would never be used."""
        class_logits, mask_logits = scene(3, 60, 40, 40, 40)
        class_logits = class_logits + 8 * torch.eye(41)[torch.arange(60) % 40]
        class_logits[:, 6:, -1] += torch.linspace(4, 16, 54)
        mask_logits[0, :6] += 12 * torch.eye(6).repeat_interleave(7, 1)[:, None, :40]  # one is confident at each pixel
        scores, shares = probabilities(class_logits[0]), mask_logits[0].sigmoid()
        assert len(post._classes_of_weight(mask_logits[0], scores)) < 30
        ours = post.post_process_semantic_segmentation(class_logits, mask_logits, [(150, 90)], intermediate_size=None)
        assert_wins(ours[0], dense_semantic_scores(class_logits[0], mask_logits[0], (150, 90), None))
        shared = focoos.NetworkSizeQueries(class_logits[0], mask_logits[0], (150, 90), False, 0.5)
        shared.share_pixels()
        numbers = torch.tensor(shared.numbers)
        assert 6 <= numbers.max() < 40
        owner = torch.stack([(numbers == number).float().argmax() for number in range(int(numbers.max()))])
        assert_wins(owner[shared.owners.long()], resized(shares * scores.amax(1)[:, None, None], (150, 90)))

    def test_who_is_best_nowhere_on_the_grid_can_win_between(self):
        """Four masks take a corner each; a fifth, weak one exceeds each of them in the middle."""
        corners = torch.eye(4).view(4, 2, 2)
        mask_logits = 40 * (torch.cat([corners, torch.ones(1, 2, 2)]) - 0.5)[None]
        sure = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.3])
        class_logits = torch.cat([sure.diag(), (1 - sure)[:, None]], 1).clamp(min=1e-6).log()[None]
        dense = dense_semantic_scores(class_logits[0], mask_logits[0], (20, 20), None)
        assert (dense.argmax(0) == 4).any()
        with mock.patch.object(post, "SUREST", 4):
            ours = post.post_process_semantic_segmentation(
                class_logits, mask_logits, [(20, 20)], intermediate_size=None
            )
            found = focoos.post_process_detections(
                class_logits, mask_logits, (20, 20), threshold=0, use_mask_score=False, predict_all_pixels=True
            )[0]
        assert_wins(ours[0], dense)
        assert sum(int(detection.mask.sum()) for detection in found) == 400
        fifth = next(detection for detection in found if detection.class_id == 4)
        assert int(fifth.mask.sum()) == (dense.argmax(0) == 4).sum()

    @pytest.mark.parametrize("what", ["one mask", "one class", "everything"])
    @pytest.mark.parametrize("all_pixels", [True, False])
    def test_logits_that_are_no_numbers_give_an_answer(self, what, all_pixels):
        """NaN, which overflow in half precision can cause."""
        class_logits, mask_logits = noise(0, 20, 5, 16, 16)
        if what != "one class":
            mask_logits[0, 3 if what == "one mask" else slice(None), 2:4, 2] = torch.nan
        if what != "one mask":
            class_logits[0, 4 if what == "one class" else slice(None)] = torch.nan
        for middle in (None, (32, 32)):
            label_map = post.post_process_semantic_segmentation(
                class_logits, mask_logits, [(40, 50)], intermediate_size=middle
            )[0]
            assert 0 <= label_map.min() <= label_map.max() < 5
        options = {"network_size": (64, 64), "target_sizes": [(40, 50)], "predict_all_pixels": all_pixels}
        focoos.post_process_detections(class_logits, mask_logits, threshold=0.0, **options)
        assert focoos.post_process_queries(class_logits, mask_logits, **options)[0].masks.shape == (
            20,
            40,
            50,
        )

    @given(st.integers(0, 999), st.permutations(range(6)))
    @settings(max_examples=20, deadline=None)
    def test_order_of_queries_does_not_matter(self, seed, order):
        class_logits, mask_logits = scene(seed, 6, 5, 16, 12)
        ours = post.post_process_semantic_segmentation(class_logits[:, order], mask_logits[:, order], [(40, 50)])[0]
        assert_wins(ours, dense_semantic_scores(class_logits[0], mask_logits[0], (40, 50)))

    @given(st.integers(0, 999), grids, st.integers(1, 5))
    @settings(max_examples=30, deadline=None)
    def test_run_lengths_give_the_map_back(self, seed, size, ids):
        generator = torch.Generator().manual_seed(seed)
        segmentation = torch.randint(-1, ids, size, generator=generator).float()
        runs = post._run_lengths(segmentation)
        json.dumps(runs)
        decoded = torch.full((size[0] * size[1],), torch.nan)
        for segment, run in zip(segmentation.unique().tolist(), runs, strict=True):
            for start, length in zip(run[::2], run[1::2], strict=True):
                assert decoded[start - 1 : start - 1 + length].isnan().all()
                decoded[start - 1 : start - 1 + length] = segment
        assert torch.equal(decoded.view(size), segmentation)


CASES = {case["case"]: case for case in json.loads((REFERENCE / "post_processing.json").read_text())}
SETTINGS = {
    "semantic_predict_all_pixels": {"predict_all_pixels": True, "use_mask_score": False},
    "semantic_threshold_masks": {"predict_all_pixels": False, "use_mask_score": False},
    "instance_mask_score": {"predict_all_pixels": False, "use_mask_score": True},
}


def focoos_logits(case: int) -> tuple[Tensor, Tensor]:
    with np.load(REFERENCE / "post_processing.npz") as arrays:
        class_logits, mask_logits = (arrays[f"{kind}_queries_logits_{case}"] for kind in ("class", "masks"))
    return torch.from_numpy(class_logits), torch.from_numpy(mask_logits)


def dense_network_masks(
    class_logits, mask_logits, network, predict_all_pixels, threshold=0.5, cls_sigmoid=False
) -> tuple[Tensor, Tensor]:
    """Focoos's binary masks at the network's size, and their mean probabilities, with every value computed."""
    probs = resized(mask_logits.sigmoid(), network)
    masks = probs >= threshold
    if predict_all_pixels:
        winner = (probs * probabilities(class_logits, cls_sigmoid).amax(-1)[:, None, None]).argmax(0)
        masks = winner == torch.arange(len(probs))[:, None, None]
    weights = masks * 1e-3
    return masks, (weights * probs).sum((1, 2)) / (weights.sum((1, 2)) + 1e-5)


class TestAgainstFocoos:
    @pytest.mark.parametrize("case, setting", itertools.product(CASES, SETTINGS))
    def test_detections(self, case, setting):
        reference = CASES[case]
        names = {i: f"class {i}" for i in range(7)}
        found = focoos.post_process_detections(
            *focoos_logits(case),
            reference["network_size"],
            [reference["image_size"]],
            id2label=names,
            **SETTINGS[setting],
        )[0]
        expected = reference[setting]
        assert len(found) == len(expected) > 0
        for ours, theirs in zip(found, expected, strict=True):
            assert list(ours.box) == theirs["bbox"]
            assert ours.class_id == theirs["cls_id"]
            assert ours.label == names[theirs["cls_id"]]
            assert ours.score == pytest.approx(theirs["conf"], abs=2e-6)
            # their crop, in which they count pixels, lacks the last row and column
            assert int(ours.mask[:-1, :-1].sum()) == theirs["mask_pixels"]
            assert tuple(ours.mask.shape) == (theirs["mask_shape"][0] + 1, theirs["mask_shape"][1] + 1)

    @pytest.mark.parametrize("case", CASES)
    def test_semantic_evaluation(self, case):
        reference = CASES[case]
        ours = focoos.evaluate_semantic(*focoos_logits(case), reference["network_size"], [reference["image_size"]])[0]
        with np.load(REFERENCE / "post_processing.npz") as arrays:
            assert ours.dtype == torch.int64
            assert np.array_equal(ours.numpy(), arrays[f"eval_semantic_map_{case}"])

    @pytest.mark.parametrize("case", CASES)
    def test_instance_evaluation(self, case):
        reference, expected = CASES[case], CASES[case]["eval_instances"]
        ours = focoos.evaluate_instances(
            *focoos_logits(case), reference["network_size"], [reference["image_size"]], top_k=expected["top_k"]
        )[0]
        order = np.argsort(expected["scores"])[::-1]  # theirs are not sorted
        np.testing.assert_allclose(ours.scores, np.array(expected["scores"])[order], atol=2e-6)
        assert ours.class_ids.tolist() == np.array(expected["classes"])[order].tolist()
        assert ours.boxes.tolist() == np.array(expected["boxes"])[order].tolist()
        assert ours.masks.sum((1, 2)).tolist() == np.array(expected["mask_pixels"])[order].tolist()
        assert ours.masks.shape == (expected["top_k"], *reference["image_size"])

    @examples
    @given(
        st.integers(0, 999), grids, grids, grids, st.integers(1, 8), st.booleans(), st.booleans(), st.booleans(), steps
    )
    def test_detections_are_their_queries(
        self, seed, grid, network, size, queries, all_pixels, mask_score, sigmoid, how
    ):
        class_logits, mask_logits = scene(seed, queries, 4, *grid)
        class_logits[..., -1] -= 5.0  # so that most queries count
        options = {"predict_all_pixels": all_pixels, "use_mask_score": mask_score, "cls_sigmoid": sigmoid}
        with how:
            detections = focoos.post_process_detections(
                class_logits, mask_logits, network, [size], threshold=0.2, filter_empty_masks=False, **options
            )[0]
            (said,) = focoos.post_process_queries(class_logits, mask_logits, network, [size], **options)
        masks, mask_scores = dense_network_masks(
            class_logits[0], mask_logits[0], network, all_pixels, cls_sigmoid=sigmoid
        )
        scores, class_ids = probabilities(class_logits[0], sigmoid).max(-1)
        scores = scores * mask_scores if mask_score else scores
        assert torch.equal(said.class_ids, class_ids)
        torch.testing.assert_close(said.scores, scores, atol=ROUNDING, rtol=0)
        assert torch.equal(said.masks, resized(masks.float(), size) > 0)
        kept = (said.scores > 0.2).nonzero()[:, 0].tolist()
        assert len(detections) == len(kept)
        for query, detection in zip(kept, detections, strict=True):
            assert detection.class_id == class_ids[query]
            assert detection.label is None
            assert detection.score == pytest.approx(said.scores[query].item(), abs=1e-6)
            y, x = said.masks[query].nonzero(as_tuple=True)
            if len(y) == 0:
                assert (detection.box, detection.mask.tolist()) == ((0, 0, 0, 0), [[False]])
                continue
            x_min, y_min, x_max, y_max = detection.box
            assert (x_min, y_min, x_max, y_max) == (x.min(), y.min(), x.max(), y.max())
            assert torch.equal(detection.mask, said.masks[query][y_min : y_max + 1, x_min : x_max + 1])

    def test_the_best_come_first_where_there_are_too_many(self):
        logits = focoos_logits(0)
        options: dict[str, Any] = {"network_size": (96, 128), "use_mask_score": True}
        everything = focoos.post_process_detections(*logits, **options)[0]
        best = focoos.post_process_detections(*logits, top_k=4, **options)[0]
        scores = sorted((detection.score for detection in everything), reverse=True)
        assert scores != [detection.score for detection in everything]
        assert [detection.score for detection in best] == scores[:4]

    def test_empty_masks(self):
        class_logits = torch.tensor([[[9.0, 0.0], [9.0, 0.0], [9.0, 0.0]]])
        mask_logits = torch.full((1, 3, 8, 8), -9.0)
        mask_logits[0, 1, 3, 3] = 9.0  # one pixel
        mask_logits[0, 2, 3, 3:5] = 9.0  # two
        options: dict[str, Any] = {"network_size": (8, 8), "use_mask_score": False}
        assert [d.box for d in focoos.post_process_detections(class_logits, mask_logits, **options)[0]] == [
            (3, 3, 4, 3)
        ]
        kept = focoos.post_process_detections(class_logits, mask_logits, filter_empty_masks=False, **options)[0]
        assert [d.box for d in kept] == [(0, 0, 0, 0), (3, 3, 3, 3), (3, 3, 4, 3)]
        assert [int(d.mask.sum()) for d in kept] == [0, 1, 2]

    def test_nothing_passes_a_threshold_of_one(self):
        assert focoos.post_process_detections(*focoos_logits(0), (96, 128), threshold=1.0) == [[]]

    def test_sigmoid_classes(self):
        class_logits, mask_logits = focoos_logits(1)
        found = focoos.post_process_detections(
            class_logits, mask_logits, (96, 128), cls_sigmoid=True, use_mask_score=False, threshold=0.0
        )[0]
        scores, class_ids = class_logits[0].sigmoid()[:, :-1].max(-1)
        by_class_and_score = {(d.class_id, round(d.score, 5)) for d in found}
        assert by_class_and_score <= {(int(c), round(float(s), 5)) for c, s in zip(class_ids, scores, strict=True)}
        assert len(found) > len(focoos.post_process_detections(class_logits, mask_logits, (96, 128))[0])


EVERY_FUNCTION: dict[str, dict[str, Any]] = {
    "post_process_semantic_segmentation": {},
    "post_process_instance_segmentation": {},
    "post_process_panoptic_segmentation": {"label_ids_to_fuse": {0, 1}},
    "post_process_detections": {"network_size": (90, 80)},
    "post_process_queries": {"network_size": (90, 80)},
    "evaluate_semantic": {"network_size": (90, 80)},
    "evaluate_instances": {"network_size": (90, 80), "top_k": 5},
}


def plain(result: Any) -> Any:
    """Results as nested lists and numbers, which == compares completely."""
    if isinstance(result, Tensor):
        return result.tolist()
    if isinstance(result, (list, tuple)):
        return [plain(part) for part in result]
    if isinstance(result, dict):
        return {key: plain(part) for key, part in result.items()}
    return plain(vars(result)) if hasattr(result, "__dict__") else result


@pytest.mark.parametrize("name", EVERY_FUNCTION)
class TestEveryFunction:
    def call(self, name: str, class_logits: Tensor, mask_logits: Tensor, **options: Any) -> list[Any]:
        return function_named(name)(class_logits, mask_logits, **EVERY_FUNCTION[name], **options)

    def test_batch_is_its_images_one_by_one(self, name):
        class_logits, mask_logits = scene(8, batch=3)
        class_logits[1, :, -1] += 40.0  # one image has no objects
        sizes = [(60, 70), (33, 90), (120, 50)]
        together = self.call(name, class_logits, mask_logits, target_sizes=sizes)
        assert len(together) == 3
        for i in range(3):
            alone = self.call(name, class_logits[i : i + 1], mask_logits[i : i + 1], target_sizes=sizes[i : i + 1])
            assert plain(alone[0]) == plain(together[i])

    def test_sizes_as_tensor(self, name):
        logits = scene(9)
        expected = self.call(name, *logits, target_sizes=[(60, 70)])
        assert plain(self.call(name, *logits, target_sizes=torch.tensor([[60, 70]]))) == plain(expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_types_are_read_in_float32(self, name, dtype):
        class_logits, mask_logits = (logits.to(dtype) for logits in scene(10))
        expected = self.call(name, class_logits.float(), mask_logits.float(), target_sizes=[(60, 70)])
        assert plain(self.call(name, class_logits, mask_logits, target_sizes=[(60, 70)])) == plain(expected)

    def test_logits_are_left_alone(self, name):
        class_logits, mask_logits = (logits.requires_grad_() for logits in scene(11))
        before = class_logits.detach().clone(), mask_logits.detach().clone()
        result = self.call(name, class_logits, mask_logits, target_sizes=[(60, 70)])
        assert torch.equal(before[0], class_logits) and torch.equal(before[1], mask_logits)
        first = result[0]["segmentation"] if isinstance(result[0], dict) else result[0]
        assert not getattr(first, "requires_grad", False)

    def test_works_in_inference_mode_and_after(self, name):
        logits = scene(12)
        with torch.inference_mode():
            inside = self.call(name, *logits, target_sizes=[(61, 71)])
        assert plain(self.call(name, *logits, target_sizes=[(61, 71)])) == plain(inside)

    def test_no_images(self, name):
        class_logits, mask_logits = scene(13)
        assert self.call(name, class_logits[:0], mask_logits[:0]) == []

    @pytest.mark.parametrize(
        "change, complaint",
        [
            ({"class_queries_logits": torch.zeros(4, 3)}, "class_queries_logits must have the shape"),
            ({"class_queries_logits": torch.zeros(1, 4, 1)}, "at least one query and one class"),
            ({"masks_queries_logits": torch.zeros(4, 8, 8)}, "masks_queries_logits must have the shape"),
            ({"masks_queries_logits": torch.zeros(1, 4, 0, 8)}, "at least one pixel"),
            ({"masks_queries_logits": torch.zeros(1, 5, 8, 8)}, "must agree in batch and queries"),
            ({"target_sizes": [(8, 8), (9, 9)]}, "2 for a batch of 1"),
            ({"target_sizes": [(0, 8)]}, "positive"),
            ({"target_sizes": [(8, 8, 3)]}, "two whole numbers"),
            ({"target_sizes": [(8.5, 8)]}, "two whole numbers"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, name, change, complaint):
        arguments = {
            "class_queries_logits": torch.zeros(1, 4, 3),
            "masks_queries_logits": torch.zeros(1, 4, 8, 8),
            **EVERY_FUNCTION[name],
        }
        with pytest.raises(ValueError, match=complaint) as error:
            function_named(name)(**{**arguments, **change})
        assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, options, complaint",
    [
        ("post_process_instance_segmentation", {"threshold": 1.5}, "^threshold must lie between 0 and 1, not 1.5"),
        ("post_process_instance_segmentation", {"mask_threshold": -1}, "^mask_threshold must lie"),
        ("post_process_panoptic_segmentation", {"overlap_mask_area_threshold": float("nan")}, "between 0 and 1"),
        (
            "post_process_instance_segmentation",
            {"return_coco_annotation": True, "return_binary_maps": True},
            "at most one of them",
        ),
        ("post_process_semantic_segmentation", {"intermediate_size": (0, 3)}, "intermediate_size must be a positive"),
        ("post_process_detections", {"network_size": (8,)}, "network_size must be two whole numbers"),
        ("post_process_detections", {"network_size": (8, 8), "top_k": 0}, "top_k must be at least 1"),
        ("evaluate_instances", {"network_size": (8, 8), "top_k": 0}, "top_k must be at least 1"),
        ("evaluate_instances", {"network_size": (8, 8), "mask_threshold": 2}, "^mask_threshold must lie"),
    ],
)
def test_wrong_options_are_refused(name, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        function_named(name)(torch.zeros(1, 4, 3), torch.zeros(1, 4, 8, 8), **options)


def test_without_intermediate_size_the_logits_own_grid_is_used():
    logits = scene(14, height=48, width=40)
    for name in list(EVERY_FUNCTION)[:3]:
        own, named = (
            function_named(name)(*logits, target_sizes=[(99, 100)], intermediate_size=size) for size in (None, (48, 40))
        )
        assert plain(own) == plain(named)
        (untouched,) = function_named(name)(*logits, intermediate_size=None)
        assert (untouched if isinstance(untouched, Tensor) else untouched["segmentation"]).shape == (48, 40)


def test_sigmoid_classes_have_no_object_to_lose_to():
    class_logits = torch.tensor([[[3.0, -3.0, 50.0], [-3.0, 3.0, 50.0]]])  # the last column would win a softmax
    mask_logits = torch.full((1, 2, 8, 8), -8.0)
    mask_logits[0, 0, :4], mask_logits[0, 1, 4:] = 8.0, 8.0
    options: dict[str, Any] = {"cls_sigmoid": True, "intermediate_size": None}
    (semantic,) = post.post_process_semantic_segmentation(class_logits, mask_logits, **options)
    assert semantic[0, 0] == 0 and semantic[7, 7] == 1
    for name in ("post_process_instance_segmentation", "post_process_panoptic_segmentation"):
        assert function_named(name)(class_logits, mask_logits, intermediate_size=None)[0]["segments_info"] == []
        found = function_named(name)(class_logits, mask_logits, **options)[0]["segments_info"]
        assert sorted(segment["label_id"] for segment in found) == [0, 1]


def test_logits_that_are_not_numbers_do_not_break_anything():
    class_logits, mask_logits = scene(15)
    mask_logits[0, 3] = torch.nan
    for name, options in EVERY_FUNCTION.items():
        assert len(function_named(name)(class_logits, mask_logits, target_sizes=[(50, 60)], **options)) == 1


@pytest.mark.parametrize("name", list(EVERY_FUNCTION))
def test_a_model_that_answers_with_nan_is_told_of(name):
    class_logits, mask_logits = scene(15)
    class_logits[0, 3] = torch.nan
    with pytest.warns(RuntimeWarning, match="class_queries_logits have NaN, so the segmentations mean nothing"):
        function_named(name)(class_logits, mask_logits, target_sizes=[(50, 60)], **EVERY_FUNCTION[name])


@pytest.mark.parametrize("module", [post, focoos, argmax, resize, padding])
def test_travels_light(module):
    """Remote code: only imports torch, numpy, the standard library and the files next to it."""
    tree = ast.parse(Path(module.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {
        name.split(".")[0]
        for node in imports
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if not getattr(node, "level", 0)
    }
    assert names <= {"torch", "numpy"} | sys.stdlib_module_names
    assert {node.module for node in imports if getattr(node, "level", 0)} <= {
        f"{name}_faim2f" for name in ("padding", "resize", "argmax", "post_processing")
    }


MEMORY = """
import re, sys, torch
from pathlib import Path
def held(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
sys.path.insert(0, {root!r})
from hf_faim2f.model import focoos_post_processing_faim2f, post_processing_faim2f
torch.manual_seed(0)
masks = 8 * torch.nn.functional.interpolate(torch.randn(1, 100, 9, 9), size=(256, 256), mode="bicubic")
classes = torch.randn(1, 100, 151)
classes[:, :15, :15] += 12 * torch.eye(15)
calls = {calls!r}
focoos = {{name: focoos_post_processing_faim2f for name in vars(focoos_post_processing_faim2f)}}
modules = {{name: focoos.get(name, post_processing_faim2f) for name in calls}}
for name, options in calls.items():
    getattr(modules[name], name)(classes, masks, target_sizes=[(64, 64)], **options)
before = held("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak of importing
for name, options in calls.items():
    getattr(modules[name], name)(classes, masks, target_sizes=[(4096, 4096)], **options)
print(held("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.newest_only
@pytest.mark.large
def test_memory_does_not_follow_queries_times_pixels():
    """100 queries at 4096 x 4096 are 6.7 GB in float32; a gigabyte must suffice, including the result."""
    calls = {name: EVERY_FUNCTION[name] for name in list(EVERY_FUNCTION)[:4]}
    script = MEMORY.format(root=str(Path(__file__).parents[2]), calls=calls)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 2**15 < int(done.stdout) < 2**20  # KiB; less than the maps themselves would mean that nothing was measured
