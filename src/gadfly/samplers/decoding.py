"""A model run one token after the other for all branches of some prompts: one interface, two ways."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from gadfly.attention import sequence_arguments, takes_attention
from gadfly.errors import UserError
from gadfly.samplers.branch_cache import BranchCache

# Prompt tokens computed at once: enough to keep a device busy, and a bound on what they take.
_PREFILL_TOKENS = 2**13


@runtime_checkable
class Decoder(Protocol):
    """Rows that grow by a token a step; row by row in the order of their prompts."""

    def prefill(self) -> Float[Tensor, "row vocabulary"]:
        """Compute the prompts; the logits of every row's first token."""
        ...

    def step(self, tokens: Int[Tensor, " row"]) -> Float[Tensor, "row vocabulary"]:
        """Add a token to every row; the logits of the next."""
        ...

    def keep(self, rows: Int[Tensor, " row"]) -> None:
        """Drop all rows but these, which are in order."""
        ...


def open_decoder(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], branches: int, max_tokens: int
) -> Decoder:
    """The faster way that a model can go.

    Args:
        model: a causal language model.
        prompts: sorted by length, so that little is padding.
        branches: of each prompt.
        max_tokens: no branch has more.
    """
    kind = SharedDecoder if takes_attention(model) else PaddedDecoder
    return kind(model, prompts, branches, max_tokens)


@torch.inference_mode()
def check_decodable(model: PreTrainedModel) -> None:
    """Try whether a model with recurrent states gives them to the cache, where rows can be selected.

    Raises:
        UserError: if it keeps them to itself.
    """
    if takes_attention(model) or not model._is_stateful:
        return
    decoder = PaddedDecoder(model, [[0], [0, 0]], branches=1, max_tokens=1)
    try:
        decoder.prefill()
        is_decodable = decoder.holds_all()
    except TypeError:
        # It takes no cache of keys and values.
        is_decodable = False
    if not is_decodable:
        raise UserError(
            f"{model.name_or_path or 'the model'}: {type(model).__name__} keeps recurrent states to itself, "
            f'where the local sampler cannot copy them; set sampling.backend = "vllm", name vLLM servers in '
            f"sampling.servers, or choose another model"
        )


class SharedDecoder:
    """Each prompt's keys and values once (see `branch_cache.py`); nothing is padded but in attention."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], branches: int, max_tokens: int
    ):
        lengths = [len(prompt) for prompt in prompts]
        self._model, self._prompts, self._branches = model, prompts, branches
        self._cache = BranchCache(lengths, branches, max_tokens, model.device)
        self._positions = torch.tensor(lengths, device=model.device).repeat_interleave(branches)

    def prefill(self) -> Float[Tensor, "row vocabulary"]:
        """Compute the prompts; the logits of every row's first token."""
        logits: list[Tensor] = []
        start = 0
        while start < len(self._prompts):
            end, num_tokens = start, 0
            while end < len(self._prompts) and num_tokens < _PREFILL_TOKENS:
                num_tokens += len(self._prompts[end])
                end += 1
            attends = self._cache.prompts(start, end)
            tokens = [token for prompt in self._prompts[start:end] for token in prompt]
            ids = torch.tensor(tokens, device=self._model.device)
            arguments = sequence_arguments(ids, attends.position_ids, attends)
            logits.append(self._model(**arguments, logits_to_keep=attends.last).logits[0])
            start = end
        return torch.cat(logits).repeat_interleave(self._branches, 0)

    def step(self, tokens: Int[Tensor, " row"]) -> Float[Tensor, "row vocabulary"]:
        """Add a token to every row; the logits of the next."""
        self._cache.extend()
        logits: Tensor = self._model(**sequence_arguments(tokens, self._positions, self._cache)).logits[0]
        self._positions = self._positions + 1
        return logits

    def keep(self, rows: Int[Tensor, " row"]) -> None:
        """Drop all rows but these, which are in order."""
        self._positions = self._positions[rows]
        self._cache.keep(rows)


class PaddedDecoder:
    """For any model: rows padded on the left, and a prompt's cache copied to each of its branches."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], branches: int, max_tokens: int
    ):
        self._model, self._branches = model, branches
        longest = max(len(prompt) for prompt in prompts)
        ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (longest - len(p)) + [1] * (len(p) + max_tokens) for p in prompts]
        self._ids = torch.tensor(ids, device=model.device)
        self._mask = torch.tensor(mask, device=model.device)
        self._positions = (self._mask[:, :longest].cumsum(1) - 1).clamp_min(0)
        self._num_columns = longest
        self._cache = DynamicCache(config=model.config)

    def prefill(self) -> Float[Tensor, "row vocabulary"]:
        """Compute the prompts; the logits of every row's first token."""
        logits = self._forward(self._ids)
        owner = torch.arange(len(self._ids), device=self._ids.device).repeat_interleave(self._branches)
        self._positions = self._positions[:, -1:]
        self.keep(owner)
        return logits[owner]

    def step(self, tokens: Int[Tensor, " row"]) -> Float[Tensor, "row vocabulary"]:
        """Add a token to every row; the logits of the next."""
        self._num_columns += 1
        self._positions = self._positions + 1
        return self._forward(tokens[:, None])

    def keep(self, rows: Int[Tensor, " row"]) -> None:
        """Drop all rows but these, which are in order."""
        # What searches by beams call; unlike the other ways to select, it knows recurrent states.
        self._cache.reorder_cache(rows)  # type: ignore[arg-type]
        self._mask, self._positions = self._mask[rows], self._positions[rows]

    def holds_all(self) -> bool:
        """Whether every layer has left in the cache what it needs of the prompts."""
        return all(_is_filled(layer) for layer in self._cache.layers)

    def _forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._model(
            input_ids=ids,
            attention_mask=self._mask[:, : self._num_columns],
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits


def _is_filled(layer: Any) -> bool:
    if isinstance(layer, LinearAttentionCacheLayerMixin) and not any(
        (*layer.is_conv_states_initialized.values(), *layer.is_recurrent_states_initialized.values())
    ):
        return False
    return bool(getattr(layer, "is_initialized", True))
