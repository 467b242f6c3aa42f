from pathlib import Path

import pytest
from report_runs import Page, Row, a_pair, evaluation, figure, generated, judged, run_with

from gadfly.stages.report.verdict import Verdict


def test_a_judges_score_decides_unless_an_exact_check_does(tmp_path: Path) -> None:
    summary = judged()
    run = run_with(tmp_path, summary)
    assert run.verdict() == Verdict(
        "above",
        True,
        "GAD is above SeqKD at equal time in judge score: 70.0 (70.0–70.0, n\u00a0=\u00a0200) against "  # noqa: RUF001
        "50.0 (50.0–50.0, n\u00a0=\u00a0200). The 95 % intervals do not overlap.",  # noqa: RUF001
        ("Mean length: 20.0 tokens against 20.0.",),
    )
    assert run.remarks() == []
    for model, sets in evaluation(base=0.1, gad=0.3, **{"seqkd-equal-time": 0.3}).items():
        summary["evaluation"][model]["ships"] |= sets["ships"]
    run.folder.write_json("summary.json", summary)
    assert "not distinguishable in valid share" in run.verdict().sentence


def test_a_figure_gad_lacks_does_not_decide(tmp_path: Path) -> None:
    summary = judged()
    summary["evaluation"]["seqkd-equal-time"]["ships"]["valid_fraction"] = figure(0.9)
    assert run_with(tmp_path, summary).verdict().outcome == "above"


@pytest.mark.parametrize(
    ("summary", "said", "remark"),
    [
        (
            judged(shares_family={"teacher (big-judge)": "judgy"}),
            "of one family (judgy) with the teacher (big-judge): that favours them",
            "The judge is of the family it judges",
        ),
        (
            judged(unparsable={"gad": 30, "base": 2}),
            "30 of 230 prompts for GAD (13\u00a0%)",
            "Many verdicts on ships cannot be read",
        ),
        (
            judged(gad_tokens=26.0),
            "1.30 times as long as those of SeqKD at equal time",
            "GAD's answers to ships are longer than those it is held against",
        ),
    ],
)
def test_a_judges_weakness_stands_beside_the_claim_and_among_the_remarks(
    tmp_path: Path, summary: Row, said: str, remark: str
) -> None:
    run = run_with(tmp_path, summary)
    assert run.verdict().is_gain
    assert said in run.verdict().caveats[0]
    assert run.remarks() == [remark]
    assert run.page().count(said) == 2


def named(first: int, second: int, tie: int = 0) -> Row:
    return {"first": first, "second": second, "tie": tie}


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (named(2, 38, 5), "the judge names the second in 95\u00a0% of 40 verdicts for GAD, though"),
        (named(16, 4), "the judge names the first in 80\u00a0% of 20 verdicts for GAD, though"),
        (named(15, 5), None),
        (named(19, 0, 100), None),
        (named(20, 20), None),
    ],
)
def test_a_judge_whose_scores_go_by_the_place_is_pointed_out(
    tmp_path: Path, counts: Row, said: str | None
) -> None:
    run = run_with(tmp_path, judged(named={"gad": counts, "base": named(30, 30)}))
    assert run.remarks() == (["The judge goes by the place on ships"] if said else [])
    if said:
        assert said in run.verdict().caveats[0]
        assert run.page().count(said) == 2


def test_one_order_says_nothing_of_the_place(tmp_path: Path) -> None:
    run = run_with(tmp_path, judged(named={"gad": named(0, 200)}, both_orders=False))
    assert run.remarks() == []


def test_a_judge_whose_preferences_go_by_the_place_is_pointed_out(tmp_path: Path) -> None:
    counts = {"named": named(36, 2, 2), "win": 1, "tie": 18, "loss": 1, "agreed_ties": 1}
    pair = a_pair((0.45, 0.55), (0.45, 0.55), n=20) | counts
    run = run_with(tmp_path, {**judged(), "pairwise": {"ships": {"gad vs seqkd-equal-time": pair}}})
    (remark,) = run.found()
    assert "names the first in 95\u00a0% of 38 verdicts for GAD vs SeqKD at equal time" in remark.evidence
    assert "ties: 1 meant, 17 at odds" in Page(run.page()).words


