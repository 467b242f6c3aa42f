"""How the game went, as figures beside those of the answers."""

from gadfly.stages.run import Run
from gadfly.statistics import mean

_METRICS = ("discriminator/accuracy", "detail/score_rms")
_LAST_STEPS = 30


def summarise_training(run: Run) -> None:
    """Write the means of gad's last steps as figures of a set `training`: on pairs not trained on yet, how
    often the discriminator tells the student from the teacher, and how large its scores are.
    """
    rows = [row for row in run.folder.rows("metrics.jsonl") if row["stage"] == "gad"]
    steps = [row for row in rows if _METRICS[0] in row][-_LAST_STEPS:]
    if steps:
        training = {name: mean([row[name] for row in steps]).as_record() for name in _METRICS}
        run.folder.update_summary("evaluation", {"gad": {"training": training}})
