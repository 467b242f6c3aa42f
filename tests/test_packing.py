"""Micro-batches: nothing lost, nothing doubled, masks by length alone."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_group, random_groups

from gadfly.groups import Branch, Group
from gadfly.packing import MicroBatch, micro_batches, num_response_tokens, num_rows

CPU = torch.device("cpu")


def batch_of(*groups: Group) -> MicroBatch:
    (batch,) = micro_batches(groups, 10**6, CPU)
    return batch


def group(prompt: list[int], *responses: list[int], num_teachers: int = 1) -> Group:
    branches = [Branch(tuple(response), False, "") for response in responses]
    return Group("7", tuple(prompt), tuple(branches[:num_teachers]), tuple(branches[num_teachers:]))


def test_prompts_are_padded_on_the_left_and_responses_on_the_right() -> None:
    batch = batch_of(group([5, 6, 7], [8]), group([9], [10, 11], [12]))
    assert batch.input_ids.tolist() == [
        [5, 6, 7, 8, 0],
        [0, 0, 9, 10, 11],
        [0, 0, 9, 12, 0],
    ]
    assert batch.attention_mask.tolist() == [
        [1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
        [0, 0, 1, 1, 0],
    ]
    assert batch.num_prompt_columns == 3
    assert batch.response_tokens.tolist() == [[8, 0], [10, 11], [12, 0]]
    assert batch.response_mask.tolist() == [[True, False], [True, True], [True, False]]
    assert batch.response_lengths.tolist() == [1, 2, 1]


def test_positions_count_real_tokens_from_zero() -> None:
    batch = batch_of(group([5, 6, 7], [8]), group([9], [10, 11]))
    for positions, mask in zip(batch.position_ids, batch.attention_mask, strict=True):
        assert positions[mask.bool()].tolist() == list(range(int(mask.sum())))


def test_rows_know_their_place_group_and_role() -> None:
    batch = batch_of(group([1], [1, 1, 1], [1], num_teachers=1), group([2], [2], [2], [2], num_teachers=2))
    # The second group has the shorter responses and comes first.
    assert batch.rows.tolist() == [2, 3, 4, 0, 1]
    assert batch.group_index.tolist() == [1, 1, 1, 0, 0]
    assert batch.is_teacher.tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("token", [0, 1, 2])
def test_masks_follow_lengths_and_never_the_ids_of_padding_or_end_of_turn(token: int) -> None:
    batch = batch_of(group([token, token], [token, 9, token], [token]))
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.response_mask.tolist() == [[True, True, True], [True, False, False]]


def test_a_response_of_no_token_is_a_row_of_padding() -> None:
    batch = batch_of(group([5], [], [6, 7]))
    assert batch.response_lengths.tolist() == [0, 2]
    assert batch.response_mask.tolist() == [[False, False], [True, True]]
    assert batch.attention_mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    empty = batch_of(group([5], [], []))
    assert empty.response_mask.shape == (2, 0)
    assert empty.input_ids.tolist() == [[5], [5]]


def test_groups_without_branches_are_in_no_micro_batch() -> None:
    assert micro_batches([], 100, CPU) == []
    assert micro_batches([Group("7", (1,)), Group("8", (1, 2))], 100, CPU) == []
    (batch,) = micro_batches([Group("7", (1,)), group([5], [6]), Group("8", (1,))], 100, CPU)
    assert batch.rows.tolist() == [0]
    assert batch.group_index.tolist() == [1]


def test_a_single_group_over_the_budget_is_a_micro_batch_of_its_own() -> None:
    small, large = group([1], [1], [1]), group([1] * 9, [1] * 9, [1] * 9)
    batches = micro_batches([large, small, small], 10, CPU)
    assert [batch.group_index.tolist() for batch in batches] == [[1, 1, 2, 2], [0, 0]]


def test_padding_counts_towards_the_budget() -> None:
    # Two rows of two columns each, and together four rows of three.
    short_prompt, short_response = group([1], [1, 1], [1, 1]), group([1, 1, 1], [1], [1])
    assert len(micro_batches([short_prompt, short_response], 20, CPU)) == 1
    assert len(micro_batches([short_prompt, short_response], 19, CPU)) == 2


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 9), budget=st.integers(1, 200))
def test_nothing_is_lost_or_doubled_and_the_budget_holds(seed: int, count: int, budget: int) -> None:
    rng = random.Random(seed)
    groups = [
        random_group(rng, teachers=rng.randint(0, 2), students=rng.randint(0, 3), lengths=range(7))
        for _ in range(count)
    ]
    batches = micro_batches(groups, budget, CPU)
    rows = [
        (number, owner, branch, place < len(owner.teachers))
        for number, owner in enumerate(groups)
        for place, branch in enumerate(owner.branches)
    ]
    seen: list[int] = []
    for batch in batches:
        if len(batch.group_index.unique()) > 1:
            assert batch.input_ids.numel() <= budget
        for place, row in enumerate(batch.rows.tolist()):
            number, owner, branch, is_teacher = rows[row]
            seen.append(row)
            assert batch.group_index[place] == number
            assert batch.is_teacher[place] == is_teacher
            real = batch.input_ids[place][batch.attention_mask[place].bool()]
            assert real.tolist() == [*owner.prompt_tokens, *branch.tokens]
            assert batch.response_tokens[place][batch.response_mask[place]].tolist() == list(branch.tokens)
    assert sorted(seen) == list(range(num_rows(groups)))
    assert sum(int(batch.response_mask.sum()) for batch in batches) == num_response_tokens(groups)


def test_groups_are_sorted_by_length_so_that_little_is_padding() -> None:
    groups = random_groups(0, 60, lengths=[2, 50])
    sorted_share = [float(batch.attention_mask.float().mean()) for batch in micro_batches(groups, 600, CPU)]
    unsorted = [batch_of(*groups[start : start + 3]) for start in range(0, 60, 3)]
    unsorted_share = [float(batch.attention_mask.float().mean()) for batch in unsorted]
    assert sum(sorted_share) / len(sorted_share) > sum(unsorted_share) / len(unsorted_share)
