"""The memory plan: its formula against what a step takes and numbers worked by hand, and the command."""

import importlib.util
import inspect
import json
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig, Qwen2Config
from typer.testing import CliRunner

from benchmarks.plan import predicted_and_measured
from benchmarks.subjects import Shape, Size
from gadfly.cli import app
from gadfly.errors import ConfigError, UserError
from gadfly.logprobs import chunked_logprobs
from gadfly.recipe_file import load_recipe
from gadfly.sizing.activations import Packed, Passes, backward_bytes, head_bytes, kept_bytes
from gadfly.sizing.memory_plan import Workload, background_bytes, plan_memory, smallest_number_of_gpus
from gadfly.sizing.model_shape import ModelShape, read_shape, shape_of
from gadfly.sizing.step_cost import step_cost
from gadfly.stages.plan import parse_size, plan

CHECKOUT = Path(__file__).resolve().parents[1]
SMALL = Size(hidden=64, intermediate=192, layers=3, heads=4, key_heads=2, vocabulary=8192)
# hidden 8, feed-forward 12, 2 layers, 2 heads of 4 channels, 1 key head, 10 words, head of its own.
BY_HAND = LlamaConfig(
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=10,
    tie_word_embeddings=False,
)
SEVEN_B = Qwen2Config(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(
    ("rank", "recomputes"),
    [
        (0, False),
        pytest.param(0, True, marks=pytest.mark.slow),
        (8, False),
        pytest.param(8, True, marks=pytest.mark.slow),
    ],
)
def test_a_step_takes_what_the_formula_says_within_a_tenth(rank: int, recomputes: bool) -> None:
    shape = Shape(prompts=14, group_size=4, prompt_tokens=40, response_tokens=20)
    predicted, measured = predicted_and_measured(SMALL, shape, rank, recomputes=recomputes)
    assert 0.9 < measured / predicted < 1.1


@pytest.mark.parametrize("lengths", [(256, 128), pytest.param((64, 256), marks=pytest.mark.slow)])
def test_so_does_a_step_on_longer_texts_in_more_layers(lengths: tuple[int, int]) -> None:
    shape = Shape(prompts=3, group_size=4, prompt_tokens=lengths[0], response_tokens=lengths[1])
    size = replace(SMALL, layers=10, vocabulary=2048)
    predicted, measured = predicted_and_measured(size, shape, 0, recomputes=False)
    assert 0.9 < measured / predicted < 1.1


def test_parameters_are_those_counted_by_hand() -> None:
    shape = shape_of(BY_HAND)
    # q and o 8 x 8; k and v 8 x 4; gate, up and down 8 x 12; two norms.
    assert shape.layer_parameters == 2 * 64 + 2 * 32 + 3 * 96 + 2 * 8
    assert shape.root_parameters == 2 * 10 * 8 + 8
    assert shape.parameters == 2 * 496 + 168
    assert shape.decoder_parameters == shape.parameters - 80
    assert shape.adapter_parameters(3) == 2 * 3 * (2 * 16 + 2 * 12 + 3 * 20)
    assert shape_of(Qwen2Config(**{**SEVEN_B.to_dict(), "layer_types": None})).parameters == 7_615_616_512


def test_a_tied_head_is_counted_once() -> None:
    tied = shape_of(LlamaConfig(**{**BY_HAND.to_dict(), "tie_word_embeddings": True}))
    assert tied.is_tied
    assert tied.decoder_parameters == tied.parameters == 2 * 496 + 88


def test_activations_are_those_counted_by_hand() -> None:
    shape = shape_of(BY_HAND)
    # One prompt of 3 tokens and one response of 2, on a GPU.
    packed = Packed(1.0, 3, 1, 2)
    norm = 4 * 8 + 4 + 4 * 8
    layer = 2 * norm + 4 * (2 * 8 + 8 + 12) + 3 * 12 * 4 + (2 * 8 * 4 + 2 * 4) + 2 * 4 * 4
    around = 2 * 4 * 4 + 24 + norm
    assert kept_bytes(shape, packed, Passes(4, is_flex=True)) == 5 * (2 * layer + around)
    recomputed = Passes(4, is_flex=True, is_checkpointed=True)
    assert kept_bytes(shape, packed, recomputed) == 5 * (2 * 8 * 4 + around)
    assert backward_bytes(shape, packed, recomputed) == 5 * (layer + 2 * 12 * 4 + 8 * 4)
    # Two response tokens: 20 logits four times over, or less; and their last states.
    assert head_bytes(shape, packed, Passes(4, lora_rank=1)) == 2 * 8 * 4 + 20 * 4 * 4


def test_who_sees_whom_is_counted_once_a_pass_and_in_single_precision_on_a_cpu() -> None:
    shape = shape_of(BY_HAND)
    # Two groups of a prompt of 3 tokens and four responses of 2: eight tables of 2 queries and 5 keys.
    packed, pairs = Packed(2.0, 3, 4, 2), 8 * 2 * 5
    for passes in (Passes(4), Passes(4, is_autocast=True)):
        flex = replace(passes, is_flex=True)
        # Beside it, only what is attended: queries and results, and keys and values of 6 + 8 x 5 places.
        attended = 22 * 2 * 8 * 4 + (6 + 8 * 5) * 2 * 4 * 4
        on_flex = 22 * (2 * 8 + 2 * 4) * flex.product_bytes
        more = kept_bytes(shape, packed, passes) - kept_bytes(shape, packed, flex)
        assert more == 2 * (attended - on_flex) + pairs * 4


def test_weights_and_optimisers_are_those_counted_by_hand() -> None:
    shape = shape_of(BY_HAND)
    whole = plan_memory(Workload(shape, shape))
    assert whole.lasting["student"] == whole.lasting["reference"] == 4 * 1160
    assert whole.lasting["AdamW's moments"] == 2 * 4 * (1160 + 1080)
    assert whole.lasting["copy to sample from"] == 0
    halves = plan_memory(Workload(shape, shape, gpus=2))
    assert halves.lasting["student"] == 2 * 1160
    assert halves.lasting["copy to sample from"] == 4 * 1160
    assert halves.student["gathered"] == 4 * (2 * 496 + 168) + 496 * (4 + 4)
    adapters = plan_memory(Workload(shape, shape, lora_rank=3, weight_bytes=2))
    assert adapters.lasting["frozen model"] == 2 * 1160
    assert adapters.lasting["student"] == 4 * shape.adapter_parameters(3)


def test_the_local_sampler_copies_large_linear_layers_on_a_cpu_and_nothing_else() -> None:
    def copied(shape: ModelShape, **work: Any) -> float:
        return plan_memory(Workload(shape, shape, **work)).lasting["copy to sample from"]

    large, small = shape_of(SEVEN_B), shape_of(BY_HAND)
    # Queries and outputs, keys and values, the feed-forward part; and the map to logits.
    layer = 3584 * (2 * 3584 + 2 * 512 + 3 * 18944)
    linears = 28 * layer + 152064 * 3584
    assert copied(large, is_flex=False) == 4 * linears
    assert copied(large, is_flex=False, weight_bytes=8) == copied(large, is_flex=True) == 0
    assert copied(large, is_autocast=True) == 2 * linears
    assert copied(small, is_flex=False) == copied(large, is_flex=False, lora_rank=8) == 0
    # GPT-2's layers are of a class of their own, but for the map to logits.
    gpt2 = shape_of(GPT2Config())
    assert copied(gpt2, is_flex=False) == 4 * 50257 * 768


def test_a_background_checkpoint_is_copied_whole_by_one_process_and_moments_by_each() -> None:
    shape = shape_of(BY_HAND)
    weights = 4 * (1160 + 1080)
    assert background_bytes(Workload(shape, shape)) == (3 * weights, 2 * weights)
    assert background_bytes(Workload(shape, shape, gpus=4)) == (1.5 * weights, 0.5 * weights)
    adapters = 4 * 2 * shape.adapter_parameters(3)
    assert background_bytes(Workload(shape, shape, lora_rank=3, weight_bytes=2))[0] == 3 * adapters


@given(
    gpus=st.integers(2, 64),
    more=st.integers(1, 64),
    rank=st.sampled_from([0, 16]),
    sampler=st.sampled_from(["local", "vllm", "servers"]),
    is_autocast=st.booleans(),
    is_checkpointed=st.booleans(),
)
def test_more_gpus_never_need_more_a_gpu(
    gpus: int, more: int, rank: int, sampler: str, is_autocast: bool, is_checkpointed: bool
) -> None:
    # From two on: the copy to sample from and what is gathered come with the second process.
    shape = shape_of(BY_HAND)
    work = Workload(
        shape,
        shape,
        gpus=gpus,
        lora_rank=rank,
        sampler=sampler,  # type: ignore[arg-type]
        is_autocast=is_autocast,
        is_checkpointed=is_checkpointed,
    )
    assert plan_memory(replace(work, gpus=gpus + more)).peak <= plan_memory(work).peak


def test_a_peak_is_the_largest_sum_of_its_parts() -> None:
    shape = shape_of(BY_HAND)
    planned = plan_memory(Workload(shape, shape, gpus=4))
    parts = (planned.sampling, planned.discriminator, planned.student)
    always = sum(planned.lasting.values())
    assert planned.peak == pytest.approx(max(always + sum(part.values()) for part in parts))


def test_the_smallest_number_of_gpus_fits_and_one_less_does_not() -> None:
    shape = shape_of(SEVEN_B)
    work = Workload(shape, shape, is_autocast=True, is_checkpointed=True, sampler="servers")
    gpus = smallest_number_of_gpus(work)
    assert gpus is not None
    assert plan_memory(replace(work, gpus=gpus)).fits(work.gpu_memory)
    assert not plan_memory(replace(work, gpus=gpus - 1)).fits(work.gpu_memory)


def test_a_step_computes_and_moves_what_was_counted_by_hand() -> None:
    shape = shape_of(BY_HAND)
    work = Workload(
        shape,
        shape,
        gpus=2,
        batch_prompts=4,
        group_size=2,
        prompt_tokens=3,
        response_tokens=2,
        sampler="servers",
    )
    cost = step_cost(work)
    scored, own = 4 * (3 + 3 * 2), 4 * (3 + 2 * 2)
    assert (cost.trained_tokens, cost.read_tokens, cost.sampled_tokens) == (scored + own, own, 16)
    assert cost.operations == (6 * (scored * 1080 + own * 1160) + 2 * own * 1160) / 2
    # One pass each: layers twice, the rest once, and gradients; the reference once; the hand-over.
    gathered = 2 * 992 + 168
    moved = 4 * (2 * gathered + 2 * 1160 + 1160 + 1160) / 2
    assert cost.moved_bytes == moved


def test_logits_are_taken_in_the_chunks_of_the_reader() -> None:
    chunk = inspect.signature(chunked_logprobs).parameters["chunk_logits"].default
    shape = shape_of(SEVEN_B)
    least = head_bytes(shape, Packed(1.0, 1, 1, 1), Passes(4, lora_rank=1))
    most = head_bytes(shape, Packed(1.0, 1, 1, 1000), Passes(4, lora_rank=1))
    states = 3584 * 4
    tokens = chunk // 152064
    # A thousand tokens take no more logits at once than a chunk.
    assert most - 1000 * states == pytest.approx(tokens * (least - states))


@pytest.mark.parametrize("text", ["", "80", "80 XB", "-1GB", "0GB", "GB", "nan"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    if text == "80":
        assert parse_size(text) == 80
        return
    with pytest.raises(ConfigError, match="--gpu-memory"):
        parse_size(text)


def write_recipe(folder: Path, config: LlamaConfig | Qwen2Config | GPT2Config) -> Path:
    """A recipe whose student is a folder with nothing but a config."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    lines = ['name = "small"', "[student]", 'model = "model"']
    path = folder / "recipe.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_recipe_that_fits_is_told_part_by_part_without_a_run_folder(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, BY_HAND)
    done = CliRunner().invoke(app, ["plan", str(recipe), "--gpus", "8", "--gpu-memory", "24GiB"])
    assert done.exit_code == 0, done.output
    assert "fits: of 25.8 GB a GPU" in done.output
    assert "AdamW's moments" in done.output
    assert "estimated as" not in done.output
    assert {path.name for path in tmp_path.iterdir()} == {"model", "recipe.toml"}


def test_several_answers_a_prompt_are_counted(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, BY_HAND), ["teacher.samples_per_prompt=4"])
    # 256 prompts of 2048 tokens with 4 + 8 responses of 1536 to the discriminator, 8 to the student.
    assert "at full length: 8,912,896 trained on" in plan(recipe, 1, "24GB")


def test_host_memory_is_told_where_checkpoints_are_written_in_the_background(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, SEVEN_B)
    assert "host memory" not in plan(load_recipe(path), 8, "800GB")
    recipe = load_recipe(path, ["checkpoints.in_background=true"])
    # 7.6 and, without the map to logits, 7.1 billion weights in single precision, and two moments of each.
    line = "host memory for background checkpoints: 176 GB in the first process"
    assert line in plan(recipe, 1, "800GB").splitlines()
    line = "host memory for background checkpoints: 73.4 GB in the first process, 14.7 GB in each other"
    assert line in plan(recipe, 8, "800GB").splitlines()


def test_vllm_in_several_processes_is_not_planned(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, BY_HAND), ["sampling.backend=vllm"])
    with pytest.raises(UserError, match="one in each of 8 processes is not supported"):
        plan(recipe, 8, "24GB")


@pytest.mark.slow
@pytest.mark.parametrize("now", [1, 16])
def test_what_suffices_is_named_and_does(now: int, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, SEVEN_B), ["engine.precision=bfloat16"])
    with pytest.raises(UserError, match="what suffices: ") as refusal:
        plan(recipe, now, "80GB")
    assert "\n" not in str(refusal.value)
    advice = str(refusal.value).partition("what suffices: ")[2].split(", or ")
    assert advice
    for change in advice:
        settings, _, gpus = change.partition("--gpus ")
        overrides = [word for word in settings.split() if "=" in word]
        again = load_recipe(tmp_path / "recipe.toml", ["engine.precision=bfloat16", *overrides])
        assert "fits" in plan(again, int(gpus or now), "80GB")


def test_activations_of_another_architecture_are_said_to_be_estimated(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, GPT2Config(n_layer=2, n_embd=64, n_head=2)))
    assert "activations of gpt2 are estimated as for a Llama-like model" in plan(recipe, 1, "80GB")


def test_a_model_without_a_config_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config cannot be read") as refusal:
        read_shape(str(tmp_path))
    assert "\n" not in str(refusal.value)


def test_the_tables_in_the_document_are_what_the_command_prints() -> None:
    script = scaling_table()
    text = (CHECKOUT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert text.split(script.BEGIN)[1].split(script.END)[0] == script.tables()


def scaling_table() -> ModuleType:
    """The script, which has no suffix, as a module."""
    path = CHECKOUT / "scripts" / "scaling-table"
    spec = importlib.util.spec_from_loader("scaling_table", SourceFileLoader("scaling_table", str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
