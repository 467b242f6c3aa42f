"""The sampler in plain PyTorch: prompts prefilled once a group, finished rows dropped as they end."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from gadfly.models import log_distribution
from gadfly.samplers.sampler import Request, Sample


@dataclass
class _Row:
    """A response while it grows: sample number `sample` of request number `request`."""

    request: int
    sample: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False


class LocalSampler:
    """Samples from a transformers model of its own, or from the student's in an unsharded process.

    Args:
        model: a causal language model in eval mode. If its tensors are the student's own, `update`
            costs nothing.
        end_ids: every token that ends a response.
        max_parallel_responses: responses decoded at once, though a request is never split; changes
            speed and memory, not the samples.
    """

    def __init__(self, model: PreTrainedModel, end_ids: frozenset[int], *, max_parallel_responses: int = 256):
        self._model = model
        self._end_ids = torch.tensor(sorted(end_ids), device=model.device)
        self._max_parallel_responses = max_parallel_responses

    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the student's weights, except those that are the same tensors already."""
        own = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, value in weights:
                if own[name].data_ptr() != value.data_ptr():
                    own[name].copy_(value)

    def sample(
        self, requests: Sequence[Request], *, temperature: float, max_response_tokens: int
    ) -> list[list[Sample]]:
        """The samples of each request, in order. Temperature 0 is greedy."""
        answers: list[list[Sample]] = [[] for _ in requests]
        # Prompts of like length share a batch, so little of it is padding.
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt_tokens))
        start = 0
        while start < len(order):
            chunk = [order[start]]
            while start + len(chunk) < len(order):
                candidate = [*chunk, order[start + len(chunk)]]
                if sum(requests[index].num_samples for index in candidate) > self._max_parallel_responses:
                    break
                chunk = candidate
            start += len(chunk)
            samples = self._sample_chunk(
                [requests[index] for index in chunk], temperature, max_response_tokens
            )
            for index, group in zip(chunk, samples, strict=True):
                answers[index] = group
        return answers

    @torch.no_grad()
    def _sample_chunk(
        self, requests: Sequence[Request], temperature: float, max_response_tokens: int
    ) -> list[list[Sample]]:
        rows = [
            _Row(index, sample)
            for index, request in enumerate(requests)
            for sample in range(request.num_samples)
        ]
        uniforms = self._uniforms(requests, rows, temperature, max_response_tokens)
        logits, cache, attention_mask = self._prefill(requests)
        alive = list(range(len(rows)))
        for position in range(max_response_tokens):
            tokens, logprobs = _draw(
                logits, temperature, None if uniforms is None else uniforms[alive, position]
            )
            ended = torch.isin(tokens, self._end_ids)
            for index, token, logprob, end in zip(
                alive, tokens.tolist(), logprobs.tolist(), ended.tolist(), strict=True
            ):
                rows[index].tokens.append(token)
                rows[index].logprobs.append(logprob)
                rows[index].finished = end
            if position + 1 == max_response_tokens or bool(ended.all()):
                break
            if bool(ended.any()):
                keep = torch.nonzero(~ended).squeeze(1)
                alive = [alive[index] for index in keep.tolist()]
                cache.batch_select_indices(keep)
                attention_mask, tokens = attention_mask[keep], tokens[keep]
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(alive), 1)], dim=1)
            logits = self._forward(tokens[:, None], attention_mask, cache)
        answers: list[list[Sample]] = [[] for _ in requests]
        for row in rows:
            answers[row.request].append(Sample(tuple(row.tokens), tuple(row.logprobs), row.finished))
        return answers

    def _uniforms(
        self, requests: Sequence[Request], rows: Sequence[_Row], temperature: float, count: int
    ) -> Tensor | None:
        if temperature == 0:
            return None
        numbers = np.stack([requests[row.request].uniforms(row.sample, count) for row in rows])
        return torch.from_numpy(numbers).to(self._model.device)

    def _prefill(self, requests: Sequence[Request]) -> tuple[Tensor, Any, Tensor]:
        """Logits for the first token of every row; each prompt is computed once and its cache shared out."""
        longest = max(len(request.prompt_tokens) for request in requests)
        padding = [longest - len(request.prompt_tokens) for request in requests]
        ids = [
            [0] * pad + list(request.prompt_tokens) for pad, request in zip(padding, requests, strict=True)
        ]
        mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
        attention_mask = torch.tensor(mask, device=self._model.device)
        cache = DynamicCache(config=self._model.config)
        logits = self._forward(torch.tensor(ids, device=self._model.device), attention_mask, cache)
        owners = [index for index, request in enumerate(requests) for _ in range(request.num_samples)]
        owner = torch.tensor(owners, device=self._model.device)
        cache.batch_select_indices(owner)
        return logits[owner], cache, attention_mask[owner]

    def _forward(self, ids: Tensor, attention_mask: Tensor, cache: Any) -> Tensor:
        positions = (attention_mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        logits: Tensor = self._model(
            input_ids=ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits


def _draw(logits: Tensor, temperature: float, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability: the cumulative distribution inverted, or without uniforms
    the likeliest token.
    """
    log_softmax = log_distribution(logits, temperature or 1.0)
    if uniforms is None:
        tokens = logits.argmax(-1)
    else:
        cumulative = log_softmax.double().exp().cumsum(-1)
        # Scaled by the true total, so that rounding never leaves a gap at the end.
        threshold = uniforms[:, None] * cumulative[:, -1:]
        tokens = (
            torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)
        )
    return tokens, log_softmax.gather(-1, tokens[:, None]).squeeze(1)
