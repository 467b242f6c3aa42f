"""The student to sample from in half precision, where it is trained under bfloat16 autocast.

Sampling reads all weights for every token, so half the bytes are nearly half the time; and its products are
rounded as the trainer's are.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class HalfCopy:
    """A model with bfloat16 copies of the weights of its linear layers; all else is the student's own.

    Args:
        student: a model in single precision, in one unsharded process.

    Attributes:
        model: to be called under bfloat16 autocast.
    """

    def __init__(self, student: PreTrainedModel):
        self.model: PreTrainedModel = copy.deepcopy(student, {id(own): own for own in student.parameters()})
        self._copies: list[tuple[Tensor, Tensor]] = []
        for layer in self.model.modules():
            if isinstance(layer, nn.Linear):
                own = layer.weight
                layer.weight = nn.Parameter(own.detach().to(torch.bfloat16), requires_grad=False)
                self._copies.append((layer.weight, own))

    @torch.no_grad()
    def update(self) -> None:
        """Take over the student's weights as they are now."""
        for half, own in self._copies:
            half.copy_(own)
