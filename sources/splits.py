"""Which images are to train and which to test on: as names tell, else by a hash of them."""

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from sources.base import held_out

SHARE = 0.1  # of the images, held out where nobody has split them

# Words for the splits, in any case; of several names the first word counts.
TRAIN = ("train", "training")
TEST = (
    *("test", "testing", "validation", "valid", "val", "eval", "evaluation"),
    *("dev", "development", "heldout", "holdout"),
)
# What may stand beside a word: test_images, valset, train2017.
_AROUND = "images?|imgs?|pictures?|pics?|photos?|samples?|files?|data|dataset|set|split|folder"
_WORDS = "|".join((*TRAIN, *TEST))
_SPLIT = re.compile(rf"(?:{_AROUND})?({_WORDS})(?:{_AROUND})?(?:(?:19|20)\d\d)?")
_HINT = re.compile("train|test|val|dev|held|hold", re.IGNORECASE)  # is in all words, and cheap


def given_splits(names: Iterable[str]) -> dict[str, str]:
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
    """Number of the word that the name of a split consists of, and how many letters are beside."""
    bare = re.sub(r"[\W_]+", "", name.casefold())
    match = _SPLIT.fullmatch(bare)
    return match and ((*TRAIN, *TEST).index(match[1]), len(bare) - len(match[1]))


def unknown_splits(names: Iterable[str]) -> tuple[str, str] | None:
    """Two of `names` that look like a split but are not told apart by `given_splits`, or None."""
    names = [name for name in sorted(set(names)) if _HINT.search(name)]
    if given_splits(names):
        return None
    train, test = ([name for name in names if _contains(name, words)] for words in (TRAIN, TEST))
    return next(((a, b) for a in train for b in test if a != b), None)


def _contains(name: str, words: Sequence[str]) -> bool:
    """Whether one of the words stands in `name`, as in a_train, trainB, or test1."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).casefold()
    return re.search(rf"(?<![a-z])({'|'.join(words)})(?![a-z])", spaced) is not None


def held_out_by_name(names: Sequence[str], split: str) -> NDArray[np.int64]:
    """Indices of `split` where nobody has split the images `names`: "test" is about a tenth.

    These are the names whose hash (SHA-256 of the UTF-8 text, its first 8 bytes as a fraction of
    2^64) is below `SHARE`: a further image moves no other. There is at least one, that of the
    smallest hash, and never all: that of the largest is trained on.

    Raises ValueError where there are fewer than two.
    """
    if len(names) < 2:
        return held_out(len(names), split)  # raises
    hashes = np.array([_hash(name) for name in names])
    test = hashes < SHARE
    test[hashes.argmin()] = True
    if test.all():
        test[hashes.argmax()] = False
    return np.flatnonzero(test if split == "test" else ~test)


def _hash(name: str) -> float:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
