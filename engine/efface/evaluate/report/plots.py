"""The plots of a report, as deterministic SVG: the same figures give the same bytes."""

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import NDArray
from scipy.stats import ks_2samp

from efface.evaluate.logs import FloatArray
from efface.evaluate.report.runs import Curve, ReportedRun

_SIGNIFICANT = 0.05  # two models with a p-value below this differ significantly
_COLOURED = 8  # number of runs with a colour and a legend entry; the others are grey
_LOWEST_QUALITY = 1e-30  # lower values are drawn here
_POINTS = 200  # maximum number of points of a curve
_RATIOS = (1e-4, 1e4)  # limits of the axis; values outside are drawn at its edge
_PANELS = {"left": 0.07, "right": 0.99, "bottom": 0.2, "top": 0.9, "wspace": 0.2}

_COLOURS = ("#1b6ca8", "#c8553d", "#2a7f62", "#8d5a97", "#b8860b", "#46707e", "#a23b72", "#5b6c1f")
_GREY, _RETAIN = "#b5b5b5", "#777777"
_DARK = "#333333"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # keep text as text, which is small and searchable
    "text.parse_math": False,  # the name of a run can contain $
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.edgecolor": _DARK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def quality_against_utility(
    runs: Sequence[ReportedRun], full: Mapping[str, float], retain: Mapping[str, float], least_utility: float | None
) -> str | None:
    """Draw Forget Quality against Model Utility of ranked runs. Return None if no run has both."""
    points = [
        (place, run, run.figures["model_utility"], run.figures["forget_quality"])
        for place, run in enumerate(runs, start=1)
        if {"model_utility", "forget_quality"} <= run.figures.keys()
    ]
    if not points:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, _, x, y in reversed(points):
            colour = _colour(place - 1)
            axes.plot(x, max(y, _LOWEST_QUALITY), "o", color=colour, markersize=6)
            if place <= _COLOURED:
                _mark(axes, str(place), (x, max(y, _LOWEST_QUALITY)), colour)
        # the retain model compared with itself has p-value 1
        for name, utility, quality in (
            ("full", full.get("model_utility"), full.get("forget_quality")),
            ("retain (1 by definition)", retain.get("model_utility"), 1.0),
        ):
            if utility is not None and quality is not None:
                at = (utility, max(quality, _LOWEST_QUALITY))
                axes.plot(*at, "D", color=_DARK, markersize=6, markerfacecolor="white")
                _mark(axes, name, at, _DARK, (0, -13 if quality < _SIGNIFICANT else 6))
        _logarithmic(axes, "y")
        lowest = min([y for *_, y in points] + [full.get("forget_quality", 1.0), _SIGNIFICANT])
        lowest = max(lowest, _LOWEST_QUALITY)
        axes.set_ylim(lowest**1.08 / 2, lowest**-0.08 * 2)  # leaves space for the labels
        axes.margins(x=0.12)
        _significance(axes)
        if least_utility is not None:
            axes.axvline(least_utility, color=_RETAIN, linestyle=":", linewidth=1)
            axes.annotate(
                "utility floor",
                (least_utility, 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(3, 0),
                textcoords="offset points",
                color=_RETAIN,
                fontsize=8,
            )
        axes.set(xlabel="Model Utility", ylabel="Forget Quality (KS p-value)")
        _legend(figure, [(place - 1, run) for place, run, *_ in points], marker="o", linestyle="")

    return _svg("scatter", (7.2, 4.4), draw)


def curves(
    runs: Sequence[ReportedRun], names: Sequence[str], full: Mapping[str, float], retain: Mapping[str, float]
) -> str | None:
    """Draw each named figure over the optimizer steps of ranked runs, one panel per figure.

    Return None if no run has curves of these figures.
    """
    drawn = [name for name in names if any(name in run.curves for run in runs)]
    if not drawn:
        return None
    columns = min(len(drawn), 3)
    rows = math.ceil(len(drawn) / columns)

    def draw(figure: Figure) -> None:
        panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
        for axes in panels[len(drawn) :]:
            axes.set_visible(False)
        for axes, name in zip(panels, drawn, strict=False):
            for place, run in reversed(list(enumerate(runs))):
                if name in run.curves:
                    _line(axes, run.curves[name], place, name)
            for figures, style in ((full, "--"), (retain, ":")):
                if name in figures and name != "forget_quality":
                    axes.axhline(figures[name], color=_DARK, linestyle=style, linewidth=0.8)
            if name == "forget_quality":
                _logarithmic(axes, "y")
                _significance(axes)
            axes.set_title(name)
            axes.set_xlabel("optimizer step")
            axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(figure, [(place, run) for place, run in enumerate(runs) if run.curves], marker=".")

    return _svg("curves", (3.1 * columns + 0.4, 2.5 * rows + 0.5), draw)


def distribution(ratios: FloatArray, retain: FloatArray | None, name: str) -> str:
    """Draw the histogram and the distribution function of the forget rows' truth ratios.

    If ``retain`` is given, its ratios are drawn too, with the largest gap between the two distribution functions.
    """
    low, high = _limits(ratios if retain is None else np.concatenate([ratios, retain]))
    bins = np.geomspace(low, high, 41)

    def draw(figure: Figure) -> None:
        # fixed positions are the same for every run, and take half the time of a layout that measures its texts
        left, right = figure.subplots(1, 2, gridspec_kw=_PANELS)
        left.hist(np.clip(ratios, low, high), bins, color=_COLOURS[0], alpha=0.55, label="this run")
        if retain is not None:
            weights = np.full(len(retain), len(ratios) / len(retain))  # scale to equal totals if the row counts differ
            left.hist(
                np.clip(retain, low, high), bins, weights=weights, histtype="step", color=_DARK, label="retain model"
            )
        left.set(ylabel="forget rows", title="histogram")
        left.legend(loc="upper left")
        _steps(right, np.clip(ratios, low, high), _COLOURS[0])
        right.set(ylabel="share of rows at most R", ylim=(0, 1.03), title="distribution function")
        if retain is not None:
            _steps(right, np.clip(retain, low, high), _DARK)
            gap = largest_gap(ratios, retain)
            at = min(max(gap.location, low), high)
            right.plot([at, at], gap.heights, color=_COLOURS[1], linewidth=2, marker="_", markersize=7)
            near = at > 1
            right.annotate(
                f"D = {gap.statistic:.3f}\np = {gap.pvalue:.3g}",
                (at, sum(gap.heights) / 2),
                xytext=(-7 if near else 7, 0),
                textcoords="offset points",
                ha="right" if near else "left",
                va="center",
                color=_COLOURS[1],
            )
        for axes in (left, right):
            _logarithmic(axes, "x")
            axes.set(xlim=(low, high), xlabel="truth ratio R")
            axes.axvline(1, color=_RETAIN, linestyle=":", linewidth=0.8)

    return _svg(f"distribution {name}", (7.2, 2.5), draw, layout=None)


@dataclass(frozen=True)
class LargestGap:
    """The largest gap between two empirical distribution functions F and G, which is the Kolmogorov-Smirnov statistic.

    Attributes:
        statistic: D = max over x of |F(x) − G(x)|.
        location: the sample value x with the largest difference.
        heights: F(x) and G(x).
        pvalue: the p-value of D under equal distributions. For truth ratios, it is Forget Quality.
    """

    statistic: float
    location: float
    heights: tuple[float, float]
    pvalue: float


def largest_gap(first: FloatArray, second: FloatArray) -> LargestGap:
    """Return the two-sample Kolmogorov-Smirnov statistic with its location.

    Both samples must be finite and not empty.
    """
    test = ks_2samp(first, second)
    location = float(test.statistic_location)
    heights = float(_ecdf(first, location)), float(_ecdf(second, location))
    return LargestGap(float(test.statistic), location, heights, float(test.pvalue))


def _ecdf(values: FloatArray, at: FloatArray | float) -> NDArray[np.float64]:
    """Return F(x), the share of ``values`` that are at most x, for each x of ``at``."""
    shares: NDArray[np.float64] = np.searchsorted(np.sort(values), at, side="right") / len(values)
    return np.asarray(shares)


def _limits(ratios: FloatArray) -> tuple[float, float]:
    """Return powers of ten that enclose 99 % of the rows, at most ``_RATIOS`` and at least 0.1 to 10."""
    low, high = np.quantile(ratios, (0.005, 0.995))
    return (
        10.0 ** math.floor(math.log10(min(max(low, _RATIOS[0]), 0.1))),
        10.0 ** math.ceil(math.log10(max(min(high, _RATIOS[1]), 10))),
    )


def _steps(axes: Any, values: FloatArray, colour: str) -> None:
    at = np.unique(values)
    axes.step([at[0], *at], [0, *_ecdf(values, at)], where="post", color=colour, linewidth=1.3)


def _line(axes: Any, curve: Curve, place: int, name: str) -> None:
    chosen = np.unique(np.linspace(0, len(curve) - 1, _POINTS).round().astype(int))
    steps, values = np.array(list(curve))[chosen], np.array(list(curve.values()))[chosen]
    if name == "forget_quality":
        values = np.maximum(values, _LOWEST_QUALITY)
    coloured = place < _COLOURED
    marker = "." if coloured and len(chosen) <= 40 else ""
    axes.plot(steps, values, color=_colour(place), linewidth=1.3, marker=marker, zorder=3 if coloured else 2)


def _logarithmic(axes: Any, direction: str) -> None:
    axes.set(**{f"{direction}scale": "log"})
    axis = getattr(axes, f"{direction}axis")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _legend(figure: Figure, ranked: Sequence[tuple[int, ReportedRun]], **style: Any) -> None:
    """Add a legend that names the coloured runs and counts the grey ones."""
    handles = [Line2D([], [], color=_colour(place), **style) for place, _ in ranked if place < _COLOURED]
    labels = [f"{place + 1} {_short(run.name)}" for place, run in ranked if place < _COLOURED]
    if len(ranked) > len(labels):
        handles.append(Line2D([], [], color=_GREY, **style))
        labels.append(f"{len(ranked) - len(labels)} more")
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3))


