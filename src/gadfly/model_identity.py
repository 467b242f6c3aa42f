"""What a model is known by, so that another in its place is noticed."""

import hashlib
import re
from pathlib import Path

# NAME or OWNER/NAME, each starting like a word: anything else can only have been meant as a path.
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)

# Weights, settings, and what makes tokens of text: tokenizers and chat templates.
_PARTS = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
_FURTHER_TEMPLATES = "additional_chat_templates/*.jinja"


def model_identity(name: str | None) -> str | None:
    """A hub name as it is; a model folder by its own name and a hash over both ends of each of its parts.

    So a folder may move, and other weights, another tokenizer or chat template in its place are noticed,
    without reading all of a large model.
    """
    if name is None or not Path(name).is_dir():
        return name
    folder, digest = Path(name).resolve(), hashlib.sha256()
    for path in sorted(path for part in (*_PARTS, _FURTHER_TEMPLATES) for path in folder.glob(part)):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return f"{folder.name} ({digest.hexdigest()[:8]})"


def may_be_hub_name(name: str) -> bool:
    """Whether a name is not clearly a path.

    Example:
        >>> [may_be_hub_name(name) for name in ("gpt2", "some/model", "./model", "model/", "my/own/model")]
        [True, True, False, False, False]
    """
    return _HUB_NAME.fullmatch(name) is not None
