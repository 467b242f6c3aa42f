"""Every setting of the recipe with its default and its meaning, those that differ first."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from gadfly.config import Recipe


@dataclass(frozen=True)
class Setting:
    """One key of the recipe."""

    key: str
    value: str
    default: str
    """Empty where only the user can know the value."""
    meaning: str
    differs: bool


def settings_of(recipe: Recipe) -> list[Setting]:
    """All settings, in the recipe's order, those that differ from the default first."""
    return sorted(_walk(recipe, ""), key=lambda setting: not setting.differs)


def _walk(section: BaseModel, prefix: str) -> Iterator[Setting]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _walk(value, f"{prefix}{name}.")
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        is_required = default is PydanticUndefined
        yield Setting(
            key=prefix + name,
            value=_written(value),
            default="" if is_required else _written(default),
            # Written for Markdown: the code marks would stand there as they are.
            meaning=" ".join((field.description or "").replace("`", "").split()),
            differs=is_required or value != default,
        )


def _written(value: object) -> str:
    """A value about as it stands in a recipe; None, a key that is not set, as a dash."""
    return "–" if value is None else json.dumps(value, ensure_ascii=False)  # noqa: RUF001  an en dash
