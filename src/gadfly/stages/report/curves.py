"""Each headline metric of a stage as a small drawing: SVG from matplotlib, coloured by the page.

Line and text take placeholder colours here, which become the page's own, so that one drawing
serves light and dark. Thousands of points become at most `_POINTS` places, each with the median
and the band around it.
"""

import io
import math
import re
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gadfly.metrics import HEADLINES, Metric
from gadfly.stages.report.reading import Curve, Evidence
from gadfly.stages.report.wording import number
from gadfly.visible_text import visible

_POINTS = 120
# Up to here every point is drawn as it is.
_FEW = 24
# Beyond this no float of the drawing's own arithmetic is safe.
_LARGEST = 1e12

# Placeholders and the page's colours they become.
_INK, _GRID, _SERIES, _OTHER = "#010101", "#020202", "#030303", "#040404"
_COLOURS = {
    _INK: "var(--muted)",
    _GRID: "var(--line)",
    _SERIES: "var(--series)",
    _OTHER: "var(--muted)",
}

# Values a metric is read against: chance, or equal to the teacher.
_REFERENCES = {
    "discriminator/accuracy": 0.5,
    "discriminator/loss": math.log(2),
    "probe/accuracy": 0.5,
    "evaluation/tell_accuracy": 0.5,
    "rollout/length_ratio": 1.0,
    "evaluation/length_ratio": 1.0,
}

# A second curve in the same drawing, dashed, and what it is.
_COMPANIONS = {"rollout/finished_fraction": ("detail/teacher_finished_fraction", "dashed: the teacher's")}

# What a reader of the tables would take for the same figure.
_LOOKALIKES = {
    "evaluation/rouge_l": "the teacher's answer is cut at {cap} tokens like the student's, while the tables "
    "compare with the whole one: do not compare the two",
}

_PARTS = {
    "discriminator": ("The discriminator", "discriminator"),
    "probe": ("The discriminator", "discriminator"),
    "student": ("The student", "student"),
    "group": ("Its samples", "samples"),
    "rollout": ("Its samples", "samples"),
    "evaluation": ("Held-out prompts, greedy", "evaluation"),
}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "ytick.left": False,
}


@dataclass(frozen=True)
class Panel:
    """One metric: its drawing, where it began and ended, and how to read it."""

    metric: Metric
    svg: Markup
    span: str
    note: str


@dataclass(frozen=True)
class PanelGroup:
    """The panels of one part of the method, in one colour."""

    title: str
    colour: str
    panels: tuple[Panel, ...]


def stage_panels(evidence: Evidence, stage: str) -> list[PanelGroup]:
    """All headline metrics a stage has logged, by part."""
    groups: dict[tuple[str, str], list[Panel]] = {}
    for metric in HEADLINES:
        curve = evidence.curve(stage, metric.name)
        if curve:
            part = _PARTS[metric.name.split("/")[0]]
            groups.setdefault(part, []).append(_panel(evidence, stage, metric, curve))
    return [PanelGroup(title, colour, tuple(panels)) for (title, colour), panels in groups.items()]


def _panel(evidence: Evidence, stage: str, metric: Metric, curve: Curve) -> Panel:
    name, note = _COMPANIONS.get(metric.name, ("", ""))
    companion = evidence.curve(stage, name)
    trend = smooth(curve)
    ends = dict.fromkeys((number(float(trend.middle[0])), number(float(trend.middle[-1]))))
    reference = _REFERENCES.get(metric.name)
    if metric.name == "discriminator/loss" and evidence.recipe.discriminator.loss == "cross_entropy":
        # A term for the teacher and one for the student, each at chance.
        reference = 2 * math.log(2)
    salt = visible(f"{stage} {metric.name}")
    svg = _draw(salt, metric, trend, smooth(companion) if companion else None, reference)
    if not companion:
        cap = f"{evidence.recipe.sampling.max_response_tokens:,}"
        note = _LOOKALIKES.get(metric.name, "").format(cap=cap)
    return Panel(metric, svg, " → ".join(ends), note)


@dataclass(frozen=True)
class Trend:
    """A curve where it is drawn: the moving median and, around it, the middle 80 %."""

    steps: Float[np.ndarray, " place"]
    low: Float[np.ndarray, " place"]
    middle: Float[np.ndarray, " place"]
    high: Float[np.ndarray, " place"]
    window: int
    """Points in a moving window; 1 where every point is drawn as it is."""


def smooth(curve: Curve) -> Trend:
    """The trend of a curve, at no more than `_POINTS` places.

    Example:
        >>> smooth(Curve([1.0, 2.0, 3.0], [5.0, 1.0, 3.0])).middle.tolist()
        [5.0, 1.0, 3.0]
    """
    steps = np.asarray(curve.steps, dtype=np.float64)
    values = np.clip(np.asarray(curve.values, dtype=np.float64), -_LARGEST, _LARGEST)
    if len(values) <= _FEW:
        return Trend(steps, values, values, values, window=1)
    half = max(2, len(values) // 50)
    places = np.unique(np.linspace(0, len(values) - 1, _POINTS).round().astype(int))
    windows = [values[max(0, place - half) : place + half + 1] for place in places]
    low, middle, high = np.array([np.quantile(window, (0.1, 0.5, 0.9)) for window in windows]).T
    return Trend(steps[places], low, middle, high, window=2 * half + 1)


def _draw(
    salt: str, metric: Metric, trend: Trend, companion: Trend | None, reference: float | None
) -> Markup:
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(3.5, 1.65), layout="constrained")
        axes = figure.add_subplot()
        if reference is not None:
            axes.axhline(reference, color=_OTHER, linewidth=0.8, linestyle=(0, (4, 3)))
        if companion:
            axes.plot(companion.steps, companion.middle, color=_OTHER, linewidth=1.0, linestyle="--")
        if trend.window > 1:
            axes.fill_between(trend.steps, trend.low, trend.high, color=_SERIES, alpha=0.18, linewidth=0)
        marker = "o" if trend.window == 1 else None
        axes.plot(trend.steps, trend.middle, color=_SERIES, linewidth=1.6, marker=marker, markersize=2.6)
        _set_axes(axes, metric)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(file.getvalue())


def _set_axes(axes: Axes, metric: Metric) -> None:
    is_share = metric.name.endswith(("accuracy", "_fraction"))
    if is_share:
        axes.set_ylim(-0.03, 1.03)
        axes.set_yticks([0.0, 0.5, 1.0], ["0", "0.5", "1"])
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.margins(x=0.02)


def _for_page(svg: str) -> Markup:
    """The bare `<svg>` element in the page's colours: no prologue, no metadata, no unused ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg, count=1)
    used = set(re.findall(r"#([\w-]+)[)\"]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)
    for placeholder, colour in _COLOURS.items():
        svg = svg.replace(placeholder, colour)
    return Markup(svg.strip())
