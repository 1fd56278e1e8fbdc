"""Native CPU kernels (being built: nothing to load yet)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rekindle.engine.kernels.interface import Kernels, PackedLinear


def load_native(linear_factory: Callable[[torch.Tensor, torch.Tensor | None], PackedLinear]) -> Kernels | None:
    """The native kernels, or None where they were not built."""
    return None
