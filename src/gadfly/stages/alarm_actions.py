"""Looks at every row a stage logs, says which alarms it raises, and decides what is done about them."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gadfly.alarms import KINDS, Alarm, Circumstances, History, look
from gadfly.config import Action
from gadfly.errors import AlarmError
from gadfly.run_folder import RunFolder
from gadfly.stages.remedies import GoBack, note_remedy, remedy_for
from gadfly.stages.run import Run

logger = logging.getLogger(__name__)

# Windows after which an alarm that still stands is raised once more.
_REMINDER = 10


class Stopped(AlarmError):
    """An alarm that the recipe wants to stop at; a checkpoint is kept."""


@dataclass(frozen=True)
class _Wanted:
    """What has to be done before the next step."""

    alarm: Alarm
    action: Action
    changes: Mapping[str, float]


class StageAlarms:
    """The alarms of one stage while it runs.

    Args:
        run: the open run.
        stage: its name.
        circumstances: what has to be known to read its metrics.

    Attributes:
        rests: whether an alarm stands that lets the discriminator rest.
    """

    def __init__(self, run: Run, stage: str, circumstances: Circumstances):
        self.rests = False
        self._run, self._stage = run, stage
        self._config = run.recipe.alarms
        self._history = History(stage, circumstances)
        # By name: the step at which it was said last, and since when it stood then.
        self._raised: dict[str, tuple[float, int]] = {}
        self._wanted: _Wanted | None = None
        actions = {self._config.action, *self._config.actions.values()}
        self._may_rest = "skip_discriminator" in actions

    def recall(self) -> None:
        """Take up what an earlier start has logged and is kept; a stop that stands then still does."""

        def read() -> list[Alarm]:
            # A row is looked at by whom writes it.
            folder = self._run.alone().folder
            for row in folder.rows("metrics.jsonl"):
                if row["stage"] == self._stage:
                    self._history.add(row)
            return look(self._history, only_new=False)

        standing = self._run.processes.once("alarms", read)
        for row in self._run.folder.rows("alarms.jsonl"):
            if row["stage"] == self._stage:
                self._raised[row["name"]] = (row["step"], row["since"])
        self._note_rest(standing)
        # What was not said of these rows when they were new would not have stopped a run that went on.
        stops = [self._decided(alarm) for alarm in standing if alarm.name in self._raised]
        self._wanted = next((wanted for wanted in stops if wanted.action == "stop"), None)

    def see(self, row: Mapping[str, Any]) -> None:
        """Look at a row that has just been logged."""
        found, standing = self._run.processes.once("alarms", lambda: self._look(row))
        self._note_rest(standing)
        for alarm in found:
            raised_at, since = self._raised.get(alarm.name, (-math.inf, alarm.since))
            # It was a warning once, and may have stood since then.
            wanted = self._decided(replace(alarm, since=min(since, alarm.since)))
            is_acted_upon = wanted.action in ("stop", "roll_back")
            if not is_acted_upon and alarm.step - raised_at < _REMINDER * self._config.window:
                continue
            self._raised[alarm.name] = (alarm.step, alarm.since)
            self._run.folder.append_rows("alarms.jsonl", [_row(self._stage, alarm, wanted.action)])
            logger.warning("%s", _describe(self._stage, alarm, wanted.action))
            # Of two alarms at once, the first of the catalogue is acted upon.
            if is_acted_upon and self._wanted is None:
                self._wanted = wanted

    @property
    def stops(self) -> bool:
        """Whether a checkpoint is to be kept now, since the stage stops."""
        return self._wanted is not None and self._wanted.action == "stop"

    @property
    def goes_back(self) -> bool:
        """Whether the stage leaves this step behind, so that no checkpoint of it is to be kept."""
        return self._wanted is not None and self._wanted.action == "roll_back"

    def act(self, before: Callable[[], None], seconds: float) -> None:
        """Leave the stage, after so many seconds of it, if an alarm asks for that; first do `before`.

        Raises:
            Stopped: the recipe wants it to stop.
            GoBack: it is to go back; that is noted.
        """
        if self._wanted is None:
            return
        before()
        alarm = self._wanted.alarm
        if self._wanted.action == "roll_back":
            self._go_back(alarm, self._wanted.changes, seconds)
        kept = f"The checkpoint of step {alarm.step} is kept; with" if alarm.step else "With"
        raise Stopped(
            f"{_describe(self._stage, alarm, 'stop')} {kept} "
            f'alarms.actions.{alarm.name}="warn" the same command goes on from there.',
            alarm.name,
        )

    def answer(self, error: AlarmError, step: int, seconds: float) -> None:
        """Note an alarm that came as an error, amid a step, after so many seconds of the stage.

        Raises:
            GoBack: the recipe wants it, and there is a remedy.
        """
        kind = KINDS[error.alarm]
        evidence, advice = str(error), kind.advice_in(self._stage)
        remedy = {key.format(stage=self._stage): change for key, change in kind.remedy.items()}
        alarm = Alarm(kind.name, kind.title, step, step, evidence, kind.cause, advice, remedy)
        wanted = self._decided(alarm)
        action: Action = "roll_back" if wanted.action == "roll_back" else "stop"
        # Others may have it too: one row is enough.
        if self._run.processes.rank == 0:
            own = RunFolder(self._run.folder.path)
            own.append_rows("alarms.jsonl", [_row(self._stage, alarm, action)])
        if action == "roll_back":
            logger.warning("%s", _describe(self._stage, alarm, action))
            self._go_back(alarm, wanted.changes, seconds)

    def _look(self, row: Mapping[str, Any]) -> tuple[list[Alarm], list[Alarm]]:
        self._history.add(row)
        standing = look(self._history, only_new=False) if self._may_rest else []
        return look(self._history), standing

    def _note_rest(self, standing: list[Alarm]) -> None:
        actions = [self._config.action_on(alarm.name) for alarm in standing]
        self.rests = "skip_discriminator" in actions

    def _decided(self, alarm: Alarm) -> _Wanted:
        action = self._config.action_on(alarm.name)
        changes = remedy_for(self._run, self._stage, alarm) if action == "roll_back" else {}
        # Without a change the same would happen again.
        return _Wanted(alarm, "stop" if action == "roll_back" and not changes else action, changes)

    def _go_back(self, alarm: Alarm, changes: Mapping[str, float], seconds: float) -> None:
        step = note_remedy(self._run, self._stage, alarm, changes, seconds)
        logger.warning("%s: going back to step %d", self._stage, step)
        if step == 0:
            logger.warning(
                "%s: there is no checkpoint from before step %d; save_every and checkpoints.keep_last decide",
                self._stage,
                alarm.since,
            )
        raise GoBack


def _row(stage: str, alarm: Alarm, action: Action) -> dict[str, Any]:
    return {
        "stage": stage,
        "step": alarm.step,
        "since": alarm.since,
        "name": alarm.name,
        "evidence": alarm.evidence,
        "cause": alarm.cause,
        "advice": alarm.advice,
        "action": action,
    }


def way_on(run: Run, stage: str, alarm: AlarmError) -> str:
    """What else than the same command there is to do after an alarm that came as an error, to go on the line.

    A sampler that is not the student's says so itself.
    """
    if alarm.alarm != "not-finite":
        return "."
    rolls_back = run.recipe.alarms.action_on("not-finite") == "roll_back"
    halved = '; with alarms.actions.not-finite="roll_back" it does so at half the learning rates'
    return (
        f", and may meet the same again{'' if rolls_back else halved}. Other settings need another name: "
        f"{KINDS['not-finite'].advice_in(stage)}"
    )


def _describe(stage: str, alarm: Alarm, action: Action) -> str:
    """An alarm in a line."""
    return (
        f"{stage} step {alarm.step}: alarm {alarm.name} ({action}): {alarm.title}: {alarm.evidence}. "
        f"Likely cause: {alarm.cause} What to do: {alarm.advice}"
    )
