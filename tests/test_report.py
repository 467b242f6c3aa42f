import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from report_runs import (
    STEPS,
    Page,
    Row,
    a_pair,
    a_run,
    empty_run,
    evaluated,
    evaluation,
    figure,
    generated,
    sampled,
)

from gadfly.alarms import KINDS
from gadfly.config import Recipe
from gadfly.errors import RunFolderError
from gadfly.stage_settings import stage_settings
from gadfly.stages.report import report
from gadfly.stages.report.curves import stage_panels
from gadfly.stages.report.reading import read_evidence


def test_the_report_loads_neither_torch_nor_openai() -> None:
    code = "import sys, gadfly.stages.report; print({'torch', 'transformers', 'openai'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_clean_run_has_no_remark(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    assert run.remarks() == []
    assert "checks found anything unusual" in run.page()


def an_alarm(name: str, step: int, action: str = "warn", stage: str = "gad") -> Row:
    kind = KINDS[name]
    row = {"stage": stage, "step": step, "since": step, "name": name, "evidence": f"seen at {step}"}
    return row | {"cause": kind.cause, "advice": kind.advice, "action": action}


def test_alarms_stand_on_the_page_with_what_was_done(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    assert "None of the 25 alarms was raised" in run.page()
    rows = [an_alarm("drift", 40), an_alarm("drift", 90), an_alarm("collapse", 60, "stop")]
    run.folder.write_rows("alarms.jsonl", rows)
    went_back = an_alarm("fooled", 80) | {
        "back_to": 50,
        "changes": {"gad.learning_rate": 5e-7},
        "is_done": True,
    }
    run.folder.write_rows("gad/remedies.jsonl", [went_back])
    words = " ".join(Page(run.page()).words.split())
    assert words.count(KINDS["drift"].title) == 1
    assert "drift GAD, step 40, and again up to step 90" in words
    assert "seen at 90" in words
    assert "The stage stopped there." in words
    assert "went back 30 steps, to step 50, and on with gad.learning_rate = 5e-07." in words


def test_few_steps_are_remarked_on(tmp_path: Path) -> None:
    assert a_run(tmp_path, steps=16).remarks() == ["GAD was short"]


def test_a_missing_baseline_and_bad_rows_are_remarked_on(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    bad = {"train": {"rows": 385, "bad": {"empty response": 12, "duplicate prompt": 3}}}
    summary = run.folder.read_json("summary.json")
    del summary["evaluation"]["seqkd-equal-time"]
    run.folder.write_json("summary.json", summary | {"data": bad})
    assert run.remarks() == [
        "No baseline had as much time as GAD",
        "Rows of the train data were left out",
    ]
    assert "15 rows left out, 385 used: duplicate prompt 3, empty response 12." in run.page()


def test_a_stage_begun_with_other_settings_is_remarked_on(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    settings = stage_settings(run.recipe, ("data", "gad"))
    settings["data"]["content"] = "c0ffee"
    run.folder.begin("gad", settings | {"start": "c0ffee"})
    assert run.remarks() == []
    settings["gad"]["group_size"] = 4
    run.folder.write_json("gad/stage.json", {"settings": settings, "done": True})
    assert run.remarks() == ["GAD ran with other settings than this page shows"]
    assert "gad.group_size = 4, now 8" in run.page()


def test_the_line_of_chance_is_that_of_the_loss(tmp_path: Path) -> None:
    run = a_run(tmp_path)

    def drawn(loss: str) -> dict[str, str]:
        recipe = Recipe.model_validate(run.recipe.model_dump(mode="json") | {"discriminator": {"loss": loss}})
        groups = stage_panels(read_evidence(run.folder, recipe), "gad")
        return {panel.metric.name: panel.svg for group in groups for panel in group.panels}

    plain, other = drawn("bradley_terry"), drawn("cross_entropy")
    assert [name for name in plain if plain[name] != other[name]] == ["discriminator/loss"]


def test_rewards_of_the_users_own_are_known_by_their_code_wherever_it_lies(tmp_path: Path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("def brevity(prompt, responses, teachers): ...\n", encoding="utf-8")
    run = a_run(tmp_path)
    rewards = {"brevity": {"function": f"{file}:brevity"}}
    gad = run.recipe.model_dump(mode="json", include={"gad"})["gad"] | {"rewards": rewards}
    run = replace(run, recipe=Recipe.model_validate(run.recipe.model_dump(mode="json") | {"gad": gad}))
    run.folder.begin("gad", stage_settings(run.recipe, ("gad",)))
    assert run.remarks() == []
    file.write_text("def brevity(prompt, responses, teachers): return None\n", encoding="utf-8")
    assert run.remarks() == ["GAD ran with other settings than this page shows"]


@pytest.mark.parametrize(
    ("gad", "outcome", "is_gain"),
    [(0.6, "above", True), (0.4, "not distinguishable", False), (0.2, "below", False)],
)
def test_the_verdict_follows_the_intervals(tmp_path: Path, gad: float, outcome: str, is_gain: bool) -> None:
    run = empty_run(tmp_path)
    run.folder.update_summary("evaluation", evaluation(base=0.1, gad=gad, **{"seqkd-equal-time": 0.35}))
    verdict = run.verdict()
    assert (verdict.outcome, verdict.is_gain) == (outcome, is_gain)
    assert outcome in verdict.sentence
    assert "SeqKD at equal time" in verdict.sentence
    assert f"{gad:.3f} ({gad - 0.05:.3f}–{gad + 0.05:.3f}" in verdict.sentence  # noqa: RUF001
    assert verdict.sentence in run.page()


@pytest.mark.parametrize(
    ("figures", "why"),
    [
        (evaluation(seqkd=0.3, gad=0.6), "Base and SeqKD, equal time not in the table"),
        (evaluation(base=0.1, seqkd=0.3, gad=0.6), "SeqKD, equal time not in the table"),
        (evaluation(base=0.6, gad=0.6, **{"seqkd-equal-time": 0.3}), "not above the base model"),
        (evaluation("rouge_l", base=0.1, gad=0.6, **{"seqkd-equal-time": 0.3}), "ROUGE-L is a diagnostic"),
    ],
)
def test_no_gain_is_claimed_without_its_evidence(tmp_path: Path, figures: Row, why: str) -> None:
    run = empty_run(tmp_path)
    run.folder.update_summary("evaluation", figures)
    verdict = run.verdict()
    assert verdict.outcome == "above"
    assert not verdict.is_gain
    assert why in verdict.caveats[0]
    assert why in run.page()


def test_without_gad_nothing_is_compared(tmp_path: Path) -> None:
    run = empty_run(tmp_path)
    run.folder.update_summary("evaluation", evaluation(base=0.1, seqkd=0.3))
    assert run.verdict().outcome == "no comparison"
    assert "GAD not in the table" in run.page()


def test_a_lone_value_has_no_interval_and_decides_nothing(tmp_path: Path) -> None:
    run = empty_run(tmp_path)
    figures = evaluation(base=0.1, gad=0.6, **{"seqkd-equal-time": 0.3})
    figures["gad"]["ships"]["valid_fraction"] = {"value": 1.0, "n": 1, "interval": [None, None]}
    run.folder.update_summary("evaluation", figures)
    assert run.verdict().outcome == "not distinguishable"
    assert "no interval" in Page(run.page()).words


def test_held_out_answers_stand_beside_the_teachers_score_of_the_same_step(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    before = evaluated(0, "aye", score=-0.5, teacher_score=1.5)
    run.folder.write_rows("samples.jsonl", [before, evaluated(STEPS, "arr", score=2.25, teacher_score=2.75)])
    words = " ".join(Page(run.page()).words.split())
    assert "score -0.500; the teacher's 1.50" in words
    assert "score 2.25; the teacher's 2.75" in words


HOSTILE = "</bdi></article><script>alert(1)</script><img src=x onerror='a()'>\"&amp; \x1b[31m\u202e\ud800\x00"


def test_hostile_text_stays_text_wherever_it_stands(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    more = {"id": HOSTILE, "prompt": HOSTILE, "teacher": HOSTILE}
    group = sampled(STEPS) | more | {"samples": [{"text": HOSTILE, "finished": False, "score": math.nan}]}
    samples = [evaluated(0, HOSTILE, **more), evaluated(STEPS, HOSTILE, **more), group]
    generations = [generated(model, HOSTILE, **more) for model in ("base", HOSTILE)]
    figures = {HOSTILE: {HOSTILE: {HOSTILE: figure(0.5)}}}
    for name, rows in (("samples.jsonl", samples), ("generations/ships.jsonl", generations)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (run.folder.path / name).write_text(lines, encoding="utf-8")
    summary = run.folder.read_json("summary.json")
    summary["evaluation"] |= figures
    summary["data"] = {HOSTILE: {"rows": 1, "bad": {HOSTILE: 2}}}
    summary["pairwise"] = {"ships": {HOSTILE: a_pair((0.4, 0.6), (0.4, 0.6), b=HOSTILE)}}
    summary["judge"] = {"ships": {"judge": HOSTILE, "shares_family": {HOSTILE: HOSTILE}}}
    alarm = dict.fromkeys(("stage", "name", "evidence", "cause", "advice", "action"), HOSTILE)
    (run.folder.path / "alarms.jsonl").write_text(json.dumps(alarm | {"step": 1}) + "\n", encoding="utf-8")
    spent = dict.fromkeys(("answers", "requests", "prompt_tokens", "completion_tokens", "dollars"), 1)
    summary["collect"] = {"teachers": {HOSTILE: 1}, "marked": {HOSTILE: 1}, **spent}
    (run.folder.path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")

    html = run.page()
    page = Page(html)
    assert not page.tags & {"script", "img", "iframe", "object"}
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    shown = HOSTILE[: HOSTILE.index("\x1b")] + "«U+001B»[31m«U+202E»«U+D800»«U+0000»"
    assert page.words.count(shown) >= 12
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", html)


def test_a_huge_answer_is_shortened_and_its_length_told(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    run.folder.append_rows("generations/ships.jsonl", [generated("seqkd", "<" * 2**20)])
    html = run.page()
    assert len(html) < 1_000_000
    assert "1,048,576 characters" in html


@pytest.mark.parametrize(
    "left", [(), ("metrics.jsonl",), ("summary.json",), ("samples.jsonl", "generations")]
)
def test_any_file_may_be_missing(tmp_path: Path, left: tuple[str, ...]) -> None:
    run, whole = empty_run(tmp_path / "part"), a_run(tmp_path / "whole")
    for name in left:
        (whole.folder.path / name).rename(run.folder.path / name)
    page = Page(run.page())
    assert not re.search(r"\b(nan|inf|None(?! of the))\b", page.words)
    assert "arXiv 2511.10643" in page.words


def test_a_run_that_has_only_begun_seqkd_says_so(tmp_path: Path) -> None:
    run = empty_run(tmp_path)
    run.folder.append_rows("metrics.jsonl", [{"stage": "seqkd", "step": 7, "student/loss": 2.5}])
    words = " ".join(Page(run.page()).words.split())
    assert "Trained so far: SeqKD, 7 steps and not finished." in words
    assert "2.50" in words


def test_a_broken_summary_is_a_user_error(tmp_path: Path) -> None:
    run = empty_run(tmp_path)
    (run.folder.path / "summary.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"summary\.json"):
        report(run)


def test_the_page_loads_nothing_and_its_tables_scroll_in_their_own_box(tmp_path: Path) -> None:
    html = a_run(tmp_path).page()
    page = Page(html)
    links = page.values("src") + page.values("href") + page.values("xlink:href")
    assert all(link.startswith(("#", "data:")) for link in links)
    # The settings may name an address as text.
    assert not [value for _, _, value in page.attributes if "http" in value]
    assert not re.search(r"url\((?!#)|@import", html)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert html.count("<table") == len(re.findall(r'<div class="scroll">\s*<table', html))


def test_the_same_folder_gives_the_same_page_but_for_times(tmp_path: Path) -> None:
    first, slower = a_run(tmp_path / "a"), a_run(tmp_path / "b", seconds=90.0)
    assert first.page() == first.page()
    without_times = [re.sub(r'<span class="time">[^<]*', "", run.page()) for run in (first, slower)]
    assert without_times[0] == without_times[1]


def test_a_long_run_is_drawn_in_few_points(tmp_path: Path) -> None:
    run = a_run(
        tmp_path, steps=20_000, planted={"student/grad_norm": lambda done: 1e300 * math.sin(1e4 * done)}
    )
    html = run.page()
    Page(html)
    assert len(html) < 3_000_000
    assert max(path.count("L") for path in re.findall(r' d="([^"]*)"', html)) < 300


def test_settings_that_differ_from_the_defaults_stand_apart(tmp_path: Path) -> None:
    run = empty_run(tmp_path, gad={"group_size": 4})
    words = Page(run.page()).words
    changed, default = words.split("At the default")
    assert "gad.group_size" in changed
    assert "gad.clip_range" in default


def test_few_held_out_prompts_are_said(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    run.folder.update_summary("data", {"valid": {"rows": 19}})
    (remark,) = run.found()
    assert remark.what == "Few prompts are held out"
    assert "n = 19" in remark.evidence


def test_a_batch_has_no_more_prompts_than_there_are(tmp_path: Path) -> None:
    run = a_run(tmp_path, steps=16)
    run.folder.update_summary("data", {"train": {"rows": 30}})
    html = run.page()
    assert "16 steps of 30 prompts" in html
    assert "for each of 30 prompts" in html


def test_the_two_meanings_of_rouge_are_told_apart(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    run.folder.update_summary("evaluation", evaluation("rouge_l", gad=0.4))
    words = " ".join(Page(run.page()).words.split())
    assert "the teacher's answer is cut at 1,536 tokens" in words
    assert "The tables compare with the teacher's whole answer" in words
