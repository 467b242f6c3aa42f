"""The unit of work: one prompt and its branches, in tokens.

A SeqKD step is groups with teacher branches only, a discriminator step groups with all, a policy
step the student branches. Letters: P prompts in a batch, G student branches and K teacher branches
a group. The *rows* of a batch are its branches in order: group by group, teachers first, then
students.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gadfly.chat_template import Renderer
from gadfly.records import Row


@dataclass(frozen=True)
class Branch:
    """One response in tokens, the end-of-turn token included if and only if it finished.

    `text` is what the tokens decode to, without that token. Of a teacher response, `teacher` is whose it is,
    if that is known, and `weight` what it counts in the losses.
    """

    tokens: tuple[int, ...]
    finished: bool
    text: str
    teacher: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Group:
    """A prompt with its teacher and student responses.

    Example:
        >>> hi = Branch((5, 2), True, "hi")
        >>> group = Group("7", (1, 4), teachers=(hi,), students=(hi, hi))
        >>> len(group.branches), len(group.only_students().branches)
        (3, 2)
    """

    id: str
    prompt_tokens: tuple[int, ...]
    teachers: tuple[Branch, ...] = ()
    students: tuple[Branch, ...] = ()

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Teachers first, then students: the order of rows everywhere."""
        return self.teachers + self.students

    def only_teachers(self) -> "Group":
        """The group as the teacher answered it."""
        return replace(self, students=())

    def only_students(self) -> "Group":
        """The group of a policy step."""
        return replace(self, teachers=())


def teacher_group(
    row: Row, renderer: Renderer, max_response_tokens: int, weights: Mapping[str, float] | None = None
) -> Group:
    """A row in tokens: its prompt and its teacher responses.

    A response over the cap is cut and becomes unfinished.

    Args:
        row: as text.
        renderer: of the student.
        max_response_tokens: the cap.
        weights: what a response counts in the losses, by teacher; 1 where none is given.
    """
    branches = []
    for response in row.responses:
        tokens = renderer.response_tokens(response.text, response.finished)
        finished = response.finished and len(tokens) <= max_response_tokens
        tokens = tokens[:max_response_tokens]
        text, teacher = renderer.response_text(tokens), response.teacher
        weight = 1.0 if weights is None or teacher is None else weights.get(teacher, 1.0)
        branches.append(Branch(tuple(tokens), finished, text, teacher, weight))
    return Group(row.id, tuple(renderer.prompt_tokens(row.messages)), teachers=tuple(branches))


def reread(groups: Sequence[Group], rows: Sequence[Row], renderer: Renderer) -> list[Group]:
    """The groups as the discriminator reads them: prompts and both roles' text, tokenised afresh with its own
    renderer.
    """
    return [
        replace(group, prompt_tokens=tuple(renderer.prompt_tokens(row.messages)))
        for group, row in zip(retokenised(groups, renderer), rows, strict=True)
    ]


def retokenised(groups: Sequence[Group], renderer: Renderer) -> list[Group]:
    """The groups with the responses' text tokenised afresh.

    Re-tokenised text may be longer than the cap; it is not cut again. Identical text gives
    identical tokens, whatever ids it was sampled as and whichever role wrote it.
    """
    branches = [branch for group in groups for branch in group.branches]
    tokens = iter(
        renderer.batch_response_tokens(
            [branch.text for branch in branches], [branch.finished for branch in branches]
        )
    )

    def again(branch: Branch) -> Branch:
        return replace(branch, tokens=tuple(next(tokens)))

    return [
        replace(
            group,
            teachers=tuple(again(branch) for branch in group.teachers),
            students=tuple(again(branch) for branch in group.students),
        )
        for group in groups
    ]
