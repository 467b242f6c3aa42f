"""Opens and saves language models as ordinary Hugging Face folders."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gadfly.attention import open_attention
from gadfly.chat_template import Renderer, load_renderer
from gadfly.errors import UserError
from gadfly.hub import why_not_there
from gadfly.lora import adapted_model, merge_adapter


def load_language_model(
    name: str, dtype: str, device: torch.device | None = None
) -> tuple[PreTrainedModel, Renderer]:
    """A causal language model in eval mode, and the renderer for its tokenizer.

    Args:
        name: a folder, or a Hugging Face name. No code of its author is run.
        dtype: torch's name of the weights' type.
        device: where to put it. Default: the GPU if there is one.

    Raises:
        UserError: if it cannot be opened.
    """
    model, tokenizer = open_pretrained(AutoModelForCausalLM, name, dtype, device)
    open_attention(model)
    return model, load_renderer(tokenizer, model.generation_config)


def open_pretrained(
    kind: type[AutoModel] | type[AutoModelForCausalLM],
    name: str,
    dtype: str,
    device: torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of some kind in eval mode, with every weight from the folder, and its tokenizer.

    An adapter gives the model it belongs to with the adapter merged in.

    Raises:
        UserError: if it cannot be opened, or a weight is missing (transformers would draw it at random).
    """
    if (missing := why_not_there(name)) is not None:
        raise UserError(f"model {name!r} cannot be opened: {missing}")
    try:
        if (whole := adapted_model(name)) is not None:
            model, _ = open_pretrained(kind, whole, dtype, device)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            return merge_adapter(model, name).eval(), tokenizer
        opened: Any = kind.from_pretrained(
            name, dtype=getattr(torch, dtype), trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as failure:
        # The parts of a model folder are read by many libraries, each with errors of its own.
        reason = (str(failure).strip() or repr(failure)).splitlines()[0]
        raise UserError(f"model {name!r} cannot be opened: {reason}") from failure
    model, report = opened
    # Nobody reads the pooled output, and encoders that were saved for another task lack its weights.
    if lacking := sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")):
        raise UserError(
            f"model {name!r} lacks {len(lacking)} weights of a {type(model).__name__}, such as {lacking[0]}; "
            f"give the folder of a whole one"
        )
    return model.eval().to(device or default_device()), tokenizer


def default_device() -> torch.device:
    """The GPU if torch has one, else the CPU; everything else follows the model's device."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def save_language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write an ordinary Hugging Face folder: weights, config, generation config, tokenizer.

    `state` holds the weights by name where the model has only shards of them, or has moved on.
    """
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
