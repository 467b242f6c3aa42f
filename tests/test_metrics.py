"""The headlines, and in-group ranking against ROUGE-L: Spearman's rank correlation in a group."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from gadfly.groups import Branch, Group
from gadfly.metrics import HEADLINES
from gadfly.recipe_file import load_recipe
from gadfly.stages.diagnostics import Metrics, ranking_metrics
from gadfly.stages.gad import gad
from gadfly.stages.run import open_run
from gadfly.stages.warmup import warmup
from gadfly.text_metrics import rouge_l

NAME = "detail/rouge_rank_correlation"
WORDS = "one two three four five six"


def group_of(*students: str, teachers: tuple[str, ...] = (WORDS,)) -> Group:
    def branch(text: str) -> Branch:
        return Branch((5,), True, text)

    return Group("p", (1,), tuple(map(branch, teachers)), tuple(map(branch, students)))


def first_words(count: int) -> str:
    """A text that shares so many words with the teacher's, in order."""
    return " ".join(WORDS.split()[:count])


def ranking(scores: list[list[float]], groups: list[Group]) -> Metrics:
    return ranking_metrics(torch.tensor(scores), groups)


def test_headlines_are_few_and_each_says_what_it_means_and_what_bad_looks_like() -> None:
    assert 15 <= len({metric.name for metric in HEADLINES}) == len(HEADLINES) <= 22
    assert {metric.name.split("/")[0] for metric in HEADLINES}.isdisjoint({"detail", "time"})
    assert all(metric.label and metric.meaning and metric.bad for metric in HEADLINES)


def test_scores_in_the_order_of_the_overlap_correlate_fully_whatever_their_size() -> None:
    group = group_of(*map(first_words, (1, 2, 4, 6)))
    assert ranking([[-9.0, 0.1, 0.2, 50.0]], [group]) == {NAME: pytest.approx(1)}
    assert ranking([[3.0, 2.0, 1.0, 0.0]], [group]) == {NAME: pytest.approx(-1)}


def test_equal_values_share_the_mean_of_their_ranks() -> None:
    # Scores rank 1.5, 1.5, 3; overlaps 1, 2, 3: covariance 1.5 over the root of 1.5 times 2.
    group = group_of(*map(first_words, (1, 2, 3)))
    assert ranking([[0.0, 0.0, 1.0]], [group]) == {NAME: pytest.approx(0.75**0.5)}


def test_the_overlap_is_with_the_nearest_teacher_response() -> None:
    group = group_of("alpha beta", "one alpha", teachers=(WORDS, "alpha beta"))
    assert ranking([[1.0, 0.0]], [group]) == {NAME: pytest.approx(1)}


def test_a_group_without_an_order_is_left_out() -> None:
    ordered = group_of(*map(first_words, (1, 2, 4, 6)))
    alike = group_of(*["one two"] * 4)
    rising = [0.0, 1.0, 2.0, 3.0]
    # Equal but for rounding is equal.
    flat = [7.0, 7.0, 7.0 + 5e-7, 7.0]
    assert ranking([rising, rising, flat], [ordered, alike, ordered]) == {NAME: pytest.approx(1)}
    assert ranking([rising, rising[::-1]], [ordered, ordered]) == {NAME: pytest.approx(0, abs=1e-12)}


def test_without_any_order_there_is_no_metric() -> None:
    assert ranking([[0.0, 1.0], [2.0, 2.0]], [group_of("no", "yes"), group_of("one", "one two")]) == {}
    assert ranking([[1.0]], [group_of("one two")]) == {}


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 6)), min_size=5, max_size=5), min_size=1)
)
def test_it_is_the_mean_of_scipys_spearman_over_the_groups_with_an_order(
    drawn: list[list[tuple[int, int]]],
) -> None:
    groups = [group_of(*(first_words(count) for _, count in samples)) for samples in drawn]
    scores = [[float(score) for score, _ in samples] for samples in drawn]
    expected = []
    # The first 32 groups of a step are enough.
    for own, group in zip(scores[:32], groups[:32], strict=True):
        overlap = [rouge_l(branch.text, WORDS) for branch in group.students]
        if len(set(own)) > 1 and len(set(overlap)) > 1:
            expected.append(spearmanr(own, overlap).statistic)
    found = ranking(scores, groups)
    if expected:
        assert found[NAME] == pytest.approx(sum(expected) / len(expected), abs=1e-9)
    else:
        assert found == {}


def test_warmup_and_gad_log_it_where_they_are_evaluated(recipe_file: Path, tmp_path: Path) -> None:
    # One-letter words, of which even random samples hold some.
    letters = "a e i o u 1"
    rows = [{"prompt": f"say {n}", "response": letters} for n in range(40)]
    data = tmp_path / "letters.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = [
        f"data.train={data}",
        "warmup.learning_rate=1e-2",
        "warmup.max_steps=12",
        "warmup.group_size=6",
        "warmup.batch_prompts=16",
        "gad.group_size=6",
    ]
    with open_run(load_recipe(recipe_file, settings)) as run:
        warmup(run)
        gad(run)
        logged = [
            (row["stage"], row["step"], row[NAME]) for row in run.folder.rows("metrics.jsonl") if NAME in row
        ]
    steps = {stage: [step for name, step, _ in logged if name == stage] for stage in ("warmup", "gad")}
    assert steps == {"warmup": [1, 4, 8, 12, 16], "gad": [1, 3, 6]}
    assert all(-1 <= value <= 1 for _, _, value in logged)
