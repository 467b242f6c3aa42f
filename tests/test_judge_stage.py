"""The judge stage as a user runs it: generations in, verdicts and figures out, nothing paid for twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_server import Body, Fault, FaultServer

from gadfly.errors import ApiError, ConfigError, UserError
from gadfly.recipe_file import load_recipe
from gadfly.stages.judge import judge
from gadfly.stages.run import open_run

NUM_PROMPTS = 6
Folder = Callable[..., Path]


@pytest.fixture
def generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """A run whose models all answered; returns the recipe."""
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")

    def make(
        answers: dict[str, Callable[[int], str]], *, num_prompts: int = NUM_PROMPTS, teacher: str = "gpt-4"
    ) -> Path:
        rows = [
            {"id": str(n), "prompt": f"question {n}", "response": f"taught {n}", "teacher": teacher}
            for n in range(num_prompts)
        ]
        (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        generations = tmp_path / "runs" / "a" / "generations"
        generations.mkdir(parents=True, exist_ok=True)
        with open(generations / "quiz.jsonl", "w") as file:
            for model, say in answers.items():
                for n in range(num_prompts):
                    row = {"model": model, "checkpoint": model, "id": str(n), "prompt": f"question {n}"}
                    file.write(json.dumps({**row, "response": say(n), "finished": True}) + "\n")
        recipe = tmp_path / "a.toml"
        recipe.write_text(
            'name = "a"\n[data]\ntest = { quiz = "test.jsonl" }\n[student]\nmodel = "Qwen/Qwen3-4B"\n'
            '[judge]\nmodel = "judge-1"\n'
        )
        return recipe

    return make


def run_judge(recipe: Path, server: FaultServer | None, *overrides: str) -> dict[str, Any]:
    """Judge, and return the summary."""
    address = [f"judge.base_url={server.base_url}"] if server else []
    with open_run(load_recipe(recipe, [*address, *overrides])) as run:
        judge(run)
        return run.folder.read_json("summary.json")


def texts(body: Body) -> str:
    return "\n".join(message["content"] for message in body["messages"])


def places(body: Body, *marks: str) -> list[str]:
    """The texts in the order they stand in what the judge was asked."""
    return sorted(marks, key=texts(body).index)


def is_reference(body: Body) -> bool:
    return "Assistant" not in texts(body)


def score_judge(body: Body) -> str:
    """Gives 9 to "good", 3 to "bad", 6 to its own answer and to the teacher."""
    if is_reference(body):
        return "my own answer"
    worth = {"good": 9, "bad": 3, "taught": 6, "my own": 6}
    shown = [mark for mark in worth if mark in texts(body)]
    return " ".join(str(worth[mark]) for mark in places(body, *shown)) + "\nBecause."


def test_a_score_is_the_students_share_of_both(generated: Folder) -> None:
    recipe = generated({"seqkd": lambda n: f"bad {n}", "gad": lambda n: f"good {n}"})
    with FaultServer(answer=score_judge) as server:
        summary = run_judge(recipe, server, "judge.method=score")
    figures = {model: sets["quiz"] for model, sets in summary["evaluation"].items()}
    assert figures["gad"]["judge_score"]["value"] == pytest.approx(100 * 9 / 15)
    assert figures["seqkd"]["judge_score"]["value"] == pytest.approx(100 * 3 / 9)
    assert figures["teacher"]["judge_score"]["value"] == pytest.approx(50)
    assert figures["gad"]["judge_score_of_means"]["value"] == pytest.approx(100 * 9 / 15)
    assert figures["gad"]["judge_score"]["n"] == NUM_PROMPTS
    # One reference a prompt for all models, then three models in both orders.
    assert sum(server.ledger.paid.values()) == NUM_PROMPTS * (1 + 3 * 2)


def test_a_judge_of_places_favours_nobody_when_both_orders_are_asked(generated: Folder) -> None:
    recipe = generated({"gad": lambda n: f"good {n}"})
    with FaultServer(answer=lambda body: "mine" if is_reference(body) else "10 1\n") as server:
        both = run_judge(recipe, server, "judge.method=score")
        one = run_judge(recipe, server, "judge.method=score", "judge.both_orders=false")
    assert both["evaluation"]["gad"]["quiz"]["judge_score"]["value"] == pytest.approx(50)
    # The paper's single order has the student second.
    assert one["evaluation"]["gad"]["quiz"]["judge_score"]["value"] == pytest.approx(100 / 11)


def test_no_verdict_is_paid_for_twice(generated: Folder) -> None:
    recipe = generated({"seqkd": lambda n: f"bad {n}", "gad": lambda n: f"good {n}"})
    with FaultServer(answer=score_judge) as server:
        first = run_judge(recipe, server, "judge.method=score")
        paid = sum(server.ledger.paid.values())
        assert run_judge(recipe, server, "judge.method=score") == first
        assert sum(server.ledger.paid.values()) == paid


def test_a_better_answer_wins_in_both_orders(generated: Folder) -> None:
    recipe = generated(
        {"base": lambda n: f"bad {n}", "seqkd": lambda n: f"bad too {n}", "gad": lambda n: f"good {n}"}
    )

    def prefer(body: Body) -> str:
        other = "taught" if "taught" in texts(body) else "bad"
        return "Why.\n" + ("[[A]]" if places(body, "good", other)[0] == "good" else "[[B]]")

    with FaultServer(answer=prefer) as server:
        summary = run_judge(recipe, server, "judge.method=pairwise")
    pairs = summary["pairwise"]["quiz"]
    assert list(pairs) == ["gad vs seqkd", "gad vs base", "gad vs teacher"]
    assert all(pair["win"] == NUM_PROMPTS and pair["win_rate"]["value"] == 1 for pair in pairs.values())
    assert pairs["gad vs base"]["characters"]["gad"]["value"] == len("good 1")


def test_a_judge_that_always_prefers_the_first_gives_ties(generated: Folder) -> None:
    recipe = generated({"seqkd": lambda n: f"bad {n}", "gad": lambda n: f"good {n}"})
    with FaultServer(answer=lambda _: "[[A]]") as server:
        summary = run_judge(recipe, server, "judge.method=pairwise", 'judge.pairs=[["gad", "seqkd"]]')
    pair = summary["pairwise"]["quiz"]["gad vs seqkd"]
    assert (pair["win"], pair["tie"], pair["loss"]) == (0, NUM_PROMPTS, 0)
    assert pair["win_rate"]["value"] == 0.5
    assert (pair["agreed_ties"], pair["named"]) == (0, {"first": 2 * NUM_PROMPTS, "second": 0, "tie": 0})


def test_a_judge_that_finds_all_alike_gives_ties_of_another_kind(generated: Folder) -> None:
    recipe = generated({"seqkd": lambda n: f"bad {n}", "gad": lambda n: f"good {n}"})

    def undecided(body: Body) -> str:
        # Prompt 2 has one verdict that cannot be read, prompt 4 one that names an answer.
        first_is_good = places(body, "good", "bad")[0] == "good"
        if "question 2" in texts(body) and first_is_good:
            return "hard to say"
        return "[[B]]" if "question 4" in texts(body) and first_is_good else "[[C]]"

    with FaultServer(answer=undecided) as server:
        summary = run_judge(recipe, server, "judge.method=pairwise", 'judge.pairs=[["gad", "seqkd"]]')
    pair = summary["pairwise"]["quiz"]["gad vs seqkd"]
    assert (pair["tie"], pair["agreed_ties"], pair["unparsable"]) == (NUM_PROMPTS - 1, NUM_PROMPTS - 2, 1)
    assert pair["named"] == {"first": 0, "second": 1, "tie": 2 * (NUM_PROMPTS - 1) - 1}


@pytest.mark.parametrize(
    ("of_prompt_3", "unparsable", "named", "same_scores"),
    [
        (("1 2", "1 2"), 0, (0, 12, 0), [1, 2]),
        (("9 8", "2 2"), 0, (1, 10, 1), None),
        # What can be read in one order only does not count, nor is it among the places.
        (("9 8", "?"), 1, (0, 10, 0), [1, 2]),
    ],
)
def test_which_place_the_scores_favour_is_noted(
    generated: Folder,
    of_prompt_3: tuple[str, str],
    unparsable: int,
    named: tuple[int, int, int],
    same_scores: list[int] | None,
) -> None:
    recipe = generated({"gad": lambda n: f"good {n}"})

    def second_is_better(body: Body) -> str:
        if is_reference(body):
            return "mine"
        if "question 3" not in texts(body):
            return "1 2"
        return of_prompt_3[places(body, "good 3", "mine").index("mine")]

    with FaultServer(answer=second_is_better) as server:
        summary = run_judge(recipe, server, "judge.method=score", 'judge.models=["gad"]')
    noted = summary["judge"]["quiz"]
    assert noted["unparsable"] == {"gad": unparsable}
    assert noted["named"] == {"gad": dict(zip(("first", "second", "tie"), named, strict=True))}
    assert noted["same_scores"] == same_scores


def test_an_unreadable_verdict_is_asked_again_and_then_counted(generated: Folder) -> None:
    recipe = generated({"gad": lambda n: f"good {n}"})

    def mumble(body: Body) -> str:
        if is_reference(body):
            return "my own"
        # Of prompt 3 nothing can ever be read; the others only at the second time of asking.
        return "9 6" if body["temperature"] > 0 and "question 3" not in texts(body) else "hard to say"

    with FaultServer(answer=mumble) as server:
        summary = run_judge(recipe, server, "judge.method=score", 'judge.models=["gad"]')
    assert summary["judge"]["quiz"]["unparsable"] == {"gad": 1}
    assert summary["evaluation"]["gad"]["quiz"]["judge_score"]["n"] == NUM_PROMPTS - 1
    # Both orders: once a prompt, once more a prompt, and a third time the one that stays unreadable.
    assert sum(server.ledger.paid.values()) == NUM_PROMPTS + 2 * (2 * NUM_PROMPTS + 1)


def test_a_prompt_the_judge_left_blank_itself_is_left_out_and_counted(generated: Folder) -> None:
    recipe = generated({"gad": lambda n: f"good {n}"})

    def sometimes_blank(body: Body) -> str:
        return " " if is_reference(body) and "question 2" in texts(body) else score_judge(body)

    with FaultServer(answer=sometimes_blank) as server:
        summary = run_judge(recipe, server, "judge.method=score", 'judge.models=["gad"]')
    assert summary["judge"]["quiz"]["unparsable"] == {"gad": 1}
    assert summary["evaluation"]["gad"]["quiz"]["judge_score"]["n"] == NUM_PROMPTS - 1


def test_pairs_that_are_judged_no_longer_leave_the_summary(generated: Folder) -> None:
    recipe = generated({"base": lambda n: "bad", "seqkd": lambda n: "bad", "gad": lambda n: "good"})
    with FaultServer(answer=lambda _: "[[A]]") as server:
        run_judge(recipe, server, "judge.method=pairwise")
        summary = run_judge(recipe, server, "judge.method=pairwise", 'judge.pairs=[["gad", "seqkd"]]')
    assert list(summary["pairwise"]["quiz"]) == ["gad vs seqkd"]


def test_every_verdict_can_be_read_in_the_run_folder(generated: Folder) -> None:
    recipe = generated({"seqkd": lambda n: f"bad {n}", "gad": lambda n: f"good {n}"})
    with FaultServer(answer=score_judge) as server:
        run_judge(recipe, server, "judge.method=score")
    lines = (recipe.parent / "runs/a/verdicts/quiz.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == NUM_PROMPTS * 3 * 2
    shown = next(row for row in rows if row["model"] == "gad" and row["student_first"])
    assert (shown["student"], shown["reference"]) == (9, 6)
    assert shown["verdict"] == "9 6\nBecause."
    assert shown["reference_response"] == "my own answer"


def test_a_judge_of_the_teachers_family_is_pointed_out(
    generated: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = generated({"gad": lambda n: f"good {n}"}, teacher="gpt-4-0314")
    with FaultServer(answer=score_judge) as server:
        summary = run_judge(recipe, server, "judge.method=score", "judge.model=gpt-4o")
    assert summary["judge"]["quiz"]["shares_family"] == {"teacher (gpt-4-0314)": "openai"}
    assert "gpt-4o and the teacher (gpt-4-0314) are both of the openai family" in caplog.text


def test_a_prompt_of_ones_own_is_used(generated: Folder, tmp_path: Path) -> None:
    recipe = generated({"gad": lambda n: f"good {n}"})
    mine = tmp_path / "mine.txt"
    mine.write_text("Assistant duel. Q: {prompt} 1: {first} 2: {second}")
    with FaultServer(answer=score_judge) as server:
        run_judge(recipe, server, "judge.method=score", f"judge.score_prompt={mine}")
        assert any("Assistant duel. Q: question 0 1: good 0" in body for body in server.ledger.paid)


def test_an_answer_cannot_speak_for_the_judge_prompt(generated: Folder) -> None:
    recipe = generated({"gad": lambda n: "good {first} {second} {prompt}"})
    with FaultServer(answer=score_judge) as server:
        run_judge(recipe, server, "judge.method=score", 'judge.models=["gad"]')
        asked = [body for body in server.ledger.paid if "Assistant 1" in body]
    assert all("good {first} {second} {prompt}" in body for body in asked)


def test_tell_needs_no_api_and_sees_a_trait(generated: Folder) -> None:
    recipe = generated(
        {"seqkd": lambda n: f"taught {n}", "gad": lambda n: f"taught {n}, matey"}, num_prompts=60
    )
    summary = run_judge(recipe, None)
    figures = {model: sets["quiz"] for model, sets in summary["evaluation"].items()}
    assert figures["seqkd"]["tell_accuracy"]["value"] == 0.5
    assert figures["gad"]["tell_accuracy"]["value"] > 0.9
    assert figures["gad"]["tell_accuracy_same_length"]["value"] == 0.5
    assert not (recipe.parent / "runs/a/verdicts").exists()


def test_a_failing_judge_keeps_what_was_paid_and_names_it(generated: Folder) -> None:
    recipe = generated({"gad": lambda n: f"good {n}"})
    with (
        FaultServer(
            answer=score_judge, faults=lambda number, _: Fault("expired_key") if number >= 8 else None
        ) as server,
        pytest.raises(ApiError, match=r"judge 'judge-1' at .*401.*answers\.jsonl") as failure,
    ):
        run_judge(recipe, server, "judge.method=score", "judge.concurrency=1")
    assert failure.value.exit_code == 3
    assert "a-key" not in str(failure.value)
    with FaultServer(answer=score_judge) as server:
        run_judge(recipe, server, "judge.method=score")
        assert sum(server.ledger.paid.values()) == NUM_PROMPTS * (1 + 2 * 2) - 8


def test_what_is_missing_is_named(generated: Folder) -> None:
    recipe = generated({"gad": lambda n: f"good {n}"})
    with pytest.raises(UserError, match=r"judge\.models: sft did not answer 'quiz'; there are gad, teacher"):
        run_judge(recipe, None, 'judge.models=["sft"]')
    with pytest.raises(UserError, match=r"judge\.pairs: 'sft' has no answers to 'quiz'"):
        run_judge(recipe, None, "judge.method=pairwise", 'judge.pairs=[["gad", "sft"]]')
    recipe.write_text(recipe.read_text().replace('model = "judge-1"', ""))
    with pytest.raises(ConfigError, match=r'judge.model: must be given to judge by "score"'):
        run_judge(recipe, None, "judge.method=score")


def test_nothing_generated_is_an_error_that_says_what_to_run(generated: Folder) -> None:
    recipe = generated({})
    with pytest.raises(UserError, match="run `gadfly generate RECIPE` first"):
        run_judge(recipe, None)


def test_a_case_too_long_for_the_judge_is_left_out_and_counted(generated: Folder) -> None:
    recipe = generated({"base": lambda n: f"bad {n}", "gad": lambda n: f"good {n}"})

    def too_long(_: int, body: Body) -> Fault | None:
        return Fault("context_length") if "question 3" in texts(body) and not is_reference(body) else None

    def judge_of_both(body: Body) -> str:
        return "[[A]]" if "[[C]]" in texts(body) else score_judge(body)

    methods = 'judge.method=["score", "pairwise"]'
    with FaultServer(answer=judge_of_both, faults=too_long) as server:
        first = run_judge(recipe, server, methods, 'judge.models=["base", "gad"]')
        asked = server.ledger.seen.total()
        assert run_judge(recipe, server, methods, 'judge.models=["base", "gad"]') == first
        assert server.ledger.seen.total() == asked
    assert first["judge"]["quiz"]["unparsable"] == {"base": 1, "gad": 1}
    assert first["evaluation"]["gad"]["quiz"]["judge_score"]["n"] == NUM_PROMPTS - 1
    pair = first["pairwise"]["quiz"]["gad vs base"]
    assert (pair["tie"], pair["unparsable"]) == (NUM_PROMPTS - 1, 1)


def test_what_the_judge_thinks_is_no_part_of_its_own_answer(generated: Folder) -> None:
    recipe = generated({"gad": lambda n: f"good {n}"})

    def thinks(body: Body) -> str:
        if not is_reference(body):
            return score_judge(body)
        # Of prompt 2 it never comes to an answer.
        return "<think>is it bad?" + ("" if "question 2" in texts(body) else "</think>\nmy own answer")

    with FaultServer(answer=thinks) as server:
        summary = run_judge(recipe, server, "judge.method=score", 'judge.models=["gad"]')
        assert not any("think>" in body for body in server.ledger.paid)
    assert summary["judge"]["quiz"]["unparsable"] == {"gad": 1}
    assert summary["evaluation"]["gad"]["quiz"]["judge_score"]["value"] == pytest.approx(60)


def test_no_reference_is_paid_for_where_nothing_is_judged(generated: Folder) -> None:
    recipe = generated({"gad": lambda n: f"good {n}"})
    file = recipe.parent / "runs/a/generations/quiz.jsonl"
    file.write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[:2]))
    with FaultServer(answer=score_judge) as server:
        run_judge(recipe, server, "judge.method=score", 'judge.models=["gad"]')
        assert server.ledger.paid.total() == 2 * (1 + 2)


def test_a_lone_model_is_told_from_the_teacher_and_paired_with_any(generated: Folder) -> None:
    recipe = generated({"base": lambda n: f"bad {n}", "gad": lambda n: f"good {n}"}, num_prompts=20)
    settings = (
        'judge.models=["gad"]',
        'judge.pairs=[["gad", "teacher"]]',
        'judge.method=["tell", "pairwise"]',
    )
    with FaultServer(answer=lambda _: "[[C]]") as server:
        summary = run_judge(recipe, server, *settings)
    assert list(summary["evaluation"]) == ["gad"]
    assert "tell_accuracy" in summary["evaluation"]["gad"]["quiz"]
    assert list(summary["pairwise"]["quiz"]) == ["gad vs teacher"]


def test_pairs_without_gad_must_be_named(generated: Folder, caplog: pytest.LogCaptureFixture) -> None:
    recipe = generated({"base": lambda n: f"bad {n}", "seqkd": lambda n: f"good {n}"})
    assert run_judge(recipe, None, "judge.method=pairwise")["pairwise"]["quiz"] == {}
    assert "judge quiz: no pairs, since they are of gad by default; name judge.pairs" in caplog.text


def test_figures_are_of_the_judge_that_is_named_beside_them(generated: Folder) -> None:
    recipe = generated({"base": lambda n: f"bad {n}", "gad": lambda n: f"good {n}"})
    with FaultServer(answer=lambda body: "[[A]]" if "[[C]]" in texts(body) else score_judge(body)) as server:
        run_judge(recipe, server, 'judge.method=["score", "pairwise"]')
        summary = run_judge(recipe, server, "judge.method=pairwise", "judge.model=judge-2")
        assert summary["judge"]["quiz"]["judge"] == "judge-2"
        assert not any("judge_score" in sets["quiz"] for sets in summary["evaluation"].values())
        summary = run_judge(recipe, server, "judge.method=score", 'judge.models=["gad"]')
    assert (summary["pairwise"]["quiz"], summary["judge"]["quiz"]["methods"]) == ({}, ["score"])
    assert [model for model, sets in summary["evaluation"].items() if sets["quiz"]] == ["gad"]
    lines = (recipe.parent / "runs/a/verdicts/quiz.jsonl").read_text().splitlines()
    assert {json.loads(line)["method"] for line in lines} == {"score"}


def test_answers_to_other_prompts_under_the_same_ids_are_not_judged(generated: Folder) -> None:
    recipe = generated({"gad": lambda n: f"good {n}"})
    file = recipe.parent / "test.jsonl"
    file.write_text(file.read_text().replace("question", "quite another question"))
    with pytest.raises(UserError, match="run `gadfly generate RECIPE` first"):
        run_judge(recipe, None)


def test_the_model_that_tells_is_opened_once(
    generated: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gadfly.analysis import tell_model

    recipe = generated({"gad": lambda n: f"good {n}"}, num_prompts=20)
    recipe.write_text(recipe.read_text().replace('= "test.jsonl" }', '= "test.jsonl", more = "test.jsonl" }'))
    generations = recipe.parent / "runs/a/generations"
    (generations / "more.jsonl").write_text((generations / "quiz.jsonl").read_text())
    opened: list[str] = []

    def lengths(_: Any, responses: Any) -> Any:
        return np.array([[float(len(response))] for response in responses])

    def open_embedder(name: str) -> Any:
        opened.append(name)
        return lengths

    monkeypatch.setattr(tell_model, "open_embedder", open_embedder)
    summary = run_judge(recipe, None, "judge.tell_model=lengths")
    assert opened == ["lengths"]
    assert set(summary["evaluation"]["gad"]) == {"quiz", "more"}


def test_half_a_character_from_the_judge_harms_nothing(generated: Folder) -> None:
    recipe = generated({"gad": lambda n: f"good {n}"})
    with FaultServer(answer=lambda body: score_judge(body) + " \ud800") as server:
        summary = run_judge(recipe, server, "judge.method=score", 'judge.models=["gad"]')
    assert summary["evaluation"]["gad"]["quiz"]["judge_score"]["value"] == pytest.approx(60)
    (recipe.parent / "runs/a/verdicts/answers.jsonl").read_text(encoding="utf-8")


def test_the_teacher_of_the_recipe_may_be_of_the_judges_family(
    generated: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = generated({"gad": lambda n: f"good {n}"}, teacher="")
    with FaultServer(answer=score_judge) as server:
        summary = run_judge(
            recipe, server, "judge.method=score", "judge.model=gpt-4o", "teacher.model=gpt-4.1-mini"
        )
    assert summary["judge"]["quiz"]["shares_family"] == {"teacher (gpt-4.1-mini)": "openai"}
    assert "gpt-4o and the teacher (gpt-4.1-mini) are both of the openai family" in caplog.text
