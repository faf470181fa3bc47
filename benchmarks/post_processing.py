"""Post-processing against that of transformers' Mask2Former on the same logits; its memory at 4096 x 4096.

    python benchmarks/post_processing.py [RUNS] [MODEL IMAGES]

Ours and the peer run alternately in one process, on two threads, at 640 x 640 from mask logits of 160 x 160 and 100
queries: 150 classes for the semantic and panoptic functions, 80 for the instance function. Two kinds of logits:

- realistic: 14 queries are confident in a class (probability about 0.97) and divide the image into regions with wavy
  borders. Their mask logits rise to 8 inside and fall to -12 outside within a few pixels of the border, with smooth and
  white noise. The other 86 are confident in no object (about 0.98); their best class and mask are those of a region,
  with lower mask logits.
- adverse: every query is confident in a class and every mask is white noise, so nothing can be skipped.

With the path of a trained MODEL, they run on its logits of every tenth photograph in IMAGES instead, to the size of the
photograph; times are those of all photographs.

Memory is the peak growth of a fresh process during the call, including the result.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from measurement import extra_memory, record, row, time_in_turn
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.model import focoos_post_processing_faim2f as focoos
from hf_faim2f.model import post_processing_faim2f as post
from hf_faim2f.model.image_files_faim2f import IMAGE_FORMATS

QUERIES, GRID, TARGET, LARGE = 100, (160, 160), (640, 640), (4096, 4096)
CLASSES = {"semantic": 150, "panoptic": 150, "instance": 80}
Case = tuple[Tensor, Tensor, tuple[int, int]]  # class logits, mask logits, (height, width) of the result


def realistic_logits(classes: int, grid: tuple[int, int] = GRID, sure: int = 14) -> tuple[Tensor, Tensor]:
    """Class logits (1, 100, classes + 1) and mask logits (1, 100, *grid), described at the top of this file."""
    draw = torch.Generator().manual_seed(0)

    def smooth(count: int, waves: int) -> Tensor:
        coarse = torch.randn(1, count, waves, waves, generator=draw)
        return F.interpolate(coarse, size=grid, mode="bicubic", align_corners=False)[0]

    places = torch.stack(torch.meshgrid(*(torch.linspace(0, 1, side) for side in grid), indexing="ij"))
    centers = torch.rand(sure, 2, 1, 1, generator=draw)
    distance = (places + 0.06 * smooth(2, 6) - centers).norm(dim=1)  # (confident, h, w)
    nearest, next_nearest = distance.topk(2, 0, largest=False).values
    depth = torch.where(distance == nearest, next_nearest, nearest) - distance  # above 0 inside
    region = torch.cat([torch.arange(sure), torch.randint(sure, (QUERIES - sure,), generator=draw)])
    faintness = torch.cat([torch.ones(sure), 0.3 + 0.5 * torch.rand(QUERIES - sure, generator=draw)])
    masks = faintness[:, None, None] * (depth[region] / 0.012).clamp(-12, 8) + smooth(QUERIES, 10)
    masks += 0.2 * torch.randn(masks.shape, generator=draw)
    masks[sure:] -= 3
    labels = torch.randint(classes, (sure,), generator=draw)
    class_logits = torch.randn(QUERIES, classes + 1, generator=draw)
    class_logits[torch.arange(sure), labels] += 9
    class_logits[torch.arange(sure, QUERIES), labels[region[sure:]]] += 3
    class_logits[sure:, classes] += 9
    order = torch.randperm(QUERIES, generator=draw)
    return class_logits[order][None], masks[order][None]


def adverse_logits(classes: int) -> tuple[Tensor, Tensor]:
    """Logits for which nothing can be skipped: all queries are confident in a class, and all masks are white noise."""
    draw = torch.Generator().manual_seed(0)
    class_logits = torch.randn(1, QUERIES, classes + 1, generator=draw)
    class_logits.scatter_add_(
        2, torch.randint(classes, (1, QUERIES, 1), generator=draw), torch.full((1, QUERIES, 1), 9.0)
    )
    return class_logits, 3 * torch.randn(1, QUERIES, *GRID, generator=draw)


def peer_processor() -> Any:
    """transformers' Mask2Former image processor, in the version that does not need torchvision."""
    try:  # transformers 5.x
        from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
    except ImportError:  # transformers 4.57
        from transformers import Mask2FormerImageProcessor

        return Mask2FormerImageProcessor()
    return Mask2FormerImageProcessorPil()


