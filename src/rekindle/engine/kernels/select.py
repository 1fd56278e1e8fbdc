"""The choice of kernels for this machine."""

from __future__ import annotations

from rekindle.engine.kernels.interface import Kernels
from rekindle.engine.kernels.linear import pack_linear, pack_tiled_linear
from rekindle.engine.kernels.native_kernels import load_native
from rekindle.engine.kernels.reference import ReferenceKernels
from rekindle.engine.kernels.rowwise import RowwiseKernels


def select_kernels(deterministic: bool) -> Kernels:
    """Native kernels where they were built, plain torch otherwise; batch-invariant ones if `deterministic`."""
    factory = pack_tiled_linear if deterministic else pack_linear
    native = load_native(factory)
    if native is not None:
        return native
    return RowwiseKernels(factory) if deterministic else ReferenceKernels(factory)
