"""What things are called on the page, and numbers and model text as a person reads them."""

import math

from gadfly.statistics import Figure

MODELS: dict[str, tuple[str, str]] = {
    "base": ("Base", "the student before any training"),
    "seqkd": ("SeqKD", "SFT on the teacher's answers"),
    "seqkd-equal-time": ("SeqKD, equal time", "SFT for as long as warmup and GAD took"),
    "warmup": ("Warmup", "where GAD starts: one student after SFT"),
    "gad": ("GAD", "against the discriminator"),
    "discriminator-lm": (
        "Discriminator's LM",
        "the discriminator as a language model; not a student",
    ),
    "teacher": ("Teacher", "the model behind the answers"),
}
"""The models of a run in the order of the tables, each with a few words on what it is."""

STAGES: dict[str, str] = {
    "discriminator-lm": "Discriminator's language model",
    "seqkd": "SeqKD",
    "warmup": "Warmup",
    "gad": "GAD",
    "seqkd-equal-time": "SeqKD, equal time",
}

_FIGURES = {
    "valid_fraction": "valid share",
    "judge_score": "judge score",
    "judge_score_of_means": "judge score of means",
    "tell_accuracy": "tell accuracy",
    "tell_accuracy_same_length": "tell accuracy, same length",
    "rouge_l": "ROUGE-L",
    "response_tokens": "length, tokens",
    "finished_fraction": "finished share",
    "repetition": "repeated 4-grams",
}

EXPLANATIONS: dict[str, str] = {
    "judge_score": "0 to 100, beside the judge's own answer to the prompt: 50 is as good as that one. Mean "
    "over the prompts of answer / (answer + judge's own).",
    "judge_score_of_means": "The same scale, as the ratio of the mean scores.",
    "tell_accuracy": "How often an independent classifier tells a model's answers from the teacher's, on "
    "prompts it was not trained on. Lower is better; the goal is 0.5, chance.",
    "tell_accuracy_same_length": "The same with both answers cut to the same number of words, so that length "
    "gives nothing away.",
}
"""One line on each figure that its label does not explain."""

# How a sentence names a model, where that is not its label.
_SPOKEN = {"base": "the base model", "seqkd-equal-time": "SeqKD at equal time", "teacher": "the teacher"}


def model_label(name: str) -> str:
    """What a model is called; a further arm by its own name."""
    return MODELS[name][0] if name in MODELS else name


def spoken(name: str) -> str:
    """What a model is called in a sentence."""
    return _SPOKEN.get(name) or model_label(name)


def stage_label(name: str) -> str:
    """What a stage is called."""
    return STAGES.get(name, name)


def figure_label(name: str) -> str:
    """What a figure is called, its unit included.

    Example:
        >>> figure_label("variety_nats")
        'variety, nats'
    """
    if name in _FIGURES:
        return _FIGURES[name]
    stem, _, unit = name.rpartition("_")
    words = stem.replace("_", " ")
    if unit in ("fraction", "share") and stem:
        return f"{words} share"
    return f"{words}, {unit}" if unit in ("nats", "tokens", "seconds") and stem else name.replace("_", " ")


def number(value: float) -> str:
    """A finite number with about three digits that matter.

    Example:
        >>> [number(value) for value in (0.0004, 0.76632, 21.04, 1234.5, -3e9)]
        ['0.0004', '0.766', '21.0', '1,234', '-3e+09']
    """
    # A share that is exactly 1 keeps the digits of its neighbours; -0.0 loses its sign.
    size, value = abs(value), value + 0.0
    if size >= 1e6:
        return f"{value:.3g}"
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if 0 < size < 0.01:
        return f"{value:.2g}"
    return f"{value:.3f}" if size <= 1 else f"{value:.2f}"


def percent(share: float) -> str:
    r"""A share in whole percent, below 1 % with the digit that matters.

    Example:
        >>> percent(0.714), percent(0.0017)
        ('71\xa0%', '0.2\xa0%')
    """
    return f"{100 * share:.0f}\u00a0%" if share == 0 or share >= 0.01 else f"{100 * share:.1g}\u00a0%"


def duration(seconds: float) -> str:
    """A time in the unit a person would use.

    Example:
        >>> [duration(seconds) for seconds in (7.04, 130.0, 9000.0)]
        ['7 s', '2.2 min', '2.5 h']
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def counted(count: int, thing: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "step"), counted(1200, "step")
        ('1 step', '1,200 steps')
    """
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def listed(words: list[str]) -> str:
    """Words as a list in a sentence.

    Example:
        >>> listed(["base", "SeqKD", "GAD"])
        'base, SeqKD and GAD'
    """
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def shortened(text: str, limit: int) -> str:
    r"""A text of at most about `limit` characters, its middle left out and counted.

    Example:
        >>> shortened("a" * 600 + "z" * 400, 10)
        'aaaaaaaa\n[… 990 of 1,000 characters left out …]\nzz'
    """
    if len(text) <= limit:
        return text
    tail = limit // 5
    note = f"[… {len(text) - limit:,} of {len(text):,} characters left out …]"
    return f"{text[: limit - tail]}\n{note}\n{text[len(text) - tail :]}"


def interval(low: float, high: float) -> str:
    """The two ends of an interval, or that there is none."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "no interval"
    return f"{number(low)}–{number(high)}"  # noqa: RUF001  an en dash is what stands between numbers


def with_interval(figure: Figure) -> str:
    """A figure with its interval and n, as a sentence tells it."""
    return f"{number(figure.value)} ({interval(figure.low, figure.high)}, n\u00a0=\u00a0{figure.n:,})"
