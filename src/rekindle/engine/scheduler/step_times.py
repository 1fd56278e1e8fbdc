"""How long steps take: a + b * prompt tokens + c * decoding sequences, fitted to the steps that were run."""

from __future__ import annotations

from rekindle.engine.scheduler.linear_model import LinearModel

_FIRST_GUESS = (0.01, 0.0005, 0.0005)
_SCALES = (1.0, 100.0, 10.0)


class StepTimes:
    """Times in seconds."""

    def __init__(self) -> None:
        self._model = LinearModel(_FIRST_GUESS, _SCALES)

    @property
    def prompt_token_s(self) -> float:
        """What one more prompt token adds to a step."""
        return self._model.coefficients[1]

    def note(self, num_prompt_tokens: int, num_decodes: int, duration_s: float) -> None:
        """A step of that many prompt tokens and decoding sequences took `duration_s`."""
        self._model.note((1.0, num_prompt_tokens, num_decodes), duration_s)

    def step_s(self, num_prompt_tokens: int, num_decodes: int) -> float:
        """How long such a step is likely to take."""
        return self._model.predict((1.0, num_prompt_tokens, num_decodes))
