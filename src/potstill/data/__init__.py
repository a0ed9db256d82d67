"""Images to train and test on: named sets, folders and a user's own datasets, all replayable."""

from potstill.data.folder import FolderSet
from potstill.data.registry import DATASETS, DatasetInfo, load
from potstill.data.resident import Resident
from potstill.data.split import Data, ImageSet, Split, steps
from potstill.data.user import UserSet, from_dataset

__all__ = [
    "DATASETS",
    "Data",
    "DatasetInfo",
    "FolderSet",
    "ImageSet",
    "Resident",
    "Split",
    "UserSet",
    "from_dataset",
    "load",
    "steps",
]
