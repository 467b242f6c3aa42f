"""What the files of a run folder hold, by their names: what is read back is checked before it is used.

A folder may have been edited, mixed with another, or come from a stranger.
"""

from pathlib import PurePath
from types import NoneType
from typing import Any

from gadfly.stored_json import NUMBER, Kind, check_fields

_SECTIONS = ("stages", "data", "evaluation", "pairwise", "judge", "best", "collect")
_STEP: dict[str, Kind] = {"stage": str, "step": int}
_ALARM: dict[str, Kind] = _STEP | dict.fromkeys(("name", "evidence", "cause", "advice"), str)
_TIMES: dict[str, Kind] = {"steps": (int, NoneType), "seconds": (*NUMBER, NoneType)}
_GENERATION: dict[str, Kind] = {
    **dict.fromkeys(("model", "id", "prompt", "response"), str),
    "finished": bool,
}

_ROWS: dict[str, dict[str, Kind]] = {
    "metrics.jsonl": _STEP,
    "samples.jsonl": _STEP | dict.fromkeys(("kind", "id", "prompt", "teacher"), str),
    "alarms.jsonl": _ALARM | {"action": str},
    "remedies.jsonl": _ALARM | {"back_to": int, "changes": dict, "is_done": bool},
}
_OBJECTS: dict[str, dict[str, Kind]] = {
    "stage.json": {
        **dict.fromkeys(("settings", "environment"), (dict, NoneType)),
        "done": (bool, NoneType),
        **_TIMES,
    },
    "plan.json": {"steps": int, "seconds": NUMBER},
    "precision.json": {"precision": str},
    "summary.json": dict.fromkeys(_SECTIONS, (dict, NoneType)),
    "audit.json": dict.fromkeys(("audit", "audit-warmup"), (dict, NoneType)),
    "environment.json": {"packages": (dict, NoneType), "machine": (str, NoneType), "python": (str, NoneType)},
}
_SAMPLE: dict[str, Kind] = {"text": str, "finished": bool, "score": (*NUMBER, NoneType)}


def check_row(name: str, row: dict[str, Any]) -> None:
    """Refuse a row that the file of that name in a run folder cannot hold.

    Raises:
        ValueError: naming the field that is wrong.

    Example:
        >>> check_row("gad/remedies.jsonl", {"stage": "gad", "step": 3, "name": 5})
        Traceback (most recent call last):
        ValueError: name = 5: must be str
    """
    path = PurePath(name)
    if path.parts[0] == "generations":
        check_fields(row, _GENERATION)
    check_fields(row, _ROWS.get(path.name, {}))
    if path.name == "remedies.jsonl":
        check_fields(row["changes"], dict.fromkeys(row["changes"], NUMBER), "changes.")
    if path.name == "samples.jsonl" and row["kind"] == "evaluation":
        scores = dict.fromkeys(("score", "teacher_score"), (*NUMBER, NoneType))
        check_fields(row, {"response": str, "finished": bool, **scores})
    if path.name == "samples.jsonl" and row["kind"] == "rollout":
        check_fields(row, {"samples": list})
        for number, sample in enumerate(row["samples"]):
            check_fields(sample, _SAMPLE, f"samples[{number}].")


def check_object(name: str, content: dict[str, Any]) -> None:
    """The same for a file that is one object; nothing is asked of an empty one.

    Raises:
        ValueError: naming the field that is wrong.
    """
    file = PurePath(name).name
    if content:
        check_fields(content, _OBJECTS.get(file, {}))
    if file == "summary.json":
        for stage, facts in (content.get("stages") or {}).items():
            check_fields(facts, _TIMES, f"stages.{stage}.")
