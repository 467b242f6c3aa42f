"""Student, discriminator and reference, opened for a stage: from the base models or from a checkpoint."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gadfly.chat_template import Renderer
from gadfly.checkpoint import Checkpoint
from gadfly.config import Optimizer, Recipe
from gadfly.discriminator import (
    Discriminator,
    Probe,
    Scores,
    load_unchecked,
    new_discriminator,
    read_scores,
    save_discriminator,
)
from gadfly.engine import Engine, Precision, faster_precision, frozen_weights
from gadfly.groups import Group, reread, retokenised
from gadfly.logprobs import LogprobReader, Logprobs, has_plain_head
from gadfly.lora import SharedBase, stored_adapter
from gadfly.models import (
    default_device,
    load_language_model,
    save_language_model,
)
from gadfly.samplers import DeferredSampler, Sampler
from gadfly.stages.examples import Example
from gadfly.stages.run import Run
from gadfly.stages.sampler_choice import open_sampler
from gadfly.tensor_files import load_tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Writer:
    """A student that writes and does not learn."""

    model: PreTrainedModel
    renderer: Renderer
    sampler: Sampler


@dataclass(frozen=True)
class StudentRole(Writer):
    """The model that learns, with its sampler."""

    engine: Engine[Logprobs]

    def step(self, learning_rate: float) -> None:
        """Update the weights once with the gradients; the sampler gets them when it is next asked."""
        self.engine.step(learning_rate)
        self.sampler.update(self.engine.weights())

    def snapshot(self, *, is_copy: bool) -> Callable[[Path], None]:
        """The student as it is now: what writes it as a folder, later and in the first process."""
        state = self.engine.whole_state(is_copy=is_copy)
        return lambda folder: save_language_model(self.model, self.renderer.tokenizer, folder, state)


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

    def snapshot(self, probe: list[Group], *, is_copy: bool) -> Callable[[Path], None]:
        """The discriminator as it is now, as for a student; `probe` is what its loader will re-score."""
        # Tokens of a response that was cut may not be those of its text, which its loader will have.
        probe_groups = retokenised([group.only_teachers() for group in probe], self.renderer)
        scores = self.engine.forward(probe_groups)
        state = self.engine.whole_state(is_copy=is_copy)
        scored_in = _scored_in(self.engine)
        return lambda folder: save_discriminator(
            self.model, self.renderer, folder, probe_groups, state=state, scores=scores, scored_in=scored_in
        )


def _scored_in(engine: Engine[Scores]) -> str | None:
    """The type that scores are computed in, if not in that of the weights."""
    return "bfloat16" if engine.precision == "bfloat16" else None


def open_shared_base(recipe: Recipe) -> SharedBase | None:
    """The frozen model whose adapters the roles are to be; None where each role has weights of its own."""
    student = recipe.student
    if student.lora_rank == 0:
        return None
    model, renderer = load_language_model(student.model, student.dtype)
    return SharedBase(
        model, renderer, student.model, rank=student.lora_rank, alpha=_alpha(recipe), seed=recipe.seed
    )


def open_base_of(recipe: Recipe, source: str | Path) -> SharedBase | None:
    """What a saved adapter of the recipe is read on, over weights in half precision: added to those, its
    small steps would be rounded away. None for anything else, which is opened as one whole.
    """
    student = recipe.student
    stored = stored_adapter(source)
    if student.dtype != "bfloat16" or student.lora_rank == 0 or stored is None:
        return None
    if stored == (student.model, student.lora_rank, _alpha(recipe)):
        return open_shared_base(recipe)
    logger.warning(
        "%s: an adapter of another model, rank or alpha than the recipe's; added to weights in bfloat16, "
        "which rounds it",
        source,
    )
    return None


def _alpha(recipe: Recipe) -> int:
    return recipe.student.lora_alpha or 2 * recipe.student.lora_rank


def open_student(
    run: Run,
    source: str | Path,
    *,
    temperature: float,
    optimizer: Optimizer | None = None,
    shared: SharedBase | None = None,
) -> StudentRole:
    """The student from a model name or a folder.

    Args:
        run: for types, sizes and the optimiser, and who works on it.
        source: what to open.
        temperature: at which its log-probabilities are read.
        optimizer: AdamW's settings, `recipe.student` by default.
        shared: what it is an adapter of; without it, all its weights are its own.
    """
    _set_threads(run.recipe)
    model, renderer = _language_model(run, source, shared, device=_device_of_shards(run))
    engine = _reading_engine(run, model, temperature, optimizer or run.recipe.student)

    def inference_copy() -> PreTrainedModel:
        # One unsharded process: the sampler may share the student's tensors, and its update costs nothing.
        return model if run.processes.size == 1 else _language_model(run, source, shared)[0]

    sampler = DeferredSampler(
        open_sampler(run, str(source), engine, renderer, inference_copy, is_half=_is_half(run))
    )
    if run.recipe.sampling.servers:
        # Whatever weights they were started with.
        sampler.update(engine.weights())
    return StudentRole(model, renderer, sampler, engine)


def open_writer(run: Run, source: str | Path) -> Writer:
    """A model that only answers, whole in every process."""
    _set_threads(run.recipe)
    model, renderer = _language_model(run, source, open_base_of(run.recipe, source))
    engine = Engine(model, LogprobReader(), micro_batch_tokens=run.recipe.engine.micro_batch_tokens)
    is_half = run.recipe.student.dtype == "bfloat16"
    sampler = open_sampler(run, str(source), engine, renderer, lambda: model, is_half=is_half)
    if run.recipe.sampling.servers:
        sampler.update((name, weight.detach()) for name, weight in model.named_parameters())
    return Writer(model, renderer, sampler)


def open_reference(
    run: Run, source: str | Path, *, temperature: float, shared: SharedBase | None, student: StudentRole
) -> Engine[Logprobs]:
    """The frozen student that the KL term holds on to."""
    model, _ = _language_model(run, source, shared, device=_device_of_shards(run))
    frozen = frozen_weights(student.model) if shared else None
    return _reading_engine(run, model, temperature, None, frozen)


def open_discriminator(
    run: Run, saved: Path | None, base: str | Path, shared: SharedBase | None, student: StudentRole
) -> DiscriminatorRole:
    """The discriminator: a saved one, or `base` with a new head.

    Raises:
        CheckpointError: if a saved one is not what was saved; the processes score its probe together.
    """
    recipe, device = run.recipe, _device_of_shards(run)
    probe: Probe | None = None
    if saved is None:
        model, renderer = new_discriminator(str(base), recipe.student.dtype, recipe.seed, shared, device)
    else:
        model, renderer, probe = load_unchecked(saved, recipe.student.dtype, shared, device)
    frozen = None
    if shared:
        prefix = f"{student.model.base_model_prefix}."
        frozen = {
            f"backbone.{name.removeprefix(prefix)}": weight
            for name, weight in frozen_weights(student.model).items()
            if name.startswith(prefix)
        }
    engine = Engine(
        model,
        read_scores,
        optimizer=recipe.discriminator,
        shared=frozen,
        **_means(run),
    )
    if probe is not None:
        probe.check(model, renderer, engine.forward, scored_in=_scored_in(engine))
    return DiscriminatorRole(model, renderer, engine, recipe.discriminator.reads == "text")


def _is_half(run: Run) -> bool:
    return "bfloat16" in (precision_of(run), run.recipe.student.dtype)


def _set_threads(recipe: Recipe) -> None:
    if recipe.engine.num_threads is not None:
        torch.set_num_threads(recipe.engine.num_threads)


def _device_of_shards(run: Run) -> torch.device | None:
    """Where to open a model that is to be sharded: a GPU need not hold all of it."""
    return torch.device("cpu") if run.processes.size > 1 else None


def _language_model(
    run: Run, source: str | Path, shared: SharedBase | None, device: torch.device | None = None
) -> tuple[PreTrainedModel, Renderer]:
    if shared is None:
        return load_language_model(str(source), run.recipe.student.dtype, device)
    return shared.language_model(source), shared.renderer


def _reading_engine(
    run: Run,
    model: PreTrainedModel,
    temperature: float,
    optimizer: Optimizer | None,
    shared: dict[str, Tensor] | None = None,
) -> Engine[Logprobs]:
    reader = LogprobReader(temperature, is_chunked=has_plain_head(model))
    return Engine(model, reader, optimizer=optimizer, shared=shared, **_means(run))


def _means(run: Run) -> dict[str, Any]:
    """What every trained model's engine gets alike."""
    settings = run.recipe.engine
    return {
        "micro_batch_tokens": settings.micro_batch_tokens,
        "precision": precision_of(run),
        "recomputes": settings.activation_checkpointing,
        "processes": run.processes,
    }


def precision_of(run: Run) -> Precision:
    """The precision of the recipe; `auto` is the faster one, measured once and kept in `precision.json`.

    A resumed run takes what was kept, since another measurement might come out differently.
    """
    if run.recipe.engine.precision != "auto":
        return run.recipe.engine.precision
    kept = run.folder.read_json("precision.json")
    if not kept:
        precision, measured = run.processes.once("a measurement", lambda: faster_precision(default_device()))
        kept = {"precision": precision, **measured}
        run.folder.write_json("precision.json", kept)
        logger.info("engine.precision: %s is the faster one here", precision)
    return "bfloat16" if kept["precision"] == "bfloat16" else "float32"


def restore_optimizer(
    run: Run, engine: Engine[Logprobs] | Engine[Scores], checkpoint: Checkpoint, role: str
) -> None:
    """Put the optimiser of a role back to where the checkpoint left it."""
    load_tensors(engine.optimizer_state(), checkpoint.path / "trainer" / role, group=run.processes.group)
