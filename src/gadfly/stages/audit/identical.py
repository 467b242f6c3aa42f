"""The identical-text test: a text must score the same as the teacher's and as the student's."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gadfly.analysis.audit_findings import Finding
from gadfly.chat_template import Renderer, has_invalid_utf8
from gadfly.discriminator import Scores, load_discriminator, new_discriminator, read_scores
from gadfly.engine import Engine
from gadfly.groups import Branch, Group, reread, teacher_group
from gadfly.records import Row, TeacherResponse
from gadfly.stages.roles import open_base_of
from gadfly.stages.run import Run

_TEXTS = 8
# In seconds and in tokens.
_LONG_ENOUGH, _FULL_BATCH = 0.3, 50_000
# A sample is no longer than the cap, and is not cut where its text has more tokens than were drawn.
_NO_CAP = 2**31


@dataclass(frozen=True)
class IdenticalText:
    """What the discriminator said of texts that both roles have written.

    Attributes:
        texts: how many.
        different: of how many it was not the same.
        largest: largest difference of scores.
        tokens_per_second: of its forward passes, for the estimate of the run's time.
    """

    texts: int
    different: int
    largest: float
    tokens_per_second: float

    def findings(self) -> list[Finding]:
        """The fault, if one text in ten or more has it."""
        if self.different < max(1, self.texts / 10):
            return []
        evidence = f"{self.different} of {self.texts} texts, by up to {self.largest:.3g}"
        return [Finding("identical-text", evidence, is_mechanical=True)]


def score_twice(
    run: Run, checkpoint: Path | None, renderer: Renderer, rows: Sequence[Row], samples: Sequence[Branch]
) -> IdenticalText:
    """Score texts of both roles in both roles, rendered as in training.

    Args:
        run: the open run.
        checkpoint: whose discriminator is asked; without one, the one that training would begin with.
        renderer: the student's.
        rows: prompts with teacher responses.
        samples: one of the student to each prompt.
    """
    recipe = run.recipe
    if checkpoint is None:
        name = recipe.discriminator.model or recipe.student.model
        model, own_renderer = new_discriminator(name, recipe.student.dtype, recipe.seed)
    else:
        saved = checkpoint / "discriminator"
        base = open_base_of(recipe, saved)
        model, own_renderer = load_discriminator(saved, recipe.student.dtype, base)
    groups, of = _twins(renderer, rows[:_TEXTS], samples[:_TEXTS], recipe.sampling.max_response_tokens)
    if recipe.discriminator.reads == "text":
        groups = reread(groups, of, own_renderer)
    engine = Engine(model, read_scores, micro_batch_tokens=recipe.engine.micro_batch_tokens)
    scores = engine.forward(groups).values.tolist()
    gaps = [abs(one - other) for one, other in zip(scores[::2], scores[1::2], strict=True)]
    return IdenticalText(len(gaps), sum(gap > 0 for gap in gaps), max(gaps), _pace(engine, groups))


def _pace(engine: Engine[Scores], groups: list[Group]) -> float:
    """Tokens a second, of ever larger batches until one takes long enough to be measured or is a full one."""
    while True:
        tokens = sum(len(g.prompt_tokens) + sum(len(b.tokens) for b in g.branches) for g in groups)
        started = time.perf_counter()
        engine.forward(groups)
        seconds = time.perf_counter() - started
        if seconds > _LONG_ENOUGH or tokens > _FULL_BATCH:
            return tokens / seconds
        groups = 4 * groups


def _twins(
    renderer: Renderer, rows: Sequence[Row], samples: Sequence[Branch], cap: int
) -> tuple[list[Group], list[Row]]:
    """Groups of one text in both roles: the teacher's own, cut as in training, and samples as if the teacher
    had written them.
    """
    groups, of = [], []
    for row, sample in zip(rows, samples, strict=True):
        teacher_row = replace(row, responses=row.responses[:1])
        as_teacher = teacher_group(teacher_row, renderer, cap)
        # What a sampler would have drawn: the same tokens, and their text.
        groups.append(replace(as_teacher, students=as_teacher.teachers))
        of.append(row)
        if sample.text and not has_invalid_utf8(sample.text):
            sample_row = replace(row, responses=(TeacherResponse(sample.text, sample.finished),))
            groups.append(replace(teacher_group(sample_row, renderer, _NO_CAP), students=(sample,)))
            of.append(row)
    return groups, of
