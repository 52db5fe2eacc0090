"""Keys of the data, whatever their source."""

from configs.schema import Either, Key, Numbers, OneOf, Text, whole
from sources.base import MOST_CLASSES

CLASSES = Text(r"[^\0\n]*", "names or numbers of classes with commas between them")

KEYS = {
    "data.dataset": Key("", OneOf(registry="sources.SOURCES"), "where the images come from"),
    "data.image_size": Key(
        32,
        Either(whole(0, 4096), Numbers(whole(1, 4096), (2,))),
        "height and width: one number, or two as in (6, 10); images of other sizes are cut and "
        "resized; 0: the size of the data, if all have one",
    ),
    "data.num_channels": Key(
        3,
        whole(0, 1024),
        "1 (grey) or 3 (colour), of an .npy or .npz any; 0: as many as the data have",
    ),
    "data.num_classes": Key(
        0,
        whole(-1, MOST_CLASSES),
        "class labels of the images, which the network is given; 0: none; -1: "
        "as many as the data have",
    ),
    "data.classes": Key(
        "", CLASSES, "use only images of these classes, such as '2,3'; '': of all classes"
    ),
    "data.conditions": Key(
        "",
        Text(r"[a-z_]*( *, *[a-z_]+)*", "names with commas between them"),
        "conditions besides class labels that the source has and the network takes, such as "
        "'vector'; '': none",
    ),
    "data.resident_bytes": Key(
        2**31, whole(0), "data of at most this size, decoded, stay in memory"
    ),
    "data.num_workers": Key(
        -1, whole(-1, 1024), "processes that decode larger data; -1: as many as processors, up to 8"
    ),
    "data.changed": Key(
        "refuse",
        OneOf(("refuse", "allow")),
        "if the data are not those that the run began with: 'refuse' to start, or 'allow' it for "
        "this start; classes keep their numbers",
    ),
    "data.digest": Key(
        "content",
        OneOf(("content", "names")),
        "how a run recognises its data: 'content' reads each file of a folder once, 'names' only "
        "compares names and sizes, for network disks",
    ),
}
