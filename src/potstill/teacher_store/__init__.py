"""Teachers' outputs, kept on the disk: computed once for each (image, view), read ever after."""

from potstill.teacher_store.shelf import (
    as_objects,
    default_root,
    describe,
    find,
    prune,
    verify,
)
from potstill.teacher_store.store import Counts, Settings, Stored, TeacherStore, stored

__all__ = [
    "Counts",
    "Settings",
    "Stored",
    "TeacherStore",
    "as_objects",
    "default_root",
    "describe",
    "find",
    "prune",
    "stored",
    "verify",
]
