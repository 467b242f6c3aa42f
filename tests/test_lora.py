"""Adapters of one frozen model against models of their own, and runs that are trained with them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import RECIPE, finish, kill_when, outcome, start
from tiny import forgetful_folder, random_groups, sharp_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel

from gadfly.attention import takes_attention
from gadfly.chat_template import Renderer
from gadfly.checkpoint import drop_checkpoints_after, latest_checkpoint
from gadfly.config import Optimizer
from gadfly.discriminator import Discriminator, load_discriminator, read_scores, save_discriminator
from gadfly.engine import Engine
from gadfly.errors import CheckpointError, ConfigError, UserError
from gadfly.groups import teacher_group
from gadfly.logprobs import LogprobReader, chunked_logprobs, has_plain_head
from gadfly.lora import SharedBase
from gadfly.models import load_language_model, save_language_model
from gadfly.objectives import sft_objective
from gadfly.packing import MicroBatch, micro_batches
from gadfly.recipe_file import load_recipe
from gadfly.records import Message, Row, TeacherResponse
from gadfly.samplers import LocalSampler, Request
from gadfly.stages.gad import gad
from gadfly.stages.generate import generate
from gadfly.stages.roles import open_base_of, open_writer
from gadfly.stages.run import Run, open_run
from gadfly.stages.warmup import warmup

RANK, ALPHA = 3, 12
GROUPS = random_groups(0, 4)
STUDENT_GROUPS = [group.only_students() for group in GROUPS]
LORA = ["student.lora_rank=4"]
ROW = Row(
    "7", (Message("user", "hi"),), (TeacherResponse("well then"), TeacherResponse("no", finished=False))
)


def shared_base(folder: Path, dtype: str = "float64", *, rank: int = RANK, alpha: int = ALPHA) -> SharedBase:
    model, renderer = load_language_model(str(folder), dtype)
    return SharedBase(model, renderer, str(folder), rank=rank, alpha=alpha, seed=0)


def trained(role: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What takes gradients."""
    return [(name, weight) for name, weight in role.named_parameters() if weight.requires_grad]


