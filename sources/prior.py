"""The second data set of a method whose prior is not noise but images."""

from ml_collections import ConfigDict

from configs.schema import Key, Text
from sources.options import CLASSES

KEYS = {
    "data.prior_dataset": Key(
        "",
        Text(r"\w*", "a name of data.dataset"),
        "field matching: the data set that samples start from, of the shape and units of the data; "
        "one of those of data.dataset",
    ),
    "data.prior_path": Key(
        "", Text(), "field matching: data.path of data.prior_dataset='folder'", of_machine="file"
    ),
    "data.prior_classes": Key("", CLASSES, "field matching: data.classes of the prior"),
}


def options_of(data: ConfigDict) -> ConfigDict:
    """The options of the prior: those of `data`, a config's, with the dataset, path and classes.

    Raises ValueError where the prior is a folder without a path.
    """
    options = data.copy_and_resolve_references()
    options.update(dataset=data.prior_dataset, path=data.prior_path, classes=data.prior_classes)
    options.update(prior_dataset="", condition_path="")
    if data.prior_dataset.lower() == "folder" and not data.prior_path:
        raise ValueError("data.prior_dataset='folder' needs data.prior_path, as data.path")
    return options
