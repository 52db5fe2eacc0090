"""What a person looks at: grids of images, tables, and an evaluation on one HTML page.

Data in, text out: nothing here reads or writes a file. Whatever comes from outside is escaped.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]  # (n, H, W, C)
Points = Sequence[tuple[float, float]]
Report = Mapping[str, float | str | NDArray]

WIDTH, HEIGHT = 520, 260  # of a large plot, in its own units
SMALL = (300, 190)
MARGIN = (58, 14, 14, 36)  # left, right, top, bottom: where the axes' numbers are
MOST_POINTS = 400  # of a curve; more are averaged
MOST_COLUMNS = 40  # of a histogram


class Metric(NamedTuple):
    """How a number of the report is shown; `better` is -1 where lower is, 1 where higher is."""

    key: str
    label: str
    better: int
    note: str


METRICS = (
    Metric("fid", "Fréchet distance", -1, "of Gaussian fits to the features"),
    Metric(
        "kid", "Kernel distance", -1, "KID: unbiased, so below zero by chance where it is small"
    ),
    Metric("IS", "Inception Score", 1, "over all samples, without splits"),
    Metric("precision", "Precision", 1, "share of samples on the data's manifold"),
    Metric("recall", "Recall", 1, "share of the data on the samples' manifold"),
    Metric("bpd", "Bits/dim", -1, "negative log-likelihood"),
    Metric("loss", "Loss", -1, "over the evaluated split"),
)


@dataclass(frozen=True)
class Picture:
    """A PNG of the page, with the words below it."""

    title: str
    caption: str
    png: bytes


def render(
    title: str,
    facts: Mapping[str, str],
    reports: Mapping[int, Report],
    shown: int,
    curves: Mapping[str, Points],
    pictures: Sequence[Picture],
    config: Mapping,
) -> str:
    """The whole page.

    Args:
        title: its heading.
        facts: what was evaluated, in a few words each.
        reports: {k: the arrays of report_{k}.npz}, by rising k.
        shown: the checkpoint that figures and large numbers are of.
        curves: {name: [(step, loss)]} of training.
        pictures: of checkpoint `shown`.
        config: every setting, as nested mappings.
    """
    report = reports[shown]
    figures = [_figure(_image(p), p.title, p.caption) for p in pictures]
    if loss := _loss_plot(curves):
        caption = "Training loss: mean and range of neighbouring steps; held-out loss as dots."
        figures.append(_figure(loss, "Loss", caption))
    bits = np.asarray(report.get("bpd_images", ()))
    if len(bits):
        caption = f"Bits per dimension of {len(bits):,} images; the line is their mean."
        figures.append(_figure(_histogram(bits, "bits/dim"), "Likelihood", caption))
    numbered = "".join(f.replace("<b>", f"<b>Figure {i}. ", 1) for i, f in enumerate(figures, 1))
    listed = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items()
    )
    body = [
        f"<header><h1>{escape(title)}</h1><dl class=facts>{listed}</dl></header>",
        _cards(report),
        _section("Checkpoints", _table(reports, shown) + _trends(reports)),
        _section("Figures", f"<div class=figures>{numbered}</div>"),
        _section("Cost", _cost(report)),
        _section("Settings", "".join(_settings(config))),
    ]
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>\n" if content else ""


# --- numbers --------------------------------------------------------------------------------------


def number(value: float) -> str:
    """All digits of a whole number, and four significant ones of any other."""
    value = float(value)
    if not math.isfinite(value):
        return "–"
    return (f"{value:,.0f}" if value.is_integer() else f"{value:#.4g}").replace("-", "−")


def _label(metric: Metric, report: Report) -> str:
    """A distance is named after its feature space."""
    features = str(report.get("features", ""))
    if metric.key == "fid" and features in ("inception", "torchscript"):
        return "FID"
    return (
        f"{metric.label}, {features}" if metric.key in ("fid", "kid") and features else metric.label
    )


def _cards(report: Report) -> str:
    cards = []
    for metric in METRICS:
        if metric.key in report:
            value = number(report[metric.key])
            error = report.get(f"{metric.key}_error")
            spread = "" if error is None else f"<small> ± {float(error):.2g}</small>"
            cards.append(
                f"<div class=card><h3>{escape(_label(metric, report))}</h3>"
                f"<p>{value}{spread}</p><span>{escape(metric.note)}</span></div>"
            )
    if "nearest" in report:
        note = "median distance of a training image to its nearest other one: "
        note += number(report["nearest_data"])
        cards.append(
            "<div class=card><h3>Nearest training image</h3>"
            f"<p>{number(report['nearest'])}</p><span>{note}</span></div>"
        )
    warning = ""
    if report.get("nonfinite", 0) > 0:
        drawn = float(report["num_samples"]) + float(report["nonfinite"])
        warning = (
            f"<p class=warning>{number(report['nonfinite'])} of {number(drawn)} samples were not "
            "finite; they are in no number of this page.</p>"
        )
    return f"<div class=cards>{''.join(cards)}</div>{warning}"


def _table(reports: Mapping[int, Report], shown: int) -> str:
    """A row for each checkpoint; the best of several in bold."""
    metrics = [m for m in METRICS if any(m.key in r for r in reports.values())]
    best = {m.key: _best(reports, m) for m in metrics}
    names = [f"{_label(m, reports[shown])}\u00a0{'↓' if m.better < 0 else '↑'}" for m in metrics]
    head = "".join(f"<th>{escape(n)}</th>" for n in ("checkpoint", "step", "samples", *names))
    rows = []
    for k, report in reports.items():
        mark = " class=shown" if k == shown and len(reports) > 1 else ""
        cells = [f"<td>{k}</td>"]
        for key in ("step", "num_samples", *(m.key for m in metrics)):
            value = number(report[key]) if key in report else ""
            cells.append(f"<td{' class=best' if best.get(key) == k else ''}>{value}</td>")
        rows.append(f"<tr{mark}>{''.join(cells)}</tr>")
    return (
        f"<div class=wide><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _best(reports: Mapping[int, Report], metric: Metric) -> int | None:
    """The checkpoint with the best value, if several have one."""
    values = {k: float(r[metric.key]) for k, r in reports.items() if metric.key in r}
    values = {k: metric.better * v for k, v in values.items() if math.isfinite(v)}
    return max(values, key=values.get) if len(values) > 1 else None


def _cost(report: Report) -> str:
    """Images, evaluations of the network and seconds of what was drawn and measured."""
    rows = []
    if "num_samples" in report:
        drawn = report["num_samples"] + report["nonfinite"]
        rows.append(("samples", drawn, report["nfe"], report["sampling_seconds"]))
    if "bpd_images" in report:
        images = len(report["bpd_images"])
        rows.append(("likelihoods", images, report["bpd_nfe"], report["bpd_seconds"]))
    lines = []
    for what, *values in rows:
        cells = "".join(f"<td>{number(round(float(v), 1))}</td>" for v in values)
        lines.append(f"<tr><td>{what}</td>{cells}</tr>")
    head = "<tr><th></th><th>images</th><th>network evaluations</th><th>seconds</th></tr>"
    table = f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>" if rows else ""
    seconds = number(round(float(report["seconds"]), 1))
    return (
        f"<div class=wide>{table}</div><p class=note>{seconds} seconds for this checkpoint since "
        "the last start; what an earlier one left on disk is not in them.</p>"
    )


def _settings(config: Mapping) -> list[str]:
    """One folded list for each section of the config, and one for what is in none."""
    sections = {name: value for name, value in config.items() if isinstance(value, Mapping)}
    alone = {name: value for name, value in config.items() if name not in sections}
    lists = []
    for name, values in {"general": alone, **sections}.items():
        items = "".join(
            f"<div><dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd></div>"
            for key, value in sorted(values.items())
        )
        lists.append(
            f"<details><summary>{escape(name)}</summary><dl class=pairs>{items}</dl></details>"
        )
    return lists


# --- figures --------------------------------------------------------------------------------------


def _figure(content: str, title: str, caption: str) -> str:
    words = f"<figcaption><b>{escape(title)}.</b> {escape(caption)}</figcaption>"
    return f"<figure>{content}{words}</figure>"


def _image(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    return f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">'


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
    if low == high:
        room = abs(low) / 10 or 1.0
        low, high = low - room, high + room
    elif logarithmic:
        low, high = low / 1.05, high * 1.05
    else:
        low, high = low - (high - low) * 0.04, high + (high - low) * 0.06
    return Axis(low, high, start, end, logarithmic)


def _frame(size: tuple[int, int], x: Axis, y: Axis, name: str, marks: str) -> str:
    """A plot: `marks` over the grid and numbers of its axes."""
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
    base = f'<path class=base d="M{left},{height - bottom}H{width - right}"/>'
    return (
        f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{escape(name)}">'
        f"{''.join(parts)}{marks}{base}</svg>"
    )


def _tick(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:.3g}".replace("-", "−")


def _area(size: tuple[int, int]) -> tuple[tuple[float, float], tuple[float, float]]:
    """From where to where x and y go, in a plot's own units."""
    (width, height), (left, right, top, bottom) = size, MARGIN
    return (left, width - right), (height - bottom, top)


