"""What the audit found before training and after warmup, and both roles' answers side by side."""

from dataclasses import dataclass
from typing import Any

from gadfly.run_folder import Record
from gadfly.stages.report.reading import Evidence, read_figure
from gadfly.stages.report.wording import counted, duration, listed, number, percent

_TITLES = {"audit": "Before training", "audit-warmup": "After warmup"}

_LABELS = {
    "finished": "end by themselves",
    "looks_cut": "stop amid a sentence",
    "leading_space": "begin in white space",
    "trailing_space": "end in white space",
    "empty": "are empty",
    "several_lines": "have several lines",
    "markdown": "use Markdown",
    "thinking_tags": "have thinking tags",
    "control_strings": "have control strings",
    "other_script": "are in another script than Latin",
    "not_utf8": "have bytes that are no text",
    "refusals": "refuse",
    "tokens": "mean length, tokens",
}


@dataclass(frozen=True)
class Found:
    """A finding, and whether it stopped the run."""

    name: str
    what: str
    evidence: str
    cause: str
    advice: str
    kind: str


@dataclass(frozen=True)
class Shares:
    """One line of the table: what answers do, and how many of each role's."""

    label: str
    teacher: str
    student: str


@dataclass(frozen=True)
class Audited:
    """One look, before training or after warmup."""

    title: str
    counts: str
    """Whose answers, and how many."""
    found: list[Found]
    shares: list[Shares]
    facts: list[str]
    """Sentences on the cap, the surface, identical texts, leaks, and what the run takes."""


def audited(evidence: Evidence) -> list[Audited]:
    """The looks in their order; none where the audit has not been run."""
    allowed = evidence.recipe.audit.allow
    return [
        _audited(title, evidence.audit[stage], allowed)
        for stage, title in _TITLES.items()
        if evidence.audit.get(stage)
    ]


def _audited(title: str, look: Record, allowed: list[str]) -> Audited:
    teacher, student = (look["roles"][role]["figures"] for role in ("teacher", "student"))
    return Audited(
        title,
        f"{counted(teacher['finished']['n'], 'answer')} of the teacher, "
        f"{counted(student['finished']['n'], 'fresh sample')} of the student",
        [_found(finding, allowed) for finding in look["findings"]],
        [Shares(label, _cell(key, teacher), _cell(key, student)) for key, label in _LABELS.items()],
        [*_cap(look), *_surface(look), _identical(look["identical_text"]), *_leaks(look), *_takes(look)],
    )


def _found(finding: Record, allowed: list[str]) -> Found:
    kind = "warning"
    if finding["mechanical"]:
        kind = "allowed by audit.allow" if finding["name"] in allowed else "mechanical: stops the run"
    return Found(
        kind=kind, **{part: finding[part] for part in ("name", "what", "evidence", "cause", "advice")}
    )


def _cell(key: str, figures: Record) -> str:
    figure = read_figure(figures.get(key))
    if figure is None:
        return "–"  # noqa: RUF001  an en dash stands for nothing, as in the other tables
    return number(figure.value) if key == "tokens" else percent(figure.value)


def _cap(look: Record) -> list[str]:
    cap, quantiles = look["cap"], look["roles"]["teacher"]["token_quantiles"]
    lengths = listed(
        [f"{percent(int(share) / 100)} have at most {size:,}" for share, size in quantiles.items()]
    )
    return [
        f"Length of the teacher's answers in the student's tokens: {lengths}.",
        f"The cap of {cap['now']:,} tokens cuts {percent(cap['cuts']['value'])} of them; the proposed one of "
        f"{cap['proposed']:,} would cut {percent(cap['proposed_cuts']['value'])}.",
    ]


def _surface(look: Record) -> list[str]:
    surface = look["surface"]
    if not surface:
        return []
    accuracy, carriers = surface["accuracy"], surface["carriers"]
    low, high = accuracy["interval"]
    alone = listed([f"{name.replace('_', ' ')} ({percent(share)})" for name, share in carriers.items()])
    return [
        f"By its surface alone, the teacher's answer is told from the student's in "
        f"{percent(accuracy['value'])} of {accuracy['n']} pairs ({percent(low)} to {percent(high)}); "
        f"chance is 50\u00a0%." + (f" Features that tell by themselves: {alone}." if carriers else "")
    ]


def _identical(identical: Record) -> str:
    if identical["different"]:
        return (
            f"Of {counted(identical['texts'], 'text')} scored in both roles, {identical['different']} did "
            f"not score the same."
        )
    return (
        f"Each of {counted(identical['texts'], 'text')} scored the same as the teacher's and the student's."
    )


def _leaks(look: Record) -> list[str]:
    return [
        f"Of the {counted(leak['prompts'], 'prompt')} of {leak['set']}, {leak['same']:,} are trained on too, "
        f"and {leak['near']:,} nearly."
        for leak in look["leaks"]
        if leak["prompts"]
    ] + [
        f"Of the {counted(leak['prompts'], 'prompt')} of {leak['set']}, {leak['same']:,} are held-out "
        f"prompts too, and {leak['near']:,} nearly: checkpoints are chosen on these."
        # Audits of earlier versions did not look.
        for leak in look.get("test_in_valid", [])
        if leak["same"] or leak["near"]
    ]


def _takes(look: Record) -> list[str]:
    estimate: dict[str, Any] = look["estimate"]
    stages = listed([f"{stage} {duration(float(seconds))}" for stage, seconds in estimate["seconds"].items()])
    sentences = [f"Time, by the pace of the audit, within a factor of two or three: {stages}."]
    if "peak_bytes" in estimate:
        sentences.append(
            f"Memory, by formula at full lengths: {_gigabytes(estimate['peak_bytes'])} of "
            f"{_gigabytes(estimate['memory_bytes'])}; disk: {_gigabytes(estimate['disk_bytes'])} of "
            # Audits of earlier versions did not say what was written by then.
            f"{_gigabytes(estimate['free_disk_bytes'] + estimate.get('written_bytes', 0))} free at the start."
        )
    return sentences


def _gigabytes(size: int | float) -> str:
    return f"{size / 1e9:,.1f}\u00a0GB" if size >= 1e8 else f"{size / 1e6:,.1f}\u00a0MB"
