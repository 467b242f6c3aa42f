"""In-group ranking: how a discriminator orders a student's answers to one prompt, held against their quality.

GAD's advantages are this order and its spacing, so the student can learn nothing that it does not hold;
accuracy against the teacher says little of it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from gadfly.checkpoint import latest_checkpoint
from gadfly.data.dataset import load_rows
from gadfly.discriminator import load_discriminator, read_scores
from gadfly.engine import Engine
from gadfly.groups import Branch, reread
from gadfly.records import Row
from gadfly.stages.examples import tokenise
from gadfly.stages.roles import open_writer
from gadfly.stages.rollout import sample_groups
from gadfly.stages.run import Run
from gadfly.statistics import Figure, mean

GROUP_SIZE = 8
"""Samples a prompt."""

Quality = Callable[[Row, Branch], float]
"""What a sample is worth: 1 or 0 of an oracle, or a measure."""


def measure_ranking(run: Run, test_set: str, num_prompts: int, quality: Quality) -> None:
    """Write how the discriminators of warmup's and gad's ends rank the samples of the student beside them.

    `ranking/in_group` of `warmup` and of `gad` says it of what the stage ended with,
    `ranking/in_group_before` of what gad began with. A stage that was not evaluated has no figure, and none
    has a group of samples of the same worth.

    Args:
        run: the open run.
        test_set: whose first prompts are answered.
        num_prompts: so many of them.
        quality: of a sample.
    """
    evaluated = run.folder.read_json("summary.json")["evaluation"]
    rows = load_rows(run.recipe.data.test[test_set], needs_response=True).rows[:num_prompts]
    warmed_up, after = (latest_checkpoint(run.folder.stage(stage)) for stage in ("warmup", "gad"))
    # An arm without a warmup of its own begins where its recipe says.
    before = warmed_up.path if warmed_up else Path(str(run.recipe.gad.start_from))
    for checkpoint, figures in (
        (before, (("warmup", "in_group"), ("gad", "in_group_before"))),
        (after.path if after else None, (("gad", "in_group"),)),
    ):
        wanted = [(model, name) for model, name in figures if model in evaluated]
        ranked = in_group_ranking(run, checkpoint, rows, quality) if wanted and checkpoint else None
        if ranked and ranked.n > 1:
            for model, name in wanted:
                run.folder.update_summary("evaluation", {model: {"ranking": {name: ranked.as_record()}}})


def in_group_ranking(run: Run, checkpoint: Path, rows: Sequence[Row], quality: Quality) -> Figure | None:
    """Mean share of pairs of unlike samples of a prompt in which the better one scores higher.

    Ties count half; chance is .5. The student samples at the temperature it is trained at.

    Args:
        run: the open run.
        checkpoint: with `student` and `discriminator`.
        rows: prompts that neither was trained on.
        quality: of a sample.

    Returns:
        A mean over prompts; None if no prompt has unlike samples.
    """
    recipe = run.recipe
    writer = open_writer(run, checkpoint / "student")
    examples = tokenise(run, "ranking", rows, writer.renderer)
    groups, _ = sample_groups(
        writer.sampler,
        writer.renderer,
        examples,
        group_size=GROUP_SIZE,
        temperature=recipe.sampling.temperature,
        max_response_tokens=recipe.sampling.max_response_tokens,
        seed=recipe.seed,
        purpose="ranking",
    )
    groups = [group.only_students() for group in groups]
    judged = [
        [quality(example.row, branch) for branch in group.students]
        for example, group in zip(examples, groups, strict=True)
    ]
    model, renderer = load_discriminator(checkpoint / "discriminator", recipe.student.dtype)
    if recipe.discriminator.reads == "text":
        groups = reread(groups, [example.row for example in examples], renderer)
    engine = Engine(model, read_scores, micro_batch_tokens=recipe.engine.micro_batch_tokens)
    scores = engine.forward(groups).values.view(len(groups), GROUP_SIZE)
    shares = [
        rank_share(own.tolist(), worth)
        for own, worth in zip(scores, judged, strict=True)
        if len(set(worth)) > 1
    ]
    return mean(shares) if shares else None


def rank_share(scores: Sequence[float], worth: Sequence[float]) -> float:
    """Share of pairs of unlike worth in which the worthier one has the higher score, ties counting half.

    Example:
        >>> rank_share([2.0, 1.0, 1.0, 0.0], [1, 1, 0, 0])
        0.875
    """
    samples = list(zip(scores, worth, strict=True))
    pairs = [(above, below) for above, more in samples for below, less in samples if more > less]
    return sum((above > below) + 0.5 * (above == below) for above, below in pairs) / len(pairs)
