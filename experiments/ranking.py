"""In-group ranking: how a discriminator orders a student's answers to one prompt, held against an oracle.

GAD's advantages are this order and its spacing, so the student can learn nothing that it does not hold;
accuracy against the teacher says little of it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

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


def in_group_ranking(
    run: Run, checkpoint: Path, rows: Sequence[Row], is_good: Callable[[Row, Branch], bool]
) -> Figure | None:
    """Mean share of pairs of one good and one bad sample of a prompt in which the good one scores higher.

    Ties count half; chance is .5. The student samples at the temperature it is trained at.

    Args:
        run: the open run.
        checkpoint: with `student` and `discriminator`.
        rows: prompts that neither was trained on.
        is_good: the oracle.

    Returns:
        A mean over prompts; None if no prompt has samples of both kinds.
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
        [is_good(example.row, branch) for branch in group.students]
        for example, group in zip(examples, groups, strict=True)
    ]
    model, renderer = load_discriminator(checkpoint / "discriminator", recipe.student.dtype)
    if recipe.discriminator.reads == "text":
        groups = reread(groups, [example.row for example in examples], renderer)
    engine = Engine(model, read_scores, micro_batch_tokens=recipe.engine.micro_batch_tokens)
    scores = engine.forward(groups).values.view(len(groups), GROUP_SIZE)
    shares = [
        rank_share(own[torch.tensor(good)].tolist(), own[~torch.tensor(good)].tolist())
        for own, good in zip(scores, judged, strict=True)
        if any(good) and not all(good)
    ]
    return mean(shares) if shares else None


def rank_share(good: Sequence[float], bad: Sequence[float]) -> float:
    """Share of pairs in which the good one is higher, ties counting half.

    Example:
        >>> rank_share([2.0, 1.0], [1.0, 0.0])
        0.875
    """
    pairs = [(above, below) for above in good for below in bad]
    return sum((above > below) + 0.5 * (above == below) for above, below in pairs) / len(pairs)
