"""Reads a recipe: TOML and `key=value`, all mistakes at once, each with a suggestion where one is near."""

import difflib
import os
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from gadfly.config import TRAINING_STAGES, Recipe
from gadfly.errors import ConfigError
from gadfly.model_identity import may_be_hub_name
from gadfly.run_folder import merge

Table = dict[str, Any]

# Characters of a wrong value that a line repeats.
_MOST_SHOWN = 500

# Keys that name files or folders; relative ones are resolved where they were written.
_PATHS = (
    "run_folder",
    "data.prompts",
    "data.train",
    "data.valid",
    "data.test",
    "student.model",
    "discriminator.model",
    "gad.start_from",
    "gad.rewards",
    "generate.checkpoints",
    "judge.score_prompt",
    "judge.pairwise_prompt",
    "judge.tell_model",
)

# What ends so is a file and no name on a hub.
_FILES = (".jsonl", ".json", ".parquet", ".txt")

# Those of them that name models.
_MODELS = ("student.model", "discriminator.model", "generate.checkpoints", "judge.tell_model")


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read `path` and apply `key=value` overrides (values are TOML; a bare word is a string).

    A relative path in the file is resolved against the file's folder, one on the command line against
    the current folder. Model and data names that are no existing path, nor end as a file of data does, are
    taken as hub names, where they can be one, and left alone.

    Raises:
        ConfigError: with one line for every mistake in file and overrides.
    """
    path = Path(path)
    folder = path.absolute().parent
    table = _read_toml(path)
    _resolve_paths(table, folder)
    mistakes: list[str] = []
    overridden: list[str] = []
    for override in overrides:
        try:
            key, piece = _parse_override(override)
        except ConfigError as mistake:
            mistakes.append(str(mistake))
            continue
        _resolve_paths(piece, Path.cwd())
        merge(table, piece)
        overridden.append(key)
    if "name" in table:
        given = table.setdefault("run_folder", os.path.normpath(folder / "runs" / "{name}"))
        if isinstance(given, str) and given:
            # By whatever name the command line gives the run.
            table["run_folder"] = os.path.normpath(given.replace("{name}", str(table["name"])))
    try:
        recipe = Recipe.model_validate(table)
    except ValidationError as invalid:
        for key, errors in _by_key(invalid.errors(), table).items():
            if any(_is_within(key, given) for given in overridden):
                hint = f"; text is '{key}=\"…\"'" if errors[0]["type"] == "string_type" else ""
                mistakes.append(f"command line: {_explain(key, errors)}{hint}")
            else:
                mistakes.append(f"{path.name}: {_explain(key, errors)}")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return recipe


def _read_toml(path: Path) -> Table:
    try:
        # Some editors begin a file with a byte order mark.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe") from None
    except OSError as failure:
        raise ConfigError(f"{path}: cannot be read: {failure.strerror}") from None
    except UnicodeDecodeError as invalid:
        raise ConfigError(f"{path}: byte {invalid.start} is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as invalid:
        raise ConfigError(f"{path}: not valid TOML: {invalid}") from None


def _parse_override(override: str) -> tuple[str, Table]:
    """The dotted key of an override, and the table it stands for."""
    key, equals, text = (part.strip() for part in override.partition("="))
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{override!r}: write key=value, as in gad.group_size=4")
    piece: Any = _parse_value(override, text)
    for part in reversed(parts):
        piece = {part: piece}
    return key, dict(piece)


def _parse_value(override: str, text: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError) as invalid:
        if text.startswith(("[", "{", '"', "'")):
            raise ConfigError(
                f"{override!r}: not valid TOML: {invalid}; text in a list or table needs quotes, "
                f"and the whole then quotes of the shell: 'generate.checkpoints=[\"base\"]'"
            ) from None
        return text
    # A line break in the text could have smuggled in a second key.
    return table["value"] if len(table) == 1 else text


def _resolve_paths(table: Table, folder: Path) -> None:
    for dotted in _PATHS:
        *sections, key = dotted.split(".")
        section: Any = table
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and key in section:
            section[key] = _resolve(section[key], folder, dotted)


def _resolve(value: Any, folder: Path, dotted: str) -> Any:
    if isinstance(value, list):
        return [_resolve(item, folder, dotted) for item in value]
    if isinstance(value, dict):
        return {key: _resolve(item, folder, dotted) for key, item in value.items()}
    if not isinstance(value, str) or not value:
        return value
    # Lexically, so that `../runs` means the same beside a linked recipe folder.
    resolved = os.path.normpath(folder / os.path.expanduser(value))
    return resolved if _means_path(dotted, value, resolved) else value


def _means_path(dotted: str, value: str, resolved: str) -> bool:
    if dotted in ("run_folder", "gad.rewards"):
        return True
    if dotted == "gad.start_from":
        return value != "latest"
    if dotted == "generate.checkpoints" and value.split("/")[0] in ("base", *TRAINING_STAGES):
        return False
    if value.lower().endswith(_FILES) and dotted not in _MODELS:
        # There or not: one of that name in the current folder is another file.
        return True
    if dotted.startswith("data.") and os.path.exists(resolved.rpartition(":")[0]):
        # A folder with a split.
        return True
    # Otherwise it can only be a hub name, if it can be one.
    return os.path.exists(resolved) or (dotted in _MODELS and not may_be_hub_name(value))


def _by_key(errors: Iterable[ErrorDetails], table: Table) -> dict[str, list[ErrorDetails]]:
    """Errors by the dotted key they are about. A key with a choice of types has one error for each."""
    found: dict[str, list[ErrorDetails]] = {}
    for error in errors:
        found.setdefault(_written_key(error, table), []).append(error)
    # If an item of a list is wrong, that the list is no single string says nothing.
    return {
        key: errors
        for key, errors in found.items()
        if not any(_is_within(other, key) for other in found if other != key)
    }


def _written_key(error: ErrorDetails, table: Table) -> str:
    """The part of an error's place that is written in the recipe; the rest are names of types."""
    if error["type"] == "missing":
        return ".".join(map(str, error["loc"]))
    parts: list[str] = []
    value: Any = table
    for part in error["loc"]:
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict) and part in value:
            value = value[part]
            parts.append(str(part))
    return ".".join(parts)


