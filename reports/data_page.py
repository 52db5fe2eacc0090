"""A look at the data on one HTML page: pictures, values, classes, and the cost of a step.

Data in, text out.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reports.html import Picture, document, figure, notes, pairs, row, section, table
from reports.plots import histogram, number

MOST_CLASSES = 100  # rows of the table
MOST_CHANNELS = 16


class Values(NamedTuple):
    """Numbers of images or conditions.

    Attributes:
        sample: of all numbers.
        channels: (least, largest, mean, std) of each channel, or entry of a vector.
        caption: says whose numbers they are.
    """

    name: str
    sample: NDArray[np.float64]
    channels: Sequence[tuple[float, float, float, float]]
    caption: str = "Of these images, all channels"


class ClassCount(NamedTuple):
    """The images of a class in the two splits."""

    name: str
    train: int
    test: int


class Look(NamedTuple):
    """Contents of the page.

    Attributes:
        line: the line of the log on the data.
        facts, estimates: texts by their names.
        grid: of images as the network will see them, PNG.
        caption: of the grid.
        rows: names of its rows, [] where these are no classes.
        values: of the images as stored, and as the network will see them; of their conditions.
        classes: [] without any.
    """

    line: str
    facts: Mapping[str, str]
    estimates: Mapping[str, str]
    grid: bytes
    caption: str
    rows: Sequence[str]
    values: Sequence[Values]
    classes: Sequence[ClassCount]


def render(title: str, look: Look) -> str:
    """The whole page, under the heading `title`."""
    grid = Picture("What the network will see", look.caption, look.grid, rows=look.rows)
    plots = [_histogram(values) for values in look.values]
    content = [
        f"<header><h1>{escape(title)}</h1>{pairs(look.facts, 'facts')}</header>",
        notes(look.line.split("; ")),
        section("Cost", pairs(look.estimates, "facts")),
        section("Images", f"<div class=figures>{''.join([grid.html(), *plots])}</div>"),
        section("Values", _channels(look.values)),
        section("Classes", _classes(look.classes)),
    ]
    return document(title, "".join(content))


def _histogram(values: Values) -> str:
    plot = histogram(values.sample, (f"{values.name} values", "how many"))
    title = f"{values.name[0].upper()}{values.name[1:]} values"
    return figure(plot, title, f"{values.caption}; the line is the mean.")


def _channels(values: Sequence[Values]) -> str:
    """A table of the least, largest, mean and standard deviation of each channel."""
    rows = [
        row([each.name, str(channel), *map(number, numbers)])
        for each in values
        for channel, numbers in enumerate(each.channels[:MOST_CHANNELS])
    ]
    names = ("values", "channel", "least", "largest", "mean", "standard deviation")
    more = max((len(each.channels) for each in values), default=0) - MOST_CHANNELS
    return table(names, rows) + notes([f"{more} further channels."] * (more > 0))


def _classes(classes: Sequence[ClassCount]) -> str:
    """A table of the images of each class; of many classes the first."""
    rows = [
        row([f"{k} {each.name}".removesuffix(f" {k}"), number(each.train), number(each.test)])
        for k, each in enumerate(classes[:MOST_CLASSES])
    ]
    if not rows:
        return ""
    train = [each.train for each in classes]
    lines = [f"{len(classes):,} classes of {min(train):,} to {max(train):,} training images."]
    return table(("class", "to train on", "to test on"), rows) + notes(lines)
