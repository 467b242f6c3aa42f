"""An open run: its recipe, its locked folder, its data."""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gadfly
from gadfly.config import Recipe
from gadfly.data.collected import collected
from gadfly.data.dataset import BadRow, hold_out, load_rows, normalised_prompt
from gadfly.data.teachers import of_teachers
from gadfly.distributed.processes import Processes
from gadfly.errors import ConfigError, RunFolderError
from gadfly.model_identity import model_identity
from gadfly.records import Row
from gadfly.reward_functions import RewardFunction, code_identity
from gadfly.run_folder import RunFolder
from gadfly.shared_run_folder import SharedRunFolder
from gadfly.stage_settings import stage_settings
from gadfly.trackers import Tracker, open_trackers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """The prompts of a run with their teacher responses, and a hash of their content."""

    train: tuple[Row, ...]
    valid: tuple[Row, ...]
    fingerprint: str


@dataclass
class Run:
    """What every stage gets."""

    recipe: Recipe
    folder: RunFolder
    trackers: list[Tracker]
    processes: Processes = field(default_factory=Processes)
    bad_as_read: dict[str, Sequence[BadRow]] = field(default_factory=dict)
    reward_functions: Mapping[str, RewardFunction] = field(default_factory=dict, kw_only=True)

    @cached_property
    def data(self) -> Split:
        """Training and held-out prompts; bad rows are listed in `bad_rows.jsonl` and counted in the
        summary.

        Raises:
            ConfigError: if the recipe names no training data.
            DataError: if a data set has no usable row.
        """
        split = self.processes.together("data", self._read_data)
        self.processes.check_same("content of the data", split.fingerprint, "give all the same files")
        return split

    def _read_data(self) -> Split:
        config = self.recipe.data
        train = (
            collected(self.recipe, self.folder)
            if config.train is None
            else load_rows(config.train, needs_response=True, train_on=self.recipe.teacher.train_on)
        )
        if train is None:
            raise ConfigError(
                "data.train: must be given: a file with prompts and teacher responses (or data.prompts and "
                "teacher.model, and `gadfly collect` asks for them)"
            )
        train = of_teachers("train", train, config.teachers)
        self.bad_as_read["train"] = train.bad
        if config.valid is None:
            kept, held_out = hold_out(train.rows, float(config.valid_share))
            return Split(kept, held_out, train.fingerprint[:16])
        valid = of_teachers("valid", load_rows(config.valid, needs_response=True), config.teachers)
        self.bad_as_read["valid"] = valid.bad
        trained_on = {normalised_prompt(row.messages) for row in train.rows}
        if shared := sum(normalised_prompt(row.messages) in trained_on for row in valid.rows):
            logger.warning("data.valid: %d of %d prompts are in data.train too", shared, len(valid.rows))
        return Split(train.rows, valid.rows, f"{train.fingerprint[:16]}/{valid.fingerprint[:16]}")

    def alone(self) -> "Run":
        """The run for the first process by itself, inside what is done once: it waits for no other."""
        folder = RunFolder(self.folder.path)
        return self if self.processes.size == 1 else replace(self, folder=folder, processes=Processes())

    def note_bad_rows(self, name: str, too_long: Sequence[BadRow], num_kept: int) -> None:
        """List all that a set lost in `bad_rows.jsonl`, and count it by reason in the summary.

        Every stage tokenises anew; what an earlier one noted of the set is replaced.
        """
        bad = [*self.bad_as_read.get(name, ()), *too_long]
        counts = dict(Counter(row.reason for row in bad))
        others = [row for row in self.folder.rows("bad_rows.jsonl") if row.get("set") != name]
        self.folder.write_rows("bad_rows.jsonl", [*others, *({"set": name, **asdict(row)} for row in bad)])
        summary = self.folder.read_json("summary.json")
        summary.setdefault("data", {})[name] = {"rows": num_kept, "bad": counts}
        self.folder.write_json("summary.json", summary)
        if bad:
            shown = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
            logger.warning("data.%s: %d rows used, left out: %s (bad_rows.jsonl)", name, num_kept, shown)

    @property
    def gad_begins_at(self) -> str | None:
        """The checkpoint folder that gad begins, or began, from in the place of warmup's end."""
        if self.recipe.gad.starts_elsewhere:
            return str(self.recipe.gad.start_from)
        # At once, since a folder's list may be another in every process.
        return self.processes.once("where gad began", lambda: _began_at(RunFolder(self.folder.path)))

    def stage_settings(self, *sections: str) -> dict[str, Any]:
        """What decides a stage's result: the seed, the sections named, and the content of the data."""
        settings = stage_settings(self.recipe, ("student", "sampling", "evaluation", *sections))
        # Test sets may come and go, and a moved file with the same content is the same data.
        settings["data"] = {
            "valid_share": self.recipe.data.valid_share,
            "over_long_responses": self.recipe.data.over_long_responses,
            "teachers": self.recipe.data.teachers,
            "content": self.data.fingerprint,
        }
        settings["precision"] = self.recipe.engine.precision
        return settings


