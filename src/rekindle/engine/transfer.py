"""Small tensors of numbers that the host has just worked out, on their way to the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The numbers, or the rows of numbers, as a tensor on the device. The host does not wait for a GPU to take them."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
