"""Count what the test suite checks: asserts that ran, expected errors, examples of hypothesis.

    python3 benchmarks/suite.py [--checkout FOLDER] [--out COUNTS.json] [pytest's options ...]

It runs the tests of a checkout and prints, for each file, the seconds of its tests, the number of
tests, `assert` statements reached, `pytest.raises`, comparisons of arrays (`numpy.testing`,
`torch.testing`) and examples of hypothesis; the JSON holds the same by test. Asserts of other
processes are not counted. Two checkouts, before and after a change of the suite, are compared with
`--before COUNTS.json`.
"""

import argparse
import ast
import builtins
import collections
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest
from _pytest.assertion.rewrite import AssertionRewriter

KINDS = ("seconds", "tests", "asserts", "raises", "arrays", "examples")
FOLDER = "PFGM_SUITE_COUNTS"  # environment variable: where each process of pytest leaves its counts
COUNT = "count_assert_of_suite"  # a builtin; two leading underscores would be mangled in a class
COMPARISONS = {
    "numpy.testing": ("assert_allclose", "assert_array_equal", "assert_equal"),
    "torch.testing": ("assert_close",),
}

Counts = dict[str, collections.Counter]  # by test


class Counter:
    """A plugin of pytest that counts the checks of the test that runs."""

    def __init__(self):
        self.counts: Counts = collections.defaultdict(collections.Counter)
        self.test = "collection"

    def add(self, kind: str, number: float = 1) -> None:
        self.counts[self.test][kind] += number

    def counting(self, function, kind: str):
        """`function` that adds one of `kind` where it returns."""

        def counted(*arguments, **options):
            result = function(*arguments, **options)
            self.add(kind)
            return result

        return counted

    def pytest_runtest_logstart(self, nodeid):
        self.test = nodeid

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.counts[report.nodeid]["tests"] += 1
        self.counts[report.nodeid]["seconds"] += report.duration

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item):
        statistics = str(getattr(item, "hypothesis_statistics", ""))
        self.add("examples", sum(map(int, re.findall(r"(\d+) passing,", statistics))))

    def pytest_sessionfinish(self):
        path = Path(os.environ[FOLDER], f"{os.getpid()}.json")
        path.write_text(json.dumps(self.counts))


class CountAsserts(ast.NodeTransformer):
    """Insert a call of `COUNT` before each assert; pytest's own hook is slower."""

    def visit_Assert(self, node):
        call = ast.parse(f"{COUNT}()").body[0]
        return [ast.fix_missing_locations(ast.copy_location(call, node)), node]


def pytest_configure(config) -> None:
    """Registers the counter in a process that runs tests, which under xdist is a worker."""
    if config.getoption("numprocesses", None):
        return
    counter = Counter()
    config.pluginmanager.register(counter)
    setattr(builtins, COUNT, lambda: counter.add("asserts"))
    rewrite = AssertionRewriter.run

    def count_and_rewrite(self, module):
        rewrite(self, CountAsserts().visit(module))

    AssertionRewriter.run = count_and_rewrite
    for name, functions in COMPARISONS.items():
        module = importlib.import_module(name)
        for function in functions:
            setattr(module, function, counter.counting(getattr(module, function), "arrays"))
    pytest.raises = counter.counting(pytest.raises, "raises")
    hypothesis.settings.register_profile("counting takes time", deadline=None)
    hypothesis.settings.load_profile("counting takes time")


def count(checkout: Path, options: list[str]) -> Counts:
    """Checks of each test of a checkout; the tests' output is printed."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            FOLDER: folder,
            "PYTHONPATH": str(Path(__file__).parent),
            "PYTHONPYCACHEPREFIX": f"{folder}/pycache",  # asserts compiled before tell of none
            "PYTHONDONTWRITEBYTECODE": "",  # else each process that a test starts compiles it all
        }
        tests = ["-m", "pytest", "-p", "suite", *options]
        subprocess.run([sys.executable, *tests], cwd=checkout, env=environment)
        counts = collections.defaultdict(collections.Counter)
        for path in Path(folder).glob("*.json"):
            for test, numbers in json.loads(path.read_text()).items():
                counts[test].update(numbers)
    return counts


def by_file(counts: Counts) -> Counts:
    """Sums over the tests of each file, and of all as `total`."""
    sums = collections.defaultdict(collections.Counter)
    for test, numbers in counts.items():
        for name in (test.partition("::")[0], "total"):
            sums[name].update(numbers)
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--out", type=Path, help="JSON file for the counts")
    parser.add_argument("--before", type=Path, help="JSON file of an earlier count")
    arguments, options = parser.parse_known_args()
    counts = count(arguments.checkout, options)
    if arguments.out:
        arguments.out.write_text(json.dumps(counts, indent=1, sort_keys=True))
    tables = [by_file(counts)]
    if arguments.before:
        tables.insert(0, by_file(json.loads(arguments.before.read_text())))
    print(f"{'':40}" + "".join(f"{kind:>{9 * len(tables)}}" for kind in KINDS))
    for name in sorted(set().union(*tables), key=lambda name: (name == "total", name)):
        cells = [table[name][kind] for kind in KINDS for table in tables]
        print(f"{name:40}" + "".join(f"{cell:9.0f}" for cell in cells))


if __name__ == "__main__":
    main()
