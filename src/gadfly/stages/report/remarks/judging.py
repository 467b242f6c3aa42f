"""What weakens a judge's verdict: kinship, verdicts that cannot be read or go by the place, and length.

The evidence of each remark is whole by itself, since it also stands beside a verdict it weakens.
"""

from collections.abc import Iterator

from gadfly.stages.report.deciding import FEW_CASES, main_figure, rival_of_gad
from gadfly.stages.report.reading import Evidence, read_figure
from gadfly.stages.report.remarks.remark import Remark
from gadfly.stages.report.wording import counted, listed, percent, spoken, with_interval

_UNREADABLE = 0.05
_LONGER = 1.15
# A judge without a liking for a place names each in half of its verdicts, since both orders are asked. From
# FEW_CASES verdicts on, such a share is beyond chance (two-sided binomial test: p = 0.012 for 16 of 20).
_ONE_PLACE = 0.8


def weaknesses(evidence: Evidence, test_set: str) -> list[str]:
    """What is to be said beside a verdict on a test set that a judge's score decided."""
    found = (
        *_favoured(evidence, test_set),
        *_unreadable(evidence, test_set),
        *_same_scores(evidence, test_set),
        *_by_place(evidence, test_set),
        *_longer(evidence, test_set),
    )
    return [remark.evidence for remark in found]


def favoured(evidence: Evidence) -> Iterator[Remark]:
    """A judge of the teacher's or the student's family, once for all test sets that have the same one."""
    seen = []
    for test_set in evidence.judge:
        for remark in _favoured(evidence, test_set):
            if remark not in seen:
                seen.append(remark)
                yield remark


def unreadable(evidence: Evidence) -> Iterator[Remark]:
    """More verdicts left out than can be overlooked."""
    for test_set in evidence.judge:
        yield from _unreadable(evidence, test_set)


def same_scores(evidence: Evidence) -> Iterator[Remark]:
    """The same two scores in every verdict."""
    for test_set in evidence.judge:
        yield from _same_scores(evidence, test_set)


def by_place(evidence: Evidence) -> Iterator[Remark]:
    """A judge that prefers nearly always the answer it reads first, or second, whichever that is."""
    for test_set in evidence.judge:
        yield from _by_place(evidence, test_set)


def longer_and_judged(evidence: Evidence) -> Iterator[Remark]:
    """GAD's answers much longer than its rival's, where a judge decides."""
    for test_set in evidence.judge:
        if main_figure(evidence.figures_of(test_set)) == "judge_score":
            yield from _longer(evidence, test_set)


def _favoured(evidence: Evidence, test_set: str) -> Iterator[Remark]:
    noted = evidence.judge.get(test_set, {})
    shared = noted.get("shares_family", {})
    if shared:
        kin = listed([f"the {role}" for role in shared])
        families = listed(sorted(set(shared.values())))
        yield Remark(
            "The judge is of the family it judges",
            f"The judge, {noted.get('judge')}, is of one family ({families}) with {kin}: that favours them "
            "and whoever writes like them.",
            "Judges prefer what models of their own family write (arXiv 2306.05685, section 3.3).",
            "Judge again with judge.model of another family, and compare.",
        )


def _unreadable(evidence: Evidence, test_set: str) -> Iterator[Remark]:
    shares = []
    figures = evidence.figures_of(test_set)
    for model, lost in evidence.judge.get(test_set, {}).get("unparsable", {}).items():
        score = figures.get(model, {}).get("judge_score")
        shares.append((spoken(model), lost, lost + (score.n if score else 0)))
    for pair in evidence.pairwise.get(test_set, {}).values():
        read = pair["win"] + pair["tie"] + pair["loss"]
        shares.append(
            (f"{spoken(pair['a'])} vs {spoken(pair['b'])}", pair["unparsable"], pair["unparsable"] + read)
        )
    many = [
        f"{lost:,} of {counted(asked, 'prompt')} for {who} ({percent(lost / asked)})"
        for who, lost, asked in shares
        if asked and lost / asked > _UNREADABLE
    ]
    if many:
        yield Remark(
            f"Many verdicts on {test_set} cannot be read",
            f"Left out on {test_set}, since the judge's verdict could not be read: {', '.join(many)}. What "
            "is left need not be like the whole.",
            "The judge does not keep to the form, was cut off (judge.max_response_tokens), or is too weak.",
            "Read verdicts in the folder verdicts; raise the cap, change the prompt, or take another judge.",
        )


