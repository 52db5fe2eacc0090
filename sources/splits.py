"""Training and test images: by names of folders or arrays, else about a tenth is held out."""

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

SHARE = 0.1  # of the images, held out where nobody has split them

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


def held_out(n: int, split: str) -> NDArray[np.int64]:
    """Indices of `split` where nobody has split n images: "test" is a fixed random tenth.

    Raises ValueError where there are fewer than two.
    """
    if n < 2:
        raise ValueError(
            f"{n} image(s) cannot be split into data to train and to test on: add images, or make "
            "the splits yourself, train and test, which may hold the same image"
        )
    order = np.random.RandomState(0).permutation(n)
    tenth = max(1, round(n / 10))
    return order[tenth:] if split == "train" else order[:tenth]


def held_out_by_name(names: Sequence[str], split: str) -> NDArray[np.int64]:
    """Indices of `split` of the images `names`, if there are no splits: "test" is about a tenth.

    It has the names whose hash (SHA-256 of the UTF-8 text, its first 8 bytes as a fraction of 2^64)
    is below `SHARE`, so that an added image moves no other. The name with the smallest hash is
    always in "test", and that with the largest in "train".

    Raises ValueError where there are fewer than two.
    """
    if len(names) < 2:
        return held_out(len(names), split)  # raises ValueError
    hashes = np.array([_hash(name) for name in names])
    test = hashes < SHARE
    test[hashes.argmin()] = True
    if test.all():
        test[hashes.argmax()] = False
    return np.flatnonzero(test if split == "test" else ~test)


def _hash(name: str) -> float:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
