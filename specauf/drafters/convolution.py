"""DFlash 2's short convolutions along the slots of a block."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from specauf.drafters.attention import Attend
from specauf.drafters.blocks import BlockLayer, KeyValue, Rotation, spread
from specauf.drafters.config import DrafterConfig
from specauf.linear import Linear


def convolve(
    x: Float[Tensor, "blocks slots hidden"],
    dynamic: Float[Tensor, "blocks slots taps groups"],
    base: Float[Tensor, "taps hidden"],
) -> Float[Tensor, "blocks slots hidden"]:
    """Each slot's weighted sum of itself and those before it in the block; nothing stands before the anchor's.

    Args:
        x: hidden states.
        dynamic: added to the kernel of each group of channels that lie together.
        base: the kernel of each channel.
    """
    grouped = x.unflatten(-1, (dynamic.shape[-1], -1))
    kernel = base.to(x.dtype).view(len(base), *grouped.shape[2:]) + dynamic[..., None]
    out = kernel[:, :, 0] * grouped
    for tap in range(1, min(len(base), x.shape[1])):
        before = nn.functional.pad(grouped[:, :-tap], (0, 0, 0, 0, tap, 0))
        out = out + kernel[:, :, tap] * before
    return out.flatten(-2)


class BlockConv(nn.Module):
    """The convolutions before and behind one sublayer, whose dynamic kernels come from what the first one reads.

    Args:
        hidden: channels.
        taps: slots that a convolution reads, its own included.
        group: channels that share the dynamic part of a kernel.
    """

    def __init__(self, hidden: int, taps: int, group: int) -> None:
        super().__init__()
        # At first everything passes unchanged, as in DFlash.
        self.base_kernel = nn.Parameter(torch.zeros(2, taps, hidden))
        nn.init.ones_(self.base_kernel[:, 0])
        self.kernel_projection = Linear(hidden, 2 * taps * (hidden // group), bias=False)
        nn.init.zeros_(self.kernel_projection.weight)

    def before(self, x: Float[Tensor, "blocks slots hidden"]) -> tuple[Tensor, Tensor]:
        """What the sublayer reads, and the dynamic kernel for its output."""
        dynamic = self.kernel_projection(x).unflatten(-1, (2, self.base_kernel.shape[1], -1))
        return convolve(x, dynamic[:, :, 0], self.base_kernel[0]), dynamic[:, :, 1]

    def behind(self, x: Float[Tensor, "blocks slots hidden"], dynamic: Tensor) -> Float[Tensor, "blocks slots hidden"]:
        """The sublayer's output, convolved."""
        return convolve(x, dynamic, self.base_kernel[1])


class ConvLayer(BlockLayer):
    """A block layer with convolutions around attention and MLP.

    Args:
        config: of the drafter.
        taps: see `BlockConv`.
        group: see `BlockConv`.
    """

    def __init__(self, config: DrafterConfig, taps: int, group: int) -> None:
        super().__init__(config)
        self.attention_conv = BlockConv(config.hidden_size, taps, group)
        self.mlp_conv = BlockConv(config.hidden_size, taps, group)

    def forward(
        self,
        x: Float[Tensor, "blocks some hidden"],
        by: Rotation,
        context: KeyValue,
        attend: Attend,
        masks_alike: bool = False,
        drafted_only: bool = False,
    ) -> Float[Tensor, "blocks out hidden"]:
        """See `BlockLayer.forward`; all slots go through it, for each is read by the one behind it."""
        x = spread(x, by[0].shape[1]) if masks_alike else x
        mixed, dynamic = self.attention_conv.before(self.input_layernorm(x))
        x = x + self.attention_conv.behind(self.self_attn(mixed, by, context, attend), dynamic)
        mixed, dynamic = self.mlp_conv.before(self.post_attention_layernorm(x))
        x = x + self.mlp_conv.behind(self.mlp(mixed), dynamic)
        return x[:, 1:] if drafted_only else x
