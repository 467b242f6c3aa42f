"""Two scores from 1 to 10 for a student's answer and a reference's, and the figures made of them.

The paper (arXiv 2511.10643, section 4 and appendix) has the judge write a reference answer to each
prompt, score both answers, and reports 100 * student / (student + reference): 50 is parity. It says
neither in which order the answers stood nor whether its average is a mean of ratios or a ratio of
means, so both orders can be asked, and there is a function for each average.

`prompts/score.txt` is the judge prompt of Vicuna (FastChat, 2023), which MiniLLM (arXiv 2306.08543)
and the paper use, with the paper's "level of detail" for its "level of details".
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gadfly.stages.judge.judge_prompt import after_reasoning
from gadfly.statistics import Figure, bootstrap, mean

_MARKUP = re.compile(r"[*_`#]")
_NUMBER = r"([1-9][0-9]?(?:\.[0-9]+)?)"
# A comma needs its space: "8,5" could be one number.
_VERDICT = re.compile(rf"{_NUMBER}(?P<of_ten>/10)?(?:,\s+|\s+){_NUMBER}(?(of_ten)/10)\.?")


def parse_scores(text: str) -> tuple[float, float] | None:
    r"""The two scores of a judge's answer, first and second answer; None if it does not give them.

    They must be all there is on the first line that says anything, but for Markdown, a comma, a full
    stop, or "/10" after both; they may follow `<think>…</think>`. A third number, a word beside them
    or a score outside 1 to 10 makes it None: then ask again, since a guess would be counted.

    Example:
        >>> parse_scores("**8 9.5**\nAssistant 2 gives more detail."), parse_scores("I say 8 9")
        ((8.0, 9.5), None)
    """
    # The protocol's own form comes first: its explanation may quote an answer with a thinking tag.
    return _first_line_scores(text) or _first_line_scores(after_reasoning(text))


def _first_line_scores(text: str) -> tuple[float, float] | None:
    lines = (_MARKUP.sub("", line).strip() for line in text.splitlines())
    found = _VERDICT.fullmatch(next(filter(None, lines), ""))
    if found is None:
        return None
    first, second = float(found[1]), float(found[3])
    return (first, second) if max(first, second) <= 10 else None


@dataclass(frozen=True)
class JudgeScores:
    """What the judge gave to both answers in one order.

    Example:
        >>> JudgeScores(student=6, reference=9).ratio
        40.0
    """

    student: int | float
    reference: int | float

    @property
    def ratio(self) -> float:
        """100 * student / (student + reference): 50 is parity, 9.1 and 90.9 are the ends."""
        return 100 * self.student / (self.student + self.reference)


def read_scores(text: str, *, student_first: bool) -> JudgeScores | None:
    """The scores of a judge's answer, given which answer it read first; see `parse_scores`."""
    scores = parse_scores(text)
    if scores is None:
        return None
    return JudgeScores(*scores) if student_first else JudgeScores(*reversed(scores))


@dataclass(frozen=True)
class ScoredPrompt:
    """One prompt and what the judge gave in each order it was asked.

    Example:
        >>> ScoredPrompt("7", (JudgeScores(6, 9), JudgeScores(5, 5))).parsed
        (JudgeScores(student=6, reference=9), JudgeScores(student=5, reference=5))
        >>> ScoredPrompt("8", (JudgeScores(6, 9), None)).parsed
        ()
    """

    id: str
    verdicts: tuple[JudgeScores | None, ...]
    """One an order; None where the judge's answer was unparsable to the last."""

    @property
    def parsed(self) -> tuple[JudgeScores, ...]:
        """The verdicts, if that of every order could be read; else none.

        The order that is left would bring what the judge gives to a place into the figures.
        """
        read = tuple(scores for scores in self.verdicts if scores is not None)
        return read if len(read) == len(self.verdicts) else ()


def num_unparsable(prompts: Sequence[ScoredPrompt]) -> int:
    """How many prompts lack a verdict in an order that was asked; the figures leave them out."""
    return sum(not prompt.parsed for prompt in prompts)


def mean_of_ratios(prompts: Sequence[ScoredPrompt]) -> Figure:
    """Mean over prompts of 100 * student / (student + reference), with Student's t interval.

    A prompt counts once: its ratio is the mean over its orders.

    Raises:
        ValueError: no prompt has a parsed verdict.
    """
    ratios = [_mean([scores.ratio for scores in prompt.parsed]) for prompt in prompts if prompt.parsed]
    if not ratios:
        raise ValueError("mean_of_ratios: no prompt has a parsed verdict; it needs at least one")
    return mean(ratios)


def ratio_of_means(prompts: Sequence[ScoredPrompt]) -> Figure:
    """100 * sum of student / (sum of student + sum of reference), with a bootstrap interval.

    A prompt counts once: its two scores are the means over its orders. The prompts are what is
    resampled.

    Raises:
        ValueError: no prompt has a parsed verdict.
    """
    totals = [
        (_mean([scores.student for scores in parsed]), _mean([scores.reference for scores in parsed]))
        for prompt in prompts
        if (parsed := prompt.parsed)
    ]
    if not totals:
        raise ValueError("ratio_of_means: no prompt has a parsed verdict; it needs at least one")
    return bootstrap(totals, _ratio_of_sums)


def _ratio_of_sums(totals: Sequence[tuple[float, float]]) -> float:
    student = sum(pair[0] for pair in totals)
    reference = sum(pair[1] for pair in totals)
    return JudgeScores(student, reference).ratio


def _mean(values: Sequence[int | float]) -> float:
    return sum(values) / len(values)
