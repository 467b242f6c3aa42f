"""Which GAD checkpoint is `best`, by a judge on the held-out prompts.

Never by the training reward: its scorer moves.
"""

import logging

from gadfly.checkpoint import checkpoint_steps, point
from gadfly.errors import CheckpointError, ConfigError, DataError
from gadfly.stages.generate import generate_held_out
from gadfly.stages.judge.answer_sheets import TEACHER, AnswerSheet
from gadfly.stages.judge.score import score
from gadfly.stages.judge.tell_figures import embedder, tell_figures
from gadfly.stages.run import Run
from gadfly.statistics import Figure

logger = logging.getLogger(__name__)

_STAGE, _SET = "gad", "valid"


def best(run: Run) -> None:
    """Judge every kept GAD checkpoint on held-out prompts, point `gad/best` at the winner, and note why.

    Raises:
        ConfigError: `checkpoints.best_by` names no judge.
        CheckpointError: there is no checkpoint to choose from.
        DataError: there are too few held-out prompts.
        ApiError: the judge cannot be asked.
    """
    by = run.recipe.checkpoints.best_by
    if by == "rouge_l":
        raise ConfigError(
            'checkpoints.best_by = "rouge_l": chosen while training; "score" or "tell" choose anew'
        )
    folder = run.folder.stage(_STAGE)
    names = {f"{_STAGE}/step-{step:06d}": step for step in checkpoint_steps(folder)}
    if not names:
        raise CheckpointError(f"best: no checkpoint under {folder}; run `gadfly gad RECIPE` first")
    num_prompts, figures = _figures(run, list(names))
    # The score is better when higher; what tells the student from the teacher is better when lower.
    sign = 1 if by == "score" else -1
    chosen = max(figures, key=lambda name: sign * figures[name].value)
    point(folder / "best", folder / f"step-{names[chosen]:06d}")
    note = {
        "step": names[chosen],
        "by": "judge_score" if by == "score" else "tell_accuracy_same_length",
        "set": _SET,
        "n": num_prompts,
        "candidates": {name: figure.as_record() for name, figure in figures.items()},
    }
    run.folder.replace_in_summary("best", {_STAGE: note})
    logger.info("best: %s of %d checkpoints, by %s", chosen, len(figures), note["by"])


def _figures(run: Run, names: list[str]) -> tuple[int, dict[str, Figure]]:
    """How many held-out prompts were answered, and what decides, by checkpoint."""
    if not run.data.valid:
        raise DataError("best: no held-out prompts to choose by; give data.valid or data.valid_share")
    generate_held_out(run, names, _SET)
    answers: dict[str, dict[str, str]] = {name: {} for name in names}
    for row in run.folder.rows(f"generations/{_SET}.jsonl"):
        if row["model"] in answers:
            answers[row["model"]][row["id"]] = row["response"]
    judged = tuple(names)
    rows = tuple(AnswerSheet(_SET, run.data.valid, answers, judged).answered_by(*names))
    if run.recipe.checkpoints.best_by == "score":
        scored, *_ = score(run, AnswerSheet(_SET, rows, answers, judged))
        if not all(scored.values()):
            raise DataError("best: no verdict on a checkpoint could be read; name another judge.model")
        return len(rows), {name: figures["judge_score"] for name, figures in scored.items()}
    answers[TEACHER] = {row.id: row.responses[0].text for row in rows}
    measured = tell_figures(AnswerSheet(_SET, rows, answers, judged), embedder(run))
    if not measured:
        raise DataError(
            f"best: {len(rows)} held-out prompts are too few to tell by; raise evaluation.prompts"
        )
    return len(rows), {name: figures["tell_accuracy_same_length"] for name, figures in measured.items()}
