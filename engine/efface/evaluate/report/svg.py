"""Drawings as SVG that is the same, byte for byte, for the same figures."""

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

DARK = "#333333"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable
    "text.parse_math": False,  # a run may be called $x$
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.edgecolor": DARK,
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


def svg(salt: str, size: tuple[float, float], draw: Callable[[Figure], None], *, layout: Any = "constrained") -> str:
    """Return the drawing as an element that may stand in a page, beside others."""
    file = io.StringIO()
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader's fonts show the text
        mpl.rcdefaults()  # not the user's style: the same figures give the same bytes
        # the salt decides the names of shapes, which must differ between the drawings of a page
        mpl.rcParams.update({**_STYLE, "svg.hashsalt": salt})
        figure = Figure(figsize=size, layout=layout)
        draw(figure)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    drawing = file.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>\s*", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'<g id="[^"]*">', "<g>", drawing)  # names that nothing refers to, equal in all drawings
    return re.sub(r' d="[^"]*"', _rounded, drawing)


def _rounded(path: re.Match[str]) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", path[0])
