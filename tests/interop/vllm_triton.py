"""Triton's kernels on a CPU, for vLLM: import before it, with TRITON_INTERPRET=1 in the environment.

vLLM's newer model runner, which GPUs get and which alone runs DFlash 2, is made of Triton kernels. On a CPU vLLM takes
it where Triton has a backend for CPUs, which its releases have not. Triton's interpreter runs all kernels in NumPy
instead; that is what the backend named here stands for.
"""

from triton.backends import Backend, backends
from triton.backends.compiler import BaseBackend
from triton.backends.driver import DriverBase
from triton.runtime import interpreter


class Compiler(BaseBackend):
    """Never asked."""


class Driver(DriverBase):
    """Never asked but for this."""

    @staticmethod
    def is_active() -> bool:
        return False


def boolean(mask: interpreter.TensorHandle) -> interpreter.TensorHandle:
    """The interpreter makes numbers of a mask that is the `and` of one for a block and one for all of it."""
    return interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)


Builder = interpreter.InterpreterBuilder
load, store = Builder.create_masked_load, Builder.create_masked_store
Builder.create_masked_load = lambda self, at, mask, *more: load(self, at, boolean(mask), *more)
Builder.create_masked_store = lambda self, at, value, mask, *more: store(self, at, value, boolean(mask), *more)
backends["cpu"] = Backend(Compiler, Driver)
