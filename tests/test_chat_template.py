"""One renderer for both roles: text to tokens and back, with every tokenizer's habits."""

import copy
import logging
import os
import unicodedata
from pathlib import Path

import pytest
from conftest import CHAT_TEMPLATE, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from gadfly.chat_template import PLAIN_TEMPLATE, PROMPT_DATE, Renderer, has_invalid_utf8, load_renderer
from gadfly.errors import UserError
from gadfly.models import load_language_model, save_language_model
from gadfly.records import Message

END, START, END_OF_TEXT = 2, 1, 0
QUESTION = (Message("user", "hi"),)


@pytest.fixture(scope="module")
def chatml(tiny_model: Path) -> Renderer:
    """ChatML as in SmolLM2: PAD is EOS, and the generation config names a second end."""
    return load_language_model(str(tiny_model), "float32")[1]


@pytest.fixture(scope="module", params=["stories260k", "babyllama105"])
def plain(request: pytest.FixtureRequest) -> Renderer:
    """Real models without a chat template, with EOS = BOS = `<s>` and a tokenizer that adds it."""
    return shared_renderer(request.param)


@pytest.fixture(scope="module")
def smollm2() -> Renderer:
    """The real SmolLM2, where it has been fetched."""
    default = Path(__file__).resolve().parents[1] / "models" / "smollm2-135m-instruct"
    folder = Path(os.environ.get("GADFLY_SMOLLM2", default))
    if not folder.is_dir():
        pytest.skip(f"no {folder}: fetch it with scripts/fetch-smollm2, or set GADFLY_SMOLLM2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return load_renderer(tokenizer, GenerationConfig.from_pretrained(folder))


@pytest.fixture(params=["chatml", "stories260k", "babyllama105", "smollm2"])
def renderer(request: pytest.FixtureRequest) -> Renderer:
    """Each of them."""
    if request.param in ("chatml", "smollm2"):
        found: Renderer = request.getfixturevalue(request.param)
        return found
    return shared_renderer(request.param)


def shared_renderer(name: str) -> Renderer:
    folder = SHARED / "models" / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}: the shared models lie beside the checkout only where gadfly is developed")
    return load_language_model(str(folder), "float32")[1]


