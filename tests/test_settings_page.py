"""docs/settings.md is what the code says."""

import importlib.util
import re
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from gadfly.recipe_file import fields, section_of

CHECKOUT = Path(__file__).resolve().parents[1]


def script() -> ModuleType:
    loader = SourceFileLoader("settings_page", str(CHECKOUT / "scripts" / "settings-page"))
    spec = importlib.util.spec_from_loader("settings_page", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_page_of_settings_is_what_the_command_prints() -> None:
    assert (CHECKOUT / "docs" / "settings.md").read_text(encoding="utf-8") == script().page()


def test_every_key_has_a_meaning_on_the_page() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", script().page(), re.MULTILINE)
    keys = [key.rpartition(".")[2] for key, field in fields() if section_of(field) is None]
    assert sorted(key for key, _ in rows) == sorted(keys)
    assert [key for key, meaning in rows if not meaning.strip()] == []