@pytest.mark.parametrize(("num_verdicts", "both_orders"), [(20, True), (20, False), (19, True)])
def test_scores_that_are_always_the_same_are_pointed_out(
    tmp_path: Path, num_verdicts: int, both_orders: bool
) -> None:
    noted = {"named": {"gad": named(0, num_verdicts - 9), "base": named(0, 9)}, "same_scores": [1.0, 2.5]}
    run = run_with(tmp_path, judged(**noted, both_orders=both_orders))
    if num_verdicts < 20:
        assert run.remarks() == []
        return
    assert run.remarks() == ["The judge gives all answers to ships the same scores"]
    assert "All 20 verdicts on ships give 1 to the first answer and 2.5 to the second" in run.page()


def test_a_longer_answer_has_its_length_controlled_win_rate_beside_it(tmp_path: Path) -> None:
    summary = judged(gad_tokens=26.0)
    summary["pairwise"] = {"ships": {"gad vs seqkd-equal-time": a_pair((0.6, 0.8), (0.4, 0.6))}}
    caveat = run_with(tmp_path, summary).verdict().caveats[0]
    assert "0.700 (0.600–0.800, n\u00a0=\u00a0100), length-controlled 0.500" in caveat  # noqa: RUF001


def test_few_judged_prompts_make_no_claim(tmp_path: Path) -> None:
    verdict = run_with(tmp_path, judged(n=19)).verdict()
    assert not verdict.is_gain
    assert "only 19 prompts were judged" in verdict.caveats[0]


def test_models_stand_in_their_order_and_the_teacher_last(tmp_path: Path) -> None:
    models = ("teacher", "my-arm", "gad", "warmup", "seqkd-equal-time", "seqkd", "base")
    run = run_with(tmp_path, {"evaluation": evaluation(**dict.fromkeys(models, 0.5))})
    rows = run.table().rows
    labels = ["Base", "SeqKD", "SeqKD, equal time", "Warmup", "GAD", "my-arm", "Teacher"]
    assert [row.label for row in rows] == labels
    assert rows[-1].note == "the model behind the answers"


def test_judged_columns_are_explained_and_have_their_own_n(tmp_path: Path) -> None:
    summary = judged()
    summary["evaluation"]["gad"]["ships"]["tell_accuracy"] = figure(0.71, 40)
    run = run_with(tmp_path, summary)
    assert [(column.label, column.n) for column in run.table().columns[:2]] == [
        ("judge score", "200"),
        ("tell accuracy", "40"),
    ]
    words = Page(run.page()).words
    assert "the goal is 0.5, chance" in words
    assert "50 is as good as that one" in words
    assert "The judge is a-judge: scores in both orders." in words


@pytest.mark.parametrize(
    ("figures", "sentence"),
    [
        (
            {"gad": 0.71, "seqkd": 0.8},
            "tells GAD's answers from the teacher's in 71\u00a0% (66–76, n\u00a0=\u00a0100) of cases, "  # noqa: RUF001
            "those of SeqKD in 80\u00a0% (75–85, n\u00a0=\u00a0100); 50\u00a0% is chance",  # noqa: RUF001
        ),
        ({"base": 0.9}, "tells the base model's answers from the teacher's in 90\u00a0%"),
    ],
)
def test_how_well_answers_are_told_apart_is_a_sentence(
    tmp_path: Path, figures: dict[str, float], sentence: str
) -> None:
    by_model = {model: {"ships": {"tell_accuracy": figure(value, 100)}} for model, value in figures.items()}
    assert sentence in run_with(tmp_path, {"evaluation": by_model}).page().replace("&#39;", "'")


@pytest.mark.parametrize(
    ("pair", "reading"),
    [
        (a_pair((0.6, 0.8), (0.55, 0.7)), "GAD is preferred: the interval excludes 0.5, at equal length too"),
        (a_pair((0.6, 0.8), (0.4, 0.6)), "At equal length it includes it, so the preference may be for"),
        (a_pair((0.4, 0.6), (0.4, 0.6)), "Not distinguishable: the interval includes 0.5"),
        (a_pair((0.4, 0.6), (0.2, 0.4)), "at equal length it excludes it: SeqKD at equal time is preferred"),
        (a_pair((0.6, 0.8), (0.2, 0.4)), "GAD is preferred as they stand, at equal length SeqKD at equal"),
        (a_pair((0.2, 0.4), (0.2, 0.4), b="teacher"), "The teacher is preferred: the interval excludes"),
        (a_pair((1.0, 1.0), (1.0, 1.0), n=19), "n = 19: too few to prefer either"),
    ],
)
def test_a_pair_is_read_by_whether_its_intervals_exclude_a_half(
    tmp_path: Path, pair: Row, reading: str
) -> None:
    summary = {**judged(), "pairwise": {"ships": {f"gad vs {pair['b']}": pair}}}
    words = Page(run_with(tmp_path, summary).page()).words
    assert reading in words
    assert f"{pair['win']} / {pair['tie']} / {pair['loss']}" in words
    assert "312 against 280" in words


