"""Groups to tensors: micro-batches of whole groups within a token budget, sorted by length.

A model that can (see `attention.py`) reads a micro-batch as one sequence with each prompt once, any other as
padded rows. Prompts are padded on the left and responses on the right, so that in every row the response
starts at the same column and lengths are data:

    . . p p p | r r r . .
    p p p p p | r r r r r

Axes: `row` branches of the micro-batch, `token` response columns, `column` prompt and response
    columns.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gadfly.groups import Branch, Group
from gadfly.shared_prompt import SharedPrompts


@dataclass(frozen=True)
class MicroBatch:
    """Some groups of a batch as tensors.

    Attributes:
        rows: index of each row among the rows of the whole batch.
        group_index: which group of the whole batch a row belongs to.
        is_teacher: whether the teacher wrote the row.
        input_ids: prompt and response; padding holds id 0 and is masked.
        attention_mask: 1 on real tokens.
        position_ids: 0 at the first prompt token.
        response_lengths: tokens of each response.
        same_as: for each row, the first row of its group with the same response; itself if there is none.
        num_prompt_columns: columns before the responses.
        shared: the same as one sequence; None for a model that reads padded rows.
        is_filler: whether it is part of no batch (see `filler`).
    """

    rows: Int[Tensor, " row"]
    group_index: Int[Tensor, " row"]
    is_teacher: Bool[Tensor, " row"]
    input_ids: Int[Tensor, "row column"]
    attention_mask: Int[Tensor, "row column"]
    position_ids: Int[Tensor, "row column"]
    response_lengths: Int[Tensor, " row"]
    same_as: Int[Tensor, " row"]
    num_prompt_columns: int
    shared: SharedPrompts | None = None
    is_filler: bool = False

    def arguments(self) -> dict[str, Any]:
        """What a model is called with."""
        if self.shared is not None:
            return self.shared.arguments()
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "use_cache": False,
        }

    def predicting_states(
        self, hidden: Float[Tensor, "line column channel"]
    ) -> Float[Tensor, "token channel"]:
        """Those of a model's states that predict the response tokens, row by row."""
        if self.shared is not None:
            return hidden[0].index_select(0, self.shared.predicting_positions)
        # The last prompt column predicts the first response token.
        before = hidden[:, self.num_prompt_columns - 1 : -1]
        return before[self.response_mask]

    def last(self, hidden: Float[Tensor, "line column channel"]) -> Float[Tensor, "row channel"]:
        """Those of a model's states at the last token of each response; of the prompt before an empty one."""
        if self.shared is not None:
            return hidden[0].index_select(0, self.shared.last_of_branches)
        places = self.num_prompt_columns + self.response_lengths - 1
        return hidden[torch.arange(len(places), device=places.device), places]

    @property
    def tokens(self) -> Int[Tensor, " token"]:
        """The response tokens, row by row."""
        return self.response_tokens[self.response_mask]

    @property
    def response_tokens(self) -> Int[Tensor, "row token"]:
        """Ids of the responses, padded on the right."""
        return self.input_ids[:, self.num_prompt_columns :]

    @property
    def response_mask(self) -> Bool[Tensor, "row token"]:
        """True on response tokens, the end-of-turn token included."""
        columns = torch.arange(self.response_tokens.shape[1], device=self.input_ids.device)
        return columns < self.response_lengths[:, None]


def micro_batches(
    groups: Sequence[Group], max_tokens: int, device: torch.device, *, shares_prompts: bool = False
) -> list[MicroBatch]:
    """A batch as micro-batches of whole groups; see `cuts` and `pack`."""
    return [
        pack(groups, cut, device, shares_prompts=shares_prompts)
        for cut in cuts(groups, max_tokens, range(len(groups)), shares_prompts=shares_prompts)
    ]


def cuts(
    groups: Sequence[Group], max_tokens: int, wanted: Iterable[int], *, shares_prompts: bool = False
) -> list[list[int]]:
    """Which groups go together, so that a micro-batch has at most `max_tokens` tokens that are computed.

    These include padding, or with `shares_prompts` each prompt once and no padding.

    Groups are sorted by length, so little is padding. A single group over the budget is a
    micro-batch of its own: its rows must be scored together. A group without branches is in none.

    Args:
        groups: the whole batch.
        max_tokens: the budget.
        wanted: indices of the groups to take.
        shares_prompts: whether a prompt is computed once a group.
    """
    measures = {index: _measure(groups[index]) for index in wanted if groups[index].branches}
    found: list[list[int]] = []
    size = _NOTHING
    for index in sorted(measures, key=lambda index: measures[index].order):
        joined = size.joined_by(measures[index])
        if found and (joined.sequence_tokens if shares_prompts else joined.padded_tokens) <= max_tokens:
            found[-1].append(index)
            size = joined
        else:
            found.append([index])
            size = measures[index]
    return found


