"""Remarks on how far a result can be trusted: what was seen, the numbers, the likely cause, what to change.

Every threshold is a starting point from cases others have met, not a measured optimum. There is no
overall health score: a run can look fine in every figure and still be none the better for it.
"""

from collections.abc import Callable, Iterator

from gadfly.stages.report.reading import Evidence
from gadfly.stages.report.remarks.judging import (
    by_place,
    favoured,
    longer_and_judged,
    same_scores,
    unreadable,
)
from gadfly.stages.report.remarks.remark import Remark
from gadfly.stages.report.remarks.training import few_held_out, few_steps
from gadfly.stages.report.remarks.trust import bad_rows, no_equal_time_baseline, other_settings

CHECKS: tuple[Callable[[Evidence], Iterator[Remark]], ...] = (
    no_equal_time_baseline,
    favoured,
    unreadable,
    same_scores,
    by_place,
    longer_and_judged,
    few_steps,
    few_held_out,
    other_settings,
    bad_rows,
)
NUM_CHECKS = len(CHECKS)


def remarks(evidence: Evidence) -> list[Remark]:
    """Every remark that applies, those on the trust in the result first."""
    return [remark for check in CHECKS for remark in check(evidence)]
