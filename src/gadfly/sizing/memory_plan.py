"""How much memory a process of a gad step takes, by formula: before a model is loaded or a GPU is rented.

Parameters, gradients and AdamW's moments of every role are sharded over all processes, layer by layer
gathered and given back; on more than one process each also holds a whole copy of the student to sample from.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from gadfly.sizing.activations import Packed, Passes, backward_bytes, head_bytes, kept_bytes
from gadfly.sizing.model_shape import ModelShape

ADAPTER_BYTES = 4
"""Of a number of an adapter, which is trained in single precision."""
USABLE_SHARE = 0.9
"""Of a GPU's memory. The rest is for CUDA, NCCL's buffers and fragments: an assumption, not a measurement."""

# What vLLM may take of a GPU for keys and values, and the tokens of a block (see `samplers/vllm.py`).
_VLLM_SHARE, _VLLM_BLOCK = 0.2, 32
# AdamW's running mean and running square.
_MOMENTS = 2
# A layer at work, and the next one, which is gathered meanwhile.
_LAYERS_IN_FLIGHT = 2
# Copies of so many bytes are packed on a CPU (`samplers/decoding_copy.py`).
_PACKED_FROM = 2**26
# Drawing a token: single-precision log-softmax, and in double precision its exponential and their sums.
_DRAW_BYTES = 4 + 8 + 8

# Of a number in half and in single precision, and of one in which processes sum gradients under autocast.
_HALF, _SINGLE, _SUM = 2, 4, 4

Phase = Literal["sampling", "discriminator's update", "student's update"]


@dataclass(frozen=True)
class Workload:
    """What is trained, how, and on how much.

    Attributes:
        student: its shape; the reference's too.
        discriminator: that of the model below its score head.
        gpus: processes.
        gpu_memory: of one, in bytes.
        weight_bytes: of a number of the weights, those of a frozen base included.
        lora_rank: 0 where every weight is trained.
        is_autocast: whether products are in bfloat16.
        is_checkpointed: whether activations are computed again, one layer at a time.
        micro_batch_tokens: in one pass; a group that is longer is one of its own.
        batch_prompts: P.
        group_size: G.
        teachers: K, responses of the teacher to a prompt.
        prompt_tokens: the cap, and what is planned with.
        response_tokens: the same for responses.
        parallel_responses: decoded at once.
        has_reference: whether there is a KL term.
        sampler: which one.
        is_flex: whether attention is FlexAttention, as on a GPU.
        saves_in_background: whether checkpoints are written from a copy while training goes on.
    """

    student: ModelShape
    discriminator: ModelShape
    gpus: int = 1
    gpu_memory: float = 80e9
    weight_bytes: int = 4
    lora_rank: int = 0
    is_autocast: bool = False
    is_checkpointed: bool = False
    micro_batch_tokens: int = 16384
    batch_prompts: int = 256
    group_size: int = 8
    teachers: int = 1
    prompt_tokens: int = 2048
    response_tokens: int = 1536
    parallel_responses: int = 256
    has_reference: bool = True
    sampler: Literal["local", "vllm", "servers"] = "local"
    is_flex: bool = True
    saves_in_background: bool = False

    @property
    def passes(self) -> Passes:
        """How forward and backward passes are made."""
        return Passes(
            _HALF if self.is_autocast and self.gpus > 1 else self.weight_bytes,
            lora_rank=self.lora_rank,
            is_autocast=self.is_autocast,
            is_checkpointed=self.is_checkpointed,
            is_sharded=self.gpus > 1,
            is_flex=self.is_flex,
        )

    def group_tokens(self, branches: int) -> int:
        """Tokens of a group with so many responses, each at its cap."""
        return self.prompt_tokens + branches * self.response_tokens

    def packed(self, branches: int) -> Packed:
        """The fullest micro-batch: up to the budget, or one group that is over it."""
        tokens = self.group_tokens(branches)
        groups = max(1.0, self.micro_batch_tokens / tokens)
        return Packed(groups, self.prompt_tokens, branches, self.response_tokens)

    def trained(self, parameters: int, shape: ModelShape) -> int:
        """Numbers that are trained of a model with so many."""
        return shape.adapter_parameters(self.lora_rank) if self.lora_rank else parameters

    @property
    def trained_bytes(self) -> int:
        """Of a number that is trained."""
        return ADAPTER_BYTES if self.lora_rank else self.weight_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes a process, by what they are for.

    Attributes:
        lasting: what is there all the time.
        sampling: what there is besides while the student is sampled from.
        discriminator: the same in the discriminator's update.
        student: the same in the student's, which comes before either gradient is used.
    """

    lasting: dict[str, float] = field(default_factory=dict)
    sampling: dict[str, float] = field(default_factory=dict)
    discriminator: dict[str, float] = field(default_factory=dict)
    student: dict[str, float] = field(default_factory=dict)

    @property
    def phases(self) -> dict[Phase, float]:
        """Bytes alive at most in each part of a step."""
        always = sum(self.lasting.values())
        return {
            "sampling": always + sum(self.sampling.values()),
            "discriminator's update": always + sum(self.discriminator.values()),
            "student's update": always + sum(self.student.values()),
        }

    @property
    def peak(self) -> float:
        """Most bytes alive at once."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> Phase:
        """When that is."""
        phases = self.phases
        return max(phases, key=lambda phase: phases[phase])

    def fits(self, gpu_memory: float) -> bool:
        """Whether a GPU has that much, with room for what is not counted."""
        return self.peak <= USABLE_SHARE * gpu_memory


def plan_memory(work: Workload) -> MemoryPlan:
    """The bytes of a process.

    Example:
        >>> from gadfly.sizing.model_shape import shape_of
        >>> from transformers import Qwen2Config
        >>> shape = shape_of(Qwen2Config(hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        ...     num_attention_heads=14, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True))
        >>> work = Workload(shape, shape, gpus=8, is_autocast=True, is_checkpointed=True)
        >>> f"{plan_memory(work).peak / 1e9:.0f} GB"
        '16 GB'
    """
    student = work.trained(work.student.parameters, work.student)
    # The score head counts for little, as everything of its size does here.
    discriminator = work.trained(work.discriminator.decoder_parameters, work.discriminator)
    student_gradients = student * work.trained_bytes / work.gpus
    discriminator_gradients = discriminator * work.trained_bytes / work.gpus
    lasting = _weights(work, student, discriminator)
    lasting["AdamW's moments"] = _MOMENTS * (student_gradients + discriminator_gradients)
    lasting["copy to sample from"] = _copy_bytes(work, student)
    cache = _cache_bytes(work)
    sampling: dict[str, float] = {}
    if work.sampler == "local":
        draw = work.parallel_responses * work.student.vocabulary * (work.weight_bytes + _DRAW_BYTES)
        sampling = {"keys and values": cache, "logits": float(draw)}
    elif work.sampler == "vllm":
        lasting["keys and values of vLLM"] = cache
    discriminator_batch = work.packed(work.group_size + work.teachers)
    own = work.packed(work.group_size)
    passes = work.passes
    kept = kept_bytes(work.student, own, passes)
    at_head, below = head_bytes(work.student, own, passes), backward_bytes(work.student, own, passes)
    if not work.lora_rank and (work.student.is_tied or work.gpus > 1):
        # The head's gradient waits for that of the embedding, or to be given to the other processes.
        below += work.student.head_parameters * passes.weight_bytes
    return MemoryPlan(
        lasting=lasting,
        sampling=sampling,
        discriminator={
            "discriminator's gradients": discriminator_gradients,
            "gathered": _in_flight_bytes(work, work.discriminator),
            "activations": max(
                kept_bytes(work.discriminator, discriminator_batch, passes)
                + backward_bytes(work.discriminator, discriminator_batch, passes),
                _root_gradient_bytes(work, work.discriminator),
            ),
        },
        student={
            "discriminator's gradients": discriminator_gradients,
            "student's gradients": student_gradients,
            "gathered": _in_flight_bytes(work, work.student),
            "activations": max(kept + max(at_head, below), _root_gradient_bytes(work, work.student)),
        },
    )


def smallest_number_of_gpus(work: Workload, most: int = 1024) -> int | None:
    """The fewest GPUs that a workload fits on; None if it fits on none of up to `most`."""
    for gpus in range(1, most + 1):
        # vLLM within a process is one process's alone.
        sampler = "local" if gpus > 1 and work.sampler == "vllm" else work.sampler
        if plan_memory(replace(work, gpus=gpus, sampler=sampler)).fits(work.gpu_memory):
            return gpus
    return None


def checkpoint_bytes(work: Workload) -> float:
    """Of a checkpoint on disk: weights and AdamW's moments of student and discriminator."""
    return float((1 + _MOMENTS) * _saved_bytes(work))


