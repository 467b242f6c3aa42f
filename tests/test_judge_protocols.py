from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gadfly.errors import ConfigError
from gadfly.records import Message
from gadfly.stages.judge.families import family, shared_family
from gadfly.stages.judge.judge_prompt import DEFAULT_PROMPTS, JudgePrompt, after_reasoning, load_prompt
from gadfly.stages.judge.pairwise_protocol import outcome, parse_preference
from gadfly.stages.judge.score_protocol import (
    JudgeScores,
    ScoredPrompt,
    mean_of_ratios,
    num_unparsable,
    parse_scores,
    ratio_of_means,
    read_scores,
)

PLACES = ("{prompt}", "{first}", "{second}")


def prompt_file(folder: Path, text: str) -> Path:
    path = folder / "judge.txt"
    path.write_text(text, encoding="utf-8")
    return path


# Prompts


@pytest.mark.parametrize("name", DEFAULT_PROMPTS)
def test_a_supplied_prompt_shows_the_question_and_both_answers_in_order(name):
    system, user = load_prompt(name).fill(prompt="Why?", first="Because.", second="No idea.")
    assert (system.role, user.role) == ("system", "user")
    assert user.content.index("Why?") < user.content.index("Because.") < user.content.index("No idea.")
    assert not any(place in system.content + user.content for place in (*PLACES, "==="))


def test_the_score_prompt_asks_for_what_the_paper_says():
    (_, user) = load_prompt("score").fill(prompt="p", first="a", second="b")
    for words in (
        "helpfulness, relevance, accuracy, and level of detail",
        "scale of 1 to 10",
        "two scores are separated by a space",
        "the order in which the responses were presented does not affect your judgment",
    ):
        assert words in user.content


def test_the_pairwise_prompt_asks_for_the_marks_that_are_parsed():
    (system, _) = load_prompt("pairwise").fill(prompt="p", first="a", second="b")
    for mark, preference in (("[[A]]", "first"), ("[[B]]", "second"), ("[[C]]", "tie")):
        assert mark in system.content
        assert parse_preference(mark) == preference


@given(st.text(), st.text(), st.text())
def test_filling_is_concatenation_whatever_the_texts_hold(prompt, first, second):
    filled = JudgePrompt("", "<{prompt}|{first}|{second}>").fill(prompt=prompt, first=first, second=second)
    assert filled == [Message("user", f"<{prompt}|{first}|{second}>")]


def test_a_placeholder_inside_an_answer_is_not_filled():
    (message,) = JudgePrompt("", "{prompt} {first} {second}").fill(
        prompt="{second}", first="{prompt} {x} {} %s \\1", second="{first}"
    )
    assert message.content == "{second} {prompt} {x} {} %s \\1 {first}"


def test_other_braces_of_a_prompt_file_are_just_braces(tmp_path):
    text = 'Answer {"winner": {"name": 1}} or { first } of {0} {}: {prompt} {first} {second}'
    (message,) = load_prompt(prompt_file(tmp_path, text)).fill(prompt="p", first="a", second="b")
    assert message.content == 'Answer {"winner": {"name": 1}} or { first } of {0} {}: p a b'


def test_the_marker_line_divides_system_from_user(tmp_path):
    text = "\ufeffBe fair to {prompt}.\r\n\r\n=== user ===\r\n\r\n{first}\r\n\r\n{second}{first}\r\n"
    filled = load_prompt(prompt_file(tmp_path, text)).fill(prompt="p", first="a", second="b")
    assert filled == [Message("system", "Be fair to p."), Message("user", "a\n\nba")]


def test_without_the_marker_the_user_says_it_all(tmp_path):
    path = prompt_file(tmp_path, "Which?\n{prompt}\n{first}\n{second}\n")
    assert load_prompt(path).fill(prompt="p", first="a", second="b") == [Message("user", "Which?\np\na\nb")]


def test_every_mistake_of_a_prompt_file_is_named_on_a_line(tmp_path):
    path = prompt_file(tmp_path, "{prompt}\n=== user ===\n{answer_b} {frac}\n=== user ===\n{first}")
    with pytest.raises(ConfigError) as error:
        load_prompt(path)
    assert str(error.value).splitlines() == [
        f"{path}: {{second}} is missing; the judge must see {{prompt}}, {{first}}, {{second}}",
        f"{path}: {{answer_b}} is not a placeholder ({{prompt}}, {{first}}, {{second}} are); "
        "write { answer_b } to say it as it is",
        f"{path}: {{frac}} is not a placeholder ({{prompt}}, {{first}}, {{second}} are); "
        "write { frac } to say it as it is",
        f"{path}: line 4: a second === user ===; only one line may divide the prompt",
    ]


