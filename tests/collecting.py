"""A recipe for `collect`, the command in this process, and what it leaves on disk."""

import contextlib
import functools
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from gadfly import cli

KEY = "zq-0123456789-SECRET-abcdef"
SOURCE = Path(__file__).resolve().parents[1] / "src"


@dataclass(frozen=True)
class Said:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line."""
        return self.err.strip().split("\n")[-1]


class Desk:
    """A folder with a recipe that asks a server, and the run folder it makes."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self._folder, self._capsys = folder, capsys
        self.recipe = folder / "recipe.toml"
        self.run = folder / "runs" / "test"
        self.file = self.run / "teacher.jsonl"

    def write(
        self, base_url: str, prompts: int | Sequence[dict[str, Any]] = 12, teacher: str = "", more: str = ""
    ) -> None:
        """A recipe with so many prompts, or these rows."""
        rows = (
            [{"id": f"p{n}", "prompt": f"question {n}"} for n in range(prompts)]
            if isinstance(prompts, int)
            else prompts
        )
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (self._folder / "prompts.jsonl").write_text(lines, encoding="utf-8")
        self.recipe.write_text(
            f'name = "test"\n[data]\nprompts = "prompts.jsonl"\n[teacher]\nbase_url = "{base_url}"\n'
            f'model = "m"\napi_key_env = "TEACHER_KEY"\n{teacher}\n[student]\nmodel = "none"\n{more}',
            encoding="utf-8",
        )

    def collect(self, *arguments: str, key: str = KEY) -> Said:
        """`gadfly collect` in this process. The key is nowhere but in its variable, whatever happens."""
        self._capsys.readouterr()
        options = {name: f"--{name.replace('_', '-')}" in arguments for name in ("dry_run", "trial")}
        # The words are taken apart here, since the type checks of the tests do not let typer do it.
        command = functools.partial(cli.collect, self.recipe, None, **options)
        with (
            _as_before(),
            mock.patch.dict(os.environ, {"TEACHER_KEY": key}),
            mock.patch.object(cli, "app", command),
        ):
            code = _exit_code(cli.main)
        said = Said(code, *self._capsys.readouterr())
        self.assert_secret(said.out + said.err, key)
        return said

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`gadfly collect` in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "gadfly", "collect", str(self.recipe), *arguments],
            env={**os.environ, "TEACHER_KEY": KEY, "PYTHONPATH": str(SOURCE)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def assert_secret(self, said: str = "", key: str = KEY) -> None:
        """No part of the key of more than five characters is shown or stored."""
        contents = {"output": said.encode()}
        contents |= {str(path): path.read_bytes() for path in self.run.rglob("*") if path.is_file()}
        parts = {key[at : at + 6].encode() for at in range(len(key) - 5)}
        found = [name for name, content in contents.items() if any(part in content for part in parts)]
        assert not found

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What is in the file, in its order."""
        if not self.file.exists():
            return []
        return [json.loads(line) for line in self.file.read_bytes().split(b"\n")[:-1]]

    @property
    def by_id(self) -> dict[str, dict[str, Any]]:
        """The only row of each prompt."""
        rows = self.rows
        found = {row["id"]: row for row in rows}
        assert len(found) == len(rows)
        return found

    @property
    def summary(self) -> dict[str, Any]:
        """What the run's summary says of the collection."""
        found: dict[str, Any] = json.loads((self.run / "summary.json").read_text())["collect"]
        return found


def _exit_code(main: Callable[[], None]) -> int:
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Undo what the command line does to the process it runs in."""
    logger = logging.getLogger("gadfly")
    handlers, level, propagates = logger.handlers[:], logger.level, logger.propagate
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = handlers, propagates
        logger.setLevel(level)
        for number, handler in signals.items():
            signal.signal(number, handler)
