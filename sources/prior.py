"""The prior of a method that starts from the images of a second data set, not from noise."""

from ml_collections import ConfigDict

from configs.schema import Key, Text
from sources.options import CLASSES

KEYS = {
    "data.prior_dataset": Key(
        "",
        Text(r"\w*", "a name of data.dataset"),
        "field matching: the data set that samples start from, a value of data.dataset; its images "
        "have the shape and the units of the data",
    ),
    "data.prior_path": Key(
        "", Text(), "field matching: as data.path, where the prior is 'folder'", of_machine="file"
    ),
    "data.prior_classes": Key("", CLASSES, "field matching: as data.classes, for the prior"),
}


def options_of(data: ConfigDict) -> ConfigDict:
    """Options of the prior: those of a config's `data`, with the prior's dataset, path and classes.

    Raises ValueError where the prior is a folder without a path.
    """
    options = data.copy_and_resolve_references()
    options.update(dataset=data.prior_dataset, path=data.prior_path, classes=data.prior_classes)
    options.update(prior_dataset="", condition_path="")
    if data.prior_dataset.lower() == "folder" and not data.prior_path:
        raise ValueError("data.prior_dataset='folder' needs data.prior_path")
    return options
