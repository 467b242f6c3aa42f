"""Collecting and judging by an OpenAI-compatible server that is not ours: `transformers serve`."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SHARED

from gadfly.recipe_file import load_recipe
from gadfly.stages.collect import collect
from gadfly.stages.judge import judge
from gadfly.stages.run import open_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STORIES = SHARED / "models" / "stories260k"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address and model name of a running server."""
    if not STORIES.is_dir():
        pytest.skip(f"no model at {STORIES}")
    pytest.importorskip(
        "fastapi", reason="transformers serve needs fastapi and uvicorn: pip install '.[dev]'"
    )
    folder = tmp_path_factory.mktemp("served") / "stories"
    shutil.copytree(STORIES, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        Path(sys.executable).parent / "transformers",
        "serve",
        folder,
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    with subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", server)
            yield f"http://127.0.0.1:{port}/v1", str(folder)
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(20)
            server.kill()


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert server.poll() is None, "transformers serve ended by itself"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(1)
    pytest.fail("transformers serve did not come up in 240 s")


def test_a_real_server_is_collected_from_and_its_answers_are_trained_on_as_they_are(
    served: tuple[str, str], tmp_path: Path
) -> None:
    address, model = served
    openings = [
        f"Once upon a time, there was a {thing}" for thing in ("cat", "dog", "boy", "tree", "girl", "bird")
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in openings))
    recipe = tmp_path / "a.toml"
    recipe.write_text(
        'name = "a"\n[data]\nprompts = "prompts.jsonl"\nvalid_share = 0.0\n[student]\nmodel = "none"\n'
        f'[teacher]\nbase_url = "{address}"\nmodel = "{model}"\napi_key_env = ""\ntemperature = 1.0\n'
        'max_response_tokens = 12\nsamples_per_prompt = 2\nconcurrency = 4\ntrain_on = ["cut"]\n'
    )
    with open_run(load_recipe(recipe)) as run:
        collect(run)
        summary = run.folder.read_json("summary.json")["collect"]
        rows = run.folder.rows("teacher.jsonl")
        train = run.data.train
    assert summary["answers"] == 12
    assert summary["completion_tokens"] == sum(row["usage"]["completion_tokens"] for row in rows) > 0
    assert {row["finish_reason"] for row in rows} <= {"length", "stop"}
    assert all(row["response"] for row in rows)
    assert sorted(row.prompt for row in train) == sorted(openings)
    assert all(len(row.responses) == 2 for row in train)
    cut = {row["response"] for row in rows if row["mark"] == "cut"}
    assert {r.text for row in train for r in row.responses if not r.finished} == cut


def test_a_real_server_judges_and_what_it_says_unreadably_is_counted(
    served: tuple[str, str], tmp_path: Path
) -> None:
    address, model = served
    (tmp_path / "test.jsonl").write_text(json.dumps({"id": "0", "prompt": "Once", "response": "upon"}) + "\n")
    generations = tmp_path / "runs" / "a" / "generations"
    generations.mkdir(parents=True)
    row = {
        "model": "gad",
        "checkpoint": "gad",
        "id": "0",
        "prompt": "Once",
        "response": "a time",
        "finished": True,
    }
    (generations / "quiz.jsonl").write_text(json.dumps(row) + "\n")
    recipe = tmp_path / "a.toml"
    recipe.write_text(
        'name = "a"\n[data]\ntest = { quiz = "test.jsonl" }\n[student]\nmodel = "none"\n'
        f'[judge]\nmethod = "score"\nbase_url = "{address}"\nmodel = "{model}"\napi_key_env = ""\n'
        'models = ["gad"]\nmax_response_tokens = 8\nreference_max_tokens = 8\n'
    )
    with open_run(load_recipe(recipe)) as run:
        judge(run)
        noted = run.folder.read_json("summary.json")["judge"]["quiz"]
    # A model of children's stories gives no scores: none is made up for it.
    assert noted["unparsable"] == {"gad": 1}
