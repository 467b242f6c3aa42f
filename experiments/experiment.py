"""What an experiment's `experiment.toml` may say."""

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gadfly.errors import ConfigError

FOLDER = Path(__file__).resolve().parent


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Arm(_Table):
    """One more way to train a student, held against the main run's on the same data and seed."""

    title: str
    kind: Literal["gad", "dpo", "imitate-lm"] = "gad"
    """`gad`: the product with other settings. `dpo`: trl's DPO on a static snapshot. `imitate-lm`: SFT on
    samples of the discriminator's language model."""
    settings: list[str] = []
    """`key=value` for the recipe of the main run; `{seed}` is the folder of the seed."""
    again: Literal["gad", "warmup"] = "gad"
    """The first stage that is done anew: `gad` starts from the main run's warmup."""

    @property
    def shared_stages(self) -> tuple[str, ...]:
        """What the arm takes over from the main run, and what its time is therefore the longer for."""
        if self.kind == "imitate-lm":
            return ("discriminator-lm",)
        if self.kind == "dpo":
            return ("warmup",)
        return ("discriminator-lm", "warmup") if self.again == "gad" else ()


class Claim(_Table):
    """A claim that a paired difference decides."""

    says: str
    better: str
    """The arm that should be ahead."""
    worse: str
    figure: str | None = None
    """Default: the experiment's own."""
    lower_is_better: bool = False
    paper: str | None = None
    """The claim of the paper that it tests again, in the words of `docs/results.md`."""


class Experiment(_Table):
    """An experiment; its folder bears its name."""

    title: str
    question: str
    recipe: str
    """Whose `recipe.toml` the main run has: its own experiment's, or that of the one it is like."""
    ground: Literal["mixture", "records", "stories", "answers"]
    """Who makes data and models, and what is measured."""
    ground_settings: dict[str, int | float | str | list[float]] = {}
    figure: str
    """What decides, as `SET/FIGURE` of `summary.json`."""
    figures: Annotated[dict[str, str], Field(min_length=1)]
    """Columns of the table: `SET/FIGURE` and what it is called."""
    models: Annotated[dict[str, str], Field(min_length=1)]
    """Models of the main run, as `generate` names them, and what they are called."""
    arms: dict[str, Arm] = {}
    claims: list[Claim] = []
    tells: bool = False
    """Whether an independent classifier is asked to tell every model's answers from the teacher's."""
    quick: list[str] = []
    """Settings under which everything runs in seconds, and shows nothing."""
    quick_ground: dict[str, int | float] = {}
    """The same for the ground, in the place of its settings of these names."""
    seeds: Annotated[int, Field(ge=1)] = 5
    """How many the results are meant to have."""
    tuning_seeds: list[int] = [0]
    """Those that settings were or are to be chosen on; in no table, which has the first of the others."""

    @property
    def titles(self) -> dict[str, str]:
        """What every model and arm is called, in the order of the table."""
        return {**self.models, **{name: arm.title for name, arm in self.arms.items()}}

    @property
    def recipe_file(self) -> Path:
        """The recipe of the main run."""
        return FOLDER / self.recipe / "recipe.toml"

    def seeds_of_results(self, number: int) -> list[int]:
        """The first seeds that nothing was chosen on.

        Example:
            >>> load_experiment("records").seeds_of_results(3)
            [2, 3, 4]
        """
        return list(islice((seed for seed in count() if seed not in self.tuning_seeds), number))

    def origins(self, settings: Sequence[str], ground_settings: Mapping[str, Any]) -> dict[str, str]:
        """What makes the figures of every model and arm, as a digest: they change where it does.

        Args:
            settings: more `key=value` for every run.
            ground_settings: what the ground makes of data and models.
        """
        recipe = tomllib.loads(self.recipe_file.read_text(encoding="utf-8"))
        main = [recipe, list(settings), dict(ground_settings), self.tells]
        arms = {
            arm: _digest([*main, kind.model_dump(exclude={"title"}, exclude_defaults=True)])
            for arm, kind in self.arms.items()
        }
        return {**dict.fromkeys(self.models, _digest(main)), **arms}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def names() -> list[str]:
    """All experiments."""
    return sorted(file.parent.name for file in FOLDER.glob("*/experiment.toml"))


def load_experiment(name: str) -> Experiment:
    """Read an experiment.

    One that is `like` another has its recipe and whatever it does not say itself, but none of its arms and
    claims.

    Raises:
        ConfigError: there is none of that name, or its file is wrong.
    """
    file = FOLDER / name / "experiment.toml"
    if not file.is_file():
        raise ConfigError(f"experiments: no experiment {name!r}; there are {', '.join(names())}")
    try:
        return Experiment.model_validate(_tables(name))
    except (OSError, tomllib.TOMLDecodeError, ValidationError) as mistake:
        raise ConfigError(f"{file}: {mistake}") from mistake


def _tables(name: str) -> dict[str, Any]:
    own = tomllib.loads((FOLDER / name / "experiment.toml").read_text(encoding="utf-8"))
    like = own.pop("like", None)
    if like is None:
        return {"recipe": name, **own}
    return {key: value for key, value in _tables(like).items() if key not in ("arms", "claims")} | own
