"""The page put together: what each section says, and the template that shows it."""

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gadfly.alarms import ALARMS
from gadfly.stages.report.alarmed import raised
from gadfly.stages.report.audited import audited
from gadfly.stages.report.chosen import Choice, best_words, choices
from gadfly.stages.report.collection import collection
from gadfly.stages.report.curves import PanelGroup, stage_panels
from gadfly.stages.report.reading import Evidence, StageState
from gadfly.stages.report.remarks import NUM_CHECKS, remarks
from gadfly.stages.report.results import how_sampled, result_tables
from gadfly.stages.report.samples import before_and_after, best_and_worst, model_against_model
from gadfly.stages.report.settings import settings_of
from gadfly.stages.report.wording import counted, duration, shortened, stage_label
from gadfly.visible_text import visible


@dataclass(frozen=True)
class StageSection:
    """The curves of one stage; one stage stands open, the others are folded away."""

    label: str
    facts: str
    groups: list[PanelGroup]
    is_open: bool


def render_page(evidence: Evidence) -> str:
    """The page as one HTML text that loads nothing and runs nothing.

    Every text goes through `finalize`, which makes hidden characters visible, and is then escaped.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shortened": shortened, "counted": counted, "duration": duration, "zip": zip}
    return environment.get_template("page.html.jinja").render(_content(evidence))


def _finalize(value: object) -> object:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _content(evidence: Evidence) -> dict[str, Any]:
    recipe = evidence.recipe
    tables, chosen = result_tables(evidence), choices(evidence)
    return {
        "recipe": recipe,
        "student": _model_name(recipe.student.model),
        "discriminator": _model_name(recipe.discriminator.model or recipe.student.model),
        "data": evidence.data,
        "stages": [(stage_label(stage.name), stage) for stage in evidence.stages.values()],
        "machine": _machine(evidence.environment),
        "tables": tables,
        "has_rouge": any(column.name == "rouge_l" for table in tables for column in table.columns),
        "batch_prompts": evidence.batch_prompts,
        "choices": chosen,
        "collection": collection(evidence),
        "audits": audited(evidence),
        "remarks": remarks(evidence),
        "num_checks": NUM_CHECKS,
        "alarms": raised(evidence),
        "num_alarms": len(ALARMS),
        "sections": _stage_sections(evidence),
        "before_and_after": before_and_after(evidence),
        "generations": [
            (_whose(chapter.title, chosen), how_sampled(recipe, chapter.title), chapter.comparisons)
            for chapter in model_against_model(evidence)
        ],
        "rollouts": best_and_worst(evidence),
        "settings": settings_of(recipe),
    }


def _whose(title: str, chosen: list[Choice]) -> str:
    """What generations are answers to: test prompts, or those that a best checkpoint was chosen on."""
    stages = [choice.stage for choice in chosen if choice.test_set == title]
    return f"Held-out prompts, checkpoints of {stages[0]}" if stages else f"Test prompts of {title}"


def _model_name(model: str) -> str:
    """A hub name as it is; of a folder only its own name."""
    return PurePath(model).name if PurePath(model).is_absolute() else model


def _machine(environment: dict[str, Any]) -> str:
    packages = environment.get("packages", {})
    parts = [
        environment.get("machine"),
        f"Python {environment['python']}" if "python" in environment else None,
    ]
    parts += [f"{name} {packages[name]}" for name in ("gadfly", "torch", "transformers") if name in packages]
    return ", ".join(part for part in parts if part)


def _stage_sections(evidence: Evidence) -> list[StageSection]:
    groups = {stage.name: stage_panels(evidence, stage.name) for stage in evidence.stages.values()}
    drawn = [stage for stage in evidence.stages.values() if groups[stage.name]]
    names = [stage.name for stage in drawn]
    opened = "gad" if "gad" in names else next(iter(names[-1:]), None)
    return [
        StageSection(
            stage_label(stage.name), _facts(evidence, stage), groups[stage.name], stage.name == opened
        )
        for stage in drawn
    ]


def _facts(evidence: Evidence, stage: StageState) -> str:
    facts = counted(stage.steps, "step")
    if stage.seconds is None:
        facts += " so far"
    if stage.best_step is not None:
        facts += f"; {best_words(evidence, stage.name, stage.best_step)}"
    return facts
