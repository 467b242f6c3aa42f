"""What the discriminator reads, where it reads it, and that a loaded one is the one that was saved."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from side_by_side import side_by_side
from tiny import forgetful_folder, random_groups
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from gadfly.chat_template import Renderer
from gadfly.discriminator import (
    Discriminator,
    load_discriminator,
    new_discriminator,
    read_scores,
    save_discriminator,
)
from gadfly.distributed.processes import Processes
from gadfly.engine import Engine
from gadfly.errors import CheckpointError, UserError
from gadfly.groups import Branch, Group, reread, teacher_group
from gadfly.packing import MicroBatch
from gadfly.recipe_file import load_recipe
from gadfly.records import Message, Row, TeacherResponse
from gadfly.stages.examples import Example
from gadfly.stages.roles import open_discriminator, open_student
from gadfly.stages.run import open_run

ROW = Row(
    "7", (Message("user", "hi"),), (TeacherResponse("well then"), TeacherResponse("no", finished=False))
)


def scores_of(model: Discriminator, groups: list[Group], micro_batch_tokens: int = 10**6) -> Tensor:
    return Engine(model, read_scores, micro_batch_tokens=micro_batch_tokens).forward(groups).values


@pytest.fixture(scope="module")
def double(tiny_model: Path) -> tuple[Discriminator, Renderer]:
    return new_discriminator(str(tiny_model), "float64", seed=1)


@pytest.fixture
def saved(tiny_model: Path, tmp_path: Path) -> Path:
    """A saved discriminator with two probe texts."""
    folder = tmp_path / "discriminator"
    folder.mkdir()
    model, renderer = new_discriminator(str(tiny_model), "float32", seed=1)
    save_discriminator(model, renderer, folder, [teacher_group(ROW, renderer, 20)])
    return folder


# What is read


@pytest.mark.parametrize("finished", [True, False])
def test_identical_text_in_either_role_gets_the_identical_score(
    finished: bool, double: tuple[Discriminator, Renderer]
) -> None:
    model, renderer = double
    # The student sampled a control token and another end of turn; the teacher wrote the same as text.
    start = renderer.tokenizer.convert_tokens_to_ids("<|im_start|>")
    sampled = (*renderer.response_tokens("x", False), start, *((0,) if finished else ()))
    text = renderer.response_text(sampled)
    row = replace(ROW, responses=(TeacherResponse(text, finished), TeacherResponse("longer than the other")))
    other = Branch(tuple(renderer.response_tokens("other", True)), True, "other")
    students = (other, Branch(sampled, finished, text))
    group = replace(teacher_group(row, renderer, 50), students=students)
    teacher, _, _, student = scores_of(model, reread([group], [row], renderer)).tolist()
    assert student == pytest.approx(teacher, abs=1e-14)


def test_finishing_is_seen_and_costs_or_earns_something(double: tuple[Discriminator, Renderer]) -> None:
    model, renderer = double
    responses = (TeacherResponse("well", finished=True), TeacherResponse("well", finished=False))
    group = teacher_group(replace(ROW, responses=responses), renderer, 20)
    finished, unfinished = scores_of(model, [group]).tolist()
    assert abs(finished - unfinished) > 1e-3


@pytest.mark.parametrize("name", ["tiny", "forgetful"])
def test_the_score_is_the_head_at_the_last_token_of_each_response(
    name: str, double: tuple[Discriminator, Renderer], tmp_path: Path
) -> None:
    model, _ = double
    if name == "forgetful":
        model, _ = new_discriminator(str(forgetful_folder(tmp_path)), "float64", seed=1)
    vocabulary = model.backbone.config.vocab_size
    groups = random_groups(0, 5, teachers=1, students=3, lengths=[0, 1, 4, 7], vocabulary=vocabulary)
    scores = scores_of(model, groups)
    branches = [(group.prompt_tokens, branch) for group in groups for branch in group.branches]
    assert len(scores) == len(branches)
    for score, (prompt, branch) in zip(scores, branches, strict=True):
        ids = [*prompt, *branch.tokens]
        assert (ids[-1] == 2) == branch.finished
        hidden = model.backbone(torch.tensor([ids])).last_hidden_state[0, -1]
        slow = hidden @ model.score_head.weight[0] + model.score_head.bias[0]
        assert float(score) == pytest.approx(slow.item(), abs=1e-10)


def test_scores_do_not_depend_on_the_cut_or_the_order_of_a_batch(
    double: tuple[Discriminator, Renderer],
) -> None:
    model, _ = double
    groups = random_groups(1, 6)
    whole = scores_of(model, groups)
    assert torch.allclose(scores_of(model, groups, micro_batch_tokens=70), whole, rtol=0, atol=1e-10)
    backwards = scores_of(model, groups[::-1], micro_batch_tokens=70).reshape(6, -1).flip(0)
    assert torch.allclose(backwards, whole.reshape(6, -1), rtol=0, atol=1e-10)


def test_scores_are_read_in_eval_mode_whatever_the_config_says_of_dropout(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.attention_dropout = 0.1
    model.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_model / file, tmp_path)
    groups = random_groups(2, 4)
    dropout, _ = new_discriminator(str(tmp_path), "float32", seed=1)
    dropout.train()
    scores = scores_of(dropout, groups)
    assert torch.equal(scores, scores_of(dropout, groups))
    without, _ = new_discriminator(str(tiny_model), "float32", seed=1)
    assert torch.equal(scores, scores_of(without, groups))


# A new discriminator


def test_a_new_one_has_the_weights_of_the_language_model_and_an_unbiased_random_head(
    tiny_model: Path,
) -> None:
    model, renderer = new_discriminator(str(tiny_model), "float32", seed=1)
    for name, value in AutoModel.from_pretrained(tiny_model).state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value)
    assert model.score_head.weight.shape == (1, 32)
    assert 0.01 < float(model.score_head.weight.detach().std()) < 0.03
    assert model.score_head.bias.tolist() == [0]
    assert renderer.end_ids == {0, 2}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_seed_decides_the_head(tiny_model: Path) -> None:
    torch.manual_seed(1)
    one, _ = new_discriminator(str(tiny_model), "float32", seed=5)
    torch.manual_seed(2)
    same, _ = new_discriminator(str(tiny_model), "float32", seed=5)
    other, _ = new_discriminator(str(tiny_model), "float32", seed=6)
    assert torch.equal(one.score_head.weight, same.score_head.weight)
    assert not torch.equal(one.score_head.weight, other.score_head.weight)


def test_head_and_scores_are_in_single_precision_over_a_bfloat16_backbone(tiny_model: Path) -> None:
    model, _ = new_discriminator(str(tiny_model), "bfloat16", seed=1)
    assert model.backbone.dtype == torch.bfloat16
    assert model.score_head.weight.dtype == torch.float32
    groups = random_groups(3, 20, lengths=range(3, 8))
    scores = scores_of(model, groups)
    assert scores.dtype == torch.float32
    # In half precision scores would tie by the dozen.
    assert len(scores.unique()) == len(scores)
    exact, _ = new_discriminator(str(tiny_model), "float32", seed=1)
    assert torch.allclose(scores, scores_of(exact, groups), atol=0.02)


# Saved and loaded


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_loaded_discriminator_scores_exactly_as_the_saved_one(
    dtype: str, tiny_model: Path, tmp_path: Path
) -> None:
    model, renderer = new_discriminator(str(tiny_model), dtype, seed=1)
    groups = random_groups(4, 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    save_discriminator(model, renderer, tmp_path, [teacher_group(ROW, renderer, 20)])
    again, renderer_again = load_discriminator(tmp_path, dtype)
    assert torch.equal(scores_of(again, groups), scores_of(model, groups))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert (renderer_again.end_ids, renderer_again.end_id) == (renderer.end_ids, renderer.end_id)
    assert renderer_again.prompt_tokens(ROW.messages) == renderer.prompt_tokens(ROW.messages)


def test_a_discriminator_may_be_loaded_in_a_coarser_type_than_it_was_saved_in(
    tiny_model: Path, tmp_path: Path
) -> None:
    exact, renderer = new_discriminator(str(tiny_model), "float32", seed=1)
    with torch.no_grad():
        exact.score_head.weight.mul_(20)
    save_discriminator(exact, renderer, tmp_path, [teacher_group(ROW, renderer, 20)])
    coarse, _ = load_discriminator(tmp_path, "bfloat16")
    groups = random_groups(5, 30)
    difference = (scores_of(coarse, groups) - scores_of(exact, groups)).abs()
    assert 0.01 < float(difference.max()) < 0.2


def test_the_backbone_is_an_ordinary_hugging_face_folder(saved: Path) -> None:
    backbone = AutoModel.from_pretrained(saved)
    model, _ = load_discriminator(saved)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], value)


def draw_head(saved: Path) -> None:
    head = {
        name: torch.randn(value.shape, generator=torch.Generator().manual_seed(0)) * 0.02
        for name, value in load_file(saved / "score_head.safetensors").items()
    }
    save_file(head, saved / "score_head.safetensors")


def edit_weights(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors["layers.0.self_attn.v_proj.weight"] *= -1
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})


def swap_letters(saved: Path) -> None:
    tokenizer = json.loads((saved / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["q"] = vocabulary["q"], vocabulary["e"]
    (saved / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


DAMAGES = [
    (draw_head, "probe text 0 scores"),
    (edit_weights, "not those that were saved"),
    (swap_letters, "tokenizer is not the one that was saved"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_another_head_other_weights_and_another_tokenizer_are_refused_at_load(
    damage: Callable[[Path], None], message: str, saved: Path
) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        load_discriminator(saved)


def open_role(processes: Processes, recipe: Path, saved: Path, model: Path) -> tuple[str, int]:
    """What a stage is told when it opens the discriminator, and how often this process reads with it."""
    reads = 0

    def counted(module: torch.nn.Module, batch: tuple[MicroBatch]) -> None:
        nonlocal reads
        reads += isinstance(module, Discriminator)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(counted)
    with open_run(load_recipe(recipe), processes) as run:
        student = open_student(run, model, temperature=1.0)
        try:
            open_discriminator(run, saved, model, None, student)
        except CheckpointError as refusal:
            return str(refusal), reads
        finally:
            hook.remove()
    return "", reads


def open_roles(processes: Processes, recipe: Path, saved: list[Path], model: Path) -> list[tuple[str, int]]:
    return [open_role(processes, recipe, folder, model) for folder in saved]


def test_a_stage_opens_what_was_saved_and_refuses_anything_else(
    recipe_file: Path, saved: Path, tiny_model: Path, tmp_path: Path
) -> None:
    # Both probe texts are of one pass.
    assert open_role(Processes(), recipe_file, saved, tiny_model) == ("", 1)
    for damage, message in DAMAGES:
        altered = shutil.copytree(saved, tmp_path / damage.__name__)
        damage(altered)
        refusal, _ = open_role(Processes(), recipe_file, altered, tiny_model)
        assert re.search(message, refusal)
        with pytest.raises(CheckpointError, match=re.escape(refusal)):
            load_discriminator(altered)


def test_many_processes_score_the_probe_together_and_refuse_alike(
    recipe_file: Path, saved: Path, tiny_model: Path, tmp_path: Path
) -> None:
    edited = shutil.copytree(saved, tmp_path / "edited")
    edit_weights(edited)
    first, second = side_by_side(open_roles, recipe_file, [saved, edited], tiny_model)
    assert first == second
    # A text each; every process by itself would take both.
    assert first[0] == ("", 1)
    with pytest.raises(CheckpointError, match=re.escape(first[1][0])):
        load_discriminator(edited)


@pytest.mark.parametrize("reads", ["text", "tokens"])
def test_an_answer_that_was_cut_within_a_character_is_no_damage(
    reads: str, recipe_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    row = Row("7", (Message("user", "hi"),), (TeacherResponse("\u00e9\u00e9"),))
    with open_run(load_recipe(recipe_file, [f"discriminator.reads={reads}"])) as run:
        student = open_student(run, tiny_model, temperature=1.0)
        role = open_discriminator(run, None, tiny_model, None, student)
        cut = teacher_group(row, role.renderer, 3)
        assert len(role.renderer.response_tokens(cut.teachers[0].text, False)) > 3
        role.snapshot(role.view([cut], [Example(row, cut)]), is_copy=False)(tmp_path)
    assert open_role(Processes(), recipe_file, tmp_path, tiny_model) == ("", 1)


def test_what_writes_a_discriminator_asks_its_tokenizer_for_nothing(
    recipe_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with open_run(load_recipe(recipe_file)) as run:
        student = open_student(run, tiny_model, temperature=1.0)
        role = open_discriminator(run, None, tiny_model, None, student)
        write = role.snapshot([teacher_group(ROW, role.renderer, 20)], is_copy=True)
        # What a call of a tokenizer asks for stays with it, and for a prompt it is this.
        role.renderer.prompt_tokens(ROW.messages)
        options = role.renderer.tokenizer.backend_tokenizer
        assert not options.encode_special_tokens
        write(tmp_path)
        assert not options.encode_special_tokens


def test_a_discriminator_that_was_saved_without_texts_is_opened(tiny_model: Path, tmp_path: Path) -> None:
    model, renderer = new_discriminator(str(tiny_model), "float32", seed=1)
    save_discriminator(model, renderer, tmp_path, [])
    again, _ = load_discriminator(tmp_path)
    assert torch.equal(again.score_head.weight, model.score_head.weight)


def test_a_language_model_is_no_discriminator(tiny_model: Path) -> None:
    with pytest.raises(CheckpointError, match="is no discriminator"):
        load_discriminator(tiny_model)


@pytest.mark.parametrize("file", ["score_head.safetensors", "probe.json"])
@pytest.mark.parametrize("content", [None, b"{}", b""])
def test_a_missing_or_broken_head_or_probe_is_refused_in_one_line(
    file: str, content: bytes | None, saved: Path
) -> None:
    (saved / file).unlink()
    if content is not None:
        (saved / file).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_discriminator(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_head_of_another_width_is_refused(saved: Path) -> None:
    save_file({"weight": torch.zeros(1, 5), "bias": torch.zeros(1)}, saved / "score_head.safetensors")
    with pytest.raises(CheckpointError, match="is broken"):
        load_discriminator(saved)


def test_a_missing_weight_is_refused_and_not_drawn_at_random(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    del tensors["layers.0.self_attn.v_proj.weight"]
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weight"):
        load_discriminator(saved)


def test_a_model_that_cannot_be_opened_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be opened"):
        new_discriminator(str(tmp_path / "nowhere"), "float32", seed=0)
