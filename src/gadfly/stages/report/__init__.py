"""The report stage: one HTML file that shows what a run did, how well it went, and what looks wrong.

It reads the run folder and the recipe alone, at any moment of a run, and never loads torch.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from gadfly.config import Recipe
from gadfly.errors import RunFolderError
from gadfly.run_folder import RunFolder, write_text
from gadfly.stages.report.reading import read_evidence

_NOTED = ("summary.json", "audit.json", "environment.json")


@runtime_checkable
class Reportable(Protocol):
    """What a report needs of an open run."""

    recipe: Recipe
    folder: RunFolder


@dataclass
class Reported:
    """A run as far as a report needs it, which another process may have open."""

    recipe: Recipe
    folder: RunFolder


def report(run: Reportable) -> None:
    """Write `report.html` into the run folder, whole, from what is there so far.

    The same folder gives the same page, but for the times it tells.

    Raises:
        RunFolderError: a file of the folder is not valid, or the page cannot be written.
    """
    # What draws takes a second to load.
    from jinja2 import UndefinedError  # noqa: PLC0415

    from gadfly.stages.report.page import render_page  # noqa: PLC0415

    try:
        page = render_page(read_evidence(run.folder, run.recipe))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, UndefinedError) as failure:
        # Rows are checked as they are read; what stages noted is nested too deep to be described again.
        names, what = ", ".join(_NOTED), str(failure).partition("\n")[0][:200]
        raise RunFolderError(
            f"{run.folder.path}: {names}: one of them is not as it was written "
            f"({type(failure).__name__}: {what}); restore it, or move it away and report again"
        ) from failure
    write_text(run.folder.path / "report.html", page)
