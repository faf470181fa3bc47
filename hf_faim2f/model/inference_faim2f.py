"""Optimization for inference: fused convolutions, and compilation of the network.

A batch norm with fixed statistics is an affine map, so it can be merged into the preceding convolution (Jacob et al.,
"Quantization and Training of Neural Networks", CVPR 2018, section 3.2).
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
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


@functools.cache
def _onednn() -> tuple[Any, Any] | None:
    """torch's operations that run a convolution with its activation, and lay out weights: those of torch.compile.

    None if this torch or CPU has no such operations for bfloat16. They have been tried on x86 only.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return None
    try:
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return torch.ops.mkldnn._convolution_pointwise.default, torch._C._nn.mkldnn_reorder_conv2d_weight
    except AttributeError:  # another release of torch
        pass
    return None


class InferenceConvolution(nn.Conv2d):
    """A convolution and the ReLU that follows it, if any.

    In bfloat16 on x86 CPUs, this is one operation of oneDNN, with a copy of the weights in oneDNN's own layout, which
    `conv2d` would produce in every call. The outputs are identical. In float32 it would be no faster.
    """

    relu = False
    _packed: tuple[tuple[Any, ...], Tensor] | None = None

    def forward(self, hidden_state: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, h, w)."""
        if not self._fuses(hidden_state):
            output = super().forward(hidden_state)
            return output.relu_() if self.relu else output
        operations = _onednn()
        assert operations is not None
        return operations[0](
            hidden_state,
            self._pack(operations[1], hidden_state.shape),
            self.bias,
            self.padding,
            self.stride,
            self.dilation,
            self.groups,
            "relu" if self.relu else "none",
            [],
            "",
        )

    def _fuses(self, hidden_state: Tensor) -> bool:
        """Whether oneDNN's operation may be called: it has no gradient, ignores autocast, and cannot be exported."""
        return (
            not (torch.compiler.is_compiling() or torch.jit.is_tracing())
            and hidden_state.dtype == self.weight.dtype == torch.bfloat16
            and hidden_state.device.type == self.weight.device.type == "cpu"
            and hidden_state.ndim == 4
            and hidden_state.numel() > 0
            and not (torch.is_grad_enabled() and (hidden_state.requires_grad or self.weight.requires_grad))
            and not torch.is_autocast_enabled("cpu")
            and _onednn() is not None
        )

    def _pack(self, reorder: Any, shape: torch.Size) -> Tensor:
        """The weights in oneDNN's layout, laid out anew if they have changed."""
        weight = self.weight
        state = (weight.data_ptr(), None if weight.is_inference() else weight._version)
        if self._packed is None or self._packed[0] != state:
            packed = reorder(weight.to_mkldnn(), self.padding, self.stride, self.dilation, self.groups, shape)
            self._packed = (state, packed)
        return self._packed[1]

    def _apply(self, *args: Any, **kwargs: Any) -> "InferenceConvolution":
        self._packed = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # such a tensor can be neither copied nor pickled


def prepare_for_inference(model: nn.Module) -> None:
    """Folds batch norms, fuses ReLUs into convolutions, and stores weights channels-last, in-place.

    The model must be in evaluation mode and without gradients.
    """
    fold_normalizations(model)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in model.modules():
        for name, child in module.named_children():
            # Not if its `forward` was replaced, as accelerate does to move weights.
            plain = type(child) is nn.Conv2d and type(child.weight) is nn.Parameter and "forward" not in vars(child)
            if not plain or child.padding_mode != "zeros" or isinstance(child.padding, str):
                continue
            child.__class__ = InferenceConvolution  # keeps its hooks
            if name == "convolution" and _is_followed_by_relu(module):
                vars(child)["relu"], module.activation = True, nn.Identity()


def _is_followed_by_relu(module: nn.Module) -> bool:
    """Whether only a ReLU reads the output of the module's convolution."""
    return (
        isinstance(module, NORMALIZED_CONVOLUTIONS)
        and isinstance(module.normalization, nn.Identity)
        and isinstance(getattr(module, "activation", None), nn.ReLU)
    )


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