def _began_at(folder: RunFolder) -> str | None:
    """What is noted of gad's start, if it was trained from there: a slip in the recipe may be put right."""
    begun = folder.read_json("gad/stage.json")
    has_trained = (
        any(folder.stage("gad").glob("step-*"))
        or not {"went_back_to", "has_trained"}.isdisjoint(begun)
        or bool(folder.rows("gad/remedies.jsonl"))
    )
    return begun.get("began_at") if has_trained else None


@contextlib.contextmanager
def open_run(
    recipe: Recipe,
    processes: Processes | None = None,
    *,
    reward_functions: Mapping[str, RewardFunction] | None = None,
) -> Iterator[Run]:
    """Lock the run folder, note recipe and environment in it, and open the trackers.

    Args:
        recipe: what to run.
        processes: who does it; this one alone by default.
        reward_functions: the functions of the recipe's `gad.rewards`, by name. None is loaded here: they are
            code (see `reward_functions.py`).

    Raises:
        UserError: the processes do not run the same recipe by the same code.
    """
    assert recipe.run_folder is not None, "load_recipe fills it in"
    processes = processes or Processes()
    folder = RunFolder(recipe.run_folder)
    if processes.size > 1:
        folder = SharedRunFolder(folder, processes)
        processes.check_same("recipe", _digest_of(recipe.model_dump_json()), "give all the same")
        processes.check_same("code of gadfly", code_digest(), "install the same version everywhere")
        versions = json.dumps(environment()["packages"])
        processes.check_same("packages", versions, "install the same versions everywhere")
        for role, name in (("student", recipe.student.model), ("discriminator", recipe.discriminator.model)):
            processes.check_same(f"{role}.model", model_identity(name) or "none", "give all the same weights")
        for reward in recipe.gad.rewards.values():
            processes.check_same(
                "code of gad.rewards", code_identity(reward.function), "give all the same file"
            )
    with folder.lock():
        _refuse_foreign_folder(folder)
        folder.write_json("config.json", recipe.model_dump(mode="json"))
        folder.write_json("environment.json", {**environment(), "command": " ".join(sys.argv[1:])})
        trackers = open_trackers(
            recipe.trackers.names if processes.rank == 0 else [],
            project=recipe.trackers.project,
            run_name=recipe.name,
            folder=folder.path,
            config=recipe.model_dump(mode="json"),
        )
        try:
            yield Run(recipe, folder, trackers, processes, reward_functions=reward_functions or {})
        finally:
            for tracker in trackers:
                tracker.close()


def _refuse_foreign_folder(folder: RunFolder) -> None:
    """Spare the `config.json` of something else, such as a model that a recipe names as its run folder.

    Raises:
        RunFolderError: there is one.
    """
    config = folder.read_json("config.json")
    if config and not {"name", "student"} <= config.keys():
        raise RunFolderError(
            f"run_folder = {folder.path}: its config.json is no recipe's, so this is no run folder; choose "
            f"another with run_folder=…"
        )


def environment() -> dict[str, Any]:
    """Versions and machine that numbers depend on, as `environment.json` and each `stage.json` hold them."""
    packages = ("torch", "transformers", "tokenizers", "safetensors", "peft", "numpy")
    return {
        "gadfly": gadfly.__version__,
        "code": code_digest(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


def code_digest() -> str:
    """A hash over the source of this installation."""
    digest = hashlib.sha256()
    package = Path(gadfly.__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
