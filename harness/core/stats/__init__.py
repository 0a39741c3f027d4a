"""Intervals, paired comparisons and corrections for many comparisons: the arithmetic behind every number in a report.

numpy and scipy are imported inside the functions that need them: planning and `--help` import this and must start at
once. Nothing here imputes: an unscored sample is None (NaN in an array), is left out of every mean and is counted.
"""

from harness.core.stats.agreement import cohen_kappa as cohen_kappa
from harness.core.stats.crossed import (
    MIN_SEEDS as MIN_SEEDS,
    NOTE_FEW_SEEDS as NOTE_FEW_SEEDS,
    CrossedDifference as CrossedDifference,
    CrossedSummary as CrossedSummary,
    Seeds as Seeds,
    crossed_contrast as crossed_contrast,
    crossed_difference as crossed_difference,
    crossed_mean as crossed_mean,
    pairwise as pairwise,
)
from harness.core.stats.estimated import (
    Estimated as Estimated,
    estimated_mean as estimated_mean,
)
from harness.core.stats.intervals import (
    Design as Design,
    Interval as Interval,
    Summary as Summary,
    is_binary as is_binary,
    summarise as summarise,
    wilson as wilson,
    wilson_effective as wilson_effective,
)
from harness.core.stats.many import (
    holm as holm,
    holm_levels as holm_levels,
    holm_rejects as holm_rejects,
    rank_by_significance as rank_by_significance,
)
from harness.core.stats.paired import (
    Comparison as Comparison,
    compare_paired as compare_paired,
    mcnemar_exact as mcnemar_exact,
    newcombe_paired as newcombe_paired,
)
from harness.core.stats.wins import (
    LEAST_PAIRS as LEAST_PAIRS,
    WITHIN as WITHIN,
    WinShare as WinShare,
    outcome as outcome,
    share_at_equal_length as share_at_equal_length,
    share_at_matched_length as share_at_matched_length,
    win_share as win_share,
)
