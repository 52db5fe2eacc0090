"""Compare two records of record.py, entry by entry; its docstring has the tolerances."""

import math

import common
import numpy as np

Record = dict[str, np.ndarray]

TOLERANCE = 1e-4


def difference(new: np.ndarray, old: np.ndarray) -> tuple[float, str]:
    """Share of the tolerance that the change takes (0 for none), and a word on it."""
    if new.dtype.kind == old.dtype.kind == "U":
        lost = sorted({*old.ravel()} - {*new.ravel()})
        return (math.inf, f"lost: {', '.join(lost[:3])}") if lost else (0.0, "equal")
    if new.shape != old.shape or new.dtype.kind != old.dtype.kind:
        return math.inf, f"{new.dtype}{new.shape} instead of {old.dtype}{old.shape}"
    if new.tobytes() == old.tobytes():
        return 0.0, "equal"
    if old.dtype == np.uint8:
        levels = np.abs(new.astype(int) - old)
        share = (levels > 0).mean()
        within = levels.max() <= 1 and share <= 0.01
        words = f"{levels.max()} grey levels, in {share:.2%} of the pixels"
        return share / 0.01 if within else math.inf, words
    if old.dtype.kind != "f":
        return math.inf, "differs"
    finite = np.isfinite(old)
    if not np.array_equal(new[~finite], old[~finite], equal_nan=True) or (
        not np.isfinite(new[finite]).all()
    ):
        return math.inf, "other entries are not finite"
    old, new = old[finite].astype(np.float64), new[finite].astype(np.float64)
    largest = np.abs(old).max(initial=0)
    relative = np.abs(new - old).max(initial=0) / largest if largest else math.inf
    return relative / TOLERANCE, f"{relative:.1e} relative"


def compare(new: Record, old: Record, bitwise: str = "") -> bool:
    """Print a table of the entries of `old` in `new`; whether all are within their tolerance.

    Those with `bitwise` in their names have none.
    """
    table = common.Table(("part", "<34"), ("entries", ">7"), ("equal", ">7"), ("largest", "<60"))
    groups: dict[str, list[str]] = {}
    for name in old:
        groups.setdefault(name.rpartition(": ")[0], []).append(name)
    beyond = 0
    for group, names in groups.items():
        changed = {}
        for name in names:
            if name.endswith("seconds"):
                continue
            share, words = math.inf, "missing"
            if name in new:
                share, words = difference(new[name], old[name])
            if share:
                tolerated = share <= 1 and not (bitwise and bitwise in name)
                changed[name] = (share, words if tolerated else f"{words}: BEYOND TOLERANCE")
                beyond += not tolerated
        worst = max(changed.values(), default=(0, "bitwise equal"))[1]
        table.row(group, f"{len(names)}", f"{len(names) - len(changed)}", worst)
        for name, (_, words) in changed.items():
            table.row(f"    {name.rpartition(': ')[2]}", "", "", words)
    if others := sorted(new.keys() - old.keys()):
        print(f"{len(others)} entries are new, among them: {', '.join(others[:3])}")
    print(f"{beyond} of {len(old)} entries are beyond their tolerance")
    return not beyond
