"""Student, discriminator and reference, opened for a stage: from the base models or from a checkpoint."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from gadfly.chat_template import Renderer
from gadfly.checkpoint import Checkpoint, load_tensors
from gadfly.config import Optimizer, Recipe
from gadfly.discriminator import (
    Discriminator,
    Scores,
    load_discriminator,
    new_discriminator,
    read_scores,
    save_discriminator,
)
from gadfly.engine import Engine, Precision, faster_precision
from gadfly.groups import Group, reread
from gadfly.logprobs import LogprobReader, Logprobs, has_plain_head
from gadfly.lora import SharedBase
from gadfly.models import (
    default_device,
    load_language_model,
    save_language_model,
)
from gadfly.run_folder import RunFolder
from gadfly.samplers import LocalSampler, Sampler, VllmSampler, suits_vllm
from gadfly.stages.examples import Example

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudentRole:
    """The model that learns, with its sampler."""

    model: PreTrainedModel
    renderer: Renderer
    engine: Engine[Logprobs]
    sampler: Sampler

    def save(self, folder: Path) -> None:
        """Write the student as a Hugging Face folder."""
        save_language_model(self.model, self.renderer.tokenizer, folder)


@dataclass(frozen=True)
class DiscriminatorRole:
    """The discriminator, and the renderer it reads text through."""

    model: Discriminator
    renderer: Renderer
    engine: Engine[Scores]
    reads_text: bool

    def view(self, groups: list[Group], batch: list[Example]) -> list[Group]:
        """The groups as the discriminator reads them."""
        return (
            reread(groups, [example.row for example in batch], self.renderer) if self.reads_text else groups
        )

    def save(self, folder: Path, probe: list[Group]) -> None:
        """Write the discriminator as a Hugging Face folder; `probe` is what its loader will re-score."""
        save_discriminator(self.model, self.renderer, folder, probe)


def open_shared_base(recipe: Recipe) -> SharedBase | None:
    """The frozen model whose adapters the roles are to be; None where each role has weights of its own."""
    student = recipe.student
    if student.lora_rank == 0:
        return None
    model, renderer = load_language_model(student.model, student.dtype)
    alpha = student.lora_alpha or 2 * student.lora_rank
    return SharedBase(model, renderer, student.model, rank=student.lora_rank, alpha=alpha, seed=recipe.seed)


def open_student(
    recipe: Recipe,
    source: str | Path,
    *,
    temperature: float,
    optimizer: Optimizer | None = None,
    shared: SharedBase | None = None,
) -> StudentRole:
    """The student from a model name or a folder.

    Args:
        recipe: for types, sizes and the optimiser.
        source: what to open.
        temperature: at which its log-probabilities are read.
        optimizer: AdamW's settings, `recipe.student` by default.
        shared: what it is an adapter of; without it, all its weights are its own.
    """
    if recipe.engine.num_threads is not None:
        torch.set_num_threads(recipe.engine.num_threads)
    model, renderer = _language_model(recipe, source, shared)
    engine = _reading_engine(recipe, model, temperature, optimizer or recipe.student)
    return StudentRole(model, renderer, engine, open_sampler(recipe, source, model, renderer))


def open_sampler(recipe: Recipe, source: str | Path, model: PreTrainedModel, renderer: Renderer) -> Sampler:
    """What `sampling.backend` says, to sample from a student that was opened from `source`."""
    sampling = recipe.sampling
    is_whole = recipe.student.lora_rank == 0
    if sampling.backend == "vllm" or (sampling.backend == "auto" and is_whole and suits_vllm(model)):
        cap = max(sampling.max_response_tokens, recipe.generate.max_response_tokens or 0)
        return VllmSampler(
            str(source),
            model,
            renderer.end_ids,
            max_tokens=sampling.max_prompt_tokens + cap,
            max_parallel_responses=sampling.max_parallel_responses,
        )
    # One unsharded process: the sampler may share the student's tensors, and its update costs
    # nothing.
    return LocalSampler(model, renderer.end_ids, max_parallel_responses=sampling.max_parallel_responses)


def open_reference(
    recipe: Recipe, source: str | Path, *, temperature: float, shared: SharedBase | None
) -> Engine[Logprobs]:
    """The frozen student that the KL term holds on to."""
    model, _ = _language_model(recipe, source, shared)
    return _reading_engine(recipe, model, temperature, None)


def open_discriminator(
    recipe: Recipe, saved: Path | None, base: str | Path, shared: SharedBase | None
) -> DiscriminatorRole:
    """The discriminator: a saved one, or `base` with a new head."""
    if saved is None:
        model, renderer = new_discriminator(str(base), recipe.student.dtype, recipe.seed, shared)
    else:
        model, renderer = load_discriminator(saved, recipe.student.dtype, shared)
    engine = Engine(
        model,
        read_scores,
        micro_batch_tokens=recipe.engine.micro_batch_tokens,
        precision=precision_of(recipe),
        optimizer=recipe.discriminator,
    )
    return DiscriminatorRole(model, renderer, engine, recipe.discriminator.reads == "text")


def _language_model(
    recipe: Recipe, source: str | Path, shared: SharedBase | None
) -> tuple[PreTrainedModel, Renderer]:
    if shared is None:
        return load_language_model(str(source), recipe.student.dtype)
    return shared.language_model(source), shared.renderer


def _reading_engine(
    recipe: Recipe, model: PreTrainedModel, temperature: float, optimizer: Optimizer | None
) -> Engine[Logprobs]:
    return Engine(
        model,
        LogprobReader(temperature, is_chunked=has_plain_head(model)),
        micro_batch_tokens=recipe.engine.micro_batch_tokens,
        precision=precision_of(recipe),
        optimizer=optimizer,
    )


def precision_of(recipe: Recipe) -> Precision:
    """The precision of the recipe; `auto` is the faster one, measured once and kept in `precision.json`.

    A resumed run takes what was kept, since another measurement might come out differently.
    """
    if recipe.engine.precision != "auto":
        return recipe.engine.precision
    assert recipe.run_folder is not None, "load_recipe fills it in"
    folder = RunFolder(recipe.run_folder)
    kept = folder.read_json("precision.json")
    if not kept:
        precision, measured = faster_precision(default_device())
        kept = {"precision": precision, **measured}
        folder.write_json("precision.json", kept)
        logger.info("engine.precision: %s is the faster one here", precision)
    return "bfloat16" if kept["precision"] == "bfloat16" else "float32"


def restore_optimizer(engine: Engine[Logprobs] | Engine[Scores], checkpoint: Checkpoint, role: str) -> None:
    """Put the optimiser of a role back to where the checkpoint left it."""
    load_tensors(engine.optimizer_state(), checkpoint.path / "trainer" / role)
