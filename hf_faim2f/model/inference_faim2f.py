"""Optimization for inference: fused convolutions, and compilation of the network.

A batch norm with fixed statistics is an affine map, so it can be merged into the preceding convolution (Jacob et al.,
"Quantization and Training of Neural Networks", CVPR 2018, section 3.2).
"""

import functools
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.models.resnet.modeling_resnet import (
    ResNetBasicLayer,
    ResNetBottleNeckLayer,
    ResNetConvLayer,
    ResNetShortCut,
)
from transformers.models.rt_detr.modeling_rt_detr_resnet import (
    RTDetrResNetBasicLayer,
    RTDetrResNetBottleNeckLayer,
    RTDetrResNetConvLayer,
    RTDetrResNetShortCut,
)

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

# Blocks that add the output of their `shortcut` to that of their `layer`, a sequence, and then run their `activation`.
RESIDUAL_BLOCKS = (RTDetrResNetBasicLayer, RTDetrResNetBottleNeckLayer, ResNetBasicLayer, ResNetBottleNeckLayer)


def fold_normalizations(model: nn.Module) -> int:
    """Folds each batch norm of `NORMALIZED_CONVOLUTIONS` into the preceding convolution, in-place; returns the count.

    The model must be in evaluation mode: the current statistics become permanent. A convolution inside an adapter, such
    as LoRA's, keeps its batch norm.
    """
    count = 0
    for module in model.modules():
        if not isinstance(module, NORMALIZED_CONVOLUTIONS) or type(module.convolution) is not nn.Conv2d:
            continue
        if isinstance(module.normalization, nn.BatchNorm2d):
            fused = nn.utils.fusion.fuse_conv_bn_eval(module.convolution, module.normalization)
            module.convolution, module.normalization = fused, nn.Identity()
            if isinstance(getattr(module, "activation", None), nn.ReLU):
                # Nothing else reads the convolution's output.
                module.activation = nn.ReLU(inplace=True)
            count += 1
    return count


class OneDNN(NamedTuple):
    """torch's operations on which torch.compile builds, too."""

    convolve: Any  # a convolution with its activation
    convolve_and_add: Any  # the same, with a residual that is added before the activation
    pack: Any  # lays out weights for them


@functools.cache
def _onednn() -> OneDNN | None:
    """The operations, if this torch has them and this CPU runs them in bfloat16. They have been tried on x86 only."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return None
    try:
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            convolve = torch.ops.mkldnn._convolution_pointwise
            return OneDNN(convolve.default, convolve.binary, torch._C._nn.mkldnn_reorder_conv2d_weight)
    except AttributeError:  # another release of torch
        pass
    return None


# The slope of ReLU for negative numbers: oneDNN's plain ReLU turns NaN into 0, which would hide broken weights.
SLOPE = 1e-30


class InferenceConvolution(nn.Conv2d):
    """A convolution, the addition of a residual, if there is one, and the ReLU that follows, if one does.

    In bfloat16 on x86 CPUs, convolution and ReLU, or convolution and addition, are one operation of oneDNN, with a copy
    of the weights in oneDNN's own layout, which `conv2d` would produce in every call. Outputs differ by rounding only.
    In float32 it would be no faster. The copy is renewed if the weights change, but not if `weight.data` does.
    """

    relu = False
    _packed: tuple[Any, int, Tensor] | None = None  # reference to the weights, their version, and the copy

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, in, H, W) to (B, out, h, w); `residual` has the output's shape."""
        if not self._fuses(input):
            output = super().forward(input)
            output = output if residual is None else output.add_(residual)
            return output.relu_() if self.relu else output
        operations = _onednn()
        assert operations is not None
        weight = self._pack(operations.pack, input.shape)
        rest = (weight, self.bias, self.padding, self.stride, self.dilation, self.groups)
        if residual is None:
            activation = ("leaky_relu", [SLOPE]) if self.relu else ("none", [])
            return operations.convolve(input, *rest, *activation, "")
        output = operations.convolve_and_add(input, residual, *rest, "add", 1.0, None, [], "")
        return output.relu_() if self.relu else output

    def _fuses(self, input: Tensor) -> bool:
        """Whether oneDNN's operation may be called: it has no derivative, ignores autocast, and cannot be exported."""
        return (
            not (torch.compiler.is_compiling() or torch.jit.is_tracing())
            and input.dtype == self.weight.dtype == torch.bfloat16
            and input.device.type == self.weight.device.type == "cpu"
            and _is_ordinary(input)
            and _is_ordinary(self.weight)
            and not self.weight.is_inference()  # such a tensor does not tell when it changes
            and input.ndim == 4
            and input.numel() > 0
            and not (torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad))
            and forward_ad._current_level < 0
            and not torch.is_autocast_enabled("cpu")
            and _onednn() is not None
        )

    def _pack(self, reorder: Any, shape: torch.Size) -> Tensor:
        """The weights in oneDNN's layout, laid out anew if they have changed."""
        weight = self.weight
        if self._packed is None or self._packed[0]() is not weight or self._packed[1] != weight._version:
            packed = reorder(weight.to_mkldnn(), self.padding, self.stride, self.dilation, self.groups, shape)
            self._packed = weakref.ref(weight), weight._version, packed
        return self._packed[2]

    def _apply(self, *args: Any, **kwargs: Any) -> "InferenceConvolution":
        self._packed = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # such a tensor can be neither copied nor pickled


