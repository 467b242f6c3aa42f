"""The manifest of a checkpoint: what was saved, and whether a folder is still that and nothing more."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gadfly.errors import CheckpointError
from gadfly.run_folder import write_text
from gadfly.stored_json import check_fields, parse_object

MANIFEST = "manifest.json"

# Left in folders by macOS, by NFS, and by the Hub's client where it uploads from.
_LEFT_BEHIND = re.compile(r"\.DS_Store|\._.*|\.nfs[0-9a-f]+|\.cache")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step: the last step that went into it.
        facts: what else the trainer must know to go on (JSON).
        files: a hash of every file, by its name under the folder.
    """

    step: int
    facts: dict[str, Any]
    files: dict[str, str]

    @property
    def models_digest(self) -> str:
        """A hash over the files of the models: equal for equal models."""
        # Equal optimisers need not be equal files: safetensors writes their several notes in any order.
        return _digest({name: self.files[name] for name in self.files if not name.startswith("trainer/")})


def write_manifest(folder: Path, step: int, facts: Mapping[str, Any], names: Iterable[str]) -> Manifest:
    """Hash the files of a checkpoint and list them in it."""
    files = {name: hash_file(folder / name) for name in sorted(names)}
    content = {"step": step, "facts": dict(facts), "files": files}
    write_text(folder / MANIFEST, json.dumps({**content, "digest": _digest(content)}, indent=2) + "\n")
    return Manifest(step, dict(facts), files)


def read_manifest(folder: Path, way_out: str) -> Manifest:
    """The manifest of a folder, as it was written.

    Args:
        folder: of the checkpoint.
        way_out: what to do about a damaged one, to go behind each message.

    Raises:
        CheckpointError: it is missing, none, edited, or lists what is no file within the folder.
    """
    place = folder / MANIFEST
    try:
        content = parse_object(place.read_bytes())
        check_fields(content, {"files": dict, "step": int, "facts": dict, "digest": str})
    except FileNotFoundError:
        raise CheckpointError(f"{place}: missing, so this is no whole checkpoint{way_out}") from None
    except OSError as failure:
        raise CheckpointError(f"{place}: cannot be read: {failure.strerror}{way_out}") from None
    except ValueError as invalid:
        raise CheckpointError(f"{place}: not a manifest ({invalid}){way_out}") from None
    digest = content.pop("digest")
    for name in content["files"]:
        if not _is_inside(folder, name):
            raise CheckpointError(f"{place}: lists {name!r:.200}, outside the folder; do not use it")
        # In an error it would make several lines, or steer the terminal.
        if not name.isprintable():
            raise CheckpointError(f"{place}: lists {name!r:.200}, no name of ours; do not use it")
    try:
        is_as_saved = _digest(content) == digest
    # Lists may be nested deeper than Python writes them.
    except RecursionError:
        is_as_saved = False
    if not is_as_saved:
        raise CheckpointError(f"{place}: altered since it was saved{way_out}")
    return Manifest(content["step"], content["facts"], content["files"])


def check_files(folder: Path, manifest: Manifest, way_out: str) -> None:
    """Refuse a folder that does not hold just the files of its manifest.

    Raises:
        CheckpointError: naming the file that is missing, altered, or was not saved with the others.
    """
    for name, digest in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, so the checkpoint is incomplete{way_out}")
        if hash_file(file) != digest:
            raise CheckpointError(f"{file}: altered since it was saved{way_out}")
        if name.endswith(".index.json"):
            _check_index(folder, name, manifest)
    # Readers look for files by many names: weights, templates, special tokens.
    for name in _names_in(folder):
        if name not in manifest.files and name != MANIFEST:
            shown = str(folder / name)
            shown = shown if shown.isprintable() else repr(shown)
            raise CheckpointError(f"{shown}: not saved with this checkpoint; remove it")


def _check_index(folder: Path, name: str, manifest: Manifest) -> None:
    """Refuse a list of weights that leads to files which were not saved with it."""
    try:
        index = parse_object((folder / name).read_bytes())
        check_fields(index, {"weight_map": dict})
        pieces = {str(piece) for piece in index["weight_map"].values()}
    except ValueError as invalid:
        raise CheckpointError(f"{folder / name}: no list of weights ({invalid}); do not use it") from None
    place = Path(name).parent
    for piece in sorted(pieces):
        if (place / piece).as_posix() not in manifest.files:
            raise CheckpointError(
                f"{folder / name}: leads to {piece!r:.200}, not saved with this checkpoint; do not use it"
            )


def _digest(content: Mapping[str, Any]) -> str:
    # As it will be when it is read: keys are text there, and in the order of text.
    written = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a name, with all links followed, is a path within a folder, or may become one."""
    try:
        file = (folder / name).resolve()
        file.is_file()
    # A link to itself, a name too long, a null byte, half a character.
    except (OSError, RuntimeError, ValueError):
        return False
    return file.is_relative_to(folder)


def _names_in(folder: Path) -> Iterator[str]:
    """Every file and link under a folder but for what others leave there and nobody reads."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _LEFT_BEHIND.fullmatch(name))
        # What a link to a folder leads to was not saved either.
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in sorted([*files, *links]):
            # All weights there are would be read, whatever their name.
            if name.endswith(".safetensors") or not _LEFT_BEHIND.fullmatch(name):
                yield (Path(place) / name).relative_to(folder).as_posix()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