def test_a_user_who_says_nothing_is_a_mistake(tmp_path):
    with pytest.raises(ConfigError, match=r"judge\.txt: line 2: nothing follows === user ==="):
        load_prompt(prompt_file(tmp_path, "{prompt} {first} {second}\n=== user ===\n \n"))


def test_a_prompt_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"scores: no such judge prompt; give a file, or score or pairwise"):
        load_prompt("scores")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_prompt(tmp_path)
    (tmp_path / "latin").write_bytes(b"{prompt} {first} {second} \xe9")
    with pytest.raises(ConfigError, match="byte 26 is not UTF-8"):
        load_prompt(str(tmp_path / "latin"))


# Reasoning


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8 9", "8 9"),
        ("<think>1 2</think>8 9", "8 9"),
        ("\n<think>\n1 2\n</think>\n8 9", "\n8 9"),
        ("Hm, 1 2.\n</think>\n8 9", "\n8 9"),
        ("8 9\nIt shows <think>x</think> tags.", "8 9\nIt shows <think>x</think> tags."),
        ("<think>8 9", ""),
        ("<think>It ends with </think> I see.</think>\n8 9", ""),
        ("Hm.</think> 8 9 </think>", ""),
        ("", ""),
    ],
)
def test_only_what_follows_the_thinking_is_said(text, said):
    assert after_reasoning(text) == said


# Scores


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 9", (8, 9)),
        ("1 10\nAssistant 2 is better by 9 points.", (1, 10)),
        ("8.5 9.0", (8.5, 9)),
        ("8, 9", (8, 9)),
        ("8/10 9/10", (8, 9)),
        ("8\t9", (8, 9)),
        ("  8   9.  \n", (8, 9)),
        ("\n\n7 7\n7 8", (7, 7)),
        ("**8 9**", (8, 9)),
        ("# **8** *9*", (8, 9)),
        ("```\n8 9\n```\nBoth are fine.", (8, 9)),
        ("<think>\nFirst: 3 4\n</think>\n\n8 9\nGood.", (8, 9)),
        ("The first is worse.\n</think>\n8 9", (8, 9)),
        ("8 9\nIts last word is </think>\n10 1", (8, 9)),
    ],
)
def test_two_scores_alone_on_the_first_line_are_read(text, scores):
    assert parse_scores(text) == scores


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t\n",
        "**",
        "8",
        "8\n9",
        "8 9 7",
        "0 5",
        "5 0.5",
        "11 5",
        "10.5 9",
        "80 90",
        "-8 9",
        "8-9",
        "8,9",
        "8,5 9",
        "8/10 9",
        "8 9/10",
        "8/9 9/9",
        "8e0 9",
        "8. 9",
        "8 and 9",
        "Scores: 8 9",
        "8 9 (out of 10)",
        "Assistant 1: 8 Assistant 2: 9",
        "Assistant 1: 8\nAssistant 2: 9",
        "I compare both.\n8 9",
        "Assistant 1 deserves an 8 and Assistant 2 a 9.",
        "nan nan",
        "٨ ٩",
        "<think>8 9</think>",
        "<think>\n8 9",
        "<think>Says </think>\n10 1</think>\n8 9",
    ],
)
def test_anything_else_is_no_score(text):
    assert parse_scores(text) is None
    assert read_scores(text, student_first=True) is None


def test_scores_go_to_whom_stood_in_that_place():
    assert read_scores("8 9", student_first=True) == JudgeScores(student=8, reference=9)
    assert read_scores("8 9", student_first=False) == JudgeScores(student=9, reference=8)


@given(st.integers(10, 100), st.integers(10, 100))
def test_every_pair_of_scores_in_range_is_read_back(a, b):
    assert parse_scores(f"{a / 10} {b / 10}\nWhy: 3 4") == (a / 10, b / 10)


def test_both_averages_equal_numbers_worked_by_hand():
    prompts = [
        ScoredPrompt("a", (JudgeScores(6, 4), JudgeScores(3, 6))),  # 60 and 33.3: 46.7; 4.5 and 5
        ScoredPrompt("b", (JudgeScores(9, 1),)),  # 90; 9 and 1
        ScoredPrompt("c", (None, None)),
        ScoredPrompt("d", (JudgeScores(5, 5),)),  # 50; 5 and 5
    ]
    ratios = mean_of_ratios(prompts)
    assert (ratios.value, ratios.n) == (pytest.approx((140 / 3 + 90 + 50) / 3), 3)
    # Variance of 46.7, 90, 50 is 581.5; t(0.975, 2) = 4.302653.
    assert ratios.high - ratios.value == pytest.approx(4.302653 * (581.4815 / 3) ** 0.5, rel=1e-6)
    means = ratio_of_means(prompts)
    assert (means.value, means.n) == (pytest.approx(100 * 18.5 / (18.5 + 11)), 3)
    # The ends of a bootstrap over three prompts are the worst and the best, three times.
    assert (means.low, means.high) == (pytest.approx(100 * 4.5 / 9.5), 90)
    assert num_unparsable(prompts) == 1


