"""What may be done to a model that will only predict: batch norms go into their convolutions, memory is laid out anew,
and a CPU sees no more images at once than its caches hold.

A batch norm with fixed statistics is linear, and so is part of the convolution before it (Jacob et al., CVPR 2018,
section 3.2). Channels last is how processors and tensor cores read images, and the layout of the transformer's tokens,
so that maps become tokens without a copy.
"""

import torch
from torch import Tensor, nn
from transformers.models.resnet.modeling_resnet import ResNetConvLayer, ResNetShortCut
from transformers.models.rt_detr.modeling_rt_detr_resnet import RTDetrResNetConvLayer, RTDetrResNetShortCut

from .backbone_stdc import STDCConvolution, STDCDepthwise, STDCProjection
from .pixel_decoder_faim2f import FaiM2FConvolution

# Modules whose batch norm follows their convolution at once, so that the two are one convolution.
NORMALIZED_CONVOLUTIONS = (
    STDCConvolution,
    STDCDepthwise,
    STDCProjection,
    FaiM2FConvolution,
    RTDetrResNetConvLayer,
    RTDetrResNetShortCut,
    ResNetConvLayer,
    ResNetShortCut,
)

# Pixels of a batch beyond which a CPU's time for each grows, because maps no longer stay in its caches; far below
# it, a batch is faster than its images. Found for the widths of STDC on two cores.
PIXELS_AT_ONCE = 1 << 19


def images_at_once(pixel_values: Tensor) -> list[Tensor]:
    """The batch, (B, 3, H, W), in parts that are each fastest run by themselves; whole where that is best, or fixed."""
    height, width = pixel_values.shape[-2:]
    # Who compiles or exports wants one graph for the batch.
    if pixel_values.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return [pixel_values]
    return list(pixel_values.split(number_at_once(height, width)))


def number_at_once(height: int, width: int) -> int:
    """How many images of this size a CPU is fastest to run together."""
    return max(1, PIXELS_AT_ONCE // max(1, height * width))


def fold_normalizations(model: nn.Module) -> int:
    """Makes one convolution of each that a batch norm follows, in place; how many there were.

    The model must be in evaluation mode: the statistics that it has are those that stay.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, NORMALIZED_CONVOLUTIONS) and isinstance(module.normalization, nn.BatchNorm2d):
            fused = nn.utils.fusion.fuse_conv_bn_eval(module.convolution, module.normalization)
            module.convolution, module.normalization = fused, nn.Identity()
            if isinstance(getattr(module, "activation", None), nn.ReLU):
                # What the convolution just made has no other reader.
                module.activation = nn.ReLU(inplace=True)
            count += 1
    return count


__all__ = ["NORMALIZED_CONVOLUTIONS", "PIXELS_AT_ONCE", "fold_normalizations", "images_at_once", "number_at_once"]