def _is_ordinary(tensor: Tensor) -> bool:
    """Neither a subclass, for example of a tracer, nor wrapped by `torch.func`."""
    return type(tensor) in (Tensor, nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


class InferenceResidualBlock(nn.Module):
    """Any of `RESIDUAL_BLOCKS`, with the addition and its activation as part of the last convolution."""

    layer: nn.Sequential
    shortcut: nn.Module

    def forward(self, hidden_state: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, h, w)."""
        residual = self.shortcut(hidden_state)
        layers: list[Any] = list(self.layer)
        for layer in layers[:-1]:
            hidden_state = layer(hidden_state)
        return layers[-1].convolution(hidden_state, residual)


def prepare_for_inference(model: nn.Module) -> None:
    """Folds batch norms, fuses additions and ReLUs into convolutions, and stores weights channels-last, in-place.

    The model must be in evaluation mode and without gradients. Modules with hooks, or whose `forward` was replaced, as
    accelerate does to move weights, stay as they are. Later hooks of a residual block's parts are not called.
    """
    fold_normalizations(model)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    modules: list[Any] = [module for module in model.modules() if _is_plain(module)]
    for module in modules:
        if type(module) is nn.Conv2d and type(module.weight) is nn.Parameter and _pads_zeros(module):
            module.__class__ = InferenceConvolution  # type: ignore[assignment]
    for module in modules:
        if isinstance(module, NORMALIZED_CONVOLUTIONS) and _is_convolution_alone(module):
            activation = getattr(module, "activation", None)
            if isinstance(activation, nn.ReLU) and _is_plain(activation):
                module.convolution.relu, module.activation = True, nn.Identity()
    for module in modules:
        if type(module) in RESIDUAL_BLOCKS and isinstance(module.activation, nn.ReLU):
            last = module.layer[-1]
            plain = all(_is_plain(part) for part in (module.activation, module.layer, last, last.activation))
            identity = isinstance(last.activation, nn.Identity)
            if plain and identity and _is_convolution_alone(last) and not last.convolution.relu:
                module.__class__ = InferenceResidualBlock
                last.convolution.relu, module.activation = True, nn.Identity()


def _is_plain(module: nn.Module) -> bool:
    """Whether nothing else runs when the module is called."""
    return not ("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def _pads_zeros(convolution: nn.Conv2d) -> bool:
    return convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)


def _is_convolution_alone(module: Any) -> bool:
    """Whether the module, one of `NORMALIZED_CONVOLUTIONS`, has no normalization left, and can fuse what follows."""
    return isinstance(module.normalization, nn.Identity) and isinstance(module.convolution, InferenceConvolution)


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
    "InferenceConvolution",
    "compile_network",
    "fold_normalizations",
    "prepare_for_inference",
]
