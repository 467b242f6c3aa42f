"""A step's figures of scores and weights, against numbers worked out by hand and slow loops."""

from collections.abc import Sequence
from pathlib import Path
from statistics import correlation

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from side_by_side import side_by_side
from tiny import random_groups
from torch import nn

from gadfly.config import DiscriminatorConfig
from gadfly.discriminator import Scores, new_discriminator, read_scores
from gadfly.distributed.processes import Processes
from gadfly.engine import Engine
from gadfly.engine.movement import Movement
from gadfly.groups import Branch, Group
from gadfly.objectives import discriminator_objective
from gadfly.stages.diagnostics import Metrics, discriminator_metrics

TIED, MATCHED, CORRELATION = (
    f"detail/{name}" for name in ("tied_fraction", "length_matched_accuracy", "length_score_correlation")
)


def branch(text: str, length: int = 1) -> Branch:
    return Branch((5,) * length, True, text)


def metrics_of(scores: Sequence[float], *groups: Group) -> Metrics:
    return discriminator_metrics(Scores(torch.tensor(scores)), groups)


def with_lengths(teacher: int, *students: int) -> Group:
    return Group("p", (1,), (branch("t", teacher),), tuple(branch(f"s{n}", n) for n in students))


def test_score_rms_is_the_root_of_the_mean_square_of_all_rows() -> None:
    metrics = metrics_of([3.0, -4.0, 0.0, 5.0], with_lengths(1, 1), with_lengths(1, 1))
    assert metrics["detail/score_rms"] == pytest.approx((50 / 4) ** 0.5)


def test_a_pair_is_tied_if_its_texts_differ_and_its_scores_do_not() -> None:
    group = Group("p", (1,), (branch("a"),), (branch("b"), branch("b"), branch("c")))
    # Of different texts are a-b, a-b, a-c, b-c and b-c; the first two are tied.
    assert metrics_of([1.0, 1.0, 1.0, 2.0], group)[TIED] == pytest.approx(2 / 5)
    assert metrics_of([1.0, 2.0, 2.0, 3.0], group)[TIED] == 0


def test_scores_of_two_prompts_are_never_tied() -> None:
    groups = [Group(name, (1,), (branch("a"),), (branch("b"),)) for name in "pq"]
    assert metrics_of([1.0, 2.0, 1.0, 2.0], *groups)[TIED] == 0


def test_where_all_texts_of_a_prompt_are_one_there_are_no_pairs_to_be_tied() -> None:
    group = Group("p", (1,), (branch("a"),), (branch("a"), branch("a")))
    assert TIED not in metrics_of([1.0, 1.0, 1.0], group)


def test_half_precision_ties_scores_that_differ() -> None:
    group = Group("p", (1,), (branch("a"),), tuple(branch(str(n)) for n in range(4)))
    exact = torch.tensor([16.6, 16.61, 16.62, 16.63, 16.64])
    assert metrics_of(exact.tolist(), group)[TIED] == 0
    assert metrics_of(exact.bfloat16().tolist(), group)[TIED] == 1


def test_pairs_match_in_length_up_to_a_tenth_of_the_longer() -> None:
    # 9 and 11 tokens match 10; 12 do not, nor do 8. Of the matched one is won, one tied.
    metrics = metrics_of([1.0, 0.0, 1.0, 5.0, 5.0], with_lengths(10, 9, 11, 12, 8))
    assert metrics[MATCHED] == 0.75
    assert metrics["discriminator/accuracy"] == pytest.approx(1.5 / 4)


def test_without_a_pair_of_one_length_there_is_no_matched_accuracy() -> None:
    assert MATCHED not in metrics_of([1.0, 0.0], with_lengths(10, 12))


def test_length_and_score_correlate_within_a_prompt_only() -> None:
    # Lengths 1, 2, 3 and scores 1, 3, 2: covariance 1/2 over variances 1 and 1.
    half = with_lengths(1, 1, 2, 3)
    assert metrics_of([0.0, 1.0, 3.0, 2.0], half)[CORRELATION] == pytest.approx(0.5)
    # A second prompt far longer and far better, in which the longer is worse: -1.
    against = with_lengths(1, 100, 200, 300)
    both = metrics_of([0.0, 1.0, 3.0, 2.0, 0.0, 90.0, 80.0, 70.0], half, against)
    assert both[CORRELATION] == pytest.approx(-0.25)


