"""Files in which data sets are published, made of arrays: CIFAR, MNIST, tars, parquet."""

import functools
import gzip
import io
import json
import struct
import tarfile
from pathlib import Path

import fake_pyarrow
import numpy as np
from data_files import encoded

NAMES = ("ant", "bee", "cat", "dog", "emu", "fox", "gnu", "hen", "ibis", "jay")


# --- CIFAR ----------------------------------------------------------------------------------------


def planes(images: np.ndarray) -> np.ndarray:
    """Images (n, 32, 32, 3) as rows (n, 3072): red, green, blue."""
    return np.stack([image.transpose(2, 0, 1).ravel() for image in images])


def text(word: bytes) -> bytes:
    """A string as Python 2 pickles it."""
    return b"U" + bytes([len(word)]) + word


def pickle_of_python_2(entries: dict) -> bytes:
    """A dictionary of lists of strings or small numbers, and arrays (n, K) of bytes."""

    def item(value) -> bytes:
        if isinstance(value, bytes):
            return text(value)
        if isinstance(value, int):
            return b"K" + bytes([value])
        if isinstance(value, list):
            return b"](" + b"".join(map(item, value)) + b"e"
        rows, columns = value.shape
        return (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
            + struct.pack("<cHcH", b"M", rows, b"M", columns)
            + b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
            + b"J\xff\xff\xff\xffK\x00tb\x89T"
            + struct.pack("<I", value.size)
            + value.tobytes()
            + b"tb"
        )

    pairs = b"".join(text(key) + item(value) for key, value in entries.items())
    return b"\x80\x02}(" + pairs + b"u."


def cifar_python(images: np.ndarray, labels: list[int]) -> dict[str, bytes]:
    """Files of CIFAR-10 for Python: equal batches of the images but for the last sixth."""
    files, parts = {}, np.array_split(np.arange(len(images)), 6)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, part in zip(names, parts, strict=True):
        entries = {b"batch_label": b"a batch", b"labels": [labels[i] for i in part]}
        entries |= {b"data": planes(images[part]), b"filenames": [b"%d.png" % i for i in part]}
        files[f"cifar-10-batches-py/{name}"] = pickle_of_python_2(entries)
    meta = {b"label_names": [name.encode() for name in NAMES], b"num_vis": 12}
    files["cifar-10-batches-py/batches.meta"] = pickle_of_python_2(meta)
    files["cifar-10-batches-py/readme.html"] = b"<html>"
    return files


def cifar_binary(images: np.ndarray, labels: list[int]) -> dict[str, bytes]:
    """Files of CIFAR-10's binary version, split alike."""
    files, parts = {}, np.array_split(np.arange(len(images)), 6)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, part in zip(names, parts, strict=True):
        rows = [bytes([labels[i]]) + planes(images[[i]]).tobytes() for i in part]
        files[f"cifar-10-batches-bin/{name}"] = b"".join(rows)
    files["cifar-10-batches-bin/batches.meta.txt"] = "\n".join([*NAMES, "", ""]).encode()
    return files


def cifar_100(images: np.ndarray, labels: list[int], binary: bool) -> dict[str, bytes]:
    """Files of CIFAR-100, the last sixth to test on; the coarse labels are 99."""
    files, parts = {}, np.split(np.arange(len(images)), [len(images) * 5 // 6])
    for name, part in zip(("train", "test"), parts, strict=True):
        if binary:
            rows = [bytes([99, labels[i]]) + planes(images[[i]]).tobytes() for i in part]
            files[f"cifar-100-binary/{name}.bin"] = b"".join(rows)
        else:
            entries = {b"fine_labels": [labels[i] for i in part], b"data": planes(images[part])}
            entries[b"coarse_labels"] = [99] * len(part)
            files[f"cifar-100-python/{name}"] = pickle_of_python_2(entries)
    if binary:
        files["cifar-100-binary/fine_label_names.txt"] = "\n".join(NAMES).encode()
    else:
        names = [name.encode() for name in NAMES]
        files["cifar-100-python/meta"] = pickle_of_python_2({b"fine_label_names": names})
    return files


# --- archives -------------------------------------------------------------------------------------


def write_files(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def write_tar(path: Path, files: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> None:
    """A tar file, packed where its name ends in gz, with the folders that the files are in."""
    mode = "w:gz" if path.suffix == ".gz" else "w"
    with tarfile.open(path, mode, format=format) as archive:
        for folder in sorted({str(Path(name).parent) for name in files} - {"."}):
            member = tarfile.TarInfo(folder)
            member.type = tarfile.DIRTYPE
            archive.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


# --- MNIST ----------------------------------------------------------------------------------------


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    """An array of bytes as MNIST stores it."""
    head = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def mnist(images: np.ndarray, labels: np.ndarray, tests: int, packed: bool) -> dict[str, bytes]:
    """The four files of images (n, H, W), of which the last `tests` are to test on."""
    files = {}
    for name, part in (("train", slice(None, -tests)), ("t10k", slice(-tests, None))):
        files[f"{name}-images-idx3-ubyte"] = idx(images[part])
        files[f"{name}-labels-idx1-ubyte"] = idx(labels[part].astype(np.uint8))
    if packed:
        return {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    return files


# --- WebDataset and parquet -----------------------------------------------------------------------


def examples(images: np.ndarray, labels, first: int = 0, kind: str = "cls") -> dict[str, bytes]:
    """Images and their labels as WebDataset names them: 000007.png, 000007.cls."""
    files = {}
    for i, (image, label) in enumerate(zip(images, labels, strict=True), first):
        pixels = image[..., 0] if image.shape[2] == 1 else image
        files[f"{i:06d}.png"] = encoded(pixels)
        content = str(label) if kind == "cls" else f'{{"caption": "x", "label": {label}}}'
        files[f"{i:06d}.{kind}"] = content.encode()
    return files


@functools.cache  # before something stands for it
def has_pyarrow() -> bool:
    """True if pyarrow can be imported; it may be installed with an incompatible numpy."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        return False
    return True


def write_parquet(path: Path, images, labels=None, names=(), rows: int = 3, struct=True) -> None:
    """Encoded images, in a structure as Hugging Face has them or as bytes, with labels.

    Without pyarrow it is a file for `fake_pyarrow`.
    """
    contents = [encoded(image[..., 0] if image.shape[2] == 1 else image) for image in images]
    columns, kinds = {"image" if struct else "jpg": contents}, {}
    kinds["image" if struct else "jpg"] = (
        "struct<bytes: binary, path: string>" if struct else "binary"
    )
    if labels is not None:
        columns["label"], kinds["label"] = [*map(int, labels)], "int64"
    features = {"label": {"names": [*names], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    if not has_pyarrow():
        fake_pyarrow.write(path, columns, kinds, metadata, rows)
        return
    import pyarrow.parquet

    if struct:
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        cells = [{"bytes": content, "path": None} for content in contents]
        columns["image"] = pyarrow.array(cells, kind)
    table = pyarrow.table(columns).replace_schema_metadata(metadata or None)
    pyarrow.parquet.write_table(table, path, row_group_size=rows)
