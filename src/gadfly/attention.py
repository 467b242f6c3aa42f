"""A place in every model for attention of our own, through transformers' attention interface.

Everything in a transformer but attention works on tokens one by one. A caller that passes `attends` gets to
say who sees whom, over a sequence of any make-up; a model called without it attends as it always did.

Axes: `token` the sequence, `head`, `key_head` (fewer, where heads share keys), `channel`.
"""

import logging
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

logger = logging.getLogger(__name__)

_NAME = "gadfly"


@runtime_checkable
class Attends(Protocol):
    """Attention over one sequence, in one layer of a model."""

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
        """The attended values.

        Args:
            query: one a token; positions are in it already.
            key: of the same tokens.
            value: of the same tokens.
            layer: number of the layer, from 0.
            scaling: factor on the scores; None for one over the root of the channels.
            window: a key is seen by the queries 0 to `window - 1` tokens after it; None without a limit.
        """
        ...


def sequence_arguments(
    input_ids: Int[Tensor, " token"], position_ids: Int[Tensor, " token"], attends: Attends
) -> dict[str, Any]:
    """What a model that takes `attends` is called with; its outputs have one row, `[1, token, ...]`."""
    return {
        "input_ids": input_ids[None],
        "position_ids": position_ids[None],
        # A mask of four axes is handed on as it is: `attends` says who sees whom.
        "attention_mask": torch.zeros(1, 1, 1, 1, device=input_ids.device),
        "use_cache": False,
        "attends": attends,
    }


def open_attention(model: PreTrainedModel) -> bool:
    """Give a model the place for attention of our own, if that changes nothing in what it computes.

    Without `attends` in the call it goes on to attend by torch's own SDPA.

    Returns:
        Whether it has the place now. A model that does not go through the interface once a layer, or has more
        in its attention than the interface says (soft caps, sinks, chunks), is left as it was.
    """
    # For those that are left with attention of their own.
    AttentionMaskInterface.register("eager", _eager_mask)
    if model._supports_attention_backend and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_NAME, _attention)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        model.set_attn_implementation(_NAME)
        if not _attends_as_before(model):
            model.set_attn_implementation("sdpa")
            _tell_rows(type(model).__name__)
    return takes_attention(model)


@cache
def _tell_rows(kind: str) -> None:
    """Once for each kind of model: it goes by transformers' interface, and yet not only by that."""
    logger.info("%s: prompts are computed once an answer, in padded rows, for its attention is its own", kind)


def takes_attention(model: nn.Module) -> bool:
    """Whether `open_attention` has found that a model can be called with `attends`."""
    config = getattr(model, "config", None)
    return getattr(config, "_attn_implementation", None) == _NAME


def _eager_mask(*, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    """The mask of transformers, but finite in single precision too, in which models of any precision take
    their softmax: rows of padding alone would be no numbers.
    """
    return eager_mask(dtype=torch.float32 if dtype == torch.float64 else dtype, **kwargs)


@torch.no_grad()
def _attends_as_before(model: PreTrainedModel) -> bool:
    """Whether two texts in one sequence come out as they do one by one."""
    lengths = [5, 3]
    ids = torch.arange(sum(lengths), device=model.device) % model.config.get_text_config().vocab_size
    positions = torch.cat([torch.arange(length, device=model.device) for length in lengths])
    side_by_side = _SideBySide(lengths)
    try:
        together = model(**sequence_arguments(ids, positions, side_by_side))[0][0]
        alone = [model(input_ids=part[None], use_cache=False)[0][0] for part in ids.split(lengths)]
    except (AttributeError, TypeError, ValueError, RuntimeError):
        # A model that is built otherwise refuses the call in its own way, and `_attention` what it cannot do.
        return False
    # The probe is shorter than most windows: what is seen of longer texts is as the config says, or unknown.
    if side_by_side.asked != _layers_and_windows(model.config.get_text_config()):
        return False
    # A model whose weights are no numbers is for the loss to refuse.
    scale = float(together.abs().nan_to_num().max())
    # In half precision two ways of adding up differ by more than the last bit.
    tolerance = max(1e-3, 4 * torch.finfo(together.dtype).eps)
    return torch.allclose(together, torch.cat(alone), rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _layers_and_windows(config: PreTrainedConfig) -> list[tuple[int, int | None]] | None:
    """The layers of a model, each with its window, as transformers' own masks have them.

    None if some layer is of another kind: its attention is in chunks, or it is no attention.
    """
    window = getattr(config, "sliding_window", None)
    default = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or [default] * config.num_hidden_layers
    windows = {"full_attention": None, "sliding_attention": window}
    if not windows.keys() >= set(kinds):
        return None
    return [(layer, windows[kind]) for layer, kind in enumerate(kinds)]


class _SideBySide:
    """Texts one after the other that do not see each other: what the probe knows the answer to.

    Attributes:
        asked: the layer and the window of every call, in order.
    """

    def __init__(self, lengths: list[int]):
        self._lengths = lengths
        self.asked: list[tuple[int, int | None]] = []

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        self.asked.append((layer, window))
        outputs = []
        texts = (part.split(self._lengths) for part in (query, key, value))
        for q, k, v in zip(*texts, strict=True):
            places = torch.arange(len(q), device=query.device)
            mask = sees((places[:, None] - places)[None], window)
            outputs.append(attend_tables(q[None], k[None], v[None], mask, scaling)[0])
        return torch.cat(outputs)


def sees(back: Int[Tensor, "*any"], window: int | None) -> Tensor:
    """Whether a query sees a key that is so many tokens before it; negative: after it, or no key at all."""
    return back >= 0 if window is None else (back >= 0) & (back < window)


def attend_tables(
    query: Float[Tensor, "row place head channel"],
    key: Float[Tensor, "row key_place key_head channel"],
    value: Float[Tensor, "row key_place key_head value_channel"],
    mask: Tensor | None,
    scaling: float | None,
) -> Float[Tensor, "row place head value_channel"]:
    """Scaled dot-product attention over padded tables.

    `mask` is `[row or 1, place, key_place]`, true where a query sees a key; None: causal, places aligned.
    """
    output = nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if mask is None else mask[:, None],
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return output.transpose(1, 2)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    attends: Attends | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: `[1, head, token, channel]` in, `[1, token, head, channel]` out."""
    if attends is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    more = {"softcap", "s_aux", "position_bias", "sinks"} & {
        name for name, given in kwargs.items() if given is not None
    }
    if more:
        # `open_attention` asks before any training, and leaves such a model its own attention.
        raise NotImplementedError(f"{type(module).__name__}: attention with {', '.join(sorted(more))}")
    device = query.device.type
    parts = [part[0].transpose(0, 1) for part in (query, key, value)]
    if torch.is_autocast_enabled(device):
        # On a CPU the backward pass of attention is slower in half precision.
        kind = torch.float32 if device == "cpu" else torch.get_autocast_dtype(device)
        parts = [part.to(kind) for part in parts]
    with torch.autocast(device, enabled=False):
        sequence = attends(
            *parts,
            layer=module.layer_idx,  # type: ignore[arg-type]
            scaling=kwargs.get("scaling"),
            window=kwargs.get("sliding_window"),
        )
    return sequence[None], None
