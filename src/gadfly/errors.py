"""Errors a user can cause or meet, each with the exit code the command line ends with.

    GadflyError
    ├── UserError            2   the recipe, the data or the folder is wrong
    │   ├── ConfigError          every mistake of a recipe at once
    │   ├── DataError            no usable row left, or a file that cannot be read
    │   ├── RunFolderError       locked, read-only, disk full, or of another recipe
    │   └── CheckpointError      half written, edited, or of another model
    ├── ApiError             3   a teacher or judge that cannot be asked any further
    ├── AlarmError           4   training stopped itself before it did harm
    └── RanksError           5   another process of the same run is gone, stuck, or out of reach

Anything else is a bug and keeps its traceback.
"""


class GadflyError(Exception):
    """Base of all errors that are shown as one line without a traceback.

    Attributes:
        is_shown_elsewhere: whether another process of the same run shows it.
    """

    exit_code = 1
    is_shown_elsewhere = False


class UserError(GadflyError):
    """Something the user can put right: says what, where, the value, and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """One line per mistake in a recipe or a `key=value`."""


class DataError(UserError):
    """A data set that cannot be read, or has no usable row left."""


class RunFolderError(UserError):
    """A run folder that is in use, cannot be written, or belongs to other settings."""


class CheckpointError(UserError):
    """A checkpoint that is incomplete, altered, or does not fit the model."""


class ApiError(GadflyError):
    """A teacher, judge or sampling server that refuses, cannot be reached, or answers as it should not."""

    exit_code = 3


class AlarmError(GadflyError):
    """Training stopped: going on would spoil the model, or the recipe wants an alarm to stop it.

    The text says whether anything was updated.

    Args:
        text: what is shown.
        alarm: its name in the catalogue of alarms.
    """

    exit_code = 4

    def __init__(self, text: str, alarm: str = "not-finite"):
        super().__init__(text)
        self.alarm = alarm


class RanksError(GadflyError):
    """Another process of the same run is gone, stuck, or cannot be reached."""

    exit_code = 5
