"""Simulated coverage of every interval that reports and boards print, as a Markdown table.

    python scripts/coverage.py [--sets 2000] [--seed 0]

Each line draws so many sets of scores from a population whose truth is known by formula, and counts how often the 95 %
interval holds it. At 2,000 sets a rate has a standard error of half a point. `docs/reading-the-numbers.md` holds the
table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import Any

import numpy as np

from harness.core.stats import (
    Design,
    Interval,
    Seeds,
    compare_paired,
    crossed_difference,
    crossed_mean,
    estimated_mean,
    newcombe_paired,
    summarise,
    wilson,
)

Draw = Callable[[np.random.Generator, int], tuple[Interval | None, float]]
"""From a generator and the number of the set: the interval, and the truth."""
PHI = NormalDist().cdf


def share(p: float, n: int) -> Draw:
    """Wilson's interval of a share."""
    return lambda rng, _: (wilson(int(rng.binomial(n, p)), n), p)


def mean(n: int, *, skewed: bool) -> Draw:
    """Student's interval of a mean, of normal or of lognormal scores (skewness 1.75)."""

    def draw(rng: np.random.Generator, _: int) -> tuple[Interval | None, float]:
        values = rng.lognormal(0.0, 0.5, n) if skewed else rng.normal(0.0, 1.0, n)
        return summarise(values.tolist()).interval, float(np.exp(0.125)) if skewed else 0.0

    return draw


def pairs(n: int, rates: tuple[float, float, float, float]) -> Draw:
    """Newcombe's interval; rates of both, only A, only B, neither."""
    return lambda rng, _: (newcombe_paired(*map(int, rng.multinomial(n, rates))), rates[1] - rates[2])


def paired(n: int, how: str, *, skewed: bool) -> Draw:
    """Mean difference of paired scores by bootstrap (`harness compare`) or Student's t (a board)."""

    def draw(rng: np.random.Generator, number: int) -> tuple[Interval | None, float]:
        apart = rng.lognormal(0.0, 0.5, n) if skewed else rng.normal(0.0, 1.0, n)
        truth = float(np.exp(0.125)) if skewed else 0.0
        shared = rng.normal(0.0, 1.0, n)
        if how == "t":
            return crossed_difference(Seeds([shared + apart]), Seeds([shared], trained=False)).interval, truth
        a, b = ({str(k): float(v) for k, v in enumerate(one)} for one in (shared + apart, shared))
        return compare_paired(a, b, seed=number, draws=1000).interval, truth

    return draw


def clustered(groups: int, size: int, how: str) -> Draw:
    """Differences of which half the variance is a cluster's."""
    labels = np.repeat(np.arange(groups), size)

    def draw(rng: np.random.Generator, number: int) -> tuple[Interval | None, float]:
        values = rng.normal(0.0, 1.0, groups)[labels] + rng.normal(0.0, 1.0, groups * size)
        if how == "mean":
            return summarise(values.tolist(), clusters=labels.tolist()).interval, 0.0
        if how == "ignored":
            return summarise(values.tolist()).interval, 0.0
        if how == "share":
            right = (values > 0).astype(float)
            return summarise(right.tolist(), kind="proportion", clusters=labels.tolist()).interval, 0.5
        a = {str(k): float(v) for k, v in enumerate(values)}
        of = {str(k): int(v) for k, v in enumerate(labels)}
        return compare_paired(a, dict.fromkeys(a, 0.0), seed=number, draws=1000, clusters=of).interval, 0.0

    return draw


def stratified(strata: int, size: int, how: str) -> Draw:
    """Differences whose strata have means of their own, the same in every set."""
    labels = np.repeat(np.arange(strata), size)
    own = np.random.default_rng(99).normal(0.0, 1.0, strata)

    def draw(rng: np.random.Generator, number: int) -> tuple[Interval | None, float]:
        values = own[labels] + rng.normal(0.0, 1.0, strata * size)
        truth = float(own.mean())
        if how == "t":
            design = Design(None, labels.tolist(), len(values))
            return crossed_difference(Seeds([values]), Seeds([values * 0], trained=False), design).interval, truth
        a = {str(k): float(v) for k, v in enumerate(values)}
        of = {str(k): int(v) for k, v in enumerate(labels)}
        return compare_paired(a, dict.fromkeys(a, 0.0), seed=number, draws=1000, strata=of).interval, truth

    return draw


