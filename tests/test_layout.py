"""The layout of the program: imports run downwards only, and a config ends at the front door."""

import ast
import graphlib

from conftest import ROOT

OUTSIDE = {"tests", "benchmarks"}

# Where a config is read: programs, what builds the parts, and what stores configs.
READERS = {"main.py", "run_lib.py", "experiment.py", "completion.py", "hyper_parameters.py"}
READERS |= {"storage/run_config.py"}
BUILDERS = {  # functions that call their part's `from_config`
    "models/__init__.py": "create_model",
    "methods/__init__.py": "get_method",
    "losses.py": "get_loss_fn",
    "sampling.py": "get_sampling_fn",
    "likelihood.py": "get_likelihood_fn",
    "datasets.py": "get_dataset",
}


def modules():
    """{dotted name: path} of the program's modules."""
    paths = {}
    for path in ROOT.glob("**/*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if not OUTSIDE & {parts[0]} and not parts[0].startswith("."):
            paths[".".join(parts).removesuffix(".__init__")] = path
    return paths


def imported(path, program):
    """The program's modules that `path` imports, within functions too, and in a key's registry."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in program)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in program else node.module for name in names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            module, _, name = node.value.rpartition(".")  # of OneOf(registry="methods.METHODS")
            if module in program and name.isupper() and len(name) > 1:  # no key such as sampling.N
                yield module


def test_imports_have_no_circles():
    program = modules()
    graph = {name: set(imported(path, program)) & program.keys() for name, path in program.items()}
    graph = {name: below - {name} for name, below in graph.items()}
    assert len(graph) > 80
    assert {"training", "datasets"} <= graph["run_lib"]
    assert "solvers.predictor_corrector" in graph["samplers.pc"]  # imported by a registry
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names a circle
    assert order.index("methods.base") < order.index("sampling") < order.index("main")


# Programs that lie beside what they use, and the declarations that every part imports.
PROGRAMS = {"reports.toy", "reports.plates", "reports.compare", "metrics.compare", "configs.table"}
DECLARATIONS = {"configs.keys", "configs.schema", "configs.published"}


def room(module):
    """The folder of a module, or the module itself on the top level."""
    if module in DECLARATIONS:
        return "declarations"
    return module if module in PROGRAMS else module.partition(".")[0]


def test_no_two_rooms_import_each_other():
    program, arrows = modules(), {}
    for name, path in program.items():
        for below in set(imported(path, program)) & program.keys():
            if room(name) != room(below):
                arrows.setdefault((room(name), room(below)), []).append((name, below))
    # configs/default.py gathers the keys of all parts; a stored config and a published snapshot
    # are read as configs
    gathers = {"configs.default", "configs.effects"}
    arrows = {
        rooms: [pair for pair in pairs if pair[0] not in gathers] for rooms, pairs in arrows.items()
    }
    both = [rooms for rooms, pairs in arrows.items() if pairs and arrows.get(rooms[::-1])]
    assert len(arrows) > 60
    assert {rooms: arrows[rooms] for rooms in both} == {}


def test_a_start_imports_no_library_that_few_runs_need():
    """Each of these takes a tenth of a start or more, so that functions that need it import it."""
    heavy = {"scipy", "sklearn", "skimage", "matplotlib", "pandas", "tensorflow", "wandb"}
    importers = set()
    for name, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
                importers |= {name for each in names if each and each.split(".")[0] in heavy}
    assert importers == {"reports.toy", "reports.plates"}


def configs_in(tree, path):
    """The functions and classes of a module that name `config` as a parameter or attribute."""

    def walk(node, name):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if node.name in ("from_config", BUILDERS.get(path)):
                return
            name = [*name, node.name]
        attribute = isinstance(node, ast.Attribute) and node.attr == "config"
        attribute &= getattr(getattr(node, "value", None), "id", None) != "tf"  # TensorFlow's
        parameter = isinstance(node, ast.arg) and node.arg == "config"
        field = isinstance(node, ast.AnnAssign) and getattr(node.target, "id", None) == "config"
        if attribute or parameter or field:
            yield f"{path}: {'.'.join(name)}"
        for child in ast.iter_child_nodes(node):
            yield from walk(child, name)

    return set(walk(tree, []))


def test_no_config_below_the_front_door():
    violations = set()
    for path in modules().values():
        name = str(path.relative_to(ROOT))
        if name not in READERS and not name.startswith("configs/"):
            violations |= configs_in(ast.parse(path.read_text()), name)
    assert sorted(violations) == [], "these name a config"


def test_what_names_a_config_is_seen():
    code = """
class A:
    config: int
    def f(self, config): return config.model.nf
    @classmethod
    def from_config(cls, config): return lambda config: config
def g(x): return x.config.seed
def h(*, config=None): return [lambda config: 1]
def fine(configs): config = configs.get_config(); return config.model
"""
    assert configs_in(ast.parse(code), "a.py") == {"a.py: A", "a.py: A.f", "a.py: g", "a.py: h"}
