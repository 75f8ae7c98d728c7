"""A device that only pretends to be one, so that a machine without a GPU finds what would end a run on one.

Its tensors compute on the CPU and say that they lie elsewhere. As on a GPU, a tensor from here and one from elsewhere
do not mix, only scalars and indices do, and numpy sees nothing before `cpu()`. Every wait for the device is counted.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map

NAME = "elsewhere"
HERE = torch.device("cpu")
_MOVES = ("aten.copy_.default", "aten._to_copy.default", "aten.to.device", "aten.to.other")
_INDEXED = ("aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default")
# What cannot be queued, because its result is a number or a shape.
_WAITS = (
    "aten._local_scalar_dense.default", "aten.is_nonzero.default", "aten.equal.default", "aten.nonzero.default",
    "aten.masked_select.default", "aten._unique2.default",
)  # fmt: skip
waits: Counter[str] = Counter()  # by the line of the product that waited


class ElsewhereTensor(torch.Tensor):
    """A CPU tensor that says it lies elsewhere."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "ElsewhereTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """Of a copy: torch refuses it for subclasses."""
        return self.cpu().tolist()

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)  # files hold plain tensors

    def data_ptr(self) -> int:
        """A wrapper has no memory of its own."""
        return self.inner.data_ptr()


class Elsewhere(TorchDispatchMode):
    """While it is active, `torch.device("elsewhere")` works."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def register() -> torch.device:
    """Make the device known to torch, for the rest of this process."""
    module = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]
    backend_registration._setup_privateuseone_for_python_backend(NAME, module)
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=)` is made here and then moved
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # the memory of `.data` cannot change its device
    torch._VF.gru = _gru  # type: ignore[attr-defined]
    return torch.device(NAME, 0)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = str(func)
    flat = list(tree_iter((args, kwargs)))
    there = any(isinstance(x, ElsewhereTensor) for x in flat)
    devices = [x for x in flat if isinstance(x, torch.device)]
    to_there = devices[0].type == NAME if devices else there
    if there and name not in _MOVES:
        _refuse_mixed(name, [args[0], *args[2:]] if name in _INDEXED else flat)
    if there and (name in _WAITS or _by_mask(name, args) or (name in _MOVES and not _stays(name, args[0], to_there))):
        waits[_line_of_the_product()] += 1
    args, kwargs = tree_map(_inner, args), tree_map(_inner, kwargs)
    given = {id(_inner(x)): x for x in flat if isinstance(x, torch.Tensor)}
    with _disable_current_modes():
        out = _EMULATED.get(name, func)(*args, **kwargs)

    def outer(x: Any) -> Any:
        """What an operation did in place comes back as the very tensor that it was given."""
        if not _is_plain(x):
            return x
        before = given.get(id(x))
        if name == "aten.copy_.default" or (before is not None and isinstance(before, ElsewhereTensor) == to_there):
            return before
        return ElsewhereTensor(x) if to_there else x

    return tree_map(outer, out)


def _by_mask(name: str, args: Any) -> bool:
    """An index of bools is turned into numbers first, and how many they are must be known."""
    return name in _INDEXED and any(getattr(x, "dtype", None) == torch.bool for x in args[1])


def _stays(name: str, first: Any, to_there: bool) -> bool:
    return isinstance(first, ElsewhereTensor) if name == "aten.copy_.default" else to_there


def _is_plain(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and not isinstance(x, ElsewhereTensor)


def _inner(x: Any) -> Any:
    if isinstance(x, ElsewhereTensor):
        return x.inner
    return HERE if isinstance(x, torch.device) else x


def _refuse_mixed(name: str, values: Any) -> None:
    tensors = [
        x for x in tree_iter(values) if isinstance(x, torch.Tensor) and (x.dim() or isinstance(x, ElsewhereTensor))
    ]
    if len({type(x) is ElsewhereTensor for x in tensors}) > 1:
        found = ", ".join(f"{'elsewhere' if type(x) is ElsewhereTensor else 'here'} {tuple(x.shape)}" for x in tensors)
        raise RuntimeError(f"{name}: tensors on two devices: {found}")


def _line_of_the_product() -> str:
    frame: Any = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parts[-3:-2] == ("specauf",) or path.parent.name in ("specauf", "cache_builder"):
            return f"{path.parent.name}/{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


_VF_GRU = torch._VF.gru  # type: ignore[attr-defined]


def _gru(x: torch.Tensor, hx: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """torch turns the output around in place when batches come first, which a wrapper's shape does not follow."""
    *rest, batch_first = rest
    if not batch_first:
        return _VF_GRU(x, hx, *rest, False)  # type: ignore[no-any-return]
    out, last = _VF_GRU(x.transpose(0, 1), hx, *rest, False)
    return out.transpose(0, 1), last


def _gru_cell(
    input_gates: torch.Tensor, hidden_gates: torch.Tensor, hx: torch.Tensor, b_ih: Any = None, b_hh: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """GPUs have it as one kernel, CPUs do not; gates are reset, update, new."""
    i, h = input_gates + (0 if b_ih is None else b_ih), hidden_gates + (0 if b_hh is None else b_hh)
    (i_r, i_z, i_n), (h_r, h_z, h_n) = i.chunk(3, 1), h.chunk(3, 1)
    r, z = (i_r + h_r).sigmoid(), (i_z + h_z).sigmoid()
    n = (i_n + r * h_n).tanh()
    return (1 - z) * n + z * hx, torch.cat([r, z, n, hx, h_n], 1)


def _gru_cell_backward(grad: torch.Tensor, workspace: torch.Tensor, has_bias: bool) -> tuple[Any, ...]:
    r, z, n, hx, h_n = workspace.chunk(5, 1)
    new = grad * (1 - z) * (1 - n * n)
    update, reset = grad * (hx - n) * z * (1 - z), new * h_n * r * (1 - r)
    inputs, hidden = torch.cat([reset, update, new], 1), torch.cat([reset, update, new * r], 1)
    biases = (inputs.sum(0), hidden.sum(0)) if has_bias else (None, None)
    return inputs, hidden, grad * z, *biases


_EMULATED: dict[str, Callable[..., Any]] = {
    "aten._thnn_fused_gru_cell.default": _gru_cell,
    "aten._thnn_fused_gru_cell_backward.default": _gru_cell_backward,
}
