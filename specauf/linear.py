"""Linear layers that use oneDNN on x86 CPUs in fp32, where torch's own take MKL: see "Matrix products" in decisions."""

import platform
import weakref
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# The operator that torch.compile uses for the same purpose; Arm's builds take oneDNN by themselves.
AVAILABLE = (
    torch.backends.mkldnn.is_available()
    and platform.machine().lower() in {"x86_64", "amd64"}
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)

# MKL uses AVX-512 only on Intel's CPUs, and falls behind on others that have it. Where none has, its products of a
# backward pass are the faster ones.
AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")

# Weights with fewer numbers stay with torch's own: there a product takes less time than finding oneDNN's kernel for it,
# and much less than compiling one, which every new number of rows costs anew.
SMALL = 1 << 16
PACKED_BYTES = 4 << 30  # a packed weight is a second copy; larger models go without
# By address, for tied weights share one: the parameter it was made for, that one's version then, and the packed weight.
_packed: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}


def linear(
    x: Float[Tensor, "*rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
) -> Float[Tensor, "*rows outputs"]:
    """`torch.nn.functional.linear`, with its gradients, faster on CPUs that MKL does not favour."""
    if not _takes_onednn(x, weight):
        return nn.functional.linear(x, weight, bias)
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _product(x, _layout(weight), bias)
    product: Tensor = _OneDnn.apply(x, weight, bias)
    return product


class Linear(nn.Linear):
    """`torch.nn.Linear` through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Product with the transposed weight, plus the bias."""
        return linear(x, self.weight, self.bias)


def bfloat16_is_fast(device: torch.device | str) -> bool:
    """Whether products in bfloat16 take less time than in float32: on all devices but CPUs without AVX-512 or its like.

    There they take several times to a hundred times as long. GPUs older than Ampere only emulate them.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return kind != "cpu" or bool(supported())


def use_onednn(model: nn.Module) -> None:
    """Turn a model's plain `nn.Linear` layers into `Linear`, in place, and keep frozen weights in oneDNN's own layout.

    Names and weights stay. With few rows, as in decoding, the layout alone makes a product up to three times as fast.
    Torch does not tell of changes through a frozen weight's `.data`: call this again after one.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for module in layers:
        if type(module) is nn.Linear:
            module.__class__ = Linear
    if sum(module.weight.nbytes for module in layers) <= PACKED_BYTES:
        for module in layers:
            _pack(module.weight)


def _pack(weight: Tensor) -> None:
    if weight.requires_grad or weight.is_inference() or not weight.numel() or not _takes_onednn(weight, weight):
        return
    at, owner = weight.data_ptr(), weakref.ref(weight)
    _packed[at] = (owner, weight._version, torch.ops.mkldnn._reorder_linear_weight(weight.detach()))
    weakref.finalize(weight, _forget, at, owner)


def _forget(at: int, owner: weakref.ref[Tensor]) -> None:
    if at in _packed and _packed[at][0] is owner:
        del _packed[at]


def _layout(weight: Tensor) -> Tensor:
    """The packed weight, as long as it is the weight's."""
    found = _packed.get(weight.data_ptr())
    owner = None if found is None else found[0]()
    if (
        found is None
        or owner is None
        or owner.data_ptr() != weight.data_ptr()  # it has moved, and its memory is anybody's
        or (owner.shape, owner.stride()) != (weight.shape, weight.stride())
        or weight.is_inference()  # tensors made in inference mode count no versions, and so are never packed
        or found[1] != weight._version
    ):
        return _without_gaps(weight)
    return found[2]


def _without_gaps(weight: Tensor) -> Tensor:
    """For weights that lie apart, as a slice's rows do, oneDNN has only a reference, a thousand times slower."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        AVAILABLE
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and weight.numel() >= SMALL
        and x.numel() > 0
        # Tensors of FSDP, FakeTensors and the like know only torch's own operators.
        and type(x) in (Tensor, nn.Parameter)
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class _OneDnn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, _layout(weight), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grad.contiguous()  # a sum's gradient is one number, seen everywhere
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        if AVX512:
            to_x = _product(grad, _without_gaps(weight).t()) if needs_x else None
            to_weight = _product(rows.t(), _without_gaps(inputs).t()) if needs_weight else None
        else:
            to_x = grad @ weight if needs_x else None
            to_weight = rows.t() @ inputs if needs_weight else None
        return to_x, to_weight, rows.sum(0) if needs_bias else None
