"""Models for images with other than three channels, from the weights of a model for three.

The weights of the first layer are spread over the N channels: channel c gets those of channel c mod 3, times 3 / N, so
that activations keep their magnitude. A single channel gets their sum, so that a gray image gives the same outputs as
its RGB version if the image processor normalizes the three channels alike.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

RGB = 3


def spread_values(values: Sequence[float], num_channels: int) -> list[float]:
    """Values of channels, such as means, for `num_channels` channels: repeated in order; for one channel, the mean."""
    if num_channels == 1 and len(values) > 1:
        return [sum(values) / len(values)]
    return [values[channel % len(values)] for channel in range(num_channels)]


def spread_weight(weight: Tensor, num_channels: int) -> Tensor:
    """Spreads weights (out, C, h, w) to (out, num_channels, h, w), as above but for any C instead of three."""
    if num_channels == 1:
        return weight.sum(1, keepdim=True)
    channels = [channel % weight.shape[1] for channel in range(num_channels)]
    return weight[:, channels] * (weight.shape[1] / num_channels)


@torch.no_grad()
def spread_channels(model: Any, num_channels: int) -> Any:
    """Changes the number of channels that a model takes, in-place, by spreading the weights of its first layer.

    Args:
        model: a model of this package, with any backbone whose first layer is a convolution.
        num_channels: at least 1.

    Returns:
        The model. Its image processor needs `num_channels`, too.

    Raises:
        ValueError: the number is not positive, or the first layer cannot be changed.
    """
    before = model.config.num_channels
    if num_channels == before:
        return model
    name, layer = first_layer(model.backbone)
    if layer is None or layer.in_channels != before or layer.groups != 1:
        raise ValueError(
            f"num_channels: the first layer of {type(model.backbone).__name__} is not a convolution of {before} "
            "channels, so its weights cannot be spread over others."
        )
    if layer.weight.is_meta:
        raise ValueError("num_channels: the first layer is offloaded; load the model without device_map, and save it.")
    model.config.num_channels = num_channels  # checks the number
    model.backbone.config.num_channels = num_channels
    layer.weight = nn.Parameter(spread_weight(layer.weight, num_channels), requires_grad=layer.weight.requires_grad)
    layer.in_channels = num_channels
    for path, module in model.backbone.named_modules():
        if name.startswith(f"{path}." if path else "") and getattr(module, "num_channels", None) == before:
            module.num_channels = num_channels  # the embeddings of transformers' backbones check it
    return model


def first_layer(backbone: nn.Module) -> tuple[str, nn.Conv2d | None]:
    """The name and the layer of a backbone's first convolution; None if it has none."""
    found = ((name, module) for name, module in backbone.named_modules() if isinstance(module, nn.Conv2d))
    return next(found, ("", None))


def picture_of(image: Tensor) -> Image.Image:
    """An image (C, H, W), in 0..255, for display: the first three channels as RGB; of fewer, the first as gray."""
    shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return Image.fromarray(shown.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


class SpreadsChannels:
    """Mixin of models: `from_pretrained(..., num_channels=N)` spreads the weights of the first layer."""

    @classmethod
    def from_pretrained(cls, *inputs: Any, **kwargs: Any) -> Any:
        """Like transformers' method, but offloads buffers with the weights unless `offload_buffers=False`, freezes
        the backbone as configured, and spreads the weights of the first layer if `num_channels` differs.

        Raises:
            ValueError: the weights do not fit the first layer. (With `ignore_mismatched_sizes` and
                `output_loading_info`, which lists it, it is randomly initialized instead.)
        """
        # Otherwise 4.57 silently uses the initial statistics of a batch norm that is offloaded to disk.
        kwargs.setdefault("offload_buffers", True)
        wanted = _take_num_channels(kwargs)
        is_asked = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*inputs, output_loading_info=True, **kwargs)  # type: ignore[misc]
        model.config.__dict__.pop("_num_channels_of_weights", None)
        model._freeze()
        own = f"backbone.{first_layer(model.backbone)[0]}.weight"
        mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
        if own in mismatched and not is_asked:
            raise ValueError(
                f"The weights are of a model for another number of channels than {model.config.num_channels}, that of "
                "the configuration: leave it as it was saved, and pass num_channels to from_pretrained, which spreads "
                "the weights of the first layer over the channels."
            )
        if wanted is not None:
            spread_channels(model, wanted)
        return (model, info) if is_asked else model


def _take_num_channels(kwargs: dict[str, Any]) -> int | None:
    """Removes the requested number of channels from the arguments, so that the model is built for that of the weights.

    Returns:
        The requested number; None if there is none.
    """
    wanted: int | None = kwargs.pop("num_channels", None)
    backbone: Any = kwargs.get("backbone_config")
    config: Any = kwargs.get("config")
    if wanted is None and isinstance(backbone, dict) and "num_channels" in backbone:
        kwargs["backbone_config"] = {name: backbone[name] for name in backbone if name != "num_channels"}
        wanted = backbone["num_channels"]
    before = getattr(config, "_num_channels_of_weights", None)
    if before is not None:  # read from the file, with another number as an override
        config = kwargs["config"] = copy.deepcopy(config)
        wanted = config.num_channels if wanted is None else wanted
        config.num_channels = before
    return wanted


__all__ = ["RGB", "SpreadsChannels", "first_layer", "picture_of", "spread_channels", "spread_values", "spread_weight"]
