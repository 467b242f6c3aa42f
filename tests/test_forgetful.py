"""The demo's student: what it sees, padded, cached and saved; and the demo's files."""

import json
import random
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaForCausalLM,
)

from gadfly.demo.forgetful import ForgetfulConfig, ForgetfulForCausalLM, ForgetfulModel
from gadfly.demo.models import (
    MAX_RESPONSE_TOKENS,
    PROMPT_TOKENS,
    ROWS,
    save_models,
    save_rows,
    word_tokenizer,
)
from gadfly.demo.scripted_teacher import judge, parse_prompt, prompt, random_records, vocabulary

RECORD, MEMORY, VOCABULARY = 4, 3, 30


def forgetful(num_layers: int = 2, **settings: object) -> ForgetfulForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = ForgetfulConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            record_tokens=RECORD,
            memory_tokens=MEMORY,
            initializer_range=0.5,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
            **settings,
        )
        return ForgetfulForCausalLM(config).double().eval()


def random_ids(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, VOCABULARY, (rows, columns), generator=generator)


def same(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def slow_logits(model: ForgetfulForCausalLM, ids: Tensor) -> Tensor:
    """Logits of one row without padding: plain Llama with a mask written by two loops."""
    plain = LlamaForCausalLM(deepcopy(model.config)).double().eval()
    plain.set_attn_implementation("sdpa")
    plain.load_state_dict(model.state_dict())
    count = len(ids)
    mask = torch.zeros(1, 1, count, count, dtype=torch.bool)
    for query in range(count):
        for key in range(query + 1):
            mask[0, 0, query, key] = key < RECORD or query - key < MEMORY
    return plain(ids[None], attention_mask=mask).logits[0]


def padded(texts: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask of texts of unlike length; the padding holds ordinary words."""
    width = max(len(text) for text in texts)
    ids, mask = random_ids(len(texts), width), torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        columns = slice(width - len(text), None) if side == "left" else slice(len(text))
        ids[row, columns], mask[row, columns] = text, 1
    return ids, mask


def test_the_mask_equals_two_loops() -> None:
    model = forgetful()
    for text in random_ids(2, 12):
        same(model(text[None]).logits[0], slow_logits(model, text))


# Eager attention takes its softmax in single precision.
@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-10), ("eager", 1e-4)])
@pytest.mark.parametrize("with_positions", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str, with_positions: bool, attention: str, tolerance: float) -> None:
    model = forgetful()
    model.set_attn_implementation(attention)
    texts = [text[:length] for text, length in zip(random_ids(3, 12), (12, 7, 2), strict=True)]
    ids, mask = padded(texts, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0) if with_positions else None
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    assert logits.isfinite().all()
    for row, text in enumerate(texts):
        same(logits[row, mask[row] == 1], slow_logits(model, text), tolerance)


@pytest.mark.parametrize("with_positions", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decoding_equals_the_full_pass(side: str, with_positions: bool) -> None:
    model = forgetful()
    lengths, num_new = (6, 2, 5), 5
    pairs = list(zip(random_ids(3, 12), lengths, strict=True))
    ids, mask = padded([text[:length] for text, length in pairs], side)
    cache = DynamicCache(config=model.config)
    last = [model(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits]
    for step in range(num_new):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
        new = torch.stack([text[length + step] for text, length in pairs])
        positions = mask.sum(-1, keepdim=True) - 1 if with_positions else None
        output = model(new[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache)
        last.append(output.logits)
    for row, (text, length) in enumerate(pairs):
        expected = slow_logits(model, text[: length + num_new])
        for step in range(num_new):
            same(last[1 + step][row, 0], expected[length + step])


def test_a_cache_needs_no_mask_where_nothing_is_padded() -> None:
    model = forgetful()
    (text,) = random_ids(1, 12)
    cache = DynamicCache(config=model.config)
    chunks = [model(chunk[None], past_key_values=cache).logits[0] for chunk in text.split(5)]
    same(torch.cat(chunks), slow_logits(model, text))


def test_only_the_last_logits_are_computed_on_request() -> None:
    model = forgetful()
    ids = random_ids(2, 12)
    same(model(ids, logits_to_keep=4).logits, model(ids).logits[:, -4:])


def test_embeddings_may_stand_for_ids() -> None:
    model = forgetful()
    ids = random_ids(2, 12)
    embeddings = model.get_input_embeddings()(ids)
    same(model(inputs_embeds=embeddings).logits, model(ids).logits)


def test_one_layer_forgets_what_is_older_than_its_memory_and_sees_the_rest() -> None:
    model = forgetful(num_layers=1)
    ids = random_ids(1, 12)
    logits = model(ids).logits[0, -1]
    for place in range(12):
        changed = ids.clone()
        changed[0, place] = (ids[0, place] - 3 + 1) % (VOCABULARY - 3) + 3
        difference = (model(changed).logits[0, -1] - logits).abs().max()
        if RECORD <= place < 12 - MEMORY:
            assert difference == 0
        else:
            assert difference > 1e-3


def test_padding_gives_no_gradient_of_its_own() -> None:
    model = forgetful()
    (text,) = random_ids(1, 7)

    def gradients(ids: Tensor, mask: Tensor) -> list[Tensor]:
        model.zero_grad()
        logits = model(ids, attention_mask=mask).logits
        (logits.log_softmax(-1)[mask == 1] ** 2).sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients(text[None], torch.ones(1, 7, dtype=torch.long))
    padding, real = torch.full((1, 4), 5), torch.ones(1, 7, dtype=torch.long)
    for ids, mask in (
        (torch.cat([padding, text[None]], dim=1), torch.cat([padding * 0, real], dim=1)),
        (torch.cat([text[None], padding], dim=1), torch.cat([real, padding * 0], dim=1)),
    ):
        for actual, wanted in zip(gradients(ids, mask), expected, strict=True):
            same(actual, wanted)


def test_a_mask_of_another_shape_is_refused() -> None:
    model = forgetful()
    ids = random_ids(1, 4)
    ready_made = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    for mask in (ready_made, torch.ones(1, 3), torch.ones(2, 4)):
        with pytest.raises(ValueError, match="a forgetful model needs"):
            model(ids, attention_mask=mask)


def test_packed_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="must count the real tokens"):
        forgetful()(random_ids(1, 4), position_ids=torch.tensor([[0, 1, 0, 1]]))


def test_generation_equals_choosing_the_best_word_again_and_again() -> None:
    model = forgetful()
    texts = [text[:length] for text, length in zip(random_ids(2, 8), (8, 5), strict=True)]
    ids, mask = padded(texts, "left")
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, text in enumerate(texts):
        for word in generated[row, 8:]:
            assert word == slow_logits(model, text)[-1].argmax()
            text = torch.cat([text, word[None]])
            if word == model.config.eos_token_id:
                break


def test_a_saved_model_opens_through_the_auto_classes(tmp_path: Path) -> None:
    model = forgetful()
    model.save_pretrained(tmp_path)
    ids = random_ids(2, 12)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, ForgetfulConfig)
    assert (config.record_tokens, config.memory_tokens) == (RECORD, MEMORY)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(opened, ForgetfulForCausalLM)
    same(opened(ids).logits, model(ids).logits)
    headless = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(headless, ForgetfulModel)
    same(headless(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    save_models(folder, seed=3)
    save_rows(folder, seed=3)
    return folder


def test_the_demo_models_are_tiny_and_of_their_kind(demo: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(demo / "student")
    discriminator = AutoModelForCausalLM.from_pretrained(demo / "discriminator")
    assert isinstance(student, ForgetfulForCausalLM)
    assert student.config.record_tokens == PROMPT_TOKENS == 13
    assert student.config.memory_tokens == 6
    assert 19_000 < student.num_parameters() < 21_000
    assert type(discriminator) is LlamaForCausalLM
    assert 110_000 < discriminator.num_parameters() < 118_000
    for model in (student, discriminator):
        end = word_tokenizer().eos_token_id
        assert model.generation_config is not None
        assert model.generation_config.eos_token_id == model.config.eos_token_id == end
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_equal_seeds_give_equal_files_and_leave_the_random_state_alone(demo: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    save_models(tmp_path, seed=3)
    save_rows(tmp_path, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    files = [path.relative_to(demo) for path in demo.rglob("*") if path.is_file()]
    assert len(files) == 2 * 6 + 3
    for file in files:
        assert (tmp_path / file).read_bytes() == (demo / file).read_bytes()
    save_models(tmp_path, seed=4)
    weights = Path("student/model.safetensors")
    assert (tmp_path / weights).read_bytes() != (demo / weights).read_bytes()


@pytest.mark.parametrize("role", ["student", "discriminator"])
def test_the_tokenizer_is_one_token_a_word_and_gives_the_text_back(demo: Path, role: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / role)
    text = " ".join(vocabulary())
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(set(ids)) == len(vocabulary())
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<end>",
        "<pad>",
        "<unk>",
    )
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id} & set(ids)


def test_control_strings_stay_text(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / "student")
    ids = tokenizer("anna <end> <pad>", split_special_tokens=True)["input_ids"]
    assert ids[1:] == [tokenizer.unk_token_id] * 2


def test_the_chat_template_is_the_prompt_itself(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / "student")
    for record in random_records(seed=0, count=50):
        turns = [{"role": "user", "content": prompt(record)}]
        rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert rendered == prompt(record)
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        assert ids == tokenizer(prompt(record))["input_ids"]
        assert len(ids) == PROMPT_TOKENS


def test_the_rows_are_valid_answers_to_disjoint_records(demo: Path) -> None:
    prompts, ids = set(), set()
    for name, count in ROWS.items():
        lines = (demo / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == count
        assert {tuple(row) for row in rows} == {("id", "prompt", "response")}
        assert all(judge(parse_prompt(row["prompt"]), row["response"]).valid for row in rows)
        assert all(len(row["response"].split()) < MAX_RESPONSE_TOKENS for row in rows)
        prompts |= {row["prompt"] for row in rows}
        ids |= {row["id"] for row in rows}
    assert len(prompts) == len(ids) == sum(ROWS.values())


def test_the_student_generates_from_a_rendered_prompt(demo: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo / "student")
    tokenizer = AutoTokenizer.from_pretrained(demo / "student", padding_side="left")
    records = random.Random(0).sample(random_records(seed=0, count=9), 3)
    batch = tokenizer([prompt(record) for record in records], return_tensors="pt")
    generated = model.generate(**batch, max_new_tokens=MAX_RESPONSE_TOKENS, do_sample=False)
    assert generated.shape[1] <= PROMPT_TOKENS + MAX_RESPONSE_TOKENS
