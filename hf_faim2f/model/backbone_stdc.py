"""The STDC backbone (Fan et al., "Rethinking BiSeNet For Real-time Semantic Segmentation", CVPR 2021, section 3.1)."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BackboneOutput

from .compatibility_faim2f import (
    BackboneConfigMixin,
    BackboneMixin,
    CheckpointsWithoutReentry,
    returns_dictionary,
    start_backbone,
)
from .configuration_checks_faim2f import ReadFromFile, choose_feature_maps, is_int, refuse_unknown_keywords, require


class STDCConfig(ReadFromFile, BackboneConfigMixin, PretrainedConfig):
    """Configuration of the STDC backbone (Fan et al., "Rethinking BiSeNet", CVPR 2021, section 3.1).

    Args:
        num_channels: channels of the input image.
        embedding_size: width of the feature map at 1/4 (Focoos: `base`); 4, 8 and 16 times that at 1/8, 1/16, 1/32.
        depths: blocks of the three stages at 1/8, 1/16 and 1/32; (2, 2, 2) is STDC-1, (4, 5, 3) is STDC-2.
        block_type: "cat" concatenates a block's convolutions, "add" also adds the block's input.
        block_num: convolutions in a block, at least 2, of widths out/2, out/4, ..., the last two equal.
        use_conv_last: one more 1x1 convolution on the coarsest map, to max(1024, 16 * embedding_size) channels.
        hidden_act: activation after each batch norm.
        out_features, out_indices: which of "stem" (1/2), "stage1" (1/4) ... "stage4" (1/32) the backbone returns.
    """

    model_type = "faim2f_stdc"

    def __init__(
        self,
        num_channels: int = 3,
        embedding_size: int = 64,
        depths: Sequence[int] = (4, 5, 3),
        block_type: str = "cat",
        block_num: int = 4,
        use_conv_last: bool = False,
        hidden_act: str = "relu",
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_unknown_keywords(type(self), kwargs)
        kwargs.pop("stage_names", None)
        super().__init__(**kwargs)
        self.num_channels = num_channels
        self.embedding_size = embedding_size
        self.depths = list(depths)
        self.block_type = block_type
        self.block_num = block_num
        self.use_conv_last = use_conv_last
        self.hidden_act = hidden_act
        require(self, is_int(num_channels, 1), "num_channels", "a positive integer")
        require(self, block_type in ("cat", "add"), "block_type", '"cat" or "add"')
        require(self, is_int(block_num, 2), "block_num", "an integer of at least 2")
        width = 2 ** (block_num - 1)
        divides = is_int(embedding_size, 2) and embedding_size % 2 == 0 and 4 * embedding_size % width == 0
        require(self, divides, "embedding_size", f"even, and 4 times it divisible by 2**(block_num - 1) = {width}")
        three = len(self.depths) == 3 and all(is_int(depth, 1) for depth in self.depths)
        require(self, three, "depths", "three positive integers (stages at 1/8, 1/16 and 1/32)")
        self.stage_names = ["stem", "stage1", "stage2", "stage3", "stage4"]
        choose_feature_maps(self, out_features, out_indices)


class STDCConvolution(nn.Module):
    """Convolution, batch norm, activation; padded so that stride 1 keeps the size."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, activation: str) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
        self.normalization = nn.BatchNorm2d(out_channels)
        self.activation = ACT2FN[activation]

    def forward(self, hidden_state: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, ceil(H / stride), ceil(W / stride))."""
        return self.activation(self.normalization(self.convolution(hidden_state)))


class STDCDepthwise(nn.Module):
    """A depthwise 3x3 convolution of stride 2 with batch norm and without activation: halves the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, 2, 1, groups=channels, bias=False)
        self.normalization = nn.BatchNorm2d(channels)

    def forward(self, hidden_state: Tensor) -> Tensor:
        return self.normalization(self.convolution(hidden_state))


