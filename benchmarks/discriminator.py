"""The discriminator's step against the three passes that ports of the reference make.

Theirs: score the samples for the reward; then, to train, the samples again and the teacher's response once
for each of them, row by row, prompt by prompt. Ours: one forward pass that scores and trains, each prompt and
teacher response once. Both end with a step of AdamW.
"""

import torch
from torch import Tensor, nn

from benchmarks.result import Result, time_in_turn
from benchmarks.subjects import MIDDLE, QUICK, TINY, Shape, new_discriminator, new_groups
from benchmarks.token_counts import in_words, three_pass_bound
from gadfly.config import Optimizer
from gadfly.config.recipe import EngineConfig
from gadfly.discriminator import Discriminator, read_scores
from gadfly.engine import Engine
from gadfly.groups import Branch, Group
from gadfly.objectives import discriminator_objective

_SHAPES = {"64/256": Shape(4, 8, 64, 256), "1024/256": Shape(2, 8, 1024, 256)}
_WANTED = {"64/256": 2.2, "1024/256": 5.0}
_PAIRS = 5
_LEARNING_RATE = 1e-6
CASES = tuple(_SHAPES)


def run(case: str, quick: bool) -> Result:
    """Measure at one of the lengths."""
    size, shape, pairs = (TINY, QUICK, 1) if quick else (MIDDLE, _SHAPES[case], _PAIRS)
    groups = new_groups(shape, size)
    engine = Engine(
        new_discriminator(size, shares_prompts=True),
        read_scores,
        micro_batch_tokens=EngineConfig().micro_batch_tokens,
        optimizer=Optimizer(),
    )
    objective = discriminator_objective(groups, "bradley_terry")

    def ours() -> None:
        engine.forward_backward(groups, objective)
        engine.clip_gradients()
        engine.step(_LEARNING_RATE)

    rival = _ThreePasses(new_discriminator(size, shares_prompts=False))
    times = time_in_turn(pairs, lambda: rival(groups), ours)
    bounds = in_words(three_pass_bound(shape), three_pass_bound(shape, size))
    details = f"P {shape.prompts} x G {shape.group_size}, {bounds}"
    return Result.of_times(f"discriminator:{case}", times, _WANTED[case], details)


class _ThreePasses:
    def __init__(self, model: Discriminator):
        self._model = model
        self._settings = Optimizer()
        self._adamw = torch.optim.AdamW(
            model.parameters(), lr=_LEARNING_RATE, weight_decay=self._settings.weight_decay, fused=True
        )

    def __call__(self, groups: list[Group]) -> Tensor:
        with torch.no_grad():
            rewards = torch.cat([self._scores(group, group.students) for group in groups])
        for group in groups:
            students = self._scores(group, group.students)
            teachers = self._scores(group, group.teachers * len(group.students))
            (-nn.functional.logsigmoid(teachers - students).sum() / len(rewards)).backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), self._settings.max_grad_norm)
        self._adamw.step()
        self._adamw.zero_grad()
        return rewards

    def _scores(self, group: Group, branches: tuple[Branch, ...]) -> Tensor:
        """All rows are of one length, and nothing is padded."""
        ids = torch.tensor([[*group.prompt_tokens, *branch.tokens] for branch in branches])
        hidden = self._model.backbone(input_ids=ids, use_cache=False).last_hidden_state
        scores: Tensor = self._model.score_head(hidden[:, -1]).squeeze(-1)
        return scores
