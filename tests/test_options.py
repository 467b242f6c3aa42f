"""The options of GAD: idle they do nothing, a run that was killed goes on with them, and code needs leave."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gadfly.config import RewardConfig
from gadfly.data.dataset import load_rows
from gadfly.data.teachers import of_teachers
from gadfly.errors import CheckpointError, ConfigError, DataError, RunFolderError, UserError
from gadfly.groups import Branch, Group
from gadfly.losses import group_advantages
from gadfly.metrics import without_time
from gadfly.recipe_file import load_recipe
from gadfly.records import Message, Row
from gadfly.replay import Replay
from gadfly.reward_functions import RewardFunction, load_reward_functions, rate
from gadfly.stages.examples import Example
from gadfly.stages.gad import gad
from gadfly.stages.rewards import Rewards
from gadfly.stages.run import open_run
from gadfly.stages.warmup import warmup

ALL = (
    "gad.discriminator_rests_above=0.6",
    "gad.replay=2",
    "gad.replay_steps=3",
    "gad.reward=log_sigmoid",
    "discriminator.centring=0.01",
    'gad.rewards={short = {function = "rewards.py:short", weight = 0.5}}',
)
GROUP = Group("a", (5, 6), (Branch((7, 2), True, "x", "gpt", 0.5),), (Branch((8,), False, "\u2028\x00"),))


def short(prompt: str, responses: Sequence[str], teachers: Sequence[str]) -> list[float]:
    return [-float(len(text)) for text in responses]


def played(recipe: Path, folder: Path, *settings: str, function: RewardFunction = short) -> Path:
    with open_run(
        load_recipe(recipe, [f"run_folder={folder}", *settings]), reward_functions={"short": function}
    ) as run:
        warmup(run)
        gad(run)
    return folder


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / name).read_text(encoding="utf-8").split("\n")[:-1]
    return [without_time(json.loads(line)) for line in lines]


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted((folder / "gad" / "latest").resolve().rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_weights(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not mine[name].equal(theirs[name])] == []


def test_options_that_have_nothing_to_do_change_no_bit(
    recipe_file: Path, teacher_file: Path, tmp_path: Path
) -> None:
    named = tmp_path / "named.jsonl"
    lines = teacher_file.read_text(encoding="utf-8").splitlines()
    named.write_text("".join(json.dumps({**json.loads(line), "teacher": "one"}) + "\n" for line in lines))
    # Or it tells all apart at once, and rests.
    slow = "discriminator.learning_rate=1e-5"
    vanilla = played(recipe_file, tmp_path / "vanilla", slow)
    idle = played(
        recipe_file,
        tmp_path / "idle",
        slow,
        f"data.train={named}",
        "data.teachers={one = 1.0}",
        "gad.discriminator_rests_above=0.9999",
    )
    own = {"detail/accuracy/one", "detail/discriminator_skipped"}
    assert all(row.get("detail/discriminator_skipped", 0) == 0 for row in rows(idle, "metrics.jsonl"))
    assert_same_weights(vanilla, idle)
    assert rows(vanilla, "samples.jsonl") == rows(idle, "samples.jsonl")
    without = [{k: v for k, v in row.items() if k not in own} for row in rows(idle, "metrics.jsonl")]
    assert without == rows(vanilla, "metrics.jsonl")
    names = {name for row in rows(vanilla, "metrics.jsonl") for name in row}
    assert not names & own
    assert not any(name.startswith("detail/reward_share/") for name in names)
    assert not list((vanilla / "gad").rglob("replay.jsonl"))


class Killed(BaseException):
    """Ends a run as a kill does: nothing in the package catches it."""


def test_a_run_with_every_option_that_was_killed_ends_as_one_that_was_not(
    recipe_file: Path, tmp_path: Path
) -> None:
    whole = played(recipe_file, tmp_path / "whole", *ALL)
    calls = 0

    def fatal(prompt: str, responses: Sequence[str], teachers: Sequence[str]) -> list[float]:
        nonlocal calls
        calls += 1
        # Four groups a step: in the fourth step, after the checkpoint of the second.
        if calls == 14:
            raise Killed
        return short(prompt, responses, teachers)

    with pytest.raises(Killed):
        played(recipe_file, tmp_path / "killed", *ALL, function=fatal)
    assert (tmp_path / "killed" / "gad" / "step-000002" / "trainer" / "replay.jsonl").exists()
    again = played(recipe_file, tmp_path / "killed", *ALL)
    assert_same_weights(whole, again)
    for name in ("metrics.jsonl", "samples.jsonl", "gad/latest/trainer/replay.jsonl"):
        assert rows(whole, name) == rows(again, name)
    skipped = [row.get("detail/discriminator_skipped") for row in rows(whole, "metrics.jsonl")]
    assert {0.0, 1.0} <= set(skipped)


@pytest.mark.slow
def test_two_processes_with_every_option_are_one(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "def short(prompt, responses, teachers):\n    return [-len(text) for text in responses]\n"
    )
    # On the command line a path is relative to the current folder.
    options = ["student.dtype=float64", *(text.replace('"rewards', f'"{tmp_path}/rewards') for text in ALL)]
    one = played(recipe_file, tmp_path / "one", *options)
    two = tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    for stage in (["warmup"], ["gad", "--allow-code"]):
        command = [*launch, "--rdzv-endpoint=localhost:0", "-m", "gadfly", *stage, str(recipe_file)]
        ended = subprocess.run(
            [*command, f"run_folder={two}", *options], capture_output=True, text=True, timeout=250
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
    for mine, theirs in zip(rows(one, "metrics.jsonl"), rows(two, "metrics.jsonl"), strict=True):
        assert theirs == {
            key: pytest.approx(value, rel=1e-9, abs=1e-9) if isinstance(value, float) else value
            for key, value in mine.items()
        }


# Replay


def test_what_is_drawn_was_kept_of_the_last_steps_and_follows_from_seed_and_step() -> None:
    def filled() -> Replay:
        store = Replay(groups=2, steps=3, seed=4)
        for step in range(1, 9):
            store.keep(step, [Group(f"{step}.{place}", ()) for place in range(5)])
        return store

    drawn = [group.id for group in filled().drawn(9)]
    assert drawn == [group.id for group in filled().drawn(9)]
    assert len(set(drawn)) == 2
    assert {int(name.split(".")[0]) for name in drawn} <= {6, 7, 8}
    over_time = {group.id for step in range(9, 12) for group in filled().drawn(step)}
    assert len(over_time) > 2


def test_a_store_that_nothing_is_drawn_from_does_not_grow(tmp_path: Path) -> None:
    store = Replay(groups=2, steps=3, seed=4)
    for step in range(1, 500):
        store.keep(step, [Group(f"{step}.{place}", ()) for place in range(5)])
    store.snapshot()(tmp_path)
    assert len((tmp_path / "replay.jsonl").read_text().splitlines()) == 6
    assert len(store.drawn(500)) == 2


def test_a_store_that_was_saved_gives_what_it_would_have_given(tmp_path: Path) -> None:
    store, again = (Replay(groups=3, steps=5, seed=0) for _ in range(2))
    store.keep(1, [GROUP, Group("b", (1,))])
    write = store.snapshot()
    store.keep(2, [Group("c", (1,))])
    write(tmp_path)
    again.restore(tmp_path)
    assert {group.id: group for group in again.drawn(2)} == {"a": GROUP, "b": Group("b", (1,))}


def test_a_damaged_store_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "replay.jsonl").write_text("{}\n")
    with pytest.raises(CheckpointError, match=r"replay\.jsonl"):
        Replay(groups=1, steps=1, seed=0).restore(tmp_path)


# Teachers


def test_only_the_responses_of_the_teachers_named_are_used_and_the_others_counted(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a", "responses": ["1", "2"], "teacher": ["x", "y"]},
        {"prompt": "b", "response": "3", "teacher": "y"},
        {"prompt": "c", "response": "4"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = load_rows(str(tmp_path / "rows.jsonl"), needs_response=True)
    used = of_teachers("train", data, ["x"])
    assert [[response.text for response in row.responses] for row in used.rows] == [["1"]]
    assert used.bad_by_reason() == {"other-teacher": 3}
    assert of_teachers("train", data, []) is data
    with pytest.raises(DataError, match=r"data\.valid: .*data\.teachers = z; .* says None, x, y"):
        of_teachers("valid", data, ["z"])


def test_a_teachers_name_neither_steers_the_terminal_nor_fills_it(tmp_path: Path) -> None:
    names = ["\x1b]0;pwned\x07\n" + "x" * 10**5, *(f"t{number}" for number in range(50))]
    lines = [{"prompt": f"say {name[-4:]}", "response": "1", "teacher": name} for name in names]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError) as refused:
        of_teachers("train", load_rows(str(tmp_path / "rows.jsonl"), needs_response=True), ["z"])
    message = str(refused.value)
    assert message.isprintable()
    assert len(message) < 500
    assert message.endswith(" and 41 more")


# Code of the recipe


@pytest.fixture
def with_reward(recipe_file: Path) -> Path:
    """A recipe that names a file of code, which leaves a mark where it is run."""
    code = "from pathlib import Path\nPath(__file__).with_name('mark').touch()\n"
    body = "def short(prompt, responses, teachers):\n    return [-len(text) for text in responses]\n"
    recipe_file.with_name("rewards.py").write_text(code + body)
    text = recipe_file.read_text(encoding="utf-8")
    text += '[gad.rewards.short]\nfunction = "rewards.py:short"\nweight = 0.5\n'
    recipe_file.write_text(text.replace("max_steps = 6", "max_steps = 1"), encoding="utf-8")
    return recipe_file


def run_gadfly(*arguments: object) -> tuple[int, str]:
    command = [sys.executable, "-m", "gadfly", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, env=dict(os.environ))
    return ended.returncode, ended.stderr


def test_a_recipe_from_a_stranger_runs_no_code_and_trains_nothing(with_reward: Path) -> None:
    code, stderr = run_gadfly("run", with_reward)
    assert code == 2
    assert stderr.splitlines()[-1].endswith("read it, and if you trust it, give --allow-code")
    assert "Traceback" not in stderr
    assert not with_reward.with_name("mark").exists()
    assert not (with_reward.parent / "runs").exists()


def test_with_leave_the_code_is_run_by_gad_and_by_no_other_stage(with_reward: Path) -> None:
    assert run_gadfly("warmup", with_reward)[0] == 0
    assert not with_reward.with_name("mark").exists()
    assert run_gadfly("gad", with_reward)[0] == 2
    assert not with_reward.with_name("mark").exists()
    assert run_gadfly("gad", with_reward, "--allow-code")[0] == 0
    assert with_reward.with_name("mark").exists()
    steps = rows(with_reward.parent / "runs" / "tiny", "metrics.jsonl")
    assert any("detail/reward_share/short" in row for row in steps)


def test_a_run_does_not_go_on_with_other_code(with_reward: Path, tmp_path: Path) -> None:
    folder = played(with_reward, tmp_path / "run")
    (with_reward.with_name("rewards.py")).write_text("short = len\n")
    with pytest.raises(RunFolderError, match=r"gad\.rewards\.short\.function"):
        played(with_reward, folder)


def test_a_caller_who_brings_no_function_is_told_which_is_missing(with_reward: Path) -> None:
    with open_run(load_recipe(with_reward)) as run, pytest.raises(ConfigError, match=r"gad\.rewards\.short"):
        gad(run)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (None, "no such file"),
        ("", "the file has no function 'f'"),
        ("f = 3", "the file has no function 'f'"),
        ("import no_such_package", "ModuleNotFoundError"),
        ("def", "SyntaxError"),
    ],
)
def test_code_that_cannot_be_loaded_is_one_line(tmp_path: Path, code: str | None, reason: str) -> None:
    file = tmp_path / "mine.py"
    if code is not None:
        file.write_text(code)
    with pytest.raises(ConfigError, match=reason) as refusal:
        load_reward_functions({"own": RewardConfig(function=f"{file}:f")}, allows_code=True)
    assert str(refusal.value).startswith(f"gad.rewards.own = {file}:f: ")


def test_code_with_a_dataclass_and_late_annotations_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Rated:\n    value: float\n"
        "def f(prompt, responses, teachers):\n    return [Rated(2.0).value for _ in responses]\n"
    )
    config = RewardConfig(function=f"{tmp_path / 'json.py'}:f")
    found = load_reward_functions({"own": config}, allows_code=True)
    assert found["own"]("why?", ["a", "b"], []) == [2.0, 2.0]
    # Its name is that of a module, which stays what it was.
    assert sys.modules["json"] is json


def test_neither_unit_nor_offset_of_a_reward_matters(recipe_file: Path) -> None:
    reward = 'gad.rewards={short = {function = "rewards.py:short", weight = 0.5}}'
    texts = ("a", "bbbb", "cc", "ddd")
    students = tuple(Branch((7,), True, text) for text in texts)
    group = Group("a", (5, 6), (Branch((7, 2), True, "x"),), students)
    batch = [Example(Row("a", (Message("user", "why?"),)), group)]
    scores = torch.tensor([[0.3, -0.2, 0.9, 0.1]])

    def advantages(unit: float, offset: float) -> Tensor:
        def own(prompt: str, responses: Sequence[str], teachers: Sequence[str]) -> list[float]:
            return [offset + unit * len(text) for text in responses]

        recipe = load_recipe(recipe_file, [reward])
        with open_run(recipe, reward_functions={"short": own}) as run:
            return Rewards(run)(scores, batch, [group])[0]

    expected = group_advantages(scores) + 0.5 * group_advantages(torch.tensor([[1.0, 4.0, 2.0, 3.0]]))
    assert torch.allclose(advantages(1.0, 0.0), expected, atol=1e-6)
    assert torch.allclose(advantages(1.0, 1e9), expected, atol=1e-5)
    assert torch.allclose(advantages(1e39, 0.0), expected, atol=1e-5)


@pytest.mark.parametrize("returned", [[1.0], [1.0, float("nan")], [1.0, 2.0, 3.0], ["a", "b"], None])
def test_a_reward_that_is_no_number_for_each_response_names_the_prompt(returned: object) -> None:
    with pytest.raises(UserError, match=r"gad\.rewards\.own: of the prompt 'why\?'"):
        rate("own", lambda prompt, responses, teachers: returned, "why?", ["a", "b"], [])


def test_a_reward_that_fails_tells_its_line() -> None:
    def broken(prompt: str, responses: Sequence[str], teachers: Sequence[str]) -> list[float]:
        raise KeyError("answer")

    line = broken.__code__.co_firstlineno + 1
    with pytest.raises(UserError, match=rf"test_options\.py:{line}: KeyError: 'answer'"):
        rate("own", broken, "why?", ["a"], [])


@pytest.mark.parametrize(
    "wrong",
    [
        'gad.rewards={own = {function = "rewards.py"}}',
        'gad.rewards={own = {function = "rewards.py:f", weight = 0}}',
        'gad.rewards={discriminator = {function = "rewards.py:f"}}',
        "gad.discriminator_every=0",
        "gad.discriminator_rests_above=0.4",
        "discriminator.centring=-1",
        "gad.reward=other",
        "data.teachers={x = 0}",
    ],
)
def test_options_out_of_bounds_are_refused_by_name(recipe_file: Path, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong.partition("=")[0].replace(".", r"\.")):
        load_recipe(recipe_file, [wrong])
