"""The layers of a block drafter: Qwen3 layers whose keys and values also come from context rows."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specauf.drafters.attention import Attend
from specauf.drafters.config import DrafterConfig
from specauf.linear import Linear

Rotation = tuple[Float[Tensor, "*rows head_dim"], Float[Tensor, "*rows head_dim"]]
KeyValue = tuple[Float[Tensor, "tokens kv_heads head_dim"], Float[Tensor, "tokens kv_heads head_dim"]]


def rotation(positions: Int[Tensor, "*rows"], head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Cosines and sines of the rotary embedding over the whole head (NeoX halves), computed in fp32."""
    index = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() * theta ** (-index / head_dim)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Float[Tensor, "*rows heads head_dim"], by: Rotation) -> Float[Tensor, "*rows heads head_dim"]:
    """Turn each pair (i, i + head_dim/2) of every head by its position's angle."""
    cos, sin = by[0].unsqueeze(-2), by[1].unsqueeze(-2)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class BlockAttention(nn.Module):
    """Self-attention of a block with the same key and value projections for the context's rows."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        self.head_dim = head_dim
        self.q_proj = Linear(hidden, config.num_attention_heads * head_dim, bias=False)
        self.k_proj = Linear(hidden, config.num_key_value_heads * head_dim, bias=False)
        self.v_proj = Linear(hidden, config.num_key_value_heads * head_dim, bias=False)
        self.o_proj = Linear(config.num_attention_heads * head_dim, hidden, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)

    def key_value(self, rows: Float[Tensor, "*rows hidden"], by: Rotation) -> tuple[Tensor, Tensor]:
        """Keys (normed and rotated) and values of some rows."""
        heads = (*rows.shape[:-1], -1, self.head_dim)
        value = self.v_proj(rows).view(heads)
        return rotate(self.k_norm(self.k_proj(rows).view(heads)), by).to(value.dtype), value

    def project(self, rows: Float[Tensor, "*rows hidden"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (normed, not yet rotated) and values of some rows."""
        heads = (*rows.shape[:-1], -1, self.head_dim)
        query, key = self.q_norm(self.q_proj(rows).view(heads)), self.k_norm(self.k_proj(rows).view(heads))
        return query, key, self.v_proj(rows).view(heads)

    def forward(
        self,
        x: Float[Tensor, "blocks some hidden"],
        by: Rotation,
        context: KeyValue,
        attend: Attend,
        *,
        masks_alike: bool = False,
        drafted_only: bool = False,
    ) -> Float[Tensor, "blocks out hidden"]:
        """Attention output of the block's slots; see `BlockLayer.forward`."""
        query, key, value = self.project(x)
        if masks_alike:
            block = by[0].shape[1]
            query, key, value = (spread(t, block) for t in (query, key, value))
        first = 1 if drafted_only else 0
        query = rotate(query[:, first:], (by[0][:, first:], by[1][:, first:]))
        # Autocast norms in fp32; attention wants one type.
        query, key = query.to(value.dtype), rotate(key, by).to(value.dtype)
        return self.o_proj(attend(query, *context, key, value).flatten(2))


def spread(x: Float[Tensor, "blocks 2 *rest"], block: int) -> Float[Tensor, "blocks block *rest"]:
    """Repeat the second slot until the block is full."""
    return torch.cat([x[:, :1], x[:, 1:].expand(-1, block - 1, *x.shape[2:])], dim=1)


class GatedMlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """down(silu(gate(x)) * up(x))."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class BlockLayer(nn.Module):
    """Pre-norm decoder layer over the slots of blocks; context rows enter as keys and values only."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.self_attn = BlockAttention(config)
        self.mlp = GatedMlp(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        x: Float[Tensor, "blocks some hidden"],
        by: Rotation,
        context: KeyValue,
        attend: Attend,
        masks_alike: bool = False,
        drafted_only: bool = False,
    ) -> Float[Tensor, "blocks out hidden"]:
        """The layer's output for the block's slots.

        Args:
            x: hidden states of the slots.
            by: rotation of the slots' positions.
            context: keys and values of the context rows.
            attend: which of them each block sees.
            masks_alike: the mask slots still hold one and the same row, as they do in the first layer, and `x` has two
                slots: the anchor's and that row.
            drafted_only: leave out the anchor slot's output, which nobody reads behind the last layer.
        """
        mixed = self.self_attn(
            self.input_layernorm(x), by, context, attend, masks_alike=masks_alike, drafted_only=drafted_only
        )
        x = (spread(x, by[0].shape[1]) if masks_alike else x)[:, 1 if drafted_only else 0 :] + mixed
        return x + self.mlp(self.post_attention_layernorm(x))


def initialise(module: nn.Module, std: float) -> None:
    """Qwen3's start: every matrix normal(0, std), every norm 1."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        elif isinstance(part, nn.GRU):
            for weight in part.parameters():
                nn.init.normal_(weight, std=std)
