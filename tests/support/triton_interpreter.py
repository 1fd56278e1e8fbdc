"""Where Triton's interpreter departs from its compiler, brought back in line."""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_MIN_DOT_SIZE = 16


def mend_dot() -> None:
    """Give `tl.dot` of the interpreter the right product of bfloat16 matrices, whose stored bits it takes for integers,
    and the compiler's refusal of matrices that are too small for tensor cores."""

    def create_dot(
        self: InterpreterBuilder, a: Any, b: Any, d: Any, precision: Any, max_imprecise: Any
    ) -> TensorHandle:
        rows, inner = a.data.shape[-2:]
        columns = b.data.shape[-1]
        if min(rows, inner, columns) < _MIN_DOT_SIZE:
            raise ValueError(
                f"tl.dot of [{rows}, {inner}] by [{inner}, {columns}]: no side may be under {_MIN_DOT_SIZE}"
            )
        return TensorHandle(np.matmul(_widened(a), _widened(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def _widened(handle: Any) -> np.ndarray:
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def mend_scalars() -> None:
    """Let tensors of one element bound loops: NumPy no longer turns arrays of one dimension into numbers."""
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend


def mend_rounding() -> None:
    """Round float32 to the nearest bfloat16, which the interpreter cuts off."""
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: InterpreterBuilder, source: Any, kind: Any) -> TensorHandle:
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cast(self, source, kind)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast_impl
