"""What a model is known by, so that other weights in its place are noticed."""

import hashlib
from pathlib import Path


def model_identity(name: str | None) -> str | None:
    """A hub name as it is; a model folder by its own name and a hash over both ends of weights and settings.

    So a folder may move, and other weights in its place are noticed without reading all of a large model.
    """
    if name is None or not Path(name).is_dir():
        return name
    folder, digest = Path(name).resolve(), hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return f"{folder.name} ({digest.hexdigest()[:8]})"
