"""Training and test images: by names of folders or arrays, else a share is held out."""

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from configs.schema import Key, Pattern, ShareOrCount

SHARE = 0.1  # of the images, held out where nobody has split them
NONE_HELD_OUT = "none is held out, the test split is the training split: data.held_out=0"

KEYS = {
    "data.held_out": Key(
        SHARE,
        ShareOrCount(),
        "images that are held out to test on where the data have no splits: a share below 1, or "
        "a number; 0: none, and the test split is the training split",
    ),
    "data.groups": Key(
        "",
        Pattern(),
        "regular expression on the names of files, such as 'patient_(\\d+)': files with the same "
        "first group (without groups: with the same match) are held out together",
    ),
}

# Words for the splits, in any case; of several names the first word counts.
TRAIN = ("train", "training")
TEST = (
    *("test", "testing", "validation", "valid", "val", "eval", "evaluation"),
    *("dev", "development", "heldout", "holdout"),
)
# Words before or after the name of a split: test_images, valset, train2017.
AROUND = "images?|imgs?|pictures?|pics?|photos?|samples?|files?|data|dataset|set|split|folder"
_WORDS = "|".join((*TRAIN, *TEST))
_SPLIT = re.compile(rf"(?:{AROUND})?({_WORDS})(?:{AROUND})?(?:(?:19|20)\d\d)?")
_HINT = re.compile("train|test|val|dev|held|hold", re.IGNORECASE)  # is in all words, and cheap


def find_splits(names: Iterable[str]) -> dict[str, str]:
    """Names of the splits "train" and "test" among `names` of folders or arrays; {} without both.

    Of several for one split the first in the order of `TRAIN` or `TEST` counts.
    """
    ranks = {name: _rank(name) for name in sorted(set(names)) if _HINT.search(name)}
    train = [name for name, rank in ranks.items() if rank and rank[0] < len(TRAIN)]
    test = [name for name, rank in ranks.items() if rank and rank[0] >= len(TRAIN)]
    if not train or not test:
        return {}
    return {"train": min(train, key=ranks.get), "test": min(test, key=ranks.get)}


def _rank(name: str) -> tuple[int, int] | None:
    """(index of the split's word in `name`, number of letters beside it), to rank names."""
    match = _SPLIT.fullmatch(bare(name))
    return match and ((*TRAIN, *TEST).index(match[1]), len(match[0]) - len(match[1]))


def bare(name: str) -> str:
    """`name` in one case, its letters and digits only."""
    return re.sub(r"[\W_]+", "", name.casefold())


def lookalikes(names: Iterable[str]) -> tuple[str, str] | None:
    """Two of `names` that look like splits but are none to `find_splits`; None without any."""
    names = [name for name in sorted(set(names)) if _HINT.search(name)]
    if find_splits(names):
        return None
    train, test = ([name for name in names if _contains(name, words)] for words in (TRAIN, TEST))
    return next(((a, b) for a in train for b in test if a != b), None)


def _contains(name: str, words: Sequence[str]) -> bool:
    """True if `name` contains one of the words, as in a_train, trainB, or test1."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).casefold()
    return re.search(rf"(?<![a-z])({'|'.join(words)})(?![a-z])", spaced) is not None


def held_out(n: int, split: str, amount: float = SHARE, groups: str = "") -> NDArray[np.int64]:
    """Indices of `split` of n images that come without splits: "test" is fixed and random.

    `amount` is `data.held_out`. At least one image is in "test" and one in "train"; with an amount
    of 0 both have all. Raises ValueError where there are fewer than two to split, or too few, or
    with `groups` (`data.groups`), which need names.
    """
    if groups:
        raise ValueError(
            f"data.groups={groups!r} needs names of files: arrays have none, and data.rules=1 does "
            "not look at them"
        )
    if not amount:
        return np.arange(n)
    _check(n, amount)
    order = np.random.RandomState(0).permutation(n)
    number = round(n * amount) if amount < 1 else int(amount)
    number = min(max(1, number), n - 1)
    return order[number:] if split == "train" else order[:number]


def held_out_by_name(
    names: Sequence[str], split: str, amount: float = SHARE, groups: str = ""
) -> NDArray[np.int64]:
    """Indices of `split` of the images `names`, if there are no splits: "test" by their hashes.

    A hash is the SHA-256 of the UTF-8 text, its first 8 bytes as a fraction of 2^64. With an
    `amount` (`data.held_out`) below 1, "test" has the names whose hash is below it, so that an
    added image moves no other; else that many names, those with the smallest hashes. The
    name with the smallest hash is always in "test", and that with the largest in "train". With an
    amount of 0 both splits have all.

    `groups` is `data.groups`: images of one group share the hash of the group's name, and are held
    out together, by whole groups until a number is reached. A name without a match is a group.

    Raises ValueError where there are fewer than two groups, or too few images.
    """
    if not amount:
        return np.arange(len(names))
    _check(len(names), amount)
    hashes = np.array([_hash(group) for group in _groups(names, groups)])
    if hashes.min() == hashes.max():
        raise ValueError(
            f"data.groups={groups!r} puts all {len(names):,} images into one group, which cannot "
            "be split: its first group must differ between images, or data.held_out be 0"
        )
    if amount < 1:
        test = hashes < amount
    else:
        largest = np.sort(hashes)[int(amount) - 1]  # of those held out, with all of its group
        test = hashes <= largest
    test[hashes == hashes.min()] = True
    if test.all():
        test[hashes == hashes.max()] = False
    return np.flatnonzero(test if split == "test" else ~test)


def in_words(amount: float, by_name: bool, groups: str = "") -> str:
    """Text on what is held out of data without splits; the arguments are those above."""
    if not amount:
        return NONE_HELD_OUT
    if amount == SHARE and not by_name:
        return "a random tenth is held out"
    share = "a tenth" if amount == SHARE else f"a share of {amount:g}"
    words = f"{share} is held out"
    if amount >= 1:
        words = f"{amount:,.0f} {'is' if amount == 1 else 'are'} held out"
    return f"{words} by {'groups of ' * bool(groups)}names" if by_name else f"{words} at random"


def _check(n: int, amount: float) -> None:
    if n < 2:
        raise ValueError(
            f"{n} image(s) cannot be split into data to train and to test on: add images, or make "
            "the splits yourself, train and test, which may hold the same image, or train on all: "
            "--config.data.held_out=0"
        )
    if amount >= n:
        raise ValueError(
            f"data.held_out={amount:,.0f} leaves none of {n:,} images to train on; 0 trains on all"
        )


def _groups(names: Sequence[str], pattern: str) -> Sequence[str]:
    """The group of each of `names`: the first group of the match, else the match, else the name."""
    if not pattern:
        return names
    matches = map(re.compile(pattern).search, names)
    return [
        name if match is None else (match[1] if match.re.groups else match[0]) or name
        for name, match in zip(names, matches, strict=True)
    ]


def _hash(name: str) -> float:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
