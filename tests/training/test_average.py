"""The exponential moving average of the weights compared with its recurrence in plain numbers."""

from typing import Any

import pytest
import torch
from torch import nn

from hf_faim2f.training.recipe import averaged_weights


@pytest.mark.parametrize("decay", [0.5, 0.998])
def test_early_updates_forget_the_first_weights_quickly(decay: float) -> None:
    model: Any = nn.BatchNorm1d(1)
    averaged: Any = averaged_weights(model, decay)
    expected_weight = expected_mean = 0.0
    for update in range(40):
        with torch.no_grad():
            model.weight.fill_(update + 1.0)
            model.running_mean.fill_(10.0 * update)
        averaged.update_parameters(model)
        keep = min(decay, (1 + update) / (10 + update)) if update else 0.0  # the first update copies
        expected_weight = keep * expected_weight + (1 - keep) * (update + 1.0)
        expected_mean = keep * expected_mean + (1 - keep) * 10.0 * update
    assert float(averaged.module.weight.detach()) == pytest.approx(expected_weight, rel=1e-5)
    assert float(averaged.module.running_mean) == pytest.approx(expected_mean, rel=1e-5)


def test_integers_are_copied() -> None:
    """An average in float32 could be truncated to one less, and Swin's indices would then name other positions."""
    model = nn.Linear(1, 1)
    model.register_buffer("index", torch.arange(200))
    averaged: Any = averaged_weights(model, 0.999)
    for _ in range(100):
        averaged.update_parameters(model)
    assert torch.equal(averaged.module.index, torch.arange(200))


def test_the_count_is_part_of_the_state() -> None:
    model = nn.Linear(1, 1, bias=False)
    first: Any = averaged_weights(model, 0.998)
    for value in range(5):
        nn.init.constant_(model.weight, value)
        first.update_parameters(model)
    second: Any = averaged_weights(model, 0.998)
    second.load_state_dict(first.state_dict())
    nn.init.constant_(model.weight, 9.0)
    for averaged in (first, second):
        averaged.update_parameters(model)
    assert float(first.module.weight.detach()) == float(second.module.weight.detach()) != 9.0
