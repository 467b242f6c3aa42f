"""Features of answers from a language model's hidden states, for `tell.tell_accuracy`.

The model should be of another family than student and discriminator: what the student was trained
against is not independent of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from gadfly.analysis.tell import Embed
from gadfly.models import open_pretrained

# Padding included; 16 answers of 512 tokens.
_BATCH_TOKENS = 8192


def open_embedder(model_name: str) -> Embed:
    """Features by a model: the mean of its last hidden states over the tokens of the response.

    It reads the prompt, an empty line and the response, without a chat template. Where that is more than
    its context, the end of the prompt is cut until it takes half of it, then the end of the response. A
    response without a token has zeros.

    Args:
        model_name: a folder, or a Hugging Face name, of anything `AutoModel` opens but an encoder with a
            decoder. No code of its author is run.

    Raises:
        UserError: if it cannot be opened, or lacks a weight that hidden states need.
    """
    return _Embedder(*open_pretrained(AutoModel, model_name, "float32"))


@dataclass(frozen=True)
class _Embedder:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    read: dict[tuple[str, str], Float[np.ndarray, " feature"]] = field(default_factory=dict)
    """What has been read already: the teacher's answers come again with every model."""

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> Float[np.ndarray, "answer feature"]:
        wanted = list(zip(prompts, responses, strict=True))
        if new := [answer for answer in dict.fromkeys(wanted) if answer not in self.read]:
            self.read.update(zip(new, self._features(*zip(*new, strict=True)), strict=True))
        return np.stack([self.read[answer] for answer in wanted])

    def _features(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> Float[np.ndarray, "answer feature"]:
        answers = self._cut_to_context(
            self._tokens([f"{prompt}\n\n" for prompt in prompts], add_special_tokens=True),
            self._tokens(responses, add_special_tokens=False),
        )
        hidden_size = self.model.config.get_text_config().hidden_size
        features = np.zeros((len(answers), hidden_size), dtype=np.float32)
        for rows in _batches([len(prompt) + len(response) for prompt, response in answers]):
            non_empty = [row for row in rows if answers[row][1]]
            if non_empty:
                features[non_empty] = self._mean_states([answers[row] for row in non_empty]).cpu().numpy()
        return features

    def _tokens(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        # A control string in a text, such as `<|im_end|>`, stays text.
        encoded = self.tokenizer(
            list(texts), add_special_tokens=add_special_tokens, split_special_tokens=True, verbose=False
        )
        return list(encoded["input_ids"])

    def _cut_to_context(
        self, prompts: Sequence[list[int]], responses: Sequence[list[int]]
    ) -> list[tuple[list[int], list[int]]]:
        context = self._context()
        answers = []
        for prompt, response in zip(prompts, responses, strict=True):
            kept = prompt[: max(context - len(response), context // 2)]
            answers.append((kept, response[: context - len(kept)]))
        return answers

    def _context(self) -> int:
        context = self.tokenizer.model_max_length
        if positions := getattr(self.model.config.get_text_config(), "max_position_embeddings", None):
            context = min(context, positions)
        for name, module in self.model.named_modules():
            # RoBERTa and its kin count positions from the one after that of padding.
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                context = min(context, module.num_embeddings - module.padding_idx - 1)
        return context

    @torch.no_grad()
    def _mean_states(self, answers: Sequence[tuple[list[int], list[int]]]) -> Float[Tensor, "answer feature"]:
        columns = max(len(prompt) + len(response) for prompt, response in answers)
        ids = torch.zeros(len(answers), columns, dtype=torch.long)
        mask, in_response = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (prompt, response) in enumerate(answers):
            end = len(prompt) + len(response)
            ids[row, :end] = torch.tensor([*prompt, *response])
            mask[row, :end] = 1
            in_response[row, len(prompt) : end] = 1
        device = self.model.device
        states = self.model(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
        ).last_hidden_state
        weights = (in_response / in_response.sum(1, keepdim=True)).to(device)
        return torch.einsum("act,ac->at", states, weights)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Rows in the order of their lengths, cut so that a batch holds at most `_BATCH_TOKENS`, or one row."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if batches and lengths[row] * (len(batches[-1]) + 1) <= _BATCH_TOKENS:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
