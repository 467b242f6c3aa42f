"""Which sampler a student is sampled with, and how its canary asks the trainer."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from gadfly.chat_template import Renderer
from gadfly.engine import Engine
from gadfly.errors import UserError
from gadfly.groups import Branch, Group
from gadfly.logprobs import LogprobReader, Logprobs
from gadfly.samplers import (
    Canary,
    DealtSampler,
    LocalSampler,
    Sampler,
    StudentLogprobs,
    VllmSampler,
    VllmServers,
    packing_dtype,
    suits_vllm,
)
from gadfly.stages.run import Run


def open_sampler(
    run: Run,
    source: str,
    engine: Engine[Logprobs],
    renderer: Renderer,
    inference_copy: Callable[[], PreTrainedModel],
    *,
    is_half: bool,
) -> Sampler:
    """What `sampling.servers` and `sampling.backend` say.

    Args:
        run: the open run.
        source: what the student was opened from.
        engine: the student's.
        renderer: for the tokens that end a response.
        inference_copy: gives the whole model that the local sampler is to sample from.
        is_half: whether the trainer computes in bfloat16.
    """
    canary = Canary(_asking(run, engine), is_half=is_half)
    own = _own_sampler(run, source, engine, renderer, inference_copy, canary)
    return own if run.processes.size == 1 else DealtSampler(own, run.processes)


def _own_sampler(
    run: Run,
    source: str,
    engine: Engine[Logprobs],
    renderer: Renderer,
    inference_copy: Callable[[], PreTrainedModel],
    canary: Canary,
) -> Sampler:
    """This process's own."""
    recipe, sampling = run.recipe, run.recipe.sampling
    model = engine.model
    assert isinstance(model, PreTrainedModel), "a student is one"
    cap = max(sampling.max_response_tokens, recipe.generate.max_response_tokens or 0)
    max_tokens = sampling.max_prompt_tokens + cap
    if sampling.servers:
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max_tokens
        return VllmServers(
            sampling.servers,
            renderer.end_ids,
            canary=canary,
            vocabulary_size=model.config.get_text_config().vocab_size,
            folder=run.folder.path / "weights",
            max_tokens=min(max_tokens, positions),
            # Every process asks the servers.
            max_parallel_responses=max(1, sampling.max_parallel_responses // run.processes.size),
            timeout_seconds=recipe.engine.timeout_seconds,
            processes=run.processes,
        )
    if sampling.backend == "vllm" and run.processes.size > 1:
        raise UserError(
            f'sampling.backend = "vllm": one in each of {run.processes.size} processes is not supported; '
            f'start vLLM servers and name them in sampling.servers, or set sampling.backend = "local"'
        )
    suits = recipe.student.lora_rank == 0 and run.processes.size == 1 and suits_vllm(model)
    if sampling.backend == "vllm" or (sampling.backend == "auto" and suits):
        return VllmSampler(
            source,
            model,
            renderer.end_ids,
            canary,
            max_tokens=max_tokens,
            max_parallel_responses=sampling.max_parallel_responses,
        )
    return LocalSampler(
        inference_copy(),
        renderer.end_ids,
        max_parallel_responses=sampling.max_parallel_responses,
        copy_dtype=_copy_dtype(run, engine, model),
        # A model of its own may be left behind by the student.
        canary=canary if run.processes.size > 1 else None,
        progress=run.processes.progress,
    )


def _copy_dtype(run: Run, engine: Engine[Logprobs], model: PreTrainedModel) -> torch.dtype | None:
    """Of the local sampler's copies of linear layers; none where they were a second frozen or whole model."""
    if run.processes.size > 1 or run.recipe.student.lora_rank:
        return None
    # Under autocast it rounds as the trainer does.
    is_autocast = engine.precision == "bfloat16" and model.dtype != torch.bfloat16
    return torch.bfloat16 if is_autocast else packing_dtype(model)


def _asking(run: Run, engine: Engine[Logprobs]) -> StudentLogprobs:
    """How a canary asks the trainer. Processes ask at once, each of a text of its own."""

    def student_logprobs(tokens: Sequence[int]) -> list[float]:
        texts = run.processes.gather("canary", tuple(tokens))
        groups = [
            Group("canary", text[:1], students=(Branch(text[1:], finished=False, text=""),)) for text in texts
        ]
        values = engine.forward(groups, LogprobReader()).values[run.processes.rank]
        own: list[float] = values[: len(tokens) - 1].tolist()
        return own

    return student_logprobs
