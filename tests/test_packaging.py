import ast
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run"])


def requirements() -> list[Requirement]:
    """What pyproject.toml asks for, extras included but vLLM, which pins what it needs itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [lines for name, lines in project["optional-dependencies"].items() if name != "vllm"]
    return [Requirement(line) for group in [project["dependencies"], *extras] for line in group]


def pins() -> dict[str, str]:
    """Version by canonical name, of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_pins_name_no_build_of_one_machine() -> None:
    assert not [version for version in pins().values() if "+" in version]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_run_and_parse(script: Path) -> None:
    assert os.access(script, os.X_OK)
    source = script.read_text(encoding="utf-8")
    interpreter = source.splitlines()[0]
    if interpreter == "#!/usr/bin/env bash":
        assert "\nset -euo pipefail\n" in source
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)
    else:
        assert interpreter == "#!/usr/bin/env python3"
        ast.parse(source)


def repository_files() -> list[Path]:
    """Every file a commit could hold: what lies in the checkout and is not ignored by name."""
    folders = (ROOT / name for name in (".ci", "docs", "recipes", "scripts", "src", "tests"))
    nested = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    top = (path for path in ROOT.iterdir() if path.is_file())
    return [
        path
        for path in [*top, *nested]
        if "__pycache__" not in path.parts and "runs" not in path.relative_to(ROOT).parts
    ]


def test_no_file_names_a_package_index_or_a_path_of_this_machine() -> None:
    machine = [f"{path}/" for path in (ROOT.parent, Path.home()) if path != Path("/")]
    forbidden = re.compile(
        "|".join(
            [
                r"(extra-)?index[-_]url|find[-_]links|https?://\S+/(simple|whl)\b",
                *map(re.escape, machine),
            ]
        ),
        re.IGNORECASE,
    )
    found = {
        str(path.relative_to(ROOT)): match.group()
        for path in repository_files()
        if path != Path(__file__).resolve()
        and (match := forbidden.search(path.read_bytes().decode(errors="ignore")))
    }
    assert found == {}


def test_the_wheel_holds_every_file_of_the_package() -> None:
    package = ROOT / "src" / "gadfly"
    expected = {
        f"gadfly/{path.relative_to(package)}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    included = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert included == expected
    assert "gadfly/py.typed" in included
