"""How long steps take: a + b * prompt tokens + c * decoding sequences, fitted to the steps that were run."""

from __future__ import annotations

from rekindle.engine.scheduler.linear_fit import LinearFit


class StepTimes:
    """Times in seconds."""

    def __init__(self) -> None:
        self._fit = LinearFit(guess=(0.01, 0.0005, 0.0005), scales=(1.0, 100.0, 10.0))

    @property
    def prompt_token_s(self) -> float:
        """What one more prompt token adds to a step."""
        return self._fit.coefficients[1]

    def note(self, num_prompt_tokens: int, num_decodes: int, duration_s: float) -> None:
        """A step of that many prompt tokens and decoding sequences took `duration_s`."""
        self._fit.note((1.0, num_prompt_tokens, num_decodes), duration_s)

    def step_s(self, num_prompt_tokens: int, num_decodes: int) -> float:
        """How long such a step is likely to take."""
        return self._fit.predict((1.0, num_prompt_tokens, num_decodes))