def test_a_prompt_whose_samples_are_equally_long_or_good_has_no_correlation() -> None:
    half, one_length = with_lengths(1, 1, 2, 3), with_lengths(1, 7, 7, 7)
    left = metrics_of([0.0, 1.0, 3.0, 2.0, 0.0, 1.0, 2.0, 3.0], half, one_length)
    assert left[CORRELATION] == pytest.approx(0.5)
    assert CORRELATION not in metrics_of([0.0, 4.0, 4.0, 4.0], half)
    assert CORRELATION not in metrics_of([0.0, 4.0], with_lengths(1, 3))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(-2, 2), st.integers(1, 12), st.sampled_from("ab")), min_size=4, max_size=4
        ),
        min_size=1,
        max_size=4,
    )
)
def test_they_are_what_a_slow_loop_counts(drawn: list[list[tuple[int, int, str]]]) -> None:
    groups = [
        Group("p", (1,), *(tuple(branch(text, n) for _, n, text in part) for part in (rows[:1], rows[1:])))
        for rows in drawn
    ]
    tied, matched, correlations = [], [], []
    for rows in drawn:
        for place, (score, length, text) in enumerate(rows):
            for other_score, other_length, other_text in rows[place + 1 :]:
                if text != other_text:
                    tied.append(score == other_score)
                if place == 0 and abs(length - other_length) <= 0.1 * max(length, other_length) + 1e-9:
                    matched.append((score > other_score) + 0.5 * (score == other_score))
        scores, lengths = [row[0] for row in rows[1:]], [row[1] for row in rows[1:]]
        if len(set(scores)) > 1 and len(set(lengths)) > 1:
            correlations.append(correlation(lengths, scores))
    found = metrics_of([float(row[0]) for rows in drawn for row in rows], *groups)
    for name, values in ((TIED, tied), (MATCHED, matched), (CORRELATION, correlations)):
        if values:
            assert found[name] == pytest.approx(sum(values) / len(values), abs=1e-9)
        else:
            assert name not in found


def test_what_has_moved_is_no_longer_still() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    movement = Movement(model)
    with torch.no_grad():
        model[0].weight[1, 2] += 1
    assert movement.since_last() == 3 / 4
    assert movement.since_last() == 1


def test_what_is_not_trained_is_not_looked_at() -> None:
    model = nn.Linear(4, 4)
    model.bias.requires_grad_(False)
    movement = Movement(model)
    with torch.no_grad():
        model.bias += 1
    assert movement.since_last() == 1
    with torch.no_grad():
        model.weight += 1
    assert movement.since_last() == 0
    with pytest.raises(ValueError, match="trained"):
        Movement(model.requires_grad_(False)).since_last()


def test_the_bias_of_a_score_head_is_not_looked_at() -> None:
    model = nn.Linear(4, 1)
    movement = Movement(model)
    with torch.no_grad():
        model.weight += 1
    assert movement.since_last() == 0
    with torch.no_grad():
        model.bias += 1
    assert movement.since_last() == 1


def test_of_a_large_tensor_only_a_sample_is_looked_at_and_it_has_every_column() -> None:
    model = nn.Linear(512, 64, bias=False)
    movement = Movement(model)
    seen = 0
    for column in range(512):
        with torch.no_grad():
            model.weight[:, column] += 1
        seen += movement.since_last() == 0
    assert seen == 512
    looked_at = 0
    for row in range(64):
        with torch.no_grad():
            model.weight[row, 7] += 1
        looked_at += movement.since_last() == 0
    assert 0 < looked_at <= 3


def still_after_a_step(
    folder: Path, learning_rate: float, dtype: str = "float32", frozen: bool = False
) -> float:
    model, _ = new_discriminator(str(folder), dtype, seed=0)
    groups = random_groups(0, 8)
    config = DiscriminatorConfig(weight_decay=0.0)
    engine = Engine(model, read_scores, micro_batch_tokens=4096, optimizer=config)
    if frozen:
        # As a module that an optimiser has been told of and no loss depends on.
        for weight in model.backbone.layers[1].parameters():
            weight.register_hook(torch.zeros_like)
    movement = Movement(engine.model)
    engine.forward_backward(groups, discriminator_objective(groups, "bradley_terry"))
    engine.clip_gradients()
    engine.step(learning_rate)
    return movement.since_last()


def test_a_learning_rate_of_zero_or_lost_in_half_precision_moves_nothing(tiny_model: Path) -> None:
    assert still_after_a_step(tiny_model, 1e-3) == 0
    assert still_after_a_step(tiny_model, 0.0) == 1
    assert still_after_a_step(tiny_model, 1e-9, "bfloat16") > 0.5


def test_a_frozen_module_shows_as_its_share(tiny_model: Path) -> None:
    # A layer of Qwen2 has 12 tensors; beside two of them there are embedding, last norm and head.
    assert still_after_a_step(tiny_model, 1e-3, frozen=True) == 12 / 27


def moved_in_shards(processes: Processes, folder: Path) -> tuple[float, float]:
    model, _ = new_discriminator(str(folder), "float64", seed=0)
    engine = Engine(
        model, read_scores, micro_batch_tokens=4096, optimizer=DiscriminatorConfig(), processes=processes
    )
    movement = Movement(engine.model)
    weights = [weight for weight in engine.model.parameters() if weight.requires_grad]
    with torch.no_grad():
        # The second process's share of the first tensor alone.
        if processes.rank == 1:
            weights[0].to_local().add_(1)
    return movement.since_last(), movement.since_last()


@pytest.mark.slow
def test_what_moves_in_the_shard_of_one_process_has_moved_for_all(tiny_model: Path) -> None:
    assert side_by_side(moved_in_shards, tiny_model) == [(26 / 27, 1.0)] * 2