def word_tokenizer(template: str | None, *words: str, **special: str) -> PreTrainedTokenizerFast:
    """One token a word, ids in the order given."""
    vocabulary = {word: number for number, word in enumerate([*words, "<unk>"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", chat_template=template, **special
    )


def encode_text(renderer: Renderer, text: str) -> list[int]:
    """What the tokenizer makes of a text with its control tokens written out."""
    return renderer.tokenizer(text, add_special_tokens=False)["input_ids"]


# Responses


def test_a_response_ends_with_the_end_of_turn_if_and_only_if_it_finished(renderer: Renderer) -> None:
    unfinished = renderer.response_tokens("well then", finished=False)
    assert unfinished
    assert not renderer.end_ids & set(unfinished)
    assert renderer.response_tokens("well then", finished=True) == [*unfinished, renderer.end_id]
    assert renderer.response_tokens("", finished=True) == [renderer.end_id]
    assert renderer.response_tokens("", finished=False) == []


@pytest.mark.parametrize("control", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<s>", "</s>", "<unk>"])
def test_a_control_string_in_a_response_stays_text(control: str, renderer: Renderer) -> None:
    text = f"a{control}b{control}"
    tokens = renderer.response_tokens(text, finished=False)
    controls = set(renderer.tokenizer.all_special_ids) | renderer.end_ids
    if "|" in control and "babyllama105" in renderer.tokenizer.name_or_path:
        # It has no vertical bar: what a vocabulary lacks is lost, in either role.
        controls.remove(renderer.tokenizer.unk_token_id)
    else:
        assert renderer.response_text(tokens) == text
    assert not set(tokens) & controls


def test_end_of_turn_survives_although_padding_is_the_same_token(chatml: Renderer) -> None:
    assert chatml.tokenizer.pad_token_id == chatml.tokenizer.eos_token_id == chatml.end_id == END
    tokens = chatml.response_tokens("ok", finished=True)
    assert tokens[-1] == END
    assert chatml.response_text(tokens) == "ok"


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=20), finished=st.booleans())
def test_text_survives_tokens_and_back_and_so_both_roles_render_it_alike(
    chatml: Renderer, text: str, finished: bool
) -> None:
    tokens = chatml.response_tokens(text, finished)
    again = chatml.response_text(tokens)
    # Qwen's tokenizer composes characters first, whoever wrote them.
    assert again == unicodedata.normalize("NFC", text)
    assert chatml.response_tokens(again, finished) == tokens


@settings(deadline=None, max_examples=100)
@given(tokens=st.lists(st.integers(0, 258), max_size=12), finished=st.booleans())
def test_whatever_was_sampled_identical_text_gives_identical_tokens(
    chatml: Renderer, tokens: list[int], finished: bool
) -> None:
    text = chatml.response_text(tokens)
    reread = chatml.response_tokens(text, finished)
    assert chatml.response_tokens(chatml.response_text(reread), finished) == reread


@pytest.mark.parametrize("end", [END, END_OF_TEXT])
def test_the_text_of_a_response_holds_no_end_token_whichever_ended_it(chatml: Renderer, end: int) -> None:
    tokens = chatml.response_tokens("bye", finished=False)
    assert chatml.response_text([*tokens, end]) == "bye"
    assert chatml.response_text([end]) == ""
    assert chatml.response_text([]) == ""


def test_other_control_tokens_that_were_sampled_stay_visible(chatml: Renderer) -> None:
    word = chatml.response_tokens("x", finished=False)
    assert chatml.response_text([*word, START, *word, END]) == "x<|im_start|>x"
    assert chatml.response_text([*word, END, *word, END]) == "x<|im_end|>x"


def test_a_response_cut_within_a_character_is_counted_as_invalid_utf8(chatml: Renderer) -> None:
    whole = chatml.response_tokens("é", finished=False)
    assert len(whole) == 2
    assert has_invalid_utf8(chatml.response_text(whole[:1]))
    assert not has_invalid_utf8(chatml.response_text(whole))


# Prompts


def test_a_prompt_is_the_chat_template_with_the_generation_prompt(chatml: Renderer) -> None:
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chatml.prompt_tokens(QUESTION) == encode_text(chatml, expected)


def test_system_turn_and_earlier_turns_are_kept_whole(chatml: Renderer) -> None:
    conversation = (
        Message("system", "Be brief."),
        Message("user", "one?"),
        Message("assistant", "two."),
        Message("user", "three?"),
    )
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none?<|im_end|>\n"
        "<|im_start|>assistant\ntwo.<|im_end|>\n<|im_start|>user\nthree?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chatml.prompt_tokens(conversation) == encode_text(chatml, expected)


def test_the_plain_template_is_the_documented_text(plain: Renderer) -> None:
    conversation = (
        Message("system", "Be brief."),
        Message("user", "One?"),
        Message("assistant", "Two."),
        Message("user", "Three?"),
    )
    expected = "Be brief.\n\nUser: One?\n\nAssistant: Two.\n\nUser: Three?\n\nAssistant:"
    bos = plain.tokenizer.bos_token_id
    assert plain.prompt_tokens(conversation) == [bos, *encode_text(plain, expected)]


def test_bos_stands_once_before_the_plain_template_and_never_in_a_response(plain: Renderer) -> None:
    bos = plain.tokenizer.bos_token_id
    assert bos == plain.tokenizer.eos_token_id == plain.end_id
    prompt = plain.prompt_tokens(QUESTION)
    assert prompt[0] == bos
    assert prompt.count(bos) == 1
    assert plain.response_tokens("Once upon a time", finished=True).count(bos) == 1
    assert plain.response_tokens("Once upon a time", finished=False).count(bos) == 0


def test_a_tokenizer_that_adds_no_bos_gets_none() -> None:
    tokenizer = word_tokenizer(
        None, "<s>", "<end>", "User:", "Assistant:", "hi", bos_token="<s>", eos_token="<end>"
    )
    renderer = load_renderer(tokenizer, None)
    assert renderer.prompt_tokens(QUESTION) == [2, 4, 3]


def test_a_missing_template_is_told_once_at_load(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = word_tokenizer(None, "<end>", eos_token="<end>")
    with caplog.at_level(logging.WARNING):
        load_renderer(tokenizer, None)
        load_renderer(tokenizer, None)
    assert [record.message for record in caplog.records] == [
        f"{tokenizer.name_or_path} has no chat template; the plain one is used"
    ]
    assert tokenizer.chat_template == PLAIN_TEMPLATE


def test_a_saved_and_opened_student_renders_as_before(plain: Renderer, tmp_path: Path) -> None:
    model, renderer = load_language_model(plain.tokenizer.name_or_path, "float32")
    save_language_model(model, renderer.tokenizer, tmp_path)
    _, again = load_language_model(str(tmp_path), "float32")
    assert again.prompt_tokens(QUESTION) == plain.prompt_tokens(QUESTION)
    assert (again.end_ids, again.end_id) == (plain.end_ids, plain.end_id)
    # So does any other program that opens the folder and uses its template.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": "hi"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == plain.prompt_tokens(QUESTION)


def test_a_template_that_refuses_a_role_is_a_user_error_that_names_the_roles() -> None:
    template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{{ message['content'] }} {% endfor %}"
    )
    renderer = load_renderer(word_tokenizer(template, "hi", "<end>", eos_token="<end>"), None)
    assert renderer.prompt_tokens(QUESTION) == [0]
    with pytest.raises(UserError, match=r"roles system, user: System role not supported") as caught:
        renderer.prompt_tokens((Message("system", "hi"), *QUESTION))
    assert "\n" not in str(caught.value)


DATED = {
    "called": "{{ strftime_now('%d %b %Y') }} ",
    # As in Llama 3.
    "called if defined": (
        "{%- if not day is defined %}{%- if strftime_now is defined %}"
        '{%- set day = strftime_now("%d %b %Y") %}{%- else %}{%- set day = "none" %}{%- endif %}{%- endif %}'
        "{{- day + ' ' }}"
    ),
    # As in gpt-oss.
    "called in a macro": (
        "{%- macro header(who) -%}{{- strftime_now('%d %b %Y') + ' ' -}}{%- endmacro -%}{{ header('a') }}"
    ),
    "called in a loop": "{% for turn in messages %}{{ strftime_now('%d %b %Y') }} {% endfor %}",
}


@pytest.mark.parametrize("template", DATED.values(), ids=DATED.keys())
def test_a_template_that_asks_for_the_date_is_told_the_same_one_every_day(template: str) -> None:
    template += "{{ messages[0]['content'] }}"
    words = ("26", "Jul", "2024", "hi", "<end>")
    tokenizer = word_tokenizer(template, *words, eos_token="<end>")
    renderer = load_renderer(tokenizer, None)
    assert renderer.prompt_tokens(QUESTION) == [0, 1, 2, 3]
    assert tokenizer.chat_template == template, "what is saved with the student is the author's"


@pytest.mark.parametrize(
    "form", ["%Y-%m-%d", "%A, %B %d, %Y", "%d/%m/%y %H:%M:%S", "%-d %B", "%c", "week %W, day %j", "no date"]
)
def test_a_date_is_written_in_the_form_that_the_template_asks_for(chatml: Renderer, form: str) -> None:
    tokenizer = copy.deepcopy(chatml.tokenizer)
    tokenizer.chat_template = "{{ strftime_now('" + form + "') }}"
    tokens = load_renderer(tokenizer, None).prompt_tokens(QUESTION)
    assert tokens == encode_text(chatml, PROMPT_DATE.strftime(form))


def test_but_for_the_date_a_template_is_rendered_as_by_transformers(chatml: Renderer) -> None:
    # Space and line ends at the start depend on what stands before them.
    for start in ("", "\n", "\n\n", "  ", "  {% if true %}\n", " {%- if true %} "):
        end = "{% endif %}" if "if" in start else ""
        tokenizer = copy.deepcopy(chatml.tokenizer)
        tokenizer.chat_template = start + "a\n  {% set b = 1 %}\n b{# strftime_now #} c\n" + end
        expected = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        tokens = load_renderer(tokenizer, None).prompt_tokens(QUESTION)
        assert tokens == encode_text(chatml, expected), repr(start)


# Ends of turn


def test_end_ids_come_from_the_generation_config_and_the_tokenizer(chatml: Renderer) -> None:
    assert chatml.end_ids == {END, END_OF_TEXT}
    tokenizer = word_tokenizer(CHAT_TEMPLATE, "<eot>", "<end>", eos_token="<end>")
    assert load_renderer(tokenizer, None).end_ids == {1}
    assert load_renderer(tokenizer, GenerationConfig(eos_token_id=0)).end_ids == {0, 1}
    assert load_renderer(tokenizer, GenerationConfig(eos_token_id=[0, 2])).end_ids == {0, 1, 2}


@pytest.mark.parametrize(
    ("after_answer", "end_id"),
    [
        ("<eot>", 0),
        ("<end>", 1),
        ("<eot> <end>", 0),
        ("", 1),
    ],
)
def test_of_several_ends_the_one_the_template_writes_first_after_an_answer_is_canonical(
    after_answer: str, end_id: int
) -> None:
    # As in Phi-3: an end of turn after each message, and an end of text after the last.
    template = (
        "<eot> {% for message in messages %}{{ message['content'] }} "
        "{% if message['role'] == 'assistant' %}" + after_answer + " {% endif %}{% endfor %}"
    )
    tokenizer = word_tokenizer(
        template, "<eot>", "<end>", "hi", eos_token="<end>", additional_special_tokens=["<eot>"]
    )
    renderer = load_renderer(tokenizer, GenerationConfig(eos_token_id=[0, 1]))
    assert renderer.end_ids == {0, 1}
    assert renderer.end_id == end_id
    assert renderer.response_tokens("hi", finished=True) == [2, end_id]


def test_where_a_template_allows_no_answer_the_tokenizers_end_is_canonical() -> None:
    template = (
        "{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    )
    tokenizer = word_tokenizer(template, "<eot>", "<end>", "hi", eos_token="<end>")
    assert load_renderer(tokenizer, GenerationConfig(eos_token_id=[0])).end_id == 1


def test_no_end_of_turn_anywhere_is_a_user_error_that_says_what_to_do() -> None:
    with pytest.raises(UserError, match="set eos_token"):
        load_renderer(word_tokenizer(CHAT_TEMPLATE, "hi"), None)


# The real SmolLM2


def test_smollm2_renders_as_its_own_template_and_closes_with_im_end(smollm2: Renderer) -> None:
    turns = [{"role": "user", "content": "hi"}]
    ids = smollm2.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert smollm2.prompt_tokens(QUESTION) == ids
    assert smollm2.tokenizer.pad_token_id == smollm2.end_id
    whole = [*turns, {"role": "assistant", "content": "Hello there."}]
    rendered = encode_text(smollm2, smollm2.tokenizer.apply_chat_template(whole, tokenize=False))
    answer = smollm2.response_tokens("Hello there.", finished=True)
    assert rendered[: len(ids) + len(answer)] == ids + answer
