"""Measured on held-out prompts while training: greedy answers, and the discriminator on a frozen probe."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gadfly.errors import RunFolderError
from gadfly.groups import Branch, Group
from gadfly.processes import Processes
from gadfly.run_folder import write_text
from gadfly.stages.diagnostics import Metrics, discriminator_metrics
from gadfly.stages.examples import Example
from gadfly.stages.roles import DiscriminatorRole, StudentRole
from gadfly.stages.rollout import sample_groups
from gadfly.text_metrics import length_ratio, repetition, rouge_l

# Greedy answers kept at each evaluation for the report.
_SHOWN = 4


@dataclass
class Evaluation:
    """Evaluates a student, and a discriminator if there is one, on the same held-out prompts every
    time.

    Attributes:
        probe: held-out groups with student samples from the start of the stage; frozen, so that the
            discriminator of one step can be compared with that of another.
    """

    examples: Sequence[Example]
    student: StudentRole
    max_response_tokens: int
    discriminator: DiscriminatorRole | None = None
    probe: Sequence[Group] = ()

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
        count = len(answers)
        overlap = [rouge_l(answer.text, texts) for answer, texts in zip(answers, references, strict=True)]
        metrics = {
            "evaluation/rouge_l": sum(overlap) / count,
            "evaluation/finished_fraction": sum(answer.finished for answer in answers) / count,
            "evaluation/repetition": sum(repetition(answer.text) for answer in answers) / count,
        }
        first = [texts[0] for texts in references]
        # A cap of a token or two may leave no text of the teacher to compare with.
        if any(first):
            metrics["evaluation/length_ratio"] = length_ratio([answer.text for answer in answers], first)
        if self.discriminator is not None:
            scores = self.discriminator.engine.forward(self.probe)
            metrics |= discriminator_metrics(scores, self.probe, prefix="probe")
        return metrics, [
            {
                "kind": "evaluation",
                "id": example.row.id,
                "prompt": example.row.prompt,
                "teacher": texts[0],
                "response": answer.text,
                "finished": answer.finished,
            }
            for example, texts, answer in zip(self.examples[:_SHOWN], references, answers, strict=False)
        ]


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
) -> list[Group]:
    """The probe of a stage: sampled at its start, kept in `file`, and read from there at a resume."""
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
    return discriminator.view(groups, list(examples))


def _read_probe(file: Path, examples: Sequence[Example]) -> list[Group]:
    try:
        with open(file, encoding="utf-8", newline="\n") as lines:
            stored = [tuple(_branch(branch) for branch in json.loads(line)) for line in lines]
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
