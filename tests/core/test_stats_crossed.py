"""Seeds x samples, clusters and strata: by hand, and by simulation with fixed seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.core.stats import (
    Design,
    Seeds,
    compare_paired,
    crossed_contrast,
    crossed_difference,
    crossed_mean,
    holm,
    holm_rejects,
    mcnemar_exact,
    newcombe_paired,
    pairwise,
    summarise,
    wilson,
    wilson_effective,
)

NAN = math.nan


def test_variance_of_an_additive_table_by_hand() -> None:
    # Means of seeds 0, 3, 6: s^2 / 3 = 3. Means of samples 2, 4: s^2 / 2 = 1. Together 4, on 4^2 / (3^2/2 + 1^2/1).
    got = crossed_mean(Seeds(np.array([[-1.0, 1.0], [2.0, 4.0], [5.0, 7.0]])))
    assert (got.n_seeds, got.n_samples, got.n_unscored, got.mean, got.note) == (3, 2, 0, 3.0, None)
    assert got.stderr == pytest.approx(2.0)
    assert got.degrees == pytest.approx(16 / 5.5)


def test_under_three_seeds_only_samples_count_and_it_is_said() -> None:
    row = np.tile([-1.0, 1.0], 50)
    got = crossed_mean(Seeds(np.stack([row, row + 100.0])))
    assert (got.mean, got.note) == (50.0, "training noise not estimated")
    assert got.stderr == pytest.approx(math.sqrt(1 / 99))  # s^2 is 100/99, over 100 samples
    failed = crossed_mean(Seeds(np.stack([row, row + 100.0, np.full(100, NAN)])))
    assert (failed.n_seeds, failed.n_unscored, failed.interval) == (2, 100, got.interval)
    assert crossed_mean(Seeds(row[None], trained=False)).note is None


def test_an_unscored_hard_sample_does_not_make_its_seed_a_good_one() -> None:
    # All seeds alike but for samples: without a score of the second, the first row's plain mean would be 0, not 5.
    got = Seeds(np.array([[0.0, NAN], [0.0, 10.0], [0.0, 10.0]])).training
    assert got == (0.0, 2)


def test_crossed_edges() -> None:
    empty = crossed_mean(Seeds(np.full((3, 2), NAN)))
    assert (empty.n_seeds, empty.n_samples, empty.n_unscored, empty.mean, empty.interval) == (0, 0, 6, None, None)
    one = crossed_mean(Seeds(np.array([[1.0], [2.0], [6.0]])))
    assert (one.n_samples, one.mean, one.stderr, one.interval) == (1, 3.0, None, None)
    for bad in (np.zeros(3), np.array([[math.inf, 1.0]])):
        with pytest.raises(ValueError, match="seeds x samples"):
            Seeds(bad)
    with pytest.raises(ValueError, match="level"):
        crossed_mean(Seeds(np.zeros((3, 2))), level=95)


def test_0_and_1_scores_that_never_differ_have_an_interval() -> None:
    # Bonett and Price: one sample more won and one more lost of 98 + 2; (0 + 2) / 100^2.
    same = Seeds(np.ones((3, 98)))
    got = crossed_difference(same, Seeds(np.ones((1, 98)), trained=False))
    assert (got.difference, got.p_value) == (0.0, 1.0)
    assert got.stderr == pytest.approx(math.sqrt(2) / 100)
    assert got.interval is not None and got.interval.low < 0 < got.interval.high


def test_a_difference_of_shares_by_hand() -> None:
    # 8 samples, 3 won and 1 lost by all three seeds: s^2 = (4 - 8/16) / 7 = 0.5, so s^2/8 = 1/16. With the two samples
    # more: (8^2/16 + 2) / 10^2 = 0.06, about 0.25 * 8/10.
    arm = np.tile([1.0, 1, 1, 0, 1, 1, 0, 0], (3, 1))
    base = np.array([[0.0, 0, 0, 1, 1, 1, 0, 0]])
    got = crossed_difference(Seeds(arm), Seeds(base, trained=False))
    assert (got.difference, got.mean_a, got.mean_b, got.test) == (0.25, 0.625, 0.375, "crossed_t")
    assert got.stderr == pytest.approx(math.sqrt(0.06))
    assert got.interval is not None
    assert (got.interval.low + got.interval.high) / 2 == pytest.approx(0.2)


def test_one_seed_against_one_is_what_compare_says() -> None:
    arm, base = np.array([[1.0, 1, 1, 1, 1, 0, 0, 1, 1, 0]]), np.array([[0.0, 0, 0, 0, 0, 1, 0, 1, 1, 0]])
    got = crossed_difference(Seeds(arm), Seeds(base, trained=False))
    assert (got.test, got.p_value) == ("mcnemar_exact", mcnemar_exact(5, 1))
    expected = newcombe_paired(2, 5, 1, 2)
    assert got.interval is not None
    assert (got.interval.low, got.interval.high) == (expected.low, expected.high)
    # At 5 % McNemar's rejects 6 of 6 and no fewer: 2 * (1/2)^6 = 0.03. No effect below 6 in 10 could have been found.
    assert (got.detectable(0.95, 0.8) or 0.0) >= 0.6
    percent = crossed_difference(Seeds(arm * 100), Seeds(base * 100, trained=False), whole=100.0)
    assert (percent.test, percent.difference) == ("mcnemar_exact", pytest.approx(40.0))


def test_what_could_have_been_found_is_two_quantiles_of_standard_errors() -> None:
    values = np.random.default_rng(0).normal(size=(1, 100_000))
    got = crossed_difference(Seeds(values), Seeds(np.zeros((1, 100_000)), trained=False))
    assert got.detectable(0.95, 0.8) == pytest.approx((1.959964 + 0.841621) * (got.stderr or 0.0), rel=1e-3)


def test_nothing_could_have_been_found_beyond_the_largest_difference() -> None:
    # With two samples the quantiles of Student's t are several standard errors, which are half of all there is.
    arm, base = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), np.array([[0.0, 0.0]])
    got = crossed_difference(Seeds(arm), Seeds(base, trained=False))
    assert got.detectable(0.95, 0.8) is None
    # Values without bounds have no largest difference.
    free = crossed_difference(Seeds(arm * 3 + 1), Seeds(base, trained=False))
    assert (free.stderr, free.degrees) == (0.5, 2.0)
    assert free.detectable(0.95, 0.8) == pytest.approx((4.302653 + 1.060660) * 0.5)
    # McNemar's rejects 6 of 6 at 5 %, and there are 5.
    five = crossed_difference(Seeds(np.ones((1, 5))), Seeds(np.zeros((1, 5)), trained=False))
    assert (five.test, five.detectable(0.95, 0.8)) == ("mcnemar_exact", None)


def test_clusters_by_hand() -> None:
    # Two clusters whose members agree are two observations, 1 and 0: s^2 / 2 = 0.25. Four would have 1/12.
    values = np.array([1.0, 1.0, 0.0, 0.0])
    design = Design(["a", "a", "b", "b"], None, 4)
    assert (design.clustered, design.degrees) == (True, 1)
    assert design.variance(values) == pytest.approx(0.25)
    assert Design(None, None, 4).variance(values) == pytest.approx(1 / 12)
    assert summarise(values.tolist(), clusters=["a", "a", "b", "b"]).stderr == pytest.approx(0.5)
    unscored = summarise([1.0, None, 1.0, 0.0, 0.0], clusters=["a", "x", "a", "b", "b"])
    assert (unscored.n, unscored.n_unscored, unscored.stderr) == (4, 1, pytest.approx(0.5))
    assert summarise([1.0, 1.0], clusters=["a", "a"]).interval is None


def test_strata_by_hand() -> None:
    # Within a: s^2 = 2, within b: 8; each half of the samples: (1/2)^2 * 2/2 + (1/2)^2 * 8/2 = 1.25.
    values = np.array([1.0, 3.0, 10.0, 14.0])
    design = Design(None, ["a", "a", "b", "b"], 4)
    assert design.variance(values) == pytest.approx(1.25)
    assert (design.degrees, design.clustered) == (2, False)
    # Strata of one are pooled: they would have no noise at all. One alone joins the smallest.
    assert Design(None, ["a", "b", "c"], 3).degrees == 2
    assert Design(None, ["a", "b", "b", "c", "c", "c"], 6).in_stratum.tolist() == [3, 3]
    # A cluster over two strata leaves no strata.
    assert len(Design(["x", "x", "y"], ["a", "b", "a"], 3).in_stratum) == 1


def test_the_bootstrap_resamples_clusters_and_within_strata() -> None:
    rng = np.random.default_rng(3)
    values = {str(k): float(v) for k, v in enumerate(np.repeat(rng.normal(size=30), 4) + np.tile([0.0, 5, 10, 20], 30))}
    zero = dict.fromkeys(values, 0.0)
    clusters = {key: int(key) // 4 for key in values}
    strata = {key: int(key) % 4 for key in values}
    array = np.array(list(values.values()))
    for given, design in (
        ({"clusters": clusters}, Design(list(clusters.values()), None, 120)),
        ({"strata": strata}, Design(None, list(strata.values()), 120)),
    ):
        got = compare_paired(values, zero, seed=0, draws=4000, **given)  # type: ignore[arg-type]
        assert got.interval is not None
        half = (got.interval.high - got.interval.low) / 2
        assert half == pytest.approx(1.96 * math.sqrt(design.variance(array)), rel=0.1)
    binary = {key: float(value > 8) for key, value in values.items()}
    assert compare_paired(binary, zero, seed=0, draws=500, clusters=clusters).test == "clustered_bootstrap"
    assert compare_paired(binary, zero, seed=0, draws=500, strata=strata).test == "mcnemar_exact"


def test_wilson_at_the_effective_size_is_wilson_where_nothing_is_known_of_it() -> None:
    got, expected = wilson_effective(0.3, 200, 1e9), wilson(60, 200)
    assert (got.low, got.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    for share, size, degrees in ((1.1, 10, 5), (0.5, 0, 5), (0.5, 10, 0)):
        with pytest.raises(ValueError, match="wilson_effective"):
            wilson_effective(share, size, degrees)


@pytest.mark.parametrize("kind", ["plain", "strata", "clusters"])
@pytest.mark.parametrize("binary", [True, False])
def test_pairs_at_once_are_those_one_by_one(kind: str, binary: bool) -> None:
    rng = np.random.default_rng(5)
    cells = [rng.normal(0.2 * k, 1.0, (3 + k % 2, 60)) + rng.normal(size=60) for k in range(4)]
    arms = [Seeds((one > 0).astype(float) if binary else one) for one in cells]
    labels = [k % 12 for k in range(60)]
    design = Design(labels if kind == "clusters" else None, labels if kind == "strata" else None, 60)
    differences, p_values = pairwise(arms, design)
    for i in range(4):
        for j in range(4):
            if i != j:
                alone = crossed_difference(arms[i], arms[j], design)
                assert differences[i, j] == pytest.approx(alone.difference)
                assert p_values[i, j] == pytest.approx(alone.p_value, abs=1e-9)
    with pytest.raises(ValueError, match="every arm needs a score"):
        pairwise([Seeds(np.full((1, 60), NAN)), arms[0]], design)


def test_a_contrast_weighs_its_arms() -> None:
    rng = np.random.default_rng(6)
    a, b, c = (Seeds(rng.normal(size=(3, 40))) for _ in range(3))
    got = crossed_contrast([(a, 0.5), (b, 0.5), (c, -1.0)])
    assert got.difference == pytest.approx((a.cells.mean() + b.cells.mean()) / 2 - c.cells.mean())
    parts = 0.25 * (a.training[0] + b.training[0]) + c.training[0]
    values = (a.means + b.means) / 2 - c.means
    assert got.stderr == pytest.approx(math.sqrt(parts + values.var(ddof=1) / 40))


def test_many_rejected_are_those_of_the_list() -> None:
    rng = np.random.default_rng(7)
    for _ in range(50):
        p_values = rng.uniform(0, 0.1, 12) ** 2
        expected = [(p or 0.0) < 0.05 for p in holm(p_values.tolist())]
        assert holm_rejects(p_values).tolist() == expected
    assert holm_rejects(np.array([NAN, 0.01])).tolist() == [False, True]
    assert holm_rejects(np.array([])).tolist() == []


@pytest.mark.parametrize(("of_seeds", "of_samples"), [(1.0, 0.5), (0.1, 1.0)])
def test_five_seeds_cover_and_do_not_cry_wolf(of_seeds: float, of_samples: float) -> None:
    """Where training noise dominates and where not: at least 93 % of 1,500 sets, and p < 0.05 in at most 7 %."""
    rng = np.random.default_rng(14)
    held = alarms = 0
    for _ in range(1500):
        cells = rng.normal(0, of_seeds, (5, 1)) + rng.normal(0, of_samples, (1, 50)) + rng.normal(0, 1.0, (5, 50))
        told = crossed_mean(Seeds(cells)).interval
        assert told is not None
        held += told.low <= 0.0 <= told.high
        alarms += (crossed_difference(Seeds(cells), Seeds(np.zeros((1, 50)), trained=False)).p_value or 0.0) < 0.05
    assert held / 1500 >= 0.93
    assert alarms / 1500 <= 0.07
