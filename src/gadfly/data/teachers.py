"""Several teachers in one data set: whose responses are used."""

from collections.abc import Collection
from dataclasses import replace

from gadfly.data.dataset import BadRow, Dataset
from gadfly.errors import DataError
from gadfly.records import Row
from gadfly.visible_text import few


def of_teachers(name: str, data: Dataset, teachers: Collection[str]) -> Dataset:
    """The data set with no other responses than those of some teachers; as it is if none is named.

    A response of another teacher, or of none that is known, is listed among the bad rows, and so is a row
    that is left without any.

    Args:
        name: of the set, `train` or `valid`.
        data: the set.
        teachers: their names.

    Raises:
        DataError: no row is left.

    Example:
        >>> from gadfly.records import Message, TeacherResponse
        >>> both = (TeacherResponse("4", teacher="gpt"), TeacherResponse("four", teacher="mistral"))
        >>> data = Dataset((Row("7", (Message("user", "2+2?"),), both),))
        >>> [response.text for response in of_teachers("train", data, ["gpt"]).rows[0].responses]
        ['4']
    """
    if not teachers:
        return data
    rows: list[Row] = []
    bad: list[BadRow] = []
    for row in data.rows:
        used = tuple(response for response in row.responses if response.teacher in teachers)
        others = [response.teacher for response in row.responses if response.teacher not in teachers]
        bad += [BadRow(row.source, row.line, "other-teacher", f"teacher: {other!r:.80}") for other in others]
        if used:
            rows.append(replace(row, responses=used))
    if not rows:
        found = sorted({str(response.teacher) for row in data.rows for response in row.responses})
        raise DataError(
            f"data.{name}: no row has a response of data.teachers = {', '.join(teachers)}; the field "
            f"`teacher` of its rows says {few(found)}"
        )
    return Dataset(tuple(rows), (*data.bad, *bad))
