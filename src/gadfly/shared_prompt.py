"""Groups as one sequence without padding, each prompt computed once for all its branches.

Prompt and branches of each group lie one after the other, positions as if each branch followed its prompt
directly:

    p p p | r r | r r r     q q | s s s | s
    0 1 2   3 4   3 4 5     0 1   2 3 4   2

So P + (G + K) R tokens are computed for a group and not (G + K) (P + R). Prompts attend to themselves,
branches to their prompt and to themselves.

Axes: `token` the sequence; `group`, `row` as in `packing.py`; `place` in a padded table of prompts or
branches.
"""

from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gadfly.attention import attend_tables, sees, sequence_arguments


class SharedPrompts:
    """Some groups as one sequence, and attention over it.

    Args:
        prompts: the tokens of each group's prompt, at least one.
        branches: the tokens of each group's branches; a branch may have none.
        device: where the tensors are to be.
        flex: attend by FlexAttention rather than over padded tables by SDPA; the default is what the device
            is best at.

    Attributes:
        input_ids: the sequence.
        position_ids: 0 at the first token of a prompt.
        group: which group a token belongs to.
        row: which branch of all a token belongs to; -1 in a prompt.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        branches: Sequence[Sequence[Sequence[int]]],
        device: torch.device,
        *,
        flex: bool | None = None,
    ):
        ids: list[int] = []
        positions: list[int] = []
        group_of: list[int] = []
        row_of: list[int] = []
        self._prompt_starts: list[int] = []
        self._branch_starts: list[int] = []
        for group, (prompt, responses) in enumerate(zip(prompts, branches, strict=True)):
            self._prompt_starts.append(len(ids))
            ids += prompt
            positions += range(len(prompt))
            row_of += [-1] * len(prompt)
            for response in responses:
                row_of += [len(self._branch_starts)] * len(response)
                self._branch_starts.append(len(ids))
                ids += response
                positions += range(len(prompt), len(prompt) + len(response))
            group_of += [group] * (len(ids) - len(group_of))
        self._prompt_lengths = [len(prompt) for prompt in prompts]
        self._branch_lengths = [len(response) for responses in branches for response in responses]
        self._owners = [group for group, responses in enumerate(branches) for _ in responses]
        self._device = device
        self._is_flex = device.type == "cuda" if flex is None else flex
        self._masks: dict[int | None, Any] = {}
        self.input_ids: Int[Tensor, " token"] = self._tensor(ids)
        self.position_ids: Int[Tensor, " token"] = self._tensor(positions)
        self.group: Int[Tensor, " token"] = self._tensor(group_of)
        self.row: Int[Tensor, " token"] = self._tensor(row_of)

    def arguments(self) -> dict[str, Any]:
        """What a model is called with (see `attention.open_attention`)."""
        return sequence_arguments(self.input_ids, self.position_ids, self)

    @property
    def predicting_positions(self) -> Int[Tensor, " response_token"]:
        """Positions whose states predict the tokens of the branches, row by row."""
        places: list[int] = []
        for last, start, length in zip(
            self._last_of_prompts(), self._branch_starts, self._branch_lengths, strict=True
        ):
            places += [last, *range(start, start + length - 1)] if length else []
        return self._tensor(places)

    @property
    def last_of_branches(self) -> Int[Tensor, " row"]:
        """Where the last token of each branch is; an empty one's is its prompt's."""
        ends = zip(self._last_of_prompts(), self._branch_starts, self._branch_lengths, strict=True)
        return self._tensor([start + length - 1 if length else last for last, start, length in ends])

    def __call__(
        self,
        query: Float[Tensor, "token head channel"],
        key: Float[Tensor, "token key_head channel"],
        value: Float[Tensor, "token key_head value_channel"],
        *,
        layer: int,
        scaling: float | None,
        window: int | None,
    ) -> Float[Tensor, "token head value_channel"]:
        """Attention of every token to its prompt and its own branch, up to itself (an `Attends`)."""
        way = self._by_flex if self._is_flex else self._by_tables
        return way(query, key, value, scaling, window)

    def _by_tables(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        if window not in self._masks:
            self._masks[window] = self._table_masks(window, query.dtype)
        of_prompt, of_branch = self._masks[window]
        prompt_output = attend_tables(
            _gather(query, self._prompts),
            _gather(key, self._prompts),
            _gather(value, self._prompts),
            of_prompt,
            scaling,
        )
        branch_output = attend_tables(
            _gather(query, self._branches),
            _gather(key, self._seen_by_branches),
            _gather(value, self._seen_by_branches),
            of_branch,
            scaling,
        )
        tables = torch.cat([prompt_output.flatten(0, 1), branch_output.flatten(0, 1)])
        return _gather(tables, self._places_in_tables)

    def _table_masks(self, window: int | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """Who sees whom: prompts themselves; branches their prompt and themselves.

        The larger one is a bias, 0 or minus infinity: SDPA would make one of truth values in every layer.
        """
        prompt_place, branch_place = (
            torch.arange(table.shape[1], device=self._device) for table in (self._prompts, self._branches)
        )
        own = self._tensor(self._prompt_lengths)[self._tensor(self._owners)][:, None, None]
        shape = (len(own), len(branch_place), len(prompt_place) + len(branch_place))
        bias = torch.full(shape, -torch.inf, dtype=dtype, device=self._device)
        to_prompt, to_branch = bias.split([len(prompt_place), len(branch_place)], -1)
        to_branch.masked_fill_(sees(branch_place[:, None] - branch_place, window), 0)
        # Padding on the right is after every query, in a prompt and in a branch.
        is_real = prompt_place < own
        if window is None:
            to_prompt.masked_fill_(is_real, 0)
            return None, bias
        to_prompt.masked_fill_(is_real & sees(own + branch_place[:, None] - prompt_place, window), 0)
        return sees((prompt_place[:, None] - prompt_place)[None], window), bias

    def _by_flex(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        if window not in self._masks:
            self._masks[window] = self._block_mask(window)
        attend = _compiled_flex_attention() if query.is_cuda else flex_attention
        output: Any = attend(
            *(part.transpose(0, 1)[None] for part in (query, key, value)),
            block_mask=self._masks[window],
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        attended: Tensor = output[0].transpose(0, 1)
        return attended

    def _block_mask(self, window: int | None) -> Any:
        group, row, position = self.group, self.row, self.position_ids
        num_tokens = len(position)
        limit = num_tokens if window is None else window
        return create_block_mask(
            lambda batch, head, query, key: (
                (group[query] == group[key])
                & ((row[key] == -1) | (row[key] == row[query]))
                & (position[query] >= position[key])
                & (position[query] - position[key] < limit)
            ),
            None,
            None,
            num_tokens,
            num_tokens,
            device=self._device.type,
        )

    @cached_property
    def _prompts(self) -> Int[Tensor, "group place"]:
        return self._table(self._prompt_starts, self._prompt_lengths)

    @cached_property
    def _branches(self) -> Int[Tensor, "row place"]:
        return self._table(self._branch_starts, self._branch_lengths)

    @cached_property
    def _seen_by_branches(self) -> Int[Tensor, "row key_place"]:
        """For each branch its prompt and itself, as padded tables side by side."""
        return torch.cat([self._prompts[self._tensor(self._owners)], self._branches], 1)

    def _table(self, starts: list[int], lengths: list[int]) -> Int[Tensor, "row place"]:
        """Where the tokens of each text are, padded on the right with the first of the sequence."""
        columns = torch.arange(max([1, *lengths]), device=self._device)
        is_real = columns < self._tensor(lengths)[:, None]
        return torch.where(is_real, self._tensor(starts)[:, None] + columns, 0)

    @cached_property
    def _places_in_tables(self) -> Int[Tensor, " token"]:
        """For each token, its place among those of both tables, prompts first."""
        is_prompt = self.row < 0
        first_of_branch = self._prompts.numel() + self.row * self._branches.shape[1]
        prompt_lengths = self._tensor(self._prompt_lengths)[self.group]
        in_prompt = self.group * self._prompts.shape[1] + self.position_ids
        in_branch = first_of_branch + self.position_ids - prompt_lengths
        return torch.where(is_prompt, in_prompt, in_branch)

    def _last_of_prompts(self) -> list[int]:
        """For each branch, where the last token of its prompt is."""
        return [self._prompt_starts[owner] + self._prompt_lengths[owner] - 1 for owner in self._owners]

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._device)


def _gather(tokens: Tensor, places: Tensor) -> Tensor:
    # Several times as fast as `tokens[places]`, backward above all.
    return tokens.flatten(1).index_select(0, places.flatten()).view(*places.shape, *tokens.shape[1:])


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention)
