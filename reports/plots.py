"""Plots as SVG: curves and histograms over axes with round numbers. Names are escaped."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from storage.files import LARGEST

Points = Sequence[tuple[float, float]]
Size = tuple[int, int]

LARGE, SMALL = (520, 270), (300, 210)  # width and height of a plot, in its own units
MARGIN = (78, 14, 14, 50)  # left, right, top, bottom: where the axes' numbers and titles are
MOST_POINTS = 400  # of a curve; more are averaged
MOST_COLUMNS = 40  # of a histogram
MOST_DOTS = 20  # of a curve; the points of a longer one are not marked
COLOURS = 6  # classes c0, c1, ... of page.css for curves over each other


def number(value: float) -> str:
    """All digits of a whole number, and four significant ones of any other."""
    value = float(value)
    if not math.isfinite(value):
        return "–"
    return (f"{value:,.0f}" if value.is_integer() else f"{value:#.4g}").replace("-", "−")


def drawable(values: ArrayLike) -> NDArray[np.bool_]:
    """Which of `values` an axis can hold: those that are finite, and not beyond all measure."""
    return np.abs(values) < LARGEST


class Axis(NamedTuple):
    """Where the values from `low` to `high` lie between the pixels `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (
            math.log(v) if self.logarithmic else v for v in (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """A few round numbers from `low` to `high`."""
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if self.high < 100 * self.low else (1,)
            marks = [step * 10.0**decade for decade in decades for step in steps]
            return [m for m in marks if self.low <= m * (1 + 1e-9) and m <= self.high * (1 + 1e-9)]
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _axis(values: Sequence[float], start: float, end: float, logarithmic: bool = False) -> Axis:
    """An axis over `values` with some room; around a single value where there is but one."""
    low, high = min(values), max(values)
    if math.isclose(low, high, abs_tol=1 / LARGEST):
        room = abs(low) / 10 if abs(low) > 1 / LARGEST else 1.0
        low, high = low - room, high + room
    elif logarithmic:
        low, high = low / 1.05, high * 1.05
    else:
        low, high = low - (high - low) * 0.04, high + (high - low) * 0.06
    return Axis(low, high, start, end, logarithmic)


def _logarithmic(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) > 8 * min(values)


def _axes(
    size: Size, xs: Sequence[float], ys: Sequence[float], logarithmic: tuple[bool, bool]
) -> list[Axis]:
    (width, height), (left, right, top, bottom) = size, MARGIN
    return [
        _axis(xs, left, width - right, logarithmic[0]),
        _axis(ys, height - bottom, top, logarithmic[1]),
    ]


def _frame(size: Size, x: Axis, y: Axis, titles: tuple[str, str], marks: str) -> str:
    """A plot: `marks` over the grid, numbers and `titles` of its axes."""
    width, height = size
    left, right, _, bottom = MARGIN
    parts = []
    for tick in y.ticks():
        at = f"{y(tick):.1f}"
        parts.append(f'<path class=grid d="M{left},{at}H{width - right}"/>')
        parts.append(f'<text class=y x="{left - 8}" y="{at}" dy=".32em">{_tick(tick)}</text>')
    for tick in x.ticks():
        parts.append(
            f'<text class=x x="{x(tick):.1f}" y="{height - bottom + 18}">{_tick(tick)}</text>'
        )
    parts.append(f'<path class=base d="M{left},{height - bottom}H{width - right}"/>')
    of_x, of_y = map(escape, titles)
    middle = (y.start + y.end) / 2
    parts.append(f'<text class=x x="{(x.start + x.end) / 2}" y="{height - 8}">{of_x}</text>')
    parts.append(f'<text class=x transform="translate(12,{middle})rotate(-90)">{of_y}</text>')
    return (
        f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{of_y} over {of_x}">'
        f"{''.join(parts)}{marks}</svg>"
    )


def _tick(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:.3g}".replace("-", "−")


def _path(points: Points) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _binned(points: Points) -> NDArray:
    """Rows (step, mean, lowest, highest) of `points`, of runs of them where there are many."""
    parts = np.array_split(np.asarray(points, dtype=float), min(len(points), MOST_POINTS))
    means = [(p[:, 0].mean(), p[:, 1].mean(), p[:, 1].min(), p[:, 1].max()) for p in parts]
    return np.array(means)


def loss_plot(curves: Mapping[str, Points]) -> str:
    """The curve of training, `train`, as mean and range, and `test` as dots; "" without any."""
    train, test = ([p for p in curves.get(n, ()) if drawable(p[1])] for n in ("train", "test"))
    if not train and not test:
        return ""
    steps, values = zip(*train, *test, strict=True)
    x, y = _axes(LARGE, steps, values, (False, _logarithmic(values)))
    marks = ""
    if train:
        rows = _binned(train)
        band = [(x(s), y(low)) for s, _, low, _ in rows] + [(x(s), y(h)) for s, *_, h in rows[::-1]]
        marks += f'<path class=band d="{_path(band)}Z"/>'
        marks += f'<path class=line d="{_path([(x(s), y(mean)) for s, mean, *_ in rows])}"/>'
    for step, value, *_ in _binned(test) if test else ():
        marks += f'<circle class=dot cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>'
    return _frame(LARGE, x, y, ("step", "loss"), marks)


def histogram(values: NDArray, titles: tuple[str, str]) -> str:
    """Of `values` (n,), with a line at their mean; `titles` are those of its axes."""
    columns = min(MOST_COLUMNS, max(5, round(2 * math.sqrt(len(values)))))
    counts, edges = np.histogram(values, bins=columns)
    x, y = _axes(LARGE, edges, counts, (False, False))
    y = y._replace(low=0.0, high=float(counts.max()) * 1.08)
    marks = ""
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        width, top = max(x(high) - x(low) - 1, 0.5), y(count)
        marks += f'<rect class=bar x="{x(low) + 0.5:.1f}" y="{top:.1f}" width="{width:.1f}"'
        marks += f' height="{y(0.0) - top:.1f}"/>'
    mean = float(np.mean(values))
    marks += f'<path class=mean d="M{x(mean):.1f},{y.start}V{y.end}"/>'
    marks += f'<text class=mean x="{x(mean) + 6:.1f}" y="{y.end + 10}">mean {number(mean)}</text>'
    return _frame(LARGE, x, y, titles, marks)


def several(
    curves: Sequence[tuple[int, Points]],
    titles: tuple[str, str],
    *,
    size: Size = LARGE,
    floor: float | None = None,
    logarithmic_x: bool = False,
) -> str:
    """Curves over each other, each with the number k of its colour, class c{k} of the page's style.

    Of many points means of neighbours are drawn. "" where there is no point.

    Args:
        titles: of the axes.
        floor: where a line across is drawn, if anywhere.
        logarithmic_x: whether the x axis may be logarithmic, as the y axis is for values that are
            far apart.
    """
    kept = [(k, [p for p in points if drawable(p).all()]) for k, points in curves]
    every = [point for _, points in kept for point in points]
    if not every:
        return ""
    xs, ys = zip(*every, strict=True)
    floor = floor if floor is not None and drawable(floor) else None
    ys = ys if floor is None else (*ys, floor)
    x, y = _axes(size, xs, ys, (logarithmic_x and _logarithmic(xs), _logarithmic(ys)))
    marks = ""
    if floor is not None:
        marks += f'<path class=floor d="M{x.start},{y(floor):.1f}H{x.end}"/>'
    for k, points in kept:
        if points:
            places = [(x(step), y(mean)) for step, mean, *_ in _binned(points)]
            marks += f'<path class="line c{k % COLOURS}" d="{_path(places)}"/>'
            for a, b in places if len(points) <= MOST_DOTS else ():
                marks += f'<circle class="knot c{k % COLOURS}" cx="{a:.1f}" cy="{b:.1f}" r="3.2"/>'
    return _frame(size, x, y, titles, marks)
