"""The student to sample from, with copies of its linear layers' weights that are quick to decode with.

Decoding reads all weights for every token of a few rows. Half precision is half the bytes, rounded as a
trainer under bfloat16 autocast rounds. On a CPU, weights laid out in the order that oneDNN reads them in are
quicker to multiply with, in either precision: a plain matrix product lays them out anew at every call.
"""

import copy
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Weights that the processor's caches hold gain nothing.
_WORTH_PACKING_BYTES = 2**26
# Rows are filled up to a multiple of it, and of an eighth of the power of two below them.
_ROWS = 8


def packing_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """That of copies which their layout alone makes quicker, the model's own; None where it does not pay."""
    weights = [layer.weight for layer in model.modules() if _is_copied(layer, model.dtype)]
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    return model.dtype if size >= _WORTH_PACKING_BYTES and _can_pack(weights[0], model.dtype) else None


class DecodingCopy:
    """A model with copies of the weights of its linear layers; all else is the student's own.

    Layers that are not in the student's precision, or are patched, by hooks or otherwise, are not copied.

    Args:
        student: a model in one unsharded process.
        dtype: of the copies. Where it is not the student's, call the model under autocast.

    Attributes:
        model: to be called without gradients.
    """

    def __init__(self, student: PreTrainedModel, dtype: torch.dtype):
        self.model: PreTrainedModel = copy.deepcopy(student, {id(own): own for own in student.parameters()})
        self._copies: dict[nn.Linear, _CopiedLinear] = {}
        # A layer may have more than one name.
        for name, layer in list(self.model.named_modules(remove_duplicate=False)):
            if _is_copied(layer, student.dtype):
                self.model.set_submodule(name, self._copies.setdefault(layer, _CopiedLinear(layer, dtype)))

    def update(self) -> None:
        """Take over the student's weights as they are when the model is called next."""
        for copied in self._copies.values():
            copied.forget()


class _CopiedLinear(nn.Module):
    """A linear layer that computes with a copy of its weight; `weight` itself is the student's own."""

    def __init__(self, own: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.weight, self.bias = own.weight, own.bias
        self._dtype = dtype
        self._is_packed = _can_pack(own.weight, dtype)
        self._copy: Tensor | None = None

    def forget(self) -> None:
        # Many updates may go by, as in supervised stages, before there is something to sample.
        self._copy = None

    def forward(self, states: Tensor) -> Tensor:
        is_rounded = self._dtype != self.weight.dtype
        if is_rounded and not torch.is_autocast_enabled(states.device.type):
            # The model does this part in full precision, as the trainer does.
            return nn.functional.linear(states, self.weight, self.bias)
        if self._copy is None:
            weight = self.weight.detach().to(self._dtype)
            self._copy = torch.ops.mkldnn._reorder_linear_weight(weight) if self._is_packed else weight
        if not self._is_packed:
            return nn.functional.linear(states, self._copy, self.bias)
        bias = None if self.bias is None else self.bias.to(self._dtype)
        flat = states.to(self._dtype).reshape(-1, states.shape[-1])
        # oneDNN keeps what it makes for a number of rows, half a megabyte for each number and layer shape.
        rows = len(flat)
        flat = nn.functional.pad(flat, (0, 0, 0, -rows % max(_ROWS, 2 ** rows.bit_length() // 16)))
        product: Tensor = torch.ops.mkldnn._linear_pointwise(flat, self._copy, bias, "none", [], "")
        return product[:rows].view(*states.shape[:-1], product.shape[-1])


def _is_copied(layer: nn.Module, dtype: torch.dtype) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer and nothing else: what derives from one may compute something else."""
    has_hooks = bool(layer._forward_hooks or layer._forward_pre_hooks)
    is_patched = has_hooks or "forward" in vars(layer)
    return type(layer) is nn.Linear and layer.weight.dtype == dtype and not is_patched


def _can_pack(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch was built with oneDNN's linear layer, which it compiles models for CPUs with."""
    return (
        weight.device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        # Processors without the instructions refuse it.
        and (dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
