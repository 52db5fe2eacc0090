"""Count where a config goes: the files that it enters, and how often it comes back up.

    python3 benchmarks/config_flow.py [--calls]

The parameter `config` of run_lib's `train`, `evaluate` and `sample` is followed as data, by reading
the source: through the variables that it is assigned to, any attribute `.config`, its copies and
the results of functions that return it, alone or in a tuple; and into every function that it is
given to, also by `partial`. A callee from a table (`named(NETWORKS, ...)`, `SAMPLERS[name]`) is
each value of the table; a method of an unknown object is each method of that name that has a
parameter `config`.

*Files* have a function that is given the config. *Up*: with the calls in the order of the source,
depth first, each function entered once for each set of parameters that hold the config, a step
from one call to the next goes up where the file entered next lies in a higher layer. A file's layer
is one more than the highest of those that it imports.

The first row counts the whole config, and leaves out `from_config`, where a part may read its own
keys. The second also follows sections (`config.data`) and `from_config`. With --calls the calls of
the first row are listed; an arrow `^` goes up.
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUTSIDE = {"tests", "benchmarks"}
SECTIONS = {"data", "training", "optim", "model", "sampling", "eval"}
COPIES = {"copy_and_resolve_references", "lock", "unlock"}
Function = tuple[str, str]  # module, name or Class.name


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(ROOT.glob("**/*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if not OUTSIDE & {parts[0]} and not parts[0].startswith("."):
            found[".".join(parts).removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


class Program:
    """Functions, methods and what each module's names stand for."""

    def __init__(self):
        self.trees = modules()
        self.layers: dict[str, int] = {}
        self.functions: dict[Function, ast.FunctionDef] = {}
        self.methods: dict[str, list[Function]] = defaultdict(list)
        self.names: dict[str, dict[str, tuple]] = {module: {} for module in self.trees}
        for module, tree in self.trees.items():
            for node in ast.walk(tree):
                self._imports(module, node)
            for node in tree.body:
                self._definition(module, node)

    def _imports(self, module: str, node: ast.AST) -> None:
        names = self.names[module]
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in self.trees:
                    names[alias.asname or alias.name] = "module", alias.name
        elif isinstance(node, ast.ImportFrom) and node.module in self.trees:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                target = (
                    ("module", full) if full in self.trees else ("name", node.module, alias.name)
                )
                names[alias.asname or alias.name] = target

    def _definition(self, module: str, node: ast.stmt) -> None:
        names = self.names[module]
        if isinstance(node, ast.FunctionDef):
            self.functions[module, node.name] = node
            names[node.name] = "function", module, node.name
        elif isinstance(node, ast.ClassDef):
            names[node.name] = "class", module, node.name
            for method in (n for n in node.body if isinstance(n, ast.FunctionDef)):
                self.functions[module, f"{node.name}.{method.name}"] = method
                self.methods[method.name].append((module, f"{node.name}.{method.name}"))
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            names[getattr(target, "id", "")] = "table", module, node.value

    def layer(self, module: str) -> int:
        if module not in self.layers:
            imported = {t[1] for t in self.names[module].values() if t[0] in ("module", "name")}
            self.layers[module] = 1 + max(map(self.layer, imported - {module}), default=0)
        return self.layers[module]

    def target(self, module: str, node: ast.expr) -> tuple | None:
        """What a name or module.name stands for; Class.method is ("function", ...)."""
        if isinstance(node, ast.Attribute):
            owner = self.target(module, node.value)
            if owner and owner[0] == "module":
                return self.target(owner[1], ast.Name(node.attr))
            if owner and owner[0] == "class":
                return "function", owner[1], f"{owner[2]}.{node.attr}"
            return None
        found = self.names[module].get(node.id) if isinstance(node, ast.Name) else None
        return self.target(found[1], ast.Name(found[2])) if found and found[0] == "name" else found

    def callees(self, module: str, node: ast.expr, local: dict, owner: str) -> list[Function]:
        """The functions that a call of `node` may enter, within a method of the class `owner`."""
        if isinstance(node, ast.Name) and node.id in local:
            return local[node.id]
        if isinstance(node, ast.Subscript):
            return self._values(module, node.value)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("named"):
            return self._values(module, node.args[0])
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "partial":
            return self.callees(module, node.args[0], local, owner)
        target = self.target(module, node)
        if owner and isinstance(node, ast.Name) and node.id == "cls":
            target = "class", module, owner
        elif (
            owner and isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls")
        ):
            target = "function", module, f"{owner}.{node.attr}"
        if target and target[0] in ("function", "class"):
            name = target[2] if target[0] == "function" else f"{target[2]}.__init__"
            return [(target[1], name)] if (target[1], name) in self.functions else []
        if isinstance(node, ast.Attribute) and not self.target(module, node.value):
            candidates = self.methods[node.attr]
            return [f for f in candidates if "config" in self.parameters(f)]
        return []

    def _values(self, module: str, node: ast.expr) -> list[Function]:
        target = self.target(module, node)
        if not target or target[0] != "table":
            return []
        return [f for value in target[2].values for f in self.callees(target[1], value, {}, "")]

    def parameters(self, function: Function) -> list[str]:
        """Names in their order, without `self` or `cls`."""
        arguments = self.functions[function].args
        names = [a.arg for a in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
        return names[1:] if "." in function[1] else names


class Flow:
    """Follows the config from one function; `calls` are (caller, callee, line) in their order."""

    def __init__(self, program: Program, everything: bool):
        self.program, self.everything = program, everything
        self.calls: list[tuple[Function, Function, int]] = []
        self.returned: dict[tuple, set[int]] = {}  # places in a function's result

    def follow(self, function: Function, holders: set[str]) -> set[int]:
        key = function, frozenset(holders)
        if key not in self.returned:
            self.returned[key] = set()
            _Body(self, function, set(holders), self.returned[key])
        return self.returned[key]

    def files(self) -> set[str]:
        return {"run_lib", *(callee[0] for _, callee, _ in self.calls)}

    def rises(self) -> list[bool]:
        """Whether each call is in a higher layer than the one before."""
        layers = [self.program.layer(m) for m in ("run_lib", *(c[0] for _, c, _ in self.calls))]
        return [after > before for before, after in zip(layers, layers[1:], strict=False)]


class _Body(ast.NodeVisitor):
    """One function, statement by statement."""

    def __init__(self, flow: Flow, function: Function, holders: set[str], returned: set[int]):
        self.flow, self.function, self.holders, self.returned = flow, function, holders, returned
        self.local: dict[str, list[Function]] = {}
        self.results: dict[int, set[int]] = {}  # by call, so that each is followed once
        for statement in flow.program.functions[function].body:
            self.visit(statement)

    def holds(self, node: ast.expr) -> bool:
        """Whether the value of `node` is the config."""
        if isinstance(node, ast.Name):
            return node.id in self.holders
        if isinstance(node, ast.Attribute):
            section = self.flow.everything and node.attr in SECTIONS and self.holds(node.value)
            return node.attr == "config" or section
        if isinstance(node, ast.IfExp):
            return self.holds(node.body) or self.holds(node.orelse)
        if not isinstance(node, ast.Call):
            return False
        copied = isinstance(node.func, ast.Attribute) and node.func.attr in COPIES
        return copied and self.holds(node.func.value) or 0 in self.call(node)

    def call(self, node: ast.Call) -> set[int]:
        """The places in the call's result that are the config."""
        if id(node) in self.results:
            return self.results[id(node)]
        places = self.results[id(node)] = set()
        callee, arguments, program = node.func, node.args, self.flow.program
        if ast.unparse(callee) == "partial" and arguments:
            callee, arguments = arguments[0], arguments[1:]
        module, name = self.function
        owner = name.rpartition(".")[0]
        for each in program.callees(module, callee, self.local, owner):
            if each[1].endswith(".from_config") and not self._counts(callee, each):
                continue
            names = program.parameters(each)
            holders = {p for p, a in zip(names, arguments, strict=False) if self.holds(a)}
            holders |= {k.arg for k in node.keywords if k.arg in names and self.holds(k.value)}
            if holders:
                self.flow.calls.append((self.function, each, node.lineno))
                places |= self.flow.follow(each, holders)
        return places

    def _counts(self, callee: ast.expr, function: Function) -> bool:
        """Of a method of an unknown object only those of the caller's own folder."""
        same = function[0].split(".")[0] == self.function[0].split(".")[0]
        return self.flow.everything and (same or not isinstance(callee, ast.Attribute))

    def bind(self, target: ast.expr, value: ast.expr) -> None:
        module, name = self.function
        if isinstance(target, ast.Name):
            self.holders |= {target.id} if self.holds(value) else set()
            if isinstance(value, ast.Call | ast.Subscript):
                owner = name.rpartition(".")[0]
                functions = self.flow.program.callees(module, value, self.local, owner)
                self.local |= {target.id: functions} if functions else {}
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for each, part in zip(target.elts, value.elts, strict=False):
                self.bind(each, part)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Call):
            names = [each.id for each in target.elts if isinstance(each, ast.Name)]
            self.holders |= {n for i, n in enumerate(names) if i in self.call(value)}

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        self.call(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self.bind(target, node.value)

    def visit_Return(self, node: ast.Return) -> None:
        self.generic_visit(node)
        parts = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        self.returned |= {i for i, part in enumerate(parts) if part and self.holds(part)}
        if isinstance(node.value, ast.Call):
            self.returned |= self.call(node.value)


def main() -> None:
    program = Program()
    print(f"{'from':<10}{'counted':<42}{'files':>6}{'up':>5}{'calls':>7}")
    for start in ("train", "evaluate", "sample"):
        for everything in (False, True):
            flow = Flow(program, everything)
            flow.follow(("run_lib", start), {"config"})
            words = "sections and from_config too" if everything else "the whole config"
            numbers = f"{len(flow.files()):>6}{sum(flow.rises()):>5}{len(flow.calls):>7}"
            print(f"{start:<10}{words:<42}{numbers}")
            if "--calls" in sys.argv and not everything:
                for (caller, callee, line), up in zip(flow.calls, flow.rises(), strict=True):
                    print(
                        f"    {'^' if up else ' '} {':'.join(caller)}:{line} -> {':'.join(callee)}"
                    )
            elif not everything:
                print(f"    {', '.join(sorted(flow.files()))}")


if __name__ == "__main__":
    main()
