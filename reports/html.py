"""HTML of pages that need no other file. Every text is escaped here; `content` is HTML already."""

import base64
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from reports.plots import CSS, curve_colour, is_dashed


@dataclass(frozen=True)
class Picture:
    """A picture of a page, in an image format called `kind`, with the words below it.

    `rows` are names of its rows, which are of one height and stand beside them. `bars` are colour
    bars: a name, and what is black and what is white.
    """

    title: str
    caption: str
    content: bytes
    kind: str = "png"
    rows: Sequence[str] = ()
    bars: Sequence[tuple[str, str, str]] = ()

    def html(self) -> str:
        """The figure that holds the picture itself."""
        data = base64.b64encode(self.content).decode("ascii")
        source = f"data:image/{self.kind};base64,{data}"
        image = f'<img alt="{escape(self.title)}" src="{source}">'
        if self.rows:
            names = "".join(f"<li title='{escape(name)}'>{escape(name)}</li>" for name in self.rows)
            image = f"<div class=named><ol>{names}</ol>{image}</div>"
        for bar in self.bars:
            name, low, high = (f"<span>{escape(text)}</span>" for text in bar)
            image += f"<div class=bar>{name}{low}<i></i>{high}</div>"
        return figure(image, self.title, self.caption)


def document(title: str, content: str) -> str:
    """The whole page."""
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{CSS}</style></head>\n"
        f"<body><main>{content}</main></body></html>\n"
    )


def section(title: str, content: str) -> str:
    """A part of the page under a `title`; "" without content."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>\n" if content else ""


def figure(content: str, title: str, caption: str) -> str:
    """A picture or plot over its words."""
    words = f"<figcaption><b>{escape(title)}.</b> {escape(caption)}</figcaption>"
    return f"<figure>{content}{words}</figure>"


def legend(names: Iterable[str]) -> str:
    """The colours and dashes of curves, from those of number 0 on, with their `names`."""
    keys = (
        f'<span><i class="key{" dashed" if is_dashed(k) else ""}" '
        f'style="color:var(--{curve_colour(k)})"></i>{escape(name)}</span>'
        for k, name in enumerate(names)
    )
    return f"<div class=legend>{''.join(keys)}</div>"


def table(names: Sequence[str], rows: Sequence[str], kind: str = "wide") -> str:
    """A table with the `names` of its columns over `rows`, as `row` makes them."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f"<div class='{kind}'><table>{body}</table></div>"


def row(cells: Iterable[str], best: Container[int] = (), kind: str = "") -> str:
    """A row of a table; cells in the columns `best` are bold."""
    marked = (
        f"<td{' class=best' if i in best else ''}>{escape(text)}</td>"
        for i, text in enumerate(cells)
    )
    return f"<tr{f' class={kind}' if kind else ''}>{''.join(marked)}</tr>"


def pairs(values: Mapping, kind: str) -> str:
    """A list of names and values."""
    items = (
        f"<div><dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in values.items()
    )
    return f"<dl class={kind}>{''.join(items)}</dl>"


def notes(lines: Iterable[str], kind: str = "note") -> str:
    """Paragraphs in small type."""
    return "".join(f"<p class={kind}>{escape(line)}</p>" for line in lines)