def crossed(seeds: int, samples: int, noise: tuple[float, float, float], how: str) -> Draw:
    """Scores over seeds x samples; standard deviations of seeds, of samples, and of what is left."""
    of_seeds, of_samples, rest = noise

    def draw(rng: np.random.Generator, number: int) -> tuple[Interval | None, float]:
        cells = rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, of_samples, (1, samples))
        cells = cells + rng.normal(0, rest, (seeds, samples))
        if how == "bootstrap":
            return pigeonhole(cells, number), 0.0
        return crossed_mean(Seeds(cells)).interval, 0.0

    return draw


def probit(seeds: tuple[int, int], samples: int, sd_seeds: float, levels: tuple[float, float], how: str) -> Draw:
    """0/1 scores, right where a normal variable is below level + seed + sample; samples have a standard deviation of 1.

    ``seeds`` of the arm and of what it is compared with; of one seed, the latter is a base and has no training noise.
    """
    against = sd_seeds if seeds[1] > 1 else 0.0
    truths = [PHI(level / (1 + sd * sd + 1) ** 0.5) for level, sd in zip(levels, (sd_seeds, against), strict=True)]

    def draw(rng: np.random.Generator, _: int) -> tuple[Interval | None, float]:
        of_samples = rng.normal(0, 1.0, (1, samples))
        arms = []
        for count, level, sd in zip(seeds, levels, (sd_seeds, against), strict=True):
            below = level + rng.normal(0, sd, (count, 1)) + of_samples
            right = rng.normal(0, 1.0, (count, samples)) < below
            arms.append(Seeds(right.astype(float), trained=count > 1))
        if how == "mean":
            return crossed_mean(arms[0], share=True).interval, truths[0]
        return crossed_difference(arms[0], arms[1]).interval, truths[0] - truths[1]

    return draw


def estimated(strata: int, size: int, changed: float, how: str, seeds: int = 1) -> Draw:
    """An arm that was asked ``size`` samples of each stratum, and its base all; strata have 20 to 400 samples.

    0/1 scores: the arm's is the base's, or drawn anew at the rate ``changed``. Normal ones: the base's and noise, and a
    shift of 0.05 for each seed.
    """
    sizes = np.linspace(20, 400, strata).astype(int)
    labels = np.repeat(np.arange(strata), sizes)
    rates = np.linspace(0.25, 0.95, strata)[labels]

    def draw(rng: np.random.Generator, _: int) -> tuple[Interval | None, float]:
        part = np.concatenate([rng.choice(np.flatnonzero(labels == one), size, replace=False) for one in range(strata)])
        if how == "share":
            base = (rng.random(len(labels)) < rates).astype(float)
            anew = rng.random(len(labels)) < changed
            arm = np.where(anew, rng.random(len(labels)) < 0.5, base)[None, :]
            truth = float(((1 - changed) * rates + changed * 0.5).mean())
        else:
            base = rates + rng.normal(0, 1.0, len(labels))
            arm = base + rng.normal(0, changed, (seeds, len(labels))) + rng.normal(0, 0.05, (seeds, 1))
            truth = float(rates.mean())
        ends = (0.0, 1.0) if how == "share" else None
        found = estimated_mean(
            Seeds(arm[:, part]), base[part], labels[part].tolist(), base, labels.tolist(), range_of=ends
        )
        return found.interval if found is not None else None, truth

    return draw


def pigeonhole(cells: np.ndarray[Any, Any], seed: int) -> Interval:
    """Rows and columns resampled (Owen 2007, Annals of Applied Statistics 1:386): for comparison; nothing prints it."""
    rng = np.random.default_rng(seed)
    rows, columns = cells.shape
    weights = rng.multinomial(rows, np.full(rows, 1 / rows), 1000) / rows
    across = rng.multinomial(columns, np.full(columns, 1 / columns), 1000) / columns
    means = np.einsum("dr,rc,dc->d", weights, cells, across, optimize=True)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(low), float(high), 0.95, "pigeonhole")


TRAINING, BOTH, SAMPLING = (1.0, 0.5, 1.0), (0.1, 1.0, 1.0), (0.02, 1.0, 1.0)
"""Of 200 samples: the variance of a mean over five seeds is to 98 %, 29 % and 2 % that of training."""


