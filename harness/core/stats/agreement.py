"""Agreement of two raters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence


def cohen_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> tuple[float | None, float]:
    """(kappa, observed agreement) of two raters over the same items: Cohen 1960, eq. 1, (p_o - p_e) / (1 - p_e).

    kappa is None when p_e = 1: both raters gave one and the same label throughout, and chance explains it all.
    Raises ValueError for sequences that are empty or of unequal length.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"cohen_kappa: need two label sequences of one length, not empty; got {len(a)} and {len(b)}")
    n = len(a)
    agreed = sum(x == y for x, y in zip(a, b, strict=True))
    count_a, count_b = Counter(a), Counter(b)
    chance = sum(count * count_b[label] for label, count in count_a.items())  # p_e * n**2, exact
    kappa = None if chance == n * n else (n * agreed - chance) / (n * n - chance)
    return kappa, agreed / n
