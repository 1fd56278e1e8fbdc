"""How long steps take: a linear model fitted to the steps that were run.

A step's time is taken for a + b * prompt tokens + c * decoding sequences. The three are fitted by least squares over
all steps so far, those of long ago counting less and less, with a weak pull towards a first guess that keeps them
defined while steps are few or all alike. A step counts as no slower than `_MOST_SLOWER` times what was expected of it,
so that one that stood still does not pass for what a token costs.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

_FIRST_GUESS = (0.01, 0.0005, 0.0005)
_SCALES = (1.0, 100.0, 10.0)
"""What one unit of each feature stands for, so that the pull is alike in all directions."""
_PULL = 0.1
_MEMORY = 0.995
"""The weight of all earlier steps after each new one: those of the last two hundred count most."""
_MOST_SLOWER = 8.0


class StepTimes:
    """See the module. Times in seconds."""

    def __init__(self) -> None:
        self._moments = [[0.0] * 3 for _ in range(3)]
        self._targets = [0.0] * 3
        self._fitted: tuple[float, float, float] | None = None

    def note(self, num_prompt_tokens: int, num_decodes: int, duration_s: float) -> None:
        """A step of that many prompt tokens and decoding sequences took `duration_s`."""
        counted_s = min(duration_s, _MOST_SLOWER * self.step_s(num_prompt_tokens, num_decodes))
        features = (1.0, num_prompt_tokens / _SCALES[1], num_decodes / _SCALES[2])
        for row, left in enumerate(features):
            self._targets[row] = _MEMORY * self._targets[row] + left * counted_s
            for column, right in enumerate(features):
                self._moments[row][column] = _MEMORY * self._moments[row][column] + left * right
        self._fitted = None

    def step_s(self, num_prompt_tokens: int, num_decodes: int) -> float:
        """How long such a step is likely to take."""
        constant, per_prompt_token, per_decode = self._fit()
        return constant + per_prompt_token * num_prompt_tokens + per_decode * num_decodes

    def _fit(self) -> tuple[float, float, float]:
        if self._fitted is None:
            guess = [value * scale for value, scale in zip(_FIRST_GUESS, _SCALES, strict=True)]
            matrix = [
                [value + (_PULL if row == column else 0.0) for column, value in enumerate(values)]
                for row, values in enumerate(self._moments)
            ]
            targets = [value + _PULL * guess[row] for row, value in enumerate(self._targets)]
            constant, per_prompt, per_decode = _solve(matrix, targets)
            self._fitted = (
                max(constant, 0.0),
                max(per_prompt / _SCALES[1], 0.0),
                max(per_decode / _SCALES[2], 0.0),
            )
        return self._fitted


def _solve(matrix: Seq[Seq[float]], targets: Seq[float]) -> list[float]:
    """Gaussian elimination for a symmetric positive definite matrix, which needs no pivoting."""
    rows = [[*values, target] for values, target in zip(matrix, targets, strict=True)]
    for pivot in range(len(rows)):
        for row in range(pivot + 1, len(rows)):
            factor = rows[row][pivot] / rows[pivot][pivot]
            rows[row] = [value - factor * above for value, above in zip(rows[row], rows[pivot], strict=True)]
    solution = [0.0] * len(rows)
    for row in reversed(range(len(rows))):
        known = sum(rows[row][column] * solution[column] for column in range(row + 1, len(rows)))
        solution[row] = (rows[row][-1] - known) / rows[row][row]
    return solution
