"""Names of Hugging Face's library `datasets`, which the module of that name here hides."""

NAMES = ("load_dataset", "load_from_disk", "Dataset", "DatasetDict", "IterableDataset")


def refuse(name: str):
    """The `__getattr__` of the module `datasets`: an unknown `name`, or one of the library's.

    Raises ImportError, which says what to write instead, for the library's, else AttributeError.
    """
    if name in NAMES:
        raise ImportError(
            "`datasets` is a module of this project, not Hugging Face's library, which has "
            f"{name}: save the data as parquet files elsewhere; see docs/data.md"
        )
    raise AttributeError(f"module 'datasets' has no attribute {name!r}")
