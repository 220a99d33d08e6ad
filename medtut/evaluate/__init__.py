"""Judging: metrics per case and statistics over cases and seeds."""

from medtut.evaluate.brats import (
    case_table,
    hd95,
    region_dice,
    score_case,
    score_cases,
    summary,
)
from medtut.evaluate.published import (
    brightest_blob,
    inflation,
    oracle_grid,
    published_dice,
    threshold_baseline,
)
from medtut.evaluate.segmentation import outputs, tissue_dice
from medtut.evaluate.statistics import Comparison, interval, paired_comparison

__all__ = [
    "Comparison", "brightest_blob", "case_table", "hd95", "inflation", "interval",
    "oracle_grid", "outputs", "paired_comparison", "published_dice", "region_dice",
    "score_case", "score_cases", "summary", "threshold_baseline", "tissue_dice",
]  # fmt: skip
