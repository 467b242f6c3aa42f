"""Which GAD checkpoint is best, by somebody other than the training reward."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_server import Body, FaultServer

from gadfly.checkpoint import checkpoint_steps
from gadfly.errors import CheckpointError, ConfigError, DataError
from gadfly.recipe_file import load_recipe
from gadfly.stages.best import best
from gadfly.stages.run import Run, open_run

KEEP_ALL = "checkpoints.keep_last=9"


@pytest.fixture
def trained(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Choose the best of a run's checkpoints after GAD, and return the note in the summary and the step."""
    from gadfly.stages.gad import gad
    from gadfly.stages.warmup import warmup

    monkeypatch.setenv("OPENAI_API_KEY", "a-key")

    def choose(*overrides: str, before: Callable[[Run], None] = lambda _: None) -> dict[str, Any]:
        with open_run(load_recipe(recipe_file, [KEEP_ALL, *overrides])) as run:
            warmup(run)
            gad(run)
            before(run)
            best(run)
            note: dict[str, Any] = run.folder.read_json("summary.json")["best"]["gad"]
            link = (run.folder.stage("gad") / "best").resolve().name
            assert link == f"step-{note['step']:06d}"
            assert sorted(note["candidates"]) == [
                f"gad/step-{step:06d}" for step in sorted(checkpoint_steps(run.folder.stage("gad")))
            ]
            return note

    return choose


def plant(run: Run, say: Callable[[str], str]) -> None:
    """Put words into the mouths of the checkpoints, as if they had been generated."""
    answer_with_all(run)
    rows = run.folder.rows("generations/valid.jsonl")
    run.folder.write_rows("generations/valid.jsonl", [{**row, "response": say(row["model"])} for row in rows])


def answer_with_all(run: Run) -> None:
    from gadfly.stages.generate import generate_held_out

    names = [f"gad/step-{step:06d}" for step in checkpoint_steps(run.folder.stage("gad"))]
    generate_held_out(run, names, "valid")


def judge_of_steps(body: Body) -> str:
    """Likes what says "step 4" best; its own answers are middling."""
    text = "\n".join(message["content"] for message in body["messages"])
    if "Assistant" not in text:
        return "my own"
    first, second = text.find("step"), text.find("my own")
    student = 9 if "step 4" in text else 3
    return f"{student} 6" if first < second else f"6 {student}"


def test_the_checkpoint_with_the_highest_score_is_best(trained: Callable[..., dict[str, Any]]) -> None:
    with FaultServer(answer=judge_of_steps) as server:
        note = trained(
            'checkpoints.best_by="score"',
            'judge.model="judge-1"',
            f'judge.base_url="{server.base_url}"',
            before=lambda run: plant(run, lambda model: f"step {int(model[-6:])}"),
        )
    assert (note["step"], note["by"], note["n"]) == (4, "judge_score", 4)
    assert note["candidates"]["gad/step-000004"]["value"] == pytest.approx(60)
    assert note["candidates"]["gad/step-000002"]["value"] == pytest.approx(100 * 3 / 9)


def test_the_checkpoint_that_is_hardest_to_tell_is_best(
    trained: Callable[..., dict[str, Any]], teacher_file: Path
) -> None:
    taught = {
        row["prompt"]: row["response"] for row in map(json.loads, teacher_file.read_text().splitlines())
    }

    def copy_the_teacher_at_step_two(run: Run) -> None:
        answer_with_all(run)
        rows = run.folder.rows("generations/valid.jsonl")
        for row in rows:
            is_copy = row["model"].endswith("000002")
            row["response"] = taught[row["prompt"]] if is_copy else "something else entirely, said at length"
        run.folder.write_rows("generations/valid.jsonl", rows)

    note = trained(
        'checkpoints.best_by="tell"',
        "data.valid_share=0.6",
        "evaluation.prompts=40",
        before=copy_the_teacher_at_step_two,
    )
    assert (note["step"], note["by"]) == (2, "tell_accuracy_same_length")
    assert note["n"] >= 20
    assert note["candidates"]["gad/step-000002"]["value"] == 0.5


def test_what_is_generated_is_not_generated_again_and_the_count_of_held_out_rows_stays(
    trained: Callable[..., dict[str, Any]],
) -> None:
    settings = ('checkpoints.best_by="score"', 'judge.model="judge-1"')
    with FaultServer(answer=lambda body: "5 5") as server:
        address = f'judge.base_url="{server.base_url}"'
        counts = []

        def count(run: Run) -> None:
            counts.append(run.folder.read_json("summary.json")["data"]["valid"]["rows"])

        first = trained(*settings, address, before=count)
        paid = server.ledger.paid.total()
        assert trained(*settings, address, before=count) == first
        assert server.ledger.paid.total() == paid
    assert counts[0] == counts[1]


def test_what_cannot_be_chosen_by_is_named(recipe_file: Path) -> None:
    def refused(error: type[Exception], message: str, *overrides: str) -> None:
        with open_run(load_recipe(recipe_file, overrides)) as run, pytest.raises(error, match=message):
            best(run)

    refused(ConfigError, "chosen while training")
    refused(CheckpointError, "run `gadfly gad RECIPE` first", 'checkpoints.best_by="tell"')


def test_too_few_held_out_prompts_are_an_error(trained: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(DataError, match=r"are too few to tell by; raise evaluation\.prompts"):
        trained('checkpoints.best_by="tell"')
