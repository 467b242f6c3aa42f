"""Each fault that an audit is to catch, planted into data, template or tokenizer, and clean data."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from audits import UNTRAINED, Fields, found, recipe, rows, write
from conftest import CHAT_TEMPLATE
from report_runs import Page, empty_run
from tokenizers import normalizers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from gadfly.analysis.audit_findings import CATALOGUE
from gadfly.errors import AlarmError, CheckpointError
from gadfly.groups import Branch
from gadfly.models import load_language_model
from gadfly.recipe_file import fields, load_recipe
from gadfly.records import Message, Row, TeacherResponse
from gadfly.stages.audit import audit, audit_warmup
from gadfly.stages.audit.identical import score_twice
from gadfly.stages.audit.rendering import template_findings, token_findings
from gadfly.stages.run import open_run
from gadfly.stages.warmup import warmup


def answering(change: Callable[[str], str]) -> list[Fields]:
    return [row | {"response": change(row["response"])} for row in rows(0)]


def with_tokenizer(model: Path, folder: Path, change: Callable[[PreTrainedTokenizerFast], object]) -> Path:
    copy = shutil.copytree(model, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(copy)
    change(tokenizer)
    tokenizer.save_pretrained(copy)
    return copy


@pytest.mark.parametrize("seed", range(5))
def test_clean_data_has_nothing_but_an_untrained_student(seed: int, tmp_path: Path, tiny_model: Path) -> None:
    findings = found(recipe(tmp_path, tiny_model, rows(seed)), f"seed={seed}")
    assert set(findings) <= UNTRAINED
    assert not any(findings.values())


PLANTED: dict[str, tuple[str, list[Fields], bool]] = {
    "answers end in a newline": ("white-space", answering(lambda text: text + "\n"), True),
    "answers begin with a space": ("white-space", answering(lambda text: " " + text), True),
    "the teacher thinks aloud": (
        "thinking-tags",
        answering(lambda text: f"<think>Well.</think>{text}"),
        True,
    ),
    "answers close with the template's end": (
        "control-strings",
        answering(lambda text: text + "<|im_end|>"),
        True,
    ),
    "the teacher's limit cut and said so": (
        "teacher-cut",
        [row | {"finish_reason": "length"} for row in rows(0)],
        True,
    ),
    "the teacher's limit cut and said nothing": (
        "teacher-cut",
        answering(lambda text: text + " It is said to be there for all to"),
        True,
    ),
    "one in five refuses": (
        "refusals",
        [
            row | {"response": "I'm sorry, but I can't help with that."} if place % 5 == 0 else row
            for place, row in enumerate(rows(0))
        ],
        False,
    ),
    "answers have slipped by a row": (
        "mis-paired",
        [row | {"response": rows(0)[place - 1]["response"]} for place, row in enumerate(rows(0))],
        False,
    ),
    "a prompt holds the template's end": (
        "control-strings-in-prompts",
        [rows(0)[0] | {"prompt": "Say <|im_end|> and go on."}, *rows(0)[1:]],
        False,
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_of_the_data_is_found_by_its_name_and_no_other(
    fault: str, tmp_path: Path, tiny_model: Path
) -> None:
    name, planted, is_mechanical = PLANTED[fault]
    findings = found(recipe(tmp_path, tiny_model, planted))
    assert {key: value for key, value in findings.items() if key not in UNTRAINED} == {name: is_mechanical}


@pytest.mark.parametrize(
    ("setting", "name", "is_mechanical"),
    [
        ("sampling.max_response_tokens=40", "cap-cuts-teacher", True),
        ("sampling.max_prompt_tokens=80", "over-long-prompts", False),
    ],
)
def test_a_cap_that_is_too_short_is_found(
    setting: str, name: str, is_mechanical: bool, tmp_path: Path, tiny_model: Path
) -> None:
    train = [
        {**row, "prompt": row["prompt"] + " Thank you." * (place % 3)} for place, row in enumerate(rows(0))
    ]
    findings = found(recipe(tmp_path, tiny_model, train), setting)
    assert findings[name] is is_mechanical
    assert set(findings) <= UNTRAINED | {name}


def test_answers_that_are_dropped_stop_nothing(tmp_path: Path, tiny_model: Path) -> None:
    path = recipe(tmp_path, tiny_model, rows(0))
    settings = ["sampling.max_response_tokens=90", "data.over_long_responses=drop"]
    assert found(path, *settings)["cap-cuts-teacher"] is False


def test_training_prompts_in_a_test_set_are_found_whatever_their_case(
    tmp_path: Path, tiny_model: Path
) -> None:
    leaked = [{"prompt": row["prompt"].upper() + "  "} for row in rows(0)[:3]]
    findings = found(recipe(tmp_path, tiny_model, rows(0), test=[*rows(1002, 20), *leaked]))
    assert findings["leak-into-test"] is True


def test_held_out_prompts_that_are_trained_on_are_found(tmp_path: Path, tiny_model: Path) -> None:
    findings = found(recipe(tmp_path, tiny_model, [*rows(0), *rows(1001, 2)]))
    assert findings["leak-into-valid"] is False


def test_held_out_prompts_in_a_test_set_are_found(tmp_path: Path, tiny_model: Path) -> None:
    shared = [{"prompt": row["prompt"].upper() + " "} for row in rows(1001, 20)[:2]]
    findings = found(recipe(tmp_path, tiny_model, rows(0), test=[*rows(1002, 20), *shared]))
    assert findings["test-in-valid"] is False
    assert set(findings) <= UNTRAINED | {"test-in-valid"}
    looked = json.loads((tmp_path / "runs/audited/audit.json").read_text(encoding="utf-8"))["audit"]
    (counts,) = looked["test_in_valid"]
    assert (counts["set"], counts["prompts"], counts["same"], counts["near"]) == ("asked", 22, 2, 0)
    run = empty_run(tmp_path)
    run.folder.write_json("audit.json", {"audit": looked})
    words = " ".join(Page(run.page()).words.split())
    assert "Of the 22 prompts of asked, 2 are held-out prompts too" in words.replace("\u00a0", " ")


def test_test_prompts_with_a_word_changed_are_found(tmp_path: Path, tiny_model: Path) -> None:
    train = [row | {"prompt": f"{row['prompt']} I ask since {row['response']}"} for row in rows(0)]
    test = [{"prompt": row["prompt"].replace("I ask since", "I ask as")} for row in train[:10]]
    path = recipe(tmp_path, tiny_model, train, test=test)
    findings = found(path, "sampling.max_prompt_tokens=400", "sampling.max_response_tokens=100")
    assert findings["near-duplicates"] is False
    assert "leak-into-test" not in findings


def test_a_template_without_a_generation_prompt_is_found(tmp_path: Path, tiny_model: Path) -> None:
    def drop_it(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.chat_template = CHAT_TEMPLATE[: CHAT_TEMPLATE.index("{% if add_generation_prompt")]

    model = with_tokenizer(tiny_model, tmp_path, drop_it)
    assert found(recipe(tmp_path, model, rows(0)))["no-generation-prompt"] is True


def test_a_template_whose_turn_ends_in_no_end_token_is_found(tmp_path: Path, tiny_model: Path) -> None:
    def rename_it(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.eos_token = "<|endoftext|>"

    model = with_tokenizer(tiny_model, tmp_path, rename_it)
    (model / "generation_config.json").write_text('{"eos_token_id": 0}', encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(model)
    findings = found(recipe(tmp_path, model, rows(0)))
    assert findings["other-end-of-turn"] is False


def test_a_tokenizer_that_changes_text_is_found(tiny_model: Path) -> None:
    _, renderer = load_language_model(str(tiny_model), "float32")
    renderer.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    responses = [TeacherResponse(row["response"]) for row in rows(0, 20)]
    tokens = renderer.batch_response_tokens([response.text for response in responses], [True] * 20)
    assert [found.name for found in token_findings(renderer, responses, tokens)] == ["round-trip"]


def test_a_text_that_is_not_what_its_tokens_say_scores_differently(tmp_path: Path, tiny_model: Path) -> None:
    _, renderer = load_language_model(str(tiny_model), "float32")
    asked = [Row(f"{n}", (Message("user", f"say {n}"),), (TeacherResponse(f"{n} ok"),)) for n in range(8)]
    honest = [Branch(tuple(renderer.response_tokens(f"{n} no", True)), True, f"{n} no") for n in range(8)]
    odd = [replace(branch, tokens=(*branch.tokens[:-1], 40, branch.tokens[-1])) for branch in honest]
    path = recipe(tmp_path, tiny_model, rows(0))
    with open_run(load_recipe(path, ["discriminator.reads=tokens"])) as run:
        assert score_twice(run, None, renderer, asked, honest).findings() == []
        (finding,) = score_twice(run, None, renderer, asked, odd).findings()
    assert (finding.name, finding.is_mechanical) == ("identical-text", True)
    with open_run(load_recipe(path)) as run:
        assert score_twice(run, None, renderer, asked, odd).findings() == []


def test_the_catalogue_names_settings_that_exist() -> None:
    known = {key for key, _ in fields()}
    sections = "|".join(sorted({key.partition(".")[0] for key in known if "." in key}))
    texts = [text for entry in CATALOGUE.values() for text in (entry.what, entry.cause, entry.advice)]
    named = {key for text in texts for key in re.findall(rf"\b(?:{sections})\.[a-z_]+", text)}
    assert len(named) > 5
    assert named - known == {"audit.json"}, "all but a file"


def test_answers_beyond_the_models_positions_are_looked_at_as_they_are_trained_on(
    tmp_path: Path, tiny_model: Path
) -> None:
    config = GPT2Config(vocab_size=259, n_positions=256, n_embd=16, n_layer=1, n_head=2, eos_token_id=2)
    model = GPT2LMHeadModel(config)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=2)
    model.save_pretrained(tmp_path / "short")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "short")
    some = [row | {"response": 20 * (row["response"] + " ")} for row in rows(0)]
    allowed = '["cap-cuts-teacher", "white-space"]'
    path = recipe(tmp_path, tmp_path / "short", some[20:])
    # The held-out ones are asked first.
    write(tmp_path / "valid.jsonl", some[:20])
    with open_run(load_recipe(path, ["sampling.max_response_tokens=40", f"audit.allow={allowed}"])) as run:
        audit(run)
        found = run.folder.read_json("audit.json")["audit"]
    assert found["identical_text"]["different"] == 0
    assert found["identical_text"]["texts"] >= 8
    assert "cap-cuts-teacher" in {finding["name"] for finding in found["findings"]}


@pytest.mark.parametrize(
    "template",
    [
        # Nothing stands between the user's turn and the answer, with or without a generation prompt.
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}",
        # The generation prompt opens a thought that finished turns do not show.
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        "{% for m in messages %}{{ raise_exception('no') if m.role != 'user' }}{{ m.content }}{% endfor %}",
    ],
)
def test_templates_of_other_makers_are_in_order(template: str, tiny_model: Path) -> None:
    _, renderer = load_language_model(str(tiny_model), "float32")
    renderer.tokenizer.chat_template = template
    assert template_findings(renderer) == []


def test_answers_without_their_end_of_turn_are_found(tiny_model: Path) -> None:
    _, renderer = load_language_model(str(tiny_model), "float32")
    responses = [TeacherResponse(f"answer {number}") for number in range(20)]
    texts = [response.text for response in responses]
    tokens = renderer.batch_response_tokens(texts, [True] * 20)
    assert token_findings(renderer, responses, tokens) == []
    (finding,) = token_findings(renderer, responses, [ids[:-1] for ids in tokens])
    assert (finding.name, finding.is_mechanical) == ("no-end-of-turn", True)


def test_a_mechanical_cause_ends_the_run_until_it_is_allowed_or_mended(
    tmp_path: Path, tiny_model: Path
) -> None:
    path = recipe(tmp_path, tiny_model, answering(lambda text: text + "\n"))
    for _ in range(2):
        with (
            open_run(load_recipe(path)) as run,
            pytest.raises(AlarmError, match=r"audit: white-space \(trailing space: teacher 100 % of 120"),
        ):
            audit(run)
    looked = (run.folder.path / "audit.json").read_bytes()
    with open_run(load_recipe(path, ['audit.allow=["white-space"]'])) as run:
        audit(run)
        assert (run.folder.path / "audit.json").read_bytes() == looked
    recipe(tmp_path, tiny_model, rows(0))
    with open_run(load_recipe(path)) as run:
        audit(run)
        assert (run.folder.path / "audit.json").read_bytes() != looked


def test_a_name_that_is_no_finding_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    path = recipe(tmp_path, tiny_model, rows(0))
    with pytest.raises(Exception, match="no finding of the audit; there are"):
        load_recipe(path, ['audit.allow=["whitespace"]'])


def test_a_warmed_up_student_that_runs_on_ends_the_run(tmp_path: Path, tiny_model: Path) -> None:
    path = recipe(tmp_path, tiny_model, rows(0))
    with open_run(load_recipe(path)) as run, pytest.raises(CheckpointError, match="gadfly warmup"):
        audit_warmup(run)
    with open_run(
        load_recipe(
            path, ["warmup.max_steps=64", "warmup.learning_rate=1e-9", "sampling.max_response_tokens=140"]
        )
    ) as run:
        warmup(run)
        with pytest.raises(AlarmError, match="audit-warmup: student-runs-on"):
            audit_warmup(run)
        assert run.folder.read_json("audit.json")["audit-warmup"]["trained"] is True


def test_a_few_steps_of_warmup_make_no_trained_student(tmp_path: Path, tiny_model: Path) -> None:
    with open_run(load_recipe(recipe(tmp_path, tiny_model, rows(0)), ["warmup.max_steps=2"])) as run:
        warmup(run)
        audit_warmup(run)
        looked = run.folder.read_json("audit.json")["audit-warmup"]
    assert {finding["name"] for finding in looked["findings"]} <= UNTRAINED
    assert not any(finding["mechanical"] for finding in looked["findings"])


def test_an_audit_says_what_the_run_takes(tmp_path: Path, tiny_model: Path) -> None:
    with open_run(load_recipe(recipe(tmp_path, tiny_model, rows(0)))) as run:
        audit(run)
        looked = json.loads((run.folder.path / "audit.json").read_text(encoding="utf-8"))["audit"]
    assert set(looked["estimate"]["seconds"]) == {"seqkd", "warmup", "gad"}
    assert 0 < looked["estimate"]["peak_bytes"] < looked["estimate"]["memory_bytes"]
    assert looked["cap"] == looked["cap"] | {"now": 200, "proposed": 128}
