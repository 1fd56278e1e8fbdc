"""The choice of kernels for a device and a model."""

from __future__ import annotations

import logging
from collections.abc import Collection

from rekindle.engine.kernels.interface import AttentionShape, Kernels
from rekindle.engine.kernels.linear import BATCH_INVARIANT, FAST, PLAIN
from rekindle.engine.kernels.native_kernels import load_native
from rekindle.engine.kernels.reference import ReferenceKernels
from rekindle.engine.kernels.rowwise import RowwiseKernels
from rekindle.errors import ConfigurationError

_logger = logging.getLogger(__name__)


def select_cpu_kernels(shapes: Collection[AttentionShape], *, deterministic: bool) -> Kernels:
    """Native kernels where they were built and serve attention of these shapes, plain torch otherwise; batch-invariant
    ones if `deterministic`."""
    linear = BATCH_INVARIANT if deterministic else FAST
    native = load_native(linear, shapes)
    if native is not None:
        _logger.info("native kernels for %s", native.library.variant)
        return native
    _logger.warning(
        "no native kernels: everything runs in plain torch, which is much slower. Either the package was installed "
        "without a C++ compiler, or the model's head size is not a multiple of 8"
    )
    return RowwiseKernels(linear) if deterministic else ReferenceKernels(linear)


def select_gpu_kernels(*, deterministic: bool) -> Kernels:
    """Triton kernels; batch-invariant matrix products if `deterministic`.

    Raises:
        ConfigurationError: Triton is not installed.
    """
    try:
        from rekindle.engine.kernels.gpu.triton_kernels import TritonKernels
    except ImportError as error:
        raise ConfigurationError(f"a GPU needs Triton: {error}; install rekindle[gpu]") from error
    return TritonKernels(BATCH_INVARIANT if deterministic else PLAIN, deterministic=deterministic)
