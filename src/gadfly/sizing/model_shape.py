"""What a model's config alone says of its size: no weights are read, and none are made."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gadfly.errors import UserError
from gadfly.hub import why_not_there

# Decoders whose layers keep for the backward pass what `activations.py` derives, term by term.
_LLAMA_LIKE = {"llama", "qwen2", "qwen3", "mistral"}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder; those with `parameters` in their name are counts of numbers, not of bytes.

    Attributes:
        kind: transformers' name of the architecture.
        hidden: channels of the residual stream.
        intermediate: channels within the feed-forward part.
        layers: decoder layers.
        heads: query heads.
        key_heads: heads of keys and values.
        head_channels: channels of a head.
        vocabulary: rows of the embedding.
        is_tied: whether the map to logits is the embedding.
        norms_heads: whether queries and keys are normed head by head, as in Qwen3.
        layer_parameters: of one decoder layer.
        root_parameters: of all that is in no layer: embedding, last norm, map to logits unless tied.
        num_linears: linear layers in one decoder layer.
        linear_channels: inputs and outputs of these, added up.
        copied_parameters: weights that the local sampler may copy: of linear layers, the map to logits too.
    """

    kind: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head_channels: int
    vocabulary: int
    is_tied: bool
    norms_heads: bool
    layer_parameters: int
    root_parameters: int
    num_linears: int
    linear_channels: int
    copied_parameters: int

    @property
    def parameters(self) -> int:
        """All of a language model's."""
        return self.layers * self.layer_parameters + self.root_parameters

    @property
    def head_parameters(self) -> int:
        """Those of the map to logits."""
        return self.vocabulary * self.hidden

    @property
    def decoder_parameters(self) -> int:
        """All but a map to logits of its own: what a discriminator has below its score head."""
        return self.parameters - (0 if self.is_tied else self.head_parameters)

    def adapter_parameters(self, rank: int) -> int:
        """Those of a LoRA adapter in every linear layer of the decoder: `rank` times in plus out."""
        return self.layers * rank * self.linear_channels

    @property
    def is_llama_like(self) -> bool:
        """Whether activations are derived for this very architecture, and not for one like it."""
        return self.kind in _LLAMA_LIKE


def read_shape(name: str) -> ModelShape:
    """The shape of a model by its folder or Hugging Face name; only its config is read.

    Raises:
        UserError: if there is no config, or none of a causal language model.
    """
    if (missing := why_not_there(name)) is not None:
        raise UserError(f"model {name!r}: its config cannot be read: {missing}")
    try:
        return shape_of(AutoConfig.from_pretrained(name, trust_remote_code=False))
    except Exception as failure:
        # A config is read by many classes, each with errors of its own.
        reason = (str(failure).strip() or repr(failure)).splitlines()[0]
        raise UserError(
            f"model {name!r}: its config cannot be read: {reason}; give a folder with a config.json"
        ) from failure


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """The shape of the causal language model of a config; its parameters are counted, not allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    layers = _decoder_layers(model)
    in_layers = sum(weight.numel() for weight in layers.parameters())
    linears = [part for part in layers.modules() if isinstance(part, (nn.Linear, Conv1D))]
    # A linear map in a Conv1D lies the other way round; in plus out are the same.
    channels = sum(sum(linear.weight.shape) for linear in linears)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    heads = text.num_attention_heads
    total = sum(weight.numel() for weight in model.parameters())
    return ModelShape(
        kind=config.model_type,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        layers=len(layers),
        heads=heads,
        key_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_channels=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=len(embedding.weight),
        is_tied=head is not None and head.weight is embedding.weight,
        norms_heads=any(name.endswith("q_norm") for name, _ in layers.named_modules()),
        # Layers may differ; what is gathered at a time is about their mean.
        layer_parameters=in_layers // len(layers),
        root_parameters=total - len(layers) * (in_layers // len(layers)),
        num_linears=len(linears) // len(layers),
        linear_channels=channels // len(layers),
        copied_parameters=sum(part.weight.numel() for part in model.modules() if type(part) is nn.Linear),
    )


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of modules that holds most of the model."""
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    return max(lists, key=lambda part: sum(weight.numel() for weight in part.parameters()))
