"""What is done about an alarm: the section `alarms` of a recipe."""

import difflib
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from gadfly.alarms import KINDS
from gadfly.config.section import Section

Action = Literal["warn", "skip_discriminator", "stop", "roll_back"]


def _name(name: str) -> str:
    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=1)
        meant = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(KINDS)}"
        raise ValueError(f"no alarm has this name{meant}")
    return name


AlarmName = Annotated[str, AfterValidator(_name)]


class AlarmsConfig(Section):
    """What is done when training goes wrong; docs/alarms.md has every alarm."""

    action: Action = "warn"
    """`warn`: say it, in the log, `alarms.jsonl` and the report. `skip_discriminator`: the discriminator
    takes no step while the alarm stands, where that helps. `stop`: keep a checkpoint and end with exit code
    4. `roll_back`: go back to the last checkpoint from before it began and on with the alarm's remedy, at
    most three times a stage; without a remedy, stop. A loss or gradient that is no number stops at least."""
    actions: dict[AlarmName, Action] = {}
    """The same for single alarms, as in `{ collapse = "stop" }`."""
    window: Annotated[int, Field(ge=8, le=1000)] = 20
    """Steps over which a trend is judged. Fewer find a fault sooner and see more where there is none."""

    @model_validator(mode="after")
    def _rest_helps(self) -> "AlarmsConfig":
        for name, action in self.actions.items():
            if action == "skip_discriminator" and not KINDS[name].rests:
                able = ", ".join(kind.name for kind in KINDS.values() if kind.rests)
                raise ValueError(
                    f'actions.{name} = "skip_discriminator": resting the discriminator does not help there; '
                    f"it may with {able}"
                )
        return self

    def action_on(self, name: str) -> Action:
        """What the recipe wants done about an alarm.

        Example:
            >>> AlarmsConfig(action="stop", actions={"drift": "warn"}).action_on("drift")
            'warn'
        """
        wanted = self.actions.get(name, self.action)
        return "warn" if wanted == "skip_discriminator" and not KINDS[name].rests else wanted
