"""Rotary position embedding and its scalings: none, linear, dynamic, llama3, yarn.

`dynamic` stretches the base only beyond the trained length, and a replica serves no context longer than that, so it
equals no scaling here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rekindle.errors import ModelRejected

_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Rope:
    """Angles of one rotary embedding: `theta` is the base, `dim` the rotated size of a head."""

    theta: float
    dim: int
    max_positions: int
    scaling: Mapping[str, Any] = field(default_factory=dict)

    def table(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, float32 [num_positions, dim / 2]."""
        inverse, magnitude = self._frequencies()
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inverse)
        return angles.cos() * magnitude, angles.sin() * magnitude

    def _frequencies(self) -> tuple[torch.Tensor, float]:
        exponents = torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim
        inverse = 1.0 / (self.theta**exponents)
        match rope_type(self.scaling):
            case "linear":
                return inverse / float(self.scaling["factor"]), 1.0
            case "llama3":
                return self._llama3(inverse), 1.0
            case "yarn":
                return self._yarn(inverse)
            case _:
                return inverse, 1.0

    def _llama3(self, inverse: torch.Tensor) -> torch.Tensor:
        """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
        factor = float(self.scaling["factor"])
        low, high = float(self.scaling["low_freq_factor"]), float(self.scaling["high_freq_factor"])
        trained = float(self.scaling["original_max_position_embeddings"])
        wavelength = 2 * math.pi / inverse
        smooth = (trained / wavelength - low) / (high - low)
        between = (1 - smooth) * inverse / factor + smooth * inverse
        stretched = torch.where(wavelength > trained / low, inverse / factor, inverse)
        is_between = (wavelength >= trained / high) & (wavelength <= trained / low)
        return torch.where(is_between, between, stretched)

    def _yarn(self, inverse: torch.Tensor) -> tuple[torch.Tensor, float]:
        """YaRN (arXiv 2309.00071): interpolate by wavelength between two bounds and scale attention."""
        scaling = self.scaling
        trained = float(scaling.get("original_max_position_embeddings") or self.max_positions)
        factor = float(scaling.get("factor") or self.max_positions / trained)
        low = self._yarn_dimension(float(scaling.get("beta_fast") or 32), trained)
        high = self._yarn_dimension(float(scaling.get("beta_slow") or 1), trained)
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        ramp = (torch.arange(self.dim // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
        keep = 1 - ramp.clamp(0, 1)
        return inverse / factor * (1 - keep) + inverse * keep, _yarn_magnitude(scaling, factor)

    def _yarn_dimension(self, num_rotations: float, trained: float) -> float:
        return self.dim * math.log(trained / (num_rotations * 2 * math.pi)) / (2 * math.log(self.theta))


def rope_type(scaling: Mapping[str, Any]) -> str:
    """The scaling's name; raises `ModelRejected` for one that is not built."""
    name = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if name not in _ROPE_TYPES:
        raise ModelRejected(f"rope scaling {name!r} is not supported; supported: {', '.join(_ROPE_TYPES)}")
    return name


def _yarn_magnitude(scaling: Mapping[str, Any], factor: float) -> float:
    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    explicit = scaling.get("attention_factor")
    if explicit is not None:
        return float(explicit)
    weight, weight_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if weight and weight_all:
        return magnitude(float(weight)) / magnitude(float(weight_all))
    return magnitude(1.0)