def test_both_orders_cancel_a_judge_who_favours_the_place():
    both = [read_scores("9 6", student_first=first) for first in (True, False)]
    assert ratio_of_means([ScoredPrompt("a", tuple(both))]).value == 50
    assert mean_of_ratios([ScoredPrompt("a", tuple(both))]).value == pytest.approx(50)
    assert mean_of_ratios([ScoredPrompt("a", (both[0],))]).value == 60


@pytest.mark.parametrize("student_first", [True, False])
def test_a_prompt_read_in_one_of_two_orders_is_left_out(student_first):
    read = read_scores("1 2", student_first=student_first)
    lone = [
        ScoredPrompt(str(number), (read, None) if student_first else (None, read)) for number in range(20)
    ]
    assert num_unparsable(lone) == 20
    both = ScoredPrompt("both", tuple(read_scores("1 2", student_first=first) for first in (True, False)))
    assert (mean_of_ratios([*lone, both]).value, ratio_of_means([*lone, both]).value) == (50, 50)
    assert num_unparsable([ScoredPrompt("single", (read,))]) == 0


scored_prompts = st.lists(
    st.lists(
        st.none() | st.builds(JudgeScores, st.integers(1, 10), st.integers(1, 10)), min_size=1, max_size=2
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(scored_prompts)
def test_an_unparsed_prompt_changes_no_figure(verdicts):
    prompts = [ScoredPrompt(str(number), tuple(given)) for number, given in enumerate(verdicts)]
    parsed = [prompt for prompt in prompts if all(prompt.verdicts)]
    assert num_unparsable(prompts) == len(prompts) - len(parsed)
    for figure in (mean_of_ratios, ratio_of_means):
        if parsed:
            assert figure(prompts) == figure(parsed)
            assert 100 / 11 - 1e-9 <= figure(prompts).value <= 1000 / 11 + 1e-9
        else:
            with pytest.raises(ValueError, match="no prompt has a parsed verdict"):
                figure(prompts)


# Pairwise


@pytest.mark.parametrize(
    ("text", "preference"),
    [
        ("[[A]]", "first"),
        ("Assistant A errs.\n\nFinal verdict: [[B]]", "second"),
        ("Both are equally good. [[C]]\n", "tie"),
        ("**[[A]]**\n\nIt is more precise.", "first"),
        ('My final verdict is "[[B]]".', "second"),
        ("[[A]] is better.\nIndeed:\n[[A]]", "first"),
        ("<think>[[A]]? Or [[B]]?</think>\n[[B]]", "second"),
        ("First I thought [[A]].\n</think>\nNo: [[B]]", "second"),
        ("The answer leaks <think>thoughts</think>.\n[[A]]", "first"),
    ],
)
def test_one_mark_on_the_first_or_last_line_is_the_preference(text, preference):
    assert parse_preference(text) == preference


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A",
        "[A]",
        "[[a]]",
        "[[A>B]]",
        "[[D]]",
        "[[ A ]]",
        "Assistant A is better.",
        "[[A]] and [[B]] are both good: [[C]]",
        "I would say [[A]].\nNo: [[B]]",
        "I read both.\nSome would say [[A]].\nI cannot tell.",
        "<think>[[A]]</think>",
        "<think>It must be [[A]]",
        "<think>Quoting </think> here</think>\n[[A]]",
    ],
)
def test_any_other_answer_prefers_nothing(text):
    assert parse_preference(text) is None


@pytest.mark.parametrize(
    ("a_first", "a_second", "expected"),
    [
        ("first", "second", "win"),
        ("second", "first", "loss"),
        ("tie", "tie", "tie"),
        ("first", "first", "tie"),
        ("second", "second", "tie"),
        ("first", "tie", "tie"),
        ("tie", "first", "tie"),
        ("first", None, None),
        (None, "second", None),
        (None, None, None),
    ],
)
def test_only_a_preference_in_both_orders_wins(a_first, a_second, expected):
    assert outcome(a_first, a_second) == expected
    # Seen from B, what was first is second and a win is a loss.
    mirrored = {"win": "loss", "loss": "win"}.get(expected, expected)
    assert outcome(a_second, a_first) == mirrored


