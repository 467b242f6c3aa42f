"""A watched run as lines of text, each piece with a style; nothing a model wrote reaches a terminal raw."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from gadfly.alarms import Series, change_band
from gadfly.metrics import HEADLINES
from gadfly.run_folder import Record
from gadfly.stages.report.wording import counted, duration, number, stage_label
from gadfly.stages.watch.watched import Watched
from gadfly.visible_text import visible

Piece = tuple[str, str]
"""Text, and the style it is shown in: empty, `bold`, `dim`, a colour, or several of them."""

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDE = 24
_ALARMS, _SAMPLES = 4, 3
# Lines of metrics that stay on a small screen, the heading among them.
_FEW_METRICS = 6
# Characters of a piece that are looked at: a line shows fewer.
_TEXT = 600


@dataclass(frozen=True)
class Line:
    """One line of the screen, cut to its width by whoever shows it."""

    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        """The line without its styles."""
        return "".join(text for text, _ in self.pieces)


def snapshot(watched: Watched) -> str:
    """The run as plain text."""
    return "\n".join(line.text.rstrip() for line in screen(watched))


def screen(watched: Watched, height: int | None = None) -> list[Line]:
    """Progress, headline metrics with their trends, alarms, and the newest samples.

    Args:
        watched: the run.
        height: lines there is room for; metrics give way to the rest, but for a few.
    """
    parts = [list(part(watched)) for part in (_head, _metrics, _alarms, _samples)]
    parts = [part for part in parts if part]
    if height is not None and watched.histories:
        too_many = sum(map(len, parts)) + len(parts) - 1 - height
        del parts[1][max(_FEW_METRICS, len(parts[1]) - max(0, too_many)) :]
    return [line for place, part in enumerate(parts) for line in [*([Line(())] if place else []), *part]]


def _line(*pieces: str | Piece) -> Line:
    """A line of pieces, cut and made safe: a line break or a tab would move what is beside it."""
    styled = [(piece, "") if isinstance(piece, str) else piece for piece in pieces]
    safe = [(visible(text[:_TEXT]).replace("\n", "⏎").replace("\t", " "), style) for text, style in styled]
    return Line(tuple(safe))


def _head(watched: Watched) -> Iterator[Line]:
    stage = watched.stage
    state = "running" if watched.is_running else "not running"
    since = watched.seconds_since_row
    last = f", last row {duration(since)} ago" if since is not None else ""
    yield _line((watched.name, "bold"), f"  {watched.path}  ", (f"{state}{last}", "dim"))
    for name, history in watched.histories.items():
        total = watched.total_steps(name)
        if watched.is_done(name):
            yield _line(f"  {stage_label(name):<30}", (f"done, {counted(history.step, 'step')}", "dim"))
            continue
        share = history.step / total if total else 0.0
        full = round(_WIDE * min(share, 1.0))
        left = watched.seconds_left(name) if name == stage and watched.is_running else None
        of = f"{history.step:,} of {total:,} steps" if total else counted(history.step, "step")
        steps = f"  {of}" + (f", {duration(left)} left" if left is not None else "")
        yield _line(f"  {stage_label(name):<30}", ("━" * full, "green"), ("─" * (_WIDE - full), "dim"), steps)
    if stage is None:
        yield _line(("  nothing logged yet", "dim"))


def _metrics(watched: Watched) -> Iterator[Line]:
    if watched.stage is None:
        return
    history = watched.histories[watched.stage]
    shown = [(metric, history[metric.name]) for metric in HEADLINES if len(history[metric.name])]
    if not shown:
        return
    yield _line((f"  {stage_label(watched.stage):<24}{'start':>10}{'now':>10}     trend", "dim"))
    for metric, series in shown:
        now = fmean(series.last(max(1, min(history.window, len(series) // 2))).values)
        yield _line(
            f"  {metric.label:<24}{number(series.start()):>10}",
            (f"{number(now):>10}", "bold"),
            f"  {_arrow(series, history.window)}  ",
            (_sparkline(series.values), "cyan"),
        )


def _arrow(series: Series, window: int) -> str:
    """Whether the last two windows rise or fall beyond their noise."""
    band = change_band(series.last(2 * window).values)
    return "↑" if band.is_above(0.0) else "↓" if band.is_below(0.0) else "→"


def _sparkline(values: list[float]) -> str:
    """The values in few columns, each the mean of its share.

    Example:
        >>> _sparkline([0.0, 1.0, 2.0, 7.0])
        '▁▂▃█'
    """
    columns = min(_WIDE, len(values))
    means = [
        fmean(values[place * len(values) // columns : (place + 1) * len(values) // columns])
        for place in range(columns)
    ]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in means)


def _alarms(watched: Watched) -> Iterator[Line]:
    if not watched.alarms and not watched.remedies:
        if watched.histories:
            yield _line(("  no alarm", "green"))
        return
    for row in watched.remedies:
        changes = row.get("changes")
        changed = [f"{key} = {value}" for key, value in changes.items()] if isinstance(changes, dict) else []
        yield _line(
            ("  went back", "yellow"),
            f"  {row.get('stage')} from step {row.get('step')} to {row.get('back_to')} for {row.get('name')}",
            f": {', '.join(changed)}; seen: {row.get('evidence')}",
        )
    newest = watched.alarms[-_ALARMS:]
    for row in newest:
        yield _line(
            (f"  {row.get('name', '?')}", "bold red"),
            f"  {row.get('stage')} step {row.get('step')} ({row.get('action')}): ",
            str(row.get("evidence", "")),
        )
        if row is newest[-1]:
            for title, key in (("likely cause", "cause"), ("what to do", "advice")):
                yield _line((f"    {title}: ", "dim"), str(row.get(key, "")))


def _samples(watched: Watched) -> Iterator[Line]:
    if not watched.samples:
        return
    newest = watched.samples[-1]
    step, stage = newest.get("step"), newest.get("stage")
    yield _line((f"  newest samples, {stage} step {step}", "dim"))
    rows = [row for row in watched.samples if (row.get("stage"), row.get("step")) == (stage, step)]
    rollouts = [row for row in rows if row.get("kind") == "rollout"]
    for row in (rollouts or rows)[:1]:
        yield _text_line("prompt", row.get("prompt"), "")
        yield _text_line("teacher", row.get("teacher"), "green", row.get("teacher_score"))
        for sample in _answers(row):
            label = "sample" if "score" in sample else "student"
            yield _text_line(label, sample.get("text"), "cyan", sample.get("score"))


def _answers(row: Record) -> list[Record]:
    """The best samples of a group, or the greedy answer to a held-out prompt."""
    group = row.get("samples")
    if not isinstance(group, list):
        return [{"text": row.get("response")}]
    samples = [sample for sample in group if isinstance(sample, dict)]
    return sorted(samples, key=lambda sample: _score(sample.get("score")), reverse=True)[:_SAMPLES]


def _score(value: Any) -> float:
    return float(value) if isinstance(value, float) and math.isfinite(value) else -math.inf


def _text_line(who: str, text: Any, style: str, score: Any = None) -> Line:
    score_text = f"{number(float(score)):>8}  " if math.isfinite(_score(score)) else " " * 10
    return _line((f"    {who:<8}", style), (score_text, "dim"), str(text or "") or ("(empty)", "dim"))
