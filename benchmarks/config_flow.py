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
Function = tuple[str, str]  # module, and name or Class.name


class Program:
    """The functions of all modules, and what each module's names stand for."""

    def __init__(self):
        self.functions: dict[Function, ast.FunctionDef] = {}
        self.methods: dict[str, list[Function]] = defaultdict(list)
        self.names: dict[str, dict[str, tuple]] = {}  # (kind, module, what it is called there)
        self.layers: dict[str, int] = {}
        paths = [p.relative_to(ROOT) for p in sorted(ROOT.glob("**/*.py"))]
        paths = [p for p in paths if p.parts[0] not in OUTSIDE and p.parts[0][0] != "."]
        dotted = [".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in paths]
        self.names = {module: {} for module in dotted}
        for module, path in zip(dotted, paths, strict=True):
            self._read(module, ast.parse((ROOT / path).read_text()))

    def _read(self, module: str, tree: ast.Module) -> None:
        names = self.names[module]
        for node in ast.walk(tree):
            source = getattr(node, "module", None)
            for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
                full = f"{source}.{alias.name}" if source else alias.name
                if full in self.names:
                    names[alias.asname or alias.name] = "module", full, ""
                elif source in self.names:
                    names[alias.asname or alias.name] = "name", source, alias.name
        for node in tree.body:
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
                names[ast.unparse(target)] = "table", module, node.value

    def layer(self, module: str) -> int:
        if module not in self.layers:
            imported = {t[1] for t in self.names[module].values() if t[0] in ("module", "name")}
            self.layers[module] = 1 + max(map(self.layer, imported - {module}), default=0)
        return self.layers[module]

    def target(self, module: str, node: ast.expr) -> tuple | None:
        """The definition that a name, module.name or Class.method refers to."""
        if isinstance(node, ast.Attribute):
            kind, place, name = self.target(module, node.value) or ("", "", "")
            if kind == "class":
                return "function", place, f"{name}.{node.attr}"
            return self.target(place, ast.Name(node.attr)) if kind == "module" else None
        entry = self.names[module].get(node.id) if isinstance(node, ast.Name) else None
        return self.target(entry[1], ast.Name(entry[2])) if entry and entry[0] == "name" else entry

    def callees(self, caller: Function, node: ast.expr, local: dict) -> list[Function]:
        """The functions that a call of `node` may enter; `local` are those of local names."""
        module, owner = caller[0], caller[1].rpartition(".")[0]
        if isinstance(node, ast.Name) and node.id in local:
            return local[node.id]
        words = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if words == "partial":
            return self.callees(caller, node.args[0], local)
        if isinstance(node, ast.Subscript) or words.endswith("named"):
            table = node.args[0] if words else node.value
            kind, place, content = self.target(module, table) or ("", "", "")
            values = content.values if kind == "table" else ()
            return [f for value in values for f in self.callees((place, ""), value, {})]
        kind, place, name = self.target(module, node) or ("", module, "")
        if owner and ast.unparse(node) == "cls":
            kind, name = "class", owner
        elif (
            owner and isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls")
        ):
            kind, name = "function", f"{owner}.{node.attr}"
        if kind in ("function", "class"):
            function = place, name if kind == "function" else f"{name}.__init__"
            return [function] if function in self.functions else []
        if isinstance(node, ast.Attribute) and not self.target(module, node.value):
            return [f for f in self.methods[node.attr] if "config" in self.parameters(f)]
        return []

    def parameters(self, function: Function) -> list[str]:
        """Names in their order, without `self` or `cls`."""
        arguments = self.functions[function].args
        names = [a.arg for a in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
        return names[1:] if "." in function[1] else names


class Flow:
    """Where the config goes from `start`: `calls` (caller, callee, line) in their order."""

    def __init__(self, program: Program, start: Function, everything: bool):
        self.program, self.everything = program, everything
        self.calls: list[tuple[Function, Function, int]] = []
        self.returned: dict[tuple, set[int]] = {}  # places in a function's result
        self.follow(start, {"config"})
        entered = [start[0], *(callee[0] for _, callee, _ in self.calls)]
        self.files, layers = {*entered}, [*map(program.layer, entered)]
        self.ups = [following > layer for layer, following in zip(layers, layers[1:], strict=False)]

    def follow(self, function: Function, holders: set[str]) -> set[int]:
        key = function, frozenset(holders)
        if key not in self.returned:
            self.returned[key] = set()
            body = Body(self, function, set(holders), self.returned[key])
            for statement in self.program.functions[function].body:
                body.visit(statement)
        return self.returned[key]


class Body(ast.NodeVisitor):
    """Follows the config through one function, whose variables `holders` hold it."""

    def __init__(self, flow: Flow, function: Function, holders: set[str], returned: set[int]):
        self.flow, self.function, self.holders, self.returned = flow, function, holders, returned
        self.local: dict[str, list[Function]] = {}
        self.results: dict[int, set[int]] = {}  # by call, so that each is followed once

    def holds(self, node: ast.expr | None) -> bool:
        """Whether the value of `node` is the config."""
        if isinstance(node, ast.Attribute):
            section = self.flow.everything and node.attr in SECTIONS and self.holds(node.value)
            return node.attr == "config" or section
        if isinstance(node, ast.IfExp):
            return self.holds(node.body) or self.holds(node.orelse)
        if isinstance(node, ast.Call):
            copied = getattr(node.func, "attr", "") in COPIES and self.holds(node.func.value)
            return copied or 0 in self.visit_Call(node)
        return isinstance(node, ast.Name) and node.id in self.holders

    def visit_Call(self, node: ast.Call) -> set[int]:
        """The places in the call's result that are the config."""
        if id(node) in self.results:
            return self.results[id(node)]
        places = self.results[id(node)] = set()
        self.generic_visit(node)
        callee, arguments, program = node.func, node.args, self.flow.program
        if ast.unparse(callee) == "partial":
            callee, arguments = arguments[0], arguments[1:]
        for function in program.callees(self.function, callee, self.local):
            if function[1].split(".")[-1] == "from_config" and not self._counts(callee, function):
                continue
            names = program.parameters(function)
            holders = {p for p, a in zip(names, arguments, strict=False) if self.holds(a)}
            holders |= {k.arg for k in node.keywords if k.arg in names and self.holds(k.value)}
            if holders:
                self.flow.calls.append((self.function, function, node.lineno))
                places |= self.flow.follow(function, holders)
        return places

    def _counts(self, callee: ast.expr, function: Function) -> bool:
        """Callers of a `from_config` through an unknown object: only those of its own folder."""
        same = function[0].split(".")[0] == self.function[0].split(".")[0]
        return self.flow.everything and (same or not isinstance(callee, ast.Attribute))

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self._bind(target, node.value)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.holders |= {target.id} if self.holds(value) else set()
            if isinstance(value, ast.Call | ast.Subscript):
                functions = self.flow.program.callees(self.function, value, self.local)
                self.local |= {target.id: functions} if functions else {}
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for part, content in zip(target.elts, value.elts, strict=False):
                self._bind(part, content)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Call):
            places = self.visit_Call(value)
            self.holders |= {ast.unparse(e) for i, e in enumerate(target.elts) if i in places}

    def visit_Return(self, node: ast.Return) -> None:
        self.generic_visit(node)
        parts = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        self.returned |= {i for i, part in enumerate(parts) if self.holds(part)}
        if isinstance(node.value, ast.Call):
            self.returned |= self.visit_Call(node.value)


def main() -> None:
    program = Program()
    print(f"{'from':<10}{'what is followed':<42}{'files':>6}{'up':>5}{'calls':>7}")
    for start in ("train", "evaluate", "sample"):
        for everything in (False, True):
            flow = Flow(program, ("run_lib", start), everything)
            words = "sections and from_config too" if everything else "the whole config"
            numbers = f"{len(flow.files):>6}{sum(flow.ups):>5}{len(flow.calls):>7}"
            print(f"{start:<10}{words:<42}{numbers}")
            if everything:
                continue
            print(f"    {', '.join(sorted(flow.files))}")
            for (caller, callee, line), up in zip(flow.calls, flow.ups, strict=True):
                if "--calls" in sys.argv:
                    print(f"  {'^' if up else ' '} {':'.join(caller)}:{line} -> {':'.join(callee)}")


if __name__ == "__main__":
    main()