def shaken(role: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The role after what might have been training."""
    random_numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in trained(role):
            weight.add_(torch.randn(weight.shape, generator=random_numbers, dtype=weight.dtype) * 0.1)
    return role


@pytest.fixture
def base(tiny_model: Path) -> SharedBase:
    return shared_base(tiny_model)


def only_batch(groups: list[Any], *, shares_prompts: bool = True) -> MicroBatch:
    (batch,) = micro_batches(groups, 10**6, torch.device("cpu"), shares_prompts=shares_prompts)
    return batch


def merged(whole: PreTrainedModel, role: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Add the role's adapter to a model's weights, by hand; A and B by the name of the layer."""
    own = dict(role.named_parameters())
    pairs = {
        name.split(".lora_A.")[0]: (weight.detach(), own[name.replace("lora_A", "lora_B")].detach())
        for name, weight in own.items()
        if ".lora_A." in name
    }
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            whole.get_submodule(name).weight.add_(ALPHA / RANK * b @ a)
    return pairs


def assert_gradients_follow(role: PreTrainedModel, whole: PreTrainedModel, pairs: dict[str, Any]) -> None:
    """The gradients of A and B are those that the chain rule makes of the merged weight's."""
    own = dict(trained(role))
    for name, (a, b) in pairs.items():
        of_weight = ALPHA / RANK * whole.get_submodule(name).weight.grad
        for letter, gradient in (("A", b.T @ of_weight), ("B", of_weight @ a.T)):
            torch.testing.assert_close(
                own[f"{name}.lora_{letter}.default.weight"].grad, gradient, rtol=1e-9, atol=1e-12
            )
    assert any(weight.grad.abs().max() > 1e-4 for weight in own.values())


# One frozen model, three roles


@pytest.mark.parametrize("name", ["tiny", "forgetful", "gpt2"])
def test_a_new_adapter_changes_nothing(name: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = forgetful_folder(tmp_path) if name == "forgetful" else tiny_model
    if name == "gpt2":
        folder = tmp_path / "gpt2"
        GPT2LMHeadModel(
            GPT2Config(vocab_size=259, n_positions=64, n_embd=16, n_layer=2, n_head=2)
        ).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(tiny_model / file, folder)
    base = shared_base(folder)
    whole, _ = load_language_model(str(folder), "float64")
    role, decoder = base.language_model(str(folder)), base.decoder(str(folder))
    ids = torch.arange(3, 20)[None]
    assert torch.equal(role(input_ids=ids).logits, whole(input_ids=ids).logits)
    hidden = decoder(input_ids=ids).last_hidden_state
    assert torch.equal(hidden, whole.base_model(input_ids=ids).last_hidden_state)
    assert takes_attention(role) == takes_attention(decoder) == takes_attention(whole)
    assert has_plain_head(role) == has_plain_head(whole)
    shaken(role, 1)
    assert not torch.allclose(role(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_the_frozen_weights_are_in_memory_once_and_the_adapters_alone_are_trained(
    tiny_model: Path, base: SharedBase
) -> None:
    whole, _ = load_language_model(str(tiny_model), "float64")
    student, reference = base.language_model(str(tiny_model)), base.language_model(str(tiny_model))
    discriminator = Discriminator(base.decoder(str(tiny_model)), seed=0)
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for role in (student, reference, discriminator)
        for tensor in role.state_dict().values()
    }
    adapter = sum(weight.numel() for _, weight in trained(student))
    frozen = sum(weight.numel() for weight in whole.parameters())
    head = sum(weight.numel() for weight in discriminator.score_head.parameters())
    assert sum(held.values()) == 8 * (frozen + 3 * adapter + head)
    # Seven linear layers in each of the two of the decoder, and none at the end.
    for role, prefix in ((student, "model."), (discriminator.backbone, "")):
        names = [name for name, _ in trained(role)]
        assert len(names) == 2 * 7 * 2
        assert all(re.match(rf"{prefix}layers\..*\.lora_[AB]\.default\.weight$", name) for name in names)
    engine = Engine(discriminator, read_scores, micro_batch_tokens=100, optimizer=Optimizer())
    assert {name for name, _ in engine.weights()} == {
        *(f"backbone.{name}" for name, _ in trained(discriminator.backbone)),
        "score_head.weight",
        "score_head.bias",
    }
    assert len(engine.optimizer_state()) == 3 * len(list(engine.weights()))


@pytest.mark.parametrize("shares_prompts", [True, False])
def test_interleaved_roles_are_three_models_with_the_adapters_merged_into_them(
    shares_prompts: bool, tiny_model: Path, base: SharedBase
) -> None:
    student = shaken(base.language_model(str(tiny_model)), 1)
    reference = shaken(base.language_model(str(tiny_model)), 2).requires_grad_(False)
    discriminator = Discriminator(shaken(base.decoder(str(tiny_model)), 3), seed=0).eval()
    models = [load_language_model(str(tiny_model), "float64")[0] for _ in range(3)]
    whole_discriminator = Discriminator(models[2].base_model, seed=0).eval()
    student_pairs = merged(models[0], student)
    merged(models[1], reference)
    discriminator_pairs = merged(whole_discriminator.backbone, discriminator.backbone)
    batch = only_batch(GROUPS, shares_prompts=shares_prompts)
    policy = only_batch(STUDENT_GROUPS, shares_prompts=shares_prompts)

    def logprobs(model: PreTrainedModel) -> Tensor:
        hidden = policy.predicting_states(model.base_model(**policy.arguments()).last_hidden_state)
        # Chunks of four tokens: all but a few logits are made again in the backward pass.
        values, _ = chunked_logprobs(
            model.get_output_embeddings(), hidden, policy.tokens, 0.8, chunk_logits=4 * 259
        )
        return values

    def sample(model: PreTrainedModel) -> list[Any]:
        sampler = LocalSampler(model, frozenset({2}))
        return sampler.sample([Request((5, 6, 7), 4, "s")], temperature=1.0, max_response_tokens=12)

    # Forwards of all three, samples in between, then the backwards in another order.
    ours = logprobs(student)
    scores = discriminator(batch)
    with torch.no_grad():
        anchors = logprobs(reference)
    samples = sample(student)
    scores.square().sum().backward()
    discriminator(batch).sum().backward()
    (ours.exp() * (ours - anchors)).sum().backward()
    theirs, their_anchors = logprobs(models[0]), logprobs(models[1]).detach()
    their_scores = whole_discriminator(batch)
    (theirs.exp() * (theirs - their_anchors)).sum().backward()
    (their_scores.square().sum() + whole_discriminator(batch).sum()).backward()

    for mine, wanted in ((ours, theirs), (anchors, their_anchors), (scores, their_scores)):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(ours, anchors, atol=1e-3)
    assert_gradients_follow(student, models[0], student_pairs)
    assert_gradients_follow(discriminator.backbone, whole_discriminator.backbone, discriminator_pairs)
    torch.testing.assert_close(
        discriminator.score_head.weight.grad, whole_discriminator.score_head.weight.grad
    )
    wanted_samples = sample(models[0])
    assert [[s.tokens for s in group] for group in samples] == [
        [s.tokens for s in group] for group in wanted_samples
    ]
    assert samples != sample(load_language_model(str(tiny_model), "float64")[0])


def test_training_one_role_leaves_the_others_and_the_frozen_model_alone(
    tiny_model: Path, base: SharedBase
) -> None:
    student, other = base.language_model(str(tiny_model)), base.language_model(str(tiny_model))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    engine = Engine(student, LogprobReader(), micro_batch_tokens=100, optimizer=Optimizer())
    engine.forward_backward(GROUPS, sft_objective(GROUPS))
    assert engine.clip_gradients() > 0
    engine.step(1e-2)
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    # At the first step A has no gradient, since B is zero; weight decay moves it all the same.
    assert moved == {name for name in before if ".lora_" in name}
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name])


def test_adapters_are_in_single_precision_over_a_bfloat16_model(tiny_model: Path) -> None:
    base = shared_base(tiny_model, "bfloat16")
    role = base.language_model(str(tiny_model))
    assert {weight.dtype for _, weight in trained(role)} == {torch.float32}
    assert role.get_input_embeddings().weight.dtype == torch.bfloat16
    engine = Engine(role, LogprobReader(), micro_batch_tokens=100, optimizer=Optimizer())
    losses = []
    for _ in range(20):
        losses.append(engine.forward_backward(GROUPS, sft_objective(GROUPS))[1])
        engine.step(1e-2)
    assert losses[-1] < losses[0] - 0.1


# Saved and opened


def test_a_saved_student_opens_as_any_adapter_does_and_goes_on_to_the_last_bit(
    tiny_model: Path, tmp_path: Path, base: SharedBase
) -> None:
    role = shaken(base.language_model(str(tiny_model)), 1)
    save_language_model(role, base.renderer.tokenizer, tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert "model.safetensors" not in names
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (
        str(tiny_model),
        RANK,
        ALPHA,
    )
    assert config["target_modules"] == sorted(config["target_modules"])
    ids = torch.arange(3, 20)[None]
    logits = role(input_ids=ids).logits
    assert torch.equal(base.language_model(tmp_path)(input_ids=ids).logits, logits)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(theirs(input_ids=ids).logits, logits)
    ours, renderer = load_language_model(str(tmp_path), "float64")
    torch.testing.assert_close(ours(input_ids=ids).logits, logits)
    assert renderer.end_ids == base.renderer.end_ids
    # Merged: an ordinary model, to be sampled from, trained whole and saved whole.
    assert not [name for name in ours.state_dict() if "lora" in name]
    assert takes_attention(ours)
    save_language_model(ours, renderer.tokenizer, tmp_path / "whole")
    whole, _ = load_language_model(str(tmp_path / "whole"), "float64")
    torch.testing.assert_close(whole(input_ids=ids).logits, logits)


def test_a_saved_discriminator_opens_as_an_adapter_and_merged(
    tiny_model: Path, tmp_path: Path, base: SharedBase
) -> None:
    model = Discriminator(shaken(base.decoder(str(tiny_model)), 1), seed=0).eval()
    save_discriminator(model, base.renderer, tmp_path, [teacher_group(ROW, base.renderer, 20)])
    batch = only_batch(GROUPS)
    again, _ = load_discriminator(tmp_path, "float64", base)
    assert torch.equal(again(batch), model(batch))
    whole, _ = load_discriminator(tmp_path, "float64")
    torch.testing.assert_close(whole(batch), model(batch))
    assert not [name for name in whole.state_dict() if "lora" in name]
    adapter = tmp_path / "adapter_model.safetensors"
    original = shared_base(tiny_model).decoder(str(tiny_model))
    original.save_pretrained(tmp_path)
    assert adapter.exists()
    with pytest.raises(CheckpointError, match="not those that were saved"):
        load_discriminator(tmp_path, "float64", base)


def test_what_is_put_together_for_a_save_is_the_adapter_alone_and_gives_the_same_files(
    tiny_model: Path, tmp_path: Path, base: SharedBase
) -> None:
    student = shaken(base.language_model(str(tiny_model)), 1)
    model = Discriminator(shaken(base.decoder(str(tiny_model)), 2), seed=0)
    probe = [teacher_group(ROW, base.renderer, 20)]
    states = []
    for role, read in ((student, LogprobReader()), (model, read_scores)):
        engine = Engine(role, read, micro_batch_tokens=100, optimizer=Optimizer())
        states.append(engine.whole_state())
        assert states[-1].keys() == {name for name, _ in trained(role)}
    save_language_model(student, base.renderer.tokenizer, tmp_path / "all" / "student")
    save_language_model(student, base.renderer.tokenizer, tmp_path / "own" / "student", states[0])
    save_discriminator(model, base.renderer, tmp_path / "all" / "told", probe)
    save_discriminator(model, base.renderer, tmp_path / "own" / "told", probe, state=states[1])
    files = [file.relative_to(tmp_path / "all") for file in (tmp_path / "all").rglob("*") if file.is_file()]
    assert {file.name for file in files} >= {"adapter_model.safetensors", "score_head.safetensors"}
    for file in files:
        assert (tmp_path / "own" / file).read_bytes() == (tmp_path / "all" / file).read_bytes(), file


def test_what_is_no_adapter_of_the_model_is_refused_in_one_line(
    tiny_model: Path, tmp_path: Path, base: SharedBase
) -> None:
    role = base.language_model(str(tiny_model))
    role.save_pretrained(tmp_path / "adapter")
    other = shared_base(tiny_model, rank=RANK + 1)
    base.decoder(str(tiny_model)).save_pretrained(tmp_path / "decoder")
    broken = shutil.copytree(tmp_path / "adapter", tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    refusals: list[tuple[str, Callable[[], object]]] = [
        ("an adapter of rank 3 and alpha 12", lambda: other.language_model(tmp_path / "adapter")),
        ("no adapter_config.json, so this is no adapter", lambda: base.language_model(tmp_path / "nowhere")),
        ("the adapter is of another model", lambda: base.language_model(tmp_path / "decoder")),
        ("the adapter cannot be read", lambda: base.language_model(broken)),
        (
            "is an adapter already",
            lambda: SharedBase(role, base.renderer, str(tmp_path / "adapter"), rank=1, alpha=1, seed=0),
        ),
    ]
    for message, refused in refusals:
        with pytest.raises(UserError, match=message) as caught:
            refused()
        assert "\n" not in str(caught.value)


class Shelf(PreTrainedModel):
    """A model without a linear layer."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.words = torch.nn.Embedding(8, 4)


def test_a_model_without_linear_layers_is_refused(base: SharedBase) -> None:
    shelf = SharedBase(Shelf(PreTrainedConfig()), base.renderer, "shelf", rank=2, alpha=4, seed=0)
    with pytest.raises(
        UserError, match=r"student.lora_rank = 2: 'shelf' has no linear layers .*; set student.lora_rank = 0"
    ):
        shelf.language_model("shelf")


# The recipe


def test_rates_that_are_not_given_are_ten_times_those_of_full_fine_tuning(recipe_file: Path) -> None:
    recipe_file.write_text(
        'name = "a"\n[student]\nmodel = "m"\n[gad]\nlearning_rate = 3e-6\n', encoding="utf-8"
    )
    full, lora = load_recipe(recipe_file), load_recipe(recipe_file, ["student.lora_rank=8"])
    assert (full.student.lora_rank, full.warmup.learning_rate, full.seqkd.learning_rate) == (0, 1e-6, 5e-6)
    assert lora.gad.learning_rate == full.gad.learning_rate == 3e-6
    for section, rate in {"discriminator": 1e-5, "seqkd": 5e-5, "warmup": 1e-5}.items():
        # To the last bit, since a rate is shown as it is.
        assert getattr(lora, section).learning_rate == rate
    assert lora.discriminator.lm_learning_rate == 1e-4
    given = load_recipe(recipe_file, ["student.lora_rank=8", "warmup.learning_rate=1e-6"])
    assert given.warmup.learning_rate == 1e-6
    assert lora.model_copy(update={"student": full.student}).discriminator.reads == full.discriminator.reads


def test_another_discriminator_model_is_refused_with_lora(recipe_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"student.lora_rank = 4: all roles are adapters of one model"):
        load_recipe(recipe_file, [*LORA, "discriminator.model=other"])


# The stages


def test_over_half_precision_what_writes_and_scores_has_the_adapter_that_was_trained(
    recipe_file: Path, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Steps this small are lost where they are added to weights in bfloat16.
    settings = [*LORA, "student.dtype=bfloat16", "warmup.learning_rate=1e-4", "warmup.max_steps=4"]
    with open_run(load_recipe(recipe_file, settings)) as run:
        warmup(run)
        end = run.folder.stage("warmup") / "latest"
        writer = open_writer(run, end / "student").model
        base = open_base_of(run.recipe, end / "discriminator")
        other = load_recipe(recipe_file, [*settings, "student.lora_rank=5"])
        assert open_base_of(other, end / "student") is None, "of another rank, it is opened as one whole"
        assert "an adapter of another model, rank or alpha than the recipe's" in caplog.text
        assert open_base_of(run.recipe, tiny_model) is None
        scaled = tmp_path / "scaled"
        shutil.copytree(end / "student", scaled)
        made = json.loads((scaled / "adapter_config.json").read_text(encoding="utf-8"))
        (scaled / "adapter_config.json").write_text(
            json.dumps({**made, "use_rslora": True}), encoding="utf-8"
        )
        assert open_base_of(run.recipe, scaled) is None, "by another scale than a role's"
        damaged = tmp_path / "damaged"
        shutil.copytree(end / "student", damaged)
        (damaged / "adapter_config.json").write_text("{", encoding="utf-8")
        with pytest.raises(UserError, match=r"damaged' cannot be opened"):
            open_writer(run, damaged)
    ids = torch.arange(3, 20)[None]
    trained_one = shared_base(tiny_model, "bfloat16", rank=4, alpha=8).language_model(end / "student")
    logits = trained_one(input_ids=ids).logits
    assert torch.equal(writer(input_ids=ids).logits, logits)
    merged_one, _ = load_language_model(str(end / "student"), "bfloat16")
    assert not torch.equal(merged_one(input_ids=ids).logits, logits)
    assert base is not None
    # It scores its probe as it did when it was saved, or is refused.
    load_discriminator(end / "discriminator", "bfloat16", base)


def adapters(run: Run, stage: str, role: str) -> dict[str, Tensor]:
    last = latest_checkpoint(run.folder.stage(stage))
    assert last is not None
    return load_file(last.path / role / "adapter_model.safetensors")


def test_the_reference_is_the_student_that_warmup_left(recipe_file: Path) -> None:
    with open_run(load_recipe(recipe_file, [*LORA, "gad.max_steps=3", "gad.kl_coefficient=0.1"])) as run:
        warmup(run)
        gad(run)
        rows = [row for row in run.folder.rows("metrics.jsonl") if row["stage"] == "gad"]
        before, after = (adapters(run, stage, "student") for stage in ("warmup", "gad"))
    kl = [row["student/kl_nats"] for row in rows if "student/kl_nats" in row]
    assert kl[0] == pytest.approx(0, abs=1e-9)
    assert kl[-1] > 1e-5
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_the_discriminator_starts_from_the_adapter_that_learned_the_teachers_language(
    recipe_file: Path,
) -> None:
    settings = [
        "discriminator.lm_steps=3",
        "discriminator.learning_rate=1e-30",
        "discriminator.weight_decay=0",
    ]
    with open_run(load_recipe(recipe_file, [*LORA, *settings])) as run:
        warmup(run)
        learned, student = adapters(run, "discriminator-lm", "student"), adapters(run, "warmup", "student")
        discriminator = adapters(run, "warmup", "discriminator")
    assert len(discriminator) == len(learned)
    for name, value in discriminator.items():
        torch.testing.assert_close(
            value, learned[name.replace("base_model.model.", "base_model.model.model.")], rtol=0, atol=1e-12
        )
    assert any(not torch.allclose(value, student[name]) for name, value in learned.items())


def test_full_fine_tuning_goes_on_from_adapters_and_adapters_not_from_whole_models(
    recipe_file: Path, tmp_path: Path
) -> None:
    with open_run(load_recipe(recipe_file, LORA)) as run:
        warmup(run)
    start_from = f"gad.start_from={run.folder.stage('warmup') / 'latest'}"
    settings = [start_from, "gad.learning_rate=1e-30", "student.weight_decay=0", "gad.max_steps=1"]
    with open_run(load_recipe(recipe_file, [*settings, f"run_folder={tmp_path / 'full'}"])) as full:
        gad(full)
    last = full.folder.stage("gad") / "latest" / "student"
    merged_student, _ = load_language_model(str(run.folder.stage("warmup") / "latest" / "student"), "float32")
    for name, value in load_file(last / "model.safetensors").items():
        torch.testing.assert_close(value, merged_student.state_dict()[name], rtol=0, atol=1e-12)
    settings = [f"gad.start_from={full.folder.stage('gad') / 'latest'}", f"run_folder={tmp_path / 'back'}"]
    with (
        open_run(load_recipe(recipe_file, [*LORA, *settings])) as back,
        pytest.raises(CheckpointError, match="so this is no adapter"),
    ):
        gad(back)


def test_stages_that_go_on_from_a_checkpoint_end_as_those_that_were_not_stopped(
    recipe_file: Path, tmp_path: Path
) -> None:
    settings = [*LORA, "discriminator.lm_steps=2", "checkpoints.keep_last=9", "warmup.save_every=2"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with open_run(load_recipe(recipe_file, [*settings, f"run_folder={whole}"])) as run:
        warmup(run)
        gad(run)
    shutil.copytree(whole, stopped, symlinks=True)
    with open_run(load_recipe(recipe_file, [*settings, f"run_folder={stopped}"])) as run:
        for name, stage in (("warmup", warmup), ("gad", gad)):
            drop_checkpoints_after(run.folder.stage(name), 2)
            begun = run.folder.read_json(f"{name}/stage.json")
            run.folder.write_json(f"{name}/stage.json", {**begun, "done": False})
            stage(run)
    for name in ("discriminator-lm", "warmup", "gad"):
        assert outcome(stopped, (name,)) == outcome(whole, (name,))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_run_with_adapters_ends_as_one_that_was_not(
    tiny_model: Path, teacher_file: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    text = RECIPE.format(data=teacher_file, model=tiny_model).replace("[student]", "[student]\nlora_rank = 4")
    recipe.write_text(text.replace("[discriminator]", "[discriminator]\nlm_steps = 2"), encoding="utf-8")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish("run", recipe, undisturbed)
    assert kill_when((killed / "warmup" / "step-000002").exists, start("run", recipe, killed), 0.02)
    assert kill_when((killed / "gad" / "step-000004").exists, start("run", recipe, killed), 0.02)
    finish("run", recipe, killed)
    stages = ("seqkd", "discriminator-lm", "warmup", "gad")
    assert outcome(killed, stages) == outcome(undisturbed, stages)
    generations = "generations/same.jsonl"
    assert (killed / generations).read_bytes() == (undisturbed / generations).read_bytes()


# It learns


def held_out_loss(run: Run, source: str | Path, renderer: Renderer) -> float:
    model, _ = load_language_model(str(source), "float32")
    groups = [teacher_group(row, renderer, 12) for row in run.data.valid]
    _, loss = Engine(model, LogprobReader(), micro_batch_tokens=4096, optimizer=Optimizer()).forward_backward(
        groups, sft_objective(groups)
    )
    return loss


def test_both_roles_learn_in_warmup_what_carries_over_to_held_out_prompts(
    recipe_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    _, renderer = load_language_model(str(tiny_model), "float32")
    # Frozen random embeddings, which the tiny model's head is, would leave an adapter nothing to say.
    sharp = tmp_path / "sharp"
    save_language_model(sharp_model(tiny_model), renderer.tokenizer, sharp)
    settings = [
        f"student.model={sharp}",
        "student.lora_rank=8",
        "warmup.learning_rate=1e-2",
        "warmup.max_steps=50",
        "warmup.discriminator_every=0",
        "warmup.discriminator_only_steps=20",
        "warmup.discriminator_final_steps=0",
        "discriminator.learning_rate=1e-2",
        "discriminator.max_grad_norm=1.0",
        "warmup.save_every=100",
        "warmup.evaluate_every=100",
    ]
    with open_run(load_recipe(recipe_file, settings)) as run:
        warmup(run)
        before = held_out_loss(run, sharp, renderer)
        after = held_out_loss(run, run.folder.stage("warmup") / "latest" / "student", renderer)
        generate(run)
        answers = run.folder.rows("generations/same.jsonl")
        accuracies = [
            row["probe/accuracy"] for row in run.folder.rows("metrics.jsonl") if "probe/accuracy" in row
        ]
    assert after < 0.6 * before
    # The first is that of a new head.
    assert accuracies[-1] > 0.8
    finished = {
        model: sum(row["finished"] for row in answers if row["model"] == model)
        for model in ("base", "warmup")
    }
    assert finished["warmup"] > finished["base"] + 30
