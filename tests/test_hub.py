"""A name that leads to no model is told in one line, at once, and one that the Hub has is opened."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from gadfly.errors import UserError
from gadfly.models import load_language_model
from gadfly.recipe_file import load_recipe
from gadfly.sizing.model_shape import read_shape

SOURCE = Path(__file__).resolve().parents[1] / "src"

# Ports below 1024 that nobody listens on refuse at once.
NOWHERE = "http://127.0.0.1:9"


def opened(name: str, tmp_path: Path, **environment: str) -> list[str]:
    """What is told when a model is opened in a process of its own, with a Hub of our own and no cache."""
    code = """
        import sys
        from gadfly.console import show_logs
        show_logs()
        from gadfly.errors import UserError
        from gadfly.models import load_language_model
        from gadfly.sizing.model_shape import read_shape

        for opens in (read_shape, lambda name: load_language_model(name, "float32")):
            try:
                print(type(opens(sys.argv[1])).__name__)
            except UserError as refusal:
                print(refusal)
    """
    ours = {"PYTHONPATH": str(SOURCE), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), name],
        capture_output=True,
        text=True,
        env={**os.environ, **ours, **environment},
        check=True,
        timeout=300,
    )
    return (done.stdout + done.stderr).splitlines()


class Hub(SimpleHTTPRequestHandler):
    """Answers for the files of a folder as the Hub does for those of a model."""

    def translate_path(self, path: str) -> str:
        return super().translate_path("/" + path.rpartition("/")[2])

    def end_headers(self) -> None:
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"' + self.path.rpartition("/")[2].encode().hex().ljust(40, "0") + '"')
        super().end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[str]:
    """The address of a Hub where every model is the tiny one."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(tiny_model))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("name", [pytest.param("nomodel", marks=pytest.mark.slow), "models/x"])
def test_without_a_network_a_mistyped_folder_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    lines = opened(name, tmp_path, HF_ENDPOINT=NOWHERE)
    assert len(lines) == 2
    for line in lines:
        assert f"model '{name}'" in line
        assert "there is no such folder (a relative path counts from the recipe's folder" in line
        assert "the Hugging Face Hub cannot be asked" in line


def test_a_model_of_the_hub_is_opened(tmp_path: Path, hub: str) -> None:
    assert opened("some/model", tmp_path, HF_ENDPOINT=hub) == ["ModelShape", "tuple"]
    # From now on from the disk.
    assert opened("some/model", tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1") == ["ModelShape", "tuple"]


@pytest.mark.parametrize("opens", [read_shape, lambda name: load_language_model(name, "float32")])
@pytest.mark.parametrize("name", ["./none", "/none/model", ".model", "none/", "my/own/model", "a model"])
def test_what_can_only_be_a_path_is_no_name_of_the_hub(opens: Callable[[str], object], name: str) -> None:
    with pytest.raises(UserError, match="there is no such folder") as refusal:
        opens(name)
    assert str(refusal.value).endswith(f"there is no such folder ({os.path.abspath(name)})")


def test_a_file_in_place_of_a_folder_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match="it is a file; give the folder of a model"):
        load_language_model(str(tmp_path / "model.gguf"), "float32")


def test_a_recipe_resolves_what_can_only_be_a_path(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('name = "a"\n[student]\nmodel = "./none"\n[discriminator]\nmodel = "some/model"\n')
    recipe = load_recipe(path)
    assert (recipe.student.model, recipe.discriminator.model) == (str(tmp_path / "none"), "some/model")
