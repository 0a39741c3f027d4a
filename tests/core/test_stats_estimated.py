"""The difference estimator: by hand, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from harness.core.stats import Seeds, estimated_mean

WHOLE, STRATA = np.array([1.0, 1, 0, 0, 1, 0]), list("aaaabb")
PART = [0, 2, 4, 5]


def estimated(arm: list[list[float]], *, strata: list[str] | None = None, **more: Any) -> Any:
    labels = [STRATA[place] for place in PART] if strata is None else strata
    return estimated_mean(Seeds(np.array(arm)), WHOLE[PART], labels, WHOLE, STRATA, **more)


def test_by_hand() -> None:
    """Stratum a: 4 samples, of which 2 differ by 0 and 1; b: both of 2, no difference.

    Mean 1/2 + 4/6 x 1/2. Of the draw (4/6)^2 (1 - 2/4) (1/2) / 2 = 1/18, and none in b, which was asked whole. Of the
    whole: within a all of the arm's scores are 1, in b their variance is 1/2, so 2/6 x 1/2 / 6 = 1/36. In all 1/12, on
    4 - 2 degrees of freedom; t is 4.302653.
    """
    found = estimated([[1, 1, 1, 0]])
    assert found.mean == pytest.approx(5 / 6)
    assert found.stderr**2 == pytest.approx(1 / 12)
    assert (found.n, found.n_whole, found.degrees, found.plain) == (4, 6, pytest.approx(2), 0.75)
    assert found.interval.high - found.mean == pytest.approx(4.302653 * (1 / 12) ** 0.5)


def test_scores_of_0_and_1_have_a_pair_more_and_an_interval_within() -> None:
    """1 / (4 + 2) more in the variance of each stratum: 4/9 x 1/2 x (1/2 + 1/6) / 2 + 1/36 = 2/27 + 1/36."""
    found = estimated([[1, 1, 1, 0]], range_of=(0.0, 1.0))
    assert found.stderr**2 == pytest.approx(2 / 27 + 1 / 36)
    assert (found.interval.low, found.interval.high) == (0.0, 1.0)
    # An arm that agrees on all of the part is not known to agree on all of the whole.
    assert estimated([[1, 0, 1, 0]], range_of=(0.0, 1.0)).stderr > estimated([[1, 0, 1, 0]]).stderr


def test_training_noise_is_in_it_from_three_seeds_on() -> None:
    same = [[1, 1, 1, 0.0]] * 3
    apart = [[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1.0]]
    one, other = Seeds(np.array(same)), Seeds(np.array(apart))
    assert one.training == (0.0, 2) and other.training[0] > 0
    assert estimated(apart).stderr ** 2 > other.training[0]
    assert estimated(same).stderr == pytest.approx(estimated(same[:1]).stderr)


def test_what_cannot_be_estimated_is_not() -> None:
    assert estimated([[1, float("nan"), 1, 0]]) is None
    assert estimated([[1, 1, 1, 0]], strata=list("aaaa")) is None
    assert estimated([[1, 1, 1, 0]], strata=list("abbb")) is None  # three of two
