"""Rewards that the user writes: functions of text, in a Python file that a recipe names.

    def brevity(prompt, responses, teacher_responses):
        return [-len(response) for response in responses]

To read them is to run code of whoever wrote the recipe, so it is done only for those who say so.
"""

import hashlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gadfly.config import RewardConfig
from gadfly.errors import ConfigError, UserError

RewardFunction = Callable[[str, Sequence[str], Sequence[str]], Sequence[float]]
"""Given a prompt, its sampled responses and the teacher's responses: a number for each sample."""


def load_reward_functions(
    rewards: Mapping[str, RewardConfig], *, allows_code: bool
) -> dict[str, RewardFunction]:
    """The functions of a recipe's `gad.rewards`, by name; their files are run.

    Args:
        rewards: the section.
        allows_code: whether the user trusts the recipe's code.

    Raises:
        ConfigError: the user does not, or a file has no such function.
    """
    if rewards and not allows_code:
        named = ", ".join(reward.function for reward in rewards.values())
        raise ConfigError(
            f"gad.rewards: the recipe has code of its own, {named}; read it, and if you trust it, give "
            f"--allow-code"
        )
    return {name: _load(f"gad.rewards.{name}", reward.function) for name, reward in rewards.items()}


def code_identity(function: str) -> str:
    """A function with a hash of its file, wherever that lies; as it is if there is no such file."""
    path, _, name = function.rpartition(":")
    try:
        return f"{name} {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"
    except OSError:
        return function


def rate(
    name: str, function: RewardFunction, prompt: str, responses: Sequence[str], teachers: Sequence[str]
) -> list[float]:
    """What a function says of the responses to a prompt.

    Raises:
        UserError: it fails, or what it returns is not one finite number for each response.

    Example:
        >>> rate("brevity", lambda prompt, texts, teachers: [-len(text) for text in texts], "?", ["ab"], [])
        [-2.0]
    """
    about = f"gad.rewards.{name}: of the prompt {prompt!r:.60}"
    try:
        rated = [float(value) for value in function(prompt, list(responses), list(teachers))]
    except Exception as failure:
        # Whatever the user's code may raise.
        place = traceback.extract_tb(failure.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        raise UserError(
            f"{about}: {where}: {type(failure).__name__}: {failure}; mend the function and run again"
        ) from failure
    if len(rated) != len(responses) or not all(map(math.isfinite, rated)):
        raise UserError(
            f"{about}: {rated!s:.60} is not a finite number for each of {len(responses)} responses; mend "
            f"the function and run again"
        )
    return rated


def _load(key: str, function: str) -> RewardFunction:
    path, _, name = function.rpartition(":")
    # A name of its own: it must neither shadow a module nor be taken for one.
    module_name = f"gadfly_rewards_{hashlib.sha256(path.encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None, "the recipe takes no other file than .py"
    assert spec.loader is not None, "a file has a loader"
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look for the module they are defined in.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError:
        raise ConfigError(f"{key} = {function}: no such file") from None
    except Exception as failure:
        # Whatever the user's code may raise.
        raise ConfigError(
            f"{key} = {function}: {type(failure).__name__}: {failure}; mend the file"
        ) from failure
    found = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"{key} = {function}: the file has no function {name!r}")
    loaded: RewardFunction = found
    return loaded
