"""The demo's student: a Llama that sees the record and its own last few words, and no more.

The position q sees k <= q if k is among the first `record_tokens` or q - k < `memory_tokens`. With
one layer nothing older reaches it by a detour. Positions count real tokens, so padding and a
key-value cache change nothing.

Importing this module registers the model type `forgetful` with transformers.
"""

from typing import Any, no_type_check

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast


# The tests check types at run time, and would refuse all but the fields declared here.
@no_type_check
class ForgetfulConfig(LlamaConfig):
    """Llama's configuration, and what the model can see."""

    model_type = "forgetful"

    record_tokens: int = 0
    """Number of first positions that stay visible."""
    memory_tokens: int = 6
    """Number of last positions that are visible, the current one included; at least 1."""


class ForgetfulModel(LlamaModel):
    """Llama without its head, with the forgetful attention mask."""

    config_class = ForgetfulConfig
    config: ForgetfulConfig
    _supports_flash_attn = False
    _supports_flex_attn = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Llama's forward pass; arguments as there.

        Args:
            input_ids: [batch, query]; or give `inputs_embeds`.
            attention_mask: [batch, past + query], true on real tokens; padding may be anywhere. None
                where there is none.
            position_ids: [batch, query]; by default each real token's number in its row, from 0.
            past_key_values: a growing cache such as `DynamicCache`.
            inputs_embeds: [batch, query, hidden], in the place of `input_ids`.
            use_cache: whether to return the cache.
            kwargs: passed on.

        Raises:
            ValueError: if the mask does not cover just the cached and the given tokens, or if
                `position_ids` differ from the default on a real token, as in rows of packed texts.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise ValueError("either input_ids or inputs_embeds is needed")
        rows, num_queries = given.shape[:2]
        num_past = 0 if past_key_values is None else past_key_values.get_seq_length()
        shape = (rows, num_past + num_queries)
        if attention_mask is None:
            attention_mask = torch.ones(shape, dtype=torch.bool, device=given.device)
        if attention_mask.shape != shape:
            got = tuple(attention_mask.shape)
            raise ValueError(f"attention_mask is {got}; a forgetful model needs {shape}")
        is_real = attention_mask.to(device=given.device, dtype=torch.bool)
        positions = is_real.cumsum(-1) - 1
        query_positions = positions[:, num_past:]
        if position_ids is None:
            position_ids = query_positions.clamp(min=0)
        elif bool(((position_ids != query_positions) & is_real[:, num_past:]).any()):
            raise ValueError("position_ids must count the real tokens of a row from 0")
        output: BaseModelOutputWithPast = super().forward(
            input_ids=input_ids,
            attention_mask=self._attention_mask(is_real, positions, num_queries),
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return output

    def _attention_mask(
        self, is_real: Bool[Tensor, "row key"], positions: Int[Tensor, "row key"], num_queries: int
    ) -> Shaped[Tensor, "row 1 query key"]:
        """Which key each of the last `num_queries` tokens sees, in the form attention takes it."""
        num_keys = positions.shape[1]
        columns = torch.arange(num_keys, device=positions.device)
        # Padding sees itself: the softmax of a row where nothing is seen is not a number.
        is_itself = columns[num_keys - num_queries :, None] == columns
        query, key = positions[:, num_keys - num_queries :, None], positions[:, None, :]
        remembered = (key < self.config.record_tokens) | (query - key < self.config.memory_tokens)
        is_seen = (is_real[:, None, :] & (key <= query) & remembered | is_itself)[:, None]
        if self.config._attn_implementation != "eager":
            return is_seen
        # Eager attention adds the mask to its scores.
        mask = torch.zeros(is_seen.shape, dtype=self.dtype, device=is_seen.device)
        return mask.masked_fill(~is_seen, torch.finfo(self.dtype).min)


class ForgetfulForCausalLM(LlamaForCausalLM):
    """The forgetful model as a language model."""

    config_class = ForgetfulConfig
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: ForgetfulConfig) -> None:
        """Random weights, in the shape that `config` says."""
        super().__init__(config)
        self.model = ForgetfulModel(config)
        self.post_init()  # type: ignore[no-untyped-call]


AutoConfig.register(ForgetfulConfig.model_type, ForgetfulConfig)
AutoModel.register(ForgetfulConfig, ForgetfulModel)
AutoModelForCausalLM.register(ForgetfulConfig, ForgetfulForCausalLM)
