"""What every section of a recipe is, and the kinds of value it may hold."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _file_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError("use letters, digits, '.', '_' and '-', beginning with a letter or a digit")
    return name


def _without_null(text: str) -> str:
    # No path may hold one, and no name has a use for it.
    if "\0" in text:
        raise ValueError("holds a null byte; take it out")
    return text


Name = Annotated[str, AfterValidator(_file_name)]
Text = Annotated[str, Field(min_length=1), AfterValidator(_without_null)]
PositiveRate = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
Schedule = Literal["constant", "cosine"]
Files = Text | Annotated[list[Text], Field(min_length=1)]


class Section(BaseModel):
    """A table of the recipe: frozen. A key it does not know is a mistake, and so is a value of another kind,
    such as text in place of a number.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        strict=True,
    )
