"""Distil any black-box language model into your own, on-policy, from nothing but its text."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

__version__ = "0.1.0"


def _open_forgetful_folders(configuration_auto: ModuleType) -> None:
    """Let transformers find the demo's model type, importing it only when a folder is opened.

    Every `from_pretrained` asks `AutoConfig` first. To register as soon as transformers' own modules
    are imported would be too early: that may be half-way through importing the Llama classes, which
    the model type derives from.
    """

    def register_first(
        wrapped: Callable[..., Any], _: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        from gadfly.demo import forgetful  # noqa: F401, PLC0415

        return wrapped(*args, **kwargs)

    for name in ("AutoConfig.from_pretrained", "AutoConfig.for_model"):
        wrapt.wrap_function_wrapper(configuration_auto, name, register_first)


wrapt.register_post_import_hook(_open_forgetful_folders, "transformers.models.auto.configuration_auto")
