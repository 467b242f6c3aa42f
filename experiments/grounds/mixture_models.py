"""The players of the mixture ground: a student that can say one bump only, a discriminator that is a table.

Importing this module registers both with transformers.
"""

from typing import Any, no_type_check

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

# AdamW moves every parameter by about the learning rate; the mean has farther to go than the width.
_MEAN_SCALE = 10.0


# The tests check types at run time, and would refuse all but the fields declared here.
@no_type_check
class OneGaussianConfig(PretrainedConfig):
    """How many classes there are; they are the first tokens of the vocabulary."""

    model_type = "one-gaussian"

    classes: int = 64
    vocab_size: int = 70
    hidden_size: int = 1
    num_hidden_layers: int = 0
    initial_mean: float = 0.5
    """As a share of the classes."""
    initial_deviation: float = 0.25


class OneGaussianForCausalLM(PreTrainedModel, GenerationMixin):
    """Says a class, drawn from a Gaussian on the whole numbers; the prompt does not matter.

    Two parameters: `logits[c] = -(c - mean)^2 / (2 deviation^2)`.
    """

    config_class = OneGaussianConfig
    main_input_name = "input_ids"

    def __init__(self, config: OneGaussianConfig):
        super().__init__(config)
        self.mean = nn.Parameter(torch.tensor([config.initial_mean * config.classes / _MEAN_SCALE]))
        self.log_deviation = nn.Parameter(torch.tensor([config.initial_deviation * config.classes]).log())
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Everything is drawn above."""

    def class_logits(self) -> Tensor:
        """[class], not normalised."""
        places = torch.arange(self.config.classes, device=self.mean.device)
        return -((places - _MEAN_SCALE * self.mean) ** 2) / (2 * (2 * self.log_deviation).exp())

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **_: Any) -> CausalLMOutputWithPast:
        """The same logits at every place; all but the classes are impossible."""
        logits = self.mean.new_full((self.config.vocab_size,), -1e4)
        logits = torch.cat([self.class_logits(), logits[self.config.classes :]])
        length = min(logits_to_keep or input_ids.shape[1], input_ids.shape[1])
        return CausalLMOutputWithPast(logits=logits.expand(input_ids.shape[0], length, -1))  # type: ignore[arg-type]


@no_type_check
class TableConfig(PretrainedConfig):
    """A state for each token."""

    model_type = "table"

    vocab_size: int = 70
    hidden_size: int = 70
    num_hidden_layers: int = 0
    initializer_range: float = 0.02


class TableModel(PreTrainedModel):
    """The state of a place is its token, so that a linear head on it is a table of scores."""

    config_class = TableConfig

    def __init__(self, config: TableConfig):
        super().__init__(config)
        # Not learnt, but a weight: a model without any has no type and no device.
        self.tokens = nn.Parameter(torch.eye(config.vocab_size, config.hidden_size), requires_grad=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Everything is set above."""

    def get_input_embeddings(self) -> nn.Module:
        """For its type alone."""
        return nn.Embedding(1, 1).to(self.tokens.dtype)

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutputWithPast:
        """[row, place, token]."""
        return BaseModelOutputWithPast(last_hidden_state=self.tokens[input_ids])  # type: ignore[arg-type]


AutoConfig.register(OneGaussianConfig.model_type, OneGaussianConfig)
AutoModelForCausalLM.register(OneGaussianConfig, OneGaussianForCausalLM)
AutoConfig.register(TableConfig.model_type, TableConfig)
AutoModel.register(TableConfig, TableModel)
