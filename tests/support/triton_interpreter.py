"""Where Triton's interpreter departs from its compiler, brought back in line."""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_MIN_DOT_SIZE = 16


def mend_interpreter() -> None:
    """Make the interpreter

    - multiply bfloat16 matrices, whose stored bits it takes for integers, in `tl.dot`, and refuse there matrices too
      small for tensor cores, as the compiler does;
    - round to bfloat16 instead of cutting off;
    - accept scalars as bounds of `range` with NumPy 2.4 too;
    - prepare the language once for a launch instead of for each call of a function, which took most of the time.
    """
    cast, patch_tensor, patch_language = (
        InterpreterBuilder.cast_impl,
        interpreter._patch_lang_tensor,
        interpreter._patch_lang,
    )

    def cast_and_round(self: InterpreterBuilder, source: Any, to: Any) -> TensorHandle:
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16)
            return TensorHandle(rounded.numpy(), tl.bfloat16)
        return cast(self, source, to)

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def patch_language_once(fn: Any) -> Any:
        if _LaunchScope.is_active:
            return interpreter._LangPatchScope()
        return _LaunchScope(patch_language)

    InterpreterBuilder.cast_impl = cast_and_round
    InterpreterBuilder.create_dot = _create_dot
    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter._patch_lang = patch_language_once


class _LaunchScope:
    """The language as kernels and Triton's own library see it, prepared until `restore`."""

    is_active = False

    def __init__(self, patch_language: Any) -> None:
        self._scopes = [patch_language(_sees_language), patch_language(tl.standard.sum.fn)]
        _LaunchScope.is_active = True

    def restore(self) -> None:
        _LaunchScope.is_active = False
        for scope in reversed(self._scopes):
            scope.restore()


def _sees_language() -> None:
    """A function whose module knows `tl`, as that of a kernel does."""


def _create_dot(self: InterpreterBuilder, a: Any, b: Any, d: Any, precision: Any, max_imprecise: Any) -> TensorHandle:
    rows, inner = a.data.shape[-2:]
    columns = b.data.shape[-1]
    if min(rows, inner, columns) < _MIN_DOT_SIZE:
        raise ValueError(f"tl.dot of [{rows}, {inner}] by [{inner}, {columns}]: no side may be under {_MIN_DOT_SIZE}")
    return TensorHandle(np.matmul(_widened(a), _widened(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _widened(handle: Any) -> np.ndarray:
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)
