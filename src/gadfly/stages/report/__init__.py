"""The report stage: one HTML file that shows what a run did, how well it went, and what looks wrong.

It reads the run folder and the recipe alone, at any moment of a run, and never loads torch.
"""

from typing import Protocol, runtime_checkable

from gadfly.config import Recipe
from gadfly.run_folder import RunFolder, write_text
from gadfly.stages.report.reading import read_evidence


@runtime_checkable
class Reportable(Protocol):
    """What a report needs of an open run."""

    recipe: Recipe
    folder: RunFolder


def report(run: Reportable) -> None:
    """Write `report.html` into the run folder, whole, from what is there so far.

    The same folder gives the same page, but for the times it tells.

    Raises:
        RunFolderError: a file of the folder is not valid, or the page cannot be written.
    """
    from gadfly.stages.report.page import render_page  # noqa: PLC0415  what draws takes a second to load

    page = render_page(read_evidence(run.folder, run.recipe))
    write_text(run.folder.path / "report.html", page)
