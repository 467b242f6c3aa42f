"""What of a recipe decides a stage's result, and how two such records differ."""

from collections.abc import Iterator
from typing import Any

from gadfly.config import Recipe
from gadfly.model_identity import model_identity
from gadfly.reward_functions import code_identity

# Settings that decide neither weights nor the distribution of samples: how often, how fast or on what
# machines something is done, where gad starts (it notes the checkpoint itself), whether another stage runs.
_HARMLESS = {
    "save_every",
    "evaluate_every",
    "max_parallel_responses",
    "backend",
    "servers",
    "start_from",
    "equal_time",
}


def stage_settings(recipe: Recipe, sections: tuple[str, ...]) -> dict[str, Any]:
    """What decides a stage's result: the seed and the sections named, without the harmless keys.

    Models and the user's code are known by their content, wherever they lie.
    """
    chosen = recipe.model_dump(mode="json", include=set(sections))
    kept = {name: {k: v for k, v in chosen[name].items() if k not in _HARMLESS} for name in sections}
    for role in ("student", "discriminator"):
        if role in kept:
            kept[role]["model"] = model_identity(kept[role]["model"])
    for reward in kept.get("gad", {}).get("rewards", {}).values():
        reward["function"] = code_identity(reward["function"])
    return {"seed": recipe.seed, **kept}


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Each setting that two records do not share, as `key = old, now new`, without the harmless keys."""
    for key in sorted((old.keys() | new.keys()) - _HARMLESS):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key} = {before!r}, now {after!r}"
