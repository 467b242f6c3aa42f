"""Keys and values of some prompts, each once, and of the branches that grow from them.

A step is one token a live row, as one sequence. A row attends to its prompt and to itself: the queries of a
prompt's rows meet its keys in one matrix product, so that a long prompt is read once for all of them.

Prompts end at the last place of their table and branches begin at the first of theirs. How far a place is
from the newest token is then the same in all rows, and a sliding window is a cut through both tables:

    . . p p p | r r       . is before a prompt, the one thing that is masked
    p p p p p | r r

Axes: `group` prompts; `row` live branches; `slot` room for branches, as many for each group, some of them of
rows that are gone; `group_head`, `slot_head` these times the key heads; `token` prompts one after the other;
`place` in a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gadfly.attention import attend_tables, sees

# Room for the first tokens of branches; it doubles whenever it is full.
_FIRST_PLACES = 32

# What has to be left of the slots before their tables are copied without the rest: all copies together then
# move no more than a few times what one step reads.
_WORTH_A_COPY = 0.75


@dataclass
class _Tables:
    """What attention looks up in one layer: a matrix for each head of a group, or of a slot."""

    prompt_key: Float[Tensor, "group_head place channel"]
    prompt_value: Float[Tensor, "group_head place value_channel"]
    key: Float[Tensor, "slot_head branch_place channel"]
    value: Float[Tensor, "slot_head branch_place value_channel"]


class BranchCache:
    """The tables of all layers, and attention of the newest tokens to them (an `Attends`).

    Args:
        lengths: tokens of each prompt, at least one.
        branches: of each prompt.
        max_tokens: no branch has more.
        device: where the tensors are to be.
    """

    def __init__(self, lengths: Sequence[int], branches: int, max_tokens: int, device: torch.device):
        self._lengths = torch.tensor(lengths, device=device)
        self._longest = max(lengths)
        self._num_groups, self._num_slots = len(lengths), branches
        self._layers: dict[int, _Tables] = {}
        self._num_tokens = 0
        self._max_tokens = max_tokens
        self._room = min(max_tokens, _FIRST_PLACES)
        self._slots: Int[Tensor, " row"] = torch.arange(len(lengths) * branches, device=device)
        self._row_of_slot: Int[Tensor, " slot"] | None = None
        self._padding: Tensor | None = None
        if min(lengths) < self._longest:
            places = torch.arange(self._longest, device=device)
            self._padding = places < self._longest - self._lengths[:, None]
        self._bias: Tensor | None = None

    def prompts(self, start: int, end: int) -> "PromptAttention":
        """Attention within some of the prompts, which fills their part of the tables."""
        return PromptAttention(self, torch.arange(start, end, device=self._lengths.device), self._lengths)

    def extend(self) -> None:
        """Make room for a token in every live row, which the next call of the model brings."""
        if self._num_tokens == self._room:
            self._room = min(self._max_tokens, 2 * self._room)
            self._copy()
        self._num_tokens += 1

    def keep(self, rows: Int[Tensor, " row"]) -> None:
        """Drop all live rows but these, which are in order."""
        self._slots = self._slots[rows]
        live = torch.bincount(self._slots // self._num_slots, minlength=self._num_groups)
        needed = int(live.count_nonzero() * live.max())
        if needed <= _WORTH_A_COPY * self._num_groups * self._num_slots:
            self._copy()
        else:
            self._find_rows()

    def store_prompts(
        self,
        layer: int,
        group: Int[Tensor, " token"],
        position: Int[Tensor, " token"],
        key: Float[Tensor, "token key_head channel"],
        value: Float[Tensor, "token key_head value_channel"],
    ) -> None:
        """Put tokens of prompts into the tables of a layer."""
        if layer not in self._layers:
            self._layers[layer] = _Tables(
                *(_table(part, self._num_groups, self._longest) for part in (key, value)),
                *(_table(part, len(self._slots), self._room) for part in (key, value)),
            )
        tables = self._layers[layer]
        place = position + self._longest - self._lengths[group]
        for table, part in ((tables.prompt_key, key), (tables.prompt_value, value)):
            table.unflatten(0, (self._num_groups, -1)).transpose(1, 2)[group, place] = part

    def __call__(
        self,
        query: Float[Tensor, "row head channel"],
        key: Float[Tensor, "row key_head channel"],
        value: Float[Tensor, "row key_head value_channel"],
        *,
        layer: int,
        scaling: float | None,
        window: int | None,
    ) -> Float[Tensor, "row head value_channel"]:
        """Attention of the newest token of every live row to its prompt and its branch."""
        if self._row_of_slot is not None:
            query, key, value = (part.index_select(0, self._row_of_slot) for part in (query, key, value))
        tables, newest = self._layers[layer], self._num_tokens - 1
        tables.key.select(1, newest).copy_(key.flatten(0, 1))
        tables.value.select(1, newest).copy_(value.flatten(0, 1))
        scaled = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        attended = self._attend(scaled, tables, window)
        return attended if self._row_of_slot is None else attended.index_select(0, self._slots)

    def _attend(
        self, query: Float[Tensor, "slot head channel"], tables: _Tables, window: int | None
    ) -> Float[Tensor, "slot head value_channel"]:
        first, first_own = 0, 0
        if window is not None:
            first = min(max(0, self._longest + self._num_tokens - window), self._longest)
            first_own = max(0, self._num_tokens - window)
        places, own_places = self._longest - first, self._num_tokens - first_own
        prompt_key = tables.prompt_key.narrow(1, first, places)
        prompt_value = tables.prompt_value.narrow(1, first, places)
        key = tables.key.narrow(1, first_own, own_places)
        value = tables.value.narrow(1, first_own, own_places)

        groups, slots, channels = self._num_groups, self._num_slots, query.shape[-1]
        key_heads = len(key) // len(query)
        by_group = query.reshape(groups, slots, key_heads, -1).transpose(1, 2)
        to_prompt = self._prompt_scores(by_group.reshape(len(prompt_key), -1, channels), prompt_key)
        to_own = torch.bmm(query.reshape(len(key), -1, channels), key.transpose(1, 2))
        to_own = to_own.view(groups, slots, key_heads, -1).transpose(1, 2)
        scores = torch.cat([to_prompt, to_own.reshape(*to_prompt.shape[:2], own_places)], -1)

        shares = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
        shares = shares.to(value.dtype)
        of_prompt = torch.bmm(shares.narrow(2, 0, places), prompt_value)
        to_own = shares.narrow(2, places, own_places).reshape(groups, key_heads, slots, -1).transpose(1, 2)
        of_own = torch.bmm(to_own.reshape(len(key), -1, own_places), value)
        of_prompt = of_prompt.view(groups, key_heads, slots, -1).transpose(1, 2)
        return (of_own.view(of_prompt.shape) + of_prompt).view(*query.shape[:-1], -1)

    def _prompt_scores(
        self, query: Float[Tensor, "matrix query channel"], key: Float[Tensor, "matrix place channel"]
    ) -> Float[Tensor, "matrix query place"]:
        if self._padding is None:
            return torch.bmm(query, key.transpose(1, 2))
        if self._bias is None:
            self._bias = query.new_zeros(self._padding.shape).masked_fill(self._padding, -torch.inf)
        bias = self._bias[:, self._longest - key.shape[1] :]
        per_matrix = bias.repeat_interleave(len(key) // len(bias), 0)[:, None]
        return torch.baddbmm(per_matrix, query, key.transpose(1, 2))

    def _copy(self) -> None:
        """Tables with the wanted room, and no more groups and slots than the live rows need."""
        groups, group, live = torch.unique_consecutive(
            self._slots // self._num_slots, return_inverse=True, return_counts=True
        )
        num_slots = int(live.max())
        rank = torch.arange(len(group), device=group.device) - (live.cumsum(0) - live)[group]
        # Slots without a row hold another's numbers, which nobody reads.
        source = self._slots[:1].repeat(len(groups) * num_slots)
        slots = group * num_slots + rank
        source[slots] = self._slots
        for tables in self._layers.values():
            if len(groups) < self._num_groups:
                tables.prompt_key, tables.prompt_value = (
                    table.unflatten(0, (self._num_groups, -1))[groups].flatten(0, 1)
                    for table in (tables.prompt_key, tables.prompt_value)
                )
            tables.key, tables.value = (self._moved(table, source) for table in (tables.key, tables.value))
        self._padding = None if self._padding is None else self._padding[groups]
        self._bias = None
        self._lengths = self._lengths[groups]
        self._num_groups, self._num_slots, self._slots = len(groups), num_slots, slots
        self._find_rows()

    def _moved(self, table: Tensor, source: Int[Tensor, " slot"]) -> Tensor:
        by_slot = table.unflatten(0, (self._num_groups * self._num_slots, -1))
        moved = table.new_zeros(len(source), by_slot.shape[1], self._room, table.shape[-1])
        moved[:, :, : self._num_tokens] = by_slot[:, :, : self._num_tokens][source]
        return moved.flatten(0, 1)

    def _find_rows(self) -> None:
        self._row_of_slot = None
        num_slots = self._num_groups * self._num_slots
        if len(self._slots) < num_slots:
            self._row_of_slot = self._slots.new_zeros(num_slots)
            self._row_of_slot[self._slots] = torch.arange(len(self._slots), device=self._slots.device)


class PromptAttention:
    """Attention of prompts to themselves, which leaves their keys and values in a cache (an `Attends`).

    Attributes:
        position_ids: of the tokens, prompt after prompt.
        last: where the last token of each prompt is.
    """

    def __init__(self, cache: BranchCache, groups: Int[Tensor, " group"], all_lengths: Int[Tensor, " any"]):
        lengths = all_lengths[groups]
        places = torch.arange(int(lengths.max()), device=groups.device)
        self._cache = cache
        self._is_real = places < lengths[:, None]
        self._group = groups.repeat_interleave(lengths)
        self._ahead = (places[:, None] - places)[None]
        starts = lengths.cumsum(0) - lengths
        self._tokens = torch.where(self._is_real, starts[:, None] + places, 0)
        self.position_ids: Int[Tensor, " token"] = places.expand(len(groups), -1)[self._is_real]
        self.last: Int[Tensor, " group"] = starts + lengths - 1

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
        """Attention of every token to its prompt up to itself."""
        self._cache.store_prompts(layer, self._group, self.position_ids, key, value)
        # Padding is on the right, after every query.
        mask = None if window is None else sees(self._ahead, window)
        query, key, value = (part[self._tokens] for part in (query, key, value))
        return attend_tables(query, key, value, mask, scaling)[self._is_real]


def _table(like: Float[Tensor, "token key_head channel"], lines: int, places: int) -> Tensor:
    return like.new_zeros(lines * like.shape[1], places, like.shape[2])
