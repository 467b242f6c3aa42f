"""A role's model on many processes: its weights, gradients and optimiser in shards (PyTorch's FSDP2).

On one process nothing here is used but `Reading` and `recompute_activations`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from gadfly.models import default_device
from gadfly.packing import MicroBatch


class Reading(nn.Module):
    """A model and one way to read it, in one forward pass.

    FSDP brings the weights together while a module's `forward` runs. Reading log-probabilities takes the
    decoder and the head by themselves, so it has to happen inside the forward pass of a module around both.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, read: Callable[[nn.Module, MicroBatch], Any], batch: MicroBatch
    ) -> tuple[type[Any], dict[str, Tensor]]:
        """The kind of what `read` gives, and its fields: FSDP finds no tensors in a dataclass."""
        output = read(self.model, batch)
        return type(output), {field.name: getattr(output, field.name) for field in fields(output)}


def shard(
    reading: Reading,
    *,
    in_half_precision: bool,
    shared: Mapping[str, Tensor] | None = None,
) -> None:
    """Keep a share of every weight in each process; they come together layer by layer while they are used.

    Gradients are summed over the processes, not averaged: losses are normalised over the whole batch.

    Args:
        reading: what to shard, on any device; every process has the same weights. The shards go to the GPU if
            there is one.
        in_half_precision: weights of layers come together, and are computed with, in bfloat16. A score head
            does not: scores in half precision would tie.
        shared: frozen weights by name, of another role that is sharded; its shards become this model's too.
    """
    mesh = init_device_mesh(default_device().type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    wrap = partial(fully_shard, mesh=mesh, **({"mp_policy": policy} if in_half_precision else {}))
    for layer in decoder_layers(reading.model):
        wrap(layer)
    if isinstance(head := getattr(reading.model, "score_head", None), nn.Linear):
        fully_shard(head, mesh=mesh)
    # What is in no layer, such as the embedding, stays as precise as on one process, and so does the stream.
    fully_shard(reading, mesh=mesh)
    for module in reading.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Gloo has no other.
            module.set_force_sum_reduction_for_comms(True)
    if shared:
        reading.model.load_state_dict(shared, strict=False, assign=True)


def frozen_weights(model: nn.Module) -> dict[str, Tensor]:
    """What is not trained, by name: of a sharded model, its shards."""
    return {
        name: weight
        for name, weight in model.named_parameters(remove_duplicate=False)
        if not weight.requires_grad
    }


def reshard(reading: Reading) -> None:
    """Let go of the weights that a forward pass left together: those outside the layers."""
    if isinstance(reading, FSDPModule):
        reading.reshard()


def recompute_activations(reading: Reading) -> None:
    """Keep no activations inside a decoder layer for the backward pass, but compute them again there."""
    for layer in decoder_layers(reading.model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a transformer, by transformers' own note of which modules must not be split."""
    names = {
        name
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        for name in module._no_split_modules or ()
    }
    yield from (module for module in model.modules() if type(module).__name__ in names)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be in shards; every process has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