def pack(
    groups: Sequence[Group], indices: Sequence[int], device: torch.device, *, shares_prompts: bool = False
) -> MicroBatch:
    """The micro-batch of some groups of a batch."""
    batch = _padded(groups, indices, device)
    if not shares_prompts:
        return batch
    return replace(batch, shared=_sequence([groups[index] for index in indices], device))


def filler(device: torch.device, *, shares_prompts: bool = False) -> MicroBatch:
    """The smallest micro-batch, for a process that has to be in a pass and has nothing left to do in it."""
    token = Branch((0,), finished=False, text="")
    batch = pack([Group("", (0,), teachers=(token,))], [0], device, shares_prompts=shares_prompts)
    return replace(batch, is_filler=True)


def num_rows(groups: Sequence[Group]) -> int:
    """Branches in a batch."""
    return sum(len(group.branches) for group in groups)


def num_response_tokens(groups: Sequence[Group]) -> int:
    """Response tokens in a batch, end-of-turn tokens included: the normaliser of a token mean."""
    return sum(len(branch.tokens) for group in groups for branch in group.branches)


def num_tokens(group: Group) -> int:
    """Tokens of a group, its prompt counted once."""
    return _measure(group).sequence_tokens


@dataclass(frozen=True)
class _Measure:
    """How large some groups are together: rows, longest texts, and tokens with each prompt once."""

    num_rows: int
    longest_response: int
    longest_prompt: int
    sequence_tokens: int

    @property
    def order(self) -> tuple[int, int]:
        return self.longest_response, self.longest_prompt

    @property
    def padded_tokens(self) -> int:
        return self.num_rows * (self.longest_prompt + self.longest_response)

    def joined_by(self, other: "_Measure") -> "_Measure":
        return _Measure(
            self.num_rows + other.num_rows,
            max(self.longest_response, other.longest_response),
            max(self.longest_prompt, other.longest_prompt),
            self.sequence_tokens + other.sequence_tokens,
        )


_NOTHING = _Measure(0, 0, 0, 0)


def _measure(group: Group) -> _Measure:
    lengths = [len(branch.tokens) for branch in group.branches]
    num_prompt_tokens = len(group.prompt_tokens)
    return _Measure(
        len(lengths), max(lengths, default=0), num_prompt_tokens, num_prompt_tokens + sum(lengths)
    )


def _sequence(groups: Sequence[Group], device: torch.device) -> SharedPrompts:
    return SharedPrompts(
        [group.prompt_tokens for group in groups],
        [[branch.tokens for branch in group.branches] for group in groups],
        device,
    )


def _padded(groups: Sequence[Group], indices: Sequence[int], device: torch.device) -> MicroBatch:
    first_rows = [0, *accumulate(len(group.branches) for group in groups)]
    members = [
        (index, place, branch) for index in indices for place, branch in enumerate(groups[index].branches)
    ]
    num_prompt_columns = max(len(groups[index].prompt_tokens) for index in indices)
    num_response_columns = max(len(branch.tokens) for _, _, branch in members)
    ids = [
        [
            *(0 for _ in range(num_prompt_columns - len(groups[index].prompt_tokens))),
            *groups[index].prompt_tokens,
            *branch.tokens,
            *(0 for _ in range(num_response_columns - len(branch.tokens))),
        ]
        for index, _, branch in members
    ]
    firsts: dict[tuple[int, tuple[int, ...]], int] = {}
    same_as = [
        firsts.setdefault((index, branch.tokens), row) for row, (index, _, branch) in enumerate(members)
    ]
    prompt_lengths = torch.tensor(
        [len(groups[index].prompt_tokens) for index, _, _ in members], device=device
    )
    response_lengths = torch.tensor([len(branch.tokens) for _, _, branch in members], device=device)
    columns = torch.arange(num_prompt_columns + num_response_columns, device=device) - num_prompt_columns
    is_real = (columns >= -prompt_lengths[:, None]) & (columns < response_lengths[:, None])
    return MicroBatch(
        rows=torch.tensor([first_rows[index] + place for index, place, _ in members], device=device),
        group_index=torch.tensor([index for index, _, _ in members], device=device),
        is_teacher=torch.tensor(
            [place < len(groups[index].teachers) for index, place, _ in members], device=device
        ),
        input_ids=torch.tensor(ids, device=device),
        attention_mask=is_real.long(),
        position_ids=(is_real.cumsum(1) - 1).clamp_min(0),
        response_lengths=response_lengths,
        same_as=torch.tensor(same_as, device=device),
        num_prompt_columns=num_prompt_columns,
    )
