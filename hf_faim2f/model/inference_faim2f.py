"""Optimization for inference: folds batch norms into the preceding convolutions.

A batch norm with fixed statistics is an affine map, so it can be merged into the preceding convolution (Jacob et al.,
"Quantization and Training of Neural Networks", CVPR 2018, section 3.2).
"""

from torch import nn
from transformers.models.resnet.modeling_resnet import ResNetConvLayer, ResNetShortCut
from transformers.models.rt_detr.modeling_rt_detr_resnet import RTDetrResNetConvLayer, RTDetrResNetShortCut

from .backbone_stdc import STDCConvolution, STDCDepthwise, STDCProjection
from .pixel_decoder_faim2f import FaiM2FConvolution

# Modules whose `normalization` directly follows their `convolution`.
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

# On a CPU, a batch with more pixels than this runs faster in chunks: the feature maps of a larger one do not fit into
# the caches.
PIXELS_AT_ONCE = 1 << 19


def number_at_once(height: int, width: int, pixels: int = PIXELS_AT_ONCE) -> int:
    """The number of images of this size in a chunk of about `pixels` pixels; at least 1."""
    return max(1, pixels // max(1, height * width))


def fold_normalizations(model: nn.Module) -> int:
    """Folds each batch norm of `NORMALIZED_CONVOLUTIONS` into the preceding convolution, in-place; returns the count.

    The model must be in evaluation mode: the current statistics become permanent.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, NORMALIZED_CONVOLUTIONS) and isinstance(module.normalization, nn.BatchNorm2d):
            fused = nn.utils.fusion.fuse_conv_bn_eval(module.convolution, module.normalization)
            module.convolution, module.normalization = fused, nn.Identity()
            if isinstance(getattr(module, "activation", None), nn.ReLU):
                # Nothing else reads the convolution's output.
                module.activation = nn.ReLU(inplace=True)
            count += 1
    return count


__all__ = ["NORMALIZED_CONVOLUTIONS", "PIXELS_AT_ONCE", "fold_normalizations", "number_at_once"]
