"""Optimization for inference: folds batch norms into the preceding convolutions, and compiles the network.

A batch norm with fixed statistics is an affine map, so it can be merged into the preceding convolution (Jacob et al.,
"Quantization and Training of Neural Networks", CVPR 2018, section 3.2).
"""

from typing import Any

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


# Settings of torch's compiler: weights become constants, which lets it fuse activations into convolutions, and the
# number of threads is that of each call, not that of the first.
COMPILER: dict[str, Any] = {"freezing": True, "cpp.dynamic_threads": True}


def compile_network(model: nn.Module) -> None:
    """Sets up the model in-place so that torch compiles it at its first call; the outputs change only by rounding.

    The first image takes a minute or more, and on a CPU needs a C++ compiler. torch caches the compiled code for later
    processes in the folder TORCHINDUCTOR_CACHE_DIR, by default `torchinductor_USER` in the folder for temporary files.

    The network is compiled for the size of the first batch, and once more, for any size, when another size occurs. A
    few cases are compiled separately, such as a batch of one image, or square images. After
    `torch._dynamo.config.recompile_limit` (8) compilations, torch runs the network uncompiled. Weights must not be
    changed afterward.
    """
    model.compile(options=COMPILER)


__all__ = [
    "COMPILER",
    "NORMALIZED_CONVOLUTIONS",
    "compile_network",
    "fold_normalizations",
]