def _path(points: Points) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _binned(points: Points) -> NDArray:
    """Rows (step, mean, lowest, highest) of `points`, of runs of them where there are many."""
    parts = np.array_split(np.asarray(points, dtype=float), min(len(points), MOST_POINTS))
    means = [(p[:, 0].mean(), p[:, 1].mean(), p[:, 1].min(), p[:, 1].max()) for p in parts]
    return np.array(means)


def _loss_plot(curves: Mapping[str, Points]) -> str:
    train, test = ([p for p in curves.get(n, ()) if math.isfinite(p[1])] for n in ("train", "test"))
    if not train and not test:
        return ""
    values = [value for _, value in (*train, *test)]
    logarithmic = min(values) > 0 and max(values) > 8 * min(values)
    across, up = _area((WIDTH, HEIGHT))
    x = _axis([step for step, _ in (*train, *test)], *across)
    y = _axis(values, *up, logarithmic)
    marks = ""
    if train:
        rows = _binned(train)
        band = [(x(s), y(low)) for s, _, low, _ in rows] + [(x(s), y(h)) for s, *_, h in rows[::-1]]
        marks += f'<path class=band d="{_path(band)}Z"/>'
        marks += f'<path class=line d="{_path([(x(s), y(mean)) for s, mean, *_ in rows])}"/>'
    for step, value, *_ in _binned(test) if test else ():
        marks += f'<circle class=dot cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>'
    return _frame((WIDTH, HEIGHT), x, y, "loss over steps", marks)