def _same_scores(evidence: Evidence, test_set: str) -> Iterator[Remark]:
    noted = evidence.judge.get(test_set, {})
    given = noted.get("same_scores")
    num_verdicts = sum(sum(named.values()) for named in noted.get("named", {}).values())
    if given and num_verdicts >= FEW_CASES:
        yield Remark(
            f"The judge gives all answers to {test_set} the same scores",
            f"All {num_verdicts:,} verdicts on {test_set} give {given[0]:g} to the first answer and "
            f"{given[1]:g} to the second, whichever answers they are: the scores say nothing of the models.",
            "The judge does not weigh the answers: it is too weak for the prompt.",
            "Take another judge.model, or another judge.score_prompt.",
        )


def _by_place(evidence: Evidence, test_set: str) -> Iterator[Remark]:
    noted = evidence.judge.get(test_set, {})
    asked = []
    # In one order the place is the model's: a liking for one cannot be told from one for the other. And what
    # is always the same has a remark of its own.
    if noted.get("both_orders") and not noted.get("same_scores"):
        asked += [(spoken(model), named) for model, named in noted.get("named", {}).items()]
    for pair in evidence.pairwise.get(test_set, {}).values():
        asked.append((f"{spoken(pair['a'])} vs {spoken(pair['b'])}", pair.get("named", {})))
    found = []
    for whose, named in asked:
        preferring = named.get("first", 0) + named.get("second", 0)
        for place in ("first", "second"):
            if preferring >= FEW_CASES and named[place] / preferring >= _ONE_PLACE:
                share = percent(named[place] / preferring)
                found.append(f"the {place} in {share} of {counted(preferring, 'verdict')} for {whose}")
    if found:
        yield Remark(
            f"The judge goes by the place on {test_set}",
            f"Where it prefers one of two answers to {test_set}, the judge names {', '.join(found)}, though "
            "each answer stood as often first as second. That favours no model, but hides how they differ: "
            "scores are drawn to 50, pairs to ties.",
            "A judge that cannot tell the answers apart, or is too weak, goes by where it reads them.",
            "Take a stronger judge.model, or change its prompt; do not take this for equal quality.",
        )


def _longer(evidence: Evidence, test_set: str) -> Iterator[Remark]:
    figures = evidence.figures_of(test_set)
    rival = rival_of_gad(figures, "judge_score")
    ours, theirs = (figures.get(model, {}).get("response_tokens") for model in ("gad", rival))
    if not (ours and theirs and ours.value > _LONGER * theirs.value):
        return
    pair = evidence.pairwise.get(test_set, {}).get(f"gad vs {rival}", {})
    raw, controlled = (read_figure(pair.get(name)) for name in ("win_rate", "length_controlled_win_rate"))
    rates = "a length-controlled win rate is not there"
    if raw and controlled:
        rates = f"the win rate is {with_interval(raw)}, length-controlled {with_interval(controlled)}"
    yield Remark(
        f"GAD's answers to {test_set} are longer than those it is held against",
        f"GAD's answers to {test_set} are {ours.value / theirs.value:.2f} times as long as those of "
        f"{spoken(rival)}, and judges tend to favour length: {rates}.",
        "The score does not allow for length, so part of it may be length.",
        "Go by the length-controlled win rate."
        if raw and controlled
        else 'Add "pairwise" to judge.method, and go by the length-controlled win rate.',
    )
