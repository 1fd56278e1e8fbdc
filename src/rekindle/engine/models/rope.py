"""Rotary position embedding and its scalings: none, linear, dynamic, llama3, yarn.

`dynamic` stretches the base only beyond the trained length, and a replica serves no context longer than that, so it
equals no scaling here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Rope:
    """Angles of one rotary embedding: `dim` is the rotated size of a head, `parameters` a record of
    `rekindle.store.model_config`."""

    dim: int
    parameters: Mapping[str, Any]

    def table(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, float32 [num_positions, dim / 2]."""
        inverse, magnitude = self._frequencies()
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inverse)
        return angles.cos() * magnitude, angles.sin() * magnitude

    def _frequencies(self) -> tuple[torch.Tensor, float]:
        exponents = torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim
        inverse = 1.0 / (float(self.parameters["rope_theta"]) ** exponents)
        match self.parameters["rope_type"]:
            case "linear":
                return inverse / float(self.parameters["factor"]), 1.0
            case "llama3":
                return self._llama3(inverse), 1.0
            case "yarn":
                return self._yarn(inverse)
            case _:
                return inverse, 1.0

    def _llama3(self, inverse: torch.Tensor) -> torch.Tensor:
        """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
        parameters = self.parameters
        factor, trained = float(parameters["factor"]), float(parameters["original_max_position_embeddings"])
        low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
        wavelength = 2 * math.pi / inverse
        smooth = (trained / wavelength - low) / (high - low)
        between = (1 - smooth) * inverse / factor + smooth * inverse
        stretched = torch.where(wavelength > trained / low, inverse / factor, inverse)
        is_between = (wavelength >= trained / high) & (wavelength <= trained / low)
        return torch.where(is_between, between, stretched)

    def _yarn(self, inverse: torch.Tensor) -> tuple[torch.Tensor, float]:
        """YaRN (arXiv 2309.00071): interpolate by wavelength between two bounds and scale attention."""
        parameters = self.parameters
        factor, trained = float(parameters["factor"]), float(parameters["original_max_position_embeddings"])
        low = self._yarn_dimension(float(parameters.get("beta_fast") or 32), trained)
        high = self._yarn_dimension(float(parameters.get("beta_slow") or 1), trained)
        if parameters.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        ramp = (torch.arange(self.dim // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
        keep = 1 - ramp.clamp(0, 1)
        return inverse / factor * (1 - keep) + inverse * keep, _yarn_magnitude(parameters, factor)

    def _yarn_dimension(self, num_rotations: float, trained: float) -> float:
        theta = float(self.parameters["rope_theta"])
        return self.dim * math.log(trained / (num_rotations * 2 * math.pi)) / (2 * math.log(theta))


def _yarn_magnitude(parameters: Mapping[str, Any], factor: float) -> float:
    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    explicit = parameters.get("attention_factor")
    if explicit is not None:
        return float(explicit)
    weight, weight_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if weight and weight_all:
        return magnitude(float(weight)) / magnitude(float(weight_all))
    return magnitude(1.0)
