"""Expected values are published (the paper is named), derived by hand beside the assertion, or enumerated exactly."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from harness.core.stats import (
    Comparison,
    Summary,
    cohen_kappa,
    compare_paired,
    holm,
    holm_levels,
    is_binary,
    mcnemar_exact,
    newcombe_paired,
    paired,
    rank_by_significance,
    summarise,
    wilson,
)

NAN = math.nan
finite = st.floats(-1e6, 1e6, allow_subnormal=False)
probability = st.floats(0.0, 1.0)


def pairs_from_table(both: int, only_a: int, only_b: int, neither: int) -> tuple[dict[str, float], dict[str, float]]:
    rows = [(1.0, 1.0)] * both + [(1.0, 0.0)] * only_a + [(0.0, 1.0)] * only_b + [(0.0, 0.0)] * neither
    return {f"s{i}": a for i, (a, _) in enumerate(rows)}, {f"s{i}": b for i, (_, b) in enumerate(rows)}


def keyed(values: list[float]) -> dict[str, float | None]:
    return {f"s{i:05d}": value for i, value in enumerate(values)}


# Floor 2 of the design: planning and reporting start instantly.


def test_import_brings_in_neither_numpy_nor_scipy() -> None:
    code = "import sys, harness.core.stats; print([m for m in ('numpy', 'scipy', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857, Table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_published(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson(successes, n)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)
    assert (interval.level, interval.method) == (0.95, "wilson")


@pytest.mark.parametrize("level", [0.8, 0.95, 0.999])
@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (3, 10), (500, 14_000), (14_000, 14_000)])
def test_wilson_against_statsmodels(successes: int, n: int, level: float) -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    expected = proportion.proportion_confint(successes, n, alpha=1 - level, method="wilson")
    interval = wilson(successes, n, level=level)
    assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-12)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.99))
def test_wilson_bounds_and_mirror(counts: tuple[int, int], level: float) -> None:
    successes, n = counts
    interval = wilson(successes, n, level=level)
    mirrored = wilson(n - successes, n, level=level)
    assert 0.0 <= interval.low <= successes / n <= interval.high <= 1.0
    assert interval.low < interval.high
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((interval.low, interval.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_rejects_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        wilson(successes, n)


# summarise


def test_summarise_mean_by_hand() -> None:
    # 1, 2, 3, 4: sum of squares about 2.5 is 5, variance 5/3, stderr sqrt(5/12); t(0.975, 3) = 3.182446 (any table).
    got = summarise([4.0, None, 1.0, 3.0, 2.0, None])
    assert (got.n, got.n_unscored, got.mean) == (4, 2, 2.5)
    assert got.stderr == pytest.approx(math.sqrt(5 / 12))
    assert got.interval is not None
    assert got.interval.low == pytest.approx(2.5 - 3.182446 * math.sqrt(5 / 12), abs=1e-6)
    assert got.interval.high == pytest.approx(2.5 + 3.182446 * math.sqrt(5 / 12), abs=1e-6)
    assert got.interval.method == "t"


def test_summarise_proportion_by_hand() -> None:
    # Three of four: variance (3 * (1/4)**2 + (3/4)**2) / 3 = 1/4, stderr sqrt(1/4 / 4) = 1/4 = sqrt(p q / (n - 1)).
    got = summarise([1, 0, 1, None, 1], kind="proportion")
    assert got == Summary(4, 1, 0.75, 0.25, wilson(3, 4))


def test_summarise_edges() -> None:
    assert summarise([]) == Summary(0, 0, None, None, None)
    assert summarise([None, None], kind="proportion") == Summary(0, 2, None, None, None)
    assert summarise([0.3]) == Summary(1, 0, 0.3, None, None)
    assert summarise([1.0], kind="proportion") == Summary(1, 0, 1.0, None, wilson(1, 1))
    # 0.1 summed three times and divided by three is not 0.1 in floating point; equal values still have no spread.
    for value in (0.1, 0.7, 1 / 3):
        got = summarise([value] * 3)
        assert (got.mean, got.stderr) == (value, 0.0)
        assert got.interval is not None
        assert (got.interval.low, got.interval.high) == (value, value)


def test_summarise_rejects() -> None:
    with pytest.raises(ValueError, match="all 0 or 1"):
        summarise([0.5, 1.0], kind="proportion")
    for bad in (NAN, math.inf):
        with pytest.raises(ValueError, match="unscored sample is None"):
            summarise([0.5, bad])
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError, match="level"):
            summarise([], level=level)


def test_is_binary() -> None:
    assert is_binary([0, 1.0, None, True])
    assert not is_binary([0, 1, 0.5])
    assert not is_binary([None])
    assert not is_binary([])


@given(st.lists(st.one_of(st.none(), finite), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_summarise_ignores_order_and_stays_in_range(values: list[float | None], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    got = summarise(values)
    assert got == summarise(shuffled)
    scored = [value for value in values if value is not None]
    assert got.n + got.n_unscored == len(values)
    if got.mean is not None:
        assert min(scored) <= got.mean <= max(scored)
    if got.interval is not None and got.mean is not None:
        assert got.interval.low <= got.mean <= got.interval.high


# McNemar and Newcombe


@pytest.mark.parametrize(
    ("wins", "losses", "expected"),
    [
        (1, 9, 2 * (1 + 10) / 2**10),  # 2 * (C(10,0) + C(10,1)) / 2**10 = 0.021484375
        (1, 7, 18 / 256),  # Bentur et al. in Fagerland, Lydersen and Laake 2014: 0.070
        (5, 0, 2 / 32),
        (3, 3, 1.0),  # twice the half-tail exceeds 1
        (0, 0, 1.0),
        (0, 1, 1.0),
    ],
)
def test_mcnemar_by_hand(wins: int, losses: int, expected: float) -> None:
    assert mcnemar_exact(wins, losses) == expected
    assert mcnemar_exact(losses, wins) == expected


@pytest.mark.parametrize(("wins", "losses"), [(12, 31), (200, 260), (3000, 3200), (0, 2000)])
def test_mcnemar_against_statsmodels(wins: int, losses: int) -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    expected = tables.mcnemar([[50, wins], [losses, 60]], exact=True).pvalue
    assert mcnemar_exact(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_and_newcombe_reject_impossible_counts() -> None:
    with pytest.raises(ValueError, match="negative"):
        mcnemar_exact(-1, 2)
    for table in ((0, 0, 0, 0), (3, -1, 0, 2)):
        with pytest.raises(ValueError, match="four counts"):
            newcombe_paired(*table)


@pytest.mark.parametrize(
    ("table", "low", "high", "tolerance"),
    [
        # Newcombe 1998, Statistics in Medicine 17:2635, Table III, method 10; cells e, f, g, h.
        ((36, 12, 2, 0), 0.0569, 0.3404, 5e-5),
        ((20, 12, 2, 16), 0.0562, 0.3292, 5e-5),
        ((18, 12, 2, 18), 0.0562, 0.3290, 5e-5),
        ((36, 14, 0, 0), 0.1528, 0.4167, 5e-5),
        ((35, 14, 0, 1), 0.1461, 0.4175, 5e-5),
        ((18, 14, 0, 18), 0.1441, 0.3963, 5e-5),
        ((2, 97, 1, 0), 0.8721, 0.9854, 5e-5),
        # Printed as 0.8736, but phi < 0 here, so methods 8 and 10 agree, and method 8 is printed as 0.8737: truncated.
        ((1, 97, 1, 1), 0.8736, 0.9850, 1e-4),
        ((0, 29, 1, 0), 0.6666, 0.9882, 5e-5),
        ((2, 98, 0, 0), 0.9178, 0.9945, 5e-5),
        ((1, 98, 0, 1), 0.9171, 0.9916, 5e-5),
        ((0, 30, 0, 0), 0.8395, 1.0, 5e-5),
        ((54, 0, 0, 0), -0.0664, 0.0664, 5e-5),
        ((53, 0, 0, 1), -0.0729, 0.0729, 5e-5),
        ((30, 0, 0, 24), -0.0358, 0.0358, 5e-5),
        ((29, 0, 0, 25), -0.0354, 0.0354, 5e-5),
        ((28, 0, 0, 26), -0.0352, 0.0352, 5e-5),
        ((27, 0, 0, 27), -0.0351, 0.0351, 5e-5),
        # Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33:2850 (Bentur et al.), three decimals.
        ((1, 1, 7, 12), -0.507, -0.026, 5e-4),
        # The R package contingencytables prints four decimals for Cavo et al.
        ((59, 6, 16, 80), -0.1186, -0.0046, 5e-5),
    ],
)
def test_newcombe_published(table: tuple[int, int, int, int], low: float, high: float, tolerance: float) -> None:
    interval = newcombe_paired(*table)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=tolerance)
    assert interval.method == "newcombe_paired"


@given(st.tuples(*[st.integers(0, 300)] * 4).filter(lambda table: sum(table) > 0))
def test_newcombe_bounds_and_antisymmetry(table: tuple[int, int, int, int]) -> None:
    both, only_a, only_b, neither = table
    interval = newcombe_paired(both, only_a, only_b, neither)
    swapped = newcombe_paired(both, only_b, only_a, neither)
    assert -1.0 <= interval.low <= (only_a - only_b) / sum(table) <= interval.high <= 1.0
    assert (-swapped.high, -swapped.low) == pytest.approx((interval.low, interval.high), abs=1e-12)


# compare_paired


def test_compare_binary() -> None:
    a, b = pairs_from_table(both=20, only_a=9, only_b=1, neither=10)
    got = compare_paired(a, b, seed=0)
    # 29/40 and 21/40; discordant 9 and 1, p as derived above.
    assert got == Comparison(
        n=40,
        n_dropped=0,
        mean_a=0.725,
        mean_b=0.525,
        difference=0.2,
        interval=newcombe_paired(20, 9, 1, 10),
        p_value=0.021484375,
        test="mcnemar_exact",
        wins=9,
        losses=1,
        ties=30,
    )


def test_compare_drops_and_counts_what_is_not_in_both() -> None:
    a = {"1": 1.0, "2": 0.0, "3": None, "4": 1.0, "only-a": 1.0}
    b = {"4": 0.0, "3": 1.0, "2": None, "1": 1.0, "only-b": None}
    got = compare_paired(a, b, seed=0)
    # Left: 1 and 4, one tie and one win. Dropped: 2 and 3 (unscored on one side), only-a, only-b.
    assert (got.n, got.n_dropped, got.wins, got.losses, got.ties) == (2, 4, 1, 0, 1)
    assert (got.mean_a, got.mean_b, got.difference, got.p_value) == (1.0, 0.5, 0.5, 1.0)


def test_compare_with_nothing_or_one_pair_claims_nothing() -> None:
    assert compare_paired({"a": 1.0, "b": None}, {"b": 1.0}, seed=0) == Comparison(
        0, 2, None, None, None, None, None, "none", 0, 0, 0
    )
    assert compare_paired({"a": 2.0}, {"a": 0.5}, seed=0) == Comparison(
        1, 0, 2.0, 0.5, 1.5, None, None, "paired_bootstrap", 1, 0, 0
    )


def test_bootstrap_against_enumeration() -> None:
    # Five differences have 5**5 = 3125 equally likely resamples: the exact bootstrap distribution.
    differences = [0.5, -0.25, 0.75, 1.0, -0.5]  # mean 0.3; binary fractions, so the sums below are exact
    means = np.array([math.fsum(draw) / 5 for draw in itertools.product(differences, repeat=5)])
    exact_p = float(np.mean(np.abs(means - 0.3) >= 0.3 - 1e-12))
    got = compare_paired(keyed(differences), keyed([0.0] * 5), seed=7, draws=40_000)
    assert (got.test, got.wins, got.losses, got.ties) == ("paired_bootstrap", 3, 2, 0)
    assert got.difference == pytest.approx(0.3)
    # Standard error of the simulated p is at most 0.5 / sqrt(40000) = 0.0025: allow four of them.
    assert got.p_value == pytest.approx(exact_p, abs=0.01)
    assert got.interval is not None
    # The support is a grid of step 0.05: a simulated quantile may sit one step off.
    expected = np.quantile(means, [0.025, 0.975])
    assert (got.interval.low, got.interval.high) == pytest.approx(tuple(expected), abs=0.051)


@pytest.mark.parametrize(
    ("differences", "expected"),
    # The centred bootstrap alone would say 1/(draws+1) for each; exact sign flips cannot go below 2 ** (1 - m).
    [([0.5, 0.5], 0.5), ([2.0, 2.0, 2.0], 0.25), ([0.5] * 6, 1 / 32)],
)
def test_few_pairs_cannot_be_very_significant(differences: list[float], expected: float) -> None:
    assert compare_paired(keyed(differences), keyed([0.0] * len(differences)), seed=0).p_value == expected


def test_no_difference_at_all() -> None:
    values = keyed([0.1, 0.7, 0.3, 0.3])
    got = compare_paired(values, values, seed=0)
    assert got.interval is not None
    assert (got.difference, got.p_value, got.ties) == (0.0, 1.0, 4)
    assert (got.interval.low, got.interval.high) == (0.0, 0.0)


def test_bootstrap_interval_approaches_the_normal_one() -> None:
    # Central limit: mean -+ 1.96 sd / sqrt(n), to within a few per cent of its half-width at n = 400.
    differences = np.random.default_rng(3).uniform(-1, 1.2, size=400)
    got = compare_paired(keyed(differences.tolist()), keyed([0.0] * 400), seed=1)
    half = 1.959964 * differences.std(ddof=1) / 20
    assert got.interval is not None
    assert got.interval.low == pytest.approx(differences.mean() - half, abs=0.06 * half)
    assert got.interval.high == pytest.approx(differences.mean() + half, abs=0.06 * half)


mixed = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.one_of(st.none(), finite), max_size=12)


@settings(max_examples=60, deadline=None)
@given(mixed, mixed, st.integers(0, 2**32))
def test_compare_ignores_insertion_order_and_swaps_cleanly(
    a: dict[str, float | None], b: dict[str, float | None], seed: int
) -> None:
    got = compare_paired(a, b, seed=seed, draws=200)
    reverse_a, reverse_b = dict(reversed(a.items())), dict(reversed(b.items()))
    assert got == compare_paired(reverse_a, reverse_b, seed=seed, draws=200)
    swapped = compare_paired(b, a, seed=seed, draws=200)
    assert (swapped.wins, swapped.losses, swapped.ties) == (got.losses, got.wins, got.ties)
    assert swapped.p_value == got.p_value
    assert got.n + got.n_dropped == len(set(a) | set(b))
    assert got.p_value is None or 0.0 < got.p_value <= 1.0
    if got.interval is not None and swapped.interval is not None:
        scale = max(1.0, abs(got.interval.low), abs(got.interval.high))
        assert (-swapped.interval.high, -swapped.interval.low) == pytest.approx(
            (got.interval.low, got.interval.high), abs=1e-9 * scale
        )


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_compare_does_not_depend_on_the_hash_seed(hash_seed: str) -> None:
    # Sets of strings iterate in an order that changes from process to process.
    code = (
        "from harness.core.stats import compare_paired; a = {str(i): i % 7 / 3 for i in range(50)}; "
        "print(compare_paired(a, dict.fromkeys(a, 0.9), seed=3, draws=300))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    here = compare_paired({str(i): i % 7 / 3 for i in range(50)}, {str(i): 0.9 for i in range(50)}, seed=3, draws=300)
    assert done.stdout.strip() == repr(here)


def test_seed_changes_the_draws_and_chunks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=101)
    a, b = keyed(values.tolist()), keyed([0.0] * 101)
    whole = compare_paired(a, b, seed=5, draws=500)
    assert whole.interval != compare_paired(a, b, seed=6, draws=500).interval
    monkeypatch.setattr(paired, "CHUNK_CELLS", 777)
    assert compare_paired(a, b, seed=5, draws=500) == whole


def test_mmlu_sized_bootstrap_is_bounded_in_memory() -> None:
    values = np.random.default_rng(0).normal(size=14_000).tolist()
    a, b = keyed(values), keyed([0.0] * 14_000)
    tracemalloc.start()
    try:
        got = compare_paired(a, b, seed=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert got.n == 14_000
    assert peak < 64 * 2**20  # 10,000 x 14,000 indices at once would be 560 MB


def test_compare_rejects() -> None:
    with pytest.raises(ValueError, match="finite"):
        compare_paired({"a": NAN}, {"a": 1.0}, seed=0)
    with pytest.raises(ValueError, match="draws"):
        compare_paired({}, {}, seed=0, draws=0)
    with pytest.raises(ValueError, match="level"):
        compare_paired({}, {}, seed=0, level=95)


# Error rates, simulated with a seed. 1,000 sets put a 95 % rate within 0.95 -+ 0.02 (three standard errors).


def coverage(low_high: list[tuple[float, float]], truth: float) -> float:
    return sum(low <= truth <= high for low, high in low_high) / len(low_high)


def test_coverage_of_t_and_wilson() -> None:
    generator = np.random.default_rng(11)
    means = [summarise(generator.normal(3.0, 2.0, size=12).tolist()).interval for _ in range(1000)]
    shares = [wilson(int(generator.binomial(80, 0.3)), 80) for _ in range(1000)]
    assert 0.92 <= coverage([(i.low, i.high) for i in means if i], 3.0) <= 0.98
    assert 0.92 <= coverage([(i.low, i.high) for i in shares], 0.3) <= 0.98


def test_coverage_of_paired_intervals_and_size_of_their_tests() -> None:
    generator = np.random.default_rng(12)
    continuous, binary, false_alarms = [], [], 0
    for i in range(1000):
        shift = generator.normal(size=60)
        a, b = shift + generator.normal(0.0, 0.5, size=60), shift + generator.normal(0.0, 0.5, size=60)
        got = compare_paired(keyed(a.tolist()), keyed(b.tolist()), seed=i, draws=1000)
        continuous.append(got.interval)
        false_alarms += (got.p_value or 0.0) < 0.05
        counts = generator.multinomial(100, [0.5, 0.2, 0.1, 0.2])  # true difference 0.2 - 0.1
        binary.append(newcombe_paired(*(int(count) for count in counts)))
    assert 0.92 <= coverage([(i.low, i.high) for i in continuous if i], 0.0) <= 0.98
    assert 0.92 <= coverage([(i.low, i.high) for i in binary], 0.1) <= 0.98
    assert 0.02 <= false_alarms / 1000 <= 0.08


# Holm, ranks, kappa


def test_holm_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 = 0.02, 0.03, 0.06, 0.04; the last is lifted to 0.06.
    expected = [0.03, 0.06, 0.06, 0.02]
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(expected)
    # None takes no part in m: the same four numbers.
    got = holm([None, 0.01, 0.04, None, 0.03, 0.005])
    assert got[0] is None and got[3] is None
    assert [p for p in got if p is not None] == pytest.approx(expected)
    assert holm([]) == []
    assert holm([None]) == [None]
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_levels_of_intervals_follow_holm_to_where_it_stops() -> None:
    """Four p-values: tested at 0.05/4 (rejected), then 0.05/3 (0.02 is not), which the others share."""
    assert holm_levels([0.03, None, 0.001, 0.02, 0.04]) == [
        pytest.approx(1 - 0.05 / 3),
        None,
        pytest.approx(1 - 0.05 / 4),
        pytest.approx(1 - 0.05 / 3),
        pytest.approx(1 - 0.05 / 3),
    ]
    # Equal ones are tested alike; nothing that is rejected shares a level with what comes later.
    assert holm_levels([0.001, 0.001, 0.002], alpha=0.1) == [
        pytest.approx(1 - 0.1 / 3),
        pytest.approx(1 - 0.1 / 3),
        pytest.approx(1 - 0.1),
    ]
    assert holm_levels([]) == []


def test_holm_rejects_what_is_no_probability() -> None:
    for bad in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            holm([0.5, bad])


@settings(max_examples=25)  # one call of multipletests takes 50 ms
@given(st.lists(probability, min_size=1, max_size=30))
def test_holm_against_statsmodels(p_values: list[float]) -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    assert holm(list(p_values)) == pytest.approx(multitest.multipletests(p_values, method="holm")[1], abs=1e-12)


@given(st.lists(probability, min_size=1, max_size=30))
def test_holm_is_monotone_and_between_p_and_bonferroni(p_values: list[float]) -> None:
    adjusted = [p for p in holm(list(p_values)) if p is not None]
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1.0, len(p_values) * p)
    assert [q for _, q in sorted(zip(p_values, adjusted, strict=True))] == sorted(adjusted)


def test_rank_counts_the_arms_that_are_better() -> None:
    # Arm 0 beats 1 and 3, arm 2 beats 3: nobody beats 0 and 2, one beats 1, two beat 3.
    better = [
        [False, True, False, True],
        [False, False, False, False],
        [False, False, False, True],
        [False, False, False, False],
    ]
    assert rank_by_significance(better) == [1, 2, 1, 3]
    assert rank_by_significance([]) == []
    with pytest.raises(ValueError, match="square"):
        rank_by_significance([[False, True]])
    for contradiction in ([[True]], [[False, True], [True, False]]):
        with pytest.raises(ValueError, match="each be better"):
            rank_by_significance(contradiction)


def test_kappa_classic() -> None:
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: p_o = 35/50 = 0.7; p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5; kappa 0.2/0.5.
    a = ["yes"] * 25 + ["no"] * 25
    b = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(a, b) == (0.4, 0.7)
    assert cohen_kappa(b, a) == (0.4, 0.7)


def test_kappa_edges() -> None:
    assert cohen_kappa([1, 1, 1], [1, 1, 1]) == (None, 1.0)
    assert cohen_kappa([1, 2], [1, 2]) == (1.0, 1.0)
    assert cohen_kappa([1, 2], [2, 1]) == (-1.0, 0.0)  # p_e = 0.5: (0 - 0.5) / 0.5
    assert cohen_kappa([1, 1], [2, 2]) == (0.0, 0.0)  # no label in common: p_o = p_e = 0
    for a, b in (([], []), ([1], [1, 2])):
        with pytest.raises(ValueError, match="one length"):
            cohen_kappa(a, b)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_kappa_against_statsmodels(labels: list[tuple[int, int]]) -> None:
    raters = pytest.importorskip("statsmodels.stats.inter_rater")
    kappa, agreement = cohen_kappa([a for a, _ in labels], [b for _, b in labels])
    assert agreement == sum(a == b for a, b in labels) / len(labels)
    if kappa is not None:
        table = np.zeros((4, 4))
        for a, b in labels:
            table[a, b] += 1
        assert kappa == pytest.approx(raters.cohens_kappa(table, return_results=False), abs=1e-9)
