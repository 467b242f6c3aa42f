"""A trained student as a plain Hugging Face folder, for whatever serves or publishes models."""

import shutil
from pathlib import Path

from gadfly.checkpoint import student_of
from gadfly.disk_refusals import refusal_in
from gadfly.errors import UserError
from gadfly.models import load_language_model, save_language_model


def export(checkpoint: str, folder: Path, dtype: str) -> None:
    """Write the student of a checkpoint, an adapter merged into its model.

    Args:
        checkpoint: a stage of a run (its latest checkpoint), a checkpoint, or a model's folder or name.
        folder: where to; it must not exist yet. It appears under its name when it is whole.
        dtype: torch's name of the weights' type.

    Raises:
        UserError: if the folder exists or cannot be written, or the student cannot be opened.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists already; give another folder, or remove it")
    model, renderer = load_language_model(student_of(checkpoint), dtype)
    beside = folder.with_name(f"{folder.name}.unfinished")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        save_language_model(model, renderer.tokenizer, beside)
        beside.rename(folder)
    except Exception as failure:
        if (reason := refusal_in(failure)) is None:
            raise
        raise UserError(f"{folder}: cannot be written: {reason}") from failure
