"""The transformer decoder with masked attention (Cheng et al., Mask2Former, CVPR 2022, section 3.2)."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_faim2f import FaiM2FAttention, LearnedTable, sine_position_embedding
from .configuration_faim2f import FaiM2FConfig
from .point_sampling_faim2f import MaskProduct

# Far above the difference of any two scores, so that a masked key gets weight 0, and within the range of float16.
MASKED = 2.0**15


@dataclass
class DecoderOutput:
    """The output of the transformer decoder."""

    class_logits: Tensor  # (B, Q, C + 1), after the last layer
    mask_logits: Tensor  # (B, Q, H/4, W/4), after the last layer; H/8 and W/8 in BiSeNetFormer
    mask_product: MaskProduct  # the factors of `mask_logits`
    intermediate: list[tuple[Tensor, MaskProduct]]  # class logits and masks before each layer; empty unless requested
    hidden_states: list[Tensor]  # the queries (B, Q, hidden_dim) before the first and after each layer
    self_attentions: list[Tensor]  # (B, heads, Q, Q) per layer
    cross_attentions: list[Tensor]  # (B, heads, Q, h * w) per layer


class FaiM2FDecoderLayer(GradientCheckpointingLayer):
    """Masked cross-attention, self-attention and feed-forward network, each pre-norm or post-norm."""

    def __init__(self, config: FaiM2FConfig) -> None:
        super().__init__()
        size = config.hidden_dim
        self.pre_norm = config.pre_norm
        self.cross_attention_norm = nn.LayerNorm(size)
        self.cross_attention = FaiM2FAttention(config, size, config.num_attention_heads, config.dropout)
        self.self_attention_norm = nn.LayerNorm(size)
        self.self_attention = FaiM2FAttention(config, size, config.num_attention_heads, config.dropout)
        self.feed_forward_norm = nn.LayerNorm(size)
        self.linear1 = nn.Linear(size, config.dim_feedforward)
        self.activation = ACT2FN[config.activation_function]
        self.linear2 = nn.Linear(config.dim_feedforward, size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        queries: Tensor,
        query_position: Tensor,
        level: Tensor,
        level_with_position: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """
        Args:
            queries: (B, Q, hidden_dim); query_position: (Q, hidden_dim).
            level: (B, hw, hidden_dim), the values.
            level_with_position: the keys, `level` plus position embedding.
            attention_mask: (B, 1, Q, hw), added to the scores of the cross-attention.

        Returns:
            The queries, and the weights of self- and cross-attention, None unless `output_attentions`.
        """
        normed = self._before(self.cross_attention_norm, queries) + query_position
        attended, cross_weights = self.cross_attention(
            normed, level_with_position, level, attention_mask, output_attentions
        )
        queries = self._behind(self.cross_attention_norm, queries + self.dropout(attended))
        normed = self._before(self.self_attention_norm, queries)
        placed = normed + query_position
        attended, self_weights = self.self_attention(placed, placed, normed, None, output_attentions)
        queries = self._behind(self.self_attention_norm, queries + self.dropout(attended))
        normed = self._before(self.feed_forward_norm, queries)
        inner = self.dropout(self.activation(self.linear1(normed)))
        queries = self._behind(self.feed_forward_norm, queries + self.dropout(self.linear2(inner)))
        return queries, self_weights, cross_weights

    def _before(self, norm: nn.LayerNorm, queries: Tensor) -> Tensor:
        return norm(queries) if self.pre_norm else queries

    def _behind(self, norm: nn.LayerNorm, queries: Tensor) -> Tensor:
        return queries if self.pre_norm else norm(queries)


class FaiM2FMaskEmbedder(nn.Module):
    """MLP of three layers from a query to its mask embedding."""

    def __init__(self, config: FaiM2FConfig) -> None:
        super().__init__()
        size = config.hidden_dim
        self.layers = nn.ModuleList(
            [nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, config.mask_feature_size)]
        )

    def forward(self, queries: Tensor) -> Tensor:
        """(B, Q, hidden_dim) to (B, Q, mask_feature_size)."""
        for layer in self.layers[:-1]:
            queries = nn.functional.relu(layer(queries))
        return self.layers[-1](queries)


class FaiM2FTransformerDecoder(nn.Module):
    """Learned queries attend to the pyramid's levels in turn, each query only within its current mask."""

    def __init__(self, config: FaiM2FConfig) -> None:
        super().__init__()
        size = config.hidden_dim
        self.query_features = LearnedTable(config.num_queries, size)
        self.query_position = LearnedTable(config.num_queries, size)
        levels = config.num_feature_levels  # without the levels that a decoder with few layers never reads
        projects = config.enforce_input_projection or config.feature_size != size
        self.input_projections = nn.ModuleList(
            [nn.Conv2d(config.feature_size, size, 1) if projects else nn.Identity() for _ in range(levels)]
        )
        self.level_embedding = LearnedTable(levels, size) if config.use_level_embedding else None
        self.layers = nn.ModuleList([FaiM2FDecoderLayer(config) for _ in range(config.decoder_layers)])
        self.norm = nn.LayerNorm(size)
        self.class_predictor = nn.Linear(size, config.num_labels + 1)
        self.mask_embedder = FaiM2FMaskEmbedder(config)

    def _embed(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The normalized queries for the class predictor, and mask embeddings (B, Q, mask_feature_size)."""
        normed = self.norm(queries)
        return normed, self.mask_embedder(normed)

    @staticmethod
    def _attention_mask(embedding: Tensor, level_mask_features: Tensor) -> Tensor:
        """(B, 1, Q, hw), for the attention's scores: 0 where the query may attend, `-MASKED` elsewhere.

        A query may attend where its mask logit is at least 0, and everywhere if its mask is empty.
        `level_mask_features` are the mask features resized to the level. Resizing is linear and commutes with the
        product with the embedding, so no full-size masks need to be computed and resized in each layer.
        """
        logits = MaskProduct(embedding.detach(), level_mask_features).flat()
        # On CPUs, comparisons of all logits, and `where`, would take longer than the attention itself. ONNX Runtime's
        # WebGPU lacks `sign`.
        some = (logits.amax(-1, keepdim=True) >= 0).to(logits.dtype)
        return (logits.clamp(-1, 0).floor() * (some * MASKED))[:, None]

    def forward(
        self,
        pyramid: list[Tensor],
        mask_features: Tensor,
        intermediate: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> DecoderOutput:
        """
        Args:
            pyramid: (B, feature_size, h, w) each, coarse to fine.
            mask_features: (B, mask_feature_size, H/4, W/4), or H/8 and W/8.
            intermediate: also return the predictions before each layer, for deep supervision.
        """
        levels: list[Tensor] = []
        placed_levels, level_mask_features = [], []
        level_embedding = None if self.level_embedding is None else self.level_embedding()
        for projection, features in zip(self.input_projections, pyramid, strict=False):
            size = features.shape[-2:]
            level = projection(features)
            position = sine_position_embedding(level)
            level = level.flatten(2).transpose(1, 2)  # (B, hw, hidden_dim)
            if level_embedding is not None:
                level = level + level_embedding[len(levels)]
            levels.append(level)
            placed_levels.append(level + position)
            resized = nn.functional.interpolate(mask_features.detach(), size=size, mode="bilinear", align_corners=False)
            level_mask_features.append(resized)

        query_position = self.query_position()
        queries = self.query_features().expand(mask_features.shape[0], -1, -1)  # (B, Q, hidden_dim)
        predictions: list[tuple[Tensor, MaskProduct]] = []
        states: list[Tensor] = []
        self_attentions: list[Tensor] = []
        cross_attentions: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                states.append(queries)
            normed, embedding = self._embed(queries)
            if intermediate:
                predictions.append((self.class_predictor(normed), MaskProduct(embedding, mask_features)))
            which = index % len(levels)
            mask = self._attention_mask(embedding, level_mask_features[which])
            queries, self_weights, cross_weights = layer(
                queries, query_position, levels[which], placed_levels[which], mask, output_attentions
            )
            if output_attentions:
                self_attentions.append(self_weights)
                cross_attentions.append(cross_weights)
        if output_hidden_states:
            states.append(queries)
        normed, embedding = self._embed(queries)
        product = MaskProduct(embedding, mask_features)
        return DecoderOutput(
            self.class_predictor(normed),
            product.full(),
            product,
            predictions,
            states,
            self_attentions,
            cross_attentions,
        )


__all__ = ["DecoderOutput", "FaiM2FTransformerDecoder"]
