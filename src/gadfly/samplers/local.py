"""The sampler in plain PyTorch: prompts prefilled once a group, finished rows dropped as they end."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from gadfly.errors import AlarmError
from gadfly.logprobs import log_distribution
from gadfly.samplers.canary import Canary, canary_text
from gadfly.samplers.decoding import check_decodable, open_decoder
from gadfly.samplers.decoding_copy import DecodingCopy
from gadfly.samplers.sampler import Request, Sample

_CANARY_TOKENS = 32
_REMEDY = 'set engine.precision = "float32", or run on one process, which needs no copy'


class LocalSampler:
    """Samples from a transformers model of its own, or from the student's in an unsharded process.

    Args:
        model: a causal language model in eval mode. If its tensors are the student's own, `update`
            costs nothing.
        end_ids: every token that ends a response.
        max_parallel_responses: responses decoded at once, though a request is never split; changes
            speed and memory, not the samples.
        copy_dtype: decode with copies of the linear layers' weights in this precision (see `DecodingCopy`);
            where it is bfloat16 and the model's is not, under autocast, as the student is trained.
        canary: for a model of its own, whose weights are to be checked after every update.
        progress: told in words, before each token of the responses decoded together, where sampling is.

    Raises:
        UserError: the model has states that it does not share (see `check_decodable`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        end_ids: frozenset[int],
        *,
        max_parallel_responses: int = 256,
        copy_dtype: torch.dtype | None = None,
        canary: Canary | None = None,
        progress: Callable[[str], None] | None = None,
    ):
        check_decodable(model)
        self._student = model
        self._copy = DecodingCopy(model, copy_dtype) if copy_dtype else None
        self._model = self._copy.model if self._copy else model
        self._is_autocast = copy_dtype not in (None, model.dtype)
        self._canary = canary
        self._progress = progress
        self._end_ids = torch.tensor(sorted(end_ids), device=model.device)
        self._max_parallel_responses = max_parallel_responses

    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the student's weights, except those that are the same tensors already.

        Raises:
            AlarmError: the model computes other log-probabilities than the student afterwards.
        """
        own = dict(self._student.named_parameters())
        with torch.no_grad():
            for name, value in weights:
                if own[name].data_ptr() != value.data_ptr():
                    own[name].copy_(value)
        if self._copy is not None:
            self._copy.update()
        if self._canary is not None:
            text = canary_text(self._model.config.get_text_config().vocab_size, _CANARY_TOKENS)
            self._canary.check("the inference copy", text, self._logprobs(text), remedy=_REMEDY)

    @torch.inference_mode()
    def _logprobs(self, tokens: Sequence[int]) -> list[float]:
        """Log-probability of each token after the first, at temperature 1."""
        ids = torch.tensor(tokens, device=self._model.device)
        with self._precision():
            logits = self._model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        values: list[float] = log_distribution(logits, 1.0).gather(-1, ids[1:, None]).squeeze(-1).tolist()
        return values

    def sample(
        self, requests: Sequence[Request], *, temperature: float, max_response_tokens: int
    ) -> list[list[Sample]]:
        """The samples of each request, in order. Temperature 0 is greedy.

        Raises:
            AlarmError: if log-probabilities are not finite.
        """
        answers: list[list[Sample]] = [[] for _ in requests]
        for chunk in self._chunks(requests):
            chunk_requests = [requests[index] for index in chunk]
            with self._precision():
                samples = self._sample_chunk(chunk_requests, temperature, max_response_tokens)
            for index, group in zip(chunk, samples, strict=True):
                answers[index] = group
        return answers

    def _precision(self) -> torch.autocast:
        return torch.autocast(self._model.device.type, dtype=torch.bfloat16, enabled=self._is_autocast)

    def _chunks(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Requests decoded together: for as many samples each, and with prompts of like length."""
        order = sorted(
            range(len(requests)),
            key=lambda index: (requests[index].num_samples, len(requests[index].prompt_tokens)),
        )
        chunk: list[int] = []
        for index in order:
            count = requests[index].num_samples
            is_full = (len(chunk) + 1) * count > self._max_parallel_responses
            if chunk and (is_full or requests[chunk[0]].num_samples != count):
                yield chunk
                chunk = []
            chunk.append(index)
        if chunk:
            yield chunk

    @torch.inference_mode()
    def _sample_chunk(
        self, requests: Sequence[Request], temperature: float, max_response_tokens: int
    ) -> list[list[Sample]]:
        uniforms = self._uniforms(requests, temperature, max_response_tokens)
        num_samples = requests[0].num_samples
        decoder = open_decoder(
            self._model, [request.prompt_tokens for request in requests], num_samples, max_response_tokens
        )
        logits = decoder.prefill()
        alive = torch.arange(len(logits), device=logits.device)
        # Kept as tensors until the end: reading numbers one by one costs more than drawing them.
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for position in range(max_response_tokens):
            if self._progress is not None:
                self._progress(f"sampling: token {position + 1} of at most {max_response_tokens}")
            tokens, logprobs = _draw(
                logits, temperature, None if uniforms is None else uniforms[position][alive]
            )
            steps.append((alive, tokens, logprobs))
            ended = torch.isin(tokens, self._end_ids)
            if position + 1 == max_response_tokens:
                break
            if bool(ended.any()):
                rows = torch.nonzero(~ended).squeeze(1)
                if not len(rows):
                    break
                alive, tokens = alive[rows], tokens[rows]
                decoder.keep(rows)
            logits = decoder.step(tokens)
        samples = self._assemble(steps)
        return [samples[start : start + num_samples] for start in range(0, len(samples), num_samples)]

    def _assemble(self, steps: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Sample]:
        """The samples from what was drawn at each step: rows, tokens and log-probabilities."""
        row, tokens, logprobs = (torch.cat(parts) for parts in zip(*steps, strict=True))
        # One number that is none makes all of its row's such, whichever token is drawn.
        if not bool(logprobs.isfinite().all()):
            broken = len(row[~logprobs.isfinite()].unique())
            raise AlarmError(
                f"log-probabilities of {broken} of {len(row.unique())} samples are not finite: the student's "
                f"weights have diverged or are broken; nothing was updated on these samples"
            )
        # Stable, so that the tokens of a row stay in the order they were drawn in.
        order = torch.argsort(row, stable=True)
        lengths = torch.bincount(row)
        ended = torch.isin(tokens[order[lengths.cumsum(0) - 1]], self._end_ids).tolist()
        all_tokens, all_logprobs = tokens[order].tolist(), logprobs[order].tolist()
        samples, start = [], 0
        for length, finished in zip(lengths.tolist(), ended, strict=True):
            part = slice(start, start + length)
            samples.append(Sample(tuple(all_tokens[part]), tuple(all_logprobs[part]), finished))
            start += length
        return samples

    def _uniforms(
        self, requests: Sequence[Request], temperature: float, count: int
    ) -> Float[Tensor, "token row"] | None:
        if temperature == 0:
            return None
        numbers = [
            request.uniforms(sample, count) for request in requests for sample in range(request.num_samples)
        ]
        return torch.from_numpy(np.stack(numbers, axis=1)).to(self._model.device)


def _draw(
    logits: Float[Tensor, "row vocabulary"], temperature: float, uniforms: Float[Tensor, " row"] | None
) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
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
