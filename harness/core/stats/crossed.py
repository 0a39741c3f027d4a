"""Seeds x samples: means and differences of arms that were trained several times and asked the same samples.

Two things are random, and both are crossed: which seeds were drawn, and which samples. The variance of a mean is the
sum of both parts, s_seeds^2 / R + s_samples^2 / n, where s_seeds is of the means of seeds and s_samples of those of
samples, and its degrees of freedom are Satterthwaite's. This is Clark's min F' (1973, Journal of Verbal Learning and
Verbal Behavior 12:335) as an interval; the interaction, which both parts contain, is counted twice rather than not at
all. A bootstrap of rows and columns cannot do it: none is exact for crossed random effects (McCullagh 2000, Bernoulli
6:285), and with few seeds it cannot see tails that the seeds do not show. `scripts/coverage.py` simulates both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from harness.core.stats.intervals import (
    Design,
    Interval,
    mean_of,
    normal_quantile,
    t_quantile,
    wilson_effective,
)
from harness.core.stats.paired import mcnemar_exact, newcombe_paired

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

NOTE_FEW_SEEDS = "training noise not estimated"
MIN_SEEDS = 3


@dataclass(frozen=True, slots=True)
class CrossedSummary:
    """One score over seeds x samples.

    `n_seeds` and `n_samples` count rows and columns with any score; `n_unscored` counts cells without one, those of
    dropped rows and columns included. `note` says what the interval leaves out, or is None.
    """

    n_seeds: int
    n_samples: int
    n_unscored: int
    mean: float | None
    stderr: float | None
    degrees: float | None
    interval: Interval | None
    note: str | None


@dataclass(frozen=True, slots=True)
class CrossedDifference:
    """Arm `a` less arm `b` on the `n` samples that both have a score for; `n_dropped` more lack one of the two.

    `stderr` and `degrees` belong to `interval` and `p_value`. `at` gives the interval at another level, and
    `detectable` the smallest true difference that would have been found with a given power at a given level.
    """

    n: int
    n_dropped: int
    mean_a: float | None
    mean_b: float | None
    difference: float | None
    stderr: float | None
    degrees: float | None
    interval: Interval | None
    p_value: float | None
    test: str
    note: str | None
    at: Callable[[float], Interval | None] = field(default=lambda level: None, compare=False, repr=False)
    detectable: Callable[[float, float], float | None] = field(
        default=lambda level, power: None, compare=False, repr=False
    )


class Seeds:
    """The scores of one arm, seeds x samples (NaN: unscored), and the two parts of the noise of their mean.

    Args:
        cells: the scores.
        trained: whether another seed would have given another model; a base is what it is.
    """

    def __init__(self, cells: NDArray[Any], *, trained: bool = True) -> None:
        """Raises ValueError unless ``cells`` has two dimensions and no infinity."""
        import numpy as np

        self.cells: Floats = np.asarray(cells, dtype=np.float64)
        self.trained = trained
        if self.cells.ndim != 2 or np.isinf(self.cells).any():
            raise ValueError(f"Seeds: need finite or NaN cells, seeds x samples, got shape {self.cells.shape}")

    @cached_property
    def scored(self) -> NDArray[np.bool_]:
        """Which cells have a score."""
        import numpy as np

        return np.asarray(~np.isnan(self.cells))

    @cached_property
    def met(self) -> NDArray[np.bool_]:
        """Which samples have a score of any seed."""
        import numpy as np

        return np.asarray(self.scored.any(axis=0))

    @property
    def n_seeds(self) -> int:
        """Seeds that have any score."""
        return int(self.scored.any(axis=1).sum())

    def kept(self, mask: NDArray[np.bool_]) -> Seeds:
        """The same seeds on some of the samples."""
        return self if bool(mask.all()) else Seeds(self.cells[:, mask], trained=self.trained)

    @cached_property
    def means(self) -> Floats:
        """Mean of each sample over the seeds that scored it; NaN where none did."""
        import numpy as np

        counts = self.scored.sum(axis=0)
        sums = np.where(self.scored, self.cells, 0.0).sum(axis=0)
        return np.asarray(np.where(counts > 0, sums / np.maximum(counts, 1), np.nan))

    @cached_property
    def training(self) -> tuple[float, int]:
        """Variance of the mean by which seeds were drawn, and its degrees of freedom; 0 under three seeds.

        From means of seeds less those of the samples that each was scored on, so that an unscored sample, which may be
        a hard one, does not make its seed a good one.
        """
        import numpy as np

        rows = self.scored.any(axis=1)
        count = int(rows.sum())
        if count < MIN_SEEDS:
            return 0.0, 0
        effects = np.where(self.scored, self.cells - self.means, 0.0)[rows].sum(axis=1) / self.scored[rows].sum(axis=1)
        if np.ptp(effects) <= 1e-12 * float(np.nanmax(np.abs(self.cells))):
            return 0.0, count - 1  # rounding only
        return float(effects.var(ddof=1)) / count, count - 1

    def binary(self, whole: float) -> bool:
        """Whether every score is 0 or ``whole``."""
        scores = self.cells[self.scored]
        return bool(scores.size) and bool(((scores == 0.0) | (scores == whole)).all())

    @property
    def note(self) -> str | None:
        """What an interval of this arm leaves out."""
        return NOTE_FEW_SEEDS if self.trained and self.n_seeds < MIN_SEEDS else None


def crossed_mean(
    arm: Seeds, design: Design | None = None, *, whole: float = 1.0, level: float = 0.95, share: bool = False
) -> CrossedSummary:
    """Mean over seeds x samples, every sample counting once, with the noise of training and of sampling.

    ``share``: the scores are 0 or ``whole``, and the interval is Wilson's at the effective size; else Student's.
    Under three seeds only the sampling is in it, and `note` says so. No interval with one sample.
    """
    normal_quantile(level)
    met = arm.met
    n_unscored = int(arm.cells.size - arm.scored.sum())
    n = int(met.sum())
    if n == 0:
        return CrossedSummary(0, 0, n_unscored, None, None, None, None, arm.note)
    arm, design = arm.kept(met), (design or Design(None, None, len(met))).kept(met)
    mean = mean_of(arm.means.tolist())
    sampling = design.variance(arm.means)
    if not math.isfinite(sampling):
        return CrossedSummary(arm.n_seeds, n, n_unscored, mean, None, None, None, arm.note)
    variance, degrees = _together([arm.training, (sampling, design.degrees)])
    if share and arm.binary(whole):
        part = min(1.0, max(0.0, mean / whole))
        # Where strata explain it all the spread vanishes; there are never more independent scores than cells.
        most = float(arm.scored.sum())
        size = min(most, part * (1 - part) * whole * whole / variance) if variance > 0.0 else float(len(design.sizes))
        found = wilson_effective(part, size or float(len(design.sizes)), degrees, level=level)
        interval = Interval(found.low * whole, found.high * whole, level, "crossed_wilson")
    else:
        half = t_quantile(level, degrees) * math.sqrt(variance)
        interval = Interval(mean - half, mean + half, level, "crossed_t")
    return CrossedSummary(arm.n_seeds, n, n_unscored, mean, math.sqrt(variance), degrees, interval, arm.note)


def crossed_difference(
    a: Seeds, b: Seeds, design: Design | None = None, *, whole: float = 1.0, level: float = 0.95
) -> CrossedDifference:
    """Arm ``a`` less arm ``b``, paired by sample, with the training noise of each.

    One seed against one, all scores 0 or ``whole`` and no clusters: the exact McNemar test and Newcombe's paired
    interval. Otherwise Student's t of the differences of samples, at the degrees of freedom of both parts of the noise.
    0/1 scores then get two more samples, one won and one lost (Bonett and Price 2012, British Journal of Mathematical
    and Statistical Psychology 65:479), without which arms that never differ would have an interval of no width.
    """
    single = max(len(a.cells), len(b.cells)) == 1
    found = crossed_contrast([(a, 1.0), (b, -1.0)], design, whole=whole, level=level)
    common = a.met & b.met
    if not single or found.n == 0 or (design is not None and design.kept(common).clustered):
        return found
    left, right = a.kept(common), b.kept(common)
    if not (left.binary(whole) and right.binary(whole)):
        return replace(found, test="paired_t") if found.test == "crossed_t" else found
    values = left.means - right.means
    won, lost = int((values > 0).sum()), int((values < 0).sum())
    both = int(((left.means == whole) & (right.means == whole)).sum())
    at = partial(_newcombe_at, (both, won, lost, found.n - both - won - lost), whole)
    exact: dict[str, Any] = {
        "test": "mcnemar_exact",
        "p_value": mcnemar_exact(won, lost),
        "at": at,
        "interval": at(level),
    }
    if found.stderr is not None and found.degrees is not None:
        exact["detectable"] = partial(_detectable, found.stderr, found.degrees, whole / found.n, whole)
    return replace(found, **exact)


def crossed_contrast(
    arms: Sequence[tuple[Seeds, float]], design: Design | None = None, *, whole: float = 1.0, level: float = 0.95
) -> CrossedDifference:
    """Weighted sum of arms, paired by sample, with the training noise of each: weights above 0 less those below.

    On the samples that every arm has a score for. Student's t, as :func:`crossed_difference` says. `mean_a` is the sum
    over the weights above 0, `mean_b` that over those below.
    """
    import numpy as np

    normal_quantile(level)
    table = np.stack([arm.met for arm, _ in arms])
    common: NDArray[np.bool_] = np.asarray(table.all(axis=0))
    n, dropped = int(common.sum()), int(table.any(axis=0).sum() - common.sum())
    note = next((arm.note for arm, _ in arms if arm.note is not None), None)
    if n == 0:
        return CrossedDifference(0, dropped, None, None, None, None, None, None, None, "none", note)
    design = (design or Design(None, None, len(common))).kept(common)
    kept = [(arm.kept(common), weight) for arm, weight in arms]
    values: Floats = np.asarray(sum(arm.means * weight for arm, weight in kept))
    sides = [
        math.fsum(abs(weight) * mean_of(arm.means.tolist()) for arm, weight in kept if (weight > 0) is up)
        for up in (True, False)
    ]
    difference = mean_of(values.tolist())
    means = sides[0], sides[1], difference
    binary = all(arm.binary(whole) for arm, _ in kept)
    sampling = design.variance(values)
    if not math.isfinite(sampling):
        if not binary:
            return CrossedDifference(n, dropped, *means, None, None, None, None, "none", note)
        sampling = 0.0
    clusters = len(design.sizes)
    shrink = clusters / (clusters + 2) if binary else 1.0
    centre = difference * shrink
    parts = [(arm.training[0] * (weight * shrink) ** 2, arm.training[1]) for arm, weight in kept]
    more = 2 * (whole / (clusters + 2)) ** 2 if binary else 0.0
    variance, degrees = _together([*parts, (sampling * shrink * shrink + more, max(1, design.degrees))])
    stderr = math.sqrt(variance)
    at = partial(_t_at, centre, stderr, degrees, whole if binary else math.inf)
    # Never below the smallest p that the exact sign-flip test could give.
    differing = int(np.count_nonzero(np.bincount(design.cluster, weights=values)))
    p_value = max(_p_of(centre, stderr, degrees), min(1.0, 2.0 ** (1 - differing)))
    detectable = partial(_detectable, stderr, degrees, 0.0, whole if binary else math.inf)
    return CrossedDifference(n, dropped, *means, stderr, degrees, at(level), p_value, "crossed_t", note, at, detectable)


def pairwise(arms: Sequence[Seeds], design: Design, *, whole: float = 1.0) -> tuple[Floats, Floats]:
    """All differences of arms, and their p-values, as two arms x arms arrays; [i, j] is arm i less arm j.

    As :func:`crossed_difference` by Student's t, for all pairs at once. Every arm must have every sample scored by some
    seed (ValueError otherwise). p is rounded to ten digits, so that how sums were added up on a machine moves no rank.
    """
    import numpy as np
    from scipy.special import stdtr

    if not all(bool(arm.met.all()) for arm in arms):
        raise ValueError("pairwise: every arm needs a score of every sample; keep those that all have")
    n, clusters = design.n, len(design.sizes)
    means: Floats = np.stack([arm.means for arm in arms])
    centres = means.mean(axis=1)
    # The linear form of each arm's mean, totalled over clusters, less its mean over the stratum.
    forms = np.stack(
        [np.bincount(design.cluster, weights=(row - mid) / n) for row, mid in zip(means, centres, strict=True)]
    )
    for stratum, count in enumerate(design.in_stratum):
        inside = design.stratum == stratum
        forms[:, inside] -= forms[:, inside].mean(axis=1, keepdims=True)
        forms[:, inside] *= np.sqrt(count / max(1, count - 1))
    gram = forms @ forms.T
    squares = np.diag(gram)
    sampling = squares[:, None] + squares[None, :] - 2 * gram
    sampling[sampling < 1e-12 * (squares[:, None] + squares[None, :])] = 0.0
    differences = centres[:, None] - centres[None, :]
    training = np.array([arm.training[0] for arm in arms])
    freedom = np.array([max(1, arm.training[1]) for arm in arms])
    shrunk = differences
    if all(arm.binary(whole) for arm in arms):
        shrink = clusters / (clusters + 2)
        shrunk = differences * shrink
        training = training * shrink * shrink
        sampling = sampling * shrink * shrink + 2 * (whole / (clusters + 2)) ** 2
    variance = training[:, None] + training[None, :] + sampling
    spread = training**2 / freedom
    below = spread[:, None] + spread[None, :] + sampling**2 / max(1, design.degrees)
    degrees = np.where(below > 0, variance**2 / np.where(below > 0, below, 1.0), 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(shrunk) / np.sqrt(variance)
    p_values = np.where(variance > 0, 2 * stdtr(degrees, -np.where(variance > 0, t, 0.0)), differences == 0.0)
    p_values = np.maximum(p_values, min(1.0, 2.0 ** (1 - clusters)))
    np.fill_diagonal(p_values, 1.0)
    return differences, np.asarray(np.round(p_values, 10))


def _together(parts: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Sum of independent variances, and its degrees of freedom: Satterthwaite 1946, Biometrics Bulletin 2:110."""
    variance = math.fsum(one for one, _ in parts)
    below = math.fsum(one * one / degrees for one, degrees in parts if degrees > 0)
    # Where nothing varies, the last part, which is of samples, says how much was seen.
    return variance, (variance * variance / below if below > 0.0 else float(max(1, parts[-1][1])))


