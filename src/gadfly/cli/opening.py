"""How a command opens its recipe and does its work: in one process, under torchrun, or in Ray's workers."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from gadfly.errors import RanksError, RunFolderError


def do(name: str, recipe_path: Path, overrides: list[str] | None, allows_code: bool | None = None) -> Path:
    """Do a stage, or all of them, and return the run folder.

    Args:
        name: of the stage, or `run`.
        recipe_path: the recipe.
        overrides: its settings for this run.
        allows_code: whether the recipe's own code may be run; None for a stage that needs none.
    """
    with open_recipe(recipe_path, overrides, allows_code) as opened:
        _stage(name)(opened)
        path: Path = opened.folder.path
        return path


def report_beside(recipe_path: Path, overrides: list[str] | None) -> Path:
    """Write the report of a run that may be going on, whose folder is left as it is otherwise, and return it.

    Raises:
        RunFolderError: there is no such run folder yet.
    """
    from gadfly.recipe_file import load_recipe  # noqa: PLC0415  `--help` needs no pydantic
    from gadfly.run_folder import RunFolder  # noqa: PLC0415
    from gadfly.stages.report import Reported, report  # noqa: PLC0415

    loaded = load_recipe(recipe_path, overrides or [])
    assert loaded.run_folder is not None, "load_recipe fills it in"
    folder = RunFolder(loaded.run_folder)
    if not {"name", "student"} <= folder.read_json("config.json").keys():
        raise RunFolderError(
            f"run_folder = {folder.path}: no run has begun there, so there is nothing to report"
        )
    report(Reported(loaded, folder))
    return folder.path


def do_by_ray(recipe_path: Path, overrides: list[str] | None, num_workers: int, allows_code: bool) -> Path:
    """Do all stages in Ray's workers, and return the run folder."""
    from gadfly.distributed.ray_launch import launch  # noqa: PLC0415
    from gadfly.recipe_file import load_recipe  # noqa: PLC0415

    loaded = load_recipe(recipe_path, overrides or [])
    assert loaded.run_folder is not None, "load_recipe fills it in"
    work = partial(do, "run", recipe_path.absolute(), overrides, allows_code)
    return launch(work, Path(loaded.run_folder), num_workers)


@contextlib.contextmanager
def open_recipe(
    recipe_path: Path, overrides: list[str] | None, allows_code: bool | None = None
) -> Iterator[Any]:
    """The run of a recipe, opened by every process of it; the arguments are those of `do`."""
    from gadfly.recipe_file import load_recipe  # noqa: PLC0415  `--help` needs no pydantic
    from gadfly.reward_functions import load_reward_functions  # noqa: PLC0415
    from gadfly.stages.run import open_run  # noqa: PLC0415

    with _join_processes() as processes:
        loaded = processes.together("recipe", lambda: load_recipe(recipe_path, overrides or []))
        processes.limit_waits(loaded.engine.timeout_seconds)
        functions = {}
        if allows_code is not None:
            functions = processes.together(
                "gad.rewards", lambda: load_reward_functions(loaded.gad.rewards, allows_code=allows_code)
            )
        with open_run(loaded, processes, reward_functions=functions) as opened:
            yield opened


def _join_processes() -> AbstractContextManager[Any]:
    """The processes that torchrun started, or this one alone."""
    from gadfly.distributed.processes import Processes  # noqa: PLC0415

    if os.environ.get("WORLD_SIZE", "1") == "1":
        return contextlib.nullcontext(Processes())
    from gadfly.distributed.ranks import open_ranks  # noqa: PLC0415  torch is needed by many processes only

    return open_ranks(_give_up)


def _give_up(line: str) -> None:
    """End the process from a thread while the main one is stuck."""
    if line:
        # By the log, which Ray's workers send to the terminal; a quiet process shows this too.
        logging.getLogger("gadfly").critical("%s", line)
    os._exit(RanksError.exit_code)


def _stage(name: str) -> Callable[[Any], None]:
    # Once recipe and run folder are known to be right: torch takes seconds to load.
    from gadfly.stages.pipeline import run_stages, stage  # noqa: PLC0415

    return run_stages if name == "run" else stage(name)
