"""PNG plots: time and memory against N, share of the floor, parts of a step. The files are bitwise reproducible."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.publish import tables
from benchmarks.publish.tables import Result

_OURS, _RIVAL, _FLOOR = "#30638e", "#d1495b", "#9aa5b1"
_PARTS = ("#30638e", "#edae49", "#d1495b", "#66a182", "#9aa5b1", "#7d5ba6")


def _colour(row: dict[str, object]) -> str:
    return _OURS if tables.is_ours(row) else _FLOOR if str(row["provider"]).startswith("bare") else _RIVAL


def _share(result: Result) -> Iterator[tuple[str, Figure]]:
    """Yield a figure with a panel per shape: the bare products' time as a share of each provider's time."""
    shapes = tables.grouped(result.rows, "shape")
    figure = Figure(figsize=(9, sum(0.7 + 0.22 * len(rows) for rows in shapes.values())), layout="constrained")
    ratios = [len(rows) + 2 for rows in shapes.values()]
    panels = figure.subplots(len(shapes), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    for axes, ((shape,), rows) in zip(panels, shapes.items(), strict=True):
        share = [row["of_floor_percent"] for row in rows]
        axes.barh(range(len(rows)), share, color=[_colour(row) for row in rows])
        axes.set_yticks(range(len(rows)), [row["provider"] for row in rows], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlim(0, 110)
        axes.set_title(f"{shape}: % of the speed of the bare products", fontsize=8, loc="left")
    yield "floor", figure


def _against_n(key: str, label: str) -> Callable[[Result], Iterator[tuple[str, Figure]]]:
    """Return a plot over N for heads measured at three or more N: NPO with a live reference, memorised."""

    def draw(result: Result) -> Iterator[tuple[str, Figure]]:
        chosen = [
            row
            for row in result.rows
            if row.get("objective") == "NPO" and row["mode"] == "live" and row["state"] == "memorised" and row.get(key)
        ]
        for (d, v), rows in tables.grouped(chosen, "d", "v").items():
            if len({row["n"] for row in rows}) < 3:
                continue
            figure = Figure(figsize=(7, 4), layout="constrained")
            axes: Axes = figure.add_subplot()
            for (who,), own in tables.grouped(rows, "who").items():
                points = sorted((row["n"], row[key]) for row in own)
                axes.plot(*zip(*points, strict=True), marker="o", label=who, lw=2 if tables.is_ours(own[0]) else 1)
            axes.set(xscale="log", yscale="log", xlabel="N, rows", ylabel=label, title=f"NPO, D {d}, V {v}")
            axes.legend(fontsize=7)
            yield f"{label.split(',', maxsplit=1)[0]}-d{d}-v{v}", figure

    return draw


def _parts(result: Result) -> Iterator[tuple[str, Figure]]:
    """Yield a figure per shape with a bar per provider, stacked from the medians of its step's parts."""
    shapes = tables.grouped([row for row in result.rows if row.get("median_ms") is not None], "shape")
    for number, ((shape,), rows) in enumerate(shapes.items(), 1):
        several = len(shapes) > 1
        yield f"parts-{number}" if several else "parts", _stacked(rows, shape if several else "")


def _stacked(rows: tables.Rows, title: str) -> Figure:
    figure = Figure(figsize=(8, 1.0 + 0.35 * len(rows)), layout="constrained")
    axes: Axes = figure.add_subplot()
    split = [row["parts_ms"] for row in rows]
    for i, part in enumerate(dict.fromkeys(name for each in split for name in each)):
        widths = [each.get(part, 0.0) for each in split]
        before = [sum(list(each.values())[: list(each).index(part)]) if part in each else 0.0 for each in split]
        axes.barh(range(len(rows)), widths, left=before, label=part, color=_PARTS[i % len(_PARTS)])
    axes.set_yticks(range(len(rows)), [f"{row['provider']}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms, medians")
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=8, loc="left")
    return figure


_DRAW: dict[str, Sequence[Callable[[Result], Iterator[tuple[str, Figure]]]]] = {
    "loss": (_share, _against_n("median_ms", "time, ms"), _against_n("peak_gib", "memory, GiB")),
    "step": (_parts,),
}


def draw(found: Sequence[Result], folder: Path) -> dict[str, list[str]]:
    """Draw all plots; return the file names of the plots for each results file."""
    folder.mkdir(exist_ok=True)
    names: dict[str, list[str]] = {}
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        for result in found:
            for plot in _DRAW.get(result.suite, ()):
                for name, figure in plot(result):
                    file = f"{Path(result.file).stem}-{name}.png"
                    figure.savefig(folder / file, dpi=110, metadata={"Software": None})
                    names.setdefault(result.file, []).append(file)
    return names
