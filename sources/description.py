"""The line of the log on the data of a run."""

from collections.abc import Sequence

MAX_NAMED = 20  # classes whose names it has


def line(
    name: str,
    numbers: tuple[int, int],
    shape: tuple[int, int, int],
    *,
    patch: tuple[int, ...] = (),
    split: str = "",
    changed: str = "",
    classes: int = 0,
    class_names: Sequence[str] = (),
    remarks: Sequence[str] = (),
) -> str:
    """Text on the data called `name`, of so many images to train and to test on, (C, H, W).

    Args:
        patch: sides of the random patches of a training; () for none.
        split: text on how they are split.
        changed: text on how a training step changes the images.
        classes, class_names: number and names of classes; 0 for none.
        remarks: what else there is to say; empty ones are left out.
    """
    (train, test), (channels, height, width) = numbers, shape
    words = [
        f"data: {name}",
        f"{train:,} images to train on and {test:,} to test on" + (f" ({split})" if split else ""),
        f"{height} x {width}" + (" in random patches of {} x {}".format(*patch) if patch else ""),
        f"{channels} channel{'s' * (channels > 1)}",
        changed,
    ]
    if classes:
        words.append(f"{classes} classes{_named(class_names)}")
    return "; ".join([", ".join(words), *filter(None, remarks)])


def _named(names: Sequence[str]) -> str:
    """The first names with their numbers, in brackets; "" where they are only numbers."""
    if not names or [*names] == [*map(str, range(len(names)))]:
        return ""
    named = ", ".join(f"{k} {name:.30}" for k, name in enumerate(names[:MAX_NAMED]))
    return f" ({named}{', ...' if len(names) > MAX_NAMED else ''})"
