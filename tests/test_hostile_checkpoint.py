"""Checkpoints and models from strangers: no code of theirs runs, and nothing outside the folder is read."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gadfly.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from gadfly.errors import CheckpointError, GadflyError, UserError
from gadfly.models import load_language_model
from gadfly.replay import Replay
from gadfly.sizing.model_shape import read_shape
from gadfly.tensor_files import check_tensors

DEEP = b"[" * 100_000
MANIFEST = {"step": 1, "facts": {}, "files": {}, "digest": ""}
odd = st.sampled_from(
    [None, True, -1, 10**400, 1e999, float("nan"), "", "x", "\ud800\x00", [], [1], {}, {"a": 1}, "a" * 5000]
)


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def saved(stage: Path) -> Checkpoint:
    def write(folder: Path) -> Iterator[Path]:
        (folder / "student").mkdir()
        (folder / "student" / "model.safetensors").write_bytes(b"weights")
        yield from ()

    return save_checkpoint(stage, 1, write, {"a": 1})


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(path)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("piece", ["../../../outside.safetensors", "other.safetensors", "/etc/passwd"])
def test_a_list_of_weights_that_leads_elsewhere_is_refused(piece: str, tmp_path: Path) -> None:
    def write(folder: Path) -> Iterator[Path]:
        (folder / "student").mkdir()
        (folder / "student" / "a.safetensors").write_bytes(b"weights")
        index = {"weight_map": {"one": "a.safetensors", "two": piece}}
        (folder / "student" / "model.safetensors.index.json").write_text(json.dumps(index))
        yield from ()

    saved = save_checkpoint(tmp_path / "gad", 1, write, {})
    assert f"leads to {piece!r}, not saved with this checkpoint" in refused(saved.path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)
@given(
    content=st.binary(max_size=40)
    | st.just(DEEP)
    | st.builds(
        lambda key, value: json.dumps({**MANIFEST, key: value}).encode(),
        st.sampled_from(sorted(MANIFEST)),
        odd | st.dictionaries(st.text(st.characters(), max_size=5) | st.just("a" * 5000), odd, max_size=2),
    )
)
def test_any_manifest_is_refused_in_one_line_or_right(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "gad" / "step-000001"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_bytes(content)
    try:
        assert open_checkpoint(folder).path == folder.resolve()
    except CheckpointError as refusal:
        if "\n" in str(refusal):
            raise AssertionError(str(refusal)) from refusal


@pytest.mark.parametrize("kind", ["to itself", "out", "up", "to a folder out"])
def test_a_listed_link_that_leaves_the_folder_is_refused(kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "gad").path
    (tmp_path / "secret").write_bytes(b"weights")
    link, name = path / "student" / "model.safetensors", "model.safetensors"
    link.unlink()
    if kind == "to a folder out":
        shutil.rmtree(path / "student")
        (tmp_path / "secrets").mkdir()
        (tmp_path / "secrets" / name).write_bytes(b"weights")
        (path / "student").symlink_to(tmp_path / "secrets")
    else:
        targets = {"to itself": name, "out": str(tmp_path / "secret"), "up": "../../../secret"}
        link.symlink_to(targets[kind])
    assert "outside the folder; do not use it" in refused(path)


@pytest.mark.parametrize("path", ["a\x00b", "a" * 5000, "loop"])
def test_a_path_that_no_file_can_have_is_no_checkpoint(path: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert "no such checkpoint" in refused(tmp_path / path)


GROUP = {"step": 1, "id": "a", "prompt_tokens": [1], "teachers": [], "students": []}
BRANCH = {"tokens": [1], "finished": True, "text": "a"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(
    line=st.binary(max_size=20)
    | st.just(DEEP)
    | st.builds(lambda k, v: json.dumps({**GROUP, k: v}).encode(), st.sampled_from(sorted(GROUP)), odd)
    | st.builds(
        lambda k, v: json.dumps({**GROUP, "students": [{**BRANCH, k: v}]}).encode(),
        st.sampled_from([*sorted(BRANCH), "evil"]),
        odd,
    )
)
def test_any_store_of_groups_is_refused_when_it_is_restored_or_can_be_drawn_from(
    tmp_path: Path, line: bytes
) -> None:
    (tmp_path / "replay.jsonl").write_bytes(line + b"\n")
    store = Replay(groups=1, steps=3, seed=0)
    try:
        store.restore(tmp_path)
    except CheckpointError as refusal:
        if "replay.jsonl: cannot be read" not in str(refusal):
            raise AssertionError(str(refusal)) from refusal
    else:
        store.drawn(2)


HEADERS = {
    "a giant length": struct.pack("<Q", 2**63) + b"{}",
    "a length beyond the file": struct.pack("<Q", 10**6) + b"{}",
    "nothing": b"",
    "no JSON": struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
    "deep nesting": struct.pack("<Q", len(DEEP)) + DEEP,
    "places outside": struct.pack("<Q", 58) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,99999]}}',
    "a pickle": pickle.dumps([1, 2]),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_tensors_with_a_false_header_are_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(HEADERS[kind])
    with pytest.raises(CheckpointError, match=r"cannot be read: .*; restore it from an intact copy"):
        check_tensors({"a": torch.zeros(9)}, tmp_path)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(file: Path, **settings: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **settings}), encoding="utf-8")


def test_a_model_of_pickles_is_opened_without_running_them(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    torch.save({"a": Bomb(tmp_path / "mark")}, model / "more.bin")
    shutil.copy(model / "more.bin", model / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be opened"):
        load_language_model(str(model), "float32")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}),
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}}),
        ("config.json", {"trust_remote_code": True, "model_type": "evil"}),
        ("config.json", {"attn_implementation": "evil/kernel"}),
    ],
)
def test_code_that_comes_with_a_model_is_never_run(
    file: str, settings: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n", encoding="utf-8")
    change(model / file, **settings)
    for opens in (lambda: load_language_model(str(model), "float32"), lambda: read_shape(str(model))):
        try:
            opens()
        except GadflyError as refusal:
            if "\n" in str(refusal) or "model" not in str(refusal):
                raise AssertionError(str(refusal)) from refusal
        assert not mark.exists()


@pytest.mark.parametrize("base", [5, None, ["x"], "", "\x00", "../../nothing"])
def test_an_adapter_of_nothing_is_one_line(base: object, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(UserError, match="cannot be opened") as refusal:
        load_language_model(str(tmp_path), "float32")
    assert "\n" not in str(refusal.value)


def test_a_template_that_reaches_for_python_gets_nothing(model: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.mkdir('MARK') }}"
    (model / "chat_template.jinja").write_text(reach.replace("MARK", str(mark)), encoding="utf-8")
    try:
        load_language_model(str(model), "float32")[1].prompt_tokens(())
    except UserError as refusal:
        if "chat template refuses" not in str(refusal):
            raise AssertionError(str(refusal)) from refusal
    assert not mark.exists()