def _significance(axes: Any) -> None:
    axes.axhline(_SIGNIFICANT, color=_RETAIN, linestyle="--", linewidth=1)
    axes.annotate(
        f"p = {_SIGNIFICANT}",
        (1, _SIGNIFICANT),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color=_RETAIN,
        fontsize=8,
    )


def _mark(axes: Any, text: str, place: tuple[float, float], colour: str, offset: tuple[int, int] = (6, 4)) -> None:
    ha = "left" if offset[0] else "center"
    axes.annotate(text, place, xytext=offset, textcoords="offset points", ha=ha, color=colour, fontsize=8)


def _colour(place: int) -> str:
    return _COLOURS[place] if place < _COLOURED else _GREY


def _short(name: str, limit: int = 34) -> str:
    return name if len(name) <= limit else f"…{name[1 - limit :]}"


def _svg(salt: str, size: tuple[float, float], draw: Callable[[Figure], None], *, layout: Any = "constrained") -> str:
    """Return a drawing as an SVG element that can be embedded in a page together with others."""
    file = io.StringIO()
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser renders the text
        mpl.rcdefaults()  # ignore the user's style, so that the same figures give the same bytes
        # the salt determines the ids of shapes, which must differ between the drawings of a page
        mpl.rcParams.update({**_STYLE, "svg.hashsalt": salt})
        figure = Figure(figsize=size, layout=layout)
        draw(figure)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    drawing = file.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>\s*", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'<g id="[^"]*">', "<g>", drawing)  # unused ids, which would be equal in all drawings
    return re.sub(r' d="[^"]*"', _rounded, drawing)


def _rounded(path: re.Match[str]) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", path[0])