def background_bytes(work: Workload) -> tuple[float, float]:
    """Of host memory for the copy that a checkpoint is written from in the background.

    Returns:
        That of the first process, which puts the weights together, and that of each other one: its share of
        AdamW's moments.
    """
    moments = _MOMENTS * _saved_bytes(work) / work.gpus
    return _saved_bytes(work) + moments, moments


def _saved_bytes(work: Workload) -> int:
    """Of the weights in a checkpoint: those that are trained."""
    student = work.trained(work.student.parameters, work.student)
    discriminator = work.trained(work.discriminator.decoder_parameters, work.discriminator)
    return (student + discriminator) * work.trained_bytes


def _weights(work: Workload, student: int, discriminator: int) -> dict[str, float]:
    """The roles' weights, sharded; with LoRA one frozen model and an adapter a role."""
    share = work.trained_bytes / work.gpus
    weights: dict[str, float] = {}
    if work.lora_rank:
        weights["frozen model"] = work.student.parameters * work.weight_bytes / work.gpus
    weights["student"] = student * share
    weights["discriminator"] = discriminator * share
    weights["reference"] = student * share if work.has_reference else 0.0
    return weights


def _copy_bytes(work: Workload, trained: int) -> float:
    """The student's whole weights to sample from; the local sampler of one process shares the student's, but
    for copies of its linear layers: in half precision where it is trained under autocast, and large ones on a
    CPU.
    """
    if work.sampler == "servers":
        return 0.0
    if work.gpus == 1 and work.sampler == "local":
        is_half = work.is_autocast and work.weight_bytes > _HALF
        copied = work.student.copied_parameters * (_HALF if is_half else work.weight_bytes)
        # Double precision is not packed.
        is_packed = not work.is_flex and work.weight_bytes <= _SINGLE and copied >= _PACKED_FROM
        return float(copied) if not work.lora_rank and (is_half or is_packed) else 0.0
    adapter = trained * ADAPTER_BYTES if work.lora_rank else 0
    return float(work.student.parameters * work.weight_bytes + adapter)


