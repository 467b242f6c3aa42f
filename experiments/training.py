"""How the game went, as figures beside those of the answers."""

from gadfly.stages.run import Run
from gadfly.statistics import mean

_METRICS = ("discriminator/accuracy", "detail/score_rms", "group/zero_variance_fraction")
_LAST_STEPS = 30


def summarise_training(run: Run) -> None:
    """Write the means of gad's last steps as figures of a set `training`: on pairs not trained on yet, how
    often the discriminator tells the student from the teacher, and how large its scores are; and the share
    of groups whose samples all have the same reward, from which nothing is learnt.
    """
    rows = [row for row in run.folder.rows("metrics.jsonl") if row["stage"] == "gad"]
    steps = [row for row in rows if _METRICS[0] in row][-_LAST_STEPS:]
    # Of a student that was stopped earlier, they would be the steps after it.
    if steps and "gad" in run.folder.read_json("summary.json")["evaluation"]:
        training = {name: mean([row[name] for row in steps]).as_record() for name in _METRICS}
        run.folder.update_summary("evaluation", {"gad": {"training": training}})
