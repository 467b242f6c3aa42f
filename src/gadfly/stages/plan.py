"""`gadfly plan`: whether a recipe fits on some GPUs, and what would make it fit, by formula."""

import re
from collections.abc import Iterator
from dataclasses import replace

from gadfly.config import Recipe
from gadfly.errors import ConfigError, UserError
from gadfly.sizing.memory_plan import (
    USABLE_SHARE,
    MemoryPlan,
    Workload,
    background_bytes,
    checkpoint_bytes,
    plan_memory,
    smallest_number_of_gpus,
)
from gadfly.sizing.model_shape import read_shape
from gadfly.sizing.step_cost import step_cost

_UNITS = {"": 1, "B": 1, "GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20, "TB": 10**12, "TIB": 2**40}
_TYPES = {"float64": 8, "float32": 4, "bfloat16": 2}
_SUGGESTED_RANK = 64
_LEAST_TOKENS = 1024
_LEAST_PARALLEL = 8
_MOST_ADVICE = 4

Change = tuple[str, Workload]


def plan(recipe: Recipe, gpus: int, gpu_memory: str) -> str:
    """The table of a recipe.

    Args:
        recipe: what is to be trained; neither data nor weights are read.
        gpus: processes, a GPU each.
        gpu_memory: of one, as in `80GB`.

    Raises:
        UserError: if it does not fit, naming what would; or if a model's config or the size cannot be read.
    """
    work = workload(recipe, gpus, parse_size(gpu_memory))
    planned = plan_memory(work)
    if not planned.fits(work.gpu_memory):
        raise UserError(
            f"{recipe.name}: {_bytes(planned.peak)} a GPU in the {planned.peak_phase}, and "
            f"{_bytes(USABLE_SHARE * work.gpu_memory)} of {_bytes(work.gpu_memory)} are counted on; "
            f"{_advice(work, planned)}"
        )
    return _table(work, planned)


def workload(recipe: Recipe, gpus: int, gpu_memory: float) -> Workload:
    """A recipe's gad stage on GPUs, with `auto` settings as they turn out there where vLLM is installed.

    Raises:
        UserError: if the config of a model cannot be read, or the sampler is for one process alone.
    """
    if gpus > 1 and recipe.sampling.backend == "vllm" and not recipe.sampling.servers:
        raise UserError(
            f'sampling.backend = "vllm": one in each of {gpus} processes is not supported; '
            f'start vLLM servers and name them in sampling.servers, or set sampling.backend = "local"'
        )
    student = read_shape(recipe.student.model)
    discriminator = recipe.discriminator.model
    sampling = recipe.sampling
    sampler = sampling.backend
    if sampler == "auto":
        is_for_vllm = gpus == 1 and not recipe.student.lora_rank and recipe.student.dtype != "float64"
        sampler = "vllm" if is_for_vllm else "local"
    return Workload(
        student,
        student if discriminator is None else read_shape(discriminator),
        gpus=gpus,
        gpu_memory=gpu_memory,
        weight_bytes=_TYPES[recipe.student.dtype],
        lora_rank=recipe.student.lora_rank,
        is_autocast=recipe.engine.precision != "float32",
        is_checkpointed=recipe.engine.activation_checkpointing,
        micro_batch_tokens=recipe.engine.micro_batch_tokens,
        batch_prompts=recipe.gad.batch_prompts,
        group_size=recipe.gad.group_size,
        teachers=recipe.teacher.samples_per_prompt if recipe.data.train is None else 1,
        prompt_tokens=sampling.max_prompt_tokens,
        response_tokens=sampling.max_response_tokens,
        parallel_responses=sampling.max_parallel_responses,
        has_reference=recipe.gad.kl_coefficient > 0,
        sampler="servers" if sampling.servers else sampler,
        saves_in_background=recipe.checkpoints.in_background,
    )


def parse_size(text: str) -> float:
    """Bytes of a size.

    Example:
        >>> parse_size("80GB"), parse_size("24 GiB"), parse_size("80e9")
        (80000000000.0, 25769803776.0, 80000000000.0)

    Raises:
        ConfigError: if it is none.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*(?:e\d{1,2})?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    size = float(match[1]) * _UNITS.get(match[2].upper(), 0) if match else 0.0
    if size < 1:
        raise ConfigError(f"--gpu-memory = {text!r}: give a size as in 80GB, 24GiB or 80e9")
    return size


def _table(work: Workload, planned: MemoryPlan) -> str:
    cost = step_cost(work)
    parts = {
        "all the time": planned.lasting,
        "besides, while sampling": planned.sampling,
        "besides, in the discriminator's update": planned.discriminator,
        "besides, in the student's update": planned.student,
    }
    lines = []
    for part, sizes in parts.items():
        rows = [(f"  {name}", size) for name, size in sizes.items() if size]
        lines += [_row(part, sum(sizes.values())), *(_row(*row) for row in rows)] if rows else []
    lines += [
        _row(f"at most, in the {planned.peak_phase}", planned.peak),
        f"fits: of {_bytes(work.gpu_memory)} a GPU, {_bytes(USABLE_SHARE * work.gpu_memory)} are counted on",
        f"GPUs: {work.gpus}; sampler: {work.sampler}; a checkpoint on disk: {_bytes(checkpoint_bytes(work))}",
        f"tokens a step, at full length: {cost.trained_tokens:,} trained on, {cost.read_tokens:,} read by "
        f"the reference, {cost.sampled_tokens:,} sampled",
        f"moved to each GPU a step: {_bytes(cost.moved_bytes)}, which takes {cost.network_share:.2f} of the "
        f"time of the arithmetic",
        f"saturates first: {cost.saturates_first} (estimated from data sheets of H100 GPUs, not measured)",
    ]
    if work.saves_in_background:
        first, other = background_bytes(work)
        others = f", {_bytes(other)} in each other" if work.gpus > 1 else ""
        lines.append(f"host memory for background checkpoints: {_bytes(first)} in the first process{others}")
    if kinds := sorted({s.kind for s in (work.student, work.discriminator) if not s.is_llama_like}):
        lines.append(f"activations of {', '.join(kinds)} are estimated as for a Llama-like model")
    return "\n".join(lines)


def _row(name: str, size: float) -> str:
    return f"{name:<48}{_bytes(size):>12}"


def _advice(work: Workload, planned: MemoryPlan) -> str:
    """Changes that suffice by the formula: one by itself, else two together."""
    enough = [name for name, changed in _changes(work) if _fits(changed)]
    if (gpus := smallest_number_of_gpus(work)) is not None:
        enough.insert(0, f"--gpus {gpus}")
    enough = _mildest(enough) or _pairs(work)
    if enough:
        return f"what suffices: {', or '.join(enough[:_MOST_ADVICE])}"
    most = max((size, name) for name, size in planned.lasting.items())
    return f"no change of these settings suffices ({most[1]} alone: {_bytes(most[0])}); take a smaller model"


def _pairs(work: Workload) -> list[str]:
    """A change with the fewest more GPUs, then two changes that suffice together."""
    changes = list(_changes(work))
    counts = [(smallest_number_of_gpus(changed), name) for name, changed in changes]
    with_gpus = sorted((gpus, name) for gpus, name in counts if gpus is not None)
    both = [
        f"{name} {further}"
        for name, changed in changes
        for further, twice in _changes(changed)
        if _kind(further) > _kind(name) and _fits(twice)
    ]
    return [f"{name} with --gpus {gpus}" for gpus, name in with_gpus][:2] + _mildest(both)


def _mildest(names: list[str]) -> list[str]:
    """The first of each kind."""
    return list({_kind(name): name for name in reversed(names)}.values())[::-1]


def _kind(name: str) -> str:
    return name.partition("=")[0].partition(" ")[0]


def _changes(work: Workload) -> Iterator[Change]:
    """Settings that take less memory, each kind from the mildest."""
    if not work.is_checkpointed:
        yield "engine.activation_checkpointing=true", replace(work, is_checkpointed=True)
    tokens = work.micro_batch_tokens // 2
    # Below its groups, a smaller budget changes nothing.
    while tokens >= _LEAST_TOKENS and 2 * tokens > work.group_tokens(work.group_size):
        yield f"engine.micro_batch_tokens={tokens}", replace(work, micro_batch_tokens=tokens)
        tokens //= 2
    if work.sampler != "servers":
        parallel = work.parallel_responses // 2
        while parallel >= max(_LEAST_PARALLEL, work.group_size):
            yield f"sampling.max_parallel_responses={parallel}", replace(work, parallel_responses=parallel)
            parallel //= 2
    if not work.lora_rank and work.sampler != "servers":
        lora = replace(work, lora_rank=_SUGGESTED_RANK, discriminator=work.student, sampler="local")
        yield f"student.lora_rank={_SUGGESTED_RANK}", lora
        if work.weight_bytes > 2:
            name = f"student.lora_rank={_SUGGESTED_RANK} student.dtype=bfloat16"
            yield name, replace(lora, weight_bytes=2)
    elif work.lora_rank and work.weight_bytes > 2:
        yield "student.dtype=bfloat16", replace(work, weight_bytes=2)


def _fits(work: Workload) -> bool:
    return plan_memory(work).fits(work.gpu_memory)


def _bytes(size: float) -> str:
    if size < 1e9:
        return f"{size / 1e6:,.1f} MB"
    return f"{size / 1e9:,.1f} GB" if size < 1e11 else f"{size / 1e9:,.0f} GB"
