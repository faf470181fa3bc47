"""The pixel decoder of BiSeNetFormer: that of BiSeNet, with two of its maps as levels for the queries.

Rosi et al., "The Revenge of BiSeNet: Efficient Multi-Task Image Segmentation", CVPR Workshops 2024. Context path with
attention refinement and feature fusion are those of Yu et al., "BiSeNet: Bilateral Segmentation Network for Real-time
Semantic Segmentation", ECCV 2018, section 3; the backbone's map at 1/8 takes the place of the spatial path.
"""

from torch import Tensor, nn
from transformers.utils import logging

from .configuration_faim2f import FaiM2FConfig
from .pixel_decoder_faim2f import FaiM2FConvolution, PixelDecoderOutput

logger = logging.get_logger(__name__)


class FaiM2FPooledConvolution(FaiM2FConvolution):
    """A 1x1 convolution and batch norm of a map's spatial mean, with an optional activation."""

    def __init__(self, in_channels: int, out_channels: int, activation: str | None = None) -> None:
        super().__init__(in_channels, out_channels, 1, activation)

    def forward(self, hidden_state: Tensor) -> Tensor:
        """(B, in, h, w) to (B, out, 1, 1).

        In training, a batch of one image has no variance, so it is normalized by the running statistics.
        """
        mean = hidden_state.mean(dim=(2, 3), keepdim=True)
        norm = self.normalization
        if not (isinstance(norm, nn.BatchNorm2d) and norm.training and len(mean) == 1):  # it may be folded
            return super().forward(mean)
        logger.warning_once(
            "A batch of one image in training: the batch norms of spatial means use their running statistics, which "
            "they cannot update. Train with at least two images on each device."
        )
        norm.eval()
        try:
            return super().forward(mean)
        finally:
            norm.train()


class FaiM2FAttentionRefinement(nn.Module):
    """Attention refinement module: scales the channels of a projected map by an attention from their means."""

    def __init__(self, in_channels: int, size: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, size, 1, bias=False)
        self.convolution = FaiM2FConvolution(size, size, 3, "relu")
        self.attention = FaiM2FPooledConvolution(size, size)

    def forward(self, hidden_state: Tensor) -> Tensor:
        """(B, in_channels, h, w) to (B, size, h, w)."""
        hidden_state = self.convolution(self.projection(hidden_state))
        return hidden_state * self.attention(hidden_state).sigmoid()


class FaiM2FFeatureFusion(nn.Module):
    """Feature fusion module: merges the backbone's map at 1/8 with that of the context path."""

    def __init__(self, in_channels: int, size: int) -> None:
        super().__init__()
        self.spatial_projection = nn.Conv2d(in_channels, size, 1)
        self.context_projection = nn.Conv2d(size, size, 1)
        self.convolution = FaiM2FConvolution(size, size, 1, "relu")
        self.squeeze = nn.Conv2d(size, size // 4, 1, bias=False)
        self.excite = nn.Conv2d(size // 4, size, 1, bias=False)

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        """(B, in_channels, h, w) and (B, size, h, w) to (B, size, h, w)."""
        fused = self.convolution(self.spatial_projection(spatial) + self.context_projection(context))
        attention = self.squeeze(fused.mean(dim=(2, 3), keepdim=True)).relu()
        return fused + fused * self.excite(attention).sigmoid()


class FaiM2FBiSeNetPixelDecoder(nn.Module):
    """The context path over the two coarsest maps, fused with the third (1/8), which has the size of the masks."""

    def __init__(self, config: FaiM2FConfig, in_channels: list[int]) -> None:
        """
        Args:
            in_channels: channels of the backbone's feature maps, fine to coarse, at least 3. The last three are used.
        """
        super().__init__()
        size = config.feature_size
        third, second, first = in_channels[-3:]
        self.global_context = FaiM2FPooledConvolution(first, size, "relu")
        # Coarse to fine, in the order of the forward pass.
        self.refinements = nn.ModuleList([FaiM2FAttentionRefinement(channels, size) for channels in (first, second)])
        self.upsampling_convolutions = nn.ModuleList([FaiM2FConvolution(size, size, 3, "relu") for _ in range(2)])
        self.fusion = FaiM2FFeatureFusion(third, size)
        self.mask_projection = FaiM2FConvolution(size, config.mask_feature_size, 3, "relu")

    def forward(self, feature_maps: tuple[Tensor, ...]) -> PixelDecoderOutput:
        """`feature_maps`: (B, channels, H/stride, W/stride) each, fine to coarse."""
        third, second, first = feature_maps[-3:]
        context = self.global_context(first)  # (B, size, 1, 1)
        pyramid = []
        for level, finer, refinement, convolution in zip(
            (first, second), (second, third), self.refinements, self.upsampling_convolutions, strict=True
        ):
            level = refinement(level) + context
            pyramid.append(level)
            size = finer.shape[-2:]
            context = convolution(nn.functional.interpolate(level, size=size, mode="bilinear", align_corners=False))
        return PixelDecoderOutput(self.mask_projection(self.fusion(third, context)), pyramid)


__all__ = ["FaiM2FBiSeNetPixelDecoder", "FaiM2FPooledConvolution"]