def _trends(reports: Mapping[int, Report]) -> str:
    """A small curve over the checkpoints for each metric that several of them have."""
    plots = []
    for metric in METRICS:
        points = [
            (float(r["step"]), float(r[metric.key])) for r in reports.values() if metric.key in r
        ]
        points = [p for p in points if math.isfinite(p[1])]
        if len(points) > 1:
            across, up = _area(SMALL)
            x, y = (
                _axis(v, *s) for v, s in zip(zip(*points, strict=True), (across, up), strict=True)
            )
            places = [(x(a), y(b)) for a, b in points]
            marks = f'<path class=line d="{_path(places)}"/>'
            marks += "".join(
                f'<circle class=knot cx="{a:.1f}" cy="{b:.1f}" r="3.2"/>' for a, b in places
            )
            label = _label(metric, next(r for r in reports.values() if metric.key in r))
            arrow = "lower is better" if metric.better < 0 else "higher is better"
            plot = _frame(SMALL, x, y, f"{label} over steps", marks)
            plots.append(f"<div><h3>{escape(label)} <small>{arrow}</small></h3>{plot}</div>")
    return f"<div class=trends>{''.join(plots)}</div>" if plots else ""


def _histogram(values: NDArray, name: str) -> str:
    columns = min(MOST_COLUMNS, max(5, round(2 * math.sqrt(len(values)))))
    counts, edges = np.histogram(values, bins=columns)
    across, up = _area((WIDTH, HEIGHT))
    x = _axis([float(edges[0]), float(edges[-1])], *across)
    y = Axis(0.0, float(counts.max()) * 1.08, *up)
    marks = ""
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        left, width, top = x(low), x(high) - x(low), y(float(count))
        marks += (
            f'<rect class=bar x="{left + 0.5:.1f}" y="{top:.1f}" width="{max(width - 1, 0.5):.1f}"'
        )
        marks += f' height="{y(0.0) - top:.1f}"/>'
    mean = float(np.mean(values))
    marks += f'<path class=mean d="M{x(mean):.1f},{up[0]}V{up[1]}"/>'
    marks += f'<text class=mean x="{x(mean) + 6:.1f}" y="{up[1] + 10}">mean {number(mean)}</text>'
    return _frame((WIDTH, HEIGHT), x, y, f"histogram of {name}", marks)


