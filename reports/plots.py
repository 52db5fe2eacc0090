"""Plots of the pages as SVG, drawn by matplotlib, which is imported with the first of them.

The light colours of page.css are drawn, and in the SVG its variables take their place, so that a
plot turns dark with its page.
"""

import functools
import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from storage.files import LARGEST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Points = Sequence[tuple[float, float]]
Size = tuple[int, int]

LARGE, SMALL = (520, 270), (300, 210)  # width and height of a plot, in its own units
MARGINS = (78, 14, 14, 50)  # left, right, top, bottom: where the axes' numbers and titles are
MOST_POINTS = 400  # of a curve; more are averaged
MOST_COLUMNS = 40  # of a histogram
MOST_KNOTS = 20  # of a curve; the points of a longer one are not marked

CSS = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
PALETTE = dict(re.findall(r"--(\w+):(#\w{6})", CSS[: CSS.index("@media")]))  # of the light page
CURVES = ("blue", "amber", "green", "pink", "sky", "gold")  # curves over each other, in this order

STYLE = {
    "svg.fonttype": "none",  # text remains text
    "svg.hashsalt": "page",  # one plot is the same SVG each time
    "font.sans-serif": "DejaVu Sans",
    "font.size": 12,
    "text.parse_math": False,
    "axes.spines.left": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": PALETTE["soft"],
    "axes.labelcolor": PALETTE["soft"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": PALETTE["rule"],
    "xtick.color": PALETTE["soft"],
    "ytick.color": PALETTE["soft"],
    "xtick.bottom": False,
    "ytick.left": False,
    "xtick.major.pad": 8,
    "ytick.major.pad": 6,
    "axes.labelpad": 7,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "lines.markeredgewidth": 1.8,
}


def number(value: float) -> str:
    """All digits of a whole number, and four significant ones of any other."""
    value = float(value)
    if not math.isfinite(value):
        return "–"
    return (f"{value:,.0f}" if value.is_integer() else f"{value:#.4g}").replace("-", "−")


def drawable(values: ArrayLike) -> NDArray[np.bool_]:
    """Which of `values` an axis can hold: those that are finite, and not beyond all measure."""
    return np.abs(values) < LARGEST


def curve_colour(k: int) -> str:
    """The name in `PALETTE` of the colour of curve k."""
    return CURVES[k % len(CURVES)]


def is_dashed(k: int) -> bool:
    """True where curve k has the colour of an earlier one."""
    return k // len(CURVES) % 2 == 1


def _in_style(draw: Callable[..., str]) -> Callable[..., str]:
    """`draw` in the style of the pages, whatever the user's matplotlibrc says."""

    @functools.wraps(draw)
    def styled(*args, **options) -> str:
        import matplotlib.style

        with matplotlib.style.context(["default", STYLE]):
            return draw(*args, **options)

    return styled


def _new_axes(size: Size, titles: tuple[str, str]) -> "Axes":
    from matplotlib.figure import Figure

    (width, height), (left, right, top, bottom) = size, MARGINS
    figure = Figure((width / 72, height / 72))  # inches; the unit of an SVG is a 72nd of one
    inside = left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height
    return figure.add_axes(inside, xlabel=titles[0], ylabel=titles[1])


def _scale(axis: "Axis", values: Sequence[float], may_be_logarithmic: bool = True) -> None:
    """Put round numbers on `axis`; it is logarithmic where positive `values` are far apart."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    low, high = min(values), max(values)
    if may_be_logarithmic and low > 1 / LARGEST and high > 8 * low:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    else:
        axis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axis.set_major_formatter(_tick)
    axis.axes.minorticks_off()


def _tick(value: float, _: int) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def _to_svg(axes: "Axes") -> str:
    """The figure of `axes` as HTML, in which the gid of an artist is the class of its group."""
    figure, file = axes.figure, io.StringIO()
    for artist in axes.findobj():
        artist.set_clip_on(False)  # everything is within the axes
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    figure.savefig(
        file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    width, height = (round(72 * side) for side in figure.get_size_inches())
    content = file.getvalue()
    content = content[content.index("<g id=") :].replace("<g id=", "<g class=")
    content = re.sub(r" font-family: .*?sans-serif;", "", content)  # page.css has it
    content = re.sub(r"\s+", " ", content)
    for name, colour in PALETTE.items():
        content = content.replace(colour, f"var(--{name})")
    words = escape(f"{axes.get_ylabel()} over {axes.get_xlabel()}")
    return f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{words}">{content}'


def _binned(points: Points) -> NDArray[np.float64]:
    """Rows (x, mean, lowest, highest) of the drawable points, or of neighbours among many."""
    points = np.reshape(np.asarray(points, dtype=float), (-1, 2))
    points = points[drawable(points).all(1)]
    parts = np.array_split(points, min(max(len(points), 1), MOST_POINTS))
    rows = [[p[:, 0].mean(), p[:, 1].mean(), p[:, 1].min(), p[:, 1].max()] for p in parts if len(p)]
    return np.reshape(rows, (-1, 4))


def draw_range(
    axes: "Axes", x: ArrayLike, mean: ArrayLike, low: ArrayLike, high: ArrayLike, **line
) -> None:
    """Draw a curve, with the options `line`, over a band from `low` to `high`."""
    (curve,) = axes.plot(x, mean, **line)
    axes.fill_between(x, low, high, color=curve.get_color(), alpha=0.16, linewidth=0, gid="band")


@_in_style
def curve_plot(
    curves: Sequence[tuple[int, Points]],
    titles: tuple[str, str],
    *,
    size: Size = LARGE,
    floor: float | None = None,
    logarithmic_x: bool = False,
    with_range: bool = False,
    dots: Points = (),
) -> str:
    """Curves over each other, each with its number k, which chooses its colour; "" without points.

    Args:
        titles: of the axes.
        floor: where a line across is drawn, if anywhere.
        logarithmic_x: whether the x axis may be logarithmic, as the y axis is for values that are
            far apart.
        with_range: whether a band shows the range of neighbours; of many points only their mean is
            drawn.
        dots: further points, without a line.
    """
    curves = [(k, _binned(points)) for k, points in curves]
    dots = _binned(dots)
    every = np.concatenate([*(rows for _, rows in curves), dots])
    if not len(every):
        return ""
    axes = _new_axes(size, titles)
    floors = [] if floor is None or not drawable(floor) else [floor]
    _scale(axes.xaxis, every[:, 0], logarithmic_x)
    _scale(axes.yaxis, [*every[:, 1:].flat, *floors])
    for height in floors:
        axes.axhline(height, color=PALETTE["soft"], linewidth=1, linestyle=(0, (5, 4)), gid="floor")
    for k, (x, mean, low, high) in ((k, rows.T) for k, rows in curves if len(rows)):
        line = {"color": PALETTE[curve_colour(k)], "gid": f"curve-{k}"}
        line["linestyle"] = "--" if is_dashed(k) else "-"
        if with_range:
            draw_range(axes, x, mean, low, high, **line)
        else:
            knots = "o" if len(x) <= MOST_KNOTS else ""
            axes.plot(x, mean, marker=knots, markerfacecolor=PALETTE["paper"], **line)
    if len(dots):
        axes.plot(*dots.T[:2], "o", markersize=3, color=PALETTE["amber"], gid="dots")
    return _to_svg(axes)


@_in_style
def histogram(values: NDArray, titles: tuple[str, str]) -> str:
    """Histogram of `values` (n,), with a line at their mean; `titles` are those of its axes."""
    columns = min(MOST_COLUMNS, max(5, round(2 * math.sqrt(len(values)))))
    axes, mean = _new_axes(LARGE, titles), float(np.mean(values))
    counts, edges, _ = axes.hist(values, columns, color=PALETTE["blue"], alpha=0.75, rwidth=0.9)
    _scale(axes.xaxis, edges, may_be_logarithmic=False)
    _scale(axes.yaxis, counts, may_be_logarithmic=False)
    axes.axvline(mean, color=PALETTE["amber"], gid="mean")
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    axes.annotate(f"mean {number(mean)}", (mean, 1), (6, -6), color=PALETTE["amber"], **place)
    return _to_svg(axes)
