"""Each loss against numbers worked out by hand, slow loops and finite differences."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gadfly import losses

NUMBERS = st.floats(-50, 50, allow_nan=False)


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_scores(seed: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Scores, group numbers and roles of rows in random order, and how many pairs they make."""
    rng = random.Random(seed)
    sizes = [(rng.randint(1, 3), rng.randint(1, 4)) for _ in range(rng.randint(1, 4))]
    members = [(g, i < k) for g, (k, n) in enumerate(sizes) for i in range(k + n)]
    rng.shuffle(members)
    scores = rows(*[rng.gauss(0, 3) for _ in members])
    group_index = torch.tensor([group for group, _ in members])
    is_teacher = torch.tensor([teacher for _, teacher in members])
    return scores, group_index, is_teacher, sum(k * n for k, n in sizes)


def random_policy(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities now, before and of the reference, advantages, and a mask of unequal lengths."""
    random_numbers = torch.Generator().manual_seed(seed)
    now, old, ref = torch.randn(3, 5, 7, generator=random_numbers, dtype=torch.float64) / 2 - 3
    advantages = torch.randn(5, generator=random_numbers, dtype=torch.float64)
    lengths = torch.randint(0, 8, (5,), generator=random_numbers)
    lengths[0] = 7
    return now, old, ref, advantages, torch.arange(7) < lengths[:, None]


# Bradley-Terry


def test_equal_scores_cost_log_two() -> None:
    loss = losses.bradley_terry_loss(
        rows(4.5, 4.5, 4.5), torch.tensor([0, 0, 0]), torch.tensor([True, False, False]), num_pairs=2
    )
    assert float(loss) == pytest.approx(math.log(2), abs=1e-15)


def test_bradley_terry_over_two_prompts_two_samples_two_teachers_is_the_number_worked_by_hand() -> None:
    # Differences 1, 2, 0, 1 and -2, -4, 2, 0; each costs log(1 + exp(-difference)).
    worked = (
        0.31326169 + 0.12692801 + 0.69314718 + 0.31326169 + 2.12692801 + 4.01814993 + 0.12692801 + 0.69314718
    ) / 8
    loss = losses.bradley_terry_loss(
        rows(1, 0, 0, -1, -1, 3, 1, 3),
        torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
        torch.tensor([True, True, False, False, True, True, False, False]),
        num_pairs=8,
    )
    assert float(loss) == pytest.approx(worked, abs=1e-7)


def test_cross_entropy_is_the_number_worked_by_hand() -> None:
    # -log sigmoid(1) twice, -log(1 - sigmoid(0)) and -log(1 - sigmoid(2)), over two pairs.
    worked = (2 * 0.31326169 + 0.69314718 + 2.12692801) / 2
    loss = losses.cross_entropy_loss(
        rows(1, 0, 2), torch.tensor([0, 0, 0]), torch.tensor([True, False, False]), num_pairs=2
    )
    assert float(loss) == pytest.approx(worked, abs=1e-7)


@pytest.mark.parametrize("seed", range(10))
def test_pair_losses_equal_a_slow_loop(seed: int) -> None:
    scores, group_index, is_teacher, num_pairs = random_scores(seed)
    bradley_terry = cross_entropy = pairs = 0.0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if group_index[i] == group_index[j] and is_teacher[i] and not is_teacher[j]:
                teacher, student = float(scores[i]), float(scores[j])
                bradley_terry += math.log1p(math.exp(student - teacher))
                cross_entropy += math.log1p(math.exp(-teacher)) + math.log1p(math.exp(student))
                pairs += 1
    assert pairs == num_pairs
    batch = (scores, group_index, is_teacher)
    loss = losses.bradley_terry_loss(*batch, num_pairs=num_pairs)
    assert float(loss) == pytest.approx(bradley_terry / pairs, rel=1e-12)
    loss = losses.cross_entropy_loss(*batch, num_pairs=num_pairs)
    assert float(loss) == pytest.approx(cross_entropy / pairs, rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), shifts=st.lists(NUMBERS, min_size=4, max_size=4))
def test_a_constant_added_to_all_scores_of_a_prompt_does_not_change_bradley_terry(
    seed: int, shifts: list[float]
) -> None:
    scores, group_index, is_teacher, num_pairs = random_scores(seed)
    loss = losses.bradley_terry_loss(scores, group_index, is_teacher, num_pairs=num_pairs)
    shifted = scores + rows(*shifts)[group_index]
    after = losses.bradley_terry_loss(shifted, group_index, is_teacher, num_pairs=num_pairs)
    assert float(after) == pytest.approx(float(loss), rel=1e-9)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), loss_name=st.sampled_from(["bradley_terry_loss", "cross_entropy_loss"]))
def test_the_order_of_rows_and_the_cut_into_groups_do_not_change_pair_losses(
    seed: int, loss_name: str
) -> None:
    loss_function = getattr(losses, loss_name)
    scores, group_index, is_teacher, num_pairs = random_scores(seed)
    whole = float(loss_function(scores, group_index, is_teacher, num_pairs=num_pairs))
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    batch = (scores[order], group_index[order], is_teacher[order])
    assert float(loss_function(*batch, num_pairs=num_pairs)) == pytest.approx(whole, rel=1e-12)
    shares = [
        float(loss_function(*(values[group_index == group] for values in batch_), num_pairs=num_pairs))
        for batch_ in [(scores, group_index, is_teacher)]
        for group in group_index.unique()
    ]
    assert sum(shares) == pytest.approx(whole, rel=1e-12)


def test_far_scores_cost_their_difference_and_not_infinity() -> None:
    loss = losses.bradley_terry_loss(
        torch.tensor([-500.0, 500.0]), torch.tensor([0, 0]), torch.tensor([True, False]), num_pairs=1
    )
    assert float(loss) == 1000.0


def test_a_pair_counts_as_much_as_its_teacher_response() -> None:
    groups = torch.tensor([0, 0, 0, 1, 1])
    is_teacher = torch.tensor([True, True, False, True, False])
    scores, weights = rows(1, 0, 0, 2, 0), rows(0.5, 2, 1, 1, 1)
    # Differences 1, 0 and 2, which count 0.5, 2 and 1.
    worked = (0.5 * 0.31326169 + 2 * 0.69314718 + 0.12692801) / 3.5
    loss = losses.bradley_terry_loss(scores, groups, is_teacher, num_pairs=3.5, weights=weights)
    assert float(loss) == pytest.approx(worked, abs=1e-7)
    # -log sigmoid of 1, 0 and 2 for the teacher, each with log 2 for the student.
    worked = worked + 0.69314718
    loss = losses.cross_entropy_loss(scores, groups, is_teacher, num_pairs=3.5, weights=weights)
    assert float(loss) == pytest.approx(worked, abs=1e-7)


def test_weights_of_one_change_no_bit() -> None:
    scores, group_index, is_teacher, num_pairs = random_scores(3)
    for loss in (losses.bradley_terry_loss, losses.cross_entropy_loss):
        plain = loss(scores, group_index, is_teacher, num_pairs=num_pairs)
        weighted = loss(
            scores,
            group_index,
            is_teacher,
            num_pairs=float(num_pairs),
            weights=torch.ones_like(scores),
        )
        assert plain.equal(weighted)


def test_centring_is_the_mean_square_of_all_scores_and_shares_of_micro_batches_add_up() -> None:
    assert float(losses.centring_loss(rows(3, -1, 2), num_rows=3)) == pytest.approx(14 / 3)
    parts = losses.centring_loss(rows(3), num_rows=3) + losses.centring_loss(rows(-1, 2), num_rows=3)
    assert float(parts) == pytest.approx(14 / 3)


# Advantages


def test_a_bounded_reward_is_log_sigmoid_and_tells_high_scores_apart() -> None:
    rewards = losses.bounded_reward(torch.tensor([[-100.0, 0.0, 20.0, 21.0]]))
    assert rewards[0, :2].tolist() == pytest.approx([-100, -0.69314718], abs=1e-7)
    assert float(rewards[0, 2]) < float(rewards[0, 3]) < 0


def test_shares_of_variance_add_up_to_one_and_count_what_parts_have_in_common() -> None:
    one, other = rows(1, -1, 1, -1)[None], rows(1, 1, -1, -1)[None]
    assert losses.variance_shares([one, other]) == pytest.approx([0.5, 0.5])
    assert losses.variance_shares([one, 2 * other]) == pytest.approx([0.2, 0.8])
    assert losses.variance_shares([one, one]) == pytest.approx([0.5, 0.5])
    assert losses.variance_shares([one, -0.5 * one]) == pytest.approx([2, -1])
    assert losses.variance_shares([one, -one]) == []


def test_advantages_divide_by_the_sample_standard_deviation() -> None:
    # Mean 3, squares 4 + 1 + 0 + 9 over 4 - 1, root 2.1602469.
    advantages = losses.group_advantages(rows(1, 2, 3, 6)[None])
    assert advantages[0].tolist() == pytest.approx([-0.9258201, -0.4629100, 0, 1.3887301], abs=2e-6)


def test_advantages_equal_a_slow_loop_that_adds_epsilon_to_the_deviation() -> None:
    rewards = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-5
    advantages = losses.group_advantages(rewards)
    for group in range(6):
        values = rewards[group].tolist()
        mean = sum(values) / 5
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 4)
        slow = [(value - mean) / (deviation + 1e-6) for value in values]
        assert advantages[group].tolist() == pytest.approx(slow, rel=1e-9)


@pytest.mark.parametrize("size", range(2, 12))
@pytest.mark.parametrize("reward", [0.0, 0.1, -115.3, 12345.678])
def test_a_constant_group_has_no_advantage_however_far_from_zero(size: int, reward: float) -> None:
    assert losses.group_advantages(torch.full((1, size), reward)).abs().max() == 0.0


@settings(deadline=None, max_examples=60)
@given(
    rewards=st.lists(NUMBERS, min_size=2, max_size=8),
    shift=NUMBERS,
    scale=st.floats(0.5, 20),
)
def test_offset_and_scale_of_rewards_cancel_and_advantages_sum_to_zero(
    rewards: list[float], shift: float, scale: float
) -> None:
    group = rows(*rewards)[None]
    advantages = losses.group_advantages(group)
    assert float(advantages.sum()) == pytest.approx(0, abs=1e-6)
    assert torch.allclose(losses.group_advantages(group + shift), advantages, atol=1e-6)
    if float(group.std()) > 0.01:
        assert torch.allclose(losses.group_advantages(group * scale), advantages, atol=1e-3)


def test_the_order_of_prompts_and_of_samples_changes_nothing_but_their_place() -> None:
    rewards = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    advantages = losses.group_advantages(rewards)
    permuted = losses.group_advantages(rewards[[2, 0, 1]][:, [3, 1, 0, 2]])
    assert torch.allclose(permuted, advantages[[2, 0, 1]][:, [3, 1, 0, 2]], rtol=1e-12)


def test_a_group_of_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        losses.group_advantages(torch.zeros(3, 1))


# SFT, policy gradient, KL


def test_sft_is_the_mean_over_tokens_and_not_over_responses() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -6.0], [-5.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert float(losses.sft_loss(logprobs, mask, num_tokens=4)) == 14 / 4


def test_the_tokens_of_a_row_count_by_its_weight() -> None:
    logprobs = torch.tensor([[-1.0, -2.0], [-5.0, 99.0]])
    mask = torch.tensor([[True, True], [True, False]])
    loss = losses.sft_loss(logprobs, mask, num_tokens=2.5, weights=torch.tensor([1.0, 0.5]))
    assert float(loss) == pytest.approx((1 + 2 + 0.5 * 5) / 2.5)


def test_the_ratio_is_clipped_where_the_advantage_would_push_it_further_and_only_there() -> None:
    # One token a row: ratio 1.5 and 0.5, each with advantage 2 and -2.
    now = (rows(1.5, 1.5, 0.5, 0.5).log() - 1)[:, None].requires_grad_()
    mask = torch.ones(4, 1, dtype=torch.bool)
    loss = losses.grpo_loss(
        now, torch.full_like(now, -1), rows(2, -2, 2, -2), mask, clip_range=0.2, num_tokens=4
    )
    loss.backward()
    # Gains 2.4 (clipped at 1.2), -3, 1, -1.6 (clipped at 0.8); what is clipped has no gradient.
    assert loss.item() == pytest.approx(-(2.4 - 3 + 1 - 1.6) / 4, rel=1e-12)
    assert now.grad is not None
    assert now.grad.flatten().tolist() == pytest.approx([0, 1.5 * 2 / 4, -0.5 * 2 / 4, 0], rel=1e-12)


def test_on_policy_the_gradient_of_each_token_is_its_advantage_over_all_tokens() -> None:
    now, _, _, advantages, mask = random_policy(0)
    now.requires_grad_()
    losses.grpo_loss(now, now.detach(), advantages, mask, clip_range=0.2, num_tokens=20).backward()
    assert now.grad is not None
    assert torch.allclose(now.grad, torch.where(mask, -advantages[:, None] / 20, 0.0), rtol=1e-14)


def test_k3_is_the_number_worked_by_hand() -> None:
    # Differences -0.5 and 1: exp(-0.5) - 1 + 0.5 and e - 2.
    kl = losses.kl_penalty(
        rows(-1, -2)[None], rows(-1.5, -1)[None], torch.ones(1, 2, dtype=torch.bool), num_tokens=2
    )
    assert float(kl) == pytest.approx((0.10653066 + 0.71828183) / 2, abs=1e-8)


@settings(deadline=None, max_examples=60)
@given(now=st.floats(-20, 0, width=32), difference=st.floats(-8, 8, width=32))
def test_k3_is_never_negative_even_in_single_precision(now: float, difference: float) -> None:
    logprob = torch.tensor([[now]])
    kl = losses.kl_penalty(logprob, logprob + difference, torch.tensor([[True]]), num_tokens=1)
    assert float(kl) >= 0


def test_k3_of_a_small_step_is_right_in_single_precision() -> None:
    now, reference = torch.tensor([[0.0]]), torch.tensor([[1e-4]])
    kl = losses.kl_penalty(now, reference, torch.tensor([[True]]), num_tokens=1)
    assert float(kl) == pytest.approx(5e-9, rel=1e-2)


@pytest.mark.parametrize("seed", range(10))
def test_policy_losses_equal_a_slow_loop(seed: int) -> None:
    now, old, ref, advantages, mask = random_policy(seed)
    policy = kl = sft = 0.0
    for i in range(5):
        for t in range(7):
            if mask[i, t]:
                ratio = math.exp(now[i, t] - old[i, t])
                clipped = min(max(ratio, 0.9), 1.1)
                policy -= min(ratio * float(advantages[i]), clipped * float(advantages[i]))
                difference = float(ref[i, t] - now[i, t])
                kl += math.exp(difference) - difference - 1
                sft -= float(now[i, t])
    tokens = int(mask.sum())
    loss = losses.grpo_loss(now, old, advantages, mask, clip_range=0.1, num_tokens=tokens)
    assert float(loss) == pytest.approx(policy / tokens, rel=1e-12)
    assert float(losses.kl_penalty(now, ref, mask, num_tokens=tokens)) == pytest.approx(kl / tokens)
    assert float(losses.sft_loss(now, mask, num_tokens=tokens)) == pytest.approx(sft / tokens)


@pytest.mark.parametrize("junk", [0.0, 1e30, -math.inf, math.inf, math.nan])
def test_padding_changes_neither_values_nor_gradients(junk: float) -> None:
    now, old, ref, advantages, mask = random_policy(3)

    def value_and_gradient(padding: int) -> tuple[Tensor, Tensor]:
        def pad(values: Tensor, filler: float) -> Tensor:
            wide = torch.cat([values, values.new_full((5, padding), filler)], dim=1)
            return torch.where(torch.cat([mask, mask.new_zeros(5, padding)], 1), wide, filler)

        wide_mask = torch.cat([mask, mask.new_zeros(5, padding)], 1)
        variable = pad(now, junk).requires_grad_()
        arguments = {"num_tokens": 9}
        loss = (
            losses.grpo_loss(variable, pad(old, junk), advantages, wide_mask, clip_range=0.2, **arguments)
            + losses.kl_penalty(variable, pad(ref, junk), wide_mask, **arguments)
            + losses.sft_loss(variable, wide_mask, **arguments)
        )
        (gradient,) = torch.autograd.grad(loss, variable)
        return loss.detach(), gradient

    loss, gradient = value_and_gradient(0)
    wide_loss, wide_gradient = value_and_gradient(3)
    assert math.isfinite(loss)
    assert float(wide_loss) == pytest.approx(float(loss), rel=1e-12)
    assert torch.equal(wide_gradient[:, :7], gradient)
    assert bool((gradient[~mask] == 0).all())
    assert bool((wide_gradient[:, 7:] == 0).all())


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), cut=st.integers(1, 4))
def test_shares_of_micro_batches_add_up_to_the_policy_losses_of_the_whole(seed: int, cut: int) -> None:
    now, old, ref, advantages, mask = random_policy(seed)
    tokens = int(mask.sum())

    def loss(part: slice) -> float:
        policy = losses.grpo_loss(
            now[part], old[part], advantages[part], mask[part], clip_range=0.2, num_tokens=tokens
        )
        kl = losses.kl_penalty(now[part], ref[part], mask[part], num_tokens=tokens)
        return float(policy + kl + losses.sft_loss(now[part], mask[part], num_tokens=tokens))

    assert loss(slice(cut)) + loss(slice(cut, None)) == pytest.approx(loss(slice(None)), rel=1e-9)


def test_gradients_equal_finite_differences() -> None:
    scores, group_index, is_teacher, num_pairs = random_scores(4)
    for pair_loss in (losses.bradley_terry_loss, losses.cross_entropy_loss):
        assert torch.autograd.gradcheck(
            lambda values, loss=pair_loss: loss(values, group_index, is_teacher, num_pairs=num_pairs),
            scores.requires_grad_(),
        )
    now, old, ref, advantages, mask = random_policy(4)
    now.requires_grad_()
    for loss in (
        lambda values: losses.grpo_loss(values, old, advantages, mask, clip_range=0.2, num_tokens=11),
        lambda values: losses.kl_penalty(values, ref, mask, num_tokens=11),
        lambda values: losses.sft_loss(values, mask, num_tokens=11),
    ):
        assert torch.autograd.gradcheck(loss, now)
