"""Many comparisons at once: Holm's correction, the levels of its intervals, and ranks that follow from tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Step-down adjusted p-values in the order given: Holm 1979, Scandinavian Journal of Statistics 6:65.

    The i-th smallest of m becomes max over j <= i of min(1, (m - j + 1) * p_(j)). None stays None and is not counted
    in m. Raises ValueError for a value outside [0, 1].
    """
    known = [(p, position) for position, p in enumerate(p_values) if p is not None]
    if not all(0.0 <= p <= 1.0 for p, _ in known):
        raise ValueError("holm: every p-value must lie in [0, 1]")
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for step, (p, position) in enumerate(sorted(known)):
        running = max(running, min(1.0, (len(known) - step) * p))
        adjusted[position] = running
    return adjusted


def holm_levels(p_values: Sequence[float | None], *, alpha: float = 0.05) -> list[float | None]:
    """Levels of intervals that go with :func:`holm`, in the order given: 1 - alpha / k, where k are tested at its step.

    The procedure stops at the first p-value that it does not reject, and those after it share its k. So as far as test
    and interval agree at all, an interval at this level leaves 0 out exactly where the adjusted p-value is below alpha;
    those of what is not rejected hold simultaneously (Strassburger and Bretz 2008, Statistics in Medicine 27:4914).
    Equal p-values have one level. None stays None.
    """
    known = sorted((p, position) for position, p in enumerate(p_values) if p is not None)
    levels: list[float | None] = [None] * len(p_values)
    left, last, stopped = len(known), -1.0, False
    for step, (p, position) in enumerate(known):
        if not stopped and p != last:
            left = len(known) - step
            stopped = left * p >= alpha
        levels[position], last = 1 - alpha / left, p
    return levels


def holm_rejects(p_values: NDArray[Any], *, alpha: float = 0.05) -> NDArray[np.bool_]:
    """Which of many p-values :func:`holm` brings below ``alpha``, for arrays too long for a list; NaN never is."""
    import numpy as np

    known = np.flatnonzero(~np.isnan(p_values))
    order = known[np.argsort(p_values[known], kind="stable")]
    passed = p_values[order] * np.arange(len(order), 0, -1) < alpha
    first = len(order) if passed.all() else int(np.argmin(passed))
    found = np.zeros(len(p_values), dtype=bool)
    found[order[:first]] = True
    return found


def rank_by_significance(better: Sequence[Sequence[bool]] | NDArray[np.bool_]) -> list[int]:
    """Rank of each arm: 1 + the number of arms significantly better than it. Arms may share a rank.

    `better` is arms x arms and `better[i][j]` says that arm i is significantly better than arm j.
    Raises ValueError if it is not square, or if two arms (or one arm and itself) are each better than the other.
    """
    import numpy as np

    size = len(better)
    if any(len(row) != size for row in better):
        raise ValueError("rank_by_significance: need a square matrix, arms x arms")
    if size == 0:
        return []
    table = np.asarray(better, dtype=bool)
    if len(both := np.argwhere(table & table.T)):
        i, j = sorted(both[0].tolist())
        raise ValueError(f"rank_by_significance: arms {i} and {j} cannot each be better than the other")
    return [1 + int(count) for count in table.sum(axis=0)]
