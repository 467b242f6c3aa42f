"""The discriminator: a transformer, and a linear head that reads one score off a response's last token.

It starts as a copy of the student's original model with a new head. The last token is the
end-of-turn token of a finished response and a content token of an unfinished one, by the same rule
for both roles (see `chat_template.py`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, GenerationConfig, PreTrainedModel

from gadfly.attention import open_attention
from gadfly.chat_template import Renderer, load_renderer
from gadfly.errors import CheckpointError
from gadfly.groups import Branch, Group
from gadfly.lora import SharedBase
from gadfly.models import open_pretrained
from gadfly.packing import MicroBatch, pack
from gadfly.stored_json import parse_object

_HEAD_FILE = "score_head.safetensors"
_PROBE_FILE = "probe.json"


@dataclass(frozen=True)
class Scores:
    """Scores of responses. Only differences within one prompt have a meaning."""

    values: Float[Tensor, " row"]


@dataclass(frozen=True)
class Probe:
    """Texts stored with a discriminator, by whose scores it is known again.

    Attributes:
        folder: where it was saved.
        groups: one a text, in the tokens that were scored.
        scores: what the texts scored then.
        scored_in: torch's name of the type that was computed in.
    """

    folder: Path
    groups: tuple[Group, ...]
    scores: tuple[float, ...]
    scored_in: str

    def check(
        self,
        model: "Discriminator",
        renderer: Renderer,
        score: Callable[[Sequence[Group]], Scores] | None = None,
        *,
        scored_in: str | None = None,
    ) -> None:
        """Cut the texts into tokens and score them again.

        Args:
            model: what was loaded.
            renderer: the same.
            score: scores groups with it. Default: the model itself, text by text.
            scored_in: the type that computes in, if not in that of the weights.

        Raises:
            CheckpointError: if a text has other tokens or another score than it had.
        """
        for branch in (branch for group in self.groups for branch in group.branches):
            if tuple(renderer.response_tokens(branch.text, branch.finished)) != branch.tokens:
                raise CheckpointError(
                    f"{self.folder}: the tokenizer is not the one that was saved: it cuts a probe text into "
                    f"other tokens; restore the folder from an intact copy"
                )
        if not self.groups:
            return
        scores = _score(model, self.groups) if score is None else score(self.groups)
        tolerance = _rounding(self.scored_in, scored_in or _dtype_name(model))
        for number, (stored, now) in enumerate(zip(self.scores, scores.values.tolist(), strict=True)):
            # Written so that a score that is no number is refused too.
            if not abs(stored - now) <= tolerance * max(1.0, abs(stored)):
                raise CheckpointError(
                    f"{self.folder}: probe text {number} scores {now:.4f}, {stored:.4f} when it was saved: "
                    f"weights or head are not those that were saved; restore the folder from an intact copy"
                )


class Discriminator(nn.Module):
    """Scores responses: `score = head(hidden state of the last token)`, the head in single precision.

    Source: arXiv 2511.10643, section 2.2. Only score differences within a prompt enter loss and
    reward.
    """

    def __init__(self, backbone: PreTrainedModel, seed: int):
        super().__init__()
        self.backbone = backbone
        hidden_size = backbone.config.get_text_config().hidden_size
        dtype = torch.promote_types(backbone.dtype, torch.float32)
        self.score_head = nn.Linear(hidden_size, 1, dtype=dtype)
        with torch.no_grad():
            random = torch.Generator().manual_seed(seed)
            deviation = getattr(backbone.config, "initializer_range", 0.02)
            self.score_head.weight.normal_(0.0, deviation, generator=random)
            self.score_head.bias.zero_()
        # The head is drawn on the CPU, so that the seed gives the same one on every device.
        self.score_head.to(backbone.device)

    def forward(self, batch: MicroBatch) -> Float[Tensor, " row"]:
        """One score a row."""
        last_hidden = batch.last(self.backbone(**batch.arguments()).last_hidden_state)
        # Outside autocast: scores in half precision would tie.
        with torch.autocast(last_hidden.device.type, enabled=False):
            scores: Tensor = self.score_head(last_hidden.to(self.score_head.weight.dtype)).squeeze(-1)
        return scores


def read_scores(model: nn.Module, batch: MicroBatch) -> Scores:
    """Scores of a micro-batch, for the engine.

    Equal responses to a prompt share one score to the last bit: rounding may differ from row to row of a
    batch, and in a group of copies it would become an advantage.
    """
    return Scores(model(batch).index_select(0, batch.same_as))


def new_discriminator(
    name: str,
    dtype: str,
    seed: int,
    shared: SharedBase | None = None,
    device: torch.device | None = None,
) -> tuple[Discriminator, Renderer]:
    """A discriminator with the weights of a language model and a new head drawn from the seed.

    Args:
        name: a folder, or a Hugging Face name.
        dtype: torch's name of the weights' type.
        seed: decides the head.
        shared: a frozen model that the discriminator is to be an adapter of; `name` is then its own name or
            the folder of a saved adapter.
        device: where to put it. Default: the GPU if there is one.

    Raises:
        UserError: if the model cannot be opened.
    """
    backbone, renderer = _load_backbone(name, dtype, shared, device)
    return Discriminator(backbone, seed).eval(), renderer


def save_discriminator(
    model: Discriminator,
    renderer: Renderer,
    folder: Path,
    probe: Sequence[Group],
    *,
    state: Mapping[str, Tensor] | None = None,
    scores: Scores | None = None,
    scored_in: str | None = None,
) -> None:
    """Write a Hugging Face folder with the head beside it, and what the check at load needs.

    Args:
        model: what is saved.
        renderer: its renderer, which is asked for no tokens: a tokenizer keeps the options of a call, so that
            a thread that writes would change those that another one trains on.
        folder: where to.
        probe: groups whose teacher responses are stored with their scores, in the tokens of their texts.
        state: the tensors by name, where the model has only shards of them or has moved on.
        scores: the scores of the probe, where the model cannot be asked any more.
        scored_in: the type that those were computed in.
    """
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "score_head": {}}
    for name, value in (model.state_dict() if state is None else state).items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value.contiguous()
    model.backbone.save_pretrained(folder, state_dict=parts["backbone"])
    renderer.tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=sorted(renderer.end_ids)).save_pretrained(folder)
    save_file(parts["score_head"], folder / _HEAD_FILE)
    pairs = [(group, branch) for group in probe for branch in group.teachers]
    texts: list[dict[str, Any]] = [
        {"prompt_tokens": group.prompt_tokens, "response": branch.text, "finished": branch.finished}
        for group, branch in pairs
    ]
    tokens = [branch.tokens for _, branch in pairs]
    scores = scores or _score(model, _probe_groups(texts, tokens))
    dtype = scored_in or _dtype_name(model)
    stored = {"dtype": dtype, "texts": texts, "tokens": tokens, "scores": scores.values.tolist()}
    (folder / _PROBE_FILE).write_text(json.dumps(stored), encoding="utf-8")


def load_discriminator(
    folder: str | Path,
    dtype: str = "float32",
    shared: SharedBase | None = None,
    device: torch.device | None = None,
) -> tuple[Discriminator, Renderer]:
    """Open a saved discriminator and score its probe again.

    Args:
        folder: where it was saved.
        dtype: torch's name of the weights' type.
        shared: the frozen model that the saved one is an adapter of, to train it on as one; without it
            an adapter is merged into its model.
        device: where to put it. Default: the GPU if there is one.

    Raises:
        CheckpointError: if the head is missing or broken, or a probe text scores otherwise than it did.
        UserError: if the model cannot be opened.
    """
    model, renderer, probe = load_unchecked(folder, dtype, shared, device)
    probe.check(model, renderer)
    return model, renderer


def load_unchecked(
    folder: str | Path, dtype: str, shared: SharedBase | None, device: torch.device | None
) -> tuple[Discriminator, Renderer, Probe]:
    """The same before its probe is scored, which is left to the caller.

    Whoever shards the model can have the shards score.

    Raises:
        CheckpointError: if the head or the probe is missing or broken.
        UserError: if the model cannot be opened.
    """
    folder = Path(folder)
    if not (folder / _HEAD_FILE).exists():
        raise CheckpointError(
            f"{folder}: no {_HEAD_FILE}, so this is no discriminator; give the folder of one"
        )
    backbone, renderer = _load_backbone(str(folder), dtype, shared, device)
    model = Discriminator(backbone, seed=0).eval()
    try:
        model.score_head.load_state_dict(load_file(folder / _HEAD_FILE))
        stored = parse_object((folder / _PROBE_FILE).read_bytes())
        groups = _probe_groups(stored["texts"], stored["tokens"])
        probe = Probe(folder, groups, tuple(map(float, stored["scores"])), stored["dtype"])
        _rounding(probe.scored_in)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as failure:
        reason = (str(failure).strip() or repr(failure)).splitlines()[0]
        raise CheckpointError(f"{folder}: {_HEAD_FILE} or {_PROBE_FILE} is broken: {reason}") from failure
    return model, renderer, probe


def _load_backbone(
    name: str, dtype: str, shared: SharedBase | None, device: torch.device | None
) -> tuple[PreTrainedModel, Renderer]:
    if shared is not None:
        return shared.decoder(name), shared.renderer
    backbone, tokenizer = open_pretrained(AutoModel, name, dtype, device)
    open_attention(backbone)
    return backbone, load_renderer(tokenizer, _generation_config(name, backbone))


def _generation_config(name: str, backbone: PreTrainedModel) -> GenerationConfig:
    # `AutoModel` leaves it out, and the end-of-turn ids may be named there alone.
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:
        return GenerationConfig.from_model_config(backbone.config)


def _probe_groups(texts: list[dict[str, Any]], tokens: Sequence[Sequence[int]]) -> tuple[Group, ...]:
    return tuple(
        Group(
            "probe",
            tuple(text["prompt_tokens"]),
            teachers=(Branch(tuple(own), text["finished"], text["response"]),),
        )
        for text, own in zip(texts, tokens, strict=True)
    )


def _score(model: Discriminator, groups: Sequence[Group]) -> Scores:
    device = model.score_head.weight.device
    with torch.no_grad():
        # One at a time: the score must not hang on what else is in the batch.
        scores = [model(pack([group], [0], device)) for group in groups]
    return Scores(torch.cat(scores) if scores else torch.empty(0))


def _dtype_name(model: Discriminator) -> str:
    # An adapter may be of a finer type than what it adapts.
    return str(model.backbone.get_input_embeddings().weight.dtype).removeprefix("torch.")


def _rounding(*dtypes: str) -> float:
    """How far, relative to the score, another machine or type of weights may move it by rounding alone."""
    return max(1e-3, *(16 * torch.finfo(vars(torch)[dtype]).eps for dtype in dtypes))