STYLE = """
:root{color-scheme:light dark;--paper:#fdfcfa;--panel:#fff;--ink:#1c1e22;--soft:#666a72;
--rule:#e5e1d9;--blue:#1f5fa8;--amber:#b8520f}
@media(prefers-color-scheme:dark){:root{--paper:#131519;--panel:#1a1d22;--ink:#e9e7e2;--soft:#9da1a9;
--rule:#2e323a;--blue:#74b3ff;--amber:#ffa563}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 Charter,"Bitstream Charter","Sitka Text",Cambria,Georgia,serif}
main{max-width:1060px;margin:0 auto;padding:48px 28px 72px}
h1{font-size:2.1rem;line-height:1.2;font-weight:600;letter-spacing:-.01em;margin:0 0 .7rem}
h2{font-size:1.25rem;font-weight:600;margin:3rem 0 1rem;padding-top:.9rem;
border-top:1px solid var(--rule)}
h3,.facts,table,summary,dl,.card span,.note,.warning,svg text{
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h3{font-size:.78rem;font-weight:600;margin:0;color:var(--soft)}
h3 small{font-weight:400}
dl{margin:0}dd,dt{margin:0}
.facts{display:flex;flex-wrap:wrap;gap:.5rem 2rem;font-size:.85rem}
.facts dt{color:var(--soft);font-size:.74rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(224px,1fr));gap:12px;margin-top:2rem}
.card{background:var(--panel);border:1px solid var(--rule);border-radius:8px;padding:14px 16px}
.card p{margin:.15rem 0 .1rem;font-size:1.7rem;line-height:1.25;font-variant-numeric:lining-nums}
.card p small{font-size:.9rem;color:var(--soft)}
.card span{display:block;font-size:.74rem;line-height:1.4;color:var(--soft)}
.warning{border-left:3px solid var(--amber);padding:.3rem .9rem;margin:1.2rem 0 0;font-size:.88rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums;
border-top:2px solid var(--ink);border-bottom:2px solid var(--ink)}
th,td{padding:.42rem .7rem;text-align:right;}
td{white-space:nowrap}
th:first-child,td:first-child{text-align:left}
th{font-weight:600;border-bottom:1px solid var(--ink)}
th{vertical-align:bottom}td.best{font-weight:700}
tr.shown td:first-child::after{content:" ◂ below";color:var(--soft);font-size:.78em}
.trends{display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:24px;
margin-top:1.8rem}
.trends svg{max-width:380px}
.figures{columns:440px 2;column-gap:32px}
figure{margin:0 0 34px;break-inside:avoid}
figure img{display:block;width:100%;height:auto;border-radius:4px;image-rendering:pixelated}
figcaption{margin-top:.6rem;font-size:.9rem;line-height:1.45;color:var(--soft)}
figcaption b{color:var(--ink);font-weight:600}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:12px;fill:var(--soft)}
svg .y{text-anchor:end}svg .x{text-anchor:middle}
.grid{stroke:var(--rule);fill:none}.base{stroke:var(--soft);fill:none}
.line{stroke:var(--blue);stroke-width:1.8;fill:none;stroke-linejoin:round}
.band{fill:var(--blue);opacity:.16}.bar{fill:var(--blue);opacity:.75}
.dot{fill:var(--amber)}.knot{fill:var(--paper);stroke:var(--blue);stroke-width:1.8}
path.mean{stroke:var(--amber);stroke-width:1.6;fill:none}svg text.mean{fill:var(--amber)}
.note{font-size:.82rem;color:var(--soft);margin:.8rem 0 0}
details{border-bottom:1px solid var(--rule)}
summary{cursor:pointer;padding:.5rem 0;font-size:.9rem}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:.1rem 2rem;
font-size:.8rem;padding:.2rem 0 1rem}
.pairs div{display:flex;justify-content:space-between;gap:1rem;min-width:0}
.pairs dt{color:var(--soft)}
.pairs dd{font-variant-numeric:tabular-nums;text-align:right;overflow-wrap:anywhere}
@media print{body{background:#fff}details{display:none}main{padding:0}}
"""


# --- pictures and tables --------------------------------------------------------------------------


def image_grid(
    images: Images, columns: int | None = None, min_size: int = 48, gap: int = 2
) -> Images:
    """One picture (H', W', 3) of `images`, row by row, in a near-square grid or in `columns`.

    Images smaller than `min_size` are enlarged by a whole factor; `gap` pixels lie between them.
    """
    n, height, width, channels = images.shape
    factor = max(1, math.ceil(min_size / min(height, width)))
    images = np.broadcast_to(images, (n, height, width, 3)) if channels == 1 else images
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    cell_height, cell_width = height * factor + gap, width * factor + gap
    grid = np.full((rows * cell_height + gap, columns * cell_width + gap, 3), 128, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * cell_height, gap + i % columns * cell_width
        grid[top : top + height * factor, left : left + width * factor] = image
    return grid


def format_table(rows: list[tuple[str, str]], title: str) -> str:
    """`rows` of (what, value) under `title`, aligned in two columns."""
    width = max(len(what) for what, _ in rows)
    return "\n".join([title, *(f"  {what:<{width}}  {value}" for what, value in rows)])