def trained_logits(model: str, folder: str) -> list[Case]:
    network = FaiM2FForUniversalSegmentation.from_pretrained(model).eval()
    processor = FaiM2FImageProcessor.from_pretrained(model)
    cases = []
    for path in sorted(Path(folder).iterdir())[::10]:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            inputs = processor(image.convert("RGB"), return_tensors="pt")
            size = image.height, image.width
        with torch.inference_mode():
            outputs = network(inputs["pixel_values"])
        cases.append((outputs.class_queries_logits, outputs.masks_queries_logits, size))
    return cases


def contenders(cases: list[Case], task: str) -> dict[str, Callable[[], list[Any]]]:
    """Ours and the peer's function for this task, on the same logits."""
    ours = getattr(post, f"post_process_{task}_segmentation")
    theirs = getattr(peer_processor(), f"post_process_{task}_segmentation")
    options: dict[str, Any] = {"label_ids_to_fuse": set()} if task == "panoptic" else {}

    def peer(class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int]) -> Any:
        outputs = SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=mask_logits)
        return theirs(outputs, target_sizes=[size], **options)[0]

    return {
        "ours": lambda: [ours(*logits, target_sizes=[size], **options)[0] for *logits, size in cases],
        "transformers": lambda: [peer(*case) for case in cases],
    }


def differing_pixels(ours: list[Any], theirs: list[Any]) -> int:
    maps = [[item["segmentation"] if isinstance(item, dict) else item for item in found] for found in (ours, theirs)]
    return sum(int((one != other).sum()) for one, other in zip(*maps, strict=True))


def large_job(task: str) -> Callable[[], object]:
    """One call at 4096 x 4096, after a small one for one-time allocations."""
    class_logits, mask_logits = realistic_logits(CLASSES.get(task, 80), (256, 256))
    function = (
        focoos.post_process_detections if task == "detections" else getattr(post, f"post_process_{task}_segmentation")
    )
    options: dict[str, Any] = {"network_size": (1024, 1024)} if task == "detections" else {}
    call = partial(function, class_logits, mask_logits, **options)
    call(target_sizes=[(64, 64)])
    return partial(call, target_sizes=[LARGE])


def main() -> None:
    """Prints times and memory, of 15 runs by default."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    print(__doc__)
    transformers.logging.set_verbosity_error()  # the peer warns at every panoptic call
    seconds: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    differing: dict[str, int] = {}
    cases: dict[str, Callable[[int], list[Case]]] = {
        "realistic": lambda classes: [(*realistic_logits(classes), TARGET)],
        "adverse": lambda classes: [(*adverse_logits(classes), TARGET)],
    }
    if len(sys.argv) > 2:
        trained = trained_logits(*sys.argv[2:4])
        cases = {f"{len(trained)} photographs,": lambda classes: trained}
    for kind, make in cases.items():
        for task, classes in CLASSES.items():
            name, both = f"{kind} {task}", contenders(make(classes), task)
            seconds[name] = times = time_in_turn(both, runs, warmup=2)
            ratios[name] = times["ours"]["median"] / times["transformers"]["median"]
            differing[name] = differing_pixels(*(call() for call in both.values()))
            for who, figures in times.items():
                print(row(f"{name}, {who}", figures))
            print(f"{'':28} ours / transformers: {ratios[name]:.3f}; pixels that differ: {differing[name]}", flush=True)
    large = [] if len(sys.argv) > 2 else [*CLASSES, "detections"]
    memory = {task: extra_memory(partial(large_job, task)) for task in large}
    for task, megabytes in memory.items():
        print(f"ours, {task}, 100 queries at 4096 x 4096: {megabytes:.0f} MB extra")
    record(
        "post_processing",
        {
            "runs": runs,
            "seconds": seconds,
            "ratio": ratios,
            "differing_pixels": differing,
            "extra_megabytes": memory,
        },
    )


if __name__ == "__main__":
    main()