class STDCProjection(nn.Module):
    """The shortcut of a strided "add" block: a depthwise convolution of stride 2, then a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.downsample = STDCDepthwise(in_channels)
        self.convolution = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.normalization = nn.BatchNorm2d(out_channels)

    def forward(self, hidden_state: Tensor) -> Tensor:
        return self.normalization(self.convolution(self.downsample(hidden_state)))


@contextmanager
def _unchanged_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, batch norms update copies of their running statistics, which are then dropped."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    kept = [norm._buffers for norm in norms]
    for norm in norms:  # copies, because autograd may save the statistics
        norm._buffers = {name: buffer if buffer is None else buffer.clone() for name, buffer in norm._buffers.items()}
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers = buffers


class STDCBlock(nn.Module):
    """Short-Term Dense Concatenate block: a chain of convolutions of decreasing width, whose outputs are concatenated.

    (B, in, H, W) to (B, out, H, W), or, in the first block of a stage, to half of H and W, rounded up.

    Not a `GradientCheckpointingLayer`, because the second run of a checkpointed block must not update the running
    statistics of its batch norms again. transformers sets `gradient_checkpointing` and `_gradient_checkpointing_func`;
    its `every_n_layers` skips none of these blocks.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any

    def __init__(self, config: STDCConfig, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.adds_input = config.block_type == "add"
        # out/2, out/4, ...; the last two are equal, so that the widths add up to `out`.
        widths = [out_channels // 2 ** min(i + 1, config.block_num - 1) for i in range(config.block_num)]
        convolutions = [STDCConvolution(in_channels, widths[0], 1, 1, config.hidden_act)]
        for before, width in itertools.pairwise(widths):
            convolutions.append(STDCConvolution(before, width, 3, 1, config.hidden_act))
        self.convolutions = nn.ModuleList(convolutions)
        self.downsample = STDCDepthwise(widths[0]) if stride == 2 else None
        self.pool = nn.AvgPool2d(3, 2, 1) if stride == 2 and not self.adds_input else None
        self.projection = STDCProjection(in_channels, out_channels) if stride == 2 and self.adds_input else None

    def forward(self, hidden_state: Tensor) -> Tensor:
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return self._run(hidden_state)
        runs = itertools.count()

        def run(hidden_state: Tensor) -> Tensor:
            with _unchanged_statistics(self) if next(runs) else nullcontext():
                return self._run(hidden_state)

        # A compiled graph updates the statistics once anyway.
        return self._gradient_checkpointing_func(self._run if torch.compiler.is_compiling() else run, hidden_state)

    def _run(self, hidden_state: Tensor) -> Tensor:
        first = self.convolutions[0](hidden_state)
        chain = first if self.downsample is None else self.downsample(first)
        # In a strided block "add" concatenates the downsampled first output, "cat" the pooled one.
        outputs = [chain if self.adds_input else first if self.pool is None else self.pool(first)]
        for convolution in self.convolutions[1:]:
            chain = convolution(chain)
            outputs.append(chain)
        output = torch.cat(outputs, dim=1)
        if not self.adds_input:
            return output
        return output + (hidden_state if self.projection is None else self.projection(hidden_state))


class STDCPreTrainedModel(CheckpointsWithoutReentry, PreTrainedModel):
    config_class = STDCConfig
    base_model_prefix = "stdc"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # there is no attention, so any implementation is fine
    _no_split_modules = ["STDCBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            for name, buffer in module.named_buffers(recurse=False):  # its statistics and counter
                nn.init.constant_(buffer, 1 if name == "running_var" else 0)

    def get_input_embeddings(self) -> nn.Module | None:
        """None: pixels have no embedding table."""
        return None


class STDCBackbone(BackboneMixin, STDCPreTrainedModel):
    """STDC-1, STDC-2 or any other depth and width, as a backbone with feature maps at 1/2 to 1/32."""

    has_attentions = False

    def __init__(self, config: STDCConfig) -> None:
        super().__init__(config)
        start_backbone(self, config)
        base = config.embedding_size
        self.num_features = [base // 2, base, 4 * base, 8 * base, 16 * base]
        self.stem = STDCConvolution(config.num_channels, base // 2, 3, 2, config.hidden_act)
        stages: list[nn.Module] = [STDCConvolution(base // 2, base, 3, 2, config.hidden_act)]
        for in_channels, out_channels, depth in zip(
            self.num_features[1:], self.num_features[2:], config.depths, strict=False
        ):
            blocks = [STDCBlock(config, in_channels, out_channels, 2)]
            blocks += [STDCBlock(config, out_channels, out_channels, 1) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.last_convolution = None
        if config.use_conv_last:
            self.num_features[-1] = max(1024, 16 * base)
            self.last_convolution = STDCConvolution(16 * base, self.num_features[-1], 1, 1, config.hidden_act)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None, **_: Any
    ) -> BackboneOutput | tuple[Any, ...]:
        """Feature maps of the stages in `config.out_features`.

        Args:
            pixel_values: (B, num_channels, H, W), normalized.
            output_hidden_states: also return the map of every stage; None for the configuration's value.
            return_dict: False for a tuple.

        Returns:
            `feature_maps`: (B, channels, ceil(H / stride), ceil(W / stride)) each, strides 2, 4, 8, 16 and 32.

        Raises:
            ValueError: `pixel_values` has another shape.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values must be of shape (B, {self.config.num_channels}, H, W), got {tuple(pixel_values.shape)}."
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_state = self.stem(pixel_values)
        hidden_states = [hidden_state]
        for stage in self.stages:
            hidden_state = stage(hidden_state)
            hidden_states.append(hidden_state)
        if self.last_convolution is not None:
            hidden_states[-1] = self.last_convolution(hidden_state)
        feature_maps = tuple(
            state for name, state in zip(self.stage_names, hidden_states, strict=True) if name in self.out_features
        )
        output = BackboneOutput(
            feature_maps=feature_maps, hidden_states=tuple(hidden_states) if output_hidden_states else None
        )
        return output if returns_dictionary(self.config, return_dict) else output.to_tuple()


__all__ = ["STDCBackbone", "STDCConfig"]
