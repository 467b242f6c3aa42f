"""Measured on held-out prompts while training: greedy answers, and what the discriminator says of samples."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gadfly.analysis.tell import Pair, tell_accuracy
from gadfly.distributed.processes import Processes
from gadfly.errors import DataError, RunFolderError
from gadfly.groups import Branch, Group
from gadfly.run_folder import write_text
from gadfly.stages.diagnostics import Metrics, scores_by_group
from gadfly.stages.examples import Example
from gadfly.stages.held_out import HeldOut
from gadfly.stages.roles import DiscriminatorRole, StudentRole
from gadfly.stages.rollout import sample_groups
from gadfly.stored_json import parse
from gadfly.text_metrics import length_ratio, repetition, rouge_l

# Greedy answers kept at each evaluation for the report.
_SHOWN = 4


@dataclass
class Evaluation:
    """Evaluates a student, and a discriminator if there is one, on the same held-out prompts every
    time.

    Attributes:
        examples: the prompts, with the teacher's responses.
        student: who answers them.
        max_response_tokens: cap of an answer.
        discriminator: who tells its answers from the teacher's.
        held_out: what the discriminator is asked.
    """

    examples: Sequence[Example]
    student: StudentRole
    max_response_tokens: int
    discriminator: DiscriminatorRole | None = None
    held_out: HeldOut | None = None

    @property
    def num_prompts(self) -> int:
        """Of the held-out prompts, those that are not too long."""
        return len(self.examples)

    def __call__(self) -> tuple[Metrics, list[dict[str, Any]]]:
        """Metrics, and a few answers as rows for `samples.jsonl`."""
        groups, _ = sample_groups(
            self.student.sampler,
            self.student.renderer,
            self.examples,
            group_size=1,
            temperature=0.0,
            max_response_tokens=self.max_response_tokens,
            seed=0,
            purpose="greedy",
        )
        answers = [group.students[0] for group in groups]
        references = [[branch.text for branch in group.teachers] for group in groups]
        prompts = [example.row.prompt for example in self.examples]
        # Without a discriminator every process does the same work at the same time.
        processes = self.held_out.processes if self.held_out else Processes()
        metrics = processes.once(
            "figures of held-out answers", lambda: answer_metrics(prompts, references, answers)
        )
        if self.held_out is not None:
            metrics |= self.held_out.metrics()
        scores = self._scores(groups[:_SHOWN])
        return metrics, [
            {
                "kind": "evaluation",
                "id": example.row.id,
                "prompt": example.row.prompt,
                "teacher": texts[0],
                "response": answer.text,
                "finished": answer.finished,
                **row_scores,
            }
            for example, texts, answer, row_scores in zip(
                self.examples[:_SHOWN], references, answers, scores, strict=False
            )
        ]

    def _scores(self, groups: list[Group]) -> list[dict[str, float]]:
        """What the discriminator gives the answers of some groups, and the teacher's first beside each."""
        if self.discriminator is None:
            return [{} for _ in groups]
        view = self.discriminator.view(groups, list(self.examples[: len(groups)]))
        by_group = scores_by_group(self.discriminator.engine.forward(view), view)
        return [
            {"score": float(scored.students[0]), "teacher_score": float(scored.teachers[0])}
            for scored in by_group
        ]


def answer_metrics(
    prompts: Sequence[str], references: Sequence[Sequence[str]], answers: Sequence[Branch]
) -> Metrics:
    """Figures of held-out answers that need no model.

    Args:
        prompts: as text.
        references: the teacher's responses to each.
        answers: the student's.
    """
    count = len(answers)
    overlap = [rouge_l(answer.text, texts) for answer, texts in zip(answers, references, strict=True)]
    metrics = {
        "evaluation/rouge_l": sum(overlap) / count,
        "evaluation/finished_fraction": sum(answer.finished for answer in answers) / count,
        "evaluation/repetition": sum(repetition(answer.text) for answer in answers) / count,
    }
    first = [texts[0] for texts in references]
    metrics["detail/teacher_repetition"] = sum(repetition(text) for text in first) / count
    # A cap of a token or two may leave no text of the teacher to compare with.
    if any(first):
        metrics["evaluation/length_ratio"] = length_ratio([answer.text for answer in answers], first)
    pairs = [
        Pair(prompt, teacher, answer.text)
        for prompt, teacher, answer in zip(prompts, first, answers, strict=True)
    ]
    # Fewer different prompts it refuses.
    with contextlib.suppress(DataError):
        metrics["evaluation/tell_accuracy"] = tell_accuracy(pairs).value
    return metrics


def frozen_probe(
    file: Path,
    examples: Sequence[Example],
    student: StudentRole,
    discriminator: DiscriminatorRole,
    *,
    temperature: float,
    max_response_tokens: int,
    seed: int,
    processes: Processes,
    is_resumed: bool,
    start: Path | None = None,
) -> HeldOut:
    """What a stage asks about held-out prompts; its probe is sampled at the start, kept in `file`, and read
    from there at a resume. For the rest see `HeldOut`.
    """
    is_there = processes.once("the probe", file.exists)
    if not is_there and not is_resumed:
        groups, _ = sample_groups(
            student.sampler,
            student.renderer,
            examples,
            group_size=1,
            temperature=temperature,
            max_response_tokens=max_response_tokens,
            seed=seed,
            purpose="probe",
        )
        rows = [json.dumps([asdict(branch) for branch in group.students]) for group in groups]
        processes.once("the probe", lambda: write_text(file, "".join(row + "\n" for row in rows)))
    groups = processes.once("the probe", lambda: _read_probe(file, examples))
    return HeldOut(
        probe=discriminator.view(groups, list(examples)),
        examples=examples,
        student=student,
        discriminator=discriminator,
        temperature=temperature,
        max_response_tokens=max_response_tokens,
        seed=seed,
        stage=file.parent,
        start=start,
        processes=processes,
    )


def _read_probe(file: Path, examples: Sequence[Example]) -> list[Group]:
    try:
        with open(file, encoding="utf-8", newline="\n") as lines:
            stored = [tuple(_branch(branch) for branch in parse(line)) for line in lines]
        return [
            replace(example.group, students=students)
            for example, students in zip(examples, stored, strict=True)
        ]
    except (OSError, ValueError, KeyError, TypeError) as damage:
        raise RunFolderError(
            f"{file}: damaged ({damage}); it holds samples from the start of the stage, which cannot be made "
            f"again: restore it, or delete {file.parent} to do the stage again"
        ) from damage


def _branch(stored: dict[str, Any]) -> Branch:
    return Branch(tuple(stored["tokens"]), stored["finished"], stored["text"])
