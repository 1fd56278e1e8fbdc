"""Times as linear functions of what was done, fitted by least squares to what was measured.

Measurements of long ago count less and less, and a weak pull towards a first guess keeps every coefficient defined
while measurements are few or all alike. One counts as no more than `_MOST_SLOWER` times what was expected, so that a
moment in which the machine stood still does not pass for the cost of the work.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

_PULL = 0.1
_MEMORY = 0.995
"""The weight of all earlier measurements after each new one: the last two hundred count most."""
_MOST_SLOWER = 8.0


class LinearModel:
    """value = sum of coefficient * feature, no coefficient being negative.

    `first_guess` are the coefficients before anything was measured. `scales` say what amount of each feature weighs
    alike, so that the pull is the same in all directions.
    """

    def __init__(self, first_guess: Seq[float], scales: Seq[float]) -> None:
        self._guess = [value * scale for value, scale in zip(first_guess, scales, strict=True)]
        self._scales = tuple(scales)
        size = len(self._scales)
        self._moments = [[0.0] * size for _ in range(size)]
        self._targets = [0.0] * size
        self._fitted: tuple[float, ...] | None = None

    def note(self, features: Seq[float], value: float) -> None:
        """Work of these features took `value`."""
        counted = min(value, _MOST_SLOWER * self.predict(features))
        scaled = [feature / scale for feature, scale in zip(features, self._scales, strict=True)]
        for row, left in enumerate(scaled):
            self._targets[row] = _MEMORY * self._targets[row] + left * counted
            for column, right in enumerate(scaled):
                self._moments[row][column] = _MEMORY * self._moments[row][column] + left * right
        self._fitted = None

    def predict(self, features: Seq[float]) -> float:
        """What work of these features is likely to take."""
        return sum(value * feature for value, feature in zip(self.coefficients, features, strict=True))

    @property
    def coefficients(self) -> tuple[float, ...]:
        """What one of each feature adds, as fitted so far."""
        if self._fitted is None:
            self._fitted = self._fit_non_negative()
        return self._fitted

    def _fit_non_negative(self) -> tuple[float, ...]:
        """Features whose coefficient would be negative are left out, and the others fitted without them."""
        used = list(range(len(self._scales)))
        while True:
            matrix = [
                [self._moments[row][column] + (_PULL if row == column else 0.0) for column in used] for row in used
            ]
            solution = _solve(matrix, [self._targets[row] + _PULL * self._guess[row] for row in used])
            if all(value >= 0 for value in solution):
                fitted = dict(zip(used, solution, strict=True))
                return tuple(fitted.get(i, 0.0) / scale for i, scale in enumerate(self._scales))
            used = [i for i, value in zip(used, solution, strict=True) if value >= 0]


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
