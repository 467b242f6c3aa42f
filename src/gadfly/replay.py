"""Groups of earlier steps, for the discriminator to be taught again beside the fresh ones.

As many groups of each step are kept as are drawn in one, so the store has at most `groups` times `steps` of
them. In memory and on disk they are lines of JSON, some six bytes a token. What is kept and drawn follows
from the seed and the step alone.
"""

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from gadfly.errors import CheckpointError
from gadfly.groups import Branch, Group
from gadfly.run_folder import write_text
from gadfly.stored_json import Kind, check_fields, parse_object
from gadfly.visible_text import few

_FILE = "replay.jsonl"

_GROUP: dict[str, Kind] = {
    "step": int,
    "id": str,
    **dict.fromkeys(("prompt_tokens", "teachers", "students"), list),
}
_BRANCH: dict[str, Kind] = {"tokens": list, "finished": bool, "text": str}


class Replay:
    """A store of groups as the discriminator has read them.

    Args:
        groups: drawn at each step; 0: none, and none is kept.
        steps: how many steps back they may come from.
        seed: decides which.

    Example:
        >>> store = Replay(groups=1, steps=2, seed=0)
        >>> store.keep(1, [Group("a", (5, 6))])
        >>> [group.id for group in store.drawn(2)], store.drawn(4)
        (['a'], [])
    """

    def __init__(self, groups: int, steps: int, seed: int):
        self._num_groups, self._num_steps, self._seed = groups, steps, seed
        self._kept: deque[tuple[int, str]] = deque()

    def drawn(self, step: int) -> list[Group]:
        """Some of the groups kept of the last steps before this one; fewer where there are no more."""
        self._forget(step - self._num_steps)
        return [_read(self._kept[place][1]) for place in self._some(len(self._kept), step, "drawn")]

    def keep(self, step: int, groups: Sequence[Group]) -> None:
        """Keep some of the groups of a step, and none that is too old for the next."""
        self._forget(step + 1 - self._num_steps)
        self._kept += [(step, _line(step, groups[place])) for place in self._some(len(groups), step, "kept")]

    def snapshot(self) -> Callable[[Path], None]:
        """The store as it is now: what writes it into a folder, later."""
        lines = [line for _, line in self._kept]

        def write(folder: Path) -> None:
            if self._num_groups:
                write_text(folder / _FILE, "".join(line + "\n" for line in lines))

        return write

    def restore(self, folder: Path) -> None:
        """Put the store back to where the writer of a snapshot left it.

        Raises:
            CheckpointError: if the file is missing or damaged.
        """
        if not self._num_groups:
            return
        try:
            with open(folder / _FILE, encoding="utf-8", newline="\n") as file:
                lines = [line.removesuffix("\n") for line in file]
            self._kept = deque((_step_of(line), line) for line in lines)
        except (OSError, ValueError, KeyError, TypeError) as damage:
            raise CheckpointError(
                f"{folder / _FILE}: cannot be read ({damage}); restore the checkpoint from an intact copy"
            ) from None

    def _forget(self, before: int) -> None:
        while self._kept and self._kept[0][0] < before:
            self._kept.popleft()

    def _some(self, count: int, step: int, purpose: str) -> list[int]:
        random = np.random.default_rng([self._seed, *purpose.encode(), step])
        return sorted(random.permutation(count)[: self._num_groups].tolist())


def _line(step: int, group: Group) -> str:
    return json.dumps(
        {
            "step": step,
            "id": group.id,
            "prompt_tokens": group.prompt_tokens,
            "teachers": [_plain(branch) for branch in group.teachers],
            "students": [_plain(branch) for branch in group.students],
        },
        ensure_ascii=False,
    )


def _plain(branch: Branch) -> dict[str, Any]:
    return {field.name: getattr(branch, field.name) for field in fields(branch)}


def _step_of(line: str) -> int:
    """The step of a line that `_read` will be able to read."""
    stored = parse_object(line)
    check_fields(stored, _GROUP)
    for branch in (*stored["teachers"], *stored["students"]):
        check_fields(branch, _BRANCH, "branch.")
        if unknown := branch.keys() - {field.name for field in fields(Branch)}:
            raise ValueError(f"unknown fields {few(sorted(unknown))}")
    return int(stored["step"])


def _read(line: str) -> Group:
    stored = json.loads(line)
    roles = {
        role: tuple(Branch(**{**branch, "tokens": tuple(branch["tokens"])}) for branch in stored[role])
        for role in ("teachers", "students")
    }
    return Group(stored["id"], tuple(stored["prompt_tokens"]), **roles)
