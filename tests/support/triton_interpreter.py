"""Where Triton's interpreter departs from its compiler, brought back in line."""

from typing import Any

import numpy as np
import triton.language as tl
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