def _p_of(centre: float, stderr: float, degrees: float) -> float:
    from scipy.special import stdtr

    if stderr == 0.0:
        return 1.0 if centre == 0.0 else 0.0
    return float(2 * stdtr(degrees, -abs(centre) / stderr))


def _t_at(centre: float, stderr: float, degrees: float, bound: float, level: float) -> Interval:
    half = t_quantile(level, degrees) * stderr
    return Interval(max(-bound, centre - half), min(bound, centre + half), level, "crossed_t")


def _newcombe_at(counts: tuple[int, int, int, int], whole: float, level: float) -> Interval:
    found = newcombe_paired(*counts, level=level)
    return Interval(found.low * whole, found.high * whole, level, found.method)


def _detectable(stderr: float, degrees: float, of_one: float, bound: float, level: float, power: float) -> float | None:
    """Bloom 1995, Evaluation Review 19:547: the two quantiles' sum in standard errors; None beyond any difference.

    ``of_one``: for an exact test, what one discordant sample moves the mean by: no fewer are found than it can reject.
    ``bound``: the largest difference that there can be.
    """
    found = (t_quantile(level, degrees) + t_quantile(2 * power - 1, degrees)) * stderr
    fewest = math.ceil(math.log2(2 / (1 - level))) if of_one else 0
    found = max(found, fewest * of_one)
    return found if found <= bound else None
