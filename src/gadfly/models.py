"""Opens language models, and reads the log-probabilities of responses off them.

Axes as in `packing.py`: `row` responses, `token` response positions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gadfly.chat_template import Renderer, load_renderer
from gadfly.errors import UserError
from gadfly.packing import MicroBatch


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of response tokens, and the entropy of the distributions they are from, in nats.

    Both are at the temperature they were read with, and zero where a row has no token.
    """

    values: Float[Tensor, "row token"]
    entropy: Float[Tensor, "row token"]


@dataclass(frozen=True)
class Scores:
    """Scores of responses. Only differences within one prompt have a meaning."""

    values: Float[Tensor, " row"]


def load_language_model(name: str, dtype: str) -> tuple[PreTrainedModel, Renderer]:
    """A causal language model in eval mode, and the renderer for its tokenizer.

    Args:
        name: a folder, or a Hugging Face name. No code of its author is run.
        dtype: torch's name of the weights' type.

    Raises:
        UserError: if it cannot be opened.
    """
    model, tokenizer = open_pretrained(AutoModelForCausalLM, name, dtype)
    return model, load_renderer(tokenizer, model.generation_config)


def open_pretrained(
    kind: type[AutoModel] | type[AutoModelForCausalLM], name: str, dtype: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of some kind in eval mode, with every weight from the folder, and its tokenizer.

    Raises:
        UserError: if it cannot be opened, or a weight is missing (transformers would draw it at random).
    """
    try:
        opened: Any = kind.from_pretrained(
            name, dtype=getattr(torch, dtype), trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as failure:
        # The parts of a model folder are read by many libraries, each with errors of its own.
        reason = (str(failure).strip() or repr(failure)).splitlines()[0]
        raise UserError(f"model {name!r} cannot be opened: {reason}") from failure
    model, report = opened
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"model {name!r} lacks {len(missing)} weights of a {type(model).__name__}, such as {missing[0]}; "
            f"give the folder of a whole one"
        )
    return model.eval().to(default_device()), tokenizer


def default_device() -> torch.device:
    """The GPU if torch has one, else the CPU; everything else follows the model's device."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def save_language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write an ordinary Hugging Face folder: weights, config, generation config, tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class LogprobReader:
    """Reads the log-probabilities of a micro-batch's responses.

    `temperature` divides the logits, so that the values are those of the sampled distribution.
    """

    temperature: float = 1.0

    def __call__(self, model: nn.Module, batch: MicroBatch) -> Logprobs:
        """One forward pass; logits exist for response positions only."""
        num_response_columns = batch.response_tokens.shape[1]
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            logits_to_keep=num_response_columns + 1,
            use_cache=False,
        ).logits
        # The logits at a column foretell the next one: the last prompt column foretells the first
        # response token.
        logits = logits[:, -num_response_columns - 1 : -1]
        log_softmax = log_distribution(logits, self.temperature)
        values = log_softmax.gather(-1, batch.response_tokens[..., None]).squeeze(-1)
        with torch.no_grad():
            entropy = torch.special.entr(log_softmax.exp()).sum(-1)
        mask = batch.response_mask
        return Logprobs(torch.where(mask, values, 0.0), torch.where(mask, entropy, 0.0))


def log_distribution(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (nats) of the next token at a temperature, in at least single precision.

    Sampler and trainer both use it, so that the probability of a sample is one number.
    """
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(precise / temperature, dim=-1)


def masked_mean(values: Float[Tensor, "row token"], mask: Bool[Tensor, "row token"]) -> float:
    """Mean over the real tokens of a batch."""
    return float(values[mask].mean()) if bool(mask.any()) else 0.0