def _is_within(key: str, outer: str) -> bool:
    return bool(key) and (key == outer or key.startswith(f"{outer}."))


def _explain(key: str, errors: list[ErrorDetails]) -> str:
    error = errors[0]
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggestion(key)}"
    if error["type"] == "missing":
        return _explain_missing(key)
    if error["type"] in ("model_type", "dict_type"):
        return f"{key} = {_shown(error['input'])}: must be a table, as in [{key}]"
    messages = [error["msg"].removeprefix("Value error, ") for error in errors]
    if not key:
        return "; ".join(messages)
    lead = "Input should be "
    expected = lead.lower() + " or ".join(message.removeprefix(lead) for message in messages)
    message = expected if messages[0].startswith(lead) else f"{messages[0][0].lower()}{messages[0][1:]}"
    # A key or password put there by mistake must not be repeated.
    is_secret = key.endswith((".api_key_env", ".base_url"))
    return f"{key}: {message}" if is_secret else f"{key} = {_shown(error['input'])}: {message}"


def _shown(value: object) -> str:
    """The value as it may stand in a line, however long it is."""
    try:
        shown = repr(value)
    # A number in hexadecimal may have more digits than Python writes.
    except ValueError:
        return "a number beyond all bounds"
    return shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}…"


def _explain_missing(key: str) -> str:
    field = dict(fields()).get(key)
    if field is None:
        return f"{key}: must be given"
    if section := section_of(field):
        required = [name for name, inner in section.model_fields.items() if inner.is_required()]
        return "; ".join(_explain_missing(f"{key}.{name}") for name in required)
    return f"{key}: must be given ({' '.join((field.description or '').split()).rstrip('.')})"


def _suggestion(key: str) -> str:
    """Where the key belongs, else what it may be a slip of: beside it first, then anywhere."""
    homes: dict[str, list[str]] = {}
    for known, _ in fields():
        homes.setdefault(known.rpartition(".")[2], []).append(known)
    outer, _, last = key.lower().rpartition(".")
    beside = [name for name in homes if (f"{outer}.{name}" if outer else name) in homes[name]]
    # There it would be known, but for capitals.
    if last in beside:
        meant = [last]
    elif last in homes:
        meant = homes[last]
    elif near := difflib.get_close_matches(last, beside, n=1, cutoff=0.6):
        meant = near
    else:
        meant = [
            known for name in difflib.get_close_matches(last, homes, n=1, cutoff=0.8) for known in homes[name]
        ]
    return "; did you mean " + " or ".join(f"'{known}'" for known in meant) + "?" if meant else ""


def fields(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key a recipe may hold, dotted, in the order of the classes of `config`, sections included."""
    for key, field in section.model_fields.items():
        yield f"{prefix}{key}", field
        if inner := section_of(field):
            yield from fields(inner, f"{prefix}{key}.")


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The table that a key is of; None for a key with a value."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