def lines() -> Iterator[tuple[str, str, Draw]]:
    """Interval, what was simulated, and how to draw it."""
    for p, n in ((0.5, 50), (0.05, 50), (0.02, 200), (0.3, 1000)):
        yield "Wilson", f"share {p}, {n} samples", share(p, n)
    for n, skewed in ((12, False), (50, True), (200, True)):
        yield "Student's t", f"{'lognormal' if skewed else 'normal'} scores, {n} samples", mean(n, skewed=skewed)
    for n, rates in ((50, (0.5, 0.1, 0.1, 0.3)), (200, (0.9, 0.03, 0.02, 0.05)), (200, (0.5, 0.2, 0.1, 0.2))):
        yield "Newcombe, paired", f"{n} pairs, won {rates[1]}, lost {rates[2]}", pairs(n, rates)
    for how, name in (("bootstrap", "paired bootstrap (`compare`)"), ("t", "paired t (board)")):
        for n, skewed in ((30, False), (30, True), (200, True)):
            kind = "lognormal" if skewed else "normal"
            yield name, f"{kind} differences, {n} pairs", paired(n, how, skewed=skewed)
    for groups in (10, 40):
        told = f"{groups} clusters of 5, half the variance theirs"
        yield "clustered t", told, clustered(groups, 5, "mean")
        yield "clustered Wilson", told, clustered(groups, 5, "share")
        yield "clustered bootstrap", told, clustered(groups, 5, "bootstrap")
        yield "(clusters ignored)", told, clustered(groups, 5, "ignored")
    for how, name in (("bootstrap", "stratified bootstrap"), ("t", "stratified t (board)")):
        yield name, "57 strata of 4", stratified(57, 4, how)
    for changed in (0.3, 0.1, 0.02):
        told = f"20 strata, 4 samples each of 20 to 400, {changed:.0%} of the answers drawn anew"
        yield "difference estimator", told, estimated(20, 4, changed, "share")
    told = "57 strata, 4 samples each of 20 to 400, 20% of the answers drawn anew"
    yield "difference estimator", told, estimated(57, 4, 0.2, "share")
    for seeds in (3, 5):
        told = f"{seeds} seeds, 20 strata, 4 samples each of 20 to 400, normal scores"
        yield "difference estimator", told, estimated(20, 4, 0.5, "normal", seeds)
    for seeds in (3, 5, 10):
        for noise, told in ((TRAINING, "training dominates"), (BOTH, "both"), (SAMPLING, "sampling dominates")):
            yield "crossed t", f"{seeds} seeds x 200 samples, {told}", crossed(seeds, 200, noise, "t")
    for seeds in (3, 5, 10):
        told = f"{seeds} seeds x 200 samples, training dominates"
        yield "(crossed bootstrap)", told, crossed(seeds, 200, TRAINING, "bootstrap")
    for seeds, sd, level in ((3, 0.5, 0.5), (5, 0.5, 0.5), (5, 0.1, 0.5), (5, 0.3, 3.0)):
        told = f"{seeds} seeds x 200 samples, sd of seeds {sd}, share {PHI(level / (2 + sd * sd) ** 0.5):.2f}"
        yield "crossed Wilson", told, probit((seeds, 1), 200, sd, (level, level), "mean")
    for counts, sd in (((3, 1), 0.5), ((5, 1), 0.5), ((5, 1), 0.05), ((5, 5), 0.5), ((5, 3), 0.1)):
        against = "a base" if counts[1] == 1 else f"{counts[1]} seeds"
        told = f"0/1, {counts[0]} seeds against {against}, 200 samples, sd of seeds {sd}"
        yield "crossed t, difference", told, probit(counts, 200, sd, (0.6, 0.3), "difference")
    told = "0/1, 5 seeds against a base, 200 samples, shares 0.98 and 0.97, sd of seeds 0.1"
    yield "crossed t, difference", told, probit((5, 1), 200, 0.1, (3.0, 2.7), "difference")


def rate(draw: Draw, sets: int, seed: int) -> tuple[float, float]:
    """Share of sets whose interval holds the truth, and the mean width."""
    rng = np.random.default_rng(seed)
    held, widths = 0, []
    for number in range(sets):
        interval, truth = draw(rng, number)
        assert interval is not None
        held += interval.low <= truth <= interval.high
        widths.append(interval.high - interval.low)
    return held / sets, float(np.mean(widths))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print("| interval | simulated | coverage | mean width |\n| :-- | :-- | --: | --: |")
    for name, told, draw in lines():
        held, width = rate(draw, asked.sets, asked.seed)
        print(f"| {name} | {told} | {100 * held:.1f} % | {width:.3f} |", flush=True)


if __name__ == "__main__":
    main()
