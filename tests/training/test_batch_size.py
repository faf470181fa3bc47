"""`--batch-size auto`: the most images per forward pass that fit, estimated on a CPU and tried on a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_faim2f.data.collate import SegmentationCollator
from hf_faim2f.errors import SettingsError
from hf_faim2f.training import batch_size
from hf_faim2f.training.batch_size import Fitting, kept_bytes, largest_batch
from tests.support.shapes import Shapes
from tests.support.short_training import RECIPE, processor_of, shapes_model

ITEMS = [Shapes(3)[index] for index in range(3)]


def fitting(free: int, monkeypatch: pytest.MonkeyPatch, batch: int = 6, precision: str = "fp32") -> Fitting:
    monkeypatch.setattr(batch_size, "free_memory", lambda: free)
    model = shapes_model()
    collator = SegmentationCollator(processor_of(model), do_resize=True)
    return largest_batch(model, ITEMS, collator, replace(RECIPE, batch_size=batch), precision)


def test_what_autograd_keeps_is_counted_once_and_without_weights() -> None:
    class Product(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(50, 50))

        def forward(self, pixel_values: torch.Tensor, **_: object) -> "Product":
            hidden = pixel_values @ self.weight  # keeps pixel_values, and the weight
            self.loss = (hidden * hidden).sum()  # keeps hidden, twice
            return self

    values = torch.ones(10, 50)
    assert kept_bytes(Product(), {"pixel_values": values, "class_labels": []}) == 2 * values.numel() * 4


def test_on_a_cpu_the_largest_divisor_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of n images needs n times the memory of one, plus the optimizer's state; the choice divides the batch
    size."""
    monkeypatch.setattr(batch_size, "SHARE", 1.0)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    model = shapes_model()
    collator = SegmentationCollator(processor_of(model), do_resize=True)
    item = max(ITEMS, key=lambda one: len(one["classes"]))
    an_image = batch_size.TEMPORARIES * kept_bytes(model.train(), collator([item] * 2)) / 2
    trained = sum(4 * one.numel() for one in model.parameters())
    fixed = 3 * trained + sum(one.numel() * one.element_size() for one in model.state_dict().values())
    for room, expected in ((5.9, 3), (3.1, 3), (2.9, 2), (1.5, 1), (6.1, 6)):
        found = fitting(int(fixed + room * an_image), monkeypatch)
        assert found.images == expected, room
    assert found.why.startswith("Batch size auto: 6 images in a forward pass, which take about 0.0 of 0.0 GB of memory")
    too_little = fitting(1000, monkeypatch)
    assert too_little.images == 1 and "although it takes about" in too_little.why
    assert "6 x 1 make the recipe's batch of 6, so the learning rate stays" in too_little.why


def test_the_model_and_the_random_numbers_stay_as_they_were() -> None:
    model = shapes_model().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    collator = SegmentationCollator(processor_of(model), do_resize=True)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert largest_batch(model, ITEMS, collator, RECIPE, "bf16").images == RECIPE.batch_size
    assert torch.equal(torch.rand(3), expected) and not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.large
def test_on_a_gpu_passes_are_tried_until_one_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a simulated GPU, whose allocator is the test's."""
    tried: list[int] = []
    most = 3

    def loss(model: torch.nn.Module, batch: dict) -> torch.Tensor:
        tried.append(len(batch["class_labels"]))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return torch.zeros((), requires_grad=True)

    monkeypatch.setattr(batch_size, "_loss", loss)
    for name in ("set_per_process_memory_fraction", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Test GPU")
    model = shapes_model()
    collator = SegmentationCollator(processor_of(model), do_resize=True)
    arguments = (model, ITEMS[0], collator, RECIPE, "fp32", [12, 6, 4, 3, 2, 1], torch.device("cpu"))
    assert batch_size._largest_on_gpu(*arguments) == (3, "the most that fit into the memory of Test GPU")
    assert tried == [12, 6, 4, 3, 3]  # the second pass already has gradients
    most = 0
    with pytest.raises(SettingsError, match="Not even one image fits into the GPU's memory"):
        batch_size._largest_on_gpu(*arguments)


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(batch_size, "LIMIT", limit)
    monkeypatch.setattr(batch_size, "USED", used)
    whole = batch_size.free_memory()
    assert whole > 10**7
    limit.write_text("5000000\n")
    used.write_text("2000000\n")
    assert batch_size.free_memory() == 3_000_000
    limit.write_text("max\n")
    assert batch_size.free_memory() > 10**7
