from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.special import expit

from harness.core.stats import Interval, outcome, share_at_equal_length, share_at_matched_length, win_share
from harness.core.stats.wins import alike


def pairs(
    n: int, *, slope: float, intercept: float = 0.0, shift: float = 0.0
) -> tuple[list[float], list[tuple[float, float]]]:
    """Outcomes that depend on the difference of length (in 40 characters) and on nothing else but an intercept."""
    generator = np.random.default_rng(5)
    own, other = generator.integers(20, 200, n) + shift, generator.integers(20, 200, n)
    p = expit(intercept + slope * (own - other) / 40)
    wins = (generator.random(n) < p).astype(float)
    return wins.tolist(), [(float(x), float(y)) for x, y in zip(own, other, strict=True)]


def ends(interval: Interval | None) -> tuple[float, float]:
    assert interval is not None
    return interval.low, interval.high


def test_an_outcome_follows_the_direction_and_a_tie_is_half() -> None:
    assert [outcome(2, 1), outcome(1, 2), outcome(1, 1)] == [1.0, 0.0, 0.5]
    assert [outcome(2, 1, higher_is_better=False), outcome(1, 1, higher_is_better=False)] == [0.0, 0.5]
    with pytest.raises(ValueError, match="scores must be finite"):
        outcome(math.nan, 1.0)


def test_ties_are_half_wins_in_wilsons_interval() -> None:
    # z^2 = 3.841459, 2.5 wins of 4: (5 + z^2 +- z sqrt(z^2 + 4 * 2.5 * 0.375)) / (2 (4 + z^2)).
    found = win_share([1.0, 1.0, 0.5, 0.0])
    assert (found.n, found.share) == (4, 0.625)
    assert ends(found.interval) == pytest.approx((0.219425, 0.908101), abs=1e-5)
    tied = win_share([0.5] * 20)
    # A bootstrap of ties would have no width: z / sqrt(20 + z^2) / 2 on either side.
    assert tied.share == 0.5 and ends(tied.interval) == pytest.approx((0.2993, 0.7007), abs=1e-4)


def test_pairs_that_hang_together_count_as_fewer() -> None:
    # Four prompts with two answers each that agree: variance 1/16, so 0.75 * 0.25 * 16 = 3 pairs, Student's t on 3.
    found = win_share([1, 1, 1, 1, 1, 1, 0, 0], clusters=list("aabbccdd"))
    assert found.interval is not None and found.interval.method == "wilson_effective"
    assert ends(found.interval) == pytest.approx((0.130689, 0.983571), abs=1e-4)
    assert win_share([1, 0, 1], clusters=list("aaa")).interval is None


def test_what_is_no_outcome_is_refused() -> None:
    for values in ([1.0, 1.5], [-0.1], [math.nan]):
        with pytest.raises(ValueError):
            win_share(values)
    assert win_share([]).withheld == "no pair was scored"


def test_lengths_are_alike_within_a_tenth_of_the_longer() -> None:
    assert [alike(100, 110), alike(90, 100), alike(0, 0)] == [True, True, True]  # 10 <= 11; 10 <= 10; nothing said
    assert [alike(100, 112), alike(0, 1), alike(112, 100)] == [False, False, False]  # 12 > 11.2
    for wrong in ((-1.0, 2.0), (math.nan, 2.0)):
        with pytest.raises(ValueError):
            share_at_matched_length([1.0], [wrong])


def test_a_win_rate_at_matched_length_is_of_those_pairs_alone() -> None:
    outcomes, lengths = [1.0] * 30 + [0.5] * 10 + [0.0] * 20 + [1.0] * 40, [(100.0, 95.0)] * 60 + [(100.0, 50.0)] * 40
    found = share_at_matched_length(outcomes, lengths)
    assert (found.n, found.share) == (60, 35 / 60)
    few = share_at_matched_length(outcomes[11:], lengths[11:])
    assert (few.n, few.share) == (49, None)
    assert few.withheld == "49 of 89 pairs have lengths within 10%, and 50 are needed"


def test_the_fit_is_a_logistic_regression_with_half_a_win_and_half_a_loss_on_the_slope() -> None:
    outcomes, lengths = pairs(120, slope=0.8, intercept=0.5)
    d = np.array([own - other for own, other in lengths])
    rows = np.vstack([np.column_stack([np.ones(120), d / d.std()]), [0.0, 1.0]])
    peer = sm.GLM(np.append(outcomes, 0.5), rows, family=sm.families.Binomial()).fit()
    found = share_at_equal_length(outcomes, lengths, seed=0, draws=20)
    assert found.share == pytest.approx(expit(peer.params[0]), abs=1e-9)


@pytest.mark.parametrize("slope", [1.0, 400.0])  # 400: the longer answer always wins
def test_where_length_alone_decides_nothing_is_left_at_equal_length(slope: float) -> None:
    outcomes, lengths = pairs(1_500, slope=slope, shift=40)
    whole, matched = win_share(outcomes), share_at_matched_length(outcomes, lengths)
    fitted = share_at_equal_length(outcomes, lengths, seed=0, draws=200)
    assert whole.share is not None and whole.share > 0.6 and ends(whole.interval)[0] > 0.6
    for found in (matched, fitted):
        low, high = ends(found.interval)
        assert found.share == pytest.approx(0.5, abs=0.12) and low < 0.5 < high


def test_what_does_not_come_of_length_is_found_again() -> None:
    # Longer answers are worse, and B's are longer and better all the same: sigmoid(1) = 0.731 at equal length.
    outcomes, lengths = pairs(2_000, slope=-1.0, intercept=1.0, shift=40)
    low, high = ends(share_at_equal_length(outcomes, lengths, seed=0, draws=200).interval)
    assert low < 0.731 < high and high - low < 0.08
    assert (win_share(outcomes).share or 0) < 0.6


def test_a_fit_is_withheld_where_it_would_say_nothing() -> None:
    outcomes, lengths = pairs(200, slope=1.0)

    def why(outcomes: list[float], lengths: list[tuple[float, float]], clusters: list[int] | None = None) -> str | None:
        found = share_at_equal_length(outcomes, lengths, seed=0, draws=5, clusters=clusters)
        assert (found.share is None) is (found.withheld is not None)
        return found.withheld

    assert why(outcomes[:50], lengths[:50]) is None
    assert why(outcomes[:49], lengths[:49]) == "49 pairs, and a fit needs 50"
    assert "of one length" in (why(outcomes, [(7.0, 7.0)] * 200) or "")
    assert why([1.0] * 195 + [0.0] * 5, lengths) == "195 wins in 200 pairs, and a fit needs 10 wins and as many losses"
    longer = [(own + 500, other) for own, other in lengths]
    assert why(outcomes, longer) == (
        "in all but 0 of 200 pairs the answer is the longer one: equal length lies outside of what was seen"
    )
    assert "hang together in 4 clusters" in (why(outcomes, lengths, [k // 50 for k in range(200)]) or "")


def test_a_fit_of_clusters_is_as_uncertain_as_there_are_few_of_them() -> None:
    outcomes, lengths = pairs(100, slope=0.5, intercept=0.3)
    alone = ends(share_at_equal_length(outcomes, lengths, seed=0, draws=400).interval)
    # Each pair four times over tells nothing new.
    again = share_at_equal_length(outcomes * 4, lengths * 4, seed=0, draws=400, clusters=list(range(100)) * 4)
    low, high = ends(again.interval)
    assert high - low == pytest.approx(alone[1] - alone[0], rel=0.2)
