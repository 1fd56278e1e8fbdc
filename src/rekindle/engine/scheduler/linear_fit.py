"""A small linear model fitted online: the estimates of how long steps and loads take.

The coefficients are fitted by least squares over all observations so far, those of long ago counting less and less,
with a weak pull towards a first guess that keeps them defined while observations are few or all alike. An observation
counts as no more than `_MOST_TIMES` what was expected of it, so that one that stood still does not pass for the rule.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

_PULL = 0.1
_MEMORY = 0.995
"""The weight of all earlier observations after each new one: the last two hundred count most."""
_MOST_TIMES = 8.0


class LinearFit:
    """A value that is a sum of features times coefficients, none of them negative. `guess` are the coefficients to
    begin with; `scales` say what each feature comes in, so that the pull is alike in all directions."""

    def __init__(self, guess: tuple[float, ...], scales: tuple[float, ...]) -> None:
        self._scales = scales
        self._guess = [value * scale for value, scale in zip(guess, scales, strict=True)]
        self._moments = [[0.0] * len(guess) for _ in guess]
        self._targets = [0.0] * len(guess)
        self._fitted: tuple[float, ...] | None = None

    @property
    def coefficients(self) -> tuple[float, ...]:
        if self._fitted is None:
            matrix = [
                [value + (_PULL if row == column else 0.0) for column, value in enumerate(values)]
                for row, values in enumerate(self._moments)
            ]
            targets = [value + _PULL * guess for value, guess in zip(self._targets, self._guess, strict=True)]
            solved = zip(_solve(matrix, targets), self._scales, strict=True)
            self._fitted = tuple(max(value / scale, 0.0) for value, scale in solved)
        return self._fitted

    def predict(self, features: Seq[float]) -> float:
        return sum(one * other for one, other in zip(self.coefficients, features, strict=True))

    def note(self, features: Seq[float], observed: float) -> None:
        """`observed` was the value at these features."""
        counted = min(observed, _MOST_TIMES * self.predict(features))
        scaled = [feature / scale for feature, scale in zip(features, self._scales, strict=True)]
        for row, left in enumerate(scaled):
            self._targets[row] = _MEMORY * self._targets[row] + left * counted
            for column, right in enumerate(scaled):
                self._moments[row][column] = _MEMORY * self._moments[row][column] + left * right
        self._fitted = None


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
