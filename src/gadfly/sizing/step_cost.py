"""What a gad step computes, moves between GPUs and reads, and which of these takes longest.

An estimate from data sheets, measured on no machine.
"""

import math
from dataclasses import dataclass

from gadfly.sizing.memory_plan import ADAPTER_BYTES, Workload
from gadfly.sizing.model_shape import ModelShape

GPU_FLOPS = 989e12
"""Products a second of an NVIDIA H100 SXM in bfloat16, dense, by its data sheet."""
UTILISATION = 0.4
"""Share of it that training reaches: an assumption."""
MEMORY_BANDWIDTH = 3.35e12
"""Bytes a second that an H100 SXM reads from its memory, by its data sheet."""
LINK_BANDWIDTH = 450e9
"""Bytes a second that a GPU receives over NVLink in a node, by the data sheet (900 GB/s both ways)."""
NODE_BANDWIDTH = 50e9
"""Bytes a second that a GPU receives from other nodes: 400 Gbit/s InfiniBand, one adapter a GPU."""
NODE_GPUS = 8
"""GPUs of a node."""

# Multiplications and additions a parameter and token: forward, and backward to the inputs and to the weights.
_FORWARD, _BACKWARD_INPUTS, _BACKWARD_WEIGHTS = 2, 2, 2


@dataclass(frozen=True)
class StepCost:
    """Of one step.

    Attributes:
        trained_tokens: tokens in forward and backward passes of both roles, each prompt once a group.
        read_tokens: tokens in the reference's forward pass.
        sampled_tokens: tokens drawn.
        operations: a GPU's multiplications and additions in matrix products; attention's own are left out.
        moved_bytes: what a GPU receives from others.
        sampling_reads: bytes of weights, keys and values that a GPU reads to sample.
        bandwidth: of the slowest link, in bytes a second.
    """

    trained_tokens: int
    read_tokens: int
    sampled_tokens: int
    operations: float
    moved_bytes: float
    sampling_reads: float
    bandwidth: float

    @property
    def seconds(self) -> dict[str, float]:
        """How long each would take by itself."""
        return {
            "arithmetic": self.operations / (GPU_FLOPS * UTILISATION),
            "network": self.moved_bytes / self.bandwidth,
            "memory reads while sampling": self.sampling_reads / MEMORY_BANDWIDTH,
        }

    @property
    def saturates_first(self) -> str:
        """What takes longest."""
        seconds = self.seconds
        return max(seconds, key=lambda what: seconds[what])

    @property
    def network_share(self) -> float:
        """Time on the network by time in arithmetic: above 1, GPUs wait for each other."""
        return self.seconds["network"] / self.seconds["arithmetic"]


def step_cost(work: Workload) -> StepCost:
    """The cost of a step at full lengths, groups dealt evenly."""
    discriminator_tokens = work.batch_prompts * work.group_tokens(work.group_size + work.teachers)
    own = work.batch_prompts * work.group_tokens(work.group_size)
    read = own if work.has_reference else 0
    sampled = work.batch_prompts * work.group_size * work.response_tokens
    prompts = work.batch_prompts * work.prompt_tokens
    student, discriminator = work.student.parameters, work.discriminator.decoder_parameters
    trained = _FORWARD + _BACKWARD_INPUTS + (0 if work.lora_rank else _BACKWARD_WEIGHTS)
    trained += _FORWARD if work.is_checkpointed else 0
    operations = trained * (discriminator_tokens * discriminator + own * student) + _FORWARD * read * student
    if work.sampler != "servers":
        operations += _FORWARD * (sampled + prompts) * student
    return StepCost(
        trained_tokens=discriminator_tokens + own,
        read_tokens=read,
        sampled_tokens=sampled,
        operations=operations / work.gpus,
        moved_bytes=_moved_bytes(work),
        sampling_reads=_sampling_reads(work),
        bandwidth=LINK_BANDWIDTH if work.gpus <= NODE_GPUS else NODE_BANDWIDTH,
    )


def _moved_bytes(work: Workload) -> float:
    """All-gathers in both passes, reduce-scatters of gradients, and the hand-over of weights."""
    if work.gpus == 1:
        return 0.0
    parameters = work.student.parameters
    moved = _passes(work, work.group_size + work.teachers) * _trained_pass_bytes(work, work.discriminator)
    own = _passes(work, work.group_size)
    moved += own * _trained_pass_bytes(work, work.student)
    if work.has_reference:
        moved += own * parameters * work.passes.product_bytes
    moved += work.trained(parameters, work.student) * work.trained_bytes
    # A GPU has its own share of everything already.
    return moved * (work.gpus - 1) / work.gpus


def _passes(work: Workload, branches: int) -> int:
    """Micro-batches of a GPU in a step."""
    packed = work.packed(branches)
    return math.ceil(work.batch_prompts / packed.groups / work.gpus)


def _trained_pass_bytes(work: Workload, shape: ModelShape) -> float:
    """Layers gathered twice and the rest once; gradients given away in the type they are summed in."""
    layers = shape.layers * shape.layer_parameters
    gathered = (2 * layers + shape.root_parameters) * work.passes.product_bytes
    summed = ADAPTER_BYTES if work.lora_rank or work.is_autocast else work.weight_bytes
    return float(gathered + work.trained(shape.parameters, shape) * summed)


def _sampling_reads(work: Workload) -> float:
    """Of a GPU's rounds of responses decoded at once: all weights a token, and on average half the cache."""
    if work.sampler == "servers":
        return 0.0
    responses = math.ceil(work.batch_prompts * work.group_size / work.gpus)
    rounds = math.ceil(responses / work.parallel_responses)
    at_once = min(responses, work.parallel_responses)
    shape = work.student
    token = 2 * shape.layers * shape.key_heads * shape.head_channels * work.weight_bytes
    cache = at_once * (work.prompt_tokens / work.group_size + work.response_tokens / 2) * token
    return rounds * work.response_tokens * (shape.parameters * work.weight_bytes + cache)