def test_a_pair_without_a_verdict_has_no_rate(tmp_path: Path) -> None:
    pair = {"a": "gad", "b": "base", "win": 0, "tie": 0, "loss": 0, "unparsable": 3}
    pair["characters"] = {"gad": None, "base": None}
    words = Page(run_with(tmp_path, {**judged(), "pairwise": {"ships": {"gad vs base": pair}}}).page()).words
    assert "No verdict could be read." in words
    assert "3 not readable" in words


def test_the_choice_of_the_best_checkpoint_is_told_with_its_candidates(tmp_path: Path) -> None:
    run = run_with(tmp_path, {"evaluation": evaluation(gad=0.4)})
    candidates = {f"gad/step-{step:06d}": figure(50 + step / 50, 64) for step in (50, 100, 120)}
    note = {"step": 120, "by": "judge_score", "set": "valid", "n": 64, "candidates": candidates}
    run.folder.update_summary("best", {"gad": note})
    run.folder.append_rows("generations/valid.jsonl", [generated("gad/step-000120", "arr")])
    words = Page(run.page()).words
    assert "step 120, chosen by the judge's score, on 64 held-out prompts, never by the training" in words
    assert "overlaps none of the others" in words
    assert "Held-out prompts, checkpoints of GAD" in words
    run.folder.update_summary("best", {"gad": {"by": "tell_accuracy_same_length"}})
    assert "tells it least from the teacher at the same length" in Page(run.page()).words


def test_a_choice_that_was_made_anew_while_training_is_by_rouge(tmp_path: Path) -> None:
    run = run_with(tmp_path, {"stages": {"gad": {"steps": 120, "seconds": 60.0}}})
    run.folder.append_rows("metrics.jsonl", [{"stage": "gad", "step": 120, "student/loss": 2.5}])
    note = {"step": 100, "by": "judge_score", "set": "valid", "n": 64, "candidates": {}}
    run.folder.update_summary("best", {"gad": note})
    (run.folder.path / "gad" / "step-000120").mkdir(parents=True)
    (run.folder.path / "gad" / "best").symlink_to("step-000120")
    words = Page(run.page()).words
    assert "best kept checkpoint at step 120, by ROUGE-L, a diagnostic" in words
    assert "chosen by the judge" not in words


@pytest.mark.parametrize(("dollars", "cost"), [(3.2145, "$3.21"), (None, "cost not known")])
def test_what_was_collected_is_told(tmp_path: Path, dollars: float | None, cost: str) -> None:
    facts = {"answers": 1200, "marked": {"cut": 30, "refusal": 12}, "teachers": {"a-1": 1190, "a-2": 10}}
    spent = {"requests": 1300, "prompt_tokens": 5000, "completion_tokens": 70_000, "dollars": dollars}
    teacher = {"train_on": ["cut"]}
    words = Page(run_with(tmp_path, {"collect": facts | spent}, teacher=teacher).page()).words
    assert "1,200 answers from a-1 (1,190) and a-2 (10)." in words
    assert f"1,300 requests, 5,000 tokens of questions, 70,000 of answers: {cost}" in words
    cut, refusal = (words.index(meaning) for meaning in ("the teacher's limit cut it", "would not answer"))
    assert "trained on" in words[cut:refusal]
    assert "left out" in words[refusal:]


def test_a_run_without_a_judge_or_a_collection_shows_neither(tmp_path: Path) -> None:
    words = Page(run_with(tmp_path, {"evaluation": evaluation(gad=0.4)}).page()).words
    assert not [word for word in ("Pairs before", "Collected", "judge score", "The best") if word in words]
