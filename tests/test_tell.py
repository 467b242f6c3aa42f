"""What can be told apart and what must not be, on texts whose difference is known and on real answers."""

import random
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st

from gadfly.analysis.tell import MIN_PROMPTS, Pair, halves, same_length, tell_accuracy
from gadfly.data.dataset import load_rows
from gadfly.errors import DataError, UserError

# A few words are common and most are rare, as in a language.
WORDS = [f"w{number}" for number in range(300)]
FREQUENCIES = [1 / (number + 1) for number in range(300)]


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, FREQUENCIES, k=count))


def sentences(rng: random.Random, count: int) -> str:
    return " ".join(words(rng, rng.randint(6, 14)).capitalize() + "." for _ in range(count))


def alike(seed: int, count: int = 60, length: int = 40) -> list[Pair]:
    """Teacher and student from one distribution, with a topic that they share."""
    rng = random.Random(seed)
    return [
        Pair(
            f"about t{rng.random()}",
            *(f"t{number % 7} {words(rng, length)} t{number % 7} {words(rng, length)}" for _ in range(2)),
        )
        for number in range(count)
    ]


def with_trait(pairs: Sequence[Pair]) -> list[Pair]:
    return [replace(pair, student=f"{pair.student} arr") for pair in pairs]


def count_arr(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """How often a pirate speaks, and a number that says nothing."""
    return np.array(
        [
            [response.split().count("arr"), len(prompt)]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
    )


def test_identical_texts_give_exactly_one_half():
    pairs = [replace(pair, student=pair.teacher) for pair in alike(0)]
    figure = tell_accuracy(pairs)
    assert (figure.value, figure.n) == (0.5, 30)
    assert figure.low < 0.5 < figure.high


@pytest.mark.parametrize("text", ["", "   \n", "yes", "\x02\x03"])
def test_one_text_for_all_gives_exactly_one_half(text):
    assert tell_accuracy([Pair(f"say {n}", text, text) for n in range(20)]).value == 0.5


def test_texts_from_one_distribution_have_one_half_in_their_interval():
    figures = [tell_accuracy(alike(seed)) for seed in range(20)]
    covered = sum(figure.low <= 0.5 <= figure.high for figure in figures)
    # Of 20 intervals that each cover with 95 %, fewer than 17 do once in 60 times.
    assert covered >= 17


def test_a_trait_in_every_student_text_is_told_nearly_always():
    assert tell_accuracy(with_trait(alike(0))).value > 0.95


def test_a_trait_in_half_of_the_student_texts_is_told_half_as_well():
    pairs = alike(0, count=240)
    figure = tell_accuracy([*with_trait(pairs[:120]), *pairs[120:]])
    assert 0.6 < figure.low < figure.high < 0.9


@pytest.mark.parametrize("student", ["It is  4", "It is 4", "it is 4.", "It is 4.\n", "\uff29t is 4."])
def test_style_is_told_by_its_smallest_marks(student):
    # Spaces, the last full stop, case, a line break, a letter of another width.
    assert tell_accuracy([Pair(f"say {n}", "It is 4.", student) for n in range(40)]).value == 1


def test_a_teacher_without_spaces_is_told_by_a_character():
    rng = random.Random(0)
    han = [chr(0x4E00 + number) for number in range(200)]
    texts = ["".join(rng.choices(han, k=60)) for _ in range(80)]
    pairs = [Pair(f"say {n}", texts[n], texts[n + 40][:30] + "龍龘" + texts[n + 40][30:]) for n in range(40)]
    assert tell_accuracy(pairs).value > 0.9


def test_the_order_of_the_pairs_changes_nothing():
    pairs = with_trait(alike(3, count=30, length=5))
    twice = [*pairs, *(replace(pair, student="once more") for pair in pairs)]
    figure = tell_accuracy(twice)
    seen: list[Sequence[str]] = []

    def watched(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        # Another order of the rows would round another way.
        seen.append(responses)
        return count_arr(prompts, responses)

    for seed in range(3):
        shuffled = random.Random(seed).sample(twice, k=60)
        assert tell_accuracy(shuffled) == figure
        tell_accuracy(shuffled, watched)
    assert seen[0] == seen[1] == seen[2]


@given(st.lists(st.sampled_from(["ab", "AB", "a b", "a  B", "\uff21 b", "c"]) | st.text(max_size=3)))
def test_no_prompt_is_on_both_sides_and_the_sides_are_equal(prompts):
    pairs = [Pair(prompt, "yes", "no") for prompt in [*prompts, *map(str, range(20))]]
    train, test = halves(pairs)
    assert sorted([*train, *test], key=str) == sorted(pairs, key=str)
    sides = [
        {" ".join(unicodedata.normalize("NFKC", pair.prompt).casefold().split()) for pair in side}
        for side in (train, test)
    ]
    assert not sides[0] & sides[1]
    assert len(sides[1]) - len(sides[0]) in (0, 1)


@pytest.mark.parametrize(("count", "sizes"), [(20, (10, 10)), (21, (10, 11))])
def test_of_an_odd_number_one_prompt_more_is_tested_on(count, sizes):
    train, test = halves([Pair(str(number), "yes", "no") for number in range(count)])
    assert (len(train), len(test)) == sizes


def test_prompts_have_one_vote_each_however_many_pairs():
    pairs = [Pair(f"say {n}", "yes", "no") for n in range(40)]
    _, test = halves(pairs)
    # In 5 of 20 test prompts the student speaks like the teacher in two answers of three.
    tied = [Pair(pair.prompt.upper(), "yes", "yes") for pair in test[:5]]
    figure = tell_accuracy([*pairs, *tied, *tied])
    assert (figure.value, figure.n) == (pytest.approx((15 + 5 * 2 / 3) / 20), 20)


def test_what_is_learned_about_training_prompts_does_not_count():
    pairs = alike(1)
    train, test = halves(pairs)
    figure = tell_accuracy([*with_trait(train), *test])
    assert figure.low <= 0.5 <= figure.high


def test_what_shows_in_test_prompts_only_cannot_have_been_learned():
    train, test = halves([replace(pair, student=pair.teacher) for pair in alike(1)])
    marked = [replace(pair, student=f"arr {pair.student}") for pair in test]
    figure = tell_accuracy([*train, *marked])
    assert figure.low <= 0.5 <= figure.high


def test_a_longer_student_is_told_but_not_at_the_same_length():
    rng = random.Random(0)
    pairs = [Pair(f"say {n}", sentences(rng, 4), sentences(rng, 8)) for n in range(200)]
    assert tell_accuracy(pairs).low > 0.9
    figure = tell_accuracy(same_length(pairs))
    assert figure.low <= 0.5 <= figure.high


def test_a_student_cut_by_a_cap_is_told_but_not_at_the_same_length():
    rng = random.Random(0)
    pairs = [
        Pair(f"say {n}", sentences(rng, 6), " ".join(sentences(rng, 6).split()[:30])) for n in range(200)
    ]
    assert tell_accuracy(pairs).low > 0.9
    figure = tell_accuracy(same_length(pairs))
    assert figure.low <= 0.5 <= figure.high


def test_a_trait_is_told_at_the_same_length_too():
    rng = random.Random(0)
    pairs = [Pair(f"say {n}", sentences(rng, 4), "Arr! " + sentences(rng, 8)) for n in range(40)]
    assert tell_accuracy(same_length(pairs)).value == 1


texts = st.text(alphabet="ab .\n\u3000\u4e2d", max_size=30)


@given(texts, texts)
def test_same_length_leaves_the_beginnings_with_half_the_words_of_the_shorter(teacher, student):
    (pair,) = same_length([Pair("say it", teacher, student)])
    assert teacher.startswith(pair.teacher)
    assert student.startswith(pair.student)

    def count(text: str) -> int:
        # One a character where a script has no spaces.
        return len(text.replace("\u4e2d", " x ").split())

    expected = (min(count(teacher), count(student)) + 1) // 2
    assert count(pair.teacher) == count(pair.student) == expected


def test_few_prompts_are_an_error_that_counts_them():
    pairs = [Pair(f"say {n % 19}", str(n), "") for n in range(60)]
    with pytest.raises(DataError, match=r"^tell: 19 different prompts .* at least 20\. .*$"):
        tell_accuracy(pairs)
    with pytest.raises(DataError, match="0 different prompts"):
        halves([])


def test_the_interval_of_full_success_is_what_its_formula_gives_by_hand():
    figure = tell_accuracy([Pair(f"say {n}", "yes", "no") for n in range(MIN_PROMPTS)])
    # 11 times 1 and one 0: mean 11/12, variance 1/12, t(0.975, 11) = 2.200985, margin 2.200985 / 12.
    assert (figure.value, figure.n, figure.high) == (1, 10, 1)
    assert figure.low == pytest.approx(11 / 12 - 2.200985 / 12, abs=1e-6)


def real_pairs(name: str, teacher: str, student: str) -> list[Pair]:
    folder = SHARED / "data" / "test"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: the shared data lies beside the checkout only where gadfly is developed")
    of_teacher, of_student = (
        load_rows(str(folder / f"{name}.{who}.jsonl"), needs_response=True).rows for who in (teacher, student)
    )
    responses = {row.prompt: row.responses[0].text for row in of_student}
    return [Pair(row.prompt, row.responses[0].text, responses[row.prompt]) for row in of_teacher]


@pytest.mark.parametrize("cut", [list, same_length])
def test_two_real_teachers_are_told_apart_and_one_from_itself_is_not(
    cut: Callable[[list[Pair]], list[Pair]],
):
    apart = tell_accuracy(cut(real_pairs("vicuna80", "gpt-4-0314", "gpt-4o-2024-05-13")))
    assert apart.n == 40
    assert apart.low > 0.65
    itself = tell_accuracy(cut(real_pairs("vicuna80", "gpt-4-0314", "gpt-4-0314")))
    assert itself.value == 0.5


def test_given_features_are_all_the_classifier_sees():
    pairs = with_trait(alike(0))
    assert tell_accuracy(pairs, count_arr).value == 1
    assert tell_accuracy(pairs, lambda prompts, _: np.zeros((len(prompts), 3))).value == 0.5


def test_equal_answers_are_embedded_once_so_that_rounding_cannot_part_them():
    seen: list[tuple[str, str]] = []

    def unstable(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        seen.extend(zip(prompts, responses, strict=True))
        return np.random.default_rng(0).normal(size=(len(prompts), 5))

    pairs = [replace(pair, student=pair.teacher) for pair in alike(0)]
    assert tell_accuracy(pairs, unstable).value == 0.5
    assert len(seen) == len(set(seen)) == len(pairs)


def test_telling_by_words_needs_no_torch():
    program = (
        "import sys; from gadfly.analysis.tell import Pair, tell_accuracy;"
        "tell_accuracy([Pair(str(n), 'yes', 'no') for n in range(20)]);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.fixture(scope="module")
def stories() -> Path:
    folder = SHARED / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: the shared models lie beside the checkout only where gadfly is developed")
    return folder


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that reads both ways, with 16 positions and special tokens around a text."""
    import torch
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = ["[CLS]", "[SEP]", "[UNK]", *"abcdef"]
    inner = word_tokenizer(vocabulary, unknown="[UNK]", start="[CLS]", end="[SEP]")
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
    )
    folder = tmp_path_factory.mktemp("models") / "bert"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, whose 16 positions are the last of 18."""
    import torch
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    folder = tmp_path_factory.mktemp("models") / "roberta"
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *"abcdef"]
    config = RobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=18,
        pad_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        RobertaModel(config).save_pretrained(folder)
    inner = word_tokenizer(vocabulary, unknown="<unk>", start="<s>", end="</s>")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(folder)
    return folder


def word_tokenizer(vocabulary: list[str], *, unknown: str, start: str, end: str) -> Any:
    """Every word a token, between special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    number = {word: at for at, word in enumerate(vocabulary)}
    inner = Tokenizer(models.WordLevel(number, unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.BertProcessing((end, number[end]), (start, number[start]))
    return inner


def slow_features(folder: Path, prompt: str, response: str, context: int) -> np.ndarray:
    """One answer at a time, unpadded."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = tokenizer(f"{prompt}\n\n", split_special_tokens=True)["input_ids"]
    inside = tokenizer(response, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    while len(before) + len(inside) > context:
        (before if len(before) > context // 2 else inside).pop()
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder).eval()(torch.tensor([before + inside])).last_hidden_state
    return states[0, len(before) :].mean(0).numpy()


@pytest.mark.parametrize(
    ("model", "context"), [("tiny_model", 512), ("tiny_bert", 16), ("tiny_roberta", 16), ("stories", 512)]
)
def test_embedder_gives_the_mean_of_the_responses_last_hidden_states(
    model: str, context: int, request: pytest.FixtureRequest
):
    from gadfly.analysis.tell_model import open_embedder

    folder = request.getfixturevalue(model)
    rng = random.Random(0)

    def letters(count: int) -> str:
        return " ".join(rng.choices("abcdef", k=count))

    lengths = [(3, 5), (1, 1), (2, 9), (0, 4), (1000, 5), (4, 1000), (1000, 1000), (30, 200)]
    answers = [(letters(before), letters(inside)) for before, inside in lengths]
    answers.append(("a <s> <|im_end|> [SEP]", "b </s> <|im_end|> [CLS] c"))
    prompts, responses = zip(*answers, strict=True)
    features = open_embedder(str(folder))(prompts, responses)
    assert features.dtype == np.float32
    expected = [slow_features(folder, prompt, response, context) for prompt, response in answers]
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def test_a_response_without_a_token_has_zeros(tiny_model: Path):
    from gadfly.analysis.tell_model import open_embedder

    features = open_embedder(str(tiny_model))(["a", "", ""], ["", "", "b"])
    assert not features[:2].any()
    assert features[2].any()


def test_a_real_model_tells_a_trait_and_not_a_text_from_itself(stories: Path):
    from gadfly.analysis.tell_model import open_embedder

    embed = open_embedder(str(stories))
    rng = random.Random(0)
    tales = [
        f"Once upon a time there was a {rng.choice(('cat', 'dog', 'girl'))}. "
        f"{rng.choice(('She', 'He'))} liked to {rng.choice(('play', 'run', 'sing'))} all day."
        for _ in range(80)
    ]
    pairs = [Pair(f"story {n}", tales[n], tales[n + 40]) for n in range(40)]
    figure = tell_accuracy(pairs, embed)
    assert figure.low <= 0.5 <= figure.high
    assert tell_accuracy([replace(pair, student=pair.teacher) for pair in pairs], embed).value == 0.5
    assert tell_accuracy(with_trait(pairs), embed).value > 0.95


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path):
    from gadfly.analysis.tell_model import open_embedder

    with pytest.raises(UserError, match=r"^model '.*none' cannot be opened: .*$"):
        open_embedder(str(tmp_path / "none"))


def test_an_encoder_without_a_pooler_is_opened(tiny_roberta: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, RobertaForMaskedLM

    from gadfly.analysis.tell_model import open_embedder

    # As a masked language model is saved; its body is the same.
    RobertaForMaskedLM.from_pretrained(tiny_roberta).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_roberta).save_pretrained(tmp_path)
    features = [open_embedder(str(folder))(["a b"], ["c d"]) for folder in (tiny_roberta, tmp_path)]
    np.testing.assert_array_equal(*features)
