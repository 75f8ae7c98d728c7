"""A drafter that needs no target features: a causal encoder over the tokens makes its context rows.

For caches of sparse log-probs alone (`features: none`), and for targets whose hidden states nobody can have. The block
layers are DFlash's; only where the context rows come from differs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from specauf.drafters.base import Drafter
from specauf.drafters.blocks import BlockAttention, GatedMlp, Rotation, rotate
from specauf.drafters.config import DrafterConfig
from specauf.drafters.memory import ContextMemory
from specauf.drafters.vocabulary import TargetVocabulary
from specauf.errors import UserError

# Queries, keys and values of some rows -> what each row reads.
Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MaskedConfig(DrafterConfig):
    """Shape of a drafter without features.

    Attributes:
        num_encoder_layers: causal layers over the tokens.
    """

    num_encoder_layers: int = 2

    def __post_init__(self) -> None:
        """Refuse features, and no encoder."""
        super().__post_init__()
        if self.taps or self.feature_dim:
            raise UserError(
                f"taps: {list(self.taps)} with {self.feature_dim} features a token found, none expected by the masked "
                "drafter; train DRAFTER=dflash to use features"
            )
        if self.num_encoder_layers < 1:
            raise UserError(f"num_encoder_layers: {self.num_encoder_layers} found, at least 1 expected")


class EncoderLayer(nn.Module):
    """A causal pre-norm layer over tokens.

    Args:
        config: the drafter's shape.
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.self_attn = BlockAttention(config)
        self.mlp = GatedMlp(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Float[Tensor, "*rows hidden"], by: Rotation, mix: Mix) -> Float[Tensor, "*rows hidden"]:
        """The layer's output; `mix` says which rows each row reads."""
        query, key, value = self.self_attn.project(self.input_layernorm(x))
        mixed = mix(rotate(query, by), rotate(key, by), value)
        x = x + self.self_attn.o_proj(mixed.flatten(-2))
        return x + self.mlp(self.post_attention_layernorm(x))


class MaskedDrafter(Drafter):
    """Causal encoder over the committed tokens, then DFlash's layers over the masked block.

    Context row of a token: `context_norm(encoder(tokens up to it))`.

    Args:
        config: its shape.
        activation_checkpointing: recompute layers in the backward pass.
    """

    name = "masked"
    config_class = MaskedConfig
    needs_features = False

    def __init__(self, config: DrafterConfig, *, activation_checkpointing: bool = False) -> None:
        assert isinstance(config, MaskedConfig)
        super().__init__(config, activation_checkpointing=activation_checkpointing)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_encoder_layers))
        self.context_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.reset_parameters()

    def context_rows(
        self,
        tokens: Int[Tensor, " tokens"],
        positions: Int[Tensor, " tokens"],
        doc_offsets: Int[Tensor, " docs_plus_1"],
        features: Float[Tensor, "tokens features"] | None,
        vocabulary: TargetVocabulary,
    ) -> Float[Tensor, "tokens hidden"]:
        """Encode every document on its own."""
        sizes = doc_offsets.diff().tolist()

        def mix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            parts = zip(query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
            return torch.cat([_attend(q[None], k[None], v[None], None)[0] for q, k, v in parts])

        x = vocabulary.embed(tokens).to(self.norm.weight.dtype)
        by = self._rotation(positions)
        for layer in self.encoder:
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, x, by, mix, use_reentrant=False)
            else:
                x = layer(x, by, mix)
        return self.context_norm(x)

    def next_context_rows(
        self,
        memory: ContextMemory,
        tokens: Int[Tensor, "prompts rows"],
        positions: Int[Tensor, "prompts rows"],
        features: Float[Tensor, "prompts rows features"] | None,
        vocabulary: TargetVocabulary,
    ) -> Float[Tensor, "prompts rows hidden"]:
        """Encode tokens behind those in memory, which also holds the encoder's keys and values."""
        x = vocabulary.embed(tokens).to(self.norm.weight.dtype)
        by = self._rotation(positions)
        for number, layer in enumerate(self.encoder, start=len(self.layers)):

            def mix(query: Tensor, key: Tensor, value: Tensor, number: int = number) -> Tensor:
                memory.append(number, key, value)
                keys, values = memory.rows(number)
                column = torch.arange(keys.shape[1], device=keys.device)
                return _attend(query, keys, values, column <= positions[..., None])

            x = layer(x, by, mix)
        return self.context_norm(x)


def _attend(
    query: Float[Tensor, "prompts rows heads head_dim"],
    key: Float[Tensor, "prompts columns kv_heads head_dim"],
    value: Float[Tensor, "prompts columns kv_heads head_dim"],
    mask: Bool[Tensor, "prompts rows columns"] | None,
) -> Float[Tensor, "prompts rows heads head_dim"]:
    """Attention under a mask, causal without one."""
    share = query.shape[2] // key.shape[2]
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    shown = None if mask is None else mask[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=shown, is_causal=mask is None).transpose(1, 2)
