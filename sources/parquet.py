"""Images in parquet files, as Hugging Face stores data sets: encoded images, and class labels.

They are read by pyarrow, which is an optional requirement. A row is read with its whole row group.
Since batches are read in order, a group is read once for all its rows in a batch; the last groups
are kept. Images at random are read fast where these are all groups, else more slowly than in files.
"""

import contextlib
import io
import json
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from sources.base import Classes
from sources.digests import joined
from sources.listing import Listing, Omitted
from sources.rules import Rules
from sources.shards import Shards
from storage.files import MAX_JSON, may_unpack_to, one_line, open_regular, refusing

START = b"PAR1"  # of a file
MOST_BYTES = 2**28  # of row groups that a process keeps, but for one that is larger
IMAGES = ("image", "img", "images", "picture", "png", "jpg", "jpeg", "webp", "bytes")  # columns
LABELS = ("label", "labels", "cls", "class", "target", "fine_label", "y")


def parquet():
    """The module pyarrow.parquet; ValueError where it cannot be imported."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        says = "parquet files are read by pyarrow: pip install pyarrow"
        raise ValueError(f"{says} ({one_line(error)})") from error
    return pyarrow.parquet


@contextlib.contextmanager
def _opened(path: Path, says: str = "cannot be read as a parquet file") -> Iterator[Any]:
    """The file at `path`, as pyarrow reads it; ValueError, "{path} {says}", where it is damaged."""
    with refusing(path, says), open_regular(path) as file:
        try:
            yield parquet().ParquetFile(file)
        except OSError as error:
            if error.errno is None:  # pyarrow's own, of what is damaged
                raise ValueError(one_line(error)) from error
            raise


class Parquet:
    """The rows of parquet files, each an image; ValueError where a file is damaged or has none."""

    def __init__(self, shards: Shards, rules: Rules):
        parquet()
        self._shards = shards
        tops, files, self.places = shards.tops(rules.find_splits), {}, []
        self._rows: list[np.ndarray] = []  # of each shard: the first row of each group, and the end
        self._columns: list[str] = []  # of the bytes of the images
        for path, stem, top in zip(shards.paths, shards.stems, tops, strict=True):
            with _opened(path) as content:
                metadata, size = content.metadata, path.stat().st_size
                groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
                if any(group.total_byte_size > may_unpack_to(size) for group in groups):
                    raise ValueError("a row group of it unpacks to a hundred times its size")
                if not all(0 <= group.num_rows <= size for group in groups):
                    raise ValueError("it says that it has more rows than bytes")
                self._rows.append(np.cumsum([0, *(group.num_rows for group in groups)]))
                self._columns.append(_column_of_images(content.schema_arrow))
            names = [f"{row:08d}" for row in range(self._rows[-1][-1])]
            files |= {f"{stem}{name}": f"{len(self._rows) - 1}:{name}" for name in names}
            self.places += [top + name for name in names]
        self.listing = Listing(files, None, Omitted())
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def open(self, path: str) -> IO[bytes]:
        shard, row = map(int, path.split(":"))
        group = int(np.searchsorted(self._rows[shard], row, "right")) - 1
        content = self._group(shard, group)[row - int(self._rows[shard][group])].as_py()
        if content is None:
            raise ValueError("the row has no image, or only a path to one")
        return io.BytesIO(content)

    def _group(self, shard: int, group: int) -> Any:
        """The bytes of the images of a row group, as an array of pyarrow."""
        if (shard, group) not in self._groups:
            column = self._columns[shard]
            with _opened(self._shards.paths[shard]) as content:
                table = content.read_row_group(group, columns=[column])
            array = table.column(0).combine_chunks()
            if column != table.column_names[0]:  # a field of a structure
                array = array.field(column.rpartition(".")[2])
            self._groups[shard, group] = array
            while len(self._groups) > 1 and self._size() > MOST_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end((shard, group))
        return self._groups[shard, group]

    def _size(self) -> int:
        return sum(array.nbytes for array in self._groups.values())

    def digest(self, paths: list[str], content: bool) -> str:
        return joined("\0".join(paths), self._shards.digest(content))

    def classes(self) -> Classes | None:
        """The column of labels, with the names that Hugging Face keeps in the schema."""
        return self._classes

    @cached_property
    def _classes(self) -> Classes | None:
        labels, names, has_labels = [], (), False
        for path in self._shards.paths:
            with _opened(path, "gives no class labels") as content:
                schema = content.schema_arrow
                column = next((name for name in LABELS if name in schema.names), None)
                if column is None:
                    labels.append(np.full(content.metadata.num_rows, -1))
                    continue
                has_labels, values = True, content.read(columns=[column]).column(0)
                values = (values.fill_null(-1) if values.null_count else values).to_numpy()
                if values.dtype.kind not in "iu":
                    raise ValueError(f"its column {column} holds {values.dtype}, no whole numbers")
                labels.append(values)
                names = names or _names_of_classes(schema.metadata or {}, column)
        return Classes(np.concatenate(labels), names) if has_labels else None

    def __getstate__(self) -> dict:
        """Without row groups, which each process reads itself, and without names."""
        return self.__dict__ | {"_groups": OrderedDict(), "listing": None, "places": None}


def _column_of_images(schema: Any) -> str:
    """The column with the bytes of encoded images: "image.bytes", or one of bytes alone."""
    columns = {}
    for field in schema:
        if str(field.type).startswith("struct") and field.type.get_field_index("bytes") >= 0:
            columns[field.name] = f"{field.name}.bytes"
        elif str(field.type) in ("binary", "large_binary"):
            columns[field.name] = field.name
    named = [name for name in IMAGES if name in columns] or (
        [*columns] if len(columns) == 1 else []
    )
    if not named:
        raise ValueError(f"it has no column of images, such as image; it has {schema.names}")
    return columns[named[0]]


def _names_of_classes(metadata: dict[bytes, bytes], column: str) -> tuple[str, ...]:
    """The names of a ClassLabel in the metadata of Hugging Face's library; () without any."""
    content = metadata.get(b"huggingface", b"")
    try:
        if len(content) > MAX_JSON:
            return ()
        names = json.loads(content)["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()
    is_list = type(names) is list and all(type(name) is str for name in names)
    return tuple(names) if is_list and len({*names}) == len(names) else ()
