"""Log-probabilities of responses, read off a language model without a tensor of all its logits.

Axes as in `packing.py`: `row` responses, `token` response positions; and `real` the response tokens of all
rows without padding.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from gadfly.packing import MicroBatch

# Logits alive at once: 64 MB in single precision, and a few times that for what is made of them.
_CHUNK_LOGITS = 2**24


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of response tokens, and the entropy of the distributions they are from, in nats.

    Both are at the temperature they were read with, and zero where a row has no token.
    """

    values: Float[Tensor, "row token"]
    entropy: Float[Tensor, "row token"]


@dataclass(frozen=True)
class LogprobReader:
    """Reads the log-probabilities of a micro-batch's responses.

    Attributes:
        temperature: divides the logits, so that the values are those of the sampled distribution.
        is_chunked: whether to make the logits from the last hidden states, some tokens at a time, and again
            in the backward pass (see `has_plain_head`); else the model makes all of them at once.
    """

    temperature: float = 1.0
    is_chunked: bool = False

    def __call__(self, model: nn.Module, batch: MicroBatch) -> Logprobs:
        """One forward pass; logits exist for response positions only."""
        tokens, mask = batch.tokens, batch.response_mask
        if self.is_chunked:
            hidden = batch.predicting_states(_backbone(model)(**batch.arguments()).last_hidden_state)
            values, entropy = chunked_logprobs(_head(model), hidden, tokens, self.temperature)
        else:
            values, entropy = _of_logits(_response_logits(model, batch), tokens, self.temperature)
        nothing = values.new_zeros(mask.shape)
        return Logprobs(nothing.masked_scatter(mask, values), nothing.masked_scatter(mask, entropy))


def chunked_logprobs(
    head: nn.Module,
    hidden: Float[Tensor, "real channel"],
    tokens: Int[Tensor, " real"],
    temperature: float,
    *,
    chunk_logits: int = _CHUNK_LOGITS,
) -> tuple[Float[Tensor, " real"], Float[Tensor, " real"]]:
    """Log-probability of each token and entropy (nats), with at most `chunk_logits` logits alive.

    Where it takes more than one chunk, each is computed again in the backward pass: a third more work in the
    head and none elsewhere.

    Args:
        head: the linear map from last hidden states to logits.
        hidden: the states that predict the tokens.
        tokens: what came.
        temperature: divides the logits.
        chunk_logits: numbers alive at once.
    """
    size = max(1, chunk_logits // len(head.weight))  # type: ignore[arg-type]
    chunks = list(zip(hidden.split(size), tokens.split(size), strict=True))

    def read(states: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        return _of_logits(head(states), following, temperature)

    if len(chunks) == 1 or not torch.is_grad_enabled():
        pairs = [read(*chunk) for chunk in chunks]
    else:
        pairs = [checkpoint(read, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    values, entropies = zip(*pairs, strict=True)
    return torch.cat(values), torch.cat(entropies)


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether a model's logits are its head on its last hidden states and nothing more, by trying.

    Some models cap or scale their logits afterwards; those are read all at once.
    """
    head = model.get_output_embeddings()
    # A cap hardly shows on the small logits of a new model, which grow in training.
    is_capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None) is not None
    if is_capped or getattr(head, "weight", None) is None:
        return False
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    logits = model(input_ids=ids, use_cache=False).logits
    ours = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    return ours.shape == logits.shape and torch.allclose(ours, logits, rtol=1e-4, atol=1e-5, equal_nan=True)


def log_distribution(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (nats) of the next token at a temperature, in at least single precision.

    Sampler and trainer both use it, so that the probability of a sample is one number.
    """
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Dividing by 1 changes nothing, and takes as long as any pass over all logits.
    return torch.log_softmax(precise if temperature == 1 else precise / temperature, dim=-1)


def masked_mean(values: Float[Tensor, "row token"], mask: Bool[Tensor, "row token"]) -> float:
    """Mean over the real tokens of a batch."""
    return float(values[mask].mean()) if bool(mask.any()) else 0.0


def _backbone(model: nn.Module) -> nn.Module:
    backbone: nn.Module = model.base_model  # type: ignore[assignment]
    return backbone


def _head(model: nn.Module) -> nn.Module:
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    return head


def _response_logits(model: nn.Module, batch: MicroBatch) -> Float[Tensor, "real vocabulary"]:
    if batch.shared is not None:
        # Each once: the last token of a prompt predicts the first of all its branches.
        places, where = batch.shared.predicting_positions.unique(return_inverse=True)
        logits: Tensor = model(**batch.arguments(), logits_to_keep=places).logits
        return logits[0].index_select(0, where)
    num_columns = batch.response_tokens.shape[1]
    logits = model(**batch.arguments(), logits_to_keep=num_columns + 1).logits
    # The last prompt column predicts the first response token.
    return logits[:, -num_columns - 1 : -1][batch.response_mask]


def _of_logits(
    logits: Float[Tensor, "real vocabulary"],
    tokens: Int[Tensor, " real"],
    temperature: float,
) -> tuple[Float[Tensor, " real"], Float[Tensor, " real"]]:
    log_softmax = log_distribution(logits, temperature)
    values = log_softmax.gather(-1, tokens[:, None]).squeeze(-1)
    with torch.no_grad():
        # A token that cannot come adds nothing, though its log-probability is no finite number.
        finite = log_softmax.clamp_min(torch.finfo(log_softmax.dtype).min)
        entropy = -log_softmax.exp().mul_(finite).sum(-1)
    return values, entropy
