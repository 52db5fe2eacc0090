"""The layout of the program: few modules on the top level, and imports without circles."""

import ast
import graphlib

from conftest import ROOT

OUTSIDE = {"tests", "benchmarks"}


def modules():
    """{dotted name: path} of the program's modules."""
    found = {}
    for path in ROOT.glob("**/*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if not OUTSIDE & {parts[0]} and not parts[0].startswith("."):
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(path, known):
    """The program's modules that `path` imports, within functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in names)


def test_imports_have_no_circles():
    known = modules()
    graph = {name: set(imported(path, known)) & known.keys() for name, path in known.items()}
    assert len(graph) > 80
    assert {"training", "datasets"} <= graph["run_lib"]
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names a circle
    assert order.index("methods.base") < order.index("sampling") < order.index("main")


def test_at_most_twelve_modules_on_the_top_level():
    assert len(list(ROOT.glob("*.py"))) <= 12