def _cache_bytes(work: Workload) -> float:
    """Keys and values while sampling, each prompt once a group."""
    token = 2 * work.student.layers * work.student.key_heads * work.student.head_channels * work.weight_bytes
    if work.sampler == "vllm":
        longest = work.prompt_tokens + work.response_tokens + _VLLM_BLOCK
        return min(float((work.parallel_responses + 1) * longest * token), _VLLM_SHARE * work.gpu_memory)
    groups = max(1, work.parallel_responses // work.group_size)
    return float(groups * work.group_tokens(work.group_size) * token)


def _in_flight_bytes(work: Workload, shape: ModelShape) -> float:
    """Whole parameters that a process has gathered, and whole gradients of a layer yet to be shared out."""
    if work.gpus == 1:
        return 0.0
    parameters = _LAYERS_IN_FLIGHT * shape.layer_parameters + shape.root_parameters
    return float(parameters * work.passes.product_bytes + shape.layer_parameters * _gradient_bytes(work))


def _root_gradient_bytes(work: Workload, shape: ModelShape) -> float:
    """Whole gradients of what is in no layer, shared out when all activations are gone."""
    return 0.0 if work.gpus == 1 else float(shape.root_parameters * _gradient_bytes(work))


def _gradient_bytes(work: Workload) -> int:
    """Of a number of a whole gradient, and of the copy that is summed over processes."""
    if work.lora_rank:
        return 0
    return work.passes.product_bytes + (_SUM if work.is_autocast else work.weight_bytes)
