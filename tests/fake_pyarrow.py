"""The parts of pyarrow that the program uses, on JSON files, for machines without it."""

import base64
import json
import sys
import types
from types import SimpleNamespace

import numpy as np

MAGIC = b"PAR1"


class Type(str):
    def get_field_index(self, name: str) -> int:
        return ["bytes", "path"].index(name) if name in ("bytes", "path") else -1


class Column:
    """A chunked array, and an array."""

    def __init__(self, cells: list):
        self.cells = cells

    def combine_chunks(self):
        return self

    def field(self, name: str):
        return Column([cell and cell[name] for cell in self.cells])

    def __getitem__(self, i: int):
        return SimpleNamespace(as_py=lambda: self.cells[i])

    @property
    def nbytes(self) -> int:
        return sum(len(cell or b"") for cell in self.cells)

    @property
    def null_count(self) -> int:
        return self.cells.count(None)

    def fill_null(self, value):
        return Column([value if cell is None else cell for cell in self.cells])

    def to_numpy(self):
        return np.array(self.cells)


class Schema(list):
    names = property(lambda self: [field.name for field in self])
    metadata = None


class ParquetFile:
    def __init__(self, file):
        content = file.read()
        if content[-4:] != MAGIC:
            raise ValueError("Parquet magic bytes not found in footer")
        self.table = json.loads(content[4:-4])
        kinds, rows = self.table["kinds"], self.table["rows"]
        number = len(next(iter(self.table["columns"].values())))
        self.starts = [*range(0, number, rows)]
        self.schema_arrow = Schema(
            SimpleNamespace(name=name, type=Type(kind)) for name, kind in kinds.items()
        )
        self.schema_arrow.metadata = {
            key.encode(): value.encode() for key, value in self.table["metadata"].items()
        }
        groups = [
            SimpleNamespace(num_rows=min(rows, number - start), total_byte_size=len(content))
            for start in self.starts
        ]
        self.metadata = SimpleNamespace(
            num_rows=number, num_row_groups=len(groups), row_group=groups.__getitem__
        )

    def read_row_group(self, group: int, columns: list[str]):
        start = self.starts[group]
        return self._read(columns, slice(start, start + self.table["rows"]))

    def read(self, columns: list[str]):
        return self._read(columns, slice(None))

    def _read(self, columns: list[str], rows: slice):
        name, part = columns[0], ""
        if name not in self.table["columns"]:
            name, _, part = name.partition(".")
        cells = self.table["columns"][name][rows]
        if self.table["kinds"][name] != "int64":
            cells = [cell and base64.b64decode(cell) for cell in cells]
        if part:
            cells = [{part: cell} for cell in cells]
        return SimpleNamespace(column=lambda i: Column(cells), column_names=[name])


def write(path, columns: dict, kinds: dict, metadata: dict, rows: int) -> None:
    """Columns of bytes or whole numbers, in row groups of so many `rows`."""
    coded = {
        name: cells if kinds[name] == "int64" else [base64.b64encode(c).decode() for c in cells]
        for name, cells in columns.items()
    }
    table = {"columns": coded, "kinds": kinds, "metadata": metadata, "rows": rows}
    path.write_bytes(MAGIC + json.dumps(table).encode() + MAGIC)


def install(monkeypatch) -> None:
    """Put these in place of pyarrow."""
    package, module = types.ModuleType("pyarrow"), types.ModuleType("pyarrow.parquet")
    package.parquet, module.ParquetFile = module, ParquetFile
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
