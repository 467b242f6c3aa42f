"""The discriminator on held-out prompts, none of which it is trained on: is it right there, and why?

Its accuracy on fresh samples stands beside what the surface of the very same answers gives away, beside
what a change of format does to the scores, and beside what earlier discriminators of the run make of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from gadfly.analysis.surface_features import MIN_PAIRS, Written, surface_accuracy
from gadfly.distributed.processes import Processes
from gadfly.groups import Branch, Group
from gadfly.stages.diagnostics import Metrics, accuracy_and_gap, scores_by_group
from gadfly.stages.examples import Example
from gadfly.stages.perturbations import PERTURBATIONS
from gadfly.stages.roles import DiscriminatorRole, StudentRole
from gadfly.stages.rollout import sample_groups
from gadfly.stages.snapshots import earlier_discriminators, with_snapshot

# A change that fewer answers are open to says nothing about the discriminator's habits.
_LEAST_CHANGED = 0.1


@dataclass(frozen=True)
class HeldOut:
    """What a stage asks its discriminator about held-out prompts.

    Attributes:
        probe: groups with samples from the start of the stage; frozen, so that the discriminator of one step
            can be compared with that of another.
        examples: the prompts.
        student: whose fresh samples they are.
        discriminator: who is asked.
        temperature: of the fresh samples.
        max_response_tokens: their cap.
        seed: of the run. The random numbers are the same at every evaluation, so that less of a difference
            between two of them is chance.
        stage: the folder of the stage, whose checkpoints hold the earlier discriminators.
        start: the checkpoint that gad began with. Default: the last of warmup beside it.
        processes: who works on it; all of them have to ask.
    """

    probe: Sequence[Group]
    examples: Sequence[Example]
    student: StudentRole
    discriminator: DiscriminatorRole
    temperature: float
    max_response_tokens: int
    seed: int
    stage: Path
    start: Path | None
    processes: Processes

    def metrics(self) -> Metrics:
        """The discriminator's figures in an evaluation. Nothing that is trained has changed afterwards."""
        engine = self.discriminator.engine
        accuracy, margin = accuracy_and_gap(scores_by_group(engine.forward(self.probe), self.probe))
        fresh = self._fresh_pairs()
        perturbed = [self._with_perturbations(group) for group in fresh]
        scores = engine.forward(perturbed).values.double().cpu()
        pair_scores = scores.reshape(len(fresh), 2, 2 + len(PERTURBATIONS))
        gaps = pair_scores[:, 0, 0] - pair_scores[:, 1, 0]
        metrics = {
            "probe/accuracy": accuracy,
            "probe/margin": margin,
            "detail/held_out_accuracy": float((0.5 + 0.5 * gaps.sign()).mean()),
            **perturbation_shares(pair_scores[..., 1:], perturbed, gaps),
        }
        if len(fresh) >= MIN_PAIRS:
            metrics["detail/surface_accuracy"] = self._surface_accuracy(fresh)
        return metrics | self._snapshot_gaps(fresh)

    def _fresh_pairs(self) -> list[Group]:
        """One fresh sample beside the teacher's first response, for every prompt."""
        groups, _ = sample_groups(
            self.student.sampler,
            self.student.renderer,
            self.examples,
            group_size=1,
            temperature=self.temperature,
            max_response_tokens=self.max_response_tokens,
            seed=self.seed,
            purpose="held-out",
        )
        pairs = [replace(group, teachers=group.teachers[:1]) for group in groups]
        return self.discriminator.view(pairs, list(self.examples))

    def _with_perturbations(self, pair: Group) -> Group:
        """Each of both answers as it is, its text read afresh, and that text changed in each of the ways."""
        return replace(
            pair,
            teachers=self._variants(pair.teachers[0]),
            students=self._variants(pair.students[0]),
        )

    def _variants(self, branch: Branch) -> tuple[Branch, ...]:
        texts = [branch.text, *(change(branch.text) for change in PERTURBATIONS.values())]
        read = self.discriminator.renderer.batch_response_tokens(texts, [branch.finished] * len(texts))
        # What would be longer than any answer may exceed what the model can attend to.
        longest = max(self.max_response_tokens, len(read[0]))
        return (
            branch,
            *(
                replace(branch, tokens=tuple(tokens), text=text)
                if len(tokens) <= longest
                else replace(branch, tokens=tuple(read[0]))
                for text, tokens in zip(texts, read, strict=True)
            ),
        )

    def _surface_accuracy(self, pairs: Sequence[Group]) -> float:
        written = [
            (Written(teacher.text, teacher.finished), Written(student.text, student.finished))
            for teacher, student in (pair.branches for pair in pairs)
        ]
        return self.processes.once("the surface test", lambda: surface_accuracy(written).accuracy.value)

    def _snapshot_gaps(self, pairs: Sequence[Group]) -> Metrics:
        """Mean gap of the fresh pairs by each of the earlier discriminators."""
        engine = self.discriminator.engine
        gaps: Metrics = {}
        snapshots = self.processes.once(
            "the earlier discriminators", lambda: earlier_discriminators(self.stage, self.start)
        )
        for snapshot in snapshots:
            scores = with_snapshot(snapshot, engine.model, self.processes, lambda: engine.forward(pairs))
            if scores is not None:
                _, gap = accuracy_and_gap(scores_by_group(scores, pairs))
                gaps[f"detail/snapshot_gap/{snapshot.name}"] = gap
        return gaps


def perturbation_shares(
    scores: Float[Tensor, "pair role variant"],
    perturbed: Sequence[Group],
    gaps: Float[Tensor, " pair"],
) -> Metrics:
    """How far a change of format moves a score, as a share of what tells teacher from student.

    For each change, the mean |score changed - score| over the answers that it changes, divided by the mean
    |teacher - student|; `detail/perturbation_share` is the largest of them. Left out: a change that fewer
    than a tenth of the answers are open to, and everything if no pair is told apart at all.

    Args:
        scores: of the two answers of each pair, teacher first: as read afresh, then changed in every way.
        perturbed: the pairs, in each role first the answer as it is, then what was scored.
        gaps: teacher less student.
    """
    margin = float(gaps.abs().mean())
    if margin == 0:
        return {}
    texts = [[branches[1:] for branches in (pair.teachers, pair.students)] for pair in perturbed]
    is_changed = torch.tensor(
        [[[variant.tokens != role[0].tokens for variant in role] for role in pair] for pair in texts]
    )
    change = (scores - scores[..., :1]).abs()
    shares: Metrics = {}
    for place, name in enumerate(PERTURBATIONS, start=1):
        changed = is_changed[..., place]
        if float(changed.double().mean()) >= _LEAST_CHANGED:
            mean_change = float(change[..., place][changed].mean())
            shares[f"detail/perturbation_share/{name}"] = mean_change / margin
    return {"detail/perturbation_share": max(shares.values()), **shares} if shares else {}
