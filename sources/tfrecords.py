"""TFRecord files and the messages in them, read without TensorFlow.

The data of an image are a tf.train.Example, a protobuf message that maps names to features
(protobuf.dev/programming-guides/encoding).
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from sources import digests
from sources.base import Picture, Unreadable
from storage.files import one_line, open_regular
from storage.records import checked, record_index

T = TypeVar("T")

# What is read of tensorflow/core/example/example.proto and feature.proto; a map is its entries.
_SCHEMA = """
name: "example.proto"
message_type { name: "Example" field { name: "features" number: 1 type_name: "Features" } }
message_type { name: "Features"
  field { name: "entry" number: 1 type_name: "Entry" label: LABEL_REPEATED } }
message_type { name: "Entry"
  field { name: "key" number: 1 type: TYPE_STRING }
  field { name: "value" number: 2 type_name: "Feature" } }
message_type { name: "Feature"
  field { name: "bytes_list" number: 1 type_name: "Bytes" }
  field { name: "int64_list" number: 3 type_name: "Ints" } }
message_type { name: "Bytes"
  field { name: "value" number: 1 type: TYPE_BYTES label: LABEL_REPEATED } }
message_type { name: "Ints"
  field { name: "value" number: 1 type: TYPE_INT64 label: LABEL_REPEATED } }
"""
_pool = descriptor_pool.DescriptorPool()
_pool.Add(text_format.Parse(_SCHEMA, descriptor_pb2.FileDescriptorProto()))
_Example = message_factory.GetMessageClass(_pool.FindMessageTypeByName("Example"))


class TFRecords:
    """The images of TFRecord files, found once; `parse` makes a picture of the data of one.

    Raises ValueError, which names the file, where it ends within a record or a length is damaged.
    """

    def __init__(self, paths: list[Path], parse: Callable[[bytes], Picture]):
        self.paths, self.parse = paths, parse
        indices = [record_index(path) for path in paths]
        self.file = np.repeat(np.arange(len(paths)), [len(index) for index in indices])
        self.start, self.size = np.concatenate(indices).T

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, i: int) -> Picture:
        return self.parsed(i, self.parse)

    def digest_of(self, index: NDArray[np.int64]) -> str:
        """The digest of sizes and checksums of the records `index`, in this order."""
        checks = np.zeros((len(index), 2), np.int64)
        checks[:, 0] = self.size[index]
        for number in np.unique(self.file[index]):
            with open_regular(self.paths[number]) as file:
                for row in np.flatnonzero(self.file[index] == number):
                    end = int(self.start[index[row]] + self.size[index[row]])
                    checks[row, 1] = int.from_bytes(os.pread(file.fileno(), 4, end), "little")
        return digests.joined(checks.tobytes())

    def parsed(self, i: int, parse: Callable[[bytes], T]) -> T:
        """The data of record i, parsed by `parse`; `Unreadable` where that fails."""
        path = self.paths[self.file[i]]
        try:
            with open_regular(path) as file:
                data = os.pread(file.fileno(), self.size[i] + 4, self.start[i])
            return parse(checked(data))
        except Exception as error:  # a damaged record makes the parser fail in any way
            start = self.start[i] - 12
            raise Unreadable(f"{path}, record at byte {start}: {one_line(error)}") from error


def parse_example(data: bytes) -> dict[str, list[bytes] | list[int]]:
    """The features of a serialised tf.train.Example by name; ValueError where `data` are none."""
    try:
        entries = _Example.FromString(data).features.entry
    except DecodeError as error:
        raise ValueError(str(error)) from error
    return {e.key: list(e.value.bytes_list.value or e.value.int64_list.value) for e in entries}