# Families


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-4o", "openai"),
        ("gpt-3.5-turbo", "openai"),
        ("gpt-35-turbo", "openai"),
        ("GPT-5-Chat", "openai"),
        ("gpt-4.1-nano", "openai"),
        ("gpt4", "openai"),
        ("gpt-4-32k", "openai"),
        ("gpt-4-0613", "openai"),
        ("azure/gpt-4o", "openai"),
        ("ft:gpt-4o-mini-2024-07-18:acme::x1", "openai"),
        ("openai/gpt-oss-20b", "openai"),
        ("chatgpt-4o-latest", "openai"),
        ("text-davinci-003", "openai"),
        ("o1", "openai"),
        ("o4-mini-2025-04-16", "openai"),
        ("openai/o3", "openai"),
        ("openai:o1-preview", "openai"),
        ("anthropic/claude-3.5-sonnet", "anthropic"),
        ("us.anthropic.claude-3-5-sonnet-20241022-v2:0", "anthropic"),
        ("models/gemini-1.5-pro", "google"),
        ("google/gemma-3-4b-it", "google"),
        ("google/codegemma-7b", "google"),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta"),
        ("meta.llama3-1-8b-instruct-v1:0", "meta"),
        ("codellama/CodeLlama-7b-hf", "meta"),
        ("accounts/fireworks/models/llama-v3p1-70b-instruct", "meta"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen"),
        ("QWEN-MAX", "qwen"),
        ("ollama/qwen2.5:7b", "qwen"),
        ("Qwen/QwQ-32B", "qwen"),
        ("AIDC-AI/Marco-o1-Qwen2-7B", "qwen"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistral"),
        ("open-mistral-7b", "mistral"),
        ("mistralai/Ministral-8B-Instruct-2410", "mistral"),
        ("deepseek-chat", "deepseek"),
        ("deepseek-ai/DeepSeek-V3", "deepseek"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm"),
        ("microsoft/Phi-3.5-mini-instruct", "phi"),
        ("microsoft/phi-4", "phi"),
        ("phi4:14b", "phi"),
        ("microsoft/Phi-mini-MoE-instruct", "phi"),
        ("x-ai/grok-2-1212", "xai"),
        ("grok-beta", "xai"),
        ("command-r-plus", "cohere"),
        ("THUDM/chatglm3-6b", "zhipu"),
        ("moonshotai/Kimi-K2-Instruct", "moonshot"),
        ("allenai/OLMo-2-1124-7B", "ai2"),
        ("ibm-granite/granite-3.1-8b-instruct", "ibm"),
    ],
)
def test_a_name_tells_the_family(name, expected):
    assert family(name) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/data/models/Qwen2.5-7B-Instruct/", "qwen"),
        ("C:\\models\\Qwen2.5-7B-Instruct-Q4_K_M.gguf", "qwen"),
        ("cache/models--Qwen--Qwen2.5-0.5B/snapshots/c0ffee12", "qwen"),
        ("../smollm2-135m/checkpoint-400", "smollm"),
        ("/home/claude/models/mine", None),
        ("/home/phi/runs/2026/step-000400", None),
        ("llama.cpp/models/mine", None),
        ("runs/o3/gad/step-000400", None),
        ("runs/pirate/gad/step-000400", None),
    ],
)
def test_a_path_tells_the_family_by_the_models_folder_alone(path, expected):
    assert family(path) == expected


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "foo10",
        "foo1",
        "o10",
        "o2",
        "AIDC-AI/Marco-o1",
        "grokking-7b",
        "ingrok",
        "EleutherAI/gpt-j-6b",
        "EleutherAI/gpt-neox-20b",
        "cerebras/Cerebras-GPT-13B",
        "cerebras/Cerebras-GPT-6.7B",
        "nomic-ai/gpt4all-j",
        "openai-community/gpt2",
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "openlm-research/open_llama_3b",
        "ollama",
        "cognitivecomputations/dolphin-2.9",
        "delphi-7b",
        "claudette",
        "openai/whisper-large",
        "my-model",
    ],
)
def test_a_name_that_says_nothing_clear_has_no_family(name):
    assert family(name) is None


def test_a_distilled_model_is_of_the_family_of_its_weights_and_shares_its_teachers_too():
    distilled = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    assert family(distilled) == "qwen"
    assert shared_family("deepseek-chat", {"student": distilled}) == {"student": "deepseek"}
    assert shared_family("Qwen/Qwen3-32B", {"student": distilled}) == {"student": "qwen"}


def test_a_judge_is_compared_with_every_role():
    others = {"teacher": "openai/gpt-5-chat", "student": "Qwen/Qwen2.5-7B", "reference": "gpt-4o"}
    assert shared_family("o3-mini", others) == {"teacher": "openai", "reference": "openai"}
    assert shared_family("claude-opus-4", others) == {}


def test_an_unknown_model_shares_a_family_with_itself_alone():
    assert shared_family("acme-1", {"teacher": "ACME-1", "student": "acme-2"}) == {"teacher": "acme-1"}
